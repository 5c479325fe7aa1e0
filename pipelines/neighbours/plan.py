"""Which neighbours are missing, and which may no longer be right since the bank has changed.

`indexes` says up to which version of `clips` the rows of one search are right. From there on a row can only
have changed where

- its own clip changed,
- it names a clip that left the bank, or changed,
- a clip of its own source entered or left the bank (such hits are counted, see `neighbours_schema`), or
- a clip that entered the bank scores at least as well as the last of its hits: one product of its key with
  those that are new, less the error of such a product.

Those of the last kind are searched again among the clips that entered alone, and what was known goes on from
there. All others are what a search of the whole bank would give, and stay.
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
from r2scp.pipelines.neighbours.settings import Counts, IndexSettings
from r2scp.store.commits import sql_literal
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search.bank import MemoryBank
from r2scp.store.search.exact import product_error
from r2scp.store.sources import source_of

SEARCH_VERSION = 2  # rows of another one are searched again
NEW_KEYS = 8_192  # compared at once with a chunk of queries: 0.5 GB of scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Validity:
    """A row of `indexes`: the search's rows are right at this version of `clips`."""

    bank_version: int
    query_corpora: tuple[str, ...]

    def covers(self, corpora: tuple[str, ...]) -> bool:
        return not self.query_corpora or (bool(corpora) and set(corpora) <= set(self.query_corpora))

    def with_corpora(self, corpora: tuple[str, ...]) -> tuple[str, ...]:
        """Whose clips have rows once those of `corpora` have."""
        return () if not (self.query_corpora and corpora) else tuple(sorted({*self.query_corpora, *corpora}))


@dataclass(kw_only=True)
class ModePlan:
    """What is to do for one retrieval mode."""

    retrieval: Retrieval
    index: str  # key in `indexes`
    pending: dict[Modality, set[str]] = field(default_factory=dict)  # clips to search for, by what is missing
    touched: dict[Modality, set[str]] = field(default_factory=dict)  # the same, among `entered` alone
    entered: set[str] = field(default_factory=set)  # clips of the bank that are new to it
    stale: list[str] = field(default_factory=list)  # ids of rows to remove
    valid: Validity | None = None  # before; None where nothing can be said of what is there
    counts: Counts = field(default_factory=Counts)

    @property
    def due(self) -> bool:
        return bool(self.stale) or self.total > 0

    @property
    def total(self) -> int:
        """Searches to do."""
        return sum(len(clips) for kind in (self.pending, self.touched) for clips in kind.values())


