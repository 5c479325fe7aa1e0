"""`index`: the neighbours of every clip, for each modality that may be missing, under each retrieval mode.

Where nothing has changed nothing is written: no version, no lease, no run. Each retrieval mode is one commit;
a run that is killed leaves the modes it had committed, and the next one goes on from there.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from r2scp.pipelines.retrieve import (
    IndexSettings,
    ModePlan,
    Writing,
    plan_neighbours,
    write_neighbours,
)
from r2scp.store.bank import MemoryBank
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.runs import new_run_id, now
from r2scp.store.schema import Modality, Table


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
    bank = MemoryBank.open(store, settings.bank)
    if not len(bank):
        raise StoreError(
            f"no clip of {store.uri} is in the bank (corpora: {_named(settings.bank.corpora)}, "
            f"splits: {_named(settings.bank.splits)}); `r2scp-pipe status` lists what there is"
        )
    report = IndexReport(
        bank_clips=len(bank),
        bank_serving={modality.value: bank.serving(modality) for modality in Modality},
        bank_version=bank.version,
        bank_fingerprint=bank.fingerprint,
        bank_corpora=list(settings.bank.corpora),
        bank_splits=list(settings.bank.splits),
        leak_guard=settings.leak_guard,
    )
    plans = plan_neighbours(bank, settings)
    if any(plan.due for plan in plans):
        store.make_tables()
        _write(bank, settings, plans, report, progress)
    report.modes = {plan.retrieval.value: plan.counts.to_json() for plan in plans}
    report.searched = sum(plan.counts.searched for plan in plans)
    report.neighbours_version = store.versions().get(Table.NEIGHBOURS.value, 0)
    report.seconds = round(time.monotonic() - started, 3)
    return report


def _write(
    bank: MemoryBank,
    settings: IndexSettings,
    plans: list[ModePlan],
    report: IndexReport,
    progress: Progress,
) -> None:
    """Search and commit what is due, mode by mode, under the lease and with a row in `runs`."""
    store = bank.store
    report.run_id = new_run_id("index")
    row: dict[str, object] = {
        "run_id": report.run_id,
        "kind": "index",
        "config": json.dumps(asdict(settings)),
        "status": "running",
        "started_at": now(),
        "versions_before": json.dumps(store.versions()),
    }
    with store.lease("index").hold() as lease:
        store.record_run(row)
        status = "interrupted"
        try:
            for plan in (plan for plan in plans if plan.due):
                total, name = sum(map(len, plan.pending.values())), plan.retrieval.value

                def told(done: int, name: str = name, total: int = total) -> None:
                    progress(name, done, total)

                told(0)
                writing = Writing(run_id=report.run_id, before_commit=lease.require, progress=told)
                write_neighbours(bank, settings, plan, writing)
            status = "done"
        except Exception:
            status = "failed"
            raise
        finally:
            counts = {plan.retrieval.value: plan.counts.to_json() for plan in plans}
            ended = {"status": status, "ended_at": now(), "counts": json.dumps(counts)}
            store.record_run(row | ended | {"versions_after": json.dumps(store.versions())})


def _named(values: tuple[str, ...]) -> str:
    return ", ".join(values) or "all"
