"""Files on the local disk that are written whole or not at all."""

import os
from pathlib import Path

from r2scp.store.errors import R2SCPError


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, even if the machine crashes. Raises `R2SCPError`."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise R2SCPError(f"cannot write {path}: {error.strerror}; it is unchanged") from error
