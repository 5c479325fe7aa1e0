"""Processes that `jobs torture` starts, strikes, and leaves nothing of."""

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

from r2scp.jobs.faults.injection import Order
from r2scp.store.errors import R2SCPError

READY_S = 240.0  # for imports and a Ray of its own, on a busy machine
POLL_S = 0.02
LEFT_S = 3.0  # that Ray's processes have to end by themselves once their driver is gone
GONE_S = 10.0  # for a killed process to be gone
START = "from r2scp.jobs.faults.injection import main; main()"  # so that workers find its classes by name
DECODE, EMBED = "ray::MapBatches(DecodeClips", "ray::MapWorker(MapBatches(EmbedClips))"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a victim ended. `code`: negative where a signal ended it; `words`: its standard error."""

    code: int
    words: str
    seconds: float  # since the order


@dataclass(kw_only=True)
class Victim:
    """One process that will run the job; made by `start`."""

    process: subprocess.Popen
    errors: Path
    family: set[psutil.Process] = field(default_factory=set)
    begun: float = 0.0
    _watch: threading.Thread | None = None

    @classmethod
    def start(cls, folder: Path, number: int, ray_folder: Path, num_workers: int) -> "Victim":
        """Begin to begin: `order` waits until it is ready."""
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        env |= {"RAY_TMPDIR": str(ray_folder), "TMPDIR": str(ray_folder), "OMP_NUM_THREADS": "1"}
        errors = folder / f"victim-{number}.log"
        with open(errors, "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-c", START, str(num_workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=env,
                cwd=folder,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        victim = cls(process=process, errors=errors)
        victim._watch = threading.Thread(target=victim._keep_count, name="victim", daemon=True)
        victim._watch.start()
        return victim

    def _keep_count(self) -> None:
        while self.process.poll() is None:
            self.family.update(_children(self.process.pid))
            time.sleep(0.1)

    def wait_ready(self) -> None:
        """Raises `R2SCPError` where it does not come up."""
        assert self.process.stdout is not None
        stdout, until = self.process.stdout, time.monotonic() + READY_S
        while time.monotonic() < until and self.process.poll() is None:
            if select.select([stdout], [], [], 1.0)[0] and stdout.readline().strip() == b"ready":
                return
        words = self.errors.read_text(errors="replace").strip().splitlines()[-1:]
        self.end()
        raise R2SCPError(f"a job to be tortured did not start ({READY_S:.0f} s at most): {words}")

    def order(self, order: Order) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.begun = time.monotonic()
        self.process.stdin.write(order.to_json().encode() + b"\n")
        self.process.stdin.close()

    def kill(self) -> bool:
        """SIGKILL; False where it had ended."""
        if self.process.poll() is not None:
            return False
        self.process.send_signal(signal.SIGKILL)
        return True

    def kill_child(self, title: str, after_s: float) -> bool:
        """SIGKILL a child of this title, some time after there is one; False where there was none."""
        found: psutil.Process | None = None
        while found is None and self.process.poll() is None:
            found = next((child for child in _children(self.process.pid) if _title(child, title)), None)
            time.sleep(POLL_S)
        if found is None:
            return False
        time.sleep(after_s)
        try:
            if not _title(found, title):
                return False
            found.kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def wait(self, limit_s: float) -> Ended | None:
        """How it ended; None where it did not within the time."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        words = self.errors.read_text(errors="replace")
        return Ended(code=code, words=words, seconds=time.monotonic() - self.begun)

    def end(self) -> None:
        """Leave nothing of it: Ray's processes get a moment to end by themselves, then are killed by id."""
        self.kill()
        self.process.wait(GONE_S)
        if self._watch:
            self._watch.join(GONE_S)
        _wait(self.family, LEFT_S)
        for process in (left := _alive(self.family)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _wait(left, GONE_S)
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
    """Those that are still there, and what they have started since."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found |= {process, *_children(process.pid)}
    return found


def _wait(processes: Iterable[psutil.Process], limit_s: float) -> None:
    """For all to be gone: orphans, which nobody may reap, count as gone once they are dead."""
    until = time.monotonic() + limit_s
    while _alive(processes) and time.monotonic() < until:
        time.sleep(POLL_S)


def _title(process: psutil.Process, title: str) -> bool:
    try:
        return " ".join(process.cmdline()).startswith(title)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
