"""Search for one query at a time over all of `clips`: quick, nearly exact, never stale.

Lance's vector indexes on the two key columns propose candidates; their keys are read and scored exactly, so
that a score is the cosine that `MemoryBank` gives. Where a clip that was not proposed may still belong to the
best, by what the estimates of the others were off, more are asked for. Rows that no index holds yet are
compared one by one: a clip can be found from the moment it is committed. (Batch work uses `MemoryBank`, which
is exact.)

    >>> refresh_index(store, ServingSettings())
    >>> index = ServingIndex(store)
    >>> index.nearest(key_D, Modality.VISUAL, 3)
    [Hit(clip_id='vggsound/…', score=0.871), …]

An index consists of segments. Each covers some fragments of the table and is trained on their keys alone, so
clips of a new kind get centroids of their own. A refresh indexes what is not covered together with the
segments that are not much larger, as in a log-structured merge tree: what it costs grows with the change,
and segments stay few. Each column's refresh is one commit; a crash before it leaves files that no version
names, for `FeatureStore` upkeep to remove.

Legend: D width of a key, C candidates, Q queries, K keys.
"""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import lance
import numpy as np
import pyarrow as pa

from r2scp.store.bank import KEY_COLUMNS
from r2scp.store.feature_store import FeatureStore
from r2scp.store.nearest import exact_scores
from r2scp.store.schema import Modality, Table
from r2scp.store.transaction import told

PARTITION_KEYS = 4_096  # keys of one partition: as many as a search by hand can afford
UNINDEXED_ROWS = 256  # rows left to be compared one by one: 2 ms at D = 1024
TIER = 2  # a segment up to this many times the rows to be indexed is indexed again with them
STALE_FACTOR = 2  # index files this many times what their rows need are written again
EXTRA_CANDIDATES = 4  # beyond twice the hits; all are scored exactly, since codes of 5 bits only estimate
CANDIDATES_GROW = 4  # times as many, where one that was not proposed may still be among the best
MOST_CANDIDATES = 40  # for each hit
SURE = 3.0  # standard deviations of what a code's estimate is off
EXACT_WITHIN = 1e-5  # of a score: what float32 is off
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
    exact_below: int = PARTITION_KEYS
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


class Hit(NamedTuple):
    """A clip and the cosine of its key with the query."""

    clip_id: str
    score: float


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
    with told("read the index of", dataset.uri):
        return [work.why for work in _due(dataset, settings)]


def segments(store: FeatureStore, version: int | None = None) -> frozenset[str]:
    """Names of the parts that the indexes consist of: the same as long as no index was touched."""
    dataset = store.dataset(Table.CLIPS, version)
    with told("read the index of", dataset.uri):
        return frozenset(part.uuid for index in dataset.describe_indices() for part in index.segments)


def refresh_index(store: FeatureStore, settings: ServingSettings) -> IndexRefresh:
    """Do what is due. For the holder of the lease only. Raises `StoreError`."""
    done = []
    dataset = store.dataset(Table.CLIPS)
    kind = _kind(settings, dataset.count_rows())
    with told("index", dataset.uri):
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


