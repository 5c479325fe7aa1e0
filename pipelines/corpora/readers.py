"""Annotation files as streams of rows: JSON lists, JSON lines, CSV, plain lines.

A reader yields `(number, row)`, the number counting from 1: the line of a text file, the element of a
JSON list. One row is in memory at a time, whatever the size of the file. A row that cannot be read is
yielded as the `RowFault` it is; a file that is something else altogether raises one `CorpusError`.

Text is UTF-8, with or without a byte order mark, with any line ends. Bytes that are not UTF-8 come
through as lone surrogates, so that the row that holds them can be refused and the rest kept.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from r2scp.pipelines.corpora.values import RejectReason, InvalidRow, excerpt
from r2scp.store.errors import CorpusError

CHUNK = 1 << 16  # characters read at once from a JSON list
MAX_ROW = 1 << 20  # characters: a real row has a few hundred
HEAD_BYTES = 4096  # bytes looked at before a file is read as text
BINARY_SHARE = 20  # a file of which more than 1/20 are control characters is no text (random bytes: 1/9)

NumberedRows = Iterator[tuple[int, object]]
Reader = Callable[[Path, str], NumberedRows]

_BLANKS = re.compile(r"[ \t\r\n]*")  # what JSON calls white space
_AFTER_NUMBER = frozenset(" \t\r\n,]")  # anything else, or nothing yet, and its digits may go on
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_OTHER_FORMATS = (  # first bytes, what they mean, what to do
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"version https://git-lfs", "a git-lfs pointer", "fetch the file itself with `git lfs pull`"),
    (b"<", "an HTML or XML page", "download the file itself, not the page about it"),
)


def json_rows(path: Path, expects: str) -> NumberedRows:
    """Elements of a JSON list, or values of a JSON-lines file: whichever `path` is."""
    with _open_text(path, expects) as stream:
        window = _JsonWindow(stream)
        first = window.next_char()
        if first == "[":
            window.skip()
            yield from _list_elements(path, expects, window)
        elif first == "{":
            stream.seek(0)
            for number, line in _lines(path, expects, stream):
                yield number, _json_value(line)
        else:
            shown = excerpt(window.rest())
            raise wrong_file(path, expects, f"neither a JSON list nor JSON lines (it begins with {shown!r})")


def csv_lines(path: Path, expects: str) -> NumberedRows:
    """Cells (list of str) of each line. A quote must close on its own line, so that a stray one costs
    one row and not the rest of the file."""
    with _open_text(path, expects) as stream:
        for number, line in _lines(path, expects, stream):
            try:
                yield number, next(csv.reader((line,), strict=True, skipinitialspace=True))
            except csv.Error as error:
                yield number, InvalidRow(RejectReason.NOT_CSV, f"{error}: {excerpt(line.rstrip())}")


def csv_records(path: Path, expects: str, columns: Sequence[str]) -> NumberedRows:
    """Rows (dict of str) of a CSV file with a header, tab-separated where it is called `.tsv`.

    The header may name any of `columns`, in any order, and must name the first. Cells may hold line
    breaks, as spreadsheets write them.
    """
    with _open_text(path, expects) as stream:
        lines = (line for _, line in _lines(path, expects, stream))
        reader = csv.reader(lines, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = [name.strip().lower() for name in next(reader, [])]
        unknown = [name for name in header if name not in columns]
        if columns[0] not in header or unknown or len(set(header)) != len(header):
            raise wrong_file(path, expects, f"a header of {excerpt(', '.join(header), 200)}")
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error) or "field limit" in str(error):
                    came = f"a quote that never closes (noticed on line {reader.line_num})"
                    raise wrong_file(path, expects, came) from error
                yield reader.line_num, InvalidRow(RejectReason.NOT_CSV, str(error))
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                detail = f"must have {len(header)} cells, got {len(cells)}"
                yield reader.line_num, InvalidRow(RejectReason.WRONG_COLUMNS, detail)
            else:
                yield reader.line_num, dict(zip(header, cells, strict=True))


def wrong_file(path: Path, expects: str, got: str) -> CorpusError:
    """The one error for a file that is something else altogether."""
    return CorpusError(f"{excerpt(str(path), 300)}: must be {expects}; got {got}")


def _open_text(path: Path, expects: str) -> TextIO:
    """`path` opened as text, once its first bytes show that it is text."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise wrong_file(path, expects, "something that is not a regular file")
        with path.open("rb") as raw:
            head = raw.read(HEAD_BYTES)
    except OSError as error:
        raise wrong_file(path, expects, f"an error: {error.strerror}") from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    shown = excerpt(head[:40].decode("utf-8", "backslashreplace"))
    if not text and os.path.getsize(path) <= HEAD_BYTES:
        raise wrong_file(path, expects, "an empty file")
    for magic, meaning, remedy in _OTHER_FORMATS:
        if text.startswith(magic) or head.startswith(magic):
            raise wrong_file(path, expects, f"{meaning} (it begins with {shown!r}); {remedy}")
    if len(_BINARY.findall(head)) * BINARY_SHARE > len(head):
        raise wrong_file(path, expects, f"binary data (it begins with {shown!r})")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=None)


def _lines(path: Path, expects: str, stream: TextIO) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    number = 0
    while line := stream.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            came = f"more than {MAX_ROW} characters on line {number}: {excerpt(line)}"
            raise wrong_file(path, expects, came)
        if not line.isspace():
            yield number, line


def _json_value(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InvalidRow(RejectReason.NOT_JSON, f"{error}: {excerpt(line.strip())}")


def _list_elements(path: Path, expects: str, window: "_JsonWindow") -> NumberedRows:
    """What stands between the brackets, the opening one being read already."""
    number, mark = 0, window.next_char()
    if mark == "]":
        window.skip()
    while mark != "]":
        number += 1
        try:
            value = window.value()
        except (ValueError, RecursionError) as error:
            cut = "; is the file cut off?" if window.ended else ""
            came = f"a list whose element {number} is no JSON ({excerpt(str(error))}){cut}"
            raise wrong_file(path, expects, came) from error
        yield number, value
        mark = window.next_char()
        window.skip()
        if mark not in {",", "]"}:
            came = excerpt(f"{mark!r}" if mark else "the end of the file")
            raise wrong_file(path, expects, f"{came} after element {number}, where ',' or ']' must be")
    if after := window.next_char():
        raise wrong_file(path, expects, f"{excerpt(after)!r} after the end of its list")


class _JsonWindow:
    """The part of a JSON text that is read but not yet used: one chunk, or one row if that is longer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self.ended = False

    def next_char(self) -> str:
        """The next character that is not blank, left unread; "" at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def rest(self) -> str:
        """What is read and not yet used."""
        return self._text[self._at :]

    def value(self) -> object:
        """The next value. Raises ValueError where there is none, or none within `MAX_ROW`."""
        self.next_char()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError:
                if len(self._text) - self._at > MAX_ROW or not self._more():
                    raise
                continue
            length = end - self._at
            whole = not isinstance(value, (int, float)) or self._text[end : end + 1] in _AFTER_NUMBER
            if whole or len(self._text) - self._at > MAX_ROW or not self._more():
                self._at += length
                return value

    def _more(self) -> bool:
        chunk = self._stream.read(CHUNK)
        self._text = self._text[self._at :] + chunk
        self._at = 0
        self.ended = not chunk
        return bool(chunk)
