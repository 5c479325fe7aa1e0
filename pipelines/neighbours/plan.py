"""Which neighbours are missing, and which may be wrong since the memory bank has changed.

A row is the neighbour list of one clip for one missing modality; a hit is one neighbour in it. The table
`indexes` records up to which version of `clips` the rows of one search are right. After that version a row
can only be wrong if

- its own clip changed,
- it names a clip that changed or was removed from the bank,
- a clip of its own source was added to or removed from the bank (such hits are counted, see `neighbours` in
  `schema.COLUMNS`), or
- a clip added to the bank scores at least as well as the last of its hits: decided by a float32 dot product
  of its key with the added keys, where ties within the rounding error count as better.

Rows of the last kind are extended: their clips are compared with the added clips alone and the hits merged.
All others are searched again (the first three) or stay: a search of the whole bank would give the same.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r2scp.pipelines.neighbours.changes import Changes, clip_changes
from r2scp.pipelines.neighbours.queries import query_chunks, query_clips
from r2scp.pipelines.neighbours.settings import IndexSettings, ModeCounts
from r2scp.store.commits import sql_literal
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search.bank import MemoryBank
from r2scp.store.search.exact import product_error
from r2scp.store.sources import source_of

SEARCH_VERSION = 2  # rows of another version of this program's search are searched again
KEYS_PER_PRODUCT = 8_192  # added keys compared at once with a chunk of queries: 0.5 GB of scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Validity:
    """A row of `indexes`: the rows of one search are right at this version of `clips`."""

    bank_version: int
    query_corpora: tuple[str, ...]

    def covers(self, corpora: tuple[str, ...]) -> bool:
        return not self.query_corpora or (bool(corpora) and set(corpora) <= set(self.query_corpora))

    def with_corpora(self, corpora: tuple[str, ...]) -> tuple[str, ...]:
        """The corpora whose clips have rows once those of `corpora` have."""
        return () if not (self.query_corpora and corpora) else tuple(sorted({*self.query_corpora, *corpora}))


@dataclass(kw_only=True)
class ModePlan:
    """What to do for one retrieval mode. Clips are given by the modality that is missing."""

    retrieval: Retrieval
    index: str  # key in `indexes`
    to_search: dict[Modality, set[str]] = field(default_factory=dict)  # clips to compare with the whole bank
    to_extend: dict[Modality, set[str]] = field(default_factory=dict)  # clips to compare with `added` alone
    added: set[str] = field(default_factory=set)  # clips of the bank since the version of `previous`
    to_delete: list[str] = field(default_factory=list)  # ids of rows
    previous: Validity | None = None  # None where nothing is known about the existing rows
    counts: ModeCounts = field(default_factory=ModeCounts)

    @property
    def has_work(self) -> bool:
        return bool(self.to_delete) or self.searches > 0

    @property
    def searches(self) -> int:
        return sum(len(clips) for kind in (self.to_search, self.to_extend) for clips in kind.values())


def index_key(settings: IndexSettings, retrieval: Retrieval) -> str:
    """Key of one search in `indexes`: 16 hex digits, from the settings and SEARCH_VERSION."""
    parts = [SEARCH_VERSION, settings.settings_key(retrieval)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_validity(store: FeatureStore, index: str) -> Validity | None:
    """The row of one search in `indexes`; None where it was never made."""
    if not store.address(Table.INDEXES).exists():  # a store of an earlier version
        return None
    where = f"index = {sql_literal(index)}"
    rows = store.dataset(Table.INDEXES).to_table(filter=where).to_pylist()
    if not rows:
        return None
    return Validity(bank_version=rows[0]["bank_version"], query_corpora=tuple(rows[0]["query_corpora"]))


def neighbours_current(store: FeatureStore, settings: IndexSettings) -> bool:
    """Whether there is nothing to do, without reading any key: `clips` is still at the version searched."""
    version = store.dataset(Table.CLIPS).version
    rows = [read_validity(store, index_key(settings, retrieval)) for retrieval in settings.retrieval]
    return all(row and row.bank_version == version and row.covers(settings.query_corpora) for row in rows)


def plan_neighbours(bank: MemoryBank, settings: IndexSettings) -> list[ModePlan]:
    """What is missing, may be wrong or must go in `neighbours`, per retrieval mode. Reads only."""
    changes: dict[int, Changes | None] = {}
    modes = [_Mode.open(bank, settings, retrieval, changes) for retrieval in settings.retrieval]
    for missing in Modality:
        queries = _Queries.of(query_clips(bank, missing), settings.query_corpora)
        comparisons = [mode.classify(missing, queries) for mode in modes]
        if any(comparison.row_of for comparison in comparisons):
            _compare_with_added(bank, missing, comparisons)
    for mode in modes:
        counts = mode.plan.counts
        counts.unchanged = counts.queries - mode.plan.searches
        counts.removed = len(mode.plan.to_delete)
    return [mode.plan for mode in modes]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Queries:
    """Clips that have a key to search with."""

    source: dict[str, str]  # clip id -> source
    requested: set[str]  # those of the requested corpora

    @classmethod
    def of(cls, table: pa.Table, corpora: tuple[str, ...]) -> "_Queries":
        ids = table["clip_id"].to_pylist()
        pairs = zip(ids, table["source_id"].to_pylist(), strict=True)
        source = {clip_id: source_of(clip_id, source_id) for clip_id, source_id in pairs}
        if corpora:
            ids = table.filter(pc.field("corpus").isin(corpora))["clip_id"].to_pylist()
        return cls(source=source, requested=set(ids))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """Rows that stay right unless an added key scores well enough to be among their hits."""

    to_extend: set[str]  # of the plan; filled by `_compare_with_added`
    added_KD: np.ndarray  # keys
    row_of: dict[str, int]  # clip id -> row of the two arrays
    worst_near: np.ndarray  # score of the last nearest hit; -infinity where there are fewer than n
    worst_far: np.ndarray  # score of the last farthest hit; infinity where there are fewer than n


@dataclass(kw_only=True)
class _Mode:
    """One retrieval mode while its plan is made."""

    bank: MemoryBank
    settings: IndexSettings
    plan: ModePlan
    changed: set[str] = field(default_factory=set)  # clips that are new or were extracted again
    removed: set[str] = field(default_factory=set)  # clips that were in the bank and are not, or changed
    sources: set[str] = field(default_factory=set)  # of clips added to or removed from the bank

    @classmethod
    def open(
        cls,
        bank: MemoryBank,
        settings: IndexSettings,
        retrieval: Retrieval,
        changes: dict[int, Changes | None],
    ) -> "_Mode":
        """`changes` caches the comparison with each earlier version of `clips`."""
        plan = ModePlan(retrieval=retrieval, index=index_key(settings, retrieval))
        plan.previous = read_validity(bank.store, plan.index)
        mode = cls(bank=bank, settings=settings, plan=plan)
        if plan.previous is None:
            return mode
        version = plan.previous.bank_version
        if version not in changes:
            changes[version] = _changes_since(bank, version)
        since = changes[version]
        if since is None:  # that version was cleaned away, so the rows must count as wrong
            plan.previous = None
            return mode
        added, removed = dict(_in_bank(bank, since.added)), dict(_in_bank(bank, since.removed))
        mode.changed = set(since.added["clip_id"].to_pylist())
        plan.added, mode.removed = set(added), set(removed)
        mode.sources = {*added.values(), *removed.values()}
        return mode

    def classify(self, missing: Modality, queries: _Queries) -> _Comparison:
        """Add to the plan the rows to delete and the clips to search; return the rows left to compare."""
        plan = self.plan
        rows = _stored_rows(
            self.bank.store,
            self.settings.settings_key(plan.retrieval),
            missing,
            with_hits=bool(plan.added or self.removed),
        )
        current = rows.filter(pc.field("index") == plan.index) if plan.previous else rows.slice(0, 0)
        current_ids = set(current["neighbour_id"].to_pylist())
        pairs = zip(rows["neighbour_id"].to_pylist(), rows["clip_id"].to_pylist(), strict=True)
        plan.to_delete += sorted(
            row_id for row_id, clip_id in pairs if row_id not in current_ids or clip_id not in queries.source
        )
        clip_ids = current["clip_id"].to_pylist()
        with_row = {clip_id for clip_id in clip_ids if clip_id in queries.source}
        outdated = self._outdated(current, queries) if plan.previous else set()
        to_search = plan.to_search[missing] = (queries.requested - with_row) | (with_row & outdated)
        to_extend = plan.to_extend[missing] = set()
        plan.counts.queries += len(queries.requested | with_row)
        rest = [i for i, clip_id in enumerate(clip_ids) if clip_id in with_row and clip_id not in to_search]
        search = self.settings.search(missing, plan.retrieval)
        added_KD = self.bank.compared_keys(search, plan.added) if plan.added and rest else None
        if added_KD is None or not len(added_KD):
            nothing = np.zeros(0, np.float32)
            return _Comparison(
                to_extend=to_extend, added_KD=nothing, row_of={}, worst_near=nothing, worst_far=nothing
            )
        return _Comparison(
            to_extend=to_extend,
            added_KD=added_KD,
            row_of={clip_ids[i]: row for row, i in enumerate(rest)},
            worst_near=_worst_scores(current["nearest_scores"], self.settings.n, -np.inf)[rest],
            worst_far=_worst_scores(current["farthest_scores"], self.settings.n, np.inf)[rest],
        )

    def _outdated(self, current: pa.Table, queries: _Queries) -> set[str]:
        """Clips whose row must be searched again whatever the added clips score."""
        assert self.plan.previous is not None
        clip_ids = current["clip_id"].to_pylist()
        outdated = {clip_id for clip_id in clip_ids if queries.source.get(clip_id) in self.sources}
        if self.removed:
            outdated |= set(_clips_hitting(current, self.removed))
        # A crash between a commit of rows and that of `indexes` leaves rows of a later bank.
        newer = current.filter(pc.field("bank_version") > self.plan.previous.bank_version)
        return outdated | set(newer["clip_id"].to_pylist()) | self.changed


def _changes_since(bank: MemoryBank, version: int) -> Changes | None:
    try:
        return clip_changes(bank.store, version, bank.version)
    except StoreError:
        return None


def _in_bank(bank: MemoryBank, rows: pa.Table) -> Iterator[tuple[str, str]]:
    """(clip id, source) of the rows that are in the bank's scope."""
    names = ("clip_id", "source_id", "corpus", "split")
    for clip_id, source_id, corpus, split in zip(*(rows[name].to_pylist() for name in names), strict=True):
        source = source_of(clip_id, source_id)
        if bank.scope.includes(corpus, split, source):
            yield clip_id, source


