"""A disk of one's own that can run full: a tmpfs, where this user may mount one.

Another process mounts it, and takes it away again when its standard input ends: so it goes also when whoever
asked for it is killed.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_BYTES = 256 << 20
COMMAND_LIMIT_S = 30  # of one mount or umount
BALLAST = "ballast"


@contextmanager
def own_disk(folder: Path) -> Iterator[bool]:
    """Mount a tmpfs on `folder` for a while; False where that cannot be done."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        yield False
        return
    words = [sys.executable, "-m", "r2scp.jobs.faults.full_disk", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        try:
            yield guard.stdout.readline().strip() == "mounted"
        finally:
            with suppress(OSError):
                guard.stdin.close()
            guard.wait(3 * COMMAND_LIMIT_S)


@contextmanager
def filled(folder: Path, room: int) -> Iterator[None]:
    """Leave no more than `room` bytes free on the disk that `folder` is the top of."""
    path = folder / BALLAST
    try:
        with open(path, "wb") as stream:
            state = os.statvfs(folder)
            size = state.f_bavail * state.f_frsize - room
            if size > 0:
                os.posix_fallocate(stream.fileno(), 0, size)
        yield
    finally:
        path.unlink(missing_ok=True)


def main() -> None:
    """Mount, say so, wait for the end of standard input, unmount. `sys.argv[1]`: the folder."""
    folder = sys.argv[1]
    size = f"size={DISK_BYTES},mode=0700"
    if not _done("mount", "-t", "tmpfs", "-o", size, "r2scp-torture", folder):
        print("refused", flush=True)
        return
    print("mounted", flush=True)
    sys.stdin.read()
    if not _done("umount", folder):
        _done("umount", "-l", folder)  # somebody is still in there: out of sight, and gone with them


def _done(*words: str) -> bool:
    try:
        ran = subprocess.run(words, capture_output=True, timeout=COMMAND_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ran.returncode == 0


if __name__ == "__main__":
    main()
