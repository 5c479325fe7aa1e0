"""The vector indexes on the two key columns of `clips`, kept up to date; `vector_search` searches them.

An index consists of segments. Each covers some fragments of the table and is trained on their keys alone, so
clips of a new kind get centroids of their own. A refresh indexes the rows that are not covered together with
the segments that are not much larger, as in a log-structured merge tree: its cost grows with the change, and
segments stay few. LanceDB builds a whole index; a segment is built and committed through pylance, because
LanceDB's `optimize` would also merge all fragments of the table. The refresh of a column is one commit; a
crash before it leaves files that no version names, for `maintenance.clean` to remove.
"""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import lance
import lancedb
from lancedb.index import IvfRq, IvfSq
from lancedb.table import Table as LanceTable

from r2scp.store.commits import lance_errors
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.search.bank import KEY_COLUMNS
from r2scp.store.search.vector_search import INDEX_TYPES, ServingSettings, index_name

PARTITION_KEYS = 512  # keys per partition: fewer keys to scan, but more centroids to compare
UNINDEXED_ROWS = 256  # rows that may stay outside the index: 2 ms per search at D = 1024
TIER = 2  # a segment up to this many times the rows to be indexed is indexed again with them
STALE_FACTOR = 2  # an index this many times the size that its rows need is rebuilt
RQ_BITS = 5  # of a code, per dimension
ROW_OVERHEAD = 48  # bytes per indexed row besides its code: row id, correction factors
FILE_OVERHEAD = 1 << 16  # bytes of a segment without rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnRefresh:
    """The refresh of the index of one key column."""

    column: str
    why: str
    rows: int  # indexed by this refresh, with or without the key; 0: the index was dropped
    unindexed_before: int  # rows
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRefresh:
    """A refresh of the indexes; without `columns` nothing was outdated and nothing was written."""

    kind: str  # exact, ivf_rq or ivf_sq
    rows: int  # of `clips`
    version: int  # of `clips`, afterwards
    columns: tuple[ColumnRefresh, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _ColumnPlan:
    """The refresh of one column. `fragments`: to be indexed; None: drop the index.

    `rebuild`: no existing segment stays.
    """

    column: str
    why: str
    fragments: tuple[int, ...] | None
    rebuild: bool
    unindexed: int  # rows


def refresh_reasons(store: FeatureStore, settings: ServingSettings) -> list[str]:
    """Why the indexes need a refresh, one line per key column; empty if they do not.

    Reads metadata, and if more than UNINDEXED_ROWS rows are not indexed, their keys until one is found.
    """
    dataset = store.dataset(Table.CLIPS)
    with lance_errors("read the index of", dataset.uri):
        return [plan.why for plan in _plan(dataset, settings)]


def segments(store: FeatureStore, version: int | None = None) -> frozenset[str]:
    """Ids of the segments of all indexes, unchanged as long as no index is refreshed."""
    dataset = store.dataset(Table.CLIPS, version)
    with lance_errors("read the index of", dataset.uri):
        return frozenset(segment.uuid for index in dataset.describe_indices() for segment in index.segments)


def refresh_index(store: FeatureStore, settings: ServingSettings) -> IndexRefresh:
    """Bring the indexes up to date. For the holder of the lease only. Raises `StoreError`."""
    columns = []
    dataset = store.dataset(Table.CLIPS)
    kind = _kind(settings, dataset.count_rows())
    with lance_errors("index", dataset.uri):
        for plan in _plan(dataset, settings):
            start = time.perf_counter()
            rows = _refresh_column(store, plan, kind)
            columns.append(
                ColumnRefresh(
                    column=plan.column,
                    why=plan.why,
                    rows=rows,
                    unindexed_before=plan.unindexed,
                    seconds=time.perf_counter() - start,
                )
            )
    version = store.dataset(Table.CLIPS).version
    return IndexRefresh(kind=kind, rows=dataset.count_rows(), version=version, columns=tuple(columns))


def _kind(settings: ServingSettings, rows: int) -> str:
    if settings.kind != "auto":
        return settings.kind
    return "exact" if rows < settings.exact_below else "ivf_rq"


def _plan(dataset: lance.LanceDataset, settings: ServingSettings) -> list[_ColumnPlan]:
    rows = {fragment.fragment_id: fragment.count_rows() for fragment in dataset.get_fragments()}
    indexes = {index.name: index for index in dataset.describe_indices()}
    plans = (
        _plan_column(dataset, column, rows, indexes.get(index_name(column)), settings)
        for column in KEY_COLUMNS.values()
    )
    return [plan for plan in plans if plan is not None]


def _plan_column(
    dataset: lance.LanceDataset,
    column: str,
    rows: dict[int, int],
    index: "lance.indices.IndexDescription | None",
    settings: ServingSettings,
) -> _ColumnPlan | None:
    total = sum(rows.values())
    kind = _kind(settings, total)
    if kind == "exact":
        if index is None:
            return None
        why = f"{column}: {total} rows are searched without an index"
        return _ColumnPlan(column=column, why=why, fragments=None, rebuild=True, unindexed=0)
    segments = [] if index is None else [rows.keys() & segment.fragment_ids for segment in index.segments]
    uncovered = rows.keys() - set().union(*segments)
    unindexed = sum(rows[fragment] for fragment in uncovered)
    reason = _rebuild_reason(index, INDEX_TYPES[kind], total, dataset.schema.field(column).type.list_size)
    if reason is None and unindexed <= UNINDEXED_ROWS:
        return None
    kept = [] if reason else _kept_segments(segments, rows, unindexed)
    fragments = rows.keys() - set().union(*kept)
    if not _has_key(dataset, column, fragments if reason else uncovered):
        return None
    why = f"{column}: {reason or f'{unindexed} rows are not indexed'}"
    return _ColumnPlan(
        column=column, why=why, fragments=tuple(sorted(fragments)), rebuild=not any(kept), unindexed=unindexed
    )


def _rebuild_reason(
    index: "lance.indices.IndexDescription | None", index_type: str, rows: int, dim: int
) -> str | None:
    """Why an index must be rebuilt; None if it need not be."""
    if index is None:
        return "there is no index"
    if index.index_type != index_type:
        return f"its index is {index.index_type}, not {index_type}"
    code = dim if index_type == INDEX_TYPES["ivf_sq"] else -(-dim * RQ_BITS // 8)
    needed = rows * (code + ROW_OVERHEAD + 4 * dim // PARTITION_KEYS) + FILE_OVERHEAD * len(index.segments)
    if (index.total_size_bytes or 0) > STALE_FACTOR * needed:
        return f"its index has {index.total_size_bytes} bytes, mostly of rows that are gone"
    return None


def _kept_segments(
    segments: Iterable[Collection[int]], rows: dict[int, int], unindexed: int
) -> list[Collection[int]]:
    """Segments too large to be indexed again together with so many rows."""
    kept = []
    for segment in sorted(segments, key=lambda fragments: sum(rows[fragment] for fragment in fragments)):
        size = sum(rows[fragment] for fragment in segment)
        if kept or size > TIER * unindexed:
            kept.append(segment)
        else:
            unindexed += size
    return kept


def _has_key(dataset: lance.LanceDataset, column: str, fragments: Collection[int]) -> bool:
    if not fragments:
        return False
    return dataset.scanner(**_key_scan(dataset, column, fragments), limit=1).to_table().num_rows > 0


def _key_scan(dataset: lance.LanceDataset, column: str, fragments: Collection[int]) -> dict:
    """Scanner options for the rows of some fragments that have a key."""
    selected = [dataset.get_fragment(fragment) for fragment in sorted(fragments)]
    return {"columns": ["clip_id"], "filter": f"{column} IS NOT NULL", "fragments": selected}


def _lancedb_table(store: FeatureStore) -> LanceTable:
    database = lancedb.connect(store.database, storage_options=dict(store.storage_options))
    return database.open_table(Table.CLIPS.value)


def _refresh_column(store: FeatureStore, plan: _ColumnPlan, kind: str) -> int:
    """Rows that were indexed."""
    name, dataset = index_name(plan.column), store.dataset(Table.CLIPS)
    if plan.fragments is None:
        _lancedb_table(store).drop_index(name)
        return 0
    keys = dataset.scanner(**_key_scan(dataset, plan.column, plan.fragments)).count_rows()
    partitions = max(1, keys // PARTITION_KEYS)
    if plan.rebuild:
        if kind == "ivf_sq":
            config = IvfSq(distance_type="cosine", num_partitions=partitions)
        else:
            config = IvfRq(distance_type="cosine", num_partitions=partitions, num_bits=RQ_BITS)
        _lancedb_table(store).create_index(plan.column, config=config, name=name, replace=True)
    else:
        code: dict[str, Any] = {} if kind == "ivf_sq" else {"num_bits": RQ_BITS}
        segment = dataset.create_index_uncommitted(
            column=plan.column,
            index_type=INDEX_TYPES[kind],
            name=name,
            metric="cosine",
            replace=True,
            num_partitions=partitions,
            fragment_ids=list(plan.fragments),
            **code,
        )
        dataset.commit_existing_index_segments(name, plan.column, [segment])
    fragments = [dataset.get_fragment(fragment) for fragment in plan.fragments]
    return sum(fragment.count_rows() for fragment in fragments if fragment is not None)
