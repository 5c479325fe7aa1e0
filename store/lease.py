"""The lease that allows one writer at a time.

A lease is one row that only its holder, or anybody once it has expired, can rewrite. The rewrite is a
conditional upsert, so of two that try at once one wins, on a local disk and on an object store alike. The
clocks of two machines may be minutes apart: a lease that has expired by our clock is first watched, for as
long as a lease lasts, and taken only if its holder does not renew it meanwhile.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa

from r2scp.store.commits import TableAddress, lance_errors, sql_literal
from r2scp.store.errors import LeaseHeld, StoreError
from r2scp.store.schema import PRIMARY_KEY

LEASE_SECONDS = 60.0  # without a heartbeat for this long, the lease expires
HEARTBEATS_PER_LEASE = 4
POLL_S = LEASE_SECONDS / HEARTBEATS_PER_LEASE / 3  # while watching a lease
MAX_CLOCK_SKEW_S = 3_600.0  # a lease that expired longer ago has expired by any clock
VERSION_RETENTION = timedelta(minutes=10)  # of the lease table, which gets a version per heartbeat

LEASE_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False, metadata=PRIMARY_KEY),
        pa.field("holder", pa.string()),  # JSON: who, where, since when
        pa.field("expires_at", pa.float64()),  # seconds since 1970, UTC
    ]
)


def now() -> datetime:
    """The present in UTC, in whole microseconds like the tables' timestamps."""
    return datetime.now(UTC)


def new_run_id(kind: str) -> str:
    """Unique and sortable by time: `extract-20260131T120000-1a2b3c4d`."""
    return f"{kind}-{now():%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"


def put_row(address: TableAddress, row: Mapping[str, object]) -> None:
    """Insert one row, or update the row of the same key."""
    put_rows(address, [row])


def put_rows(address: TableAddress, rows: Sequence[Mapping[str, object]]) -> None:
    """Insert rows, or update those of the same keys, in one new version."""
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=address.schema)
    upsert = address.open().merge_insert(address.key)
    with lance_errors("write to", address.uri):
        upsert.when_matched_update_all().when_not_matched_insert_all().execute(table)


LeaseState = tuple[str, float]  # the holder as JSON; when it expires by the holder's clock


