"""The writer's lease: of two writers one wins, a dead one is replaced at once, a silent one in time.

Time is a number that the tests move; nothing waits for a lease to run out.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from r2scp.store import lease as runs
from r2scp.store.commits import TableAddress
from r2scp.store.errors import LeaseHeld, StoreError
from r2scp.store.lease import LEASE_SCHEMA, LEASE_SECONDS, MAX_CLOCK_SKEW_S, Lease, new_run_id, put_row
from r2scp.store.schema import Table, table_schema

#: Takes the lease, says so, and holds it until a line comes in.
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
def another_process(address: TableAddress) -> Iterator:
    """Start processes that want the lease; each is ended, by its number, at the end."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLDER, address.uri]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def row_of(address: TableAddress) -> dict:
    [row] = address.open().to_table().to_pylist()
    return row


def test_the_second_is_refused_with_who_and_how_long(address: TableAddress, clock: Clock) -> None:
    Lease(address, "extract --corpus demo", clock=clock, pause=clock.sleep).acquire()
    clock.now += 20
    with pytest.raises(LeaseHeld) as caught:
        Lease(address, "other", clock=clock, pause=clock.sleep).acquire()
    message = str(caught.value)
    assert "extract --corpus demo" in message
    assert f"process {os.getpid()}" in message
    assert f"try again in {LEASE_SECONDS - 20:.0f} s" in message
    assert "\n" not in message


def test_an_expired_lease_is_watched_and_then_free(address: TableAddress, clock: Clock) -> None:
    first, second = (Lease(address, name, clock=clock, pause=clock.sleep) for name in ("first", "second"))
    first.acquire()
    clock.now += LEASE_SECONDS
    with pytest.raises(LeaseHeld):
        second.acquire()
    clock.now += 0.001
    began = clock.now
    second.acquire()
    assert json.loads(row_of(address)["holder"])["purpose"] == "second"
    assert clock.now - began == LEASE_SECONDS


def test_a_lease_of_long_ago_is_free_at_once(address: TableAddress, clock: Clock) -> None:
    Lease(address, "first", clock=clock, pause=clock.sleep).acquire()
    clock.now += LEASE_SECONDS + MAX_CLOCK_SKEW_S + 1
    began = clock.now
    Lease(address, "second", clock=clock, pause=clock.sleep).acquire()
    assert clock.now == began


@pytest.mark.parametrize("ahead_s", [-600.0, -5.0, 5.0, 600.0, 3_000.0])
def test_a_clock_that_is_wrong_takes_nothing_from_a_living_holder(
    address: TableAddress, clock: Clock, ahead_s: float
) -> None:
    with Lease(address, "first", clock=clock, pause=clock.sleep).hold() as first:

        def beats(seconds: float) -> None:
            clock.now += seconds
            if clock.now % (LEASE_SECONDS / 4) < seconds:
                first._heartbeat()

        with pytest.raises(LeaseHeld, match="first on "):
            Lease(address, "wrong", clock=lambda: clock.now + ahead_s, pause=beats).acquire()
        first.require()


def test_the_loser_may_not_commit(address: TableAddress, clock: Clock) -> None:
    """A writer that was stopped longer than its lease lasts learns of its loss before its next commit."""
    with Lease(address, "first", clock=clock, pause=clock.sleep).hold() as first:
        first.require()
        clock.now += LEASE_SECONDS + 1
        Lease(address, "second", clock=clock, pause=clock.sleep).acquire()
        with pytest.raises(StoreError, match=r"lost.*second"):
            first.require()
    assert json.loads(row_of(address)["holder"])["purpose"] == "second", "the loser released what is not his"
    assert row_of(address)["expires_at"] > clock.now


def test_a_late_writer_that_lost_nothing_goes_on(address: TableAddress, clock: Clock) -> None:
    with Lease(address, "first", clock=clock, pause=clock.sleep).hold() as first:
        clock.now += LEASE_SECONDS * 3
        first.require()
        assert row_of(address)["expires_at"] == clock.now + LEASE_SECONDS
        with pytest.raises(LeaseHeld):
            Lease(address, "second", clock=clock, pause=clock.sleep).acquire()


