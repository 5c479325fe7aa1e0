"""`Sequences`: token sequences of single rows, read by row number, with a bounded memory of what was read.

Training goes over the same clips again and again in random order. What fits in the memory is read from the
table once; what does not is read again when its turn comes, so that memory is bounded whatever the table's
size. Rows are numbered as a scan of the pinned version gives them.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.transaction import told

CACHE_BYTES = 4 << 30  # all of MUSIC-AVQA, 9,288 clips of 60 s, two modalities, D = 1024, is 2.3 GB


class SequenceCache:
    """At most `most_bytes` of sequences; the least recently used go first. Shared by several columns."""

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._held: OrderedDict[tuple[str, int], np.ndarray | None] = OrderedDict()

    def get(self, key: tuple[str, int]) -> np.ndarray | None:
        """What is held under `key`. Raises KeyError."""
        self._held.move_to_end(key)
        return self._held[key]

    def put(self, key: tuple[str, int], value: np.ndarray | None) -> None:
        """Hold `value` under a new key; what was used least recently makes room."""
        self._held[key] = value
        self.bytes += 0 if value is None else value.nbytes
        while self.bytes > self.most_bytes:
            _, gone = self._held.popitem(last=False)
            self.bytes -= 0 if gone is None else gone.nbytes

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._held


class Sequences:
    """One sequence column of a table at one version.

    `rows_read` counts the rows that came from the table, not from the cache.
    """

    def __init__(
        self, store: FeatureStore, table: Table, column: str, version: int, cache: SequenceCache
    ) -> None:
        self._dataset = store.dataset(table, version)
        self._column, self._dim, self._cache = column, store.dim, cache
        self._name = f"{store.address(table).uri}@{version}/{column}"  # in a cache that others share
        self.rows_read = 0

    def take(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """(T, D) float16 of each of `rows`, read-only, in their order; None where the row has none."""
        wanted = [int(row) for row in rows]
        found: dict[int, np.ndarray | None] = {}
        for row in set(wanted):
            if (self._name, row) in self._cache:
                found[row] = self._cache.get((self._name, row))
        due = sorted(set(wanted) - found.keys())
        if due:
            with told("read", self._name):
                read = self._dataset.take(due, columns=[self._column])[self._column].combine_chunks()
            self.rows_read += len(due)
            for row, value in zip(due, _views(read, self._dim), strict=True):
                if value is not None:
                    value = value.copy()  # a view would keep everything that was read with it
                    value.flags.writeable = False
                found[row] = value
                self._cache.put((self._name, row), value)
        return [found[row] for row in wanted]


def _views(column: pa.ListArray, dim: int) -> list[np.ndarray | None]:
    """Each row's (T, D), without a copy."""
    flat = column.values.flatten().to_numpy(zero_copy_only=True)
    ends = column.offsets.to_numpy()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    return [
        flat[start * dim : end * dim].reshape(-1, dim) if valid else None
        for start, end, valid in zip(ends[:-1], ends[1:], there, strict=True)
    ]
