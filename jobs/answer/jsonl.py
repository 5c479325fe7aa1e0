"""Questions as JSON lines, and what is wrong with a line that is none."""

import json
import os
from collections.abc import Iterator, Mapping

from r2scp.jobs.answer.records import Ask, Refused
from r2scp.jobs.settings import built
from r2scp.store.errors import UsageError

CHUNK = 1 << 16  # bytes read at a time
LONGEST = 1 << 20  # bytes of a line


def asked_lines(descriptor: int) -> Iterator[Ask | Refused]:
    """An `Ask` for each line that can be read from a file descriptor, `Refused` for a line that is none.

    A line is `{"video": ..., "question": ...}` and, where wanted, the other fields of `Ask`. Blank lines are
    passed over. Each comes as soon as its line is whole. Raises `UsageError` where it cannot be read.
    """
    for number, line in enumerate(_lines(descriptor), start=1):
        if line is None:
            yield _refused(number, f"a line must have at most {LONGEST} bytes")
        elif line.strip():
            yield _ask(number, line)


def _ask(number: int, line: bytes) -> Ask | Refused:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _refused(number, f"it must be one JSON object; {error}")
    if not isinstance(values, Mapping):
        return _refused(number, f"it must be one JSON object; got {type(values).__name__}")
    known = {name: values[name] for name in ("id", "video", "question") if isinstance(values.get(name), str)}
    if isinstance(values.get("id"), int | float):  # numbers are as good as names
        values = dict(values) | {"id": str(values["id"])}
        known["id"] = values["id"]
    try:
        return built(Ask, values, f"line {number}")
    except UsageError as error:
        return Refused(reason="usage", message=str(error), **known)


def _refused(number: int, message: str) -> Refused:
    return Refused(reason="usage", message=f"line {number}: {message}")


def _lines(descriptor: int) -> Iterator[bytes | None]:
    """Lines as they come; None for one that is too long."""
    begun, too_long = bytearray(), False
    while chunk := _read(descriptor):
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            begun += part
            yield None if too_long or len(begun) > LONGEST else bytes(begun)
            begun.clear()
            too_long = False
        begun += rest
        if len(begun) > LONGEST:
            begun.clear()
            too_long = True
    if begun or too_long:
        yield None if too_long else bytes(begun)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, CHUNK)
    except OSError as error:
        raise UsageError(f"the lines of questions cannot be read: {error.strerror}") from error