def test_release_at_the_end_and_after_an_error(address: TableAddress, clock: Clock) -> None:
    with Lease(address, "first", clock=clock, pause=clock.sleep).hold():
        pass
    with (
        pytest.raises(RuntimeError, match="boom"),
        Lease(address, "second", clock=clock, pause=clock.sleep).hold(),
    ):
        raise RuntimeError("boom")
    with Lease(address, "third", clock=clock, pause=clock.sleep).hold() as third:
        third.require()


def test_heartbeats_renew_the_lease(
    address: TableAddress, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "HEARTBEATS_PER_LEASE", LEASE_SECONDS * 100)  # one every 10 ms
    renewed = threading.Event()
    lease = Lease(address, "first", clock=clock, pause=clock.sleep)
    beat = lease._heartbeat
    monkeypatch.setattr(lease, "_heartbeat", lambda: (beat(), clock.now > 1_800_000_000.0 and renewed.set()))
    with lease.hold():
        clock.now += LEASE_SECONDS / 2
        assert renewed.wait(60)
        assert row_of(address)["expires_at"] == clock.now + LEASE_SECONDS
        clock.now += LEASE_SECONDS / 2 + 1
        with pytest.raises(LeaseHeld):
            Lease(address, "second", clock=clock, pause=clock.sleep).acquire()


def test_a_store_that_fails_now_and_then(
    address: TableAddress, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failing heartbeats are borne until the lease has run out, and not longer."""
    with Lease(address, "first", clock=clock, pause=clock.sleep).hold() as lease:

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


def test_of_many_threads_one_wins(address: TableAddress) -> None:
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
        tell(process)
    said = [process.stdout.readline() for process in both]
    assert sorted(line.split()[0] for line in said) == ["held", "refused"]
    winner = both[0 if said[0].startswith("held") else 1]
    refusal = next(line for line in said if line.startswith("refused"))
    assert f"process {winner.pid}" in refusal


def test_a_killed_process_is_replaced_at_once(address: TableAddress, another_process) -> None:
    holder = another_process()
    tell(holder)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeld):
        Lease(address, "too early").acquire()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Lease(address, "at once").hold() as lease:
        lease.require()


@pytest.mark.parametrize("other", ["host", "boot", "pids"])
def test_a_process_out_of_sight_is_not_taken_for_dead(
    address: TableAddress, clock: Clock, other: str
) -> None:
    """Another machine, another boot, another container: the number of its process says nothing here."""
    first = Lease(address, "first", clock=clock, pause=clock.sleep)
    first._identity |= {other: "another", "pid": 2**22 + 1}
    first._holder = json.dumps(first._identity, sort_keys=True)
    first.acquire()
    with pytest.raises(LeaseHeld):
        Lease(address, "second", clock=clock, pause=clock.sleep).acquire()


def test_a_number_given_to_a_new_process_does_not_keep_the_dead_alive(
    address: TableAddress, clock: Clock
) -> None:
    first = Lease(address, "first", clock=clock, pause=clock.sleep)
    first._identity |= {"started": "1"}  # our own number, but of a process that began at another time
    first._holder = json.dumps(first._identity, sort_keys=True)
    first.acquire()
    Lease(address, "second", clock=clock, pause=clock.sleep).acquire()


def test_the_table_of_leases_stays_small(address: TableAddress, clock: Clock) -> None:
    for _ in range(3):
        with Lease(address, "again", clock=clock, pause=clock.sleep).hold():
            pass
    assert address.open().count_rows() == 1


def test_a_run_is_one_row_however_often_it_is_recorded(tmp_path: Path) -> None:
    address = TableAddress(uri=str(tmp_path / "runs.lance"), schema=table_schema(Table.RUNS, 4))
    address.create()
    started = datetime(2026, 1, 31, 12, tzinfo=UTC)
    row = {"run_id": "it's", "kind": "extract", "status": "running", "started_at": started}
    put_row(address, row)
    put_row(address, row | {"status": "done", "counts": "{}"})
    put_row(address, {"run_id": "other", "status": "running"})
    found = {row["run_id"]: row for row in address.open().to_table().to_pylist()}
    assert found["it's"]["status"] == "done"
    assert found["it's"]["started_at"] == started
    assert found["other"]["status"] == "running"
    assert len(found) == 2


def test_run_ids_differ_and_sort_by_time() -> None:
    ids = [new_run_id("extract") for _ in range(50)]
    assert len(set(ids)) == 50
    times = [run_id.split("-")[1] for run_id in ids]
    assert times == sorted(times)
