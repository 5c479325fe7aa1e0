"""`TokenReader`: the token sequences of single rows, read by row number through a cache of bounded size.

Training visits the same clips again and again in random order. What fits into the cache is read from the
table once, the rest again whenever it is needed. Rows are numbered in the order of a scan of the version.

All cached tokens are in one array, and a row is a list of slots in it. So a whole batch, padding included, is
one gather, and any slot that becomes free fits whatever comes next.

Legend: B rows requested, L tokens of the longest of them, S slots, T tokens of a row, D their width.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from r2scp.store.commits import lance_errors
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

CACHE_BYTES = 4 << 30  # all of MUSIC-AVQA, 9,288 clips of 60 s, two modalities, D = 1024, is 2.3 GB
NO_ROW = -1  # among row numbers: nothing is requested here
PADDING_SLOT = 0  # holds a token of zeros

Key = tuple[str, int]  # column, table and version; row


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Where the tokens of some rows are, valid until the next request.

    tokens_SD float16; slots_BL int64, PADDING_SLOT behind the end of a row; lengths_B int64, 0 for a row
    without tokens.
    """

    tokens_SD: np.ndarray
    slots_BL: np.ndarray
    lengths_B: np.ndarray


class TokenCache:
    """At most `max_bytes` of tokens; the least recently used rows are evicted. Shared by several columns.

    Pages of the array that were never written to take no memory.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._slots: OrderedDict[Key, np.ndarray] = OrderedDict()  # of each row, in order
        self.clear()

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self.bytes = 0
        self._slots.clear()
        self._tokens_SD: np.ndarray | None = None
        self._unused = PADDING_SLOT + 1  # the first slot that was never written to
        self._free: list[int] = []  # slots below it that are free again

    def capacity(self, dim: int) -> int:
        """How many tokens of width `dim` fit."""
        return self.max_bytes // (dim * np.dtype(np.float16).itemsize)

    def tokens(self, dim: int) -> np.ndarray:
        """(S, D) float16: the array with all tokens. Raises ValueError for another width."""
        if self._tokens_SD is None:
            self._tokens_SD = np.empty((1 + self.capacity(dim), dim), dtype=np.float16)
            self._tokens_SD[PADDING_SLOT] = 0
        if self._tokens_SD.shape[1] != dim:
            raise ValueError(f"this cache holds tokens of width {self._tokens_SD.shape[1]}; got {dim}")
        return self._tokens_SD

    def slots(self, key: Key) -> np.ndarray | None:
        """The slots of a cached row, which counts as its use; None if it is not cached."""
        slots = self._slots.get(key)
        if slots is not None:
            self._slots.move_to_end(key)
        return slots

    def put(self, key: Key, tokens_TD: np.ndarray) -> None:
        """Cache the tokens of a new key, evicting what was used least recently. They must fit."""
        tokens_SD, needed = self.tokens(tokens_TD.shape[1]), len(tokens_TD)
        while len(self._free) + len(tokens_SD) - self._unused < needed:
            _, evicted = self._slots.popitem(last=False)
            self._free += evicted.tolist()
            self.bytes -= len(evicted) * tokens_SD[PADDING_SLOT].nbytes
        reused = min(needed, len(self._free))
        start = len(self._free) - reused
        fresh = range(self._unused, self._unused + needed - reused)
        slots = np.array([*self._free[start:], *fresh], np.int64)
        del self._free[start:]
        self._unused += len(fresh)
        tokens_SD[slots] = tokens_TD
        self._slots[key] = slots
        self.bytes += tokens_TD.nbytes


class TokenReader:
    """Sequence columns of a table at one version.

    `rows_read` counts the rows of each column that came from the table, not from the cache.
    """

    def __init__(
        self, store: FeatureStore, table: Table, columns: Sequence[str], version: int, cache: TokenCache
    ) -> None:
        self._dataset = store.dataset(table, version)
        self._dim, self._cache = store.dim, cache
        # Names that are unique in a cache that other readers share.
        self._names = {column: f"{store.address(table).uri}@{version}/{column}" for column in columns}
        self._column_of = {name: column for column, name in self._names.items()}
        self.rows_read = dict.fromkeys(columns, 0)

    def read(self, rows: Mapping[str, np.ndarray]) -> CachedTokens:
        """The tokens of `rows`, by column; none for a row without tokens and for NO_ROW.

        All columns have equally many rows: where one says NO_ROW another may name a row.
        """
        keys: list[Key | None] = [None] * max(map(len, rows.values()), default=0)
        for column, numbers in rows.items():
            name = self._names[column]
            for at, row in enumerate(numbers.tolist()):
                if row != NO_ROW:
                    keys[at] = (name, row)
        distinct = {key for key in keys if key is not None}
        cached, missing = self._look_up(distinct)
        if missing:
            self._read_into_cache(missing)
            cached, missing = self._look_up(distinct)
        tokens_SD = self._cache.tokens(self._dim)
        if missing:  # more than fits
            tokens_SD, cached = self._read_uncached(distinct)
        empty = np.zeros(0, dtype=np.int64)
        parts = [empty if key is None else cached[key] for key in keys]
        lengths_B = np.array([len(part) for part in parts], dtype=np.int64)
        longest = max(int(lengths_B.max(initial=0)), 1)
        slots_BL = np.full((len(parts), longest), PADDING_SLOT, dtype=np.int64)
        slots_BL[np.arange(longest) < lengths_B[:, None]] = np.concatenate([*parts, empty])
        return CachedTokens(tokens_SD, slots_BL, lengths_B)

    def prefetch(self, requests: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Read into the cache what later requests need and it has not. Rows that need several columns are
        read once for all of them, which is faster."""
        keys = {
            (self._names[column], row)
            for request in requests
            for column, numbers in request.items()
            for row in numbers.tolist()
            if row != NO_ROW
        }
        self._read_into_cache(self._look_up(keys)[1])

    def _look_up(self, keys: set[Key]) -> tuple[dict[Key, np.ndarray], list[Key]]:
        """Slots of the cached rows, which are then not evicted first, and the keys of the others."""
        cached, missing = {}, []
        for key in keys:
            slots = self._cache.slots(key)
            if slots is None:
                missing.append(key)
            else:
                cached[key] = slots
        return cached, missing

    def _read_into_cache(self, keys: Iterable[Key]) -> None:
        names_of: dict[int, list[str]] = {}
        for name, row in keys:
            names_of.setdefault(row, []).append(name)
        rows_of: dict[tuple[str, ...], list[int]] = {}
        for row in sorted(names_of):
            rows_of.setdefault(tuple(sorted(names_of[row])), []).append(row)
        for names, rows in rows_of.items():
            for name, parts in self._read(names, rows).items():
                for row, tokens_TD in zip(rows, parts, strict=True):
                    if len(tokens_TD) <= self._cache.capacity(self._dim):
                        self._cache.put((name, row), tokens_TD)

    def _read(self, names: Sequence[str], rows: list[int]) -> dict[str, list[np.ndarray]]:
        """(T, D) float16 for each row and column, T = 0 for a row without tokens."""
        columns = [self._column_of[name] for name in names]
        with lance_errors("read", ", ".join(names)):
            table = self._dataset.take(rows, columns=columns)
        for column in columns:
            self.rows_read[column] += len(rows)
        return {
            name: [tokens for chunk in table[column].chunks for tokens in token_views(chunk, self._dim)]
            for name, column in zip(names, columns, strict=True)
        }

    def _read_uncached(self, keys: set[Key]) -> tuple[np.ndarray, dict[Key, np.ndarray]]:
        """Tokens in an array of their own that begins with a token of zeros, and the slots in it."""
        parts: dict[Key, np.ndarray] = {}
        for name in {name for name, _ in keys}:
            rows = sorted(row for other, row in keys if other == name)
            for row, part in zip(rows, self._read([name], rows)[name], strict=True):
                parts[name, row] = part
        ends = np.cumsum([1, *map(len, parts.values())])
        slots = {key: np.arange(ends[at], ends[at + 1]) for at, key in enumerate(parts)}
        return np.concatenate([np.zeros((1, self._dim), dtype=np.float16), *parts.values()]), slots


def token_views(column: pa.ListArray, dim: int) -> list[np.ndarray]:
    """(T, D) for each row, without a copy."""
    flat = column.values.flatten().to_numpy(zero_copy_only=True)  # offsets count from its start
    offsets = column.offsets.to_numpy()
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return [
        flat[start * dim : (stop if has_tokens else start) * dim].reshape(-1, dim)
        for start, stop, has_tokens in zip(offsets[:-1], offsets[1:], valid, strict=True)
    ]
