"""A supervised program cannot hang, flood, outlive or starve its supervisor.

The programs are small shell scripts that really misbehave; what is left of them is looked up in the
process table.
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
    """Runs a shell script; `$1`, `$2`, ... are the descriptors of its data pipes."""

    def command(pipes: Sequence[int]) -> list[str]:
        return ["/bin/sh", "-c", script, "sh", *map(str, pipes)]

    limits = Limits(
        deadline=time.monotonic() + seconds,
        memory_bytes=1 << 30,
        pipe_bytes=pipe_bytes,
        stderr_bytes=stderr_bytes,
    )
    return supervise(command, limits)


def is_gone(pid: int, timeout_s: float = 10.0) -> bool:
    """Whether the process ends within the timeout (its new parent may not have reaped it)."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                continue
        return True
    return False


def test_every_pipe_arrives_whole_and_separately() -> None:
    script = "head -c 3000000 /dev/zero >/dev/fd/$2; printf abc >/dev/fd/$1; echo words >&2; exit 7"
    result = run(script, pipe_bytes=(10, 3_000_000))
    assert (bytes(result.pipes[0]), len(result.pipes[1]), result.stderr) == (b"abc", 3_000_000, "words\n")
    assert (result.returncode, result.stopped) == (7, None)


def test_of_a_long_log_only_the_end_is_kept() -> None:
    result = run("yes complaint | head -c 30000000 >&2; echo last words >&2", stderr_bytes=1000)
    assert len(result.stderr) == 1000
    assert result.stderr.endswith("complaint\nlast words\n")


def test_a_flood_is_stopped() -> None:
    result = run("exec cat /dev/zero >/dev/fd/$1", pipe_bytes=(1_000_000,))
    assert result.stopped is StopReason.FLOOD
    assert result.returncode == -signal.SIGKILL
    assert 1_000_000 < len(result.pipes[0]) < 4_000_000


@pytest.mark.parametrize("closing", ["", "exec 2>&- 1>&-;"], ids=["silent", "hung up"])
def test_a_hang_ends_at_the_deadline_with_all_descendants(closing: str) -> None:
    script = f'(trap "" TERM INT; exec sleep 600) & echo $! >/dev/fd/$1; {closing} sleep 600'
    started = time.monotonic()
    result = run(script, seconds=0.5, pipe_bytes=(100,))
    assert time.monotonic() - started < 10
    assert result.stopped is StopReason.TIMEOUT
    assert result.returncode == -signal.SIGKILL
    assert is_gone(int(result.pipes[0]))


def test_the_program_has_no_input_and_none_of_our_files() -> None:
    with open("/dev/null") as ours:
        os.set_inheritable(ours.fileno(), False)
        script = f"cat >/dev/fd/$1; ls -l /proc/self/fd/{ours.fileno()} >&2 || echo none >/dev/fd/$1"
        result = run(script, pipe_bytes=(100,))
    assert bytes(result.pipes[0]) == b"none\n"


def test_the_program_cannot_write_files_or_dump_core(tmp_path: os.PathLike) -> None:
    target = os.path.join(tmp_path, "written")
    result = run(f"sleep 0.2; head -c 100 /dev/zero > {target}; ulimit -c >&2")
    assert os.path.getsize(target) == 0
    assert result.stderr.splitlines()[-1] == "0"


def test_a_misbehaving_program_leaves_no_zombie_and_no_descriptor() -> None:
    others = set(psutil.Process().children())
    before = len(os.listdir("/proc/self/fd"))
    for script in ("kill -SEGV $$", "exit 1", "exec cat /dev/zero >/dev/fd/$1"):
        run(script, pipe_bytes=(1000,))
    limits = Limits(deadline=time.monotonic() + 9, memory_bytes=1 << 30, pipe_bytes=(1,), stderr_bytes=1)
    with pytest.raises(FileNotFoundError):
        supervise(lambda pipes: ["/nowhere"], limits)
    assert len(os.listdir("/proc/self/fd")) == before
    assert set(psutil.Process().children()) <= others, "of what this test started, not even a zombie is left"


def test_an_interrupt_of_the_supervisor_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = {child.pid for child in psutil.Process().children()}
    monkeypatch.setattr("r2scp.pipelines.decoding.sandbox._drain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("sleep 600")
    assert {child.pid for child in psutil.Process().children()} <= before