def index_key(settings: IndexSettings, retrieval: Retrieval) -> str:
    """Key in `indexes` of one search: 16 hex digits, of the settings and of this program's way to search."""
    parts = [SEARCH_VERSION, settings.settings_key(retrieval)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_validity(store: FeatureStore, index: str) -> Validity | None:
    """What `indexes` says of one search; None where it was never made."""
    if not store.address(Table.INDEXES).exists():  # a store of an earlier version
        return None
    where = f"index = {sql_literal(index)}"
    rows = store.dataset(Table.INDEXES).to_table(filter=where).to_pylist()
    if not rows:
        return None
    return Validity(bank_version=rows[0]["bank_version"], query_corpora=tuple(rows[0]["query_corpora"]))


def neighbours_current(store: FeatureStore, settings: IndexSettings) -> bool:
    """Whether nothing is due, told without a look at any key: `clips` is still at the version searched."""
    version = store.dataset(Table.CLIPS).version
    said = [read_validity(store, index_key(settings, retrieval)) for retrieval in settings.retrieval]
    return all(v and v.bank_version == version and v.covers(settings.query_corpora) for v in said)


def plan_neighbours(bank: MemoryBank, settings: IndexSettings) -> list[ModePlan]:
    """What is missing, may have changed or is stale in `neighbours`, mode by mode. Reads only."""
    changes: dict[int, Changes | None] = {}
    modes = [_Mode.open(bank, settings, retrieval, changes) for retrieval in settings.retrieval]
    for missing in Modality:
        queries = _Queries.of(query_clips(bank, missing), settings.query_corpora)
        unsettled = [mode.settle(missing, queries) for mode in modes]
        if any(left.at for left in unsettled):
            _compare(bank, missing, unsettled)
    for mode in modes:
        counts = mode.plan.counts
        counts.unchanged = counts.queries - mode.plan.total
        counts.removed = len(mode.plan.stale)
    return [mode.plan for mode in modes]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Queries:
    """Clips that have a key to search with. `wanted`: of the corpora that are asked for."""

    source: dict[str, str]
    wanted: set[str]

    @classmethod
    def of(cls, table: pa.Table, corpora: tuple[str, ...]) -> "_Queries":
        ids = table["clip_id"].to_pylist()
        pairs = zip(ids, table["source_id"].to_pylist(), strict=True)
        source = {clip_id: source_of(clip_id, source_id) for clip_id, source_id in pairs}
        if corpora:
            ids = table.filter(pc.field("corpus").isin(corpora))["clip_id"].to_pylist()
        return cls(source=source, wanted=set(ids))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unsettled:
    """Rows that stay unless a new key of the bank comes near enough. `worst_near`, `worst_far`: score of the
    last hit, infinite where there is room for more."""

    touched: set[str]  # of the plan; to be added to
    new_keys_KD: np.ndarray
    at: dict[str, int]  # clip id -> place in the arrays
    worst_near: np.ndarray
    worst_far: np.ndarray


@dataclass(kw_only=True)
class _Mode:
    """One retrieval mode on its way to a plan."""

    bank: MemoryBank
    settings: IndexSettings
    plan: ModePlan
    changed: set[str] = field(default_factory=set)  # clips whose row in `clips` is another one, or new
    entered: set[str] = field(default_factory=set)  # of them, those in the bank
    left: set[str] = field(default_factory=set)  # were in the bank, as they were
    sources: set[str] = field(default_factory=set)  # of both

    @classmethod
    def open(
        cls,
        bank: MemoryBank,
        settings: IndexSettings,
        retrieval: Retrieval,
        changes: dict[int, Changes | None],
    ) -> "_Mode":
        plan = ModePlan(retrieval=retrieval, index=index_key(settings, retrieval))
        plan.valid = read_validity(bank.store, plan.index)
        mode = cls(bank=bank, settings=settings, plan=plan)
        if plan.valid is None:
            return mode
        version = plan.valid.bank_version
        if version not in changes:
            changes[version] = _changes(bank, version)
        found = changes[version]
        if found is None:  # that version is gone: nothing can be said of the rows
            plan.valid = None
            return mode
        entered, left = dict(_in_bank(bank, found.appeared)), dict(_in_bank(bank, found.vanished))
        mode.changed = set(found.appeared["clip_id"].to_pylist())
        mode.entered, mode.left = set(entered), set(left)
        plan.entered = mode.entered
        mode.sources = {*entered.values(), *left.values()}
        return mode

    def settle(self, missing: Modality, queries: _Queries) -> _Unsettled:
        """Tell the rows that must be searched again from those that a product of keys decides on."""
        named, plan = self.settings.settings_key(self.plan.retrieval), self.plan
        known = _known(self.bank.store, named, missing, bool(self.entered or self.left))
        ours = known.filter(pc.field("index") == plan.index) if plan.valid else known.slice(0, 0)
        pairs = zip(known["neighbour_id"].to_pylist(), known["clip_id"].to_pylist(), strict=True)
        in_index = set(ours["neighbour_id"].to_pylist())
        plan.stale += sorted(
            row for row, clip_id in pairs if row not in in_index or clip_id not in queries.source
        )
        clip_ids = ours["clip_id"].to_pylist()
        due = set(_hit_by(ours, self.left)) if self.left else set()
        newer = pc.field("bank_version") > plan.valid.bank_version if plan.valid else None
        due |= set(ours.filter(newer)["clip_id"].to_pylist()) if newer is not None else set()
        due |= {clip_id for clip_id in clip_ids if queries.source.get(clip_id) in self.sources}
        held = {clip_id for clip_id in clip_ids if clip_id in queries.source}
        pending = plan.pending[missing] = (queries.wanted - held) | (held & (due | self.changed))
        touched = plan.touched[missing] = set()
        plan.counts.queries += len(queries.wanted | held)
        empty = np.zeros((0, self.bank.store.dim), np.float32)
        how = self.settings.search(missing, plan.retrieval)
        new_keys_KD = self.bank.compared_keys(how, self.entered) if self.entered else empty
        rest = [i for i, clip_id in enumerate(clip_ids) if clip_id in held and clip_id not in pending]
        if not len(new_keys_KD) or not rest:
            return _Unsettled(
                touched=touched, new_keys_KD=empty, at={}, worst_near=np.empty(0), worst_far=np.empty(0)
            )
        return _Unsettled(
            touched=touched,
            new_keys_KD=new_keys_KD,
            at={clip_ids[i]: place for place, i in enumerate(rest)},
            worst_near=_worst(ours["nearest_scores"], self.settings.n, -np.inf)[rest],
            worst_far=_worst(ours["farthest_scores"], self.settings.n, np.inf)[rest],
        )


def _changes(bank: MemoryBank, version: int) -> Changes | None:
    try:
        return clip_changes(bank.store, version, bank.version)
    except StoreError:
        return None


def _in_bank(bank: MemoryBank, rows: pa.Table) -> Iterator[tuple[str, str]]:
    """(clip id, source) of those rows that the bank's scope takes in."""
    names = ("clip_id", "source_id", "corpus", "split")
    for clip_id, source_id, corpus, split in zip(*(rows[name].to_pylist() for name in names), strict=True):
        source = source_of(clip_id, source_id)
        if bank.scope.takes(corpus, split, source):
            yield clip_id, source


def _known(store: FeatureStore, named: str, missing: Modality, with_hits: bool) -> pa.Table:
    """Rows of one mode under these settings, of this and of earlier programs."""
    columns = ["neighbour_id", "clip_id", "index", "bank_version"]
    hits = ["nearest_ids", "farthest_ids", "nearest_scores", "farthest_scores"]
    if not store.address(Table.NEIGHBOURS).exists():  # a store of an earlier version
        return store.address(Table.NEIGHBOURS).schema.empty_table().select([*columns, *hits])
    where = f"settings = {sql_literal(named)} AND missing = {sql_literal(missing.value)}"
    return store.neighbours([*columns, *(hits if with_hits else [])], where)


def _hit_by(rows: pa.Table, clip_ids: set[str]) -> Iterator[str]:
    """Clips whose hits name one of `clip_ids`."""
    wanted = pa.array(sorted(clip_ids), pa.string())
    for column in ("nearest_ids", "farthest_ids"):
        hits = rows[column].combine_chunks()
        pairs = pa.table({"hit": hits.flatten(), "row": hits.value_parent_indices()})
        named = pairs.filter(pc.field("hit").isin(wanted))["row"].unique()
        yield from rows["clip_id"].take(named).to_pylist()


def _worst(scores: pa.ChunkedArray, n: int, room: float) -> np.ndarray:
    """Each row's last score; `room` where there are fewer than n."""
    lists = scores.combine_chunks()
    count = lists.value_lengths().to_numpy(zero_copy_only=False)
    ends = np.cumsum(count)
    flat = np.append(lists.flatten().to_numpy(zero_copy_only=False), np.float32(0))
    return np.where(count < n, np.float32(room), flat[np.maximum(ends - 1, 0)])


def _compare(bank: MemoryBank, missing: Modality, modes: list[_Unsettled]) -> None:
    """Tell which clips come near enough to one of a mode's new keys."""
    for chunk in query_chunks(bank, missing, set().union(*(mode.at.keys() for mode in modes))):
        for mode in modes:
            rows = [row for row, clip_id in enumerate(chunk.clip_ids) if clip_id in mode.at]
            if not rows:
                continue
            place = np.array([mode.at[chunk.clip_ids[row]] for row in rows])
            keys_QD = chunk.keys_QD[rows]
            near, far = mode.worst_near[place], mode.worst_far[place]
            touched = np.zeros(len(rows), dtype=bool)
            for start in range(0, len(mode.new_keys_KD), NEW_KEYS):
                new = mode.new_keys_KD[start : start + NEW_KEYS]
                scores = keys_QD @ new.T
                error = product_error(keys_QD, new)
                touched |= (scores.max(axis=1) >= near - error) | (scores.min(axis=1) <= far + error)
            mode.touched.update(chunk.clip_ids[rows[i]] for i in np.flatnonzero(touched))
