"""The audit of `jobs torture`: compares what a store holds with what the ledger says it must hold.

Each check returns a list of findings, each of one `Kind`; an empty list means that nothing is wrong.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from r2scp.jobs.faults.corpus import Expected
from r2scp.pipelines.neighbours.queries import query_chunks, query_clips
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.commits import TableAddress
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import KEY_COLUMNS, MemoryBank

MANIFEST_NUMBER_BASE = 2**64 - 1  # Lance names the manifest of version v by this less v
LEASES = "leases.lance"
PERMANENT_FILES = ("_versions/latest_version_hint.json", "_refs/")  # files that belong to no version
KEY_TOLERANCE = 1e-3  # of a cosine from 1: batches of another size round differently
SCORE_TOLERANCE = 1e-6


class Kind(StrEnum):
    """What can be wrong."""

    LOST = "lost"  # a clip or question is missing or has outdated content
    DUPLICATE = "duplicate"  # the same id twice in one table
    UNACCOUNTED = "unaccounted"  # an input without a row or dead letter, or a row without an input
    ORPHANED = "orphaned"  # a file that no version names, after cleaning
    TORN = "torn"  # a reader saw an inconsistent snapshot, or one that changed
    TOGETHER = "together"  # two jobs wrote at the same time
    STALE = "stale"  # neighbours differ from an exact search
    FAILED = "failed"  # a run without a fault failed, or wrote with nothing to do


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One violation."""

    kind: Kind
    what: str


#: Rendering -> its unit keys by column.
RenderingKeys = dict[str, dict[str, np.ndarray]]


def rendering_keys(store: FeatureStore, expected: Expected) -> RenderingKeys:
    """The keys of each rendering, from a store that was just built without a fault."""
    rows = store.clips(["clip_id", *KEY_COLUMNS.values()]).to_pylist()
    return {
        expected.clips[row["clip_id"]][1]: {name: np.asarray(row[name]) for name in KEY_COLUMNS.values()}
        for row in rows
    }


def audit(store: FeatureStore, expected: Expected, keys: RenderingKeys) -> list[Finding]:
    """Check every clip and question of the ledger and every row of the store, which may be pinned."""
    return [
        *duplicates(store),
        *_clips(store, expected, keys),
        *_failed_clips(store, expected),
        *_questions(store, expected),
        *_inconsistent(store),
    ]


def audit_serving(store: FeatureStore, expected: Expected, keys: RenderingKeys) -> list[Finding]:
    """Check the published snapshot, which has no dead letters."""
    checks = (
        duplicates(store),
        _clips(store, expected, keys),
        _questions(store, expected),
        _inconsistent(store),
    )
    return [finding for findings in checks for finding in findings]


def duplicates(store: FeatureStore) -> Iterator[Finding]:
    """Ids that occur more than once in a table."""
    for table in store.tables():
        key = store.address(table).key
        ids = store.dataset(table).to_table(columns=[key])[key].to_pylist()
        for each, count in Counter(ids).items():
            if count > 1:
                yield Finding(kind=Kind.DUPLICATE, what=f"{each} occurs {count} times in {table.value}")


def _clips(store: FeatureStore, expected: Expected, keys: RenderingKeys) -> Iterator[Finding]:
    columns = ["clip_id", "content_sha256", "split", *KEY_COLUMNS.values()]
    rows = {row["clip_id"]: row for row in store.clips(columns).to_pylist()}
    failed = set(store.failures()["clip_id"].to_pylist())
    for clip_id, (digest, media, split) in expected.clips.items():
        row = rows.get(clip_id)
        if row is None:
            yield Finding(kind=Kind.LOST, what=f"clip {clip_id} is missing")
            if clip_id not in failed:
                yield Finding(kind=Kind.UNACCOUNTED, what=f"clip {clip_id} has neither row nor dead letter")
        elif row["content_sha256"] != digest:
            yield Finding(kind=Kind.LOST, what=f"clip {clip_id} has outdated content")
        elif row["split"] != split:
            yield Finding(kind=Kind.LOST, what=f"clip {clip_id} is in split {row['split']}, not {split}")
        elif wrong := [name for name, key in keys[media].items() if not _same(row[name], key)]:
            yield Finding(kind=Kind.LOST, what=f"{', '.join(wrong)} of {clip_id} come from another video")
    for clip_id in rows.keys() - expected.clips.keys():
        yield Finding(kind=Kind.UNACCOUNTED, what=f"clip {clip_id} must not be in the store")


