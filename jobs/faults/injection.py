"""Fault injection for `jobs torture`: the real `jobs run` in a process of its own, with one fault.

The process starts Ray, prints `ready`, and waits for a `FaultOrder`. Then it wraps the functions of the job
where the fault strikes, in this process only, and calls the command line. The job itself is unchanged.
"""

import errno
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import pyarrow as pa

from r2scp.jobs.ingest import extract
from r2scp.jobs.reindex import job as reindex
from r2scp.pipelines.extraction import flow
from r2scp.pipelines.extraction.stages import StageRows
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store import commits, feature_store, maintenance
from r2scp.store.commits import TableAddress, lance_errors
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import Lease
from r2scp.store.schema import Table


class Fault(StrEnum):
    """What happens to a job."""

    DRIVER = "driver killed"
    WORKER = "decode worker killed"
    ACTOR = "embedding actor killed"
    STAGED = "killed between fragment and commit"
    COMMIT = "killed within a commit"
    TABLES = "killed between clips and failures"
    NEIGHBOURS = "killed between neighbours and indexes"
    UNPUBLISHED = "killed between commit and publish"
    UNTAGGED = "killed between publish and tags"
    COMPACTION = "killed in compaction"
    INDEX = "killed while indexing"
    CLEANING = "killed while cleaning"
    DISK = "full disk"
    FLAKY = "a store that fails now and then"
    TWO = "two jobs at once"
    SKEW = "two jobs, clocks up to 5 s off"
    CLOCK = "two jobs, a clock 10 minutes off"


@dataclass(frozen=True, kw_only=True)
class FaultOrder:
    """What a process is to do. `delay_s`: from a point in the job to the kill; `nth`: at its nth occurrence.

    `chance`: probability that an operation of the store fails; `clock_offset_s`: added to the lease's clock.
    `writes_file`: gets one line per write, with its begin and end on the monotonic clock.
    """

    file: str  # the job's YAML
    fault: str = ""
    writes_file: str = ""
    seed: int = 0
    delay_s: float = 0.0
    nth: int = 1
    chance: float = 0.0
    clock_offset_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Run one job with the fault read from standard input. `sys.argv[1]`: cores to decode on."""
    with ray_session(Resources(num_workers=int(sys.argv[1]))):
        print("ready", file=sys.__stdout__, flush=True)
        line = sys.stdin.readline()
        if not line:  # the parent is gone
            return
        order = FaultOrder(**json.loads(line))
        install(order)
        sys.argv = ["r2scp-pipe", "jobs", "run", order.file]
        runpy.run_module("r2scp.jobs", run_name="__main__")


def install(order: FaultOrder) -> None:
    """Install the fault in this process. Commits are made small, so that there are many points to hit."""
    extract.COMMIT_EVERY_S, flow.ROWS_PER_FRAGMENT = 0.0, (1, 1)
    maintenance.SMALL_FRAGMENTS = 2
    _record_writes(order)
    if order.fault:
        INSTALLERS.get(Fault(order.fault), _install_nothing)(order)


def kill_self() -> None:
    """End this process as the kernel or a power failure would."""
    os.kill(os.getpid(), signal.SIGKILL)


def _install_nothing(order: FaultOrder) -> None:
    """The fault is injected from outside."""


class _NthCall:
    """True on the `nth` call only."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def __call__(self) -> bool:
        self._left -= 1
        return self._left == 0


def _call_before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Have `action` called before `owner.name`, with its arguments."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        action(*arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, wrapped)


def _record_writes(order: FaultOrder) -> None:
    if not order.writes_file:
        return
    for name in ("commit", "publish"):
        original = getattr(FeatureStore, name)

        def recorded(*arguments: Any, original: Any = original, **named: Any) -> Any:
            began = time.monotonic()
            result = original(*arguments, **named)
            line = json.dumps([os.getpid(), began, time.monotonic()]) + "\n"
            with open(order.writes_file, "a", encoding="utf-8") as stream:
                stream.write(line)
            return result

        setattr(FeatureStore, name, recorded)


# -- a kill at one point


def _kill_before_clip_commit(order: FaultOrder) -> None:
    reached = _NthCall(order.nth)

    def kill(store: FeatureStore, table: Table, staged: Any, *rest: Any, **named: Any) -> None:
        if table is Table.CLIPS and any(batch.ids for batch in staged) and reached():
            kill_self()

    _call_before(FeatureStore, "commit", kill)


def _kill_within_commit(order: FaultOrder) -> None:
    reached = _NthCall(order.nth)

    def kill(*arguments: Any, **named: Any) -> None:
        if reached():
            threading.Timer(order.delay_s, kill_self).start()

    _call_before(FeatureStore, "commit", kill)


