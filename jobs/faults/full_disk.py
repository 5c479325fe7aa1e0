"""A private disk that can be filled: a tmpfs, if this user may mount one.

A guard process mounts it and unmounts it when its standard input ends, so it also goes when the process
that asked for it is killed.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_BYTES = 256 << 20
COMMAND_TIMEOUT_S = 30  # per mount or umount
FILLER = "ballast"


@contextmanager
def mounted_disk(folder: Path) -> Iterator[bool]:
    """Mount a tmpfs on `folder` for the duration; yields False if that is not possible."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        yield False
        return
    command = [sys.executable, "-m", "r2scp.jobs.faults.full_disk", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        try:
            yield guard.stdout.readline().strip() == "mounted"
        finally:
            with suppress(OSError):
                guard.stdin.close()
            guard.wait(3 * COMMAND_TIMEOUT_S)


@contextmanager
def fill_disk(folder: Path, free_bytes: int) -> Iterator[None]:
    """Leave no more than `room` bytes free on the disk mounted at `folder`."""
    path = folder / FILLER
    try:
        with open(path, "wb") as stream:
            state = os.statvfs(folder)
            size = state.f_bavail * state.f_frsize - free_bytes
            if size > 0:
                os.posix_fallocate(stream.fileno(), 0, size)
        yield
    finally:
        path.unlink(missing_ok=True)


def main() -> None:
    """Mount, report it, wait for the end of standard input, unmount. `sys.argv[1]`: the folder."""
    folder = sys.argv[1]
    size = f"size={DISK_BYTES},mode=0700"
    if not _succeeds("mount", "-t", "tmpfs", "-o", size, "r2scp-crash-test", folder):
        print("refused", flush=True)
        return
    print("mounted", flush=True)
    sys.stdin.read()
    if not _succeeds("umount", folder):
        _succeeds("umount", "-l", folder)  # still in use: detach it now, it goes with its last user


def _succeeds(*words: str) -> bool:
    try:
        result = subprocess.run(words, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


if __name__ == "__main__":
    main()
