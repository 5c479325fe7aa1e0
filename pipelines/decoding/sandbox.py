"""Runs a program that may hang, flood, crash or exhaust memory, and always returns.

The program gets no shell, no terminal, an empty standard input and a process group of its own. It
writes its data to pipes that it inherits beside standard error. One loop drains them all, so that no
full pipe can deadlock the program, and each has a limit. However the loop ends, the whole group is
killed and its leader reaped.

A program writes in small pieces, hundreds of them for ten seconds of video. Waking up for each costs
more than the data, so the pipes are large and are emptied every few milliseconds; the exit of the
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

PIPE_BYTES = 1 << 20  # holds six frames, so that the program seldom waits for us
FIRST_BUFFER_BYTES = 1 << 26  # reserved for one pipe: 17 minutes of sound, 7 of frames
POLL_INTERVAL_S = 0.005  # between two reads of the pipes; 200 MB/s fill one in this time
LONGEST_POLL_S = 1e6  # poll takes at most 2 ** 31 ms
CPU_PER_WALL = 4  # CPU seconds allowed per second of wall time: ends orphans, never a working program
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)  # Linux only

#: Variables that would make ffmpeg write files or colour its log.
UNWANTED_VARIABLES = ("FFREPORT", "AV_LOG_FORCE_COLOR")


class StopReason(StrEnum):
    """Why we ended a program that had not exited."""

    TIMEOUT = "timeout"
    FLOOD = "flood"  # more bytes came through a pipe than its limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one run may use."""

    deadline: float  # on the clock of time.monotonic()
    memory_bytes: int  # private writable memory; see `limit_resources`
    pipe_bytes: tuple[int, ...]  # limit of each data pipe; one pipe per number
    stderr_bytes: int  # of the end of standard error that is kept


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended. `returncode` is negative if a signal ended it, as in subprocess."""

    returncode: int
    pipes: tuple[memoryview, ...]  # the bytes of each data pipe
    stderr: str
    stopped: StopReason | None


def _reserve(size: int) -> memoryview:
    """Memory that takes no space until it is written to."""
    return np.empty(size, np.uint8).data


def _enlarge_pipe(write_end: int) -> int:
    """Enlarges a pipe to PIPE_BYTES if possible; returns its capacity in bytes."""
    if F_SETPIPE_SZ is not None:
        with contextlib.suppress(OSError):  # over the user's quota: its present size will do
            return fcntl.fcntl(write_end, F_SETPIPE_SZ, PIPE_BYTES)
    return select.PIPE_BUF


class PipeReader:
    """One pipe and what came through it: all of it, or only its tail.

    The data is read straight into reserved memory that has not been touched before: to obtain a page and
    return it again costs more than to copy the bytes.
    """

    def __init__(self, fd: int, write_end: int, *, max_bytes: int, tail_only: bool) -> None:
        self.fd, self.write_end, self.max_bytes, self.tail_only = fd, write_end, max_bytes, tail_only
        self.buffer = _reserve(
            min(2 * max_bytes if tail_only else max_bytes, FIRST_BUFFER_BYTES) + PIPE_BYTES
        )
        self.filled = 0  # bytes of `room`
        self.capacity = _enlarge_pipe(write_end)
        self.filling_fast = False  # was more than half full at the last read: read it again at once
        os.set_blocking(fd, False)

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def read(self) -> bool:
        """Reads all that the pipe holds; False at its end."""
        try:
            count = os.readv(self.fd, [self.buffer[self.filled :]])
        except BlockingIOError:
            self.filling_fast = False
            return True
        self.filled += count
        self.filling_fast = count > self.capacity // 2
        if self.tail_only and self.filled > 2 * self.max_bytes:
            self.buffer[: self.max_bytes] = bytes(self.buffer[self.filled - self.max_bytes : self.filled])
            self.filled = self.max_bytes
        elif len(self.buffer) - self.filled < PIPE_BYTES:
            old, self.buffer = self.buffer, _reserve(2 * len(self.buffer))
            self.buffer[: self.filled] = old[: self.filled]
        return count > 0

    @property
    def data(self) -> memoryview:
        """What came, or its tail, without copying."""
        start = max(0, self.filled - self.max_bytes) if self.tail_only else 0
        return self.buffer[start : self.filled]

    @property
    def overflowed(self) -> bool:
        return not self.tail_only and self.filled > self.max_bytes


def clean_environment() -> dict[str, str]:
    """Our environment without UNWANTED_VARIABLES."""
    return {k: v for k, v in os.environ.items() if k not in UNWANTED_VARIABLES} | {"LC_ALL": "C"}


def limit_resources(
    pid: int, *, memory_bytes: int, cpu_seconds: float | None = None, file_bytes: int = 0
) -> None:
    """Limits the memory, processor time and file size of a running child, and forbids core dumps.

    The memory limit is RLIMIT_DATA: private writable memory, which is what a decoder allocates.
    RLIMIT_AS would also count reserved but untouched address space and the program itself (170 MB).
    The limits are set from outside right after the start, since `preexec_fn` is unsafe with threads.
    Without prlimit (macOS), or if it is denied, only the time limit holds.
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
        with contextlib.suppress(OSError):  # has exited, or denied
            _, hard = resource.prlimit(pid, which)
            soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.prlimit(pid, which, (soft, hard))


