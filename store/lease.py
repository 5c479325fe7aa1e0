"""Run history, and the lease that keeps two writers apart.

A lease is one row that only its holder, or anybody once it has expired, can rewrite. The rewrite is a
conditional upsert, so of two that try at once one wins, on a local disk and on an object store alike. Clocks
of two machines may be minutes apart: a lease that has expired by ours is watched first, for as long as a
lease lasts, and taken only if its holder says nothing meanwhile.
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

LEASE_SECONDS = 60.0  # a holder that says nothing for this long has lost it
HEARTBEATS_PER_LEASE = 4
LOOK_EVERY_S = LEASE_SECONDS / HEARTBEATS_PER_LEASE / 3  # at a lease that is watched
LONG_AGO_S = 3_600.0  # expired before: no clock is so wrong
VERSIONS_KEPT = timedelta(minutes=10)  # of the lease table, which gets one with every heartbeat

LEASE_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False, metadata=PRIMARY_KEY),
        pa.field("holder", pa.string()),  # JSON: who, where, since when
        pa.field("expires_at", pa.float64()),  # seconds since 1970, UTC
    ]
)


def now() -> datetime:
    """The present, UTC, whole microseconds: what the tables' timestamps hold."""
    return datetime.now(UTC)


def new_run_id(kind: str) -> str:
    """Sortable by time, unique: `extract-20260131T120000-1a2b3c4d`."""
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


Held = tuple[str, float]  # holder, as JSON; when it expires by its own clock


class Lease:
    """The right to write to one store, held with a heartbeat; use `hold`, once.

    `clock` gives seconds since 1970, UTC; those who share a store may be up to `LONG_AGO_S` apart. `pause`
    waits for some seconds.
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
        self._good_until = 0.0  # by our own last good heartbeat
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
        """Take the lease, or raise `LeaseHeld` with who has it and until when.

        Takes up to `LEASE_SECONDS` where a holder that nothing is known of has let it expire.
        """
        self._address.create()
        for _ in range(2):
            held_by = self._try()
            if held_by is None:
                return
            if not _is_dead(held_by[0]):  # else its process is gone: no need to wait
                if self._clock() <= held_by[1]:
                    break
                if not self._silent(held_by):
                    continue  # let go of, or alive
            held_by = self._try(replacing=held_by)
            if held_by is None:
                return
        holder, expires_at = self._read() or held_by
        who = json.loads(holder)
        left = max(0.0, expires_at - self._clock())
        raise LeaseHeld(
            f"another writer holds this store: {who['purpose']} on {who['host']}, process {who['pid']}, "
            f"since {who['since']}; wait for it, or try again in {left:.0f} s should it have died"
        )

    def require(self) -> None:
        """Raise `StoreError` when the lease was lost to another writer; call before each commit.

        Asks the store itself, whatever our own clock says; a process that was stopped for long renews its
        lease first.
        """
        if self._lost is None and self._clock() >= self._good_until:
            self._beat()
        if self._lost is None and (found := self._read()) and found[0] != self._holder:
            self._lost = f"now held by {found[0]}"
        if self._lost is not None:
            raise StoreError(
                f"the right to write to this store was lost ({self._lost}); nothing after the last commit "
                "was written; run the same command again"
            )

    @contextmanager
    def hold(self) -> Iterator["Lease"]:
        """Acquire, keep alive from a thread, release at the end."""
        self.acquire()
        with self.hold_acquired():
            yield self

    @contextmanager
    def hold_acquired(self) -> Iterator["Lease"]:
        """Keep alive from a thread what has been acquired, release it at the end."""
        beat = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        beat.start()
        try:
            yield self
        finally:
            self._stop.set()
            beat.join()
            if self._lost is None:
                self._write(expires_at=0.0, allowed=f"target.holder = {sql_literal(self._holder)}")

    def _keep_alive(self) -> None:
        while self._lost is None and not self._stop.wait(LEASE_SECONDS / HEARTBEATS_PER_LEASE):
            self._beat()

    def _beat(self) -> None:
        """Say that we are still here; note where that came too late."""
        try:
            held_by = self._try()
        except StoreError as error:
            if self._clock() >= self._good_until:  # else: a store that fails now and then
                self._lost = str(error)
            return
        if held_by is not None:
            self._lost = f"now held by {held_by[0]}"

    def _silent(self, held_by: Held) -> bool:
        """Watch a lease for as long as one lasts; whether nobody touched it."""
        for _ in range(round(LEASE_SECONDS / LOOK_EVERY_S)):
            self._pause(LOOK_EVERY_S)
            if self._read() != held_by:
                return False
        return True

    def _try(self, replacing: Held | None = None) -> Held | None:
        """Write our row over one of long ago, our own, or just `replacing`. None: it is ours now."""
        present = self._clock()
        allowed = f"target.expires_at < {present - LONG_AGO_S!r}"
        allowed += f" OR target.holder = {sql_literal(self._holder)}"
        if replacing:
            holder, expires_at = replacing
            allowed += f" OR (target.holder = {sql_literal(holder)} AND target.expires_at = {expires_at!r})"
        self._write(expires_at=present + LEASE_SECONDS, allowed=allowed)
        found = self._read()
        if found and found[0] != self._holder:
            return found
        self._good_until = present + LEASE_SECONDS
        return None

    def _read(self) -> Held | None:
        rows = self._address.open().to_table(filter=f"name = {sql_literal(self._name)}").to_pylist()
        return (rows[0]["holder"], rows[0]["expires_at"]) if rows else None

    def _write(self, *, expires_at: float, allowed: str) -> None:
        row = {"name": self._name, "holder": self._holder, "expires_at": expires_at}
        dataset = self._address.open()
        upsert = dataset.merge_insert(self._address.key)
        upsert.when_matched_update_all(allowed).when_not_matched_insert_all()
        with lance_errors("write to", self._address.uri):
            upsert.execute(pa.Table.from_pylist([row], schema=LEASE_SCHEMA))
            dataset.cleanup_old_versions(older_than=VERSIONS_KEPT)


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process of this machine that is no longer there."""
    who = json.loads(holder)
    here = {"host": socket.gethostname(), "boot": _boot_id(), "pids": _pid_namespace()}
    if not here["boot"] or any(who.get(name) != value for name, value in here.items()):
        return False
    return _process_start(who["pid"]) != who["started"]


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _pid_namespace() -> str:
    """Which numbering of processes this one is in: containers of one machine may share all else."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process began, in clock ticks since boot; "" where there is none (or no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
