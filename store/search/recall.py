"""How much of what an exact search finds `ServingIndex` finds, on a sample of real queries.

A query is the key of a clip that is there, searched among the keys of one modality, its own clip left out.
Recall@n is the share of the n best that is found; of clips with equal scores any is as good.

Legend: Q queries, K keys, D their width, N hits.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from r2scp.store.commits import lance_errors, sql_in
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import BLOCK_KEYS, KEY_COLUMNS, unit_keys
from r2scp.store.search.exact import KeyBlock, Wanted, search
from r2scp.store.search.vector_index import ServingSettings
from r2scp.store.search.vector_search import Hit, ServingIndex

QUERIES = 256  # a modality; of ten hits each, one in 2,560 missed is a recall of 0.9996
FEW, MANY = 3, 10  # hits that recall is told of
ROWS_PER_QUERY = 4  # rows looked at, at most, for clips that have both modalities


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecall:
    """Of queries of one modality among the keys of one."""

    query: Modality
    among: Modality
    queries: int
    at_3: float
    at_10: float
    p50_ms: float  # median of a search that reads keys from the table, as of a large store


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """Of one version of `clips`. Pairs that have no query or no key are left out."""

    version: int
    pairs: tuple[PairRecall, ...]

    @property
    def lowest_at_3(self) -> float:
        """Of all pairs; 1 where there is none, since nothing can be missed."""
        return min((pair.at_3 for pair in self.pairs), default=1.0)

    @property
    def lowest_at_10(self) -> float:
        """Of all pairs; 1 where there is none, since nothing can be missed."""
        return min((pair.at_10 for pair in self.pairs), default=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Which clips are the queries: up to `queries` a modality, drawn from those that fulfil `where`, an SQL
    condition on `clips`. The same seed draws the same clips, however they are stored."""

    where: str | None = None
    queries: int = QUERIES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1; got {self.queries}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """`keys_QD`: of `clip_ids`, in their order."""

    clip_ids: list[str]
    keys_QD: np.ndarray


def measure_recall(
    store: FeatureStore,
    settings: ServingSettings,
    sampling: Sampling | None = None,
    version: int | str | None = None,
) -> Recall:
    """Compare with an exact search through all clips of a version or tag, the latest where none is given.

    Raises `StoreError` where the condition is none, or the version is not there.
    """
    return measure_recalls(store, settings, {"": sampling or Sampling()}, version)[""]


def measure_recalls(
    store: FeatureStore,
    settings: ServingSettings,
    samplings: Mapping[str, Sampling],
    version: int | str | None = None,
) -> dict[str, Recall]:
    """As `measure_recall`, of several samples, in their names' order.

    Reads both keys of all clips once for all of them, in blocks of some 130 MB at D = 1024, and compares a
    clip that several samples drew once with each modality.
    """
    index = ServingIndex(store, settings, version, in_memory_bytes=0)
    samples = {who: _draw(store, index.version, sampling) for who, sampling in samplings.items()}
    pairs: dict[str, list[PairRecall]] = {who: [] for who in samplings}
    for among in KEY_COLUMNS:
        asked = {
            (who, query): sample
            for who, drawn in samples.items()
            for query, sample in drawn.items()
            if sample.clip_ids
        }
        if not asked:
            continue
        best = _best(store, index.version, among, asked)
        for (who, query), sample in asked.items():
            best_QN = best[who, query]
            if np.isfinite(best_QN[0, 0]):
                pairs[who].append(_compare(index, (query, among), sample, best_QN))
    return {who: Recall(version=index.version, pairs=tuple(found)) for who, found in pairs.items()}


def _compare(
    index: ServingIndex, pair: tuple[Modality, Modality], sample: _Sample, best_QN: np.ndarray
) -> PairRecall:
    seconds, at_3, at_10 = [], [], []
    index.nearest(sample.keys_QD[0], pair[1], MANY + 1)  # what is read once is not a search's time
    for clip_id, key_D, best_N in zip(sample.clip_ids, sample.keys_QD, best_QN, strict=True):
        start = time.perf_counter()
        found = index.nearest(key_D, pair[1], MANY + 1)
        seconds.append(time.perf_counter() - start)
        others = [hit for hit in found if hit.clip_id != clip_id]
        at_3.append(_share(others, best_N[:FEW]))
        at_10.append(_share(others, best_N))
    return PairRecall(
        query=pair[0],
        among=pair[1],
        queries=len(sample.clip_ids),
        at_3=float(np.nanmean(at_3)),
        at_10=float(np.nanmean(at_10)),
        p50_ms=1e3 * float(np.median(seconds)),
    )


