"""What a datum is: modalities, statuses, the Arrow schemas of the tables, fingerprints.

Legend: D is the encoder's width (1024 for imagebind-huge), T the number of one-second tokens of a
clip, W the number of real tokens of a question.
"""

from enum import StrEnum

import pyarrow as pa

#: Version of the table layout. A store written with another one is refused.
SCHEMA_VERSION = 2

#: Lance reads this from a field's metadata and makes concurrent upserts on the field conflict
#: instead of inserting the same key twice.
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


class Modality(StrEnum):
    """The two modalities that can go missing."""

    AUDIO = "audio"
    VISUAL = "visual"


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
    """What decoding found of one modality of one file."""

    PRESENT = "present"  # everything that was expected
    ABSENT = "absent"  # the file has no such stream
    PARTIAL = "partial"  # some of what was expected; both numbers are kept
    CORRUPT = "corrupt"  # the stream is there and gave nothing


class Retrieval(StrEnum):
    """Whose key a query, the key of the modality that is there, is compared with."""

    CROSS = "cross"  # the key of the missing modality
    PAIRED = "paired"  # the key of the query's own modality, of clips that have both
    HYBRID = "hybrid"  # weighted mean of the two scores


class Table(StrEnum):
    """The tables of a store; each is one Lance dataset per encoder fingerprint."""

    CLIPS = "clips"
    QUESTIONS = "questions"
    NEIGHBOURS = "neighbours"
    INDEXES = "indexes"
    FAILURES = "failures"
    RUNS = "runs"
    SNAPSHOTS = "snapshots"


#: What a reader sees together.
SNAPSHOT_TABLES = (Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS)
#: Tables that a store of an earlier version may lack until it is written to.
LATER_TABLES = frozenset({Table.NEIGHBOURS, Table.INDEXES, Table.SNAPSHOTS})


def sequence(dim: int) -> pa.DataType:
    """T unit-norm embeddings of width `dim`, half precision."""
    return pa.list_(vector(dim, pa.float16()))


def vector(dim: int, value: pa.DataType | None = None) -> pa.DataType:
    """One embedding of width `dim`, float32 unless told otherwise."""
    return pa.list_(value or pa.float32(), dim)


def _key(name: str) -> pa.Field:
    return pa.field(name, pa.string(), nullable=False, metadata=PRIMARY_KEY)


def clips_schema(dim: int) -> pa.Schema:
    """One row a clip: where it came from, what was found in it, and its embeddings."""
    return pa.schema(
        [
            _key("clip_id"),  # {corpus}/{video_id}
            pa.field("corpus", pa.string()),
            pa.field("video_id", pa.string()),
            pa.field("source_id", pa.string()),  # what the leak guard compares
            pa.field("split", pa.string()),
            pa.field("labels", pa.list_(pa.string())),
            pa.field("uri", pa.string()),
            pa.field("content_sha256", pa.string()),
            pa.field("bytes", pa.int64()),
            pa.field("mtime_ns", pa.int64()),  # with `bytes`, spares hashing files nobody touched
            pa.field("duration_s", pa.float64()),
            pa.field("visual", sequence(dim)),  # (T, D), null when there is none
            pa.field("audio", sequence(dim)),
            pa.field("visual_key", vector(dim)),  # unit-norm mean of the sequence
            pa.field("audio_key", vector(dim)),
            pa.field("visual_status", pa.string()),
            pa.field("audio_status", pa.string()),
            pa.field("expected_frames", pa.int32()),
            pa.field("decoded_frames", pa.int32()),
            pa.field("expected_audio_s", pa.float64()),
            pa.field("decoded_audio_s", pa.float64()),
            pa.field("decode_errors", pa.string()),
            pa.field("decode_fingerprint", pa.string()),
            pa.field("encoder_fingerprint", pa.string()),
            pa.field("run_id", pa.string()),
            pa.field("ingested_at", pa.timestamp("us", tz="UTC")),
        ]
    )


def questions_schema(dim: int) -> pa.Schema:
    """One row a question, with the text tower's embeddings of its words and of the whole."""
    return pa.schema(
        [
            _key("question_id"),
            pa.field("clip_id", pa.string()),
            pa.field("corpus", pa.string()),
            pa.field("split", pa.string()),
            pa.field("question", pa.string()),
            pa.field("type", pa.string()),
            pa.field("answer", pa.string()),
            pa.field("choices", pa.list_(pa.string())),
            pa.field("answer_index", pa.int32()),  # -1: no choices
            pa.field("words", sequence(dim)),  # (W, D), real tokens only
            pa.field("sentence", vector(dim)),
            # "question choice" each, zeros where a choice is null; null where there are no choices
            pa.field("choice_sentences", sequence(dim)),
            pa.field("encoder_fingerprint", pa.string()),
            pa.field("run_id", pa.string()),
            pa.field("ingested_at", pa.timestamp("us", tz="UTC")),
        ]
    )


