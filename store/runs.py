"""A run that writes: it holds the lease, and its row in `runs` tells its end whatever happens."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from r2scp.store.errors import GateFailed, LeaseHeld
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import Lease, new_run_id, now

ASK_AGAIN_S = 2.0  # whether another writer is done


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Who wants to write, and with what in mind. `account` gives the counts when all is over."""

    kind: str
    purpose: str  # what another writer is told
    config: Mapping[str, object]
    account: Callable[[], Mapping[str, object]]
    wait_s: float = 0.0  # for another writer
    told: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, kw_only=True)
class ActiveRun:
    """The right to write, for as long as the run lasts. Call `lease.require()` before each commit."""

    run_id: str
    lease: Lease


@contextmanager
def recorded_run(store: FeatureStore, spec: RunSpec) -> Iterator[ActiveRun]:
    """Hold the lease and keep a row in `runs`. Raises `LeaseHeld` where another writer is at work."""
    run_id = new_run_id(spec.kind)
    row: dict[str, object] = {
        "run_id": run_id,
        "kind": spec.kind,
        "config": json.dumps(spec.config, default=str),
        "status": "running",
        "started_at": now(),
    }
    with _lease(store, spec).hold_acquired() as lease:
        store.interrupt_runs()
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
            counts, versions = json.dumps(spec.account(), default=str), json.dumps(store.versions())
            ended = {"status": status, "ended_at": now(), "counts": counts, "versions_after": versions}
            store.record_run(row | ended)


def _lease(store: FeatureStore, spec: RunSpec) -> Lease:
    """The lease, acquired; waits for another writer as long as is allowed."""
    until = time.monotonic() + spec.wait_s
    waited = False
    while True:
        lease = store.lease(spec.purpose)
        try:
            lease.acquire()
        except LeaseHeld as held:
            if time.monotonic() >= until:
                raise
            if not waited:
                spec.told(f"waiting up to {spec.wait_s:.0f} s: {held}")
            waited = True
            time.sleep(ASK_AGAIN_S)
            continue
        return lease
