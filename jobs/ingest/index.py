"""`index`: the neighbours of every clip, for each modality that may be missing, under each retrieval mode.

Where nothing has changed nothing is written: no version, no lease, no run. Each retrieval mode is one commit;
a run that is killed leaves the modes it had committed, and the next one goes on from there.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from r2scp.pipelines.neighbours.plan import ModePlan, plan_neighbours
from r2scp.pipelines.neighbours.search import Writing, note_valid, write_neighbours
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.runs import ActiveRun, RunSpec, recorded_run
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import MemoryBank


@dataclass(kw_only=True)
class IndexReport:
    """The account of one run; `modes` holds `Counts` by retrieval mode."""

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
    run_id: str = ""  # "": there was nothing to do

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)


Progress = Callable[[str, int, int], None]  # retrieval mode, searches done, searches to do


def run_index(store: FeatureStore, settings: IndexSettings, progress: Progress) -> IndexReport:
    """Bring `neighbours` up to date with the latest `clips`.

    Raises `StoreError` where the bank is empty, `LeaseHeld` where another writer is at work.
    """
    started = time.monotonic()
    index = Index.open(store, settings)
    if index.has_work:
        spec = RunSpec(
            kind="index",
            purpose="index",
            config=asdict(settings),
            account=lambda: index.report().modes,
        )
        with recorded_run(store, spec) as writer:
            index.write(writer, progress)
    report = index.report()
    report.seconds = round(time.monotonic() - started, 3)
    return report


@dataclass(kw_only=True)
class Index:
    """What is to do to bring `neighbours` up to date with one version of `clips`; made by `open`."""

    bank: MemoryBank
    settings: IndexSettings
    plans: list[ModePlan]
    run_id: str = ""

    @classmethod
    def open(cls, store: FeatureStore, settings: IndexSettings) -> "Index":
        """Plan; reads only. Raises `StoreError` where the bank is empty."""
        bank = MemoryBank.open(store, settings.bank)
        if not len(bank):
            raise StoreError(
                f"no clip of {store.uri} is in the bank (corpora: {_named(settings.bank.corpora)}, "
                f"splits: {_named(settings.bank.splits)}); `r2scp-pipe status` lists what there is"
            )
        return cls(bank=bank, settings=settings, plans=plan_neighbours(bank, settings))

    @property
    def has_work(self) -> bool:
        """Whether a search is missing or a row stale."""
        return any(plan.due for plan in self.plans)

    def write(self, writer: ActiveRun, progress: Progress) -> None:
        """Search and commit what is due, mode by mode; note of each that it is right at this version."""
        self.run_id = writer.run_id
        self.bank.store.make_tables()
        for plan in self.plans:
            if not plan.due:
                note_valid(self.bank, self.settings, plan, writer.run_id)
                continue
            total, name = plan.total, plan.retrieval.value

            def told(done: int, name: str = name, total: int = total) -> None:
                progress(name, done, total)

            told(0)
            about = Writing(run_id=writer.run_id, before_commit=writer.lease.require, progress=told)
            write_neighbours(self.bank, self.settings, plan, about)

    def report(self) -> IndexReport:
        """The account so far."""
        bank, scope = self.bank, self.settings.bank
        return IndexReport(
            bank_clips=len(bank),
            bank_serving={modality.value: bank.serving(modality) for modality in Modality},
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


def _named(values: tuple[str, ...]) -> str:
    return ", ".join(values) or "all"
