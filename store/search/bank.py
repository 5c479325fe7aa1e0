"""`MemoryBank`: the unit keys of the clips that may be retrieved for a missing modality.

A bank is not a copy but rows of `clips`, at one version, of some splits and corpora. Searches are exact (see
`r2scp.store.search.exact`). Keys that fit in `IN_MEMORY_BYTES` stay in memory; those of a larger bank are
read again, block by block, for each search.

    >>> bank = MemoryBank.open(store, BankScope(splits=("train",)))
    >>> hits = bank.search(queries, Search(missing=Modality.AUDIO, retrieval=Retrieval.CROSS))
    >>> hits.nearest.ids(0)
    ['vggsound/…', …]

Legend: Q queries, K keys, R rows read, D width of a key, N hits per query.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from r2scp.store.commits import sql_in
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore, read_blocks
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search.exact import (
    NO_RANK,
    BestHits,
    KeyBlock,
    QueryBlock,
    TopHits,
    no_hits,
    offer_same_source,
    search_blocks,
)
from r2scp.store.sources import disjoint_split, source_of

HITS = 15  # neighbours stored per query; a model uses the first few
IN_MEMORY_BYTES = 2 << 30  # two keys each of 260,000 clips at D = 1024
BLOCK_KEYS = 32_768  # keys read and searched at a time: 134 MB at D = 1024
NORM_TOLERANCE = 1e-3  # of a stored key's length, about 1

KEY_COLUMNS = {Modality.AUDIO: "audio_key", Modality.VISUAL: "visual_key"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BankScope:
    """Which clips the bank consists of. `corpora` and `splits`: empty for all.

    With `disjoint` the splits are those of `disjoint_split`, not the corpora's own.
    """

    corpora: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    disjoint: bool = False

    def where(self) -> str | None:
        """The scope as an SQL condition on `clips`, but for a disjoint split: see `includes_source`."""
        columns = [("corpus", self.corpora), ("split", () if self.disjoint else self.splits)]
        return " AND ".join(sql_in(column, values) for column, values in columns if values) or None

    def includes(self, corpus: str, split: str, source: str) -> bool:
        """Whether such a clip is in the bank."""
        return (
            (not self.corpora or corpus in self.corpora)
            and (self.disjoint or not self.splits or split in self.splits)
            and self.includes_source(source)
        )

    def includes_source(self, source: str) -> bool:
        """Whether a disjoint split allows clips of a source."""
        return not (self.disjoint and self.splits) or disjoint_split(source) in self.splits


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """`keys_QD`: float32, unit norm, of the available modality; `sources`: of the same clips, see
    `source_of`."""

    keys_QD: np.ndarray
    sources: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How to search for the `missing` modality. `cross_weight` in [0, 1]: of the cross score, in `hybrid`."""

    missing: Modality
    retrieval: Retrieval
    n: int = HITS
    leak_guard: bool = True
    cross_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1; got {self.n}")
        if not 0.0 <= self.cross_weight <= 1.0:
            raise ValueError(f"cross_weight must be in [0, 1]; got {self.cross_weight}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """Bank clips for each query, best first; of equal scores the lower clip id first."""

    rows_QN: np.ndarray  # int64 into `clip_ids`, -1 if the bank has no more
    scores_QN: np.ndarray  # float32 cosines, NaN if there is no hit
    own_source_Q: np.ndarray  # int32: same-source hits among the n best of a search without the leak guard
    clip_ids: list[str] = field(repr=False)

    def ids(self, query: int) -> list[str]:
        """Clip ids of one query's hits."""
        return [self.clip_ids[row] for row in self.rows_QN[query] if row >= 0]

    def scores(self, query: int) -> np.ndarray:
        """Their scores."""
        return self.scores_QN[query][self.rows_QN[query] >= 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The hits with the highest scores, and those with the lowest."""

    nearest: Hits
    farthest: Hits


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredHits:
    """Stored hits of one query, nearest or farthest: ids and float32 scores, best first."""

    ids: Sequence[str]
    scores: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviousHits:
    """The result of the same search for the same queries before the clips `added` came into the bank.

    No clip has left the bank or changed since, and none of those added is of a query's own source.
    """

    nearest: Sequence[StoredHits]
    farthest: Sequence[StoredHits]
    added: Collection[str]


class MemoryBank:
    """Clips in the order of their ids, with a key for each modality they have. Created by `open`."""

    def __init__(self, store: FeatureStore, scope: BankScope, version: int) -> None:
        self.store = store
        self.scope = scope
        self.version = version
        self.clip_ids: list[str] = []
        self._rank: dict[str, int] = {}
        self._sources_K = np.empty(0, dtype=np.int64)
        self._source_number: dict[str, int] = {}
        self._largest_source = 0
        self._cached: list[_Rows] | None = None
        self._counts: Counter[Modality] = Counter()

    def __len__(self) -> int:
        return len(self.clip_ids)

    @classmethod
    def open(
        cls,
        store: FeatureStore,
        scope: BankScope | None = None,
        version: int | str | None = None,
        in_memory_bytes: int = IN_MEMORY_BYTES,
    ) -> "MemoryBank":
        """The bank at a version or tag of `clips`, by default the latest.

        Raises `StoreError` if there is no such version or a key in it is not a finite unit vector.
        """
        bank = cls(store, scope or BankScope(), store.dataset(Table.CLIPS, version).version)
        count = store.dataset(Table.CLIPS, bank.version).count_rows(filter=bank.scope.where())
        fits = count * store.dim * 4 * len(KEY_COLUMNS) <= in_memory_bytes
        cached, sources = [], {}
        for rows in bank._read():
            sources |= zip(rows.clip_ids, rows.sources, strict=True)
            bank._counts.update({modality: int(has.sum()) for modality, has in rows.has.items()})
            if fits:
                cached.append(rows)
        bank._cached = cached if fits else None
        bank._number(sources)
        return bank

    @cached_property
    def fingerprint(self) -> str:
        """Of all that determines the hits: clips, sources and keys. Reads all keys."""
        digests = {
            clip_id: rows.digest(at) for rows in self._rows() for at, clip_id in enumerate(rows.clip_ids)
        }
        together = hashlib.sha256(b"".join(digests[clip_id] for clip_id in self.clip_ids))
        return together.hexdigest()[:16]

    def count_with(self, modality: Modality) -> int:
        """How many clips of the bank have the modality."""
        return self._counts[modality]

    def search(self, queries: Queries, how: Search, previous: PreviousHits | None = None) -> SearchResult:
        """The `how.n` nearest and farthest clips that have the missing modality, for each query.

        With the leak guard no hit is of the query's own source, and there are as many hits as without it
        unless the bank has fewer. Without it, same-source hits are counted. With `previous` only the clips
        added since are searched; the result is the same.
        """
        numbers = [self._source_number.get(source, -1) for source in queries.sources]
        block = QueryBlock(
            queries_QD=np.ascontiguousarray(queries.keys_QD, dtype=np.float32),
            sources_Q=np.asarray(numbers, dtype=np.int64),
            n=how.n,
            largest_source=self._largest_source,
        )
        if block.queries_QD.shape != (len(numbers), self.store.dim):
            must = f"({len(numbers)}, {self.store.dim})"
            raise ValueError(f"query keys must be {must}; got {block.queries_QD.shape}")
        if previous is None:
            near, far = search_blocks(self._blocks(how), block)
        else:
            near, far = self._search_added(block, how, previous)
        return SearchResult(nearest=self._hits(near, how, 1), farthest=self._hits(far, how, -1))

    def compared_keys(self, how: Search, clip_ids: Collection[str]) -> np.ndarray:
        """(K, D): what a query is compared with, of those of `clip_ids` that can be hits."""
        ranks = self._ranks(clip_ids)
        keys = [block.keys_KD[np.isin(block.ranks_K, ranks)] for block in self._blocks(how)]
        return np.concatenate([np.zeros((0, self.store.dim), np.float32), *keys])

    def _search_added(
        self, queries: QueryBlock, how: Search, previous: PreviousHits
    ) -> tuple[BestHits, BestHits]:
        """Search the added clips on top of the previous hits. Same-source hits are few, and not all of them
        are stored: they are scored again."""
        best = no_hits(queries)
        for side, sign, hits in zip((previous.nearest, previous.farthest), (1, -1), best, strict=True):
            self._offer_stored(side, sign, queries.sources_Q, hits.others)
        added = self._ranks(previous.added)
        new: list[KeyBlock] = []
        for block in self._blocks(how):
            is_new = np.isin(block.ranks_K, added)
            new.append(block.select(is_new))
            offer_same_source([block if not is_new.any() else block.select(~is_new)], queries, best)
        return search_blocks(new, queries, best)

    def _ranks(self, clip_ids: Collection[str]) -> np.ndarray:
        """Those of `clip_ids` that are in the bank."""
        return np.array([self._rank[clip_id] for clip_id in clip_ids if clip_id in self._rank], np.int64)

    def _offer_stored(
        self, side: Sequence[StoredHits], sign: int, sources_Q: np.ndarray, top: TopHits
    ) -> None:
        """Offer the stored hits of other sources to `top`."""
        rows = np.repeat(np.arange(len(side)), [len(hits.ids) for hits in side])
        ranks = np.array([self._rank[clip_id] for hits in side for clip_id in hits.ids], np.int64)
        scores = np.array([score for hits in side for score in hits.scores], np.float32)
        others = self._sources_K[ranks] != sources_Q[rows]
        top.offer(0, rows[others], ranks[others], sign * scores[others])

    def _hits(self, best: BestHits, how: Search, sign: int) -> Hits:
        unguarded, own_source = best.others.merged(best.same_source)
        top = best.others if how.leak_guard else unguarded
        is_hit = top.ranks_QN != NO_RANK
        return Hits(
            rows_QN=np.where(is_hit, top.ranks_QN, -1),
            scores_QN=np.where(is_hit, sign * top.scores_QN, np.float32(np.nan)),
            own_source_Q=own_source.astype(np.int32),
            clip_ids=self.clip_ids,
        )

    def _number(self, sources: dict[str, str]) -> None:
        """Number the clips in the order of their ids, and the sources as they come."""
        self.clip_ids = sorted(sources)
        self._rank = {clip_id: rank for rank, clip_id in enumerate(self.clip_ids)}
        for clip_id in self.clip_ids:
            self._source_number.setdefault(sources[clip_id], len(self._source_number))
        numbers = [self._source_number[sources[clip_id]] for clip_id in self.clip_ids]
        self._sources_K = np.asarray(numbers, dtype=np.int64)
        self._largest_source = max(Counter(numbers).values(), default=0)

    def _blocks(self, how: Search) -> Iterator[KeyBlock]:
        """What a query is compared with. The hybrid score, w q·a + (1 - w) q·b, is q·(w a + (1 - w) b)."""
        available, weight = how.missing.other, np.float32(how.cross_weight)
        for rows in self._rows():
            usable = rows.has[how.missing]
            if how.retrieval is not Retrieval.CROSS:
                usable = usable & rows.has[available]
            ranks_R = np.fromiter(map(self._rank.__getitem__, rows.clip_ids), np.int64, len(rows.clip_ids))
            parts: list[slice | np.ndarray] = [slice(None)]  # of all rows, without a copy
            if not usable.all():
                at_K = np.flatnonzero(usable)
                parts = [at_K[start : start + BLOCK_KEYS] for start in range(0, at_K.size, BLOCK_KEYS)]
            for part in parts:
                if how.retrieval is Retrieval.HYBRID:
                    keys = weight * rows.keys[how.missing][part] + (1 - weight) * rows.keys[available][part]
                else:
                    keys = rows.keys[how.missing if how.retrieval is Retrieval.CROSS else available][part]
                ranks = ranks_R[part]
                yield KeyBlock(keys_KD=keys, ranks_K=ranks, sources_K=self._sources_K[ranks])

    def _rows(self) -> Iterator["_Rows"]:
        """From memory, or read again."""
        yield from self._cached if self._cached is not None else self._read()

    def _read(self) -> Iterator["_Rows"]:
        columns, where = ["clip_id", "source_id", *KEY_COLUMNS.values()], self.scope.where()
        dataset = self.store.dataset(Table.CLIPS, self.version)
        batches = dataset.to_batches(columns=columns, filter=where, batch_size=BLOCK_KEYS)
        for table in read_blocks(batches, BLOCK_KEYS):
            yield _Rows.of(table, self.store.dim, self.scope)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Some clips of a bank; `keys` are zero where `has` is false."""

    clip_ids: list[str]
    sources: list[str]
    keys: dict[Modality, np.ndarray]  # (K, D) float32
    has: dict[Modality, np.ndarray]  # (K,) bool

    @classmethod
    def of(cls, table: pa.Table, dim: int, scope: BankScope) -> "_Rows":
        included = [scope.includes_source(source) for source in sources_of(table)]
        table = table.filter(pa.array(included, pa.bool_()))
        keys, has = {}, {}
        for modality, column in KEY_COLUMNS.items():
            keys[modality], has[modality] = unit_keys(table, column, dim)
        return cls(clip_ids=table["clip_id"].to_pylist(), sources=sources_of(table), keys=keys, has=has)

    def digest(self, at: int) -> bytes:
        """Of all that determines for which queries a clip is a hit."""
        digest = hashlib.blake2b(repr((self.clip_ids[at], self.sources[at])).encode(), digest_size=16)
        for modality in KEY_COLUMNS:
            digest.update(self.keys[modality][at].tobytes() if self.has[modality][at] else b"none")
        return digest.digest()


def sources_of(table: pa.Table) -> list[str]:
    """`source_of` each row; needs the columns clip_id and source_id."""
    pairs = zip(table["clip_id"].to_pylist(), table["source_id"].to_pylist(), strict=True)
    return [source_of(*pair) for pair in pairs]


def unit_keys(table: pa.Table, column: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """((K, D) float32, (K,) bool): a column of keys, zero for null, and which are not null.

    Raises `StoreError` if a key is not a finite unit vector, as scores would then not be cosines.
    """
    vectors = table[column].combine_chunks()
    has = np.asarray(vectors.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
    keys = np.zeros((table.num_rows, dim), dtype=np.float32)
    keys[has] = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    norms = np.sqrt(np.einsum("kd,kd->k", keys, keys))
    wrong = np.flatnonzero(has & ~(np.abs(norms - 1) <= NORM_TOLERANCE))
    if wrong.size:
        clip_id = table["clip_id"][int(wrong[0])].as_py()
        raise StoreError(
            f"{column} of {wrong.size} clips must be of length 1; that of {clip_id} is "
            f"{norms[wrong[0]]:.6g}: extract these clips again"
        )
    return keys, has
