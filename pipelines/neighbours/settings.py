"""(clip, missing modality) -> neighbours: the settings of a search, and reading its rows.

Every clip that has the other modality is a query, whether it has this one or not: training and evaluation
drop modalities. `plan` decides which searches to make, `search` makes them.
"""

import json
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from r2scp.store.commits import sql_literal
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval
from r2scp.store.search.bank import HITS, BankScope, Search


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """What to index. `query_corpora`: whose clips get neighbours; empty for all.

    Without `leak_guard` hits may be of the clip's own source; such rows are marked.
    """

    retrieval: tuple[Retrieval, ...] = (Retrieval.CROSS, Retrieval.PAIRED, Retrieval.HYBRID)
    bank: BankScope = field(default_factory=BankScope)
    query_corpora: tuple[str, ...] = ()
    n: int = HITS
    leak_guard: bool = True
    cross_weight: float = 0.5  # of the cross score in hybrid

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"the number of neighbours must be at least 1; got {self.n}")
        if not 0.0 <= self.cross_weight <= 1.0:
            raise UsageError(f"the weight of the cross score must be in [0, 1]; got {self.cross_weight}")
        if not self.retrieval or len(set(self.retrieval)) != len(self.retrieval):
            names = ", ".join(Retrieval)
            raise UsageError(f"retrieval must name some of {names}, each once; got {list(self.retrieval)}")

    def search(self, missing: Modality, retrieval: Retrieval) -> Search:
        """The search for one missing modality in one retrieval mode."""
        return Search(
            missing=missing,
            retrieval=retrieval,
            n=self.n,
            leak_guard=self.leak_guard,
            cross_weight=self.cross_weight,
        )

    def settings_key(self, retrieval: Retrieval) -> str:
        """The settings that decide the rows of one mode, as JSON."""
        values: dict[str, object] = {
            "retrieval": retrieval.value,
            "bank_corpora": sorted(set(self.bank.corpora)),
            "bank_splits": sorted(set(self.bank.splits)),
            "n": self.n,
            "leak_guard": self.leak_guard,
        }
        if self.bank.disjoint:
            values["disjoint"] = True
        if retrieval is Retrieval.HYBRID:
            values["cross_weight"] = self.cross_weight
        return json.dumps(values, sort_keys=True)


@dataclass(kw_only=True)
class ModeCounts:
    """Counts of one retrieval mode, both modalities: `queries == searched + unchanged`."""

    queries: int = 0
    searched: int = 0
    extended: int = 0  # of `searched`: only among clips added to the bank
    unchanged: int = 0
    removed: int = 0  # rows of other versions of this program, or of clips that are no longer queries
    short: int = 0  # of `searched`: fewer than n hits
    empty: int = 0  # of `short`: no hit, so nothing is recovered
    nearest_own_source: int = 0  # same-source hits: excluded, or allowed without the leak guard
    farthest_own_source: int = 0

    def to_json(self) -> dict[str, int]:
        """Plain values, ready for JSON."""
        return asdict(self)


def read_neighbours(
    store: FeatureStore, settings: IndexSettings, retrieval: Retrieval, version: int | None = None
) -> pa.Table:
    """Rows of one mode with exactly these settings, at a version of `neighbours`.

    Raises `StoreError` where there are none.
    """
    key = settings.settings_key(retrieval)
    rows = store.neighbours(where=f"settings = {sql_literal(key)}", version=version)
    if not rows.num_rows:
        raise StoreError(f"the store at {store.uri} has no neighbours for {key}; run `r2scp-pipe index`")
    return rows
