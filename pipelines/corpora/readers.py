"""Annotation files as streams of rows: JSON lists, JSON lines, CSV, plain lines.

A reader yields `(number, row)`, the number counting from 1: the line of a text file, the element of a
JSON list. A JSON list is parsed whole, up to `MAX_JSON_BYTES`; the other formats are read line by line. A
row that cannot be read is yielded as an `InvalidRow`; a file of another kind raises one `CorpusError`.

Text is UTF-8, with or without a byte order mark, with any line ends. Bytes that are not UTF-8 come
through as lone surrogates, so that the row that holds them can be refused and the rest kept.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from r2scp.pipelines.corpora.values import InvalidRow, RejectReason, excerpt
from r2scp.store.errors import CorpusError

MAX_JSON_BYTES = 128 << 20  # of a JSON list; the largest that any dataset publishes has 10 MB
MAX_LINE = 1 << 20  # characters: a real row has a few hundred
HEAD_BYTES = 4096  # examined before a file is read as text
BINARY_SHARE = 20  # a file of which more than 1/20 are control characters is no text (random bytes: 1/9)

NumberedRows = Iterator[tuple[int, object]]

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
        beginning = stream.read(HEAD_BYTES).lstrip()
        stream.seek(0)
        if beginning.startswith("["):
            yield from enumerate(_json_list(path, expects, stream), 1)
        elif beginning.startswith("{"):
            for number, line in _lines(path, expects, stream):
                yield number, _json_value(line)
        else:
            got = f"neither a JSON list nor JSON lines (it begins with {excerpt(beginning)!r})"
            raise wrong_file(path, expects, got)


def _json_list(path: Path, expects: str, stream: TextIO) -> list[object]:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        got = f"a JSON list of {size:,} bytes, more than {MAX_JSON_BYTES:,}; split it, or write JSON lines"
        raise wrong_file(path, expects, got)
    try:
        return json.load(stream)
    except (ValueError, RecursionError) as error:
        got = f"a JSON list that cannot be parsed ({excerpt(str(error))}); is the file complete?"
        raise wrong_file(path, expects, got) from error


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
                    got = f"a quote that never closes (noticed on line {reader.line_num})"
                    raise wrong_file(path, expects, got) from error
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
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            got = f"more than {MAX_LINE} characters on line {number}: {excerpt(line)}"
            raise wrong_file(path, expects, got)
        if not line.isspace():
            yield number, line


def _json_value(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InvalidRow(RejectReason.NOT_JSON, f"{error}: {excerpt(line.strip())}")
