"""The vector indexes on the two key columns of `clips`, kept up with its rows; `serving_search` uses them.

An index consists of segments. Each covers some fragments of the table and is trained on their keys alone, so
clips of a new kind get centroids of their own. A refresh indexes what is not covered together with the
segments that are not much larger, as in a log-structured merge tree: what it costs grows with the change,
and segments stay few. Each column's refresh is one commit; a crash before it leaves files that no version
names, for `FeatureStore` upkeep to remove.
"""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import lance

from r2scp.store.commits import lance_errors
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.search.bank import KEY_COLUMNS

PARTITION_KEYS = 512  # keys of one partition: fewer to look at, for more centroids to compare with
EXACT_BELOW = 4_096  # rows: as many as a search one by one can afford, 17 MB of keys at D = 1024
UNINDEXED_ROWS = 256  # rows left to be compared one by one: 2 ms at D = 1024
TIER = 2  # a segment up to this many times the rows to be indexed is indexed again with them
STALE_FACTOR = 2  # index files this many times what their rows need are written again
RQ_BITS = 5  # of a code, per dimension; Lance's default
ROW_OVERHEAD = 48  # bytes an indexed row needs beside its code: row id, correction factors
FILE_OVERHEAD = 1 << 16  # bytes of a segment without rows

INDEX_TYPES = {"ivf_rq": "IVF_RQ", "ivf_sq": "IVF_SQ"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingSettings:
    """How to index. `auto` is `exact`, which has no index, below `exact_below` rows and `ivf_rq` from there.

    `effort` in [0, 1] is how much of an index a search without a condition looks at: 0 one partition of a
    segment, 1 all of them, between them partitions to the power of `effort`.
    """

    kind: Literal["auto", "exact", "ivf_rq", "ivf_sq"] = "auto"
    exact_below: int = EXACT_BELOW
    effort: float = 0.5

    def __post_init__(self) -> None:
        kinds = ("auto", "exact", *INDEX_TYPES)
        if self.kind not in kinds:
            raise ValueError(f"kind must be one of {', '.join(kinds)}; got {self.kind!r}")
        if self.exact_below < 0:
            raise ValueError(f"exact_below must be at least 0; got {self.exact_below}")
        if not 0.0 <= self.effort <= 1.0:
            raise ValueError(f"effort must be in [0, 1]; got {self.effort}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnRefresh:
    """What a refresh did to one key column."""

    column: str
    why: str
    rows: int  # indexed now, of which some may lack the key; 0: the index was dropped
    unindexed_before: int  # rows
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRefresh:
    """What a refresh did; `columns` is empty where nothing was due and nothing was written."""

    kind: str  # exact, ivf_rq or ivf_sq
    rows: int  # of `clips`
    version: int  # of `clips`, afterwards
    columns: tuple[ColumnRefresh, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What is due for one column. `fragments`: to be indexed; None: the index is to be dropped.

    `anew`: no segment of before stays.
    """

    column: str
    why: str
    fragments: tuple[int, ...] | None
    anew: bool
    unindexed: int  # rows


def index_due(store: FeatureStore, settings: ServingSettings) -> list[str]:
    """Why a refresh is due, one line a key column; empty where it is not.

    Reads metadata and, where more than UNINDEXED_ROWS rows are not indexed, keys of those until one is found.
    """
    dataset = store.dataset(Table.CLIPS)
    with lance_errors("read the index of", dataset.uri):
        return [work.why for work in _due(dataset, settings)]


def segments(store: FeatureStore, version: int | None = None) -> frozenset[str]:
    """Names of the parts that the indexes consist of: the same as long as no index was touched."""
    dataset = store.dataset(Table.CLIPS, version)
    with lance_errors("read the index of", dataset.uri):
        return frozenset(part.uuid for index in dataset.describe_indices() for part in index.segments)


def refresh_index(store: FeatureStore, settings: ServingSettings) -> IndexRefresh:
    """Do what is due. For the holder of the lease only. Raises `StoreError`."""
    done = []
    dataset = store.dataset(Table.CLIPS)
    kind = _kind(settings, dataset.count_rows())
    with lance_errors("index", dataset.uri):
        for work in _due(dataset, settings):
            start = time.perf_counter()
            rows = _do(store.dataset(Table.CLIPS), work, kind, store.dim)
            done.append(
                ColumnRefresh(
                    column=work.column,
                    why=work.why,
                    rows=rows,
                    unindexed_before=work.unindexed,
                    seconds=time.perf_counter() - start,
                )
            )
    version = store.dataset(Table.CLIPS).version
    return IndexRefresh(kind=kind, rows=dataset.count_rows(), version=version, columns=tuple(done))


def covered(dataset: lance.LanceDataset) -> dict[str, set[int]]:
    """Key column -> fragments that its index holds, of those columns that have an index."""
    segments = {index.name: index.segments for index in dataset.describe_indices()}
    return {
        column: set().union(*(segment.fragment_ids for segment in segments[_name(column)]))
        for column in KEY_COLUMNS.values()
        if _name(column) in segments
    }


def _kind(settings: ServingSettings, rows: int) -> str:
    if settings.kind != "auto":
        return settings.kind
    return "exact" if rows < settings.exact_below else "ivf_rq"


def _name(column: str) -> str:
    return f"{column}_idx"


def _due(dataset: lance.LanceDataset, settings: ServingSettings) -> list[_Work]:
    rows = {fragment.fragment_id: fragment.count_rows() for fragment in dataset.get_fragments()}
    described = {index.name: index for index in dataset.describe_indices()}
    found = (
        _column_due(dataset, column, rows, described.get(_name(column)), settings)
        for column in KEY_COLUMNS.values()
    )
    return [work for work in found if work is not None]


def _column_due(
    dataset: lance.LanceDataset,
    column: str,
    rows: dict[int, int],
    index: "lance.indices.IndexDescription | None",
    settings: ServingSettings,
) -> _Work | None:
    total = sum(rows.values())
    kind = _kind(settings, total)
    if kind == "exact":
        if index is None:
            return None
        why = f"{column}: {total} rows are searched without an index"
        return _Work(column=column, why=why, fragments=None, anew=True, unindexed=0)
    held = [] if index is None else [rows.keys() & segment.fragment_ids for segment in index.segments]
    uncovered = rows.keys() - set().union(*held)
    unindexed = sum(rows[fragment] for fragment in uncovered)
    wrong = _wrong(index, INDEX_TYPES[kind], total, dataset.schema.field(column).type.list_size)
    if wrong is None and unindexed <= UNINDEXED_ROWS:
        return None
    kept = [] if wrong else _kept(held, rows, unindexed)
    again = rows.keys() - set().union(*kept)
    if not _has_key(dataset, column, again if wrong else uncovered):
        return None
    why = f"{column}: {wrong or f'{unindexed} rows are not indexed'}"
    return _Work(
        column=column, why=why, fragments=tuple(sorted(again)), anew=not any(kept), unindexed=unindexed
    )


def _wrong(
    index: "lance.indices.IndexDescription | None", index_type: str, rows: int, dim: int
) -> str | None:
    """Why an index must be built anew."""
    if index is None:
        return "there is no index"
    if index.index_type != index_type:
        return f"its index is {index.index_type}, not {index_type}"
    code = dim if index_type == INDEX_TYPES["ivf_sq"] else -(-dim * RQ_BITS // 8)
    needed = rows * (code + ROW_OVERHEAD + 4 * dim // PARTITION_KEYS) + FILE_OVERHEAD * len(index.segments)
    if (index.total_size_bytes or 0) > STALE_FACTOR * needed:
        return f"its index has {index.total_size_bytes} bytes, mostly of rows that are gone"
    return None


def _kept(held: Iterable[Collection[int]], rows: dict[int, int], unindexed: int) -> list[Collection[int]]:
    """Segments too large to be indexed again with so many rows."""
    kept = []
    for segment in sorted(held, key=lambda fragments: sum(rows[fragment] for fragment in fragments)):
        size = sum(rows[fragment] for fragment in segment)
        if kept or size > TIER * unindexed:
            kept.append(segment)
        else:
            unindexed += size
    return kept


def _has_key(dataset: lance.LanceDataset, column: str, fragments: Collection[int]) -> bool:
    if not fragments:
        return False
    return dataset.scanner(**_keys_of(dataset, column, fragments), limit=1).to_table().num_rows > 0


def _keys_of(dataset: lance.LanceDataset, column: str, fragments: Collection[int]) -> dict:
    """What a scanner needs to see the rows of some fragments that have a key."""
    chosen = [dataset.get_fragment(fragment) for fragment in sorted(fragments)]
    return {"columns": ["clip_id"], "filter": f"{column} IS NOT NULL", "fragments": chosen}


def _do(dataset: lance.LanceDataset, work: _Work, kind: str, dim: int) -> int:
    """Rows indexed now."""
    name = _name(work.column)
    if work.fragments is None:
        dataset.drop_index(name)
        return 0
    keys = dataset.scanner(**_keys_of(dataset, work.column, work.fragments)).count_rows()
    how = {
        "column": work.column,
        "index_type": INDEX_TYPES[kind],
        "name": name,
        "metric": "cosine",
        "replace": True,
        "num_partitions": max(1, keys // PARTITION_KEYS),
    }
    if work.anew:
        dataset.create_index(**how)
    else:
        segment = dataset.create_index_uncommitted(**how, fragment_ids=list(work.fragments))
        dataset.commit_existing_index_segments(name, work.column, [segment])
    chosen = [dataset.get_fragment(fragment) for fragment in work.fragments]
    return sum(fragment.count_rows() for fragment in chosen if fragment is not None)
