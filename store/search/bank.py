"""`MemoryBank`: the unit keys of the clips that may serve in place of a missing modality.

A bank is no copy: it is the rows of `clips`, at one version, of some splits and corpora. Searches are exact
(see `r2scp.store.search.exact`). Keys that fit in `IN_MEMORY_BYTES` are held; those of a larger bank are read
again, block by block, for each search.

    >>> bank = MemoryBank.open(store, BankScope(splits=("train",)))
    >>> hits = bank.search(queries, Search(missing=Modality.AUDIO, retrieval=Retrieval.CROSS))
    >>> hits.nearest.ids(0)
    ['vggsound/…', …]

Legend: Q queries, K keys, D their width, N hits a query.
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
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search.exact import NO_RANK, Best, KeyBlock, Top, Wanted, nothing_yet, offer_own, search
from r2scp.store.sources import disjoint_split, source_of

HITS = 15  # neighbours kept a query; a model uses the first few
IN_MEMORY_BYTES = 2 << 30  # two keys each of 260,000 clips at D = 1024
BLOCK_KEYS = 32_768  # keys read and searched at a time: 134 MB at D = 1024
NORM_TOLERANCE = 1e-3  # of a stored key's length, about 1

KEY_COLUMNS = {Modality.AUDIO: "audio_key", Modality.VISUAL: "visual_key"}
OTHER = {Modality.AUDIO: Modality.VISUAL, Modality.VISUAL: Modality.AUDIO}


@dataclass(frozen=True, kw_only=True, slots=True)
class BankScope:
    """Which clips may serve. `corpora` and `splits`: empty for all.

    With `disjoint` the splits are those of `disjoint_split`, not the corpora's own.
    """

    corpora: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    disjoint: bool = False

    def where(self) -> str | None:
        """As an SQL condition on `clips`, as far as it is one: a disjoint split is not."""
        named = [("corpus", self.corpora), ("split", () if self.disjoint else self.splits)]
        parts = [sql_in(name, values) for name, values in named if values]
        return " AND ".join(parts) or None

    def takes(self, corpus: str, split: str, source: str) -> bool:
        """Whether a clip with these may serve."""
        named = (not self.corpora or corpus in self.corpora) and (
            self.disjoint or not self.splits or split in self.splits
        )
        return named and self.holds(source)

    def holds(self, source: str) -> bool:
        """The other part of the condition."""
        return not (self.disjoint and self.splits) or disjoint_split(source) in self.splits


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """`keys_QD`: float32, unit norm, of the modality that is there; `sources`: of the same clips, see
    `source_of`."""

    keys_QD: np.ndarray
    sources: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How to look for the `missing` modality. `cross_weight` in [0, 1]: of the cross score, in `hybrid`."""

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

    rows_QN: np.ndarray  # int64 into `clip_ids`, -1 where the bank has no more
    scores_QN: np.ndarray  # float32 cosines, NaN where there is no hit
    own_source_Q: np.ndarray  # int32: of the query's own source among the n best of an unguarded search
    clip_ids: list[str] = field(repr=False)

    def ids(self, query: int) -> list[str]:
        """Clip ids of one query's hits."""
        return [self.clip_ids[row] for row in self.rows_QN[query] if row >= 0]

    def scores(self, query: int) -> np.ndarray:
        """Their scores."""
        return self.scores_QN[query][self.rows_QN[query] >= 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Hits nearest to the query, and hits nearest to its opposite."""

    nearest: Hits
    farthest: Hits


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """Hits of one query and side as they were written: ids and float32 scores, best first."""

    ids: Sequence[str]
    scores: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What the same search found, for the same queries, before the clips `entered` came to the bank.

    Nothing that was in the bank then has left it or changed since; and nothing in it is of a query's own
    source but what was then.
    """

    nearest: Sequence[Listed]
    farthest: Sequence[Listed]
    entered: Collection[str]


class MemoryBank:
    """Clips in the order of their ids, with a key for each modality they have. Made by `open`."""

    def __init__(self, store: FeatureStore, scope: BankScope, version: int) -> None:
        self.store = store
        self.scope = scope
        self.version = version
        self.clip_ids: list[str] = []
        self._rank: dict[str, int] = {}
        self._sources_K = np.empty(0, dtype=np.int64)
        self._source_number: dict[str, int] = {}
        self._own_most = 0
        self._held: list[_Rows] | None = None
        self._serving: Counter[Modality] = Counter()

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
        """The bank at a version or tag of `clips`, the latest where none is given.

        Raises `StoreError` where that version is not there or a key in it is not a finite unit vector.
        """
        bank = cls(store, scope or BankScope(), store.dataset(Table.CLIPS, version).version)
        count = store.dataset(Table.CLIPS, bank.version).count_rows(filter=bank.scope.where())
        keep = count * store.dim * 4 * len(KEY_COLUMNS) <= in_memory_bytes
        held, sources = [], {}
        for rows in bank._read():
            sources |= zip(rows.clip_ids, rows.sources, strict=True)
            bank._serving.update({modality: int(has.sum()) for modality, has in rows.has.items()})
            if keep:
                held.append(rows)
        bank._held = held if keep else None
        bank._name(sources)
        return bank

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides what a search finds: clips, sources and keys. Costs a reading of the keys."""
        digests = {
            clip_id: rows.digest(at) for rows in self._rows() for at, clip_id in enumerate(rows.clip_ids)
        }
        together = hashlib.sha256(b"".join(digests[clip_id] for clip_id in self.clip_ids))
        return together.hexdigest()[:16]

    def serving(self, missing: Modality) -> int:
        """How many clips of the bank have the modality."""
        return self._serving[missing]

    def search(self, queries: Queries, how: Search, known: Known | None = None) -> Found:
        """The `how.n` nearest and farthest clips that have the missing modality, for each query.

        With the leak guard no hit is of the query's own source, and the hits are as many as without it
        unless the bank holds fewer. Without it, such hits are counted. With `known` only what has entered
        since is searched; the result is the same.
        """
        numbers = [self._source_number.get(source, -1) for source in queries.sources]
        wanted = Wanted(
            queries_QD=np.ascontiguousarray(queries.keys_QD, dtype=np.float32),
            sources_Q=np.asarray(numbers, dtype=np.int64),
            n=how.n,
            own_most=self._own_most,
        )
        if wanted.queries_QD.shape != (len(numbers), self.store.dim):
            must = f"({len(numbers)}, {self.store.dim})"
            raise ValueError(f"query keys must be {must}; got {wanted.queries_QD.shape}")
        if known is None:
            near, far = search(self._blocks(how), wanted)
        else:
            near, far = self._gone_on(wanted, how, known)
        return Found(nearest=self._hits(near, how, 1), farthest=self._hits(far, how, -1))

    def compared_keys(self, how: Search, clip_ids: Collection[str]) -> np.ndarray:
        """(K, D): what a query is compared with, of those of `clip_ids` that serve."""
        ranks = np.array([self._rank[clip_id] for clip_id in clip_ids if clip_id in self._rank], np.int64)
        keys = [block.keys_KD[np.isin(block.ranks_K, ranks)] for block in self._blocks(how)]
        return np.concatenate([np.zeros((0, self.store.dim), np.float32), *keys])

    def _gone_on(self, wanted: Wanted, how: Search, known: Known) -> tuple[Best, Best]:
        """What was known, and what has entered since. Hits of the own source are few and not all are listed:
        they are scored anew."""
        best = nothing_yet(wanted)
        for side, sign, into in zip((known.nearest, known.farthest), (1, -1), best, strict=True):
            self._list(side, sign, wanted.sources_Q, into.others)
        entered = np.array(
            [self._rank[clip_id] for clip_id in known.entered if clip_id in self._rank], np.int64
        )
        new: list[KeyBlock] = []
        for block in self._blocks(how):
            here = np.isin(block.ranks_K, entered)
            new.append(block.only(here))
            offer_own([block if not here.any() else block.only(~here)], wanted, best)
        return search(new, wanted, best)

    def _list(self, side: Sequence[Listed], sign: int, sources_Q: np.ndarray, top: Top) -> None:
        """Offer the hits of other sources."""
        rows = np.repeat(np.arange(len(side)), [len(listed.ids) for listed in side])
        ranks = np.array([self._rank[clip_id] for listed in side for clip_id in listed.ids], np.int64)
        scores = np.array([score for listed in side for score in listed.scores], np.float32)
        others = self._sources_K[ranks] != sources_Q[rows]
        top.offer(0, rows[others], ranks[others], sign * scores[others])

    def _hits(self, best: Best, how: Search, sign: int) -> Hits:
        unguarded, own_source = best.others.merged(best.own)
        top = best.others if how.leak_guard else unguarded
        there = top.ranks_QN != NO_RANK
        return Hits(
            rows_QN=np.where(there, top.ranks_QN, -1),
            scores_QN=np.where(there, sign * top.scores_QN, np.float32(np.nan)),
            own_source_Q=own_source.astype(np.int32),
            clip_ids=self.clip_ids,
        )

    def _name(self, sources: dict[str, str]) -> None:
        """Number clips in the order of their ids, and sources as they come."""
        self.clip_ids = sorted(sources)
        self._rank = {clip_id: rank for rank, clip_id in enumerate(self.clip_ids)}
        for clip_id in self.clip_ids:
            self._source_number.setdefault(sources[clip_id], len(self._source_number))
        numbers = [self._source_number[sources[clip_id]] for clip_id in self.clip_ids]
        self._sources_K = np.asarray(numbers, dtype=np.int64)
        self._own_most = max(Counter(numbers).values(), default=0)

    def _blocks(self, how: Search) -> Iterator[KeyBlock]:
        """What a query is compared with. The hybrid score, w q·a + (1 - w) q·b, is q·(w a + (1 - w) b)."""
        there = OTHER[how.missing]
        for rows in self._rows():
            serves = rows.has[how.missing]
            if how.retrieval is not Retrieval.CROSS:
                serves = serves & rows.has[there]
            ranks_R = np.fromiter(map(self._rank.__getitem__, rows.clip_ids), np.int64, len(rows.clip_ids))
            if serves.all():
                parts = [slice(None)]  # which copies nothing
            else:
                found = np.flatnonzero(serves)
                parts = [found[start : start + BLOCK_KEYS] for start in range(0, found.size, BLOCK_KEYS)]
            for at in parts:
                if how.retrieval is Retrieval.HYBRID:
                    weight = np.float32(how.cross_weight)
                    keys = weight * rows.keys[how.missing][at] + (1 - weight) * rows.keys[there][at]
                else:
                    keys = rows.keys[how.missing if how.retrieval is Retrieval.CROSS else there][at]
                ranks = ranks_R[at]
                yield KeyBlock(keys_KD=keys, ranks_K=ranks, sources_K=self._sources_K[ranks])

    def _rows(self) -> Iterator["_Rows"]:
        """From memory, or read again."""
        yield from self._held if self._held is not None else self._read()

    def _read(self) -> Iterator["_Rows"]:
        columns = ["clip_id", "source_id", *KEY_COLUMNS.values()]
        dataset = self.store.dataset(Table.CLIPS, self.version)
        waiting, count = [], 0
        for batch in dataset.to_batches(columns=columns, filter=self.scope.where(), batch_size=BLOCK_KEYS):
            waiting.append(batch)
            count += batch.num_rows
            if count >= BLOCK_KEYS:  # a batch never spans two fragments, and fragments may be small
                yield _Rows.of(pa.Table.from_batches(waiting), self.store.dim, self.scope)
                waiting, count = [], 0
        if waiting:
            yield _Rows.of(pa.Table.from_batches(waiting), self.store.dim, self.scope)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Some clips of a bank. `keys` are zero where `has` is false."""

    clip_ids: list[str]
    sources: list[str]
    keys: dict[Modality, np.ndarray]  # (K, D) float32
    has: dict[Modality, np.ndarray]  # (K,) bool

    @classmethod
    def of(cls, table: pa.Table, dim: int, scope: BankScope) -> "_Rows":
        table = table.filter(pa.array([scope.holds(source) for source in _sources(table)], pa.bool_()))
        keys, has = {}, {}
        for modality, column in KEY_COLUMNS.items():
            keys[modality], has[modality] = unit_keys(table, column, dim)
        return cls(clip_ids=table["clip_id"].to_pylist(), sources=_sources(table), keys=keys, has=has)

    def digest(self, at: int) -> bytes:
        """Of all that decides where one clip is a hit."""
        digest = hashlib.blake2b(repr((self.clip_ids[at], self.sources[at])).encode(), digest_size=16)
        for modality in KEY_COLUMNS:
            digest.update(self.keys[modality][at].tobytes() if self.has[modality][at] else b"none")
        return digest.digest()


def _sources(table: pa.Table) -> list[str]:
    pairs = zip(table["clip_id"].to_pylist(), table["source_id"].to_pylist(), strict=True)
    return [source_of(*pair) for pair in pairs]


def unit_keys(table: pa.Table, column: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """((K, D) float32, (K,) bool): a column of keys, zero where there is none, and where there is one.

    Raises `StoreError` where a key is not a finite unit vector: a cosine would not be one.
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
