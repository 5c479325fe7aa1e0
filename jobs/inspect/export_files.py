"""Rows as Parquet files of bounded size, written with bounded memory, and names that files may have."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_BYTES = 32 << 20  # of Arrow data, held until they are written
FILE_BYTES = 512 << 20  # of Arrow data: what one file holds at most, but for one row group
PLAIN = re.compile(r"[A-Za-z0-9_]{1,64}")
RESERVED = frozenset({"all"})  # `datasets` takes it for all splits together
UNNAMED, NULL = "unnamed", "none"  # what names of splits begin with that have no letters
HASHED = 8  # hexadecimal digits behind a name that had to be changed


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much is held, and how much goes into one file; bytes of Arrow data."""

    row_group_bytes: int = ROW_GROUP_BYTES
    file_bytes: int = FILE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One finished file."""

    path: Path
    rows: int
    bytes: int


def file_names(splits: Iterable[str | None]) -> dict[str | None, str]:
    """Split -> a name that files on any system and `datasets` may have; no two are the same in lower case.

    A split whose own name will do keeps it; the others get what letters they have, and a hash.
    """
    names: dict[str | None, str] = {}
    taken: set[str] = set(RESERVED)
    wanted = sorted(set(splits), key=_claim)
    for split in wanted:
        name, digits = split or "", HASHED
        if _changed(split) or name.lower() in taken:
            digest = hashlib.sha256(b"null" if split is None else b"=" + split.encode()).hexdigest()
            stem = re.sub(r"[^A-Za-z0-9]+", "_", split or "").strip("_")[:40]
            stem = stem or (NULL if split is None else UNNAMED)
            while (name := f"{stem}_{digest[:digits]}").lower() in taken:
                digits += 1
        taken.add(name.lower())
        names[split] = name
    return names


def _claim(split: str | None) -> tuple[bool, bool, str, bool]:
    """Who comes first gets the name: "train" before "Train"."""
    name = split or ""
    return _changed(split), name != name.lower(), name, split is None


def _changed(split: str | None) -> bool:
    return split is None or not PLAIN.fullmatch(split) or split.lower() in RESERVED


def portable(schema: pa.Schema) -> pa.Schema:
    """A table's schema without what only Lance understands."""
    return pa.schema([pa.field(field.name, field.type) for field in schema])


def write_files(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: Path, name: str, limits: Limits
) -> list[Written]:
    """Write `{name}-00000-of-0000N.parquet` files below `folder`; none where there are no rows.

    Rows keep their order. Raises OSError where the disk does not take them.
    """
    parts: list[tuple[Path, int]] = []
    writer: _File | None = None
    try:
        for table in _row_groups(batches, schema, limits.row_group_bytes):
            if writer is None:
                folder.mkdir(parents=True, exist_ok=True)
                writer = _File(folder / f"{name}-{len(parts):05d}.part", schema)
            writer.write(table)
            if writer.bytes >= limits.file_bytes:
                parts.append(writer.finish())
                writer = None
        if writer is not None:
            parts.append(writer.finish())
            writer = None
    finally:
        if writer is not None:
            writer.close()
    written = []
    for at, (part, rows) in enumerate(parts):
        path = part.with_name(f"{name}-{at:05d}-of-{len(parts):05d}.parquet")
        part.rename(path)
        written.append(Written(path=path, rows=rows, bytes=path.stat().st_size))
    return written


def _row_groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema, most: int) -> Iterator[pa.Table]:
    """Rows gathered until they have `most` bytes; the last may have fewer."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        if not batch.num_rows:
            continue
        held.append(batch)
        count += batch.nbytes
        if count >= most:
            yield _table(held, schema)
            held, count = [], 0
    if held:
        yield _table(held, schema)


def _table(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches([batch.select(schema.names) for batch in batches]).cast(schema)


class _File:
    """One Parquet file as it grows; `bytes` of Arrow data are in it."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.bytes = self.rows = 0
        self._path = path
        self._file = path.open("wb")
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        self._writer = pq.ParquetWriter(
            self._file,
            schema,
            compression="zstd",
            use_dictionary=texts,  # embeddings never repeat
            write_statistics=texts,
        )

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=table.num_rows)
        self.bytes += table.nbytes
        self.rows += table.num_rows

    def finish(self) -> tuple[Path, int]:
        """(path, rows), once the disk has them."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._path, self.rows

    def close(self) -> None:
        """Give up: what is there stays half."""
        self._file.close()
