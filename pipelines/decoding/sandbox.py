"""Runs one program that may hang, flood, crash or eat memory, and always comes back.

The program gets no shell, no terminal, an empty standard input and a process group of its own.
Its data arrives through pipes that it inherits beside standard error; all of them are drained in
one loop, so none can fill up and dead-lock it, and each is bounded. When the loop ends, for
whatever reason, the whole group is dead and its leader is reaped.

A program writes in small bits, hundreds of them for ten seconds of video. Waking up for each costs
more than the data, so the pipes are large and are emptied every few milliseconds; the end of the
program is noticed at once.
"""

import contextlib
import fcntl
import math
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

PIPE_BYTES = 1 << 20  # bytes; holds six frames, so that the program seldom waits for us
FIRST_BUFFER_BYTES = 1 << 26  # bytes reserved for one pipe before any came: 17 minutes of sound, 7 of frames
POLL_INTERVAL_S = 0.005  # between two looks into the pipes; 200 MB/s fill one in this time
LONGEST_POLL_S = 1e6  # 2 ** 31 ms is the most that poll takes
CPU_PER_WALL = 4  # CPU seconds allowed for one second of wall time: ends orphans, never honest work
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)  # Linux only

#: Variables that would make ffmpeg write files or colour its words.
UNWANTED_VARIABLES = ("FFREPORT", "AV_LOG_FORCE_COLOR")


class StopReason(StrEnum):
    """Why a program was ended by us and not by itself."""

    TIMEOUT = "timeout"
    FLOOD = "flood"  # a pipe brought more bytes than it may


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one run may use."""

    deadline: float  # on the clock of time.monotonic()
    memory_bytes: int  # private writable memory; see `confine`
    pipe_bytes: tuple[int, ...]  # most bytes from each data pipe; one pipe per number
    stderr_bytes: int  # how much of the end of standard error is kept


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run left behind. `returncode` is negative when a signal ended it, as in subprocess."""

    returncode: int
    pipes: tuple[memoryview, ...]  # of bytes
    stderr: str
    stopped: StopReason | None


def _reserve(size: int) -> memoryview:
    """Memory that is reserved and takes no room until it is written to."""
    return np.empty(size, np.uint8).data


def _enlarge_pipe(write_end: int) -> int:
    """Gives a pipe PIPE_SIZE where that can be had; the bytes that it surely holds."""
    if F_SETPIPE_SZ is not None:
        with contextlib.suppress(OSError):  # over the user's quota: the size that it has will do
            return fcntl.fcntl(write_end, F_SETPIPE_SZ, PIPE_BYTES)
    return select.PIPE_BUF


class PipeReader:
    """One pipe and what came through it: all of it, or only its tail.

    It is read to where it stays, into memory that was reserved and not touched: a page that is asked
    for and given back again costs more than the bytes that are put there.
    """

    def __init__(self, fd: int, write_end: int, *, max_bytes: int, tail_only: bool) -> None:
        self.fd, self.write_end, self.max_bytes, self.tail_only = fd, write_end, max_bytes, tail_only
        self.buffer = _reserve(min(2 * max_bytes if tail_only else max_bytes, FIRST_BUFFER_BYTES) + PIPE_BYTES)
        self.filled = 0  # bytes of `room`
        self.capacity = _enlarge_pipe(write_end)
        self.filling_fast = False  # the pipe was found half full: it should not be left alone
        os.set_blocking(fd, False)

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def read(self) -> bool:
        """One read of all that the pipe holds; False at the end of the pipe."""
        try:
            came = os.readv(self.fd, [self.buffer[self.filled :]])
        except BlockingIOError:
            self.filling_fast = False
            return True
        self.filled += came
        self.filling_fast = came > self.capacity // 2
        if self.tail_only and self.filled > 2 * self.max_bytes:
            self.buffer[: self.max_bytes] = bytes(self.buffer[self.filled - self.max_bytes : self.filled])
            self.filled = self.max_bytes
        elif len(self.buffer) - self.filled < PIPE_BYTES:
            kept, self.buffer = self.buffer, _reserve(2 * len(self.buffer))
            self.buffer[: self.filled] = kept[: self.filled]
        return came > 0

    @property
    def data(self) -> memoryview:
        """What is kept, not copied."""
        start = max(0, self.filled - self.max_bytes) if self.tail_only else 0
        return self.buffer[start : self.filled]

    @property
    def overflowed(self) -> bool:
        return not self.tail_only and self.filled > self.max_bytes


def clean_environment() -> dict[str, str]:
    """Ours, without what would make ffmpeg write files."""
    return {k: v for k, v in os.environ.items() if k not in UNWANTED_VARIABLES} | {"LC_ALL": "C"}


