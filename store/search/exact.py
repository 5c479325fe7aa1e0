"""Exact nearest and farthest keys, as blocked matrix products in float32.

A matrix product of float32 rounds differently with the shape of its operands, the machine's kernels and the
number of threads. So it only proposes candidates: every key whose product is within the rounding error of the
n best is scored again by `exact_scores`, which depends on the two vectors alone. Hits and scores are
therefore the same whatever the block sizes, the other queries and the number of threads; scores that are
equal in float32 are ties, and ties are broken by rank.

Legend: Q queries, K keys, D their width, N hits per query, P pairs of a query and a key.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Self

import numpy as np
from threadpoolctl import threadpool_limits

QUERY_ROWS = 1_024  # queries per product
TILE_KEYS = 8_192  # keys per product: 32 MB of scores
GROUP = 32  # scores that are first reduced to their maximum: a tile's 8,192 to 256
SPAN_ROWS = 64  # queries whose scores of a tile are filtered together: 2 MB, which fit a core's cache
PAIR_ROWS = 32  # pairs of one query scored together: 256 kB in float64, which fit a core's cache
UNIT_ROUNDOFF = 2.0**-24  # of float32, relative
NO_RANK = np.iinfo(np.int64).max  # where there is no hit

Pairs = tuple[np.ndarray, np.ndarray]  # rows of queries, columns of keys


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyBlock:
    """Part of a bank. `ranks_K`: each key's rank in the order that breaks ties, unique in the bank;
    `sources_K`: the number of each key's source, >= 0."""

    keys_KD: np.ndarray  # float32
    ranks_K: np.ndarray  # int64
    sources_K: np.ndarray  # int64

    def select(self, at_K: np.ndarray) -> "KeyBlock":
        """The keys where `at_K` is true."""
        return KeyBlock(
            keys_KD=self.keys_KD[at_K], ranks_K=self.ranks_K[at_K], sources_K=self.sources_K[at_K]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryBlock:
    """Queries for their n best keys. `sources_Q`: source numbers as in the key blocks, -1 for a source that
    is not in the bank; `largest_source`: the most keys that one source has in the bank."""

    queries_QD: np.ndarray  # float32
    sources_Q: np.ndarray  # int64
    n: int
    largest_source: int


class TopHits:
    """The n best of each query so far: highest score first, then lowest rank."""

    def __init__(self, count: int, n: int) -> None:
        self.scores_QN = np.full((count, n), -np.inf, dtype=np.float32)
        self.ranks_QN = np.full((count, n), NO_RANK, dtype=np.int64)

    def offer(self, start: int, rows_P: np.ndarray, ranks_P: np.ndarray, scores_P: np.ndarray) -> None:
        """Take in pairs, `rows_P` counted from query `start`; a query may get each rank only once."""
        if not rows_P.size:
            return
        stop = start + int(rows_P.max()) + 1
        scores_QN, ranks_QN = self.scores_QN[start:stop], self.ranks_QN[start:stop]
        old, place = np.nonzero(ranks_QN != NO_RANK)
        rows = np.concatenate([old, rows_P])
        ranks = np.concatenate([ranks_QN[old, place], ranks_P])
        scores = np.concatenate([scores_QN[old, place], scores_P])
        order = np.lexsort((ranks, -scores, rows))
        rows = rows[order]
        place = np.arange(rows.size) - np.searchsorted(rows, rows)
        kept = place < scores_QN.shape[1]
        at, order = (rows[kept], place[kept]), order[kept]
        scores_QN[at], ranks_QN[at] = scores[order], ranks[order]

    def merged(self, other: Self) -> tuple["TopHits", np.ndarray]:
        """The n best of both, which have no rank in common; and how many of those are `other`'s, (Q,)."""
        count, n = self.scores_QN.shape
        both = TopHits(count, n)
        both.scores_QN[:], both.ranks_QN[:] = self.scores_QN, self.ranks_QN
        rows, place = np.nonzero(other.ranks_QN != NO_RANK)
        both.offer(0, rows, other.ranks_QN[rows, place], other.scores_QN[rows, place])
        theirs = (both.ranks_QN[:, :, None] == other.ranks_QN[:, None, :]).any(axis=2)
        return both, (theirs & (both.ranks_QN != NO_RANK)).sum(axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BestHits:
    """The n best keys of other sources, and the n best of a query's own source."""

    others: TopHits
    same_source: TopHits


BestSides = tuple[BestHits, BestHits]  # nearest, farthest


def search_blocks(
    blocks: Iterable[KeyBlock], queries: QueryBlock, best: BestSides | None = None
) -> BestSides:
    """The nearest and farthest keys of all blocks for each query, on top of `best`, which is modified.

    Scores are products of query and key; those of the farthest are negated, so that the highest is best in
    both. Keys of the query's own source are searched apart, so that they take no place from the others.
    """
    count = len(queries.queries_QD)
    best = best or no_hits(queries)
    query_norm = _max_norm(queries.queries_QD)
    threads = _threads()
    workers = max(1, min(threads, count // SPAN_ROWS))
    step = min(QUERY_ROWS, -(-count // workers)) or 1
    # Buffers are reused, since writing to fresh pages takes twice as long.
    buffers: SimpleQueue[np.ndarray] = SimpleQueue()
    for _ in range(workers):
        buffers.put(np.empty(step * _padded(TILE_KEYS), dtype=np.float32))
    # Each worker multiplies and filters its own queries with one thread. After a product on all threads, all
    # but one of them would wait while its scores are filtered.
    with threadpool_limits(max(1, threads // workers), user_api="blas"), ThreadPoolExecutor(workers) as pool:
        for whole in blocks:
            if not len(whole.keys_KD):
                continue
            block = _without_excess_copies(whole, queries.n + queries.largest_source)
            search = _BlockSearch(
                queries=queries,
                block=block,
                by_source=np.argsort(block.sources_K, kind="stable"),
                margin=_margin(queries.queries_QD.shape[1], query_norm, _max_norm(block.keys_KD)),
                best=best,
                buffers=buffers,
            )
            spans = [slice(start, min(start + step, count)) for start in range(0, count, step)]
            for _ in pool.map(search.run, spans):
                pass
    return best


@dataclass(frozen=True, kw_only=True, slots=True)
class _BlockSearch:
    """One block against all queries; each worker takes ranges of queries and writes to their hits alone."""

    queries: QueryBlock
    block: KeyBlock
    by_source: np.ndarray  # sorts the block's keys by their sources
    margin: np.float32
    best: BestSides
    buffers: SimpleQueue[np.ndarray]  # for scores, one per worker

    def run(self, rows: slice) -> None:
        """Search the block for a range of queries."""
        queries = self.queries.queries_QD[rows]
        same_source = _same_source_pairs(self.block.sources_K, self.by_source, self.queries.sources_Q[rows])
        spans = []
        for first in range(0, len(queries), SPAN_ROWS):
            stop = min(first + SPAN_ROWS, len(queries))
            at = slice(rows.start + first, rows.start + stop)
            spans.append(
                _Span(
                    queries_QD=queries[first:stop],
                    start=at.start,
                    same_source=_pairs_between(same_source, first, stop),
                    block=self.block,
                    filters=_candidate_filters(self.best, at, self.margin),
                )
            )
        buffer = self.buffers.get()
        try:
            _search_block(queries, spans, buffer)
        finally:  # another worker may be waiting for it
            self.buffers.put(buffer)
        for span in spans:
            span.rescore(self.best)


def no_hits(queries: QueryBlock) -> BestSides:
    """The best hits before any key was compared."""
    count, n = len(queries.queries_QD), queries.n
    near, far = (BestHits(others=TopHits(count, n), same_source=TopHits(count, n)) for _ in range(2))
    return near, far


def offer_same_source(blocks: Iterable[KeyBlock], queries: QueryBlock, best: BestSides) -> None:
    """Take into `best` only the keys of each query's own source."""
    for block in blocks:
        by_source = np.argsort(block.sources_K, kind="stable")
        rows, columns = _same_source_pairs(block.sources_K, by_source, queries.sources_Q)
        scores = exact_scores(queries.queries_QD, block.keys_KD, rows, columns)
        for hits, sign in zip(best, (1, -1), strict=True):
            hits.same_source.offer(0, rows, block.ranks_K[columns], sign * scores)


def product_error(queries_QD: np.ndarray, keys_KD: np.ndarray) -> np.float32:
    """How far a float32 product of a query and a key may be from the score it is compared with."""
    return _margin(queries_QD.shape[1], _max_norm(queries_QD), _max_norm(keys_KD))


def _margin(dim: int, query_norm: float, key_norm: float) -> np.float32:
    """2 * n * u * |q||k|, with the unit roundoff u, bounds the error of any way to sum n products, for the
    n-th best and the key compared with it together; 2 more are for rounding the exact score."""
    return np.float32(2 * (dim + 2) * UNIT_ROUNDOFF * query_norm * key_norm)


def exact_scores(
    queries_QD: np.ndarray, keys_KD: np.ndarray, rows_P: np.ndarray, columns_P: np.ndarray
) -> np.ndarray:
    """Products of pairs, (P,) float32: float32 factors multiply exactly in float64, summed in fixed order."""
    scores_P = np.empty(rows_P.size, dtype=np.float32)
    by_row = np.argsort(rows_P, kind="stable")
    rows, starts = np.unique(rows_P[by_row], return_index=True)
    stops = np.append(starts, rows_P.size)[1:]
    for row, first, stop in zip(rows, starts, stops, strict=True):
        query_D = queries_QD[row].astype(np.float64)
        for start in range(first, stop, PAIR_ROWS):
            at = by_row[start : min(stop, start + PAIR_ROWS)]
            scores_P[at] = np.vecdot(keys_KD[columns_P[at]].astype(np.float64), query_D)
    return scores_P


def _search_block(queries_QD: np.ndarray, spans: "list[_Span]", buffer: np.ndarray) -> None:
    """Compare all queries, which the spans are made of in order, with all keys of the block."""
    keys_KD = spans[0].block.keys_KD
    for first in range(0, len(keys_KD), TILE_KEYS):
        keys = keys_KD[first : first + TILE_KEYS]
        scores = buffer[: len(queries_QD) * _padded(len(keys))].reshape(len(queries_QD), -1)
        np.matmul(queries_QD, keys.T, out=scores[:, : len(keys)])
        tile = _Tile(scores, first, len(keys), spans[0].start)
        for span in spans:
            span.filter(tile)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Scores of queries from `start` on with `width` keys of a block from `first` on, then padding."""

    scores_QK: np.ndarray
    first: int
    width: int
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Some queries, from `start` on, and one block. `same_source`: their pairs of one source, sorted by
    row."""

    queries_QD: np.ndarray
    start: int
    same_source: Pairs
    block: KeyBlock
    filters: "tuple[_CandidateFilter, _CandidateFilter]"

    def filter(self, tile: _Tile) -> None:
        """Filter a tile's scores of these queries, which fit a core's cache, without same-source pairs."""
        count, at = len(self.queries_QD), self.start - tile.start
        scores = tile.scores_QK[at : at + count]
        rows, columns = self.same_source
        in_tile = (columns >= tile.first) & (columns < tile.first + tile.width)
        rows, columns = rows[in_tile], columns[in_tile] - tile.first
        for candidates in self.filters:
            scores[:, tile.width :] = scores[rows, columns] = -candidates.sign * np.inf
            candidates.add(scores, tile.first)

    def rescore(self, best: BestSides) -> None:
        """Score same-source pairs and survivors exactly, all at once, and offer them to `best`."""
        pairs = [self.same_source, *(candidates.survivors() for candidates in self.filters)]
        rows, columns = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        scores_P = exact_scores(self.queries_QD, self.block.keys_KD, rows, columns)
        ranks_P = self.block.ranks_K[columns]
        ends = np.cumsum([len(part[0]) for part in pairs])
        same = slice(0, ends[0])
        for side, candidates in enumerate(self.filters):
            sign, others = candidates.sign, slice(ends[side], ends[side + 1])
            best[side].same_source.offer(self.start, rows[same], ranks_P[same], sign * scores_P[same])
            best[side].others.offer(self.start, rows[others], ranks_P[others], sign * scores_P[others])


class _CandidateFilter:
    """Keeps the pairs that may be among the n best, tile by tile; with `sign` -1, among the n lowest."""

    def __init__(self, sign: int, best_QN: np.ndarray, margin: np.float32) -> None:
        self.sign = sign
        self._margin = margin
        self._best_QN = best_QN.copy()  # of n different keys: the lowest bounds the n-th best from below
        self._floor_Q = self._best_QN.min(axis=1) - margin
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, scores_QK: np.ndarray, first: int) -> None:
        """Filter one tile of scores, whose first column is key `first`; infinite scores are ignored."""
        width = scores_QK.shape[1] // GROUP
        groups = scores_QK.reshape(len(scores_QK), GROUP, width)
        peaks_QG = groups.max(axis=1) if self.sign > 0 else -groups.min(axis=1)
        if width < self._best_QN.shape[1]:  # fewer groups than hits: their peaks bound nothing
            signed_QK = self.sign * scores_QK
            row, column = np.nonzero(signed_QK >= self._floor_Q[:, None])
            self._raise(row, signed_QK[row, column])
            row, group = np.nonzero(peaks_QG >= self._floor_Q[:, None])
        else:
            row, group = np.nonzero(peaks_QG >= self._floor_Q[:, None])
            self._raise(row, peaks_QG[row, group])
            above = peaks_QG[row, group] >= self._floor_Q[row]
            row, group = row[above], group[above]
        members = self.sign * groups[row, :, group]
        pair, member = np.nonzero((members >= self._floor_Q[row, None]) & (members > -np.inf))
        columns = first + member * width + group[pair]
        self._kept.append((row[pair], columns, members[pair, member]))

    def survivors(self) -> Pairs:
        """The pairs that reach the final bound."""
        rows, columns, scores = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        above = scores >= self._floor_Q[rows]
        return rows[above], columns[above]

    def _raise(self, row: np.ndarray, scores: np.ndarray) -> None:
        """Raise the bound by scores of different keys; `row` ascends. Most rows have few or none."""
        count = np.bincount(row, minlength=len(self._best_QN))
        changed = np.flatnonzero(count)
        if not changed.size:
            return
        n = self._best_QN.shape[1]
        both = np.full((changed.size, n + count.max()), -np.inf, dtype=np.float32)
        both[:, :n] = self._best_QN[changed]
        place = np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)
        both[np.searchsorted(changed, row), n + place] = scores
        self._best_QN[changed] = np.partition(both, -n, axis=1)[:, -n:]
        self._floor_Q = self._best_QN.min(axis=1) - self._margin


def _candidate_filters(
    best: BestSides, rows: slice, margin: np.float32
) -> tuple[_CandidateFilter, _CandidateFilter]:
    near, far = (side.others.scores_QN[rows] for side in best)
    return _CandidateFilter(1, near, margin), _CandidateFilter(-1, far, margin)


def _pairs_between(pairs: Pairs, first: int, stop: int) -> Pairs:
    """Pairs, sorted by row, whose row is in a range; rows then count from its start."""
    low, high = np.searchsorted(pairs[0], (first, stop))
    return pairs[0][low:high] - first, pairs[1][low:high]


def _same_source_pairs(sources_K: np.ndarray, by_source: np.ndarray, sources_Q: np.ndarray) -> Pairs:
    """All pairs of a query and a key of one source. `by_source` sorts `sources_K`."""
    ordered = sources_K[by_source]
    low, high = np.searchsorted(ordered, sources_Q, "left"), np.searchsorted(ordered, sources_Q, "right")
    counts = high - low
    rows = np.repeat(np.arange(len(sources_Q)), counts)
    within = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, by_source[np.repeat(low, counts) + within]


def _without_excess_copies(block: KeyBlock, limit: int) -> KeyBlock:
    """The block with only the first `limit`, by rank, of identical keys.

    The others cannot be hits, since `limit` keys with the same score precede them. A thousand silent
    recordings share one key, and otherwise each of them would be rescored for every query.
    """
    values, group, counts = np.unique(block.keys_KD[:, 0], return_inverse=True, return_counts=True)
    suspects = np.flatnonzero((counts > limit)[group]) if values.size else np.empty(0, dtype=np.int64)
    if not suspects.size:
        return block
    seen: dict[bytes, int] = {}
    kept = np.ones(len(block.keys_KD), dtype=bool)
    for at in suspects[np.argsort(block.ranks_K[suspects])]:
        key = block.keys_KD[at].tobytes()
        seen[key] = seen.get(key, 0) + 1
        kept[at] = seen[key] <= limit
    return block.select(kept)


def _threads() -> int:
    """The cores of this process, or fewer if OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit))) if limit.isdigit() else cores


def _padded(width: int) -> int:
    """The next multiple of `GROUP`."""
    return -(-width // GROUP) * GROUP


def _max_norm(vectors_ND: np.ndarray) -> float:
    """The largest norm, 0 if there are no vectors."""
    return float(np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND).max(initial=0.0)))