def use_batch_scheduling(pid: int) -> None:
    """Schedules a child as SCHED_BATCH, in which a thread that wakes another keeps running.

    ffmpeg passes every packet and frame from thread to thread. This way a thread works through its queue
    before the next one runs: a third of the context switches, for the same share of the processor.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    with contextlib.suppress(OSError):  # has exited, or denied
        if os.sched_getscheduler(pid) == os.SCHED_OTHER:
            os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


def kill_group(process: subprocess.Popen) -> None:
    """Ends a child that leads its own session, with all its descendants, and reaps it."""
    if process.returncode is None:  # not reaped yet: its pid cannot belong to another process
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def supervise(
    build_command: Callable[[Sequence[int]], list[str]], limits: Limits, inherit: tuple[int, ...] = ()
) -> RunResult:
    """Runs the command that `build_command` makes from the descriptors of its data pipes.

    `inherit` are further descriptors that the program may use. Returns what came, also after a timeout
    or a flood; raises only OSError, if the program cannot be started.
    """
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(_pipe(limit, tail_only=False)) for limit in limits.pipe_bytes]
        stderr = stack.enter_context(_pipe(limits.stderr_bytes, tail_only=True))
        write_ends = [reader.write_end for reader in readers]
        process = subprocess.Popen(
            build_command(write_ends),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr.write_end,
            pass_fds=(*inherit, *write_ends),
            start_new_session=True,
            env=clean_environment(),
        )
        stack.callback(kill_group, process)
        remaining_s = limits.deadline - time.monotonic()
        limit_resources(process.pid, memory_bytes=limits.memory_bytes, cpu_seconds=remaining_s * CPU_PER_WALL)
        use_batch_scheduling(process.pid)
        stopped = _drain([*readers, stderr], process, limits.deadline)
    return RunResult(
        returncode=process.returncode,
        pipes=tuple(reader.data for reader in readers),
        stderr=bytes(stderr.data).decode("utf-8", "replace"),
        stopped=stopped,
    )


@contextlib.contextmanager
def _pipe(max_bytes: int, *, tail_only: bool) -> Iterator[PipeReader]:
    """A pipe, closed at the end; the caller closes `write_end` once the program has inherited it."""
    reader = PipeReader(*os.pipe(), max_bytes=max_bytes, tail_only=tail_only)
    try:
        yield reader
    finally:
        os.close(reader.fd)
        reader.close_write_end()


@contextlib.contextmanager
def _exit_watch(process: subprocess.Popen) -> Iterator[int | None]:
    """A descriptor that becomes readable when the program exits; None if the system has none."""
    try:
        watch = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, an old kernel, or out of descriptors
        yield None
        return
    try:
        yield watch
    finally:
        os.close(watch)


def _drain(readers: list[PipeReader], process: subprocess.Popen, deadline: float) -> StopReason | None:
    """Reads all pipes to their ends, then waits for the program to exit."""
    for reader in readers:
        reader.close_write_end()  # the program has its own; ours would keep the pipe open
    with _exit_watch(process) as watch:
        alive, open_readers = watch is not None, list(readers)
        while open_readers:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return StopReason.TIMEOUT
            if alive and not any(reader.filling_fast for reader in open_readers):
                alive = not _readable([watch], min(remaining_s, POLL_INTERVAL_S))
            else:  # the program has exited, or a pipe fills up fast
                _readable([reader.fd for reader in open_readers], remaining_s)
            for reader in tuple(open_readers):
                if not reader.read():
                    open_readers.remove(reader)
                if reader.overflowed:
                    return StopReason.FLOOD
        if watch is not None and not _readable([watch], max(0.0, deadline - time.monotonic())):
            return StopReason.TIMEOUT
        try:
            process.wait(max(0.0, deadline - time.monotonic()) if watch is None else None)
        except subprocess.TimeoutExpired:
            return StopReason.TIMEOUT
    return None


def _readable(fds: Sequence[int | None], seconds: float) -> bool:
    """Waits until a descriptor can be read or has reached its end; False if time is up first."""
    poll = select.poll()
    for fd in fds:
        if fd is not None:
            poll.register(fd, select.POLLIN)
    return bool(poll.poll(math.ceil(min(seconds, LONGEST_POLL_S) * 1000)))
