"""The lease: of two writers one wins; one that died is replaced at once, one that is silent in time.

The tests set the time; nothing waits for a lease to expire.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from r2scp.store import lease as lease_module
from r2scp.store.commits import TableAddress
from r2scp.store.errors import LeaseHeld, StoreError
from r2scp.store.lease import LEASE_SCHEMA, LEASE_SECONDS, MAX_CLOCK_SKEW_S, Lease, new_run_id, put_row
from r2scp.store.schema import Table, table_schema

NewLease = Callable[[str], Lease]

#: Takes the lease, prints "held", and holds it until it reads a line.
HOLDER = """
import sys
from r2scp.store.errors import LeaseHeld
from r2scp.store.lease import LEASE_SCHEMA, Lease
from r2scp.store.commits import TableAddress

lease = Lease(TableAddress(uri=sys.argv[1], schema=LEASE_SCHEMA), "holder")
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.hold():
        print("held", flush=True)
        sys.stdin.readline()
        lease.require()
except LeaseHeld as error:
    print("refused", error, flush=True)
"""


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def address(tmp_path: Path) -> TableAddress:
    return TableAddress(uri=str(tmp_path / "leases.lance"), schema=LEASE_SCHEMA)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new_lease(address: TableAddress, clock: Clock) -> NewLease:
    return lambda purpose: Lease(address, purpose, clock=clock, pause=clock.sleep)


@pytest.fixture
def another_process(address: TableAddress) -> Iterator:
    """Start processes that take the lease; each is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, address.uri]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def send_line(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def row_of(address: TableAddress) -> dict:
    [row] = address.open().to_table().to_pylist()
    return row


def test_a_second_writer_is_refused_with_holder_and_time(new_lease: NewLease, clock: Clock) -> None:
    new_lease("extract --corpus demo").acquire()
    clock.now += 20
    with pytest.raises(LeaseHeld) as caught:
        new_lease("other").acquire()
    message = str(caught.value)
    assert "extract --corpus demo" in message
    assert f"process {os.getpid()}" in message
    assert f"try again in {LEASE_SECONDS - 20:.0f} s" in message
    assert "\n" not in message


def test_an_expired_lease_is_watched_before_it_is_taken(
    address: TableAddress, new_lease: NewLease, clock: Clock
) -> None:
    first, second = map(new_lease, ("first", "second"))
    first.acquire()
    clock.now += LEASE_SECONDS
    with pytest.raises(LeaseHeld):
        second.acquire()
    clock.now += 0.001
    began = clock.now
    second.acquire()
    assert json.loads(row_of(address)["holder"])["purpose"] == "second"
    assert clock.now - began == LEASE_SECONDS


def test_a_lease_that_expired_long_ago_is_free_at_once(new_lease: NewLease, clock: Clock) -> None:
    new_lease("first").acquire()
    clock.now += LEASE_SECONDS + MAX_CLOCK_SKEW_S + 1
    began = clock.now
    new_lease("second").acquire()
    assert clock.now == began


@pytest.mark.parametrize("ahead_s", [-600.0, 5.0, 3_000.0])
def test_a_wrong_clock_does_not_take_a_lease_from_its_holder(
    address: TableAddress, new_lease: NewLease, clock: Clock, ahead_s: float
) -> None:
    with new_lease("first").hold() as first:

        def pause(seconds: float) -> None:
            clock.now += seconds
            if clock.now % (LEASE_SECONDS / 4) < seconds:
                first._heartbeat()

        with pytest.raises(LeaseHeld, match="first on "):
            Lease(address, "wrong", clock=lambda: clock.now + ahead_s, pause=pause).acquire()
        first.require()


def test_a_writer_that_lost_the_lease_may_not_commit(
    address: TableAddress, new_lease: NewLease, clock: Clock
) -> None:
    """A writer suspended for longer than a lease learns of its loss before its next commit."""
    with new_lease("first").hold() as first:
        first.require()
        clock.now += LEASE_SECONDS + 1
        new_lease("second").acquire()
        with pytest.raises(StoreError, match=r"lost.*second"):
            first.require()
    assert json.loads(row_of(address)["holder"])["purpose"] == "second", "the loser released another's lease"
    assert row_of(address)["expires_at"] > clock.now


def test_a_late_writer_whose_lease_is_free_continues(
    address: TableAddress, new_lease: NewLease, clock: Clock
) -> None:
    with new_lease("first").hold() as first:
        clock.now += LEASE_SECONDS * 3
        first.require()
        assert row_of(address)["expires_at"] == clock.now + LEASE_SECONDS
        with pytest.raises(LeaseHeld):
            new_lease("second").acquire()


def test_the_lease_is_released_also_after_an_error(new_lease: NewLease) -> None:
    with new_lease("first").hold():
        pass
    with (
        pytest.raises(RuntimeError, match="boom"),
        new_lease("second").hold(),
    ):
        raise RuntimeError("boom")
    with new_lease("third").hold() as third:
        third.require()


def test_heartbeats_renew_the_lease(
    address: TableAddress, new_lease: NewLease, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEATS_PER_LEASE", LEASE_SECONDS * 100)  # one every 10 ms
    renewed = threading.Event()
    lease = new_lease("first")
    heartbeat = lease._heartbeat
    monkeypatch.setattr(
        lease, "_heartbeat", lambda: (heartbeat(), clock.now > 1_800_000_000.0 and renewed.set())
    )
    with lease.hold():
        clock.now += LEASE_SECONDS / 2
        assert renewed.wait(60)
        assert row_of(address)["expires_at"] == clock.now + LEASE_SECONDS
        clock.now += LEASE_SECONDS / 2 + 1
        with pytest.raises(LeaseHeld):
            new_lease("second").acquire()


def test_failing_heartbeats_are_tolerated_until_the_lease_expires(
    new_lease: NewLease, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_lease("first").hold() as lease:

        def fails(**_: object) -> None:
            raise StoreError("cannot write to x: unplugged")

        with monkeypatch.context() as patch:
            patch.setattr(lease, "_write", fails)
            clock.now += LEASE_SECONDS - 1
            lease._heartbeat()
            lease.require()
            clock.now += 1
            with pytest.raises(StoreError, match="unplugged"):
                lease.require()


def test_of_several_threads_one_wins(address: TableAddress) -> None:
    leases = [Lease(address, f"thread {i}") for i in range(6)]
    gate = threading.Barrier(len(leases))

    def contend(lease: Lease) -> bool:
        gate.wait()
        try:
            lease.acquire()
        except LeaseHeld:
            return False
        return True

    with ThreadPoolExecutor(len(leases)) as pool:
        won = list(pool.map(contend, leases))
    assert won.count(True) == 1
    assert row_of(address)["holder"] == leases[won.index(True)]._holder


def test_of_two_processes_one_wins(address: TableAddress, another_process) -> None:
    both = [another_process(), another_process()]
    for process in both:
        send_line(process)
    lines = [process.stdout.readline() for process in both]
    assert sorted(line.split()[0] for line in lines) == ["held", "refused"]
    winner = both[0 if lines[0].startswith("held") else 1]
    refusal = next(line for line in lines if line.startswith("refused"))
    assert f"process {winner.pid}" in refusal


def test_a_killed_process_is_replaced_at_once(address: TableAddress, another_process) -> None:
    holder = another_process()
    send_line(holder)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeld):
        Lease(address, "too early").acquire()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Lease(address, "at once").hold() as lease:
        lease.require()


@pytest.mark.parametrize("other", ["host", "boot", "pids"])
def test_a_process_of_another_machine_counts_as_alive(new_lease: NewLease, other: str) -> None:
    """Another machine, boot or container: its process number means nothing here."""
    first = new_lease("first")
    first._identity |= {other: "another", "pid": 2**22 + 1}
    first._holder = json.dumps(first._identity, sort_keys=True)
    first.acquire()
    with pytest.raises(LeaseHeld):
        new_lease("second").acquire()


def test_a_reused_process_number_does_not_keep_a_lease(new_lease: NewLease) -> None:
    first = new_lease("first")
    first._identity |= {"started": "1"}  # our own number, of a process that started at another time
    first._holder = json.dumps(first._identity, sort_keys=True)
    first.acquire()
    new_lease("second").acquire()


def test_the_lease_table_stays_small(address: TableAddress, new_lease: NewLease) -> None:
    for _ in range(3):
        with new_lease("again").hold():
            pass
    assert address.open().count_rows() == 1


def test_a_run_is_one_row_however_often_it_is_written(tmp_path: Path) -> None:
    address = TableAddress(uri=str(tmp_path / "runs.lance"), schema=table_schema(Table.RUNS, 4))
    address.create()
    started = datetime(2026, 1, 31, 12, tzinfo=UTC)
    row = {"run_id": "it's", "kind": "extract", "status": "running", "started_at": started}
    put_row(address, row)
    put_row(address, row | {"status": "done", "counts": "{}"})
    put_row(address, {"run_id": "other", "status": "running"})
    written = address.open().to_table(columns=["run_id", "status", "started_at"]).to_pylist()
    assert sorted(tuple(row.values()) for row in written) == [
        ("it's", "done", started),
        ("other", "running", None),
    ]


def test_run_ids_differ_and_sort_by_time() -> None:
    ids = [new_run_id("extract") for _ in range(50)]
    assert len(set(ids)) == 50
    times = [run_id.split("-")[1] for run_id in ids]
    assert times == sorted(times)