def _same(key: list[float] | None, other_D: np.ndarray) -> bool:
    return key is not None and float(np.dot(np.asarray(key), other_D)) >= 1 - KEY_TOLERANCE


def _failed_clips(store: FeatureStore, expected: Expected) -> Iterator[Finding]:
    rows = {row["clip_id"]: row["content_sha256"] for row in store.failures().to_pylist()}
    for clip_id, digest in expected.failed.items():
        if clip_id not in rows:
            yield Finding(kind=Kind.UNACCOUNTED, what=f"damaged clip {clip_id} has no dead letter")
        elif rows[clip_id] != digest:
            yield Finding(kind=Kind.LOST, what=f"the dead letter of {clip_id} has outdated content")
    for clip_id in rows.keys() - expected.failed.keys():
        yield Finding(kind=Kind.UNACCOUNTED, what=f"{clip_id} must not have a dead letter")


def _questions(store: FeatureStore, expected: Expected) -> Iterator[Finding]:
    columns = ["question_id", "clip_id", "split", "answer"]
    rows = {row.pop("question_id"): tuple(row.values()) for row in store.questions(columns).to_pylist()}
    for question_id, expected_row in expected.questions.items():
        if question_id not in rows:
            yield Finding(kind=Kind.LOST, what=f"question {question_id} is missing")
        elif rows[question_id] != expected_row:
            yield Finding(
                kind=Kind.LOST, what=f"question {question_id} is {rows[question_id]}, not {expected_row}"
            )
    for question_id in rows.keys() - expected.questions.keys():
        yield Finding(kind=Kind.UNACCOUNTED, what=f"question {question_id} must not be in the store")


def _inconsistent(store: FeatureStore) -> Iterator[Finding]:
    for what in inconsistencies(store):
        yield Finding(kind=Kind.TORN, what=what)


# -- what readers see


def inconsistencies(store: FeatureStore) -> list[str]:
    """References between clips, questions and neighbours that do not resolve; `store` may be pinned."""
    stored = set(store.clips(["clip_id"])["clip_id"].to_pylist())
    messages = [
        f"a question refers to the missing clip {clip_id}"
        for clip_id in set(store.questions(["clip_id"])["clip_id"].to_pylist()) - stored
    ]
    searched = set()
    for row in store.neighbours(["clip_id", "nearest_ids", "farthest_ids"]).to_pylist():
        searched.add(row["clip_id"])
        for clip_id in {row["clip_id"], *row["nearest_ids"], *row["farthest_ids"]} - stored:
            messages.append(f"neighbours of {row['clip_id']} refer to the missing clip {clip_id}")
    return messages + [f"{clip_id} has no neighbours" for clip_id in stored - searched]


def snapshot_digest(store: FeatureStore) -> str:
    """Digest of everything that a reader of one snapshot sees, independent of the order of rows."""
    texts: list[str] = []
    for table in (Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS):
        texts += sorted(repr(sorted(row.items())) for row in store.dataset(table).to_table().to_pylist())
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# -- neighbours


