"""The commit protocol: workers stage fragments, one driver commits them.

A worker writes rows into data files that no table version names yet (`stage`) and hands back only
their description. The driver turns any number of descriptions into one new version (`commit`), in
which the rows of the same key that they replace are gone. So a reader sees a batch of rows whole or
not at all, a crash between the two leaves files that no version names (compaction removes them), and
a row is never there twice.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata, write_fragments

from r2scp.store.errors import StoreError

IDS_PER_PREDICATE = 2_000  # keeps one SQL predicate far below the parser's limits
_LANCE_SOURCE = re.compile(r",? ?/\S+\.rs:\d+:\d+")  # where in Lance's own source; nobody's concern here


@contextmanager
def lance_errors(doing: str, uri: str) -> Iterator[None]:
    """Lance's errors (OSError, ValueError, RuntimeError) as `StoreError`: one line that says what failed."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        words = " ".join(_LANCE_SOURCE.sub("", str(error)).split())
        raise StoreError(f"cannot {doing} {uri}: {words}") from error


@dataclass(frozen=True, kw_only=True)
class TableAddress:
    """Where one Lance dataset rests and what its rows look like. Picklable: workers get it."""

    uri: str
    schema: pa.Schema
    storage_options: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold secrets

    @property
    def key(self) -> str:
        """Name of the primary key column: the schema's first."""
        return self.schema.names[0]

    def open(self, version: int | str | None = None) -> lance.LanceDataset:
        """The dataset at a version number or tag, the latest where none is given. Raises `StoreError`."""
        with lance_errors("open", self.uri):
            return self._opened(version)

    def _opened(self, version: int | str | None = None) -> lance.LanceDataset:
        return lance.dataset(self.uri, version=version, storage_options=dict(self.storage_options))

    def exists(self) -> bool:
        """Whether there is such a dataset. Raises `StoreError` where that cannot be told."""
        with lance_errors("open", self.uri):
            try:
                self._opened()
            except ValueError as error:  # what Lance raises where there is no dataset
                if "was not found" in str(error):
                    return False
                raise
        return True

    def create(self) -> lance.LanceDataset:
        """An empty dataset at version 1; opens it where another process was first. Raises `StoreError`.

        A strict commit (`max_retries=0`): `lance.write_dataset(mode="create")` may write a second, empty
        version over what a faster process has created and begun to fill.
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
                    return self._opened()
                raise


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Rows that rest in data files and in no version yet."""

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

    Raises `pa.ArrowInvalid` where the rows do not fit the table's schema, `StoreError` where the store does
    not take them.
    """
    ids = tuple(rows.column(address.key).to_pylist())
    if not ids:
        return Staged(ids=(), fragments=())
    fitting = rows.cast(address.schema)
    with lance_errors("write to", address.uri):
        fragments = write_fragments(
            fitting,
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
    """Make staged rows part of the table, in one new version, in place of rows with the same key.

    `also_delete` names further keys whose rows go in the same version. Where there is nothing to add
    and nothing to delete, no version is written. Returns the version the table then has.

    Raises ValueError when one key is staged twice: the caller lost track of what is in flight; `StoreError`
    where the store does not take the commit.
    """
    ids = [key for batch in staged for key in batch.ids]
    if len(set(ids)) != len(ids):
        twice = sorted({key for key in ids if ids.count(key) > 1})
        raise ValueError(f"rows staged twice in one commit: {twice[:3]}")
    added = [FragmentMetadata.from_json(text) for batch in staged for text in batch.fragments]
    gone = list(dict.fromkeys([*ids, *also_delete]))
    with lance_errors("write to", address.uri):
        return _commit(address, added, gone, dict(properties))


def _commit(
    address: TableAddress, added: list[FragmentMetadata], gone: Sequence[str], properties: dict[str, str]
) -> int:
    dataset = address.open()
    removed, updated = _without(dataset, address.key, gone)
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


def _without(
    dataset: lance.LanceDataset, key: str, ids: Sequence[str]
) -> tuple[list[int], list[FragmentMetadata]]:
    """Fragments that vanish and fragments with new deletion files once `ids`, each named once, are gone."""
    hit: dict[int, list[str]] = {}
    if dataset.count_rows() == 0:
        return [], []
    for chunk in _chunks(ids, IDS_PER_PREDICATE):
        scanner = dataset.scanner(columns=[key], filter=sql_in(key, chunk), with_row_address=True)
        found = scanner.to_table()
        for value, address in zip(found[key].to_pylist(), found["_rowaddr"].to_pylist(), strict=True):
            hit.setdefault(address >> 32, []).append(value)
    removed, updated = [], []
    for fragment_id, values in sorted(hit.items()):
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


def _chunks(values: Sequence[str], size: int) -> Iterator[list[str]]:
    stream = iter(values)
    while chunk := list(islice(stream, size)):
        yield chunk
