"""What is stored: modalities, statuses, the tables and their columns.

Legend: D is the encoder's width (1024 for imagebind-huge), T the seconds of a clip, one token each, W the
number of real tokens of a question.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

#: Version of the table layout. A store with another layout is refused.
SCHEMA_VERSION = 2

#: Field metadata that Lance reads: concurrent upserts of a key conflict instead of inserting it twice.
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


class Modality(StrEnum):
    """The two modalities that can go missing."""

    AUDIO = "audio"
    VISUAL = "visual"

    @property
    def other(self) -> "Modality":
        """The other one."""
        return Modality.VISUAL if self is Modality.AUDIO else Modality.AUDIO


#: Modalities in plain words.
MODALITY_NAMES: dict[str, str] = {Modality.AUDIO: "sound", Modality.VISUAL: "picture"}


class Condition(StrEnum):
    """What a model gets to see of a clip: sound, picture or both. The values are keys of evaluation files."""

    A = "A"
    V = "V"
    AV = "AV"

    @property
    def missing(self) -> Modality | None:
        """The modality that is taken away."""
        return {Condition.A: Modality.VISUAL, Condition.V: Modality.AUDIO}.get(self)

    @property
    def heading(self) -> str:
        """For tables and figures."""
        return {Condition.A: "A: sound only", Condition.V: "V: picture only", Condition.AV: "AV: both"}[self]

    @classmethod
    def without(cls, modality: Modality) -> "Condition":
        """The condition in which a modality is missing everywhere."""
        return next(condition for condition in cls if condition.missing is modality)


class ModalityStatus(StrEnum):
    """How much of one modality of a file could be decoded."""

    PRESENT = "present"  # all that was expected
    ABSENT = "absent"  # the file has no such stream
    PARTIAL = "partial"  # less than expected; both numbers are stored
    CORRUPT = "corrupt"  # there is a stream, but nothing could be decoded


class Retrieval(StrEnum):
    """Which keys a query, the key of the modality that is not missing, is compared with."""

    CROSS = "cross"  # those of the missing modality
    PAIRED = "paired"  # those of the query's own modality, of clips that have both
    HYBRID = "hybrid"  # weighted mean of the two scores


class Table(StrEnum):
    """The tables of a store: one Lance dataset each per encoder."""

    CLIPS = "clips"
    QUESTIONS = "questions"
    NEIGHBOURS = "neighbours"
    INDEXES = "indexes"
    FAILURES = "failures"
    RUNS = "runs"
    SNAPSHOTS = "snapshots"


#: Columns of `clips` that come from the annotations and the disk, not from the file's content.
METADATA_COLUMNS = ("split", "labels", "uri", "source_id")
#: The tables of a snapshot.
SNAPSHOT_TABLES = (Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS)
#: Tables that an older store may not have until it is written to.
LATER_TABLES = frozenset({Table.NEIGHBOURS, Table.INDEXES, Table.SNAPSHOTS})


def sequence(dim: int) -> pa.DataType:
    """(T, D) float16: unit-norm embeddings."""
    return pa.list_(vector(dim, pa.float16()))


def vector(dim: int, value: pa.DataType | None = None) -> pa.DataType:
    """(D,): one embedding, float32 by default."""
    return pa.list_(value or pa.float32(), dim)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. `type`: an Arrow type, or a function of the encoder's width that gives one."""

    name: str
    type: pa.DataType | Callable[[int], pa.DataType]
    description: str


TEXT, TEXTS, SCORES = pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())
INT, LONG, DOUBLE, FLAG = pa.int32(), pa.int64(), pa.float64(), pa.bool_()
TIME = pa.timestamp("us", tz="UTC")

