"""Exact nearest and farthest keys, as blocked matrix products in float32.

A matrix product of float32 rounds differently with the shape of its operands, the machine's kernels and the
number of threads. So it only proposes: every key whose product comes within its rounding error of the n best
is scored again by `exact_scores`, which depends on the two vectors alone. Hits and scores are therefore the
same whatever the block sizes, the company of other queries and the number of threads; scores that are equal
in float32 are ties, and ties are broken by rank.

Legend: Q queries, K keys, D their width, N hits a query, P pairs of a query and a key.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Self

import numpy as np
from threadpoolctl import threadpool_limits

QUERY_ROWS = 1_024  # queries of one product
TILE_KEYS = 8_192  # keys of one product: 32 MB of scores
GROUP = 32  # scores of which one maximum is kept: a tile's 8,192 become 256
SPAN_ROWS = 64  # queries whose scores of a tile are looked at together: 2 MB, which stay in a core's cache
PAIR_ROWS = 32  # pairs of one query scored at once: 256 kB in float64, which stay in a core's cache
UNIT_ROUNDOFF = 2.0**-24  # of float32, relative
NO_RANK = np.iinfo(np.int64).max  # where there is no hit


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyBlock:
    """Part of a bank. `ranks_K`: each key's place in the order that breaks ties, unique in the bank;
    `sources_K`: a number for where a key comes from, >= 0."""

    keys_KD: np.ndarray  # float32
    ranks_K: np.ndarray  # int64
    sources_K: np.ndarray  # int64

    def only(self, at_K: np.ndarray) -> "KeyBlock":
        """The keys where `at_K` is true."""
        return KeyBlock(
            keys_KD=self.keys_KD[at_K], ranks_K=self.ranks_K[at_K], sources_K=self.sources_K[at_K]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is asked: the n best for each query. `sources_Q`: numbers as the blocks use them, -1 for none of
    them; `own_most`: the most keys in the bank that any one source has."""

    queries_QD: np.ndarray  # float32
    sources_Q: np.ndarray  # int64
    n: int
    own_most: int