def _stored_rows(store: FeatureStore, settings_key: str, missing: Modality, *, with_hits: bool) -> pa.Table:
    """Rows of one mode under these settings, also those of other versions of this program."""
    columns = ["neighbour_id", "clip_id", "index", "bank_version"]
    hits = ["nearest_ids", "farthest_ids", "nearest_scores", "farthest_scores"]
    if not store.address(Table.NEIGHBOURS).exists():  # a store of an earlier version
        return store.address(Table.NEIGHBOURS).schema.empty_table().select([*columns, *hits])
    where = f"settings = {sql_literal(settings_key)} AND missing = {sql_literal(missing.value)}"
    return store.neighbours([*columns, *(hits if with_hits else [])], where)


def _clips_hitting(rows: pa.Table, clip_ids: set[str]) -> Iterator[str]:
    """Clips whose hits include one of `clip_ids`."""
    values = pa.array(sorted(clip_ids), pa.string())
    for column in ("nearest_ids", "farthest_ids"):
        hits = rows[column].combine_chunks()
        pairs = pa.table({"hit": hits.flatten(), "row": hits.value_parent_indices()})
        matches = pairs.filter(pc.field("hit").isin(values))["row"].unique()
        yield from rows["clip_id"].take(matches).to_pylist()


def _worst_scores(scores: pa.ChunkedArray, n: int, default: float) -> np.ndarray:
    """The last score of each row; `default` where there are fewer than n."""
    lists = scores.combine_chunks()
    count = lists.value_lengths().to_numpy(zero_copy_only=False)
    ends = np.cumsum(count)
    flat = np.append(lists.flatten().to_numpy(zero_copy_only=False), np.float32(0))
    return np.where(count < n, np.float32(default), flat[np.maximum(ends - 1, 0)])


def _compare_with_added(bank: MemoryBank, missing: Modality, modes: list[_Comparison]) -> None:
    """Fill `to_extend` with the clips for which an added key scores at least as well as their last hit."""
    for chunk in query_chunks(bank, missing, set().union(*(mode.row_of.keys() for mode in modes))):
        for mode in modes:
            rows = [row for row, clip_id in enumerate(chunk.clip_ids) if clip_id in mode.row_of]
            if not rows:
                continue
            places = np.array([mode.row_of[chunk.clip_ids[row]] for row in rows])
            keys_QD = chunk.keys_QD[rows]
            near, far = mode.worst_near[places], mode.worst_far[places]
            close = np.zeros(len(rows), dtype=bool)
            for start in range(0, len(mode.added_KD), KEYS_PER_PRODUCT):
                added_KD = mode.added_KD[start : start + KEYS_PER_PRODUCT]
                scores_QK = keys_QD @ added_KD.T
                # A product in float32 may be off by this much, so a close call counts as a hit.
                error = product_error(keys_QD, added_KD)
                close |= (scores_QK.max(axis=1) >= near - error) | (scores_QK.min(axis=1) <= far + error)
            mode.to_extend.update(chunk.clip_ids[rows[i]] for i in np.flatnonzero(close))