#: The columns of each table; the first is its key.
COLUMNS: dict[Table, tuple[Column, ...]] = {
    Table.CLIPS: (  # a row per clip
        Column("clip_id", TEXT, "key: {corpus}/{video_id}"),
        Column("corpus", TEXT, "corpus"),
        Column("video_id", TEXT, "name in the corpus"),
        Column("source_id", TEXT, "video it was cut from; no clip is retrieved for one of its own source"),
        Column("split", TEXT, "split, as the corpus has it"),
        Column("labels", TEXTS, "labels, as the corpus has them"),
        Column("uri", TEXT, "where the file was when it was stored; a path on that machine"),
        Column("content_sha256", TEXT, "hash of the file"),
        Column("bytes", LONG, "size of the file"),
        Column("mtime_ns", LONG, "last change of the file, nanoseconds since 1970"),
        Column("duration_s", DOUBLE, "duration, seconds"),
        Column("visual", sequence, "(T, D) float16, a unit-norm embedding per second; null if there is none"),
        Column("audio", sequence, "(T, D) float16, of the two seconds of sound around each second's middle"),
        Column("visual_key", vector, "(D,) float32, the unit-norm mean of `visual`"),
        Column("audio_key", vector, "(D,) float32, the unit-norm mean of `audio`"),
        Column("visual_status", TEXT, "present, absent, partial or corrupt"),
        Column("audio_status", TEXT, "present, absent, partial or corrupt"),
        Column("expected_frames", INT, "frames expected, one per second"),
        Column("decoded_frames", INT, "frames decoded"),
        Column("expected_audio_s", DOUBLE, "sound expected, seconds"),
        Column("decoded_audio_s", DOUBLE, "sound decoded, seconds"),
        Column("decode_errors", TEXT, "errors that the decoder reported"),
        Column("decode_fingerprint", TEXT, "identifies the decoder and its settings"),
        Column("encoder_fingerprint", TEXT, "identifies the encoder's weights"),
        Column("run_id", TEXT, "run that stored the row"),
        Column("ingested_at", TIME, "when the row was stored"),
    ),
    Table.QUESTIONS: (  # a row per question
        Column("question_id", TEXT, "key"),
        Column("clip_id", TEXT, "clip that the question is about"),
        Column("corpus", TEXT, "corpus"),
        Column("split", TEXT, "split, as the corpus has it; not always that of the clip"),
        Column("question", TEXT, "question"),
        Column("type", TEXT, "question type, as the corpus has it"),
        Column("answer", TEXT, "correct answer"),
        Column("choices", TEXTS, "answers to choose from, if the corpus has them; may hold null"),
        Column("answer_index", INT, "index of the correct choice; -1 if there are no choices"),
        Column("words", sequence, "(W, D) float16, an embedding per token"),
        Column("sentence", vector, "(D,) float32, embedding of the whole question"),
        Column(
            "choice_sentences",
            sequence,
            "(choices, D) float16, of question and choice; 0 for a null",
        ),
        Column("encoder_fingerprint", TEXT, "identifies the encoder's weights"),
        Column("run_id", TEXT, "run that stored the row"),
        Column("ingested_at", TIME, "when the row was stored"),
    ),
    Table.NEIGHBOURS: (  # a row per clip, missing modality and way to search a bank
        Column("neighbour_id", TEXT, "key: {clip_id}|{missing}|{retrieval}|{index}"),
        Column("clip_id", TEXT, "clip whose neighbours these are"),
        Column("missing", TEXT, "modality that is searched for, audio or visual; the other is the query"),
        Column("retrieval", TEXT, "keys compared: cross (of what is missing), paired (of the query), hybrid"),
        Column("leak_guard", FLAG, "false: hits may be of the clip's own source"),
        Column("nearest_ids", TEXTS, "clips, nearest first; fewer than asked if the bank has fewer"),
        Column("nearest_scores", SCORES, "cosines"),
        Column("farthest_ids", TEXTS, "clips, farthest first"),
        Column("farthest_scores", SCORES, "cosines"),
        # Without the guard these hits are in the lists.
        Column("nearest_own_source", INT, "same-source hits among the best, excluded by the leak guard"),
        Column("farthest_own_source", INT, "same-source hits among the best, excluded by the leak guard"),
        Column("settings", TEXT, "JSON: bank, number of hits, weight, guard"),
        Column("index", TEXT, "row of `indexes`: up to which version of `clips` this row is valid"),
        Column("bank_fingerprint", TEXT, "identifies the clips that were searched: ids, sources and keys"),
        Column("bank_version", LONG, "version of `clips` that was searched"),
        Column("query_fingerprint", TEXT, "identifies the clip's source and key"),
        Column("run_id", TEXT, "run that stored the row"),
        Column("at", TIME, "when the row was stored"),
    ),
    Table.INDEXES: (  # a row per way to search a bank
        Column("index", TEXT, "key: identifies settings and program"),
        Column("retrieval", TEXT, "cross, paired or hybrid"),
        Column("settings", TEXT, "JSON: bank, number of hits, weight, guard"),
        Column("query_corpora", TEXTS, "corpora whose clips have neighbours; empty: all"),
        Column("bank_fingerprint", TEXT, "identifies the clips that were searched: ids, sources and keys"),
        Column("bank_version", LONG, "version of `clips` up to which the rows of `neighbours` are valid"),
        Column("run_id", TEXT, "run that stored the row"),
        Column("at", TIME, "when the row was stored"),
    ),
    Table.FAILURES: (  # a row per input that could not be stored
        Column("clip_id", TEXT, "key: {corpus}/{video_id}"),
        Column("corpus", TEXT, "corpus"),
        Column("uri", TEXT, "path of the file"),
        Column("content_sha256", TEXT, "hash of the file"),
        Column("bytes", LONG, "size of the file"),
        Column("mtime_ns", LONG, "last change of the file, nanoseconds since 1970"),
        Column("stage", TEXT, "decode or embed"),
        Column("reason", TEXT, "a FailureReason"),
        Column("detail", TEXT, "last lines of the tool's own message"),
        Column("attempts", INT, "attempts so far"),
        Column("decode_fingerprint", TEXT, "identifies the decoder and its settings"),
        Column("encoder_fingerprint", TEXT, "identifies the encoder's weights"),
        Column("run_id", TEXT, "run that stored the row"),
        Column("at", TIME, "when the row was stored"),
    ),
    Table.RUNS: (  # a row per run of a job
        Column("run_id", TEXT, "key"),
        Column("kind", TEXT, "extract, index, reindex, rollback"),
        Column("config", TEXT, "JSON"),
        Column("status", TEXT, "running, done, refused, failed or interrupted"),
        Column("started_at", TIME, "start"),
        Column("ended_at", TIME, "end"),
        Column("counts", TEXT, "JSON"),
        Column("versions_before", TEXT, "JSON: table -> version"),
        Column("versions_after", TEXT, "JSON: table -> version"),
    ),
    Table.SNAPSHOTS: (  # a row per snapshot
        Column("name", TEXT, "key"),
        Column("versions", TEXT, "JSON: table -> version"),
        Column("run_id", TEXT, "run that published it"),
        Column("rolled_back", FLAG, "whether it was published and then found to be wrong"),
        Column("at", TIME, "when it was named"),
    ),
}


def table_schema(table: Table, dim: int) -> pa.Schema:
    """The Arrow schema of a table; its key is never null."""
    types = {c.name: c.type(dim) if callable(c.type) else c.type for c in COLUMNS[table]}
    (key, key_type), *others = types.items()
    return pa.schema([pa.field(key, key_type, nullable=False, metadata=PRIMARY_KEY), *others])


#: The encoders of a store.
ENCODERS_SCHEMA = pa.schema(
    [
        pa.field("fingerprint", TEXT, nullable=False, metadata=PRIMARY_KEY),
        pa.field("dim", INT),
        pa.field("schema_version", INT),
    ]
)
