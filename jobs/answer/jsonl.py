"""Requests as JSON lines, with an error for each invalid line."""

import json
import os
from collections.abc import Iterator, Mapping

from r2scp.jobs.answer.records import Rejected, Request
from r2scp.jobs.settings import from_plain
from r2scp.store.errors import UsageError

CHUNK = 1 << 16  # bytes read at a time
MAX_LINE = 1 << 20  # bytes


def read_requests(descriptor: int) -> Iterator[Request | Rejected]:
    """A `Request` for each line of a file descriptor, `Rejected` for each invalid line.

    A line is `{"video": ..., "question": ...}`, optionally with the other fields of `Request`. Blank lines
    are skipped. Each comes as soon as its line is complete. Raises `UsageError` if reading fails.
    """
    for number, line in enumerate(_lines(descriptor), start=1):
        if line is None:
            yield _rejected(number, f"a line must have at most {MAX_LINE} bytes")
        elif line.strip():
            yield _parse(number, line)


def _parse(number: int, line: bytes) -> Request | Rejected:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _rejected(number, f"it must be one JSON object; {error}")
    if not isinstance(values, Mapping):
        return _rejected(number, f"it must be one JSON object; got {type(values).__name__}")
    known = {name: values[name] for name in ("id", "video", "question") if isinstance(values.get(name), str)}
    if isinstance(values.get("id"), int | float):  # numbers are accepted, too
        values = dict(values) | {"id": str(values["id"])}
        known["id"] = values["id"]
    try:
        return from_plain(Request, values, f"line {number}")
    except UsageError as error:
        return Rejected(reason="usage", message=str(error), **known)


def _rejected(number: int, message: str) -> Rejected:
    return Rejected(reason="usage", message=f"line {number}: {message}")


def _lines(descriptor: int) -> Iterator[bytes | None]:
    """Lines as they arrive; None for a line that is too long."""
    partial, too_long = bytearray(), False
    while chunk := _read(descriptor):
        *complete, rest = chunk.split(b"\n")
        for part in complete:
            partial += part
            yield None if too_long or len(partial) > MAX_LINE else bytes(partial)
            partial.clear()
            too_long = False
        partial += rest
        if len(partial) > MAX_LINE:
            partial.clear()
            too_long = True
    if partial or too_long:
        yield None if too_long else bytes(partial)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, CHUNK)
    except OSError as error:
        raise UsageError(f"cannot read standard input: {error.strerror}") from error
