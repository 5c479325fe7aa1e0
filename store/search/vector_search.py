"""Search for one query at a time over all of `clips`: quick, nearly exact, never stale.

Lance's vector indexes on the two key columns propose candidates with estimates of their scores; the foremost
are scored exactly, so that a score is the cosine that `MemoryBank` gives. Where another clip may still belong
to the best, by what the estimates of these were off, it is scored too. Keys come from memory where all of
them fit in `IN_MEMORY_BYTES`, and are read from the table otherwise. Rows that no index holds yet are
compared one by one: a clip can be found from the moment it is committed. (Batch work uses `MemoryBank`, which
is exact.)

    >>> refresh_index(store, ServingSettings())
    >>> index = ServingIndex(store)
    >>> index.nearest(key_D, Modality.VISUAL, 3)
    [Hit(clip_id='vggsound/…', score=0.871), …]

Legend: D width of a key, C candidates, K keys.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lance
import numpy as np
import pyarrow as pa

from r2scp.store.commits import lance_errors
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import BLOCK_KEYS, IN_MEMORY_BYTES, KEY_COLUMNS
from r2scp.store.search.exact import exact_scores, product_error
from r2scp.store.search.vector_index import ServingSettings, covered

HELD_ROWS = 4_096  # in no index, whose keys are in memory in any case: 17 MB a column at D = 1024
ESTIMATED = 10  # candidates for each hit: their estimates cost next to nothing
READ_FIRST = 4  # of them for each hit, whose keys are read: a second reading costs as much as 50 more keys
READ_GROWS = 2  # times as many read, at least, where more may be among the best
EXTRA = 4  # more of these
CANDIDATES_GROW = 4  # times as many, where one that was not proposed may still be among the best
MOST_CANDIDATES = 40  # for each hit
SURE = 2.5  # standard deviations of what a code's estimate is off
EXACT_WITHIN = 1e-5  # of a score: what float32 is off


class Hit(NamedTuple):
    """A clip and the cosine of its key with the query."""

    clip_id: str
    score: float


class ServingIndex:
    """The clips of one version, for search. May be used from several threads.

    Keep it: all clip ids, the keys where they fit (a few seconds to read at 200,000), else those of up to
    HELD_ROWS rows that no index holds, and what was read of the index stay in memory.
    """

    def __init__(
        self,
        store: FeatureStore,
        settings: ServingSettings | None = None,
        version: int | str | None = None,
        in_memory_bytes: int = IN_MEMORY_BYTES,
    ) -> None:
        """At a version or tag of `clips`, the latest where none is given. Raises `StoreError`.

        `in_memory_bytes`: keys stay in memory if both of all clips take no more.
        """
        self.settings = settings or ServingSettings()
        self._dataset = store.dataset(Table.CLIPS, version)
        self.version = self._dataset.version
        self.dim = store.dim
        with lance_errors("read the clip ids of", self._dataset.uri):
            rows = self._dataset.scanner(columns=["clip_id"], with_row_id=True, scan_in_order=True).to_table()
        rows = rows.combine_chunks()
        row_ids = rows["_rowid"].to_numpy()
        self._places = np.argsort(row_ids, kind="stable")  # in the table, of rows in the order of their ids
        self._row_ids = row_ids[self._places]
        self._clip_ids = rows["clip_id"]  # of these places; reading them for each search costs a quarter more
        fits = len(row_ids) * self.dim * 4 * len(KEY_COLUMNS) <= in_memory_bytes
        with lance_errors("read the keys of", self._dataset.uri):
            held = covered(self._dataset)
            self._indexed = set() if self.settings.kind == "exact" else set(held)
            self._keys = {column: self._read(column) for column in KEY_COLUMNS.values()} if fits else {}
            self._apart = {column: self._unindexed(column, held) for column in KEY_COLUMNS.values()}

    def nearest(self, key_D: np.ndarray, among: Modality, n: int, where: str | None = None) -> list[Hit]:
        """Up to `n` clips whose key of modality `among` is nearest to `key_D`, float32 of unit length.

        Best first, of equal scores the lower clip id first. `where` is an SQL condition on `clips`; it costs
        no hits: with it all partitions are searched. Raises `StoreError` where the condition is none, and
        `ValueError` where the key or `n` is not what it must be.
        """
        query_D = np.ascontiguousarray(key_D, dtype=np.float32)
        if query_D.shape != (self.dim,) or not np.isfinite(query_D).all() or not query_D.any():
            raise ValueError(f"a query must be a finite vector of {self.dim}, not zero; got {query_D.shape}")
        if n < 1:
            raise ValueError(f"n must be at least 1; got {n}")
        column = KEY_COLUMNS[among]
        apart = self._apart[column] if where is None else None
        scored = _Scored() if apart is None else apart.best(query_D, n)
        if apart is None or column in self._indexed:
            asked = _Asked(query_D=query_D, column=column, n=n, where=where, indexed_only=apart is not None)
            with lance_errors("search", self._dataset.uri):
                self._look(asked, scored)
        return self._hits(scored, n)

    def _look(self, asked: "_Asked", scored: "_Scored") -> None:
        """Score all that may belong to the best, of what is not held."""
        count, best = ESTIMATED * asked.n + EXTRA, -np.inf
        if asked.column not in self._indexed:
            count = asked.n + EXTRA  # what Lance compares without an index is no estimate
        while True:
            places_C, estimates_C = self._propose(asked, count)
            sure = self._score(asked, places_C, estimates_C, scored)
            if sure is None:  # nothing can be said: the next look tells
                bar = scored.bar(asked.n)
                sure, best = bar == best, bar
            all_there = len(places_C) < count or asked.column not in self._indexed
            if all_there or sure or count >= MOST_CANDIDATES * asked.n:
                return
            count *= CANDIDATES_GROW

    def _propose(self, asked: "_Asked", count: int) -> tuple[np.ndarray, np.ndarray]:
        """((C,) places in the table, (C,) estimates of scores, highest first)."""
        nearest = {
            "column": asked.column,
            "q": pa.array(asked.query_D),
            "k": count,
            "metric": "cosine",
            "use_index": self.settings.kind != "exact",
            "search_effort": self.settings.effort if asked.where is None else 1.0,
        }
        found = self._dataset.scanner(
            columns=["_distance"],
            nearest=nearest,
            filter=asked.where,
            prefilter=True,
            with_row_id=True,
            fast_search=asked.indexed_only,
            disable_scoring_autoprojection=True,
        ).to_table()
        distances = found["_distance"].to_numpy()
        there = np.isfinite(distances)
        order = np.argsort(distances[there], kind="stable")
        at = np.searchsorted(self._row_ids, found["_rowid"].to_numpy()[there][order])
        return self._places[at], 1 - distances[there][order]

    def _score(
        self, asked: "_Asked", places_C: np.ndarray, estimates_C: np.ndarray, scored: "_Scored"
    ) -> bool | None:
        """Score those that may be among the n best; whether none beyond them may; None: unknown."""
        first, reach, unseen = 0, len(places_C), None
        if asked.column in self._indexed and asked.column not in self._keys:
            reach = min(reach, READ_FIRST * asked.n + EXTRA)
        scores_C = np.empty(len(places_C), dtype=np.float32)
        while first < reach:
            scores_C[first:reach] = self._exact(asked, places_C[first:reach])
            scored.add(places_C[first:reach], scores_C[first:reach])
            first, unseen = reach, _most_off(scores_C[:reach] - estimates_C[:reach])
            if unseen is None:
                reach = len(places_C)
                continue
            due = int(np.count_nonzero(estimates_C + unseen >= scored.bar(asked.n)))
            if due <= first and due < len(places_C):
                return True
            reach = min(max(due, READ_GROWS * first), len(places_C))
        return None if unseen is None else False

    def _exact(self, asked: "_Asked", places_C: np.ndarray) -> np.ndarray:
        """(C,) float32: scores of clips that have the key."""
        if asked.column in self._keys:
            held = self._keys[asked.column]
            return _cosines(asked.query_D, held.keys_KD, held.at(places_C))
        order = np.argsort(places_C)
        found = self._dataset.take(pa.array(places_C[order]), columns=[asked.column])
        keys_CD = _vectors(found, asked.column, self.dim)
        scores_C = np.empty(len(places_C), dtype=np.float32)
        scores_C[order] = _cosines(asked.query_D, keys_CD, np.arange(len(keys_CD)))
        return scores_C

    def _read(self, column: str, fragments: Sequence[lance.LanceFragment] | None = None) -> "_Keys":
        """Keys of the rows of these fragments, or of all."""
        scanner = self._dataset.scanner(
            columns=[column],
            filter=f"{column} IS NOT NULL",
            fragments=fragments,
            with_row_id=True,
            batch_size=BLOCK_KEYS,
        )
        most = len(self._row_ids) if fragments is None else sum(part.count_rows() for part in fragments)
        keys_KD, row_ids_K = np.empty((most, self.dim), np.float32), np.empty(most, np.uint64)
        count = 0
        for batch in scanner.to_batches():
            stop = count + batch.num_rows
            keys_KD[count:stop] = _vectors(pa.Table.from_batches([batch]), column, self.dim)
            row_ids_K[count:stop] = batch["_rowid"].to_numpy()
            count = stop
        places_K = self._places[np.searchsorted(self._row_ids, row_ids_K[:count])]
        order = None if (np.diff(places_K) > 0).all() else np.argsort(places_K)
        keys_KD = keys_KD[:count] if order is None else keys_KD[order]
        return _Keys.of(keys_KD, places_K if order is None else places_K[order])

    def _unindexed(self, column: str, held: Mapping[str, Collection[int]]) -> "_Keys | None":
        """Keys of the rows that no index holds, where they are few or all keys are in memory; None where
        Lance must compare them."""
        if column not in self._indexed and column in self._keys:
            return self._keys[column]
        indexed = held[column] if column in self._indexed else ()
        others = [part for part in self._dataset.get_fragments() if part.fragment_id not in indexed]
        if sum(part.count_rows() for part in others) > HELD_ROWS and not self._keys:
            return None
        if not others:
            return _Keys.of(np.zeros((0, self.dim), np.float32), np.empty(0, np.int64))
        return self._read(column, others)

    def _hits(self, scored: "_Scored", n: int) -> list[Hit]:
        places, scores = scored.all()
        if scores.size > n:
            kept = scores >= scored.bar(n)
            places, scores = places[kept], scores[kept]
        clip_ids = self._clip_ids.take(pa.array(places)).to_pylist()
        hits = map(Hit, clip_ids, scores.tolist())
        return sorted(hits, key=lambda hit: (-hit.score, hit.clip_id))[:n]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """One search. `indexed_only`: rows that no index holds are compared elsewhere."""

    query_D: np.ndarray
    column: str
    n: int
    where: str | None
    indexed_only: bool


class _Scored:
    """Places in the table with exact scores; each place counts once."""

    def __init__(self) -> None:
        self._scores: dict[int, float] = {}

    def add(self, places: np.ndarray, scores: np.ndarray) -> None:
        self._scores.update(zip(places.tolist(), scores.tolist(), strict=True))

    def bar(self, n: int) -> float:
        """The n-th best score, minus infinity where there are fewer."""
        if len(self._scores) < n:
            return -np.inf
        return sorted(self._scores.values(), reverse=True)[n - 1]

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        places = np.fromiter(self._scores.keys(), np.int64, len(self._scores))
        return places, np.fromiter(self._scores.values(), np.float32, len(self._scores))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Keys:
    """float32 keys of some clips, and their places in the table, which ascend."""

    keys_KD: np.ndarray
    places_K: np.ndarray
    longest_1D: np.ndarray  # of the keys

    @classmethod
    def of(cls, keys_KD: np.ndarray, places_K: np.ndarray) -> "_Keys":
        first = int(np.einsum("kd,kd->k", keys_KD, keys_KD).argmax()) if len(keys_KD) else 0
        return cls(keys_KD=keys_KD, places_K=places_K, longest_1D=keys_KD[first : first + 1])

    def at(self, places: np.ndarray) -> np.ndarray:
        """Which keys are those of clips that have one."""
        return np.searchsorted(self.places_K, places)

    def best(self, query_D: np.ndarray, n: int) -> _Scored:
        """Those that may be among the n best of these, scored exactly."""
        scored, at = _Scored(), np.arange(len(self.keys_KD))
        if len(at) > n:
            products_K = self.keys_KD @ query_D
            margin = product_error(query_D[None], self.longest_1D)
            at = np.flatnonzero(products_K >= np.partition(products_K, -n)[-n] - margin)
        scored.add(self.places_K[at], _cosines(query_D, self.keys_KD, at))
        return scored


def _cosines(query_D: np.ndarray, keys_KD: np.ndarray, at: np.ndarray) -> np.ndarray:
    return exact_scores(query_D[None], keys_KD, np.zeros_like(at), at)


def _vectors(table: pa.Table, column: str, dim: int) -> np.ndarray:
    """(K, D) float32 of a column without nulls."""
    return table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def _most_off(errors_C: np.ndarray) -> float | None:
    """How far a score may be above its estimate. It is learnt from those that are known: an offset of the
    query's own, and a spread about it. Where some rows are in no index and not held either, Lance scores its
    candidates exactly, and nothing can be learnt."""
    if errors_C.size < 2 or np.abs(errors_C).max() < EXACT_WITHIN:
        return None
    return float(errors_C.mean() + SURE * errors_C.std())