def _share(found: list[Hit], best_N: np.ndarray) -> float:
    """Of the best scores, those reached; NaN where there are none."""
    best = best_N[np.isfinite(best_N)]
    if not best.size:
        return float("nan")
    return sum(hit.score >= best[-1] for hit in found[: best.size]) / best.size


def _draw(store: FeatureStore, version: int, sampling: Sampling) -> dict[Modality, _Sample]:
    clip_ids = np.sort(store.clips(["clip_id"], sampling.where, version)["clip_id"].to_numpy())
    order = np.random.default_rng(sampling.seed).permutation(clip_ids.size)
    drawn = {modality: _Sample(clip_ids=[], keys_QD=np.zeros((0, store.dim))) for modality in KEY_COLUMNS}
    for start in range(0, min(order.size, ROWS_PER_QUERY * sampling.queries), sampling.queries):
        ids = clip_ids[order[start : start + sampling.queries]].tolist()
        where = sql_in("clip_id", ids)
        table = store.clips(["clip_id", *KEY_COLUMNS.values()], where, version)
        table = table.take(pa.array([table["clip_id"].to_pylist().index(clip_id) for clip_id in ids]))
        for modality, column in KEY_COLUMNS.items():
            keys_KD, has_K = unit_keys(table, column, store.dim)
            before, at = drawn[modality], np.flatnonzero(has_K)
            drawn[modality] = _Sample(
                clip_ids=[*before.clip_ids, *(ids[i] for i in at)][: sampling.queries],
                keys_QD=np.concatenate([before.keys_QD, keys_KD[at]])[: sampling.queries],
            )
        if all(len(sample.clip_ids) >= sampling.queries for sample in drawn.values()):
            break
    return drawn


_Asked = Mapping[tuple[str, Modality], _Sample]  # by sample and the modality of its keys


def _best(store: FeatureStore, version: int, among: Modality, asked: _Asked) -> dict[tuple, np.ndarray]:
    """(Q, MANY) float32 for each: the best scores of other clips; minus infinity where there are no more.

    A clip that is in several is searched for once.
    """
    keys: dict[tuple[str, Modality], np.ndarray] = {}
    for (_, query), sample in asked.items():
        for clip_id, key_D in zip(sample.clip_ids, sample.keys_QD, strict=True):
            keys[clip_id, query] = key_D
    row = {clip: at for at, clip in enumerate(keys)}
    number = {clip_id: at for at, clip_id in enumerate(dict.fromkeys(clip_id for clip_id, _ in keys))}
    wanted = Wanted(
        queries_QD=np.stack(list(keys.values())).astype(np.float32),
        sources_Q=np.array([number[clip_id] for clip_id, _ in keys], dtype=np.int64),
        n=MANY,
        own_most=1,
    )
    nearest, _ = search(_blocks(store, version, among, number), wanted)
    return {
        (who, query): nearest.others.scores_QN[[row[clip_id, query] for clip_id in sample.clip_ids]]
        for (who, query), sample in asked.items()
    }


def _blocks(store: FeatureStore, version: int, among: Modality, number: dict[str, int]) -> Iterator[KeyBlock]:
    """All keys of one modality. A clip's source is its number, the same for all that have none."""
    column, dataset = KEY_COLUMNS[among], store.dataset(Table.CLIPS, version)
    waiting, count, first = [], 0, 0
    with lance_errors("read keys of", dataset.uri):
        batches = dataset.to_batches(
            columns=["clip_id", column], filter=f"{column} IS NOT NULL", batch_size=BLOCK_KEYS
        )
        for batch in batches:
            waiting.append(batch)
            count += batch.num_rows
            if count >= BLOCK_KEYS:  # a batch never spans two fragments, and fragments may be small
                yield _block(pa.Table.from_batches(waiting), column, store.dim, (number, first))
                waiting, count, first = [], 0, first + count
    if waiting:
        yield _block(pa.Table.from_batches(waiting), column, store.dim, (number, first))


def _block(table: pa.Table, column: str, dim: int, counted: tuple[dict[str, int], int]) -> KeyBlock:
    number, first = counted
    sources = [number.get(clip_id, len(number)) for clip_id in table["clip_id"].to_pylist()]
    return KeyBlock(
        keys_KD=unit_keys(table, column, dim)[0],
        ranks_K=np.arange(first, first + table.num_rows, dtype=np.int64),
        sources_K=np.array(sources, dtype=np.int64),
    )
