"""(clip, missing modality) -> neighbours: where to look for what a clip lacks.

Every clip that has the other modality is a query, whether it lacks this one or not: training and evaluation
take modalities away. Rows go to `neighbours`; all rows of one retrieval mode, and those they replace, in one
commit, so that a reader never sees two banks mixed.

A row stays as long as the search, the bank's keys and its own key are what they were: new clips outside the
bank cost a search of their own only. Where the bank has changed, all rows are searched again, since any of
its new clips may be among anybody's hits, and rows of the bank before go.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from r2scp.pipelines.clip_queries import Chunk, chunks_of, fingerprints, query_ids
from r2scp.store.bank import HITS, BankScope, Found, MemoryBank, Search
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.runs import now
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.transaction import sql_literal

SEARCH_VERSION = 1  # rows of another one are searched again


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """What to index. `query_corpora`: whose clips get neighbours; empty for all.

    Without `leak_guard` hits may be of the clip's own source; rows made so say it.
    """

    retrieval: tuple[Retrieval, ...] = (Retrieval.CROSS, Retrieval.PAIRED, Retrieval.HYBRID)
    bank: BankScope = field(default_factory=BankScope)
    query_corpora: tuple[str, ...] = ()
    n: int = HITS
    leak_guard: bool = True
    cross_weight: float = 0.5  # of the cross score, in hybrid

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"the number of neighbours must be at least 1; got {self.n}")
        if not 0.0 <= self.cross_weight <= 1.0:
            raise UsageError(f"the weight of the cross score must be in [0, 1]; got {self.cross_weight}")
        if not self.retrieval or len(set(self.retrieval)) != len(self.retrieval):
            names = ", ".join(Retrieval)
            raise UsageError(f"retrieval must name some of {names}, each once; got {list(self.retrieval)}")

    def search(self, missing: Modality, retrieval: Retrieval) -> Search:
        """One of the searches that these settings ask for."""
        return Search(
            missing=missing,
            retrieval=retrieval,
            n=self.n,
            leak_guard=self.leak_guard,
            cross_weight=self.cross_weight,
        )

    def named(self, retrieval: Retrieval) -> str:
        """All that tells rows of one mode from rows of other settings, as JSON."""
        said: dict[str, object] = {
            "retrieval": retrieval.value,
            "bank_corpora": sorted(set(self.bank.corpora)),
            "bank_splits": sorted(set(self.bank.splits)),
            "n": self.n,
            "leak_guard": self.leak_guard,
        }
        if self.bank.disjoint:
            said["disjoint"] = True
        if retrieval is Retrieval.HYBRID:
            said["cross_weight"] = self.cross_weight
        return json.dumps(said, sort_keys=True)


@dataclass(kw_only=True)
class Counts:
    """The account of one retrieval mode, both modalities: `queries == searched + unchanged`."""

    queries: int = 0
    searched: int = 0
    unchanged: int = 0
    removed: int = 0  # rows of an earlier bank, and of clips that are no queries any more
    short: int = 0  # searched, and the bank held fewer than n
    empty: int = 0  # of `short`: the bank held none; recovery falls back to what is there
    nearest_own_source: int = 0  # hits of the clip's own source: kept away, or let in without the guard
    farthest_own_source: int = 0

    def to_json(self) -> dict[str, int]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class ModePlan:
    """What is to do for one retrieval mode."""

    retrieval: Retrieval
    index: str  # of settings and bank
    pending: dict[Modality, set[str]]  # clips to search for, by missing modality
    stale: list[str]  # ids of rows to remove
    counts: Counts

    @property
    def due(self) -> bool:
        return bool(self.stale) or any(self.pending.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """What a run brings along: its id, what must hold before a commit, and who hears of progress."""

    run_id: str
    before_commit: Callable[[], None]
    progress: Callable[[int], None]  # searches done, of the mode at work


def plan_neighbours(bank: MemoryBank, settings: IndexSettings) -> list[ModePlan]:
    """What is missing, changed or stale in `neighbours`, mode by mode. Reads only."""
    wanted = {missing: fingerprints(bank, missing, settings.query_corpora) for missing in Modality}
    possible = {missing: query_ids(bank, missing) for missing in Modality}
    plans = []
    for retrieval in settings.retrieval:
        index = _index(bank, settings, retrieval)
        plan = ModePlan(retrieval=retrieval, index=index, pending={}, stale=[], counts=Counts())
        known = _known(bank.store, settings.named(retrieval))
        for missing, queries in wanted.items():
            ids = {clip_id: _row_id(clip_id, missing, retrieval, index) for clip_id in queries}
            done = {clip_id for clip_id, row_id in ids.items() if row_id in known}
            done = {clip_id for clip_id in done if known[ids[clip_id]].fingerprint == queries[clip_id]}
            plan.pending[missing] = queries.keys() - done
            plan.counts.queries += len(queries)
            plan.counts.unchanged += len(queries) - len(plan.pending[missing])
        plan.stale = sorted(
            row_id
            for row_id, row in known.items()
            if row.index != index or row.clip_id not in possible[Modality(row.missing)]
        )
        plan.counts.removed = len(plan.stale)
        plans.append(plan)
    return plans


def write_neighbours(bank: MemoryBank, settings: IndexSettings, plan: ModePlan, writing: Writing) -> Counts:
    """Search for what is pending and commit it, in place of what is stale, in one new version."""
    store, counts, staged = bank.store, plan.counts, []
    for missing, pending in plan.pending.items():
        for chunk in chunks_of(bank, missing, pending):
            found = bank.search(chunk.queries(), settings.search(missing, plan.retrieval))
            searched = _Searched(missing=missing, found=found, run_id=writing.run_id)
            rows = _rows(bank, settings, plan, chunk, searched)
            staged.append(store.stage(Table.NEIGHBOURS, rows))
            _count(counts, found, settings.n)
            writing.progress(counts.searched)
    writing.before_commit()
    properties = {"run": writing.run_id, "retrieval": plan.retrieval.value}
    store.commit(Table.NEIGHBOURS, staged, properties, also_delete=plan.stale)
    return counts


def read_neighbours(
    store: FeatureStore, settings: IndexSettings, retrieval: Retrieval, version: int | None = None
) -> pa.Table:
    """Rows of one mode, of exactly these settings, at a version of `neighbours`.

    Raises `StoreError` where there are none.
    """
    named = settings.named(retrieval)
    rows = store.neighbours(where=f"settings = {sql_literal(named)}", version=version)
    if not rows.num_rows:
        raise StoreError(f"the store at {store.uri} has no neighbours for {named}; run `r2scp-pipe index`")
    return rows


@dataclass(frozen=True, slots=True)
class _Known:
    """What `neighbours` says of one row."""

    clip_id: str
    missing: str
    index: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Searched:
    """What one search gave, for what, in which run."""

    missing: Modality
    found: Found
    run_id: str


def _index(bank: MemoryBank, settings: IndexSettings, retrieval: Retrieval) -> str:
    parts = [SEARCH_VERSION, settings.named(retrieval), bank.fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _row_id(clip_id: str, missing: Modality, retrieval: Retrieval, index: str) -> str:
    return f"{clip_id}|{missing.value}|{retrieval.value}|{index}"


def _known(store: FeatureStore, named: str) -> dict[str, _Known]:
    """Row id -> what is written, of one mode under these settings; of any bank."""
    if not store.address(Table.NEIGHBOURS).exists():  # a store of an earlier version
        return {}
    columns = ["neighbour_id", "clip_id", "missing", "index", "query_fingerprint"]
    rows = store.neighbours(columns, where=f"settings = {sql_literal(named)}").to_pylist()
    return {
        row["neighbour_id"]: _Known(row["clip_id"], row["missing"], row["index"], row["query_fingerprint"])
        for row in rows
    }


def _rows(
    bank: MemoryBank, settings: IndexSettings, plan: ModePlan, chunk: Chunk, found: _Searched
) -> pa.Table:
    """Rows of `neighbours`, one a query."""
    count = len(chunk.clip_ids)
    mode = {
        "missing": found.missing.value,
        "retrieval": plan.retrieval.value,
        "leak_guard": settings.leak_guard,
        "settings": settings.named(plan.retrieval),
        "index": plan.index,
        "bank_fingerprint": bank.fingerprint,
        "bank_version": bank.version,
        "run_id": found.run_id,
        "at": now(),
    }
    columns: dict[str, object] = {name: [value] * count for name, value in mode.items()}
    columns["clip_id"] = chunk.clip_ids
    columns["neighbour_id"] = [
        _row_id(clip_id, found.missing, plan.retrieval, plan.index) for clip_id in chunk.clip_ids
    ]
    columns["query_fingerprint"] = [chunk.fingerprint(at) for at in range(count)]
    for name, hits in (("nearest", found.found.nearest), ("farthest", found.found.farthest)):
        columns[f"{name}_ids"] = [hits.ids(at) for at in range(count)]
        columns[f"{name}_scores"] = [hits.scores(at) for at in range(count)]
        columns[f"{name}_own_source"] = hits.own_source_Q
    schema = bank.store.address(Table.NEIGHBOURS).schema
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema)


def _count(counts: Counts, found: Found, n: int) -> None:
    hits = (found.nearest.rows_QN >= 0).sum(axis=1)
    counts.searched += len(hits)
    counts.short += int((hits < n).sum())
    counts.empty += int((hits == 0).sum())
    counts.nearest_own_source += int(found.nearest.own_source_Q.sum())
    counts.farthest_own_source += int(found.farthest.own_source_Q.sum())
