"""Rows as Parquet files of bounded size, written with bounded memory, and safe names for the files."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r2scp.store.feature_store import read_blocks

ROW_GROUP_BYTES = 32 << 20  # of Arrow data, in memory until they are written
FILE_BYTES = 512 << 20  # of Arrow data per file, exceeded by less than a row group
PLAIN = re.compile(r"[A-Za-z0-9_]{1,64}")
RESERVED = frozenset({"all"})  # to `datasets`, all splits together
UNNAMED, NULL = "unnamed", "none"  # for splits without letters, and for null
HASH_DIGITS = 8  # behind a name that had to be changed


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Sizes of row groups and files, in bytes of Arrow data."""

    row_group_bytes: int = ROW_GROUP_BYTES
    file_bytes: int = FILE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A finished file."""

    path: Path
    rows: int
    bytes: int


def file_names(splits: Iterable[str | None]) -> dict[str | None, str]:
    """Split -> a name that is valid for files on any system and for `datasets`, unique in lower case.

    A valid name of a split is kept; other splits get their letters, and a hash.
    """
    names: dict[str | None, str] = {}
    taken: set[str] = set(RESERVED)
    for split in sorted(set(splits), key=_naming_order):
        name, digits = split or "", HASH_DIGITS
        if not _is_plain(split) or name.lower() in taken:
            digest = hashlib.sha256(b"null" if split is None else b"=" + split.encode()).hexdigest()
            stem = re.sub(r"[^A-Za-z0-9]+", "_", split or "").strip("_")[:40]
            stem = stem or (NULL if split is None else UNNAMED)
            while (name := f"{stem}_{digest[:digits]}").lower() in taken:
                digits += 1
        taken.add(name.lower())
        names[split] = name
    return names


def _naming_order(split: str | None) -> tuple[bool, bool, str, bool]:
    """The first keeps its name: "train" before "Train"."""
    name = split or ""
    return not _is_plain(split), name != name.lower(), name, split is None


def _is_plain(split: str | None) -> bool:
    return split is not None and bool(PLAIN.fullmatch(split)) and split.lower() not in RESERVED


def portable(schema: pa.Schema) -> pa.Schema:
    """A table's schema without Lance's metadata."""
    return pa.schema([pa.field(field.name, field.type) for field in schema])


def write_files(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: Path, name: str, limits: Limits
) -> list[WrittenFile]:
    """Write `{name}-00000-of-0000N.parquet` files below `folder`; none if there are no rows.

    Rows keep their order. Raises OSError if they cannot be written.
    """
    parts: list[tuple[Path, int]] = []
    writer: _ParquetFile | None = None
    try:
        non_empty = (batch for batch in batches if batch.num_rows)
        for table in read_blocks(non_empty, limits.row_group_bytes, lambda batch: batch.nbytes):
            if writer is None:
                folder.mkdir(parents=True, exist_ok=True)
                writer = _ParquetFile(folder / f"{name}-{len(parts):05d}.part", schema)
            writer.write(table.select(schema.names).cast(schema))
            if writer.bytes >= limits.file_bytes:
                parts.append(writer.finish())
                writer = None
        if writer is not None:
            parts.append(writer.finish())
            writer = None
    finally:
        if writer is not None:
            writer.abandon()
    files = []
    for at, (part, rows) in enumerate(parts):
        path = part.with_name(f"{name}-{at:05d}-of-{len(parts):05d}.parquet")
        part.rename(path)
        files.append(WrittenFile(path=path, rows=rows, bytes=path.stat().st_size))
    return files


class _ParquetFile:
    """A Parquet file in progress; `bytes` counts its Arrow data."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.bytes = self.rows = 0
        self._path = path
        self._file = path.open("wb")
        # Embeddings never repeat. The signature of ParquetWriter says bool, its documentation also a list.
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        options: dict[str, Any] = {"use_dictionary": texts, "write_statistics": texts}
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd", **options)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=table.num_rows)
        self.bytes += table.nbytes
        self.rows += table.num_rows

    def finish(self) -> tuple[Path, int]:
        """(path, rows), once they are on the disk."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._path, self.rows

    def abandon(self) -> None:
        """Close the unfinished file."""
        self._file.close()
