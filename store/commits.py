"""The commit protocol: workers stage fragments, one driver commits them.

A worker writes rows into data files that no table version names yet (`stage`) and returns only their
description. The driver turns any number of descriptions into one new version (`commit`), which replaces rows
of the same keys. So a reader sees a batch of rows whole or not at all, a crash between the two leaves only
files that no version names (cleaning removes them), and no key is in the table twice.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata, write_fragments

from r2scp.store.errors import StoreError

IDS_PER_PREDICATE = 2_000  # keeps one SQL predicate far below the parser's limits
_LANCE_SOURCE = re.compile(r",? ?/\S+\.rs:\d+:\d+")  # a place in Lance's own source, useless to our users


@contextmanager
def lance_errors(action: str, uri: str) -> Iterator[None]:
    """Lance's errors (OSError, ValueError, RuntimeError) as `StoreError`: one line that says what failed."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        message = " ".join(_LANCE_SOURCE.sub("", str(error)).split())
        raise StoreError(f"cannot {action} {uri}: {message}") from error


@dataclass(frozen=True, kw_only=True)
class TableAddress:
    """Where one Lance dataset is stored and what its rows look like. Picklable, for workers."""

    uri: str
    schema: pa.Schema
    storage_options: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold secrets

    @property
    def key(self) -> str:
        """Name of the primary key column: the schema's first."""
        return self.schema.names[0]

    def open(self, version: int | str | None = None) -> lance.LanceDataset:
        """The dataset at a version number or tag, by default the latest. Raises `StoreError`."""
        with lance_errors("open", self.uri):
            return self._open(version)

    def _open(self, version: int | str | None = None) -> lance.LanceDataset:
        return lance.dataset(self.uri, version=version, storage_options=dict(self.storage_options))

    def exists(self) -> bool:
        """Whether the dataset exists. Raises `StoreError` if that cannot be determined."""
        with lance_errors("open", self.uri):
            try:
                self._open()
            except ValueError as error:  # also raised by Lance for other faults
                if "was not found" in str(error):
                    return False
                raise
        return True

    def create(self) -> lance.LanceDataset:
        """Create an empty dataset at version 1, or open an existing one. Raises `StoreError`.

        A strict commit (`max_retries=0`), since `lance.write_dataset(mode="create")` may write a second,
        empty version over what a faster process has created and begun to fill.
        """
        empty = lance.LanceOperation.Overwrite(self.schema, [])
        with lance_errors("create", self.uri):
            try:
                return lance.LanceDataset.commit(
                    self.uri,
                    empty,
                    read_version=0,
                    max_retries=0,
                    enable_v2_manifest_paths=True,
                    storage_options=dict(self.storage_options),
                )
            except (OSError, ValueError):
                if self.exists():
                    return self._open()
                raise


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Rows in data files that no version names yet."""

    ids: tuple[str, ...]
    fragments: tuple[str, ...]  # Lance's own JSON

    def to_json(self) -> str:
        return json.dumps({"ids": self.ids, "fragments": self.fragments})

    @classmethod
    def from_json(cls, text: str) -> "Staged":
        record = json.loads(text)
        return cls(ids=tuple(record["ids"]), fragments=tuple(record["fragments"]))


def stage(address: TableAddress, rows: pa.Table) -> Staged:
    """Write `rows` into new data files of the table at `address`; no version changes.

    Raises `pa.ArrowInvalid` if the rows do not fit the table's schema, `StoreError` if they cannot be
    written.
    """
    ids = tuple(rows.column(address.key).to_pylist())
    if not ids:
        return Staged(ids=(), fragments=())
    rows = rows.cast(address.schema)
    with lance_errors("write to", address.uri):
        fragments = write_fragments(
            rows,
            address.uri,
            schema=address.schema,
            mode="append",
            storage_options=dict(address.storage_options),
        )
    return Staged(ids=ids, fragments=tuple(json.dumps(f.to_json()) for f in fragments))


def commit(
    address: TableAddress,
    staged: Sequence[Staged],
    properties: Mapping[str, str],
    also_delete: Iterable[str] = (),
) -> int:
    """Make staged rows part of the table, in one new version, replacing rows of the same keys.

    `also_delete` names further keys to delete in the same version. If there is nothing to add and nothing to
    delete, no version is written. Returns the table's version afterwards.

    Raises ValueError if a key is staged twice, as the caller has then lost track of what is in flight;
    `StoreError` if the commit fails.
    """
    ids = [key for batch in staged for key in batch.ids]
    if len(set(ids)) != len(ids):
        duplicates = sorted({key for key in ids if ids.count(key) > 1})
        raise ValueError(f"rows staged twice in one commit: {duplicates[:3]}")
    added = [FragmentMetadata.from_json(text) for batch in staged for text in batch.fragments]
    deleted = list(dict.fromkeys([*ids, *also_delete]))
    with lance_errors("write to", address.uri):
        return _commit(address, added, deleted, dict(properties))


def _commit(
    address: TableAddress, added: list[FragmentMetadata], deleted: Sequence[str], properties: dict[str, str]
) -> int:
    dataset = address.open()
    removed, updated = _delete(dataset, address.key, deleted)
    if not (added or removed or updated):
        return dataset.version
    if removed or updated:
        operation = lance.LanceOperation.Update(
            removed_fragment_ids=removed, updated_fragments=updated, new_fragments=added
        )
    else:
        operation = lance.LanceOperation.Append(added)
    transaction = lance.Transaction(
        read_version=dataset.version, operation=operation, transaction_properties=properties
    )
    return lance.LanceDataset.commit(
        dataset, transaction, storage_options=dict(address.storage_options)
    ).version


def _delete(
    dataset: lance.LanceDataset, key: str, ids: Sequence[str]
) -> tuple[list[int], list[FragmentMetadata]]:
    """Fragments left without rows, and fragments with new deletion files, after deleting distinct `ids`."""
    by_fragment: dict[int, list[str]] = {}
    if dataset.count_rows() == 0:
        return [], []
    for start in range(0, len(ids), IDS_PER_PREDICATE):
        where = sql_in(key, ids[start : start + IDS_PER_PREDICATE])
        rows = dataset.scanner(columns=[key], filter=where, with_row_address=True).to_table()
        for value, address in zip(rows[key].to_pylist(), rows["_rowaddr"].to_pylist(), strict=True):
            by_fragment.setdefault(address >> 32, []).append(value)
    removed, updated = [], []
    for fragment_id, values in sorted(by_fragment.items()):
        fragment = dataset.get_fragment(fragment_id)
        assert fragment is not None  # the scan of this very version named it
        if fragment.count_rows() == len(values):
            removed.append(fragment_id)
        else:
            updated.append(fragment.delete(sql_in(key, values)))
    return removed, updated


def sql_literal(text: str) -> str:
    """`text` as an SQL string literal: whatever it holds, it stays a string."""
    return "'" + text.replace("'", "''") + "'"


def sql_in(column: str, values: Iterable[str]) -> str:
    """The SQL condition that a column has one of some values, of which there must be at least one."""
    return f"{column} IN ({', '.join(map(sql_literal, values))})"
