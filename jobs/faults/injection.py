"""The victims of `jobs torture`: the real `jobs run`, in a process of its own, with one fault in it.

A victim starts Ray, says `ready`, and waits for an order. Then it wraps the functions of the job where the
fault is to strike, in its own process alone, and calls the command line. The job itself knows nothing of it.
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
from r2scp.pipelines.extraction import flow as flows
from r2scp.pipelines.extraction.stages import StageRows
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store import commits as transaction
from r2scp.store import feature_store
from r2scp.store import maintenance as upkeep
from r2scp.store.commits import TableAddress, lance_errors
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import Lease
from r2scp.store.schema import Table


class Fault(StrEnum):
    """What befalls a job."""

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
class Order:
    """What a victim is to do. `delay_s`: from a point in the job to the blow; `nth`: the time it is reached.

    `chance`: of each operation of a store that fails; `clock_off_s`: of the lease's clock. `note`: the file
    that takes one line for each write, with its begin and end on the clock all processes share.
    """

    file: str  # of the job
    fault: str = ""
    note: str = ""
    seed: int = 0
    delay_s: float = 0.0
    nth: int = 1
    chance: float = 0.0
    clock_off_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Be a victim. `sys.argv[1]`: cores to decode on."""
    with ray_session(Resources(num_workers=int(sys.argv[1]))):
        print("ready", file=sys.__stdout__, flush=True)
        said = sys.stdin.readline()
        if not said:  # whoever started us is gone
            return
        order = Order(**json.loads(said))
        install(order)
        sys.argv = ["r2scp-pipe", "jobs", "run", order.file]
        runpy.run_module("r2scp.jobs", run_name="__main__")


def install(order: Order) -> None:
    """Put the fault into this process. Commits are small, so that there are many moments to strike at."""
    extract.COMMIT_EVERY_S, flows.ROWS_PER_FRAGMENT = 0.0, (1, 1)
    upkeep.SMALL_FRAGMENTS = 2
    _note_writes(order)
    if order.fault:
        INSTALLED.get(Fault(order.fault), _nothing)(order)


def die() -> None:
    """The end of this process, as the kernel or the power supply brings it about."""
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing(order: Order) -> None:
    """The fault comes from outside."""