class Top:
    """The n best of each query so far: highest score first, then lowest rank."""

    def __init__(self, count: int, n: int) -> None:
        self.scores_QN = np.full((count, n), -np.inf, dtype=np.float32)
        self.ranks_QN = np.full((count, n), NO_RANK, dtype=np.int64)

    def offer(self, start: int, rows_P: np.ndarray, ranks_P: np.ndarray, scores_P: np.ndarray) -> None:
        """Take in pairs, `rows_P` counted from query `start`; a rank must not come twice for a query."""
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

    def merged(self, other: Self) -> tuple["Top", np.ndarray]:
        """The n best of both, which have no rank in common; and how many of those are `other`'s, (Q,)."""
        count, n = self.scores_QN.shape
        both = Top(count, n)
        both.scores_QN[:], both.ranks_QN[:] = self.scores_QN, self.ranks_QN
        rows, place = np.nonzero(other.ranks_QN != NO_RANK)
        both.offer(0, rows, other.ranks_QN[rows, place], other.scores_QN[rows, place])
        theirs = (both.ranks_QN[:, :, None] == other.ranks_QN[:, None, :]).any(axis=2)
        return both, (theirs & (both.ranks_QN != NO_RANK)).sum(axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The n best keys of other sources, and the n best of a query's own source."""

    others: Top
    own: Top


def search(
    blocks: Iterable[KeyBlock], wanted: Wanted, known: tuple[Best, Best] | None = None
) -> tuple[Best, Best]:
    """(nearest, farthest) of each query among the keys of all blocks, on top of `known`, which is changed.

    Scores are products of query and key; those of the farthest are negated, so that highest is best in both.
    A query's own source is left out while searching, so it costs the others none of their n places.
    """
    count = len(wanted.queries_QD)
    near, far = known or nothing_yet(wanted)
    longest_query = _longest(wanted.queries_QD)
    threads = _threads()
    lanes = max(1, min(threads, count // SPAN_ROWS))
    step = min(QUERY_ROWS, -(-count // lanes)) or 1
    rooms: SimpleQueue[np.ndarray] = SimpleQueue()  # fresh pages cost as much again as what is written there
    for _ in range(lanes):
        rooms.put(np.empty(step * _padded(TILE_KEYS), dtype=np.float32))
    # A lane multiplies and sieves its own queries with one thread. A product on all threads would leave all
    # but one of them waiting while its scores are looked at.
    with threadpool_limits(max(1, threads // lanes), user_api="blas"), ThreadPoolExecutor(lanes) as pool:
        for whole in blocks:
            if not len(whole.keys_KD):
                continue
            block = _without_surplus(whole, wanted.n + wanted.own_most)
            work = _Work(
                wanted=wanted,
                block=block,
                by_source=np.argsort(block.sources_K, kind="stable"),
                margin=_margin(wanted.queries_QD.shape[1], longest_query, _longest(block.keys_KD)),
                results=(near, far),
                rooms=rooms,
            )
            spans = [slice(start, min(start + step, count)) for start in range(0, count, step)]
            for _ in pool.map(work.do, spans):
                pass
    return near, far


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """One block against all queries; lanes take them a range at a time, and write to theirs alone."""

    wanted: Wanted
    block: KeyBlock
    by_source: np.ndarray  # sorts the block's keys by their sources
    margin: np.float32
    results: tuple[Best, Best]
    rooms: SimpleQueue[np.ndarray]  # for scores, one a lane

    def do(self, rows: slice) -> None:
        """Take in what the block holds for these queries."""
        queries = self.wanted.queries_QD[rows]
        own = _own_pairs(self.block.sources_K, self.by_source, self.wanted.sources_Q[rows])
        spans = []
        for first in range(0, len(queries), SPAN_ROWS):
            stop = min(first + SPAN_ROWS, len(queries))
            at = slice(rows.start + first, rows.start + stop)
            spans.append(
                _Span(
                    queries_QD=queries[first:stop],
                    start=at.start,
                    own=_rows_of(own, first, stop),
                    block=self.block,
                    sieves=_sieves(self.results, at, self.margin),
                )
            )
        room = self.rooms.get()
        try:
            _search_block(queries, spans, room)
        finally:  # another lane may be waiting for it
            self.rooms.put(room)
        for span in spans:
            span.settle(self.results)


def nothing_yet(wanted: Wanted) -> tuple[Best, Best]:
    """(nearest, farthest) of each query before any key was looked at."""
    count, n = len(wanted.queries_QD), wanted.n
    near, far = (Best(others=Top(count, n), own=Top(count, n)) for _ in range(2))
    return near, far


def offer_own(blocks: Iterable[KeyBlock], wanted: Wanted, known: tuple[Best, Best]) -> None:
    """Take into `known` the keys of each query's own source alone."""
    for block in blocks:
        by_source = np.argsort(block.sources_K, kind="stable")
        rows, columns = _own_pairs(block.sources_K, by_source, wanted.sources_Q)
        scores = exact_scores(wanted.queries_QD, block.keys_KD, rows, columns)
        for best, sign in zip(known, (1, -1), strict=True):
            best.own.offer(0, rows, block.ranks_K[columns], sign * scores)


def product_error(queries_QD: np.ndarray, keys_KD: np.ndarray) -> np.float32:
    """How far a float32 product of two of these may be from the score it is compared with."""
    return _margin(queries_QD.shape[1], _longest(queries_QD), _longest(keys_KD))


def _margin(dim: int, longest_query: float, longest_key: float) -> np.float32:
    """2 * n * u * |q||k| bounds the error of any way to sum n products, u being the unit roundoff, for the
    n-th best and for the key compared with it together; 2 more for rounding the exact score."""
    return np.float32(2 * (dim + 2) * UNIT_ROUNDOFF * longest_query * longest_key)


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


def _search_block(queries_QD: np.ndarray, spans: "list[_Span]", room: np.ndarray) -> None:
    """Let the sieves of all spans, which are the queries one after another, see all keys of the block."""
    keys_KD = spans[0].block.keys_KD
    for first in range(0, len(keys_KD), TILE_KEYS):
        keys = keys_KD[first : first + TILE_KEYS]
        scores = room[: len(queries_QD) * _padded(len(keys))].reshape(len(queries_QD), -1)
        np.matmul(queries_QD, keys.T, out=scores[:, : len(keys)])
        tile = _Tile(scores, first, len(keys), spans[0].start)
        for span in spans:
            span.see(tile)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Scores of all queries from `start` on with `width` keys of a block from `first` on, and padding."""

    scores_QK: np.ndarray
    first: int
    width: int
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Some queries, from `start` on, and one block. `own`: rows of these queries and columns of the block
    that are of one source, sorted by row."""

    queries_QD: np.ndarray
    start: int
    own: tuple[np.ndarray, np.ndarray]
    block: KeyBlock
    sieves: "tuple[_Sieve, _Sieve]"

    def see(self, tile: _Tile) -> None:
        """One tile, whose scores of these queries fit in a core's cache."""
        count, at = len(self.queries_QD), self.start - tile.start
        scores = tile.scores_QK[at : at + count]
        here = (self.own[1] >= tile.first) & (self.own[1] < tile.first + tile.width)
        rows, columns = self.own[0][here], self.own[1][here] - tile.first
        for sieve in self.sieves:
            scores[:, tile.width :] = scores[rows, columns] = -sieve.sign * np.inf
            sieve.see(scores, tile.first)

    def settle(self, results: tuple[Best, Best]) -> None:
        """Score exactly what came through, all at once, and offer it to `results`."""
        through = [self.own, *(sieve.left() for sieve in self.sieves)]
        rows, columns = (np.concatenate(parts) for parts in zip(*through, strict=True))
        scores = exact_scores(self.queries_QD, self.block.keys_KD, rows, columns)
        own, *others = np.split(scores, np.cumsum([len(part[0]) for part in through])[:-1])
        ranks_K = self.block.ranks_K
        for sieve, best, pairs, found in zip(self.sieves, results, through[1:], others, strict=True):
            best.own.offer(self.start, self.own[0], ranks_K[self.own[1]], sieve.sign * own)
            best.others.offer(self.start, pairs[0], ranks_K[pairs[1]], sieve.sign * found)


class _Sieve:
    """Keeps the pairs that may be among the n best, tile after tile; `sign` -1 looks for the lowest."""

    def __init__(self, sign: int, known_QN: np.ndarray, margin: np.float32) -> None:
        self.sign = sign
        self._margin = margin
        self._best_QN = known_QN.copy()  # of n different keys: the least bounds the n-th best from below
        self._floor_Q = self._best_QN.min(axis=1) - margin
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def see(self, scores_QK: np.ndarray, first: int) -> None:
        """One tile of scores, whose first column is key `first`; infinite: not to be looked at."""
        width = scores_QK.shape[1] // GROUP
        groups = scores_QK.reshape(len(scores_QK), GROUP, width)
        peaks_QG = groups.max(axis=1) if self.sign > 0 else -groups.min(axis=1)
        if width < self._best_QN.shape[1]:  # too few groups to bound anything
            peaks_of_all = self.sign * scores_QK
            row, column = np.nonzero(peaks_of_all >= self._floor_Q[:, None])
            self._raise(row, peaks_of_all[row, column])
            row, group = np.nonzero(peaks_QG >= self._floor_Q[:, None])
        else:
            row, group = np.nonzero(peaks_QG >= self._floor_Q[:, None])
            self._raise(row, peaks_QG[row, group])
            still = peaks_QG[row, group] >= self._floor_Q[row]
            row, group = row[still], group[still]
        members = self.sign * groups[row, :, group]
        pair, member = np.nonzero((members >= self._floor_Q[row, None]) & (members > -np.inf))
        columns = first + member * width + group[pair]
        self._kept.append((row[pair], columns, members[pair, member]))

    def left(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, columns) of the pairs that the bound of the end still lets through."""
        rows, columns, scores = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        good = scores >= self._floor_Q[rows]
        return rows[good], columns[good]

    def _raise(self, row: np.ndarray, scores: np.ndarray) -> None:
        """Take scores of different keys in; `row` ascends. Of most rows a tile holds few or none."""
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


def _sieves(results: tuple[Best, Best], rows: slice, margin: np.float32) -> "tuple[_Sieve, _Sieve]":
    near, far = (best.others.scores_QN[rows] for best in results)
    return _Sieve(1, near, margin), _Sieve(-1, far, margin)


def _rows_of(pairs: tuple[np.ndarray, np.ndarray], first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of pairs sorted by row whose row is in a range; rows count from its start."""
    low, high = np.searchsorted(pairs[0], (first, stop))
    return pairs[0][low:high] - first, pairs[1][low:high]


def _own_pairs(
    sources_K: np.ndarray, by_source: np.ndarray, sources_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of all pairs of one source. `by_source` sorts `sources_K`."""
    ordered = sources_K[by_source]
    low, high = np.searchsorted(ordered, sources_Q, "left"), np.searchsorted(ordered, sources_Q, "right")
    counts = high - low
    rows = np.repeat(np.arange(len(sources_Q)), counts)
    within = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, by_source[np.repeat(low, counts) + within]


def _without_surplus(block: KeyBlock, most: int) -> KeyBlock:
    """The block with no more than the `most` first, by rank, of keys that are identical.

    The others cannot be hits: so many keys of the same score go before them. A thousand silent recordings
    share one key, and without this each of them would be scored again for every query.
    """
    values, group, counts = np.unique(block.keys_KD[:, 0], return_inverse=True, return_counts=True)
    suspects = np.flatnonzero((counts > most)[group]) if values.size else np.empty(0, dtype=np.int64)
    if not suspects.size:
        return block
    seen: dict[bytes, int] = {}
    kept = np.ones(len(block.keys_KD), dtype=bool)
    for at in suspects[np.argsort(block.ranks_K[suspects])]:
        key = block.keys_KD[at].tobytes()
        seen[key] = seen.get(key, 0) + 1
        kept[at] = seen[key] <= most
    return block.only(kept)


def _threads() -> int:
    """The cores of this process, or what OMP_NUM_THREADS says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(said))) if said.isdigit() else cores


def _padded(width: int) -> int:
    """The next multiple of `GROUP`."""
    return -(-width // GROUP) * GROUP


def _longest(vectors_ND: np.ndarray) -> float:
    """The greatest norm, 0 where there is none."""
    return float(np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND).max(initial=0.0)))
