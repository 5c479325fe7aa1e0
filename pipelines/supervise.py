"""Runs one program that may hang, flood, crash or eat memory, and always comes back.

The program gets no shell, no terminal, an empty standard input and a process group of its own.
Its data arrives through pipes that it inherits beside standard error; all of them are drained in
one loop, so none can fill up and dead-lock it, and each is bounded. When the loop ends, for
whatever reason, the whole group is dead and its leader is reaped.
"""

import contextlib
import fcntl
import math
import os
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

CHUNK = 1 << 20  # bytes asked for in one read
PIPE_SIZE = 1 << 20  # bytes; holds six frames, so that the program seldom waits for us
CPU_PER_WALL = 4  # CPU seconds allowed for one second of wall time: ends orphans, never honest work
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)  # Linux only

#: Variables that would make ffmpeg write files or colour its words.
UNWANTED_VARIABLES = ("FFREPORT", "AV_LOG_FORCE_COLOR")


class Stop(StrEnum):
    """Why a program was ended by us and not by itself."""

    TIMEOUT = "timeout"
    FLOOD = "flood"  # a pipe brought more bytes than it may


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What one run may use."""

    deadline: float  # on the clock of time.monotonic()
    memory_bytes: int  # private writable memory; see `confine`
    pipe_bytes: tuple[int, ...]  # most bytes from each data pipe; one pipe per number
    stderr_bytes: int  # how much of the end of standard error is kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a run left behind. `returncode` is negative when a signal ended it, as in subprocess."""

    returncode: int
    pipes: tuple[bytearray, ...]
    stderr: str
    stopped: Stop | None


class Drain:
    """One pipe and what came through it: all of it, or only its tail."""

    def __init__(self, fd: int, write_end: int, *, most: int, tail: bool) -> None:
        self.fd, self.write_end, self.most, self.tail = fd, write_end, most, tail
        self.data = bytearray()
        os.set_blocking(fd, False)

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def read(self) -> bool:
        """One read; False at the end of the pipe."""
        try:
            chunk = os.read(self.fd, CHUNK)
        except BlockingIOError:
            return True
        self.data += chunk
        if self.tail and len(self.data) > 2 * self.most:
            del self.data[: -self.most]
        return bool(chunk)

    @property
    def flooded(self) -> bool:
        return not self.tail and len(self.data) > self.most


def clean_environment() -> dict[str, str]:
    """Ours, without what would make ffmpeg write files."""
    return {k: v for k, v in os.environ.items() if k not in UNWANTED_VARIABLES} | {"LC_ALL": "C"}


def confine(pid: int, *, memory_bytes: int, cpu_seconds: float | None = None, file_bytes: int = 0) -> None:
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


def kill_group(process: subprocess.Popen) -> None:
    """Ends a child that leads its own session, with all its descendants, and reaps it."""
    if process.returncode is None:  # not reaped yet: its number cannot belong to another process
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def supervise(
    compose: Callable[[Sequence[int]], list[str]], bounds: Bounds, inherit: tuple[int, ...] = ()
) -> Finished:
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
            compose(inner),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words.write_end,
            pass_fds=(*inherit, *inner),
            start_new_session=True,
            env=clean_environment(),
        )
        stack.callback(kill_group, process)
        left = bounds.deadline - time.monotonic()
        confine(process.pid, memory_bytes=bounds.memory_bytes, cpu_seconds=left * CPU_PER_WALL)
        stopped = _drain([*drains, words], process, bounds.deadline)
    return Finished(
        returncode=process.returncode,
        pipes=tuple(drain.data for drain in drains),
        stderr=words.data[-bounds.stderr_bytes :].decode("utf-8", "replace"),
        stopped=stopped,
    )


@contextlib.contextmanager
def _pipe(most: int, *, tail: bool) -> Iterator[Drain]:
    """A pipe, closed at the end; the drain's user closes `write_end` once the program holds it."""
    drain = Drain(*os.pipe(), most=most, tail=tail)
    try:
        if F_SETPIPE_SZ is not None:
            with contextlib.suppress(OSError):  # over the user's quota: the default size will do
                fcntl.fcntl(drain.write_end, F_SETPIPE_SZ, PIPE_SIZE)
        yield drain
    finally:
        os.close(drain.fd)
        drain.close_write_end()


def _drain(drains: list[Drain], process: subprocess.Popen, deadline: float) -> Stop | None:
    """Reads all pipes to their ends, then waits for the program to be gone."""
    for drain in drains:
        drain.close_write_end()  # the program has its own; ours would keep the pipe from ending
    with selectors.DefaultSelector() as selector:
        for drain in drains:
            selector.register(drain.fd, selectors.EVENT_READ, drain)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return Stop.TIMEOUT
            for key, _ in selector.select(left):
                if not key.data.read():
                    selector.unregister(key.fd)
                if key.data.flooded:
                    return Stop.FLOOD
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Stop.TIMEOUT
    return None