class ServingIndex:
    """The clips of one version, for search. May be used from several threads.

    Keep it: all clip ids (some 50 ms to read at 200,000) and what was read of the index stay in memory.
    """

    def __init__(
        self,
        store: FeatureStore,
        settings: ServingSettings | None = None,
        version: int | str | None = None,
    ) -> None:
        """At a version or tag of `clips`, the latest where none is given. Raises `StoreError`."""
        self.settings = settings or ServingSettings()
        self._dataset = store.dataset(Table.CLIPS, version)
        self.version = self._dataset.version
        self.dim = store.dim
        self._indexed = _indexed(self._dataset) if self.settings.kind != "exact" else set()
        with told("read the clip ids of", self._dataset.uri):
            rows = self._dataset.scanner(columns=["clip_id"], with_row_id=True).to_table()
        rows = rows.sort_by("_rowid").combine_chunks()
        self._row_ids = rows["_rowid"].to_numpy()
        self._clip_ids = rows["clip_id"]  # of these rows; reading them for each search costs a quarter more

    def nearest(self, key_D: np.ndarray, among: Modality, n: int, where: str | None = None) -> list[Hit]:
        """Up to `n` clips whose key of modality `among` is nearest to `key_D`, float32 of unit length.

        Best first, of equal scores the lower clip id first. `where` is an SQL condition on `clips`; it costs
        no hits: with it all partitions are searched. Raises `StoreError` where the condition is none, and
        `ValueError` where the key or `n` is not what it must be.
        """
        query_D = np.ascontiguousarray(key_D, dtype=np.float32)
        if query_D.shape != (self.dim,) or not np.isfinite(query_D).all() or not query_D.any():
            raise ValueError(f"a query must be a finite vector of {self.dim}, not zero; got {query_D.shape}")
        if n < 1:
            raise ValueError(f"n must be at least 1; got {n}")
        column, candidates = KEY_COLUMNS[among], 2 * n + EXTRA_CANDIDATES
        before: list[Hit] = []
        while True:
            found = self._propose(query_D, column, candidates, where)
            hits = sorted(found.hits, key=lambda hit: (-hit.score, hit.clip_id))[:n]
            all_there = len(found.hits) < candidates or column not in self._indexed
            unseen = found.best_unseen  # None: the next attempt tells
            sure = hits == before if unseen is None else unseen < hits[-1].score
            if all_there or sure or candidates >= MOST_CANDIDATES * n:
                return hits
            before, candidates = hits, candidates * CANDIDATES_GROW

    def _propose(self, query_D: np.ndarray, column: str, count: int, where: str | None) -> "_Proposed":
        """The `count` that the index holds for best, scored exactly; rows without a key are none."""
        nearest = {
            "column": column,
            "q": query_D,
            "k": count,
            "metric": "cosine",
            "use_index": self.settings.kind != "exact",
            "search_effort": self.settings.effort if where is None else 1.0,
        }
        with told("search", self._dataset.uri):
            found = self._dataset.scanner(
                columns=[column, "_distance"],
                nearest=nearest,
                filter=where,
                prefilter=True,
                with_row_id=True,
                disable_scoring_autoprojection=True,
            ).to_table()
        keys = found[column].combine_chunks()
        there = keys.is_valid().to_numpy(zero_copy_only=False)
        keys_CD = keys.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        at = np.arange(len(keys_CD))
        scores_C = exact_scores(query_D[None], keys_CD, np.zeros_like(at), at)
        row_ids = found["_rowid"].to_numpy()[there]
        clip_ids = self._clip_ids.take(pa.array(np.searchsorted(self._row_ids, row_ids))).to_pylist()
        return _Proposed(
            hits=list(map(Hit, clip_ids, scores_C.tolist())),
            best_unseen=_best_unseen(1 - found["_distance"].to_numpy()[there], scores_C),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Proposed:
    """Candidates in no order, and the score that none of the others is likely to exceed."""

    hits: list[Hit]
    best_unseen: float | None  # None: nothing can be said


def _best_unseen(estimates_C: np.ndarray, scores_C: np.ndarray) -> float | None:
    """Clips that were not proposed have estimates below all of these. How far off an estimate is, is learnt
    from those that were: an offset of the query's own, and a spread about it. Where some rows are in no index
    Lance scores all candidates exactly, and nothing can be learnt."""
    errors_C = scores_C - estimates_C
    if errors_C.size < 2 or np.abs(errors_C).max() < EXACT_WITHIN:
        return None
    return float(estimates_C.min() + errors_C.mean() + SURE * errors_C.std())


def _kind(settings: ServingSettings, rows: int) -> str:
    if settings.kind != "auto":
        return settings.kind
    return "exact" if rows < settings.exact_below else "ivf_rq"


def _name(column: str) -> str:
    return f"{column}_idx"


def _indexed(dataset: lance.LanceDataset) -> set[str]:
    """Key columns that have an index."""
    names = {index.name for index in dataset.describe_indices()}
    return {column for column in KEY_COLUMNS.values() if _name(column) in names}


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