class Lease:
    """The right to write to one store, held with a heartbeat; use `hold`, once.

    `clock` gives seconds since 1970, UTC; clocks may differ by up to `MAX_CLOCK_SKEW_S`. `pause` waits for
    some seconds.
    """

    def __init__(
        self,
        address: TableAddress,
        purpose: str,
        name: str = "writer",
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address = address
        self._name = name
        self._clock = clock
        self._pause = pause
        self._valid_until = 0.0  # by our last successful heartbeat
        self._identity = {
            "purpose": purpose,
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pids": _pid_namespace(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "since": now().isoformat(timespec="seconds"),
        }
        self._holder = json.dumps(self._identity, sort_keys=True)
        self._stop = threading.Event()
        self._lost: str | None = None

    def acquire(self) -> None:
        """Take the lease, or raise `LeaseHeld` with its holder and when it expires.

        Takes up to `LEASE_SECONDS` if it has expired and its holder may still be alive.
        """
        self._address.create()
        for _ in range(2):
            other = self._try()
            if other is None:
                return
            if not _process_ended(other[0]):  # else there is no need to wait
                if self._clock() <= other[1]:
                    break
                if not self._is_abandoned(other):
                    continue  # released or renewed
            other = self._try(replacing=other)
            if other is None:
                return
        holder, expires_at = self._read() or other
        identity = json.loads(holder)
        remaining = max(0.0, expires_at - self._clock())
        raise LeaseHeld(
            f"another writer holds this store: {identity['purpose']} on {identity['host']}, process "
            f"{identity['pid']}, since {identity['since']}; wait for it to finish, or try again in "
            f"{remaining:.0f} s if it was killed"
        )

    def require(self) -> None:
        """Raise `StoreError` if the lease was lost to another writer; call before each commit.

        Asks the store itself, whatever our clock says; a process that was suspended renews its lease first.
        """
        if self._lost is None and self._clock() >= self._valid_until:
            self._heartbeat()
        if self._lost is None and (state := self._read()) and state[0] != self._holder:
            self._lost = f"now held by {state[0]}"
        if self._lost is not None:
            raise StoreError(
                f"the right to write to this store was lost ({self._lost}); nothing was written after the "
                "last commit; run the same command again to resume"
            )

    @contextmanager
    def hold(self) -> Iterator["Lease"]:
        """Acquire, keep alive from a thread, release at the end."""
        self.acquire()
        with self.hold_acquired():
            yield self

    @contextmanager
    def hold_acquired(self) -> Iterator["Lease"]:
        """Keep an acquired lease alive from a thread, release it at the end."""
        heartbeats = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        heartbeats.start()
        try:
            yield self
        finally:
            self._stop.set()
            heartbeats.join()
            if self._lost is None:
                self._write(expires_at=0.0, condition=f"target.holder = {sql_literal(self._holder)}")

    def _keep_alive(self) -> None:
        while self._lost is None and not self._stop.wait(LEASE_SECONDS / HEARTBEATS_PER_LEASE):
            self._heartbeat()

    def _heartbeat(self) -> None:
        """Renew the lease; note if that came too late."""
        try:
            other = self._try()
        except StoreError as error:
            if self._clock() >= self._valid_until:  # else the next heartbeat may still succeed
                self._lost = str(error)
            return
        if other is not None:
            self._lost = f"now held by {other[0]}"

    def _is_abandoned(self, state: LeaseState) -> bool:
        """Watch a lease for as long as one lasts; whether it did not change."""
        for _ in range(round(LEASE_SECONDS / POLL_S)):
            self._pause(POLL_S)
            if self._read() != state:
                return False
        return True

    def _try(self, replacing: LeaseState | None = None) -> LeaseState | None:
        """Write our row over one that expired long ago, our own, or exactly `replacing`.

        Returns the state of another holder, or None if the lease is ours.
        """
        present = self._clock()
        condition = f"target.expires_at < {present - MAX_CLOCK_SKEW_S!r}"
        condition += f" OR target.holder = {sql_literal(self._holder)}"
        if replacing:
            holder, expires_at = replacing
            condition += f" OR (target.holder = {sql_literal(holder)} AND target.expires_at = {expires_at!r})"
        self._write(expires_at=present + LEASE_SECONDS, condition=condition)
        state = self._read()
        if state and state[0] != self._holder:
            return state
        self._valid_until = present + LEASE_SECONDS
        return None

    def _read(self) -> LeaseState | None:
        rows = self._address.open().to_table(filter=f"name = {sql_literal(self._name)}").to_pylist()
        return (rows[0]["holder"], rows[0]["expires_at"]) if rows else None

    def _write(self, *, expires_at: float, condition: str) -> None:
        row = {"name": self._name, "holder": self._holder, "expires_at": expires_at}
        dataset = self._address.open()
        upsert = dataset.merge_insert(self._address.key)
        upsert.when_matched_update_all(condition).when_not_matched_insert_all()
        with lance_errors("write to", self._address.uri):
            upsert.execute(pa.Table.from_pylist([row], schema=LEASE_SCHEMA))
            dataset.cleanup_old_versions(older_than=VERSION_RETENTION)


def _process_ended(holder: str) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    identity = json.loads(holder)
    machine = {"host": socket.gethostname(), "boot": _boot_id(), "pids": _pid_namespace()}
    if not machine["boot"] or any(identity.get(name) != value for name, value in machine.items()):
        return False
    return _process_start(identity["pid"]) != identity["started"]


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _pid_namespace() -> str:
    """Which numbering of processes this one belongs to: containers of a machine may share all else."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" if there is none (or no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