def _kill_between_tables(order: FaultOrder) -> None:
    """After clips and before failures of the same commit."""
    reached = _NthCall(order.nth)

    def kill(store: FeatureStore, table: Table, staged: Any, properties: Any, *rest: Any, **kw: Any) -> None:
        if table is Table.FAILURES and properties["sequence"].isdecimal() and reached():
            kill_self()

    _call_before(FeatureStore, "commit", kill)


def _kill_before_index_record(order: FaultOrder) -> None:
    reached = _NthCall(order.nth)
    _call_before(FeatureStore, "record_index", lambda *_: kill_self() if reached() else None)


def _kill_before_publish(order: FaultOrder) -> None:
    _call_before(FeatureStore, "publish", lambda *_: kill_self())


def _kill_before_tags(order: FaultOrder) -> None:
    def arm(*_: Any) -> None:
        _call_before(FeatureStore, "protect", lambda *_: kill_self())

    _call_before(FeatureStore, "publish", arm)


def _kill_within(name: str) -> Callable[[FaultOrder], None]:
    """A short time after the job called one of its own functions."""

    def installer(order: FaultOrder) -> None:
        def kill(*arguments: Any, **named: Any) -> None:
            threading.Timer(order.delay_s, kill_self).start()

        _call_before(reindex, name, kill)

    return installer


# -- a store that fails


class FailingStage(StageRows):
    """`StageRows` of which some calls fail, before or after writing. Created in the driver."""

    order = FaultOrder(file="")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._order = type(self).order  # travels to the workers with the stage

    def __call__(self, batch: pa.Table) -> pa.Table:
        order = self._order
        number = random.Random(f"{order.seed}/{batch['clip_id'][0]}").random()
        if number >= order.chance:
            return super().__call__(batch)
        if number < order.chance / 2:
            super().__call__(batch)
        with lance_errors("write to", self._clips.uri):
            raise _disk_error(order)


def _disk_error(order: FaultOrder) -> OSError:
    code = errno.ENOSPC if order.fault == Fault.DISK else errno.EIO
    return OSError(code, os.strerror(code))


def _fail_at_random(order: FaultOrder) -> None:
    """Opens, commits and stages fail at random; a reported failure may have taken effect."""
    rng = random.Random(order.seed)
    FailingStage.order = order
    flow.StageRows = FailingStage
    for owner, name in ((TableAddress, "_open"), (commits, "_commit"), (feature_store, "put_row")):
        original = getattr(owner, name)

        def failing(*arguments: Any, original: Any = original, **named: Any) -> Any:
            drawn = rng.random()
            if drawn >= order.chance:
                return original(*arguments, **named)
            if drawn < order.chance / 2:
                original(*arguments, **named)
            with commits.lance_errors("reach", "the store"):
                raise _disk_error(order)

        setattr(owner, name, failing)


def _simulate_full_disk(order: FaultOrder) -> None:
    """Without a private disk: from the `nth` write on, writes fail with ENOSPC."""
    reached, full = _NthCall(order.nth), threading.Event()
    FailingStage.order = order
    flow.StageRows = FailingStage

    def fail(*arguments: Any, **named: Any) -> None:
        if reached():
            full.set()
        if full.is_set():
            with commits.lance_errors("write to", "the store"):
                raise _disk_error(order)

    for owner, name in ((commits, "_commit"), (feature_store, "put_row"), (feature_store, "stage")):
        _call_before(owner, name, fail)


def _shift_clock(order: FaultOrder) -> None:
    feature_store.Lease = partial(Lease, clock=lambda: time.time() + order.clock_offset_s)


INSTALLERS: dict[Fault, Callable[[FaultOrder], None]] = {
    Fault.STAGED: _kill_before_clip_commit,
    Fault.COMMIT: _kill_within_commit,
    Fault.TABLES: _kill_between_tables,
    Fault.NEIGHBOURS: _kill_before_index_record,
    Fault.UNPUBLISHED: _kill_before_publish,
    Fault.UNTAGGED: _kill_before_tags,
    Fault.COMPACTION: _kill_within("compact"),
    Fault.INDEX: _kill_within("refresh_index"),
    Fault.CLEANING: _kill_within("clean"),
    # chance 0: a private disk is really full
    Fault.DISK: lambda order: _simulate_full_disk(order) if order.chance else None,
    Fault.FLAKY: _fail_at_random,
    Fault.SKEW: _shift_clock,
    Fault.CLOCK: _shift_clock,
}
