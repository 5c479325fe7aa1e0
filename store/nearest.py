"""Exact nearest and farthest keys, as blocked matrix products in float32.

A matrix product of float32 rounds differently with the shape of its operands, the machine's kernels and the
number of threads. So it only proposes: every key whose product comes within its rounding error of the n best
is scored again by `exact_scores`, which depends on the two vectors alone. Hits and scores are therefore the
same whatever the block sizes, the company of other queries and the number of threads; scores that are equal
in float32 are ties, and ties are broken by rank.

Legend: Q queries, K keys, D their width, N hits a query, P pairs of a query and a key.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

QUERY_ROWS = 1_024  # queries of one product
TILE_KEYS = 8_192  # keys of one product: 32 MB of scores
GROUP = 32  # scores of which one maximum is kept: a tile's 8,192 become 256
PAIR_ROWS = 64  # pairs scored at once: 0.5 MB in float64
UNIT_ROUNDOFF = 2.0**-24  # of float32, relative
NO_RANK = np.iinfo(np.int64).max  # where there is no hit


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyBlock:
    """Part of a bank. `ranks_K`: each key's place in the order that breaks ties, unique in the bank;
    `sources_K`: a number for where a key comes from, >= 0."""

    keys_KD: np.ndarray  # float32
    ranks_K: np.ndarray  # int64
    sources_K: np.ndarray  # int64


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


def search(blocks: Iterable[KeyBlock], wanted: Wanted) -> tuple[Best, Best]:
    """(nearest, farthest) of each query among the keys of all blocks.

    Scores are products of query and key; those of the farthest are negated, so that highest is best in both.
    A query's own source is left out while searching, so it costs the others none of their n places.
    """
    count = len(wanted.queries_QD)
    near, far = (Best(others=Top(count, wanted.n), own=Top(count, wanted.n)) for _ in range(2))
    longest_query = _longest(wanted.queries_QD)
    scores = np.empty(
        QUERY_ROWS * _padded(TILE_KEYS), dtype=np.float32
    )  # one for all: fresh pages cost as much again
    for whole in blocks:
        if not len(whole.keys_KD):
            continue
        block = _without_surplus(whole, wanted.n + wanted.own_most)
        margin = _margin(wanted.queries_QD.shape[1], longest_query, _longest(block.keys_KD))
        by_source = np.argsort(block.sources_K, kind="stable")
        for start in range(0, count, QUERY_ROWS):
            _search_block(block, by_source, wanted, start, (near, far), _Tile(scores, margin))
    return near, far


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
    for start in range(0, rows_P.size, PAIR_ROWS):
        span = slice(start, start + PAIR_ROWS)
        products = keys_KD[columns_P[span]].astype(np.float64)
        products *= queries_QD[rows_P[span]]
        scores_P[span] = products.sum(axis=1)
    return scores_P


def _search_block(
    block: KeyBlock,
    by_source: np.ndarray,
    wanted: Wanted,
    start: int,
    results: tuple[Best, Best],
    tile: "_Tile",
) -> None:
    """Offer to `results` what one block holds for the queries from `start` on."""
    queries = wanted.queries_QD[start : start + QUERY_ROWS]
    sources = wanted.sources_Q[start : start + QUERY_ROWS]
    own = _own_pairs(block.sources_K, by_source, sources)
    sieves = tuple(
        _Sieve(sign, best.others.scores_QN[start : start + QUERY_ROWS], tile.margin)
        for sign, best in zip((1, -1), results, strict=True)
    )
    for first in range(0, len(block.keys_KD), TILE_KEYS):
        keys = block.keys_KD[first : first + TILE_KEYS]
        width = len(keys)
        scores = tile.shaped(len(queries), _padded(width))
        np.matmul(queries, keys.T, out=scores[:, :width])
        here = (own[1] >= first) & (own[1] < first + width)
        own_rows, own_columns = own[0][here], own[1][here] - first
        for sieve in sieves:
            scores[:, width:] = -sieve.sign * np.inf
            scores[own_rows, own_columns] = -sieve.sign * np.inf
            sieve.see(scores, first)
    own_scores = exact_scores(queries, block.keys_KD, *own)
    for sieve, best in zip(sieves, results, strict=True):
        best.own.offer(start, own[0], block.ranks_K[own[1]], sieve.sign * own_scores)
        rows, columns = sieve.left()
        scores = sieve.sign * exact_scores(queries, block.keys_KD, rows, columns)
        best.others.offer(start, rows, block.ranks_K[columns], scores)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Room for the scores of one product, and how far from the truth they may be, twice."""

    room: np.ndarray
    margin: np.float32

    def shaped(self, rows: int, columns: int) -> np.ndarray:
        return self.room[: rows * columns].reshape(rows, columns)


class _Sieve:
    """Keeps the pairs that may be among the n best, tile after tile; `sign` -1 looks for the lowest."""

    def __init__(self, sign: int, known_QN: np.ndarray, margin: np.float32) -> None:
        self.sign = sign
        self._margin = margin
        self._best_QN = known_QN  # scores of n different keys: the least bounds the n-th best from below
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def see(self, scores_QK: np.ndarray, first: int) -> None:
        """One tile of scores, whose first column is key `first`; infinite: not to be looked at."""
        rows, width = scores_QK.shape
        groups = scores_QK.reshape(rows, GROUP, width // GROUP)
        peaks = groups.max(axis=1) if self.sign > 0 else -groups.min(axis=1)
        n = self._best_QN.shape[1]
        if width // GROUP < n:  # too few groups to bound anything
            peaks_of_all = self.sign * scores_QK
            best = np.concatenate([self._best_QN, peaks_of_all], axis=1)
        else:
            best = np.concatenate([self._best_QN, peaks], axis=1)
        self._best_QN = np.partition(best, -n, axis=1)[:, -n:]
        floor = self._floor()
        row, group = np.nonzero(peaks >= floor[:, None])
        members = self.sign * groups[row, :, group]
        pair, member = np.nonzero((members >= floor[row, None]) & (members > -np.inf))
        columns = first + member * (width // GROUP) + group[pair]
        self._kept.append((row[pair], columns, members[pair, member]))

    def left(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, columns) of the pairs that the bound of the end still lets through."""
        rows, columns, scores = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        good = scores >= self._floor()[rows]
        return rows[good], columns[good]

    def _floor(self) -> np.ndarray:
        return self._best_QN.min(axis=1) - self._margin


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
    return KeyBlock(keys_KD=block.keys_KD[kept], ranks_K=block.ranks_K[kept], sources_K=block.sources_K[kept])


def _padded(width: int) -> int:
    """The next multiple of `GROUP`."""
    return -(-width // GROUP) * GROUP


def _longest(vectors_ND: np.ndarray) -> float:
    """The greatest norm, 0 where there is none."""
    return float(np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND).max(initial=0.0)))
