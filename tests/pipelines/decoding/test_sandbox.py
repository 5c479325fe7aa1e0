"""Proves that a supervised program cannot hang, flood, outlive or starve its supervisor.

The programs are small shell scripts that misbehave for real; what is left of them is looked up in
the process table.
"""

import contextlib
import os
import signal
import time
from collections.abc import Sequence

import psutil
import pytest

from r2scp.pipelines.decoding.sandbox import Limits, RunResult, StopReason, supervise


def run(
    script: str, *, seconds: float = 20.0, pipe_bytes: tuple[int, ...] = (), stderr_bytes: int = 4096
) -> RunResult:
    """Runs a shell script; `$1`, `$2`, ... are the numbers of its data pipes."""

    def compose(pipes: Sequence[int]) -> list[str]:
        return ["/bin/sh", "-c", script, "sh", *map(str, pipes)]

    bounds = Limits(
        deadline=time.monotonic() + seconds,
        memory_bytes=1 << 30,
        pipe_bytes=pipe_bytes,
        stderr_bytes=stderr_bytes,
    )
    return supervise(compose, bounds)


def gone(pid: int, patience: float = 10.0) -> bool:
    """Whether the process is dead, or soon is (its new parent may not have reaped it)."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                continue
        return True
    return False


def test_all_pipes_arrive_whole_and_apart() -> None:
    script = "head -c 3000000 /dev/zero >/dev/fd/$2; printf abc >/dev/fd/$1; echo words >&2; exit 7"
    done = run(script, pipe_bytes=(10, 3_000_000))
    assert (bytes(done.pipes[0]), len(done.pipes[1]), done.stderr) == (b"abc", 3_000_000, "words\n")
    assert (done.returncode, done.stopped) == (7, None)


def test_of_endless_complaints_only_the_end_is_kept() -> None:
    done = run("yes complaint | head -c 30000000 >&2; echo last words >&2", stderr_bytes=1000)
    assert len(done.stderr) == 1000
    assert done.stderr.endswith("complaint\nlast words\n")


def test_a_flood_is_stopped() -> None:
    done = run("exec cat /dev/zero >/dev/fd/$1", pipe_bytes=(1_000_000,))
    assert done.stopped is StopReason.FLOOD
    assert done.returncode == -signal.SIGKILL
    assert 1_000_000 < len(done.pipes[0]) < 4_000_000


@pytest.mark.parametrize("closing", ["", "exec 2>&- 1>&-;"], ids=["silent", "hung up"])
def test_a_hang_ends_at_the_deadline_with_all_descendants(closing: str) -> None:
    script = f'(trap "" TERM INT; exec sleep 600) & echo $! >/dev/fd/$1; {closing} sleep 600'
    started = time.monotonic()
    done = run(script, seconds=0.5, pipe_bytes=(100,))
    assert time.monotonic() - started < 10
    assert done.stopped is StopReason.TIMEOUT
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.pipes[0]))


def test_it_has_neither_terminal_nor_input_nor_our_files() -> None:
    with open("/dev/null") as ours:
        os.set_inheritable(ours.fileno(), False)
        script = f"cat >/dev/fd/$1; ls -l /proc/self/fd/{ours.fileno()} >&2 || echo none >/dev/fd/$1"
        done = run(script, pipe_bytes=(100,))
    assert bytes(done.pipes[0]) == b"none\n"


def test_it_may_not_write_files_or_dump_core(tmp_path: os.PathLike) -> None:
    target = os.path.join(tmp_path, "written")
    done = run(f"sleep 0.2; head -c 100 /dev/zero > {target}; ulimit -c >&2")
    assert os.path.getsize(target) == 0
    assert done.stderr.splitlines()[-1] == "0"


def test_a_reckless_program_leaves_no_zombie_and_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for script in ("kill -SEGV $$", "exit 1", "exec cat /dev/zero >/dev/fd/$1"):
        run(script, pipe_bytes=(1000,))
    bounds = Limits(deadline=time.monotonic() + 9, memory_bytes=1 << 30, pipe_bytes=(1,), stderr_bytes=1)
    with pytest.raises(FileNotFoundError):
        supervise(lambda pipes: ["/nowhere"], bounds)
    assert len(os.listdir("/proc/self/fd")) == before
    children = psutil.Process().children()
    assert psutil.STATUS_ZOMBIE not in {child.status() for child in children}


def test_an_exception_in_our_own_code_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while reading must not leave the program running."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    known = {child.pid for child in psutil.Process().children()}
    monkeypatch.setattr("r2scp.pipelines.decoding.sandbox._drain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("sleep 600")
    assert {child.pid for child in psutil.Process().children()} <= known