class _Nth:
    """True the `nth` time it is asked."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def __call__(self) -> bool:
        self._left -= 1
        return self._left == 0


def _before(owner: Any, name: str, strike: Callable[..., None]) -> None:
    """Have `strike` called with the arguments of `owner.name`, before it."""
    original = getattr(owner, name)

    def struck(*arguments: Any, **named: Any) -> Any:
        strike(*arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, struck)


def _note_writes(order: Order) -> None:
    if not order.note:
        return
    for name in ("commit", "publish"):
        original = getattr(FeatureStore, name)

        def noted(*arguments: Any, original: Any = original, **named: Any) -> Any:
            began = time.monotonic()
            done = original(*arguments, **named)
            line = json.dumps([os.getpid(), began, time.monotonic()]) + "\n"
            with open(order.note, "a", encoding="utf-8") as stream:
                stream.write(line)
            return done

        setattr(FeatureStore, name, noted)


# -- the blow at one point


def _staged(order: Order) -> None:
    reached = _Nth(order.nth)

    def strike(store: FeatureStore, table: Table, staged: Any, *rest: Any, **named: Any) -> None:
        if table is Table.CLIPS and any(batch.ids for batch in staged) and reached():
            die()

    _before(FeatureStore, "commit", strike)


def _commit(order: Order) -> None:
    reached = _Nth(order.nth)

    def strike(*arguments: Any, **named: Any) -> None:
        if reached():
            threading.Timer(order.delay_s, die).start()

    _before(FeatureStore, "commit", strike)


def _tables(order: Order) -> None:
    """After clips, before failures, of the same commit."""
    reached = _Nth(order.nth)

    def strike(
        store: FeatureStore, table: Table, staged: Any, properties: Any, *rest: Any, **kw: Any
    ) -> None:
        if table is Table.FAILURES and properties["sequence"].isdecimal() and reached():
            die()

    _before(FeatureStore, "commit", strike)


def _neighbours(order: Order) -> None:
    reached = _Nth(order.nth)
    _before(FeatureStore, "record_index", lambda *_: die() if reached() else None)


def _unpublished(order: Order) -> None:
    _before(FeatureStore, "publish", lambda *_: die())


def _untagged(order: Order) -> None:
    def armed(*_: Any) -> None:
        _before(FeatureStore, "protect", lambda *_: die())

    _before(FeatureStore, "publish", armed)


def _within(name: str) -> Callable[[Order], None]:
    """Some moments after the job called a function of its own."""

    def installed(order: Order) -> None:
        def strike(*arguments: Any, **named: Any) -> None:
            threading.Timer(order.delay_s, die).start()

        _before(reindex, name, strike)

    return installed


# -- a store that fails


class FailingStage(StageRows):
    """`StageRows` of which some calls fail, before or after they have written; made where the order is."""

    order = Order(file="")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._order = type(self).order  # travels to the workers with the stage

    def __call__(self, batch: pa.Table) -> pa.Table:
        order = self._order
        draw = random.Random(f"{order.seed}/{batch['clip_id'][0]}").random()
        if draw >= order.chance:
            return super().__call__(batch)
        if draw < order.chance / 2:
            super().__call__(batch)
        with lance_errors("write to", self._clips.uri):
            raise _failure(order)


def _failure(order: Order) -> OSError:
    number = errno.ENOSPC if order.fault == Fault.DISK else errno.EIO
    return OSError(number, os.strerror(number))


def _flaky(order: Order) -> None:
    """Opens, commits and stages fail now and then; what is said to have failed may have been done."""
    draw = random.Random(order.seed)
    FailingStage.order = order
    flows.StageRows = FailingStage
    for owner, name in ((TableAddress, "_opened"), (transaction, "_commit"), (feature_store, "put_row")):
        original = getattr(owner, name)

        def failing(*arguments: Any, original: Any = original, **named: Any) -> Any:
            drawn = draw.random()
            if drawn >= order.chance:
                return original(*arguments, **named)
            if drawn < order.chance / 2:
                original(*arguments, **named)
            with transaction.lance_errors("reach", "the store"):
                raise _failure(order)

        setattr(owner, name, failing)


def _full(order: Order) -> None:
    """No disk of one's own could be mounted: from the `nth` write on, writes fail as a full disk's do."""
    reached, full = _Nth(order.nth), threading.Event()
    FailingStage.order = order
    flows.StageRows = FailingStage

    def strike(*arguments: Any, **named: Any) -> None:
        if reached():
            full.set()
        if full.is_set():
            with transaction.lance_errors("write to", "the store"):
                raise _failure(order)

    for owner, name in ((transaction, "_commit"), (feature_store, "put_row"), (feature_store, "stage")):
        _before(owner, name, strike)


def _clock(order: Order) -> None:
    feature_store.Lease = partial(Lease, clock=lambda: time.time() + order.clock_off_s)


INSTALLED: dict[Fault, Callable[[Order], None]] = {
    Fault.STAGED: _staged,
    Fault.COMMIT: _commit,
    Fault.TABLES: _tables,
    Fault.NEIGHBOURS: _neighbours,
    Fault.UNPUBLISHED: _unpublished,
    Fault.UNTAGGED: _untagged,
    Fault.COMPACTION: _within("compact"),
    Fault.INDEX: _within("refresh_index"),
    Fault.CLEANING: _within("clean"),
    Fault.DISK: lambda order: _full(order) if order.chance else None,  # else the disk is full indeed
    Fault.FLAKY: _flaky,
    Fault.SKEW: _clock,
    Fault.CLOCK: _clock,
}
