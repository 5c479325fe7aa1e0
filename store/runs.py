"""A run that writes: it holds the lease, and its row in `runs` is finished whatever happens."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from r2scp.store.errors import GateFailed, LeaseHeld
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import Lease, new_run_id, now
from r2scp.store.schema import Table

RETRY_S = 2.0  # between attempts to take a lease that is held


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What the row of a run says, and how long to wait for another writer. `counts` is called at the end."""

    kind: str
    purpose: str  # shown to other writers
    config: Mapping[str, object]
    counts: Callable[[], Mapping[str, object]]
    wait_s: float = 0.0
    log: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, kw_only=True)
class ActiveRun:
    """The right to write, as long as the run lasts. Call `lease.require()` before each commit."""

    run_id: str
    lease: Lease


@contextmanager
def recorded_run(store: FeatureStore, spec: RunSpec) -> Iterator[ActiveRun]:
    """Hold the lease and keep a row in `runs`. Raises `LeaseHeld` if another writer is active."""
    run_id = new_run_id(spec.kind)
    row: dict[str, object] = {
        "run_id": run_id,
        "kind": spec.kind,
        "config": json.dumps(spec.config, default=str),
        "status": "running",
        "started_at": now(),
    }
    with _acquire_lease(store, spec).hold_acquired() as lease:
        _mark_interrupted(store)
        row["versions_before"] = json.dumps(store.versions())
        store.record_run(row)
        status = "interrupted"
        try:
            yield ActiveRun(run_id=run_id, lease=lease)
            status = "done"
        except GateFailed:
            status = "refused"
            raise
        except Exception:
            status = "failed"
            raise
        finally:
            counts, versions = json.dumps(spec.counts(), default=str), json.dumps(store.versions())
            end = {"status": status, "ended_at": now(), "counts": counts, "versions_after": versions}
            store.record_run(row | end)


def _mark_interrupted(store: FeatureStore) -> None:
    """Runs that were killed still say `running`; whoever holds the lease knows better."""
    runs, running = store.dataset(Table.RUNS), "status = 'running'"
    if runs.count_rows(running):
        runs.update({"status": "'interrupted'"}, where=running)


def _acquire_lease(store: FeatureStore, spec: RunSpec) -> Lease:
    """Take the lease, waiting up to `spec.wait_s` for another writer."""
    deadline = time.monotonic() + spec.wait_s
    logged = False
    while True:
        lease = store.lease(spec.purpose)
        try:
            lease.acquire()
            return lease
        except LeaseHeld as error:
            if time.monotonic() >= deadline:
                raise
            if not logged:
                spec.log(f"waiting up to {spec.wait_s:.0f} s: {error}")
            logged = True
        time.sleep(RETRY_S)