def limit_resources(pid: int, *, memory_bytes: int, cpu_seconds: float | None = None, file_bytes: int = 0) -> None:
    """Limits a running child: memory, processor time, no core dump, bytes it may write to any file.

    The memory limit is RLIMIT_DATA: private writable memory, which is what a decoder allocates.
    RLIMIT_AS would also count reserved but untouched address space and the program itself (170 MB).
    Set from outside right after the start, since `preexec_fn` is unsafe beside threads. A system
    without prlimit (macOS) or one that refuses it runs without these limits; time still holds.
    """
    if not hasattr(resource, "prlimit"):
        return
    limits = {
        resource.RLIMIT_DATA: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
    }
    if cpu_seconds is not None:
        limits[resource.RLIMIT_CPU] = max(1, math.ceil(cpu_seconds))
    for which, value in limits.items():
        with contextlib.suppress(OSError):  # gone already, or refused
            _, hard = resource.prlimit(pid, which)
            soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.prlimit(pid, which, (soft, hard))


def use_batch_scheduling(pid: int) -> None:
    """Lets a child's threads run on when one wakes another.

    ffmpeg hands every packet and frame from thread to thread. As SCHED_BATCH a thread works through
    its queue before the next one has its turn: a third of the switches, the same share of the processor.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    with contextlib.suppress(OSError):  # gone already, or refused
        if os.sched_getscheduler(pid) == os.SCHED_OTHER:
            os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


def kill_group(process: subprocess.Popen) -> None:
    """Ends a child that leads its own session, with all its descendants, and reaps it."""
    if process.returncode is None:  # not reaped yet: its number cannot belong to another process
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def supervise(
    build_command: Callable[[Sequence[int]], list[str]], bounds: Limits, inherit: tuple[int, ...] = ()
) -> RunResult:
    """Runs the command that `compose` makes of the numbers of its data pipes.

    `inherit` names descriptors of ours that the program may use as well. Returns whatever came,
    also after a timeout or flood; raises only OSError, if the program cannot be started.
    """
    with contextlib.ExitStack() as stack:
        *drains, words = (
            stack.enter_context(_pipe(most, tail=tail))
            for most, tail in [*((most, False) for most in bounds.pipe_bytes), (bounds.stderr_bytes, True)]
        )
        inner = [drain.write_end for drain in drains]
        process = subprocess.Popen(
            build_command(inner),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words.write_end,
            pass_fds=(*inherit, *inner),
            start_new_session=True,
            env=clean_environment(),
        )
        stack.callback(kill_group, process)
        left = bounds.deadline - time.monotonic()
        limit_resources(process.pid, memory_bytes=bounds.memory_bytes, cpu_seconds=left * CPU_PER_WALL)
        use_batch_scheduling(process.pid)
        stopped = _drain([*drains, words], process, bounds.deadline)
    return RunResult(
        returncode=process.returncode,
        pipes=tuple(drain.data for drain in drains),
        stderr=bytes(words.data).decode("utf-8", "replace"),
        stopped=stopped,
    )


@contextlib.contextmanager
def _pipe(most: int, *, tail: bool) -> Iterator[PipeReader]:
    """A pipe, closed at the end; the drain's user closes `write_end` once the program holds it."""
    drain = PipeReader(*os.pipe(), max_bytes=most, tail_only=tail)
    try:
        yield drain
    finally:
        os.close(drain.fd)
        drain.close_write_end()


@contextlib.contextmanager
def _exit_watch(process: subprocess.Popen) -> Iterator[int | None]:
    """A descriptor that can be read once the program has exited; None where there is no such thing."""
    try:
        watch = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, an old one, or no descriptor left
        yield None
        return
    try:
        yield watch
    finally:
        os.close(watch)


def _drain(drains: list[PipeReader], process: subprocess.Popen, deadline: float) -> StopReason | None:
    """Reads all pipes to their ends, then waits for the program to be gone."""
    for drain in drains:
        drain.close_write_end()  # the program has its own; ours would keep the pipe from ending
    with _exit_watch(process) as watch:
        alive, unfinished = watch is not None, list(drains)
        while unfinished:
            left = deadline - time.monotonic()
            if left <= 0:
                return StopReason.TIMEOUT
            if alive and not any(drain.filling_fast for drain in unfinished):
                alive = not _readable([watch], min(left, POLL_INTERVAL_S))
            else:  # what is left is in the pipes, or they fill up fast
                _readable([drain.fd for drain in unfinished], left)
            for drain in tuple(unfinished):
                if not drain.read():
                    unfinished.remove(drain)
                if drain.overflowed:
                    return StopReason.FLOOD
        if watch is not None and not _readable([watch], max(0.0, deadline - time.monotonic())):
            return StopReason.TIMEOUT
        try:
            process.wait(max(0.0, deadline - time.monotonic()) if watch is None else None)
        except subprocess.TimeoutExpired:
            return StopReason.TIMEOUT
    return None


def _readable(fds: Sequence[int | None], seconds: float) -> bool:
    """Waits until one of the descriptors can be read, has ended, or time is up, which is False."""
    poll = select.poll()
    for fd in fds:
        if fd is not None:
            poll.register(fd, select.POLLIN)
    return bool(poll.poll(math.ceil(min(seconds, LONGEST_POLL_S) * 1000)))
