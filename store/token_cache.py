"""`Sequences`: token sequences of single rows, found by row number, with a bounded memory of what was read.

Training goes over the same clips again and again in random order. What fits in the memory is read from the
table once; what does not is read again when its turn comes, so that memory is bounded whatever the table's
size. Rows are numbered as a scan of the pinned version gives them.

All that is held lies in one array of tokens, and a row is a list of places in it. So a whole batch, padding
included, is one gather, and a place that becomes free fits whatever comes next.

Legend: B rows asked for, L tokens of the longest of them, S places, D width of a token.
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
NO_ROW = -1  # among the rows asked for: nothing is wanted there
BLANK = 0  # the place of a token of zeros

Key = tuple[str, int]  # column, table and version; row


@dataclass(frozen=True, slots=True)
class Found:
    """Where the tokens of some rows lie, until the next rows are asked for.

    tokens_SD float16; places_BL int64, BLANK behind the end of a row; lengths_B int64, 0 for a row without.
    """

    tokens_SD: np.ndarray
    places_BL: np.ndarray
    lengths_B: np.ndarray


class SequenceCache:
    """At most `most_bytes` of tokens; the least recently used rows go first. Shared by several columns.

    Pages of the array that were never written to take no memory.
    """

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self.most_bytes = most_bytes
        self._held: OrderedDict[Key, np.ndarray] = OrderedDict()  # places of each row, in order
        self.clear()

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.bytes = 0
        self._held.clear()
        self._tokens_SD: np.ndarray | None = None
        self._unused = BLANK + 1  # the first place that nothing was ever put into
        self._free: list[int] = []  # places below it that hold nothing any more

    def room(self, dim: int) -> int:
        """Tokens of width `dim` that could be held at once."""
        return self.most_bytes // (dim * np.dtype(np.float16).itemsize)

    def tokens(self, dim: int) -> np.ndarray:
        """(S, D) float16: the array in which everything lies. Raises ValueError for another width."""
        if self._tokens_SD is None:
            self._tokens_SD = np.empty((1 + self.room(dim), dim), dtype=np.float16)
            self._tokens_SD[BLANK] = 0
        if self._tokens_SD.shape[1] != dim:
            raise ValueError(f"this cache holds tokens of width {self._tokens_SD.shape[1]}; got {dim}")
        return self._tokens_SD

    def places(self, key: Key) -> np.ndarray | None:
        """Of what is held under `key`, which counts as its use; None where it is not held."""
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
        return found

    def put(self, key: Key, tokens_TD: np.ndarray) -> None:
        """Hold tokens under a new key; what was used least recently makes room. They must fit."""
        held_SD, needed = self.tokens(tokens_TD.shape[1]), len(tokens_TD)
        while len(self._free) + len(held_SD) - self._unused < needed:
            _, gone = self._held.popitem(last=False)
            self._free += gone.tolist()
            self.bytes -= len(gone) * held_SD[BLANK].nbytes
        again = min(needed, len(self._free))
        at = len(self._free) - again
        places = np.array([*self._free[at:], *range(self._unused, self._unused + needed - again)], np.int64)
        del self._free[at:]
        self._unused += needed - again
        held_SD[places] = tokens_TD
        self._held[key] = places
        self.bytes += tokens_TD.nbytes


class Sequences:
    """Sequence columns of a table at one version.

    `rows_read` counts the rows of each column that came from the table, not from the cache.
    """

    def __init__(
        self, store: FeatureStore, table: Table, columns: Sequence[str], version: int, cache: SequenceCache
    ) -> None:
        self._dataset = store.dataset(table, version)
        self._dim, self._cache = store.dim, cache
        # in a cache that others share
        self._names = {column: f"{store.address(table).uri}@{version}/{column}" for column in columns}
        self._column_of = {name: column for column, name in self._names.items()}
        self.rows_read = dict.fromkeys(columns, 0)

    def find(self, rows: Mapping[str, np.ndarray]) -> Found:
        """The tokens of each of `rows`, by column; none where the row has none and for NO_ROW.

        Of several columns equally many rows each: where one says NO_ROW another may give a row.
        """
        wanted: list[Key | None] = [None] * max(map(len, rows.values()), default=0)
        for column, numbers in rows.items():
            name = self._names[column]
            for at, row in enumerate(numbers.tolist()):
                if row != NO_ROW:
                    wanted[at] = (name, row)
        due = {key for key in wanted if key is not None}
        held, lacking = self._look_up(due)
        if lacking:
            self._read_into_cache(lacking)
            held, lacking = self._look_up(due)
        tokens_SD = self._cache.tokens(self._dim)
        if lacking:  # all that is due is more than fits
            tokens_SD, held = self._apart(due)
        nowhere = np.zeros(0, dtype=np.int64)
        parts = [nowhere if key is None else held[key] for key in wanted]
        lengths_B = np.array([len(part) for part in parts], dtype=np.int64)
        longest = max(int(lengths_B.max(initial=0)), 1)
        places_BL = np.full((len(parts), longest), BLANK, dtype=np.int64)
        places_BL[np.arange(longest) < lengths_B[:, None]] = np.concatenate([*parts, nowhere])
        return Found(tokens_SD, places_BL, lengths_B)

    def fetch(self, wanted: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Have rows read that will be asked for and are not held. Those that lack several columns are read
        once for all of them, which takes less time."""
        due = {
            (self._names[column], row)
            for one in wanted
            for column, numbers in one.items()
            for row in numbers.tolist()
            if row != NO_ROW
        }
        self._read_into_cache(self._look_up(due)[1])

    def _look_up(self, due: set[Key]) -> tuple[dict[Key, np.ndarray], list[Key]]:
        """Places of what is held, which then does not make room for the rest; and the rest."""
        held, lacking = {}, []
        for key in due:
            places = self._cache.places(key)
            if places is None:
                lacking.append(key)
            else:
                held[key] = places
        return held, lacking

    def _read_into_cache(self, keys: Iterable[Key]) -> None:
        names: dict[int, list[str]] = {}
        for name, row in keys:
            names.setdefault(row, []).append(name)
        together: dict[tuple[str, ...], list[int]] = {}
        for row in sorted(names):
            together.setdefault(tuple(sorted(names[row])), []).append(row)
        for some, rows in together.items():
            for name, parts in self._read(some, rows).items():
                for row, tokens_TD in zip(rows, parts, strict=True):
                    if len(tokens_TD) <= self._cache.room(self._dim):
                        self._cache.put((name, row), tokens_TD)

    def _read(self, names: Sequence[str], rows: list[int]) -> dict[str, list[np.ndarray]]:
        """(T, D) float16 of each row of some columns, T = 0 where it has none."""
        columns = [self._column_of[name] for name in names]
        with lance_errors("read", ", ".join(names)):
            table = self._dataset.take(rows, columns=columns)
        for column in columns:
            self.rows_read[column] += len(rows)
        return {
            name: [view for chunk in table[column].chunks for view in views(chunk, self._dim)]
            for name, column in zip(names, columns, strict=True)
        }

    def _apart(self, keys: set[Key]) -> tuple[np.ndarray, dict[Key, np.ndarray]]:
        """Tokens in an array of their own, behind a blank one."""
        parts: dict[Key, np.ndarray] = {}
        for name in {name for name, _ in keys}:
            rows = sorted(row for other, row in keys if other == name)
            for row, part in zip(rows, self._read([name], rows)[name], strict=True):
                parts[name, row] = part
        ends = np.cumsum([1, *map(len, parts.values())])
        places = {key: np.arange(ends[at], ends[at + 1]) for at, key in enumerate(parts)}
        return np.concatenate([np.zeros((1, self._dim), dtype=np.float16), *parts.values()]), places


def views(column: pa.ListArray, dim: int) -> list[np.ndarray]:
    """Each row's (T, D), without a copy."""
    flat = column.values.flatten().to_numpy(zero_copy_only=True)  # offsets are into all of it
    ends = column.offsets.to_numpy()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    return [
        flat[start * dim : (end if valid else start) * dim].reshape(-1, dim)
        for start, end, valid in zip(ends[:-1], ends[1:], there, strict=True)
    ]
