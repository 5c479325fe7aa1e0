"""The accounts of `jobs torture`: what a store holds, against what a ledger says it must.

Each check says what is wrong in words, under one of the headings of `Kind`; nothing wrong is an empty list.
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

NEWEST_FIRST = 2**64 - 1  # Lance names the manifest of version v by this less v
LEASES = "leases.lance"
ALWAYS = ("_versions/latest_version_hint.json", "_refs/")  # files that belong to no version
KEY_TOLERANCE = 1e-3  # of a cosine from 1: batches of another size round differently
SCORE_TOLERANCE = 1e-6


class Kind(StrEnum):
    """What can be wrong."""

    LOST = "lost"  # a clip or question that must be there is not, or with other content
    DUPLICATE = "duplicate"  # one id twice in one table
    UNACCOUNTED = "unaccounted"  # an input that is neither stored nor a dead letter, or a row of no input
    ORPHANED = "orphaned"  # a file that no version names, after the job has cleaned
    TORN = "torn"  # a reader saw a mixture, or what it had read changed
    TOGETHER = "together"  # two jobs wrote at once
    STALE = "stale"  # neighbours that a full search would not give
    FAILED = "failed"  # a run without a fault that failed, or wrote where nothing was to do


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    what: str


#: Rendering -> its unit keys, by column.
RenderingKeys = dict[str, dict[str, np.ndarray]]


def rendering_keys(store: FeatureStore, expected: Expected) -> RenderingKeys:
    """The keys of each rendering, from a store that has just been made without a fault."""
    rows = store.clips(["clip_id", *KEY_COLUMNS.values()]).to_pylist()
    return {
        expected.clips[row["clip_id"]][1]: {name: np.asarray(row[name]) for name in KEY_COLUMNS.values()}
        for row in rows
    }


def audit(store: FeatureStore, expected: Expected, keys: RenderingKeys) -> list[Finding]:
    """Every clip and question of the ledger, and every row of the store. `store` may be pinned."""
    return [
        *duplicates(store),
        *_clips(store, expected, keys),
        *_failed_clips(store, expected),
        *_questions(store, expected),
        *_inconsistent(store),
    ]


def audit_serving(store: FeatureStore, expected: Expected, keys: RenderingKeys) -> list[Finding]:
    """What serves, which has no dead letters."""
    checks = (duplicates(store), _clips(store, expected, keys), _questions(store, expected), _inconsistent(store))
    return [finding for findings in checks for finding in findings]


def duplicates(store: FeatureStore) -> Iterator[Finding]:
    """Ids that a table has more than once."""
    for table in store.tables():
        key = store.address(table).key
        ids = store.dataset(table).to_table(columns=[key])[key].to_pylist()
        for each, count in Counter(ids).items():
            if count > 1:
                yield Finding(kind=Kind.DUPLICATE, what=f"{each} is {count} times in {table.value}")


def _clips(store: FeatureStore, expected: Expected, features: RenderingKeys) -> Iterator[Finding]:
    columns = ["clip_id", "content_sha256", "split", *KEY_COLUMNS.values()]
    rows = {row["clip_id"]: row for row in store.clips(columns).to_pylist()}
    failed = set(store.failures()["clip_id"].to_pylist())
    for clip_id, (digest, media, split) in expected.clips.items():
        row = rows.get(clip_id)
        if row is None:
            yield Finding(kind=Kind.LOST, what=f"clip {clip_id} is not there")
            if clip_id not in failed:
                yield Finding(kind=Kind.UNACCOUNTED, what=f"clip {clip_id} has neither row nor dead letter")
        elif row["content_sha256"] != digest:
            yield Finding(kind=Kind.LOST, what=f"clip {clip_id} is there with an earlier content")
        elif row["split"] != split:
            yield Finding(kind=Kind.LOST, what=f"clip {clip_id} is in split {row['split']}, not {split}")
        elif wrong := [name for name, key in features[media].items() if not _same(row[name], key)]:
            yield Finding(kind=Kind.LOST, what=f"{', '.join(wrong)} of {clip_id} are of another film")
    for clip_id in rows.keys() - expected.clips.keys():
        yield Finding(kind=Kind.UNACCOUNTED, what=f"clip {clip_id} is there, and must not be")


def _same(key: list[float] | None, other_D: np.ndarray) -> bool:
    return key is not None and float(np.dot(np.asarray(key), other_D)) >= 1 - KEY_TOLERANCE


def _failed_clips(store: FeatureStore, expected: Expected) -> Iterator[Finding]:
    rows = {row["clip_id"]: row["content_sha256"] for row in store.failures().to_pylist()}
    for clip_id, digest in expected.dead.items():
        if clip_id not in rows:
            yield Finding(kind=Kind.UNACCOUNTED, what=f"damaged clip {clip_id} has no dead letter")
        elif rows[clip_id] != digest:
            yield Finding(kind=Kind.LOST, what=f"the dead letter of {clip_id} is of an earlier content")
    for clip_id in rows.keys() - expected.dead.keys():
        yield Finding(kind=Kind.UNACCOUNTED, what=f"{clip_id} has a dead letter, and must not have")


def _questions(store: FeatureStore, expected: Expected) -> Iterator[Finding]:
    columns = ["question_id", "clip_id", "split", "answer"]
    rows = {row.pop("question_id"): tuple(row.values()) for row in store.questions(columns).to_pylist()}
    for question_id, said in expected.questions.items():
        if question_id not in rows:
            yield Finding(kind=Kind.LOST, what=f"question {question_id} is not there")
        elif rows[question_id] != said:
            yield Finding(kind=Kind.LOST, what=f"question {question_id} is {rows[question_id]}, not {said}")
    for question_id in rows.keys() - expected.questions.keys():
        yield Finding(kind=Kind.UNACCOUNTED, what=f"question {question_id} is there, and must not be")


def _inconsistent(store: FeatureStore) -> Iterator[Finding]:
    for what in inconsistencies(store):
        yield Finding(kind=Kind.TORN, what=what)


# -- what readers see


def inconsistencies(store: FeatureStore) -> list[str]:
    """Where clips, questions and neighbours are not of one moment; `store` may be pinned."""
    stored = set(store.clips(["clip_id"])["clip_id"].to_pylist())
    found = [
        f"a question is about {clip_id}, which is not there"
        for clip_id in set(store.questions(["clip_id"])["clip_id"].to_pylist()) - stored
    ]
    searched = set()
    for row in store.neighbours(["clip_id", "nearest_ids", "farthest_ids"]).to_pylist():
        searched.add(row["clip_id"])
        for clip_id in {row["clip_id"], *row["nearest_ids"], *row["farthest_ids"]} - stored:
            found.append(f"neighbours of {row['clip_id']} name {clip_id}, which is not there")
    return found + [f"{clip_id} has no neighbours" for clip_id in stored - searched]


def digest(store: FeatureStore) -> str:
    """Of all that a reader of one moment can see; the order of rows does not count."""
    texts: list[str] = []
    for table in (Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS):
        texts += sorted(repr(sorted(row.items())) for row in store.dataset(table).to_table().to_pylist())
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# -- neighbours


def stale(store: FeatureStore, settings: IndexSettings) -> list[Finding]:
    """Rows of `neighbours` that are not what a search of the whole bank gives now, or are missing."""
    bank, found = MemoryBank.open(store, settings.bank), []
    columns = ["clip_id", "missing", "retrieval", "nearest_ids", "nearest_scores", "farthest_scores"]
    held = store.neighbours(columns).to_pylist()
    rows = {(row["clip_id"], row["missing"], row["retrieval"]): row for row in held}
    for missing in Modality:
        for chunk in query_chunks(bank, missing, set(query_clips(bank, missing)["clip_id"].to_pylist())):
            for mode in settings.retrieval:
                right = bank.search(chunk.queries(), settings.search(missing, mode))
                for at, clip_id in enumerate(chunk.clip_ids):
                    row = rows.pop((clip_id, missing.value, mode.value), None)
                    near, far = right.nearest.scores(at), right.farthest.scores(at)
                    if (
                        row is None
                        or row["nearest_ids"] != right.nearest.ids(at)
                        or not np.allclose(row["nearest_scores"], near, rtol=0, atol=SCORE_TOLERANCE)
                        or not np.allclose(row["farthest_scores"], far, rtol=0, atol=SCORE_TOLERANCE)
                    ):
                        what = f"neighbours of {clip_id} ({mode.value}, {missing.value} missing): {row}"
                        found.append(Finding(kind=Kind.STALE, what=what))
    return found + [Finding(kind=Kind.STALE, what=f"neighbours of nothing: {key}") for key in rows]


# -- files


def orphaned(folder: Path) -> list[Finding]:
    """Files below a store's folder that no version of any of its tables names.

    Not of the leases' table: heartbeats write to it whatever a job does, so nobody may call a file there left
    behind before it is a week old, as Lance's own cleaning has it.
    """
    named: set[Path] = set()
    tables = [path for path in folder.rglob("*.lance") if path.is_dir()]
    for path in tables:
        there = path.rglob("*") if path.name == LEASES else (path / name for name in _named(path))
        named.update(there)
    return [
        Finding(kind=Kind.ORPHANED, what=f"{path.relative_to(folder)} ({path.stat().st_size} bytes)")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in named and not _always(path, tables)
    ]


def _always(path: Path, tables: Iterable[Path]) -> bool:
    """Whether a file is one that a table has beside its versions."""
    home = next((table for table in tables if path.is_relative_to(table)), None)
    return home is not None and path.relative_to(home).as_posix().startswith(ALWAYS)


def _named(table: Path) -> Iterator[str]:
    """Names of all files of all versions of one table, relative to it."""
    address = TableAddress(uri=str(table), schema=pa.schema([]))
    transactions = [path.name for path in (table / "_transactions").glob("*")]
    for version in (each["version"] for each in address.open().versions()):
        dataset = address.open(version)
        manifest = f"_versions/{NEWEST_FIRST - version}.manifest"
        yield manifest
        said = (table / manifest).read_bytes()  # names its transaction's file, which Lance does not tell
        yield from (f"_transactions/{name}" for name in transactions if name.encode() in said)
        for fragment in dataset.get_fragments():
            yield from (f"data/{file.path}" for file in fragment.data_files())
            if deleted := fragment.deletion_file():
                yield deleted
        for index in dataset.describe_indices():
            for segment in index.segments:
                there = table / "_indices" / segment.uuid
                yield from (f"_indices/{segment.uuid}/{file.name}" for file in there.glob("*"))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with its time of change and its size."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def writes_together(note: Path) -> bool:
    """Whether two processes wrote in turns or at once: see `Order.note`."""
    spans: dict[int, tuple[float, float]] = {}
    for line in note.read_text().splitlines() if note.exists() else []:
        pid, began, ended = json.loads(line)
        first, last = spans.get(pid, (began, ended))
        spans[pid] = min(first, began), max(last, ended)
    ordered = sorted(spans.values())
    return any(one[1] > other[0] for one, other in pairwise(ordered))
