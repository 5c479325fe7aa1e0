"""The job processes that `jobs torture` starts, kills and cleans up after."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from r2scp.jobs.faults.injection import FaultOrder
from r2scp.store.errors import R2SCPError

READY_TIMEOUT_S = 240.0  # imports and a local Ray, on a busy machine
POLL_S = 0.02
EXIT_GRACE_S = 3.0  # for Ray's processes to exit by themselves once their driver is gone
KILL_TIMEOUT_S = 10.0  # for a killed process to disappear
# not `-m`: workers must find the module's classes by name
PROGRAM = "from r2scp.jobs.faults.injection import main; main()"
DECODE_WORKER, EMBED_ACTOR = "ray::MapBatches(DecodeClips", "ray::MapWorker(MapBatches(EmbedClips))"


@dataclass(frozen=True, kw_only=True)
class ExitResult:
    """How a job process ended. `code` is negative if a signal ended it."""

    code: int
    stderr: str
    seconds: float  # since the order


@dataclass(kw_only=True)
class JobProcess:
    """A process that will run the job once; made by `start`."""

    process: subprocess.Popen
    errors: Path
    descendants: set[psutil.Process] = field(default_factory=set)
    started_at: float = 0.0
    _tracker: threading.Thread | None = None

    @classmethod
    def start(cls, folder: Path, number: int, ray_folder: Path, num_workers: int) -> "JobProcess":
        """Start the process without waiting until it is ready."""
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        env |= {"RAY_TMPDIR": str(ray_folder), "TMPDIR": str(ray_folder), "OMP_NUM_THREADS": "1"}
        errors = folder / f"job-{number}.log"
        with open(errors, "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(num_workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=env,
                cwd=folder,
                start_new_session=True,  # Ctrl-C must not reach it
            )
        job = cls(process=process, errors=errors)
        job._tracker = threading.Thread(target=job._track_descendants, name="track", daemon=True)
        job._tracker.start()
        return job

    def _track_descendants(self) -> None:
        while self.process.poll() is None:
            self.descendants.update(_children(self.process.pid))
            time.sleep(0.1)

    def wait_ready(self) -> None:
        """Wait until it can take an order. Raises `R2SCPError` if it does not start."""
        assert self.process.stdout is not None
        stdout, deadline = self.process.stdout, time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if select.select([stdout], [], [], 1.0)[0] and stdout.readline().strip() == b"ready":
                return
        stderr = self.errors.read_text(errors="replace").strip().splitlines()[-1:]
        self.clean_up()
        raise R2SCPError(f"a job process did not start within {READY_TIMEOUT_S:.0f} s: {stderr}")

    def send(self, order: FaultOrder) -> None:
        """Send its order; it runs the job now."""
        assert self.process.stdin is not None
        self.started_at = time.monotonic()
        self.process.stdin.write(order.to_json().encode() + b"\n")
        self.process.stdin.close()

    def kill(self) -> bool:
        """Send SIGKILL; False if it had already ended."""
        if self.process.poll() is not None:
            return False
        self.process.send_signal(signal.SIGKILL)
        return True

    def kill_child(self, title: str, delay_s: float) -> bool:
        """Kill a child with this title, `delay_s` after it appeared; False if there was none."""
        child: psutil.Process | None = None
        while child is None and self.process.poll() is None:
            child = next((child for child in _children(self.process.pid) if _has_title(child, title)), None)
            time.sleep(POLL_S)
        if child is None:
            return False
        time.sleep(delay_s)
        try:
            if not _has_title(child, title):
                return False
            child.kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def wait(self, timeout_s: float) -> ExitResult | None:
        """Wait for its end; None on timeout."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        stderr = self.errors.read_text(errors="replace")
        return ExitResult(code=code, stderr=stderr, seconds=time.monotonic() - self.started_at)

    def clean_up(self) -> None:
        """Kill it and its descendants; Ray's processes get a short time to exit by themselves."""
        self.kill()
        self.process.wait(KILL_TIMEOUT_S)
        if self._tracker:
            self._tracker.join(KILL_TIMEOUT_S)
        _wait_gone(self.descendants, EXIT_GRACE_S)
        for process in (survivors := _alive(self.descendants)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _wait_gone(survivors, KILL_TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe and not pipe.closed:
                pipe.close()
        self.errors.unlink(missing_ok=True)


def _children(pid: int) -> Sequence[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _alive(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """The processes still running, with their current children."""
    alive = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive |= {process, *_children(process.pid)}
    return alive


def _wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    """Wait until all are gone. Zombies count as gone: nobody may be there to reap them."""
    deadline = time.monotonic() + timeout_s
    while _alive(processes) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _has_title(process: psutil.Process, title: str) -> bool:
    try:
        return " ".join(process.cmdline()).startswith(title)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
