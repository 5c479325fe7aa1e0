"""What a run has to do: the corpus, less what the store already holds.

A file counts as untouched when size, time of change and decode fingerprint are those the store remembers;
one whose time alone changed is hashed by the decode stage, and left alone where the content is the same.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa

from r2scp.pipelines.corpora.corpus import ClipRow, Corpus
from r2scp.pipelines.extraction.stages import SOURCE_SCHEMA
from r2scp.store.errors import TRANSIENT_REASONS
from r2scp.store.feature_store import METADATA_COLUMNS, InputRecord, metadata_of


@dataclass
class ClipPlan:
    """The account of one pass over a corpus. `inputs` are clips whose file is on the disk."""

    inputs: int = 0
    unchanged: int = 0
    already_failed: int = 0  # failed before, same file, not worth another try
    missing_files: int = 0  # named by annotations, not on the disk
    new: int = 0  # of those to be done: the store knows nothing of them
    changed: int = 0  # touched since: maybe with the same content
    decoder_changed: int = 0  # decoded in a way that is no longer ours
    retried: int = 0  # dead letters of untouched files
    gone: list[str] = field(default_factory=list)  # in the store, no longer on the disk or no longer named
    metadata_changed: list[dict[str, object]] = field(
        default_factory=list
    )  # same file, other annotations or place
    pending: dict[str, None] = field(default_factory=dict)  # clip ids to be done, in order
    sources: pa.Table = field(default_factory=SOURCE_SCHEMA.empty_table)  # their rows


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How much of a corpus one run takes on."""

    decode_fingerprint: str
    limit: int | None = None  # at most so many clips that are on the disk
    retry_failed: bool = False  # all dead letters of untouched files
    attempts: int = 0  # else those whose reason may go away by itself, up to so many attempts in all

    def should_retry(self, before: InputRecord) -> bool:
        """Whether a dead letter of an untouched file is worth another look."""
        passing = before.failure in TRANSIENT_REASONS and before.attempts < self.attempts
        return self.retry_failed or passing


ROWS_PER_BLOCK = 1_024  # as Python objects at a time


def plan_clips(corpus: Corpus, known: Mapping[str, InputRecord], options: PlanOptions) -> ClipPlan:
    """Compare a corpus with what the store remembers of it."""
    plan = ClipPlan()
    seen: set[str] = set()
    rows = _pending(corpus, known, options, plan, seen)
    plan.sources = pa.concat_tables([plan.sources, *_blocks(rows)])
    if options.limit is None:
        plan.gone = [clip_id for clip_id in known if clip_id not in seen]
    return plan


def _pending(
    corpus: Corpus, known: Mapping[str, InputRecord], options: PlanOptions, plan: ClipPlan, seen: set[str]
) -> Iterator[dict[str, object]]:
    for clip in corpus.clips():
        if not clip.uri:
            plan.missing_files += 1
            continue
        if options.limit is not None and plan.inputs == options.limit:
            break
        plan.inputs += 1
        seen.add(clip.clip_id)
        before = known.get(clip.clip_id)
        if before and _untouched(clip, before, options.decode_fingerprint):
            if not before.failure:
                plan.unchanged += 1
                _check_metadata(clip, before, plan)
                continue
            if not options.should_retry(before):
                plan.already_failed += 1
                continue
            plan.retried += 1
        elif before is None:
            plan.new += 1
        elif before.decode_fingerprint != options.decode_fingerprint:
            plan.decoder_changed += 1
        else:
            plan.changed += 1
        plan.pending[clip.clip_id] = None
        yield _source_row(clip, before, options.decode_fingerprint)


def _check_metadata(clip: ClipRow, before: InputRecord, plan: ClipPlan) -> None:
    """Note a clip whose annotations, or whose place on the disk, are no longer what the store says."""
    row = {name: getattr(clip, name) for name in METADATA_COLUMNS}
    if metadata_of(row) != before.metadata:
        plan.metadata_changed.append({"clip_id": clip.clip_id, **row})


def _untouched(clip: ClipRow, before: InputRecord, fingerprint: str) -> bool:
    try:
        facts = os.stat(clip.uri)
    except OSError:
        return bool(before.failure) and before.bytes is None  # still as unreadable as it was
    same_file = (facts.st_size, facts.st_mtime_ns) == (before.bytes, before.mtime_ns)
    return same_file and before.decode_fingerprint == fingerprint


def _source_row(clip: ClipRow, before: InputRecord | None, fingerprint: str) -> dict[str, object]:
    held = before is not None and not before.failure and before.decode_fingerprint == fingerprint
    return {
        "clip_id": clip.clip_id,
        "corpus": clip.corpus,
        "video_id": clip.video_id,
        "source_id": clip.source_id,
        "split": clip.split,
        "labels": list(clip.labels),
        "uri": clip.uri,
        "known_sha256": before.content_sha256 if before and held else "",
        "attempts": before.attempts if before else 0,
    }


def _blocks(rows: Iterator[dict[str, object]]) -> Iterator[pa.Table]:
    while block := list(islice(rows, ROWS_PER_BLOCK)):
        yield pa.Table.from_pylist(block, schema=SOURCE_SCHEMA)
