"""What a run has to do: the corpus, less what is already in the store.

A file is unchanged if its size, modification time and decode fingerprint are those in the store; one whose
time alone changed is hashed by the decode stage, and skipped if its content is the same.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa

from r2scp.pipelines.corpora.corpus import ClipRow, Corpus
from r2scp.pipelines.extraction.stages import SOURCE_SCHEMA
from r2scp.store.commits import sql_literal
from r2scp.store.errors import TRANSIENT_REASONS
from r2scp.store.feature_store import FeatureStore, read_rows
from r2scp.store.schema import METADATA_COLUMNS, Table

ROWS_PER_BLOCK = 1_024  # as Python objects at a time


@dataclass(frozen=True, slots=True)
class InputRecord:
    """What the store knows of one input file: enough to decide whether it must be read again."""

    bytes: int
    mtime_ns: int
    content_sha256: str
    decode_fingerprint: str
    failure: str = ""  # a FailureReason; "" if the clip was stored
    attempts: int = 0
    metadata: tuple[object, ...] | None = None  # see `metadata_of`; None if the clip was not stored


def input_records(store: FeatureStore, corpus: str) -> dict[str, InputRecord]:
    """clip_id -> what the store knows, for one corpus: from the clip's row or its failure, the newer."""
    columns = ["clip_id", "bytes", "mtime_ns", "content_sha256", "decode_fingerprint"]
    where = f"corpus = {sql_literal(corpus)}"
    records, stored_at = {}, {}
    for row in read_rows(store.dataset(Table.CLIPS), [*columns, *METADATA_COLUMNS, "ingested_at"], where):
        clip_id = row.pop("clip_id")
        stored_at[clip_id] = row.pop("ingested_at")
        metadata = metadata_of({name: row.pop(name) for name in METADATA_COLUMNS})
        records[clip_id] = InputRecord(metadata=metadata, **row)
    for row in read_rows(store.dataset(Table.FAILURES), [*columns, "reason", "attempts", "at"], where):
        clip_id, at = row.pop("clip_id"), row.pop("at")
        if clip_id not in stored_at or at > stored_at[clip_id]:
            records[clip_id] = InputRecord(failure=row.pop("reason"), **row)
    return records


def metadata_of(row: Mapping[str, object]) -> tuple[object, ...]:
    """The values of METADATA_COLUMNS in one row, as values that compare."""
    values = (row[name] for name in METADATA_COLUMNS)
    return tuple(tuple(value) if isinstance(value, list | tuple) else value for value in values)


@dataclass
class ClipPlan:
    """What to do about the clips of one corpus. `inputs` are clips whose file is on the disk."""

    inputs: int = 0
    unchanged: int = 0
    already_failed: int = 0  # same file, not worth another attempt
    missing_files: int = 0  # in the annotations, not on the disk
    new: int = 0  # of `pending`, as the next three: not in the store
    changed: int = 0  # size or time changed, perhaps not the content
    decoder_changed: int = 0  # decoded in another way than today
    retried: int = 0  # failed before, same file
    gone: list[str] = field(default_factory=list)  # in the store, no longer on the disk or in the annotations
    #: Rows for `FeatureStore.update_metadata`: same file, other annotations or path.
    metadata_changed: list[dict[str, object]] = field(default_factory=list)
    pending: dict[str, None] = field(default_factory=dict)  # clip ids to decode, in order
    sources: pa.Table = field(default_factory=SOURCE_SCHEMA.empty_table)  # their rows


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How much of a corpus one run takes on."""

    decode_fingerprint: str
    limit: int | None = None  # of clips that are on the disk
    retry_failed: bool = False  # retry all failures of unchanged files
    attempts: int = 0  # else retry temporary failures, up to so many attempts in all

    def should_retry(self, record: InputRecord) -> bool:
        """Whether the failure of an unchanged file is worth another attempt."""
        temporary = record.failure in TRANSIENT_REASONS and record.attempts < self.attempts
        return self.retry_failed or temporary


def plan_clips(corpus: Corpus, records: Mapping[str, InputRecord], options: PlanOptions) -> ClipPlan:
    """Compare a corpus with the store's records of it (clip id -> record)."""
    plan = ClipPlan()
    seen: set[str] = set()
    rows = _pending_rows(corpus, records, options, plan, seen)
    plan.sources = pa.concat_tables([plan.sources, *_blocks(rows)])
    if options.limit is None:
        plan.gone = [clip_id for clip_id in records if clip_id not in seen]
    return plan


def _pending_rows(
    corpus: Corpus, records: Mapping[str, InputRecord], options: PlanOptions, plan: ClipPlan, seen: set[str]
) -> Iterator[dict[str, object]]:
    """Rows of SOURCE_SCHEMA for clips to decode; counts all clips in `plan` and adds their ids to `seen`."""
    for clip in corpus.clips():
        if not clip.uri:
            plan.missing_files += 1
            continue
        if options.limit is not None and plan.inputs == options.limit:
            break
        plan.inputs += 1
        seen.add(clip.clip_id)
        record = records.get(clip.clip_id)
        if record and _same_file(clip, record, options.decode_fingerprint):
            if not record.failure:
                plan.unchanged += 1
                _check_metadata(clip, record, plan)
                continue
            if not options.should_retry(record):
                plan.already_failed += 1
                continue
            plan.retried += 1
        elif record is None:
            plan.new += 1
        elif record.decode_fingerprint != options.decode_fingerprint:
            plan.decoder_changed += 1
        else:
            plan.changed += 1
        plan.pending[clip.clip_id] = None
        yield _source_row(clip, record, options.decode_fingerprint)


def _check_metadata(clip: ClipRow, record: InputRecord, plan: ClipPlan) -> None:
    """Note a clip whose annotations or path on the disk differ from the store's."""
    row = {name: getattr(clip, name) for name in METADATA_COLUMNS}
    if metadata_of(row) != record.metadata:
        plan.metadata_changed.append({"clip_id": clip.clip_id, **row})


def _same_file(clip: ClipRow, record: InputRecord, fingerprint: str) -> bool:
    try:
        facts = os.stat(clip.uri)
    except OSError:
        return bool(record.failure) and record.bytes is None  # it could not be read before either
    same_file = (facts.st_size, facts.st_mtime_ns) == (record.bytes, record.mtime_ns)
    return same_file and record.decode_fingerprint == fingerprint


def _source_row(clip: ClipRow, record: InputRecord | None, fingerprint: str) -> dict[str, object]:
    stored = record and not record.failure and record.decode_fingerprint == fingerprint
    return {
        "clip_id": clip.clip_id,
        "corpus": clip.corpus,
        "video_id": clip.video_id,
        "source_id": clip.source_id,
        "split": clip.split,
        "labels": list(clip.labels),
        "uri": clip.uri,
        "known_sha256": record.content_sha256 if record and stored else "",
        "attempts": record.attempts if record else 0,
    }


def _blocks(rows: Iterator[dict[str, object]]) -> Iterator[pa.Table]:
    while block := list(islice(rows, ROWS_PER_BLOCK)):
        yield pa.Table.from_pylist(block, schema=SOURCE_SCHEMA)
