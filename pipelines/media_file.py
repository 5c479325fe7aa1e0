"""Whether a file is still the same: its identity in the file system, and the digest of its content."""

import hashlib
import os
import stat
from dataclasses import dataclass

from r2scp.store.errors import FailureReason, MediaError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The content of one file, and its size and modification time when it was read."""

    sha256: str
    bytes: int
    mtime_ns: int


def file_identity(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Changes when a file is replaced, written to or given other permissions; None where there is no file."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def file_digest(path: str | os.PathLike[str]) -> FileDigest:
    """Hash one regular file. Raises `MediaError` where it cannot be read."""
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise MediaError(FailureReason.UNREADABLE, "not a regular file")
        with open(path, "rb") as stream:
            facts = os.fstat(stream.fileno())
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(FailureReason.UNREADABLE, reason) from error
    return FileDigest(digest.hexdigest(), facts.st_size, facts.st_mtime_ns)