def neighbours_schema() -> pa.Schema:
    """One row a clip, a missing modality and a way to search one bank: where to look for what is missing.

    Ids are sorted best first and are fewer than `n` where the bank holds fewer. Scores are cosines.
    """
    ids, scores = pa.list_(pa.string()), pa.list_(pa.float32())
    return pa.schema(
        [
            _key("neighbour_id"),  # {clip_id}|{missing}|{retrieval}|{index}
            pa.field("clip_id", pa.string()),
            pa.field("missing", pa.string()),  # a Modality: what is looked for; the other is the query
            pa.field("retrieval", pa.string()),  # a Retrieval
            pa.field("leak_guard", pa.bool_()),  # false: hits may be of the clip's own source
            pa.field("nearest_ids", ids),
            pa.field("nearest_scores", scores),
            pa.field("farthest_ids", ids),
            pa.field("farthest_scores", scores),
            # Of the clip's own source among the n best were none left out: hits that the guard kept away,
            # or, without it, that are in the list.
            pa.field("nearest_own_source", pa.int32()),
            pa.field("farthest_own_source", pa.int32()),
            pa.field("settings", pa.string()),  # JSON: bank corpora and splits, n, weight, guard
            pa.field("index", pa.string()),  # of `indexes`: up to which version of `clips` this row is right
            pa.field("bank_fingerprint", pa.string()),  # of ids, sources and keys, when it was searched
            pa.field("bank_version", pa.int64()),  # of `clips`, when it was searched
            pa.field("query_fingerprint", pa.string()),  # of source and key
            pa.field("run_id", pa.string()),
            pa.field("at", pa.timestamp("us", tz="UTC")),
        ]
    )


def indexes_schema() -> pa.Schema:
    """One row a way to search a bank: up to which version of `clips` its rows in `neighbours` are right."""
    return pa.schema(
        [
            _key("index"),  # of settings and program
            pa.field("retrieval", pa.string()),  # a Retrieval
            pa.field("settings", pa.string()),
            pa.field("query_corpora", pa.list_(pa.string())),  # whose clips have rows; empty: all
            pa.field("bank_fingerprint", pa.string()),
            pa.field("bank_version", pa.int64()),  # of `clips`
            pa.field("run_id", pa.string()),
            pa.field("at", pa.timestamp("us", tz="UTC")),
        ]
    )


def failures_schema() -> pa.Schema:
    """One row an input that could not be stored: where, at which stage, why."""
    return pa.schema(
        [
            _key("clip_id"),
            pa.field("corpus", pa.string()),
            pa.field("uri", pa.string()),
            pa.field("content_sha256", pa.string()),
            pa.field("bytes", pa.int64()),
            pa.field("mtime_ns", pa.int64()),
            pa.field("stage", pa.string()),  # decode | embed
            pa.field("reason", pa.string()),  # a FailureReason
            pa.field("detail", pa.string()),  # last lines of the tool's own words
            pa.field("attempts", pa.int32()),
            pa.field("decode_fingerprint", pa.string()),
            pa.field("encoder_fingerprint", pa.string()),
            pa.field("run_id", pa.string()),
            pa.field("at", pa.timestamp("us", tz="UTC")),
        ]
    )


def runs_schema() -> pa.Schema:
    """One row a run of a job."""
    return pa.schema(
        [
            _key("run_id"),
            pa.field("kind", pa.string()),
            pa.field("config", pa.string()),  # JSON
            pa.field("status", pa.string()),  # running | done | refused | failed | interrupted
            pa.field("started_at", pa.timestamp("us", tz="UTC")),
            pa.field("ended_at", pa.timestamp("us", tz="UTC")),
            pa.field("counts", pa.string()),  # JSON
            pa.field("versions_before", pa.string()),  # JSON, table -> version
            pa.field("versions_after", pa.string()),
        ]
    )


def snapshots_schema() -> pa.Schema:
    """One row a named moment of the store: which versions of the tables belong together."""
    return pa.schema(
        [
            _key("name"),
            pa.field("versions", pa.string()),  # JSON, table -> version
            pa.field("run_id", pa.string()),  # that made it
            pa.field("rolled_back", pa.bool_()),
            pa.field("at", pa.timestamp("us", tz="UTC")),
        ]
    )
