"""Search for one query at a time over all of `clips`: fast, nearly exact, never stale.

Lance searches the vector indexes of the two key columns, and the rows that no index covers yet: a clip can be
found as soon as it is committed. Its candidates are scored again exactly, so that a score is the cosine that
`MemoryBank` gives; where more candidates may be among the best, the search is repeated with more of them.
Keys come from memory if all of them fit in `IN_MEMORY_BYTES`, and from the table otherwise. (Batch jobs use
`MemoryBank`, which is exact.)

    >>> refresh_index(store, ServingSettings())
    >>> index = ServingIndex(store)
    >>> index.nearest(key_D, Modality.VISUAL, 3)
    [Hit(clip_id='vggsound/…', score=0.871), …]

Legend: D width of a key, C candidates, K keys.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import lance
import numpy as np
import pyarrow as pa

from r2scp.store.commits import lance_errors
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import BLOCK_KEYS, IN_MEMORY_BYTES, KEY_COLUMNS
from r2scp.store.search.exact import exact_scores

EXACT_BELOW = 4_096  # rows that a search without an index can afford: 17 MB of keys at D = 1024
INDEX_TYPES = {"ivf_rq": "IVF_RQ", "ivf_sq": "IVF_SQ"}

CANDIDATES = 5  # per hit
EXTRA_CANDIDATES = 4
GROWTH = 4  # times as many candidates in the next search
MAX_CANDIDATES = 80  # per hit; no search after one with so many


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingSettings:
    """How to index. `auto` is `exact`, without an index, below `exact_below` rows and `ivf_rq` from there.

    `effort` in [0, 1]: how many partitions of a segment a search without a condition probes first, as a power
    of their number: 0 for one, 1 for all.
    """

    kind: Literal["auto", "exact", "ivf_rq", "ivf_sq"] = "auto"
    exact_below: int = EXACT_BELOW
    effort: float = 0.5

    def __post_init__(self) -> None:
        kinds = ("auto", "exact", *INDEX_TYPES)
        if self.kind not in kinds:
            raise ValueError(f"kind must be one of {', '.join(kinds)}; got {self.kind!r}")
        if self.exact_below < 0:
            raise ValueError(f"exact_below must be at least 0; got {self.exact_below}")
        if not 0.0 <= self.effort <= 1.0:
            raise ValueError(f"effort must be in [0, 1]; got {self.effort}")


class Hit(NamedTuple):
    """A clip and the cosine of its key with the query."""

    clip_id: str
    score: float


class ServingIndex:
    """The clips of one version, for search. Thread-safe.

    Reuse it: clip ids and keys (if they fit; a few seconds for 200,000 clips) and the parts of the index that
    were read stay in memory.
    """

    def __init__(
        self,
        store: FeatureStore,
        settings: ServingSettings | None = None,
        version: int | str | None = None,
        in_memory_bytes: int = IN_MEMORY_BYTES,
    ) -> None:
        """At a version or tag of `clips`, by default the latest. Raises `StoreError`.

        `in_memory_bytes`: keys are kept in memory if both keys of all clips take no more.
        """
        self.settings = settings or ServingSettings()
        dataset = store.dataset(Table.CLIPS, version)
        self.version, self.dim, self._dataset = dataset.version, store.dim, dataset
        fits = dataset.count_rows() * self.dim * 4 * len(KEY_COLUMNS) <= in_memory_bytes
        with lance_errors("read the keys of", dataset.uri):
            self._indexed = set() if self.settings.kind == "exact" else indexed_columns(dataset)
            columns = KEY_COLUMNS.values() if fits else ()
            self._keys = {column: _Keys.read(dataset, column, self.dim) for column in columns}

    def nearest(self, key_D: np.ndarray, among: Modality, n: int, where: str | None = None) -> list[Hit]:
        """Up to `n` clips whose key of modality `among` is nearest to `key_D`, float32 of unit length.

        Best first; equal scores in the order of clip ids. `where` is an SQL condition on `clips`; it loses no
        hits, since all partitions are searched. Raises `StoreError` for an invalid condition and `ValueError`
        for an invalid key or `n`.
        """
        query_D = np.ascontiguousarray(key_D, dtype=np.float32)
        if query_D.shape != (self.dim,) or not np.isfinite(query_D).all() or not query_D.any():
            raise ValueError(f"a query must be a finite vector of {self.dim}, not zero; got {query_D.shape}")
        if n < 1:
            raise ValueError(f"n must be at least 1; got {n}")
        column, count = KEY_COLUMNS[among], CANDIDATES * n + EXTRA_CANDIDATES
        while True:
            if column in self._keys and column not in self._indexed and where is None:
                clip_ids_C, scores_C = self._keys[column].candidates(query_D, count)
            else:
                with lance_errors("search", self._dataset.uri):
                    clip_ids_C, scores_C = self._search(query_D, column, count, where)
            best = np.argsort(-scores_C, kind="stable")[:n]
            # Candidates are in the order of their estimated scores: with all hits in the first half, none is
            # expected beyond the last.
            if scores_C.size < count or best.max() < count // 2 or count >= MAX_CANDIDATES * n:
                break
            count *= GROWTH
        # ties with the last hit are broken by clip id
        best = np.flatnonzero(scores_C >= scores_C[best[-1]]) if best.size else best
        hits = map(Hit, clip_ids_C.take(pa.array(best)).to_pylist(), scores_C[best].tolist())
        return sorted(hits, key=lambda hit: (-hit.score, hit.clip_id))[:n]

    def _search(
        self, query_D: np.ndarray, column: str, count: int, where: str | None
    ) -> tuple[pa.Array, np.ndarray]:
        """(C,) clip ids and (C,) float32 exact scores, in the order of Lance's estimates."""
        in_memory = column in self._keys
        nearest = {
            "column": column,
            "q": pa.array(query_D),
            "k": count,
            "metric": "cosine",
            "use_index": column in self._indexed,
            # Lance probes as many partitions as a query needs. LanceDB's search has no such setting: with a
            # fixed number of probes it takes 1.5 times as long for the same recall.
            "search_effort": self.settings.effort if where is None else 1.0,
        }
        rows = self._dataset.scanner(
            columns=["_distance"] if in_memory else ["_distance", "clip_id", column],
            nearest=nearest,
            filter=where,
            prefilter=True,
            with_row_id=True,
            disable_scoring_autoprojection=True,
        ).to_table()
        distances = rows["_distance"].to_numpy()
        order = np.argsort(distances, kind="stable")
        order = order[np.isfinite(distances[order])]  # not finite: clips without the key
        if in_memory:
            return self._keys[column].scored(query_D, rows["_rowid"].to_numpy()[order])
        rows = rows.take(pa.array(order))
        keys_CD = _vectors(rows, column, self.dim)
        return rows["clip_id"].combine_chunks(), _cosines(query_D, keys_CD, np.arange(len(keys_CD)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Keys:
    """float32 keys of the clips that have one, in the order of their row ids."""

    row_ids_K: np.ndarray
    clip_ids_K: pa.Array
    keys_KD: np.ndarray

    @classmethod
    def read(cls, dataset: lance.LanceDataset, column: str, dim: int) -> "_Keys":
        condition, count = f"{column} IS NOT NULL", 0
        keys_KD = np.empty((dataset.count_rows(condition), dim), np.float32)
        scanner = dataset.scanner(["clip_id", column], condition, with_row_id=True, batch_size=BLOCK_KEYS)
        names = []
        for batch in scanner.to_batches():
            table = pa.Table.from_batches([batch])
            keys_KD[count : count + batch.num_rows] = _vectors(table, column, dim)
            names.append(table.select(["clip_id", "_rowid"]))
            count += batch.num_rows
        table = pa.concat_tables(names).combine_chunks() if names else _NO_ROWS
        row_ids_K, clip_ids_K = table["_rowid"].to_numpy(), table["clip_id"].combine_chunks()
        if (row_ids_K[1:] < row_ids_K[:-1]).any():
            order = np.argsort(row_ids_K)
            row_ids_K, clip_ids_K, keys_KD = (
                row_ids_K[order],
                clip_ids_K.take(pa.array(order)),
                keys_KD[order],
            )
        return cls(row_ids_K=row_ids_K, clip_ids_K=clip_ids_K, keys_KD=keys_KD)

    def scored(self, query_D: np.ndarray, row_ids_C: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        """(C,) clip ids and (C,) exact scores."""
        at = np.searchsorted(self.row_ids_K, row_ids_C)
        return self.clip_ids_K.take(pa.array(at)), _cosines(query_D, self.keys_KD, at)

    def candidates(self, query_D: np.ndarray, count: int) -> tuple[pa.Array, np.ndarray]:
        """Up to `count` clips with the highest float32 products, in their order, with exact scores."""
        products_K = self.keys_KD @ query_D
        at = np.arange(len(products_K))
        if len(at) > count:
            at = np.argpartition(-products_K, count)[:count]
        at = at[np.argsort(-products_K[at], kind="stable")]
        return self.clip_ids_K.take(pa.array(at)), _cosines(query_D, self.keys_KD, at)


_NO_ROWS = pa.table({"clip_id": pa.array([], pa.string()), "_rowid": pa.array([], pa.uint64())})


def _cosines(query_D: np.ndarray, keys_KD: np.ndarray, at: np.ndarray) -> np.ndarray:
    return exact_scores(query_D[None], keys_KD, np.zeros_like(at), at)


def _vectors(table: pa.Table, column: str, dim: int) -> np.ndarray:
    """(K, D) float32 of a column without nulls."""
    return table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def indexed_columns(dataset: lance.LanceDataset) -> set[str]:
    """Key columns that have an index."""
    names = {index.name for index in dataset.describe_indices()}
    return {column for column in KEY_COLUMNS.values() if index_name(column) in names}


def index_name(column: str) -> str:
    return f"{column}_idx"