def outdated_neighbours(store: FeatureStore, settings: IndexSettings) -> list[Finding]:
    """Rows of `neighbours` that are missing or differ from a search of the whole bank."""
    bank, findings = MemoryBank.open(store, settings.bank), []
    columns = ["clip_id", "missing", "retrieval", "nearest_ids", "nearest_scores", "farthest_scores"]
    rows = {
        (row["clip_id"], row["missing"], row["retrieval"]): row
        for row in store.neighbours(columns).to_pylist()
    }
    for missing in Modality:
        for chunk in query_chunks(bank, missing, set(query_clips(bank, missing)["clip_id"].to_pylist())):
            for mode in settings.retrieval:
                exact = bank.search(chunk.queries(), settings.search(missing, mode))
                for at, clip_id in enumerate(chunk.clip_ids):
                    row = rows.pop((clip_id, missing.value, mode.value), None)
                    near, far = exact.nearest.scores(at), exact.farthest.scores(at)
                    if (
                        row is None
                        or row["nearest_ids"] != exact.nearest.ids(at)
                        or not np.allclose(row["nearest_scores"], near, rtol=0, atol=SCORE_TOLERANCE)
                        or not np.allclose(row["farthest_scores"], far, rtol=0, atol=SCORE_TOLERANCE)
                    ):
                        what = f"neighbours of {clip_id} ({mode.value}, {missing.value} missing): {row}"
                        findings.append(Finding(kind=Kind.STALE, what=what))
    return findings + [Finding(kind=Kind.STALE, what=f"neighbours of no query: {key}") for key in rows]


# -- files


def orphaned_files(folder: Path) -> list[Finding]:
    """Files below a store's folder that no version of any of its tables names.

    The leases' table is exempt: heartbeats write to it at any time, so a file there counts as orphaned only
    after a week, the age that Lance's own cleaning uses.
    """
    known: set[Path] = set()
    tables = [path for path in folder.rglob("*.lance") if path.is_dir()]
    for path in tables:
        names = path.rglob("*") if path.name == LEASES else (path / name for name in _files_of_versions(path))
        known.update(names)
    return [
        Finding(kind=Kind.ORPHANED, what=f"{path.relative_to(folder)} ({path.stat().st_size} bytes)")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in known and not _is_permanent(path, tables)
    ]


def _is_permanent(path: Path, tables: Iterable[Path]) -> bool:
    """Whether a table keeps this file beside its versions."""
    home = next((table for table in tables if path.is_relative_to(table)), None)
    return home is not None and path.relative_to(home).as_posix().startswith(PERMANENT_FILES)


def _files_of_versions(table: Path) -> Iterator[str]:
    """Names of all files of all versions of one table, relative to it."""
    address = TableAddress(uri=str(table), schema=pa.schema([]))
    transactions = [path.name for path in (table / "_transactions").glob("*")]
    for version in (each["version"] for each in address.open().versions()):
        dataset = address.open(version)
        manifest = f"_versions/{MANIFEST_NUMBER_BASE - version}.manifest"
        yield manifest
        # the manifest names its transaction's file, which Lance's API does not return
        content = (table / manifest).read_bytes()
        yield from (f"_transactions/{name}" for name in transactions if name.encode() in content)
        for fragment in dataset.get_fragments():
            yield from (f"data/{file.path}" for file in fragment.data_files())
            if deleted := fragment.deletion_file():
                yield deleted
        for index in dataset.describe_indices():
            for segment in index.segments:
                files = (table / "_indices" / segment.uuid).glob("*")
                yield from (f"_indices/{segment.uuid}/{file.name}" for file in files)


def file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> (modification time, size) of everything below `folder`."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def writes_overlap(path: Path) -> bool:
    """Whether the writes of two processes interleaved; `path`: see `FaultOrder.writes_file`."""
    spans: dict[int, tuple[float, float]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        pid, began, ended = json.loads(line)
        first, last = spans.get(pid, (began, ended))
        spans[pid] = min(first, began), max(last, ended)
    ordered = sorted(spans.values())
    return any(earlier[1] > later[0] for earlier, later in pairwise(ordered))
