"""`index`: the neighbours of every clip, for each modality that may be missing, in each retrieval mode.

If nothing has changed, nothing is written: no version, no lease, no run. Each retrieval mode is one commit; a
run that is killed leaves the modes it had committed, and the next one resumes from there.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

from r2scp.pipelines.neighbours.plan import ModePlan, plan_neighbours
from r2scp.pipelines.neighbours.search import WriteContext, record_validity, write_neighbours
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.runs import ActiveRun, RunSpec, recorded_run
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import MemoryBank


@dataclass(kw_only=True)
class IndexReport:
    """The result of one run; `modes` holds `ModeCounts` by retrieval mode."""

    bank_clips: int
    bank_serving: dict[str, int]  # modality -> clips of the bank that have it
    bank_version: int  # of `clips`
    bank_fingerprint: str
    bank_corpora: list[str]
    bank_splits: list[str]
    leak_guard: bool
    modes: dict[str, dict[str, int]] = field(default_factory=dict)
    searched: int = 0
    seconds: float = 0.0
    neighbours_version: int = 0
    run_id: str = ""  # "" where nothing had to be written

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)


OnProgress = Callable[[str, int, int], None]  # retrieval mode, searches done, searches to do


def run_index(store: FeatureStore, settings: IndexSettings, on_progress: OnProgress) -> IndexReport:
    """Bring `neighbours` up to date with the latest `clips`.

    Raises `StoreError` if the bank is empty, `LeaseHeld` if another process is writing.
    """
    started = time.monotonic()
    update = NeighbourUpdate.open(store, settings)
    if update.has_work:
        spec = RunSpec(
            kind="index",
            purpose="index",
            config=asdict(settings),
            counts=lambda: update.report().modes,
        )
        with recorded_run(store, spec) as run:
            update.write(run, on_progress)
    report = update.report()
    report.seconds = round(time.monotonic() - started, 3)
    return report


@dataclass(kw_only=True)
class NeighbourUpdate:
    """What it takes to bring `neighbours` up to date with one version of `clips`; made by `open`."""

    bank: MemoryBank
    settings: IndexSettings
    plans: list[ModePlan]
    run_id: str = ""

    @classmethod
    def open(cls, store: FeatureStore, settings: IndexSettings) -> "NeighbourUpdate":
        """Plan; reads only. Raises `StoreError` if the bank is empty."""
        bank = MemoryBank.open(store, settings.bank)
        if not len(bank):
            raise StoreError(
                f"no clip of {store.uri} is in the bank (corpora: {_join(settings.bank.corpora)}, "
                f"splits: {_join(settings.bank.splits)}); `r2scp-pipe status` lists its corpora and splits"
            )
        return cls(bank=bank, settings=settings, plans=plan_neighbours(bank, settings))

    @property
    def has_work(self) -> bool:
        """Whether a search is missing or a row outdated."""
        return any(plan.has_work for plan in self.plans)

    def write(self, run: ActiveRun, on_progress: OnProgress) -> None:
        """Search and commit, mode by mode; record for each that its rows are right at this version."""
        self.run_id = run.run_id
        self.bank.store.create_tables()
        for plan in self.plans:
            if not plan.has_work:
                record_validity(self.bank, self.settings, plan, run.run_id)
                continue
            report_done = partial(_report_done, on_progress, plan.retrieval.value, plan.searches)
            report_done(0)
            context = WriteContext(
                run_id=run.run_id, before_commit=run.lease.require, on_progress=report_done
            )
            write_neighbours(self.bank, self.settings, plan, context)

    def report(self) -> IndexReport:
        """The result so far."""
        bank, scope = self.bank, self.settings.bank
        return IndexReport(
            bank_clips=len(bank),
            bank_serving={modality.value: bank.count_with(modality) for modality in Modality},
            bank_version=bank.version,
            bank_fingerprint=bank.fingerprint,
            bank_corpora=list(scope.corpora),
            bank_splits=list(scope.splits),
            leak_guard=self.settings.leak_guard,
            modes={plan.retrieval.value: plan.counts.to_json() for plan in self.plans},
            searched=sum(plan.counts.searched for plan in self.plans),
            neighbours_version=bank.store.versions().get(Table.NEIGHBOURS.value, 0),
            run_id=self.run_id,
        )


def _report_done(on_progress: OnProgress, mode: str, total: int, done: int) -> None:
    on_progress(mode, done, total)


def _join(values: tuple[str, ...]) -> str:
    return ", ".join(values) or "all"
