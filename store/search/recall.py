"""Recall of `ServingIndex` against an exact search, on a sample of real queries.

A query is the key of a stored clip, searched among the keys of one modality without the clip itself. Recall@n
is the share of the n best scores that is found; clips with equal scores are interchangeable.

Legend: Q queries, K keys, D their width, N hits.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from r2scp.store.commits import lance_errors, sql_in
from r2scp.store.feature_store import FeatureStore, read_blocks
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import BLOCK_KEYS, KEY_COLUMNS, unit_keys
from r2scp.store.search.exact import KeyBlock, QueryBlock, search_blocks
from r2scp.store.search.vector_search import Hit, ServingIndex, ServingSettings

QUERIES = 256  # per modality; with ten hits each, one miss is a recall of 0.9996
FEW, MANY = 3, 10  # hits
ROWS_PER_QUERY = 4  # read at most, in search of clips with both modalities


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecall:
    """Recall of queries of one modality among the keys of another, or the same."""

    query: Modality
    among: Modality
    queries: int
    at_3: float
    at_10: float
    p50_ms: float  # median of a search with keys from the table, as in a large store


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """Recall at one version of `clips`. Pairs without queries or keys are left out."""

    version: int
    pairs: tuple[PairRecall, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The query clips: up to `queries` per modality, from those that meet `where`, an SQL condition.

    The same seed draws the same clips, regardless of their storage order.
    """

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


def measure_recalls(
    store: FeatureStore,
    settings: ServingSettings,
    samplings: Mapping[str, Sampling],
    version: int | str | None = None,
) -> dict[str, Recall]:
    """Sample name -> recall, against an exact search of all clips of a version or tag, by default the latest.

    Reads both keys of all clips once for all samples, in blocks of about 130 MB at D = 1024, and compares a
    clip in several samples once with each modality. Raises `StoreError` for an invalid condition or version.
    """
    index = ServingIndex(store, settings, version, in_memory_bytes=0)
    samples = {name: _draw(store, index.version, sampling) for name, sampling in samplings.items()}
    queries: _Queries = {
        (name, modality): sample
        for name, by_modality in samples.items()
        for modality, sample in by_modality.items()
        if sample.clip_ids
    }
    pairs: dict[str, list[PairRecall]] = {name: [] for name in samplings}
    for among in KEY_COLUMNS if queries else ():
        best = _best_scores(store, index.version, among, queries)
        for (name, modality), sample in queries.items():
            best_QN = best[name, modality]
            if np.isfinite(best_QN[0, 0]):
                pairs[name].append(_compare(index, (modality, among), sample, best_QN))
    return {name: Recall(version=index.version, pairs=tuple(each)) for name, each in pairs.items()}


def _compare(
    index: ServingIndex, pair: tuple[Modality, Modality], sample: _Sample, best_QN: np.ndarray
) -> PairRecall:
    seconds, at_3, at_10 = [], [], []
    index.nearest(sample.keys_QD[0], pair[1], MANY + 1)  # the first search also loads the index
    for clip_id, key_D, best_N in zip(sample.clip_ids, sample.keys_QD, best_QN, strict=True):
        start = time.perf_counter()
        hits = index.nearest(key_D, pair[1], MANY + 1)
        seconds.append(time.perf_counter() - start)
        others = [hit for hit in hits if hit.clip_id != clip_id]
        at_3.append(_recall(others, best_N[:FEW]))
        at_10.append(_recall(others, best_N))
    return PairRecall(
        query=pair[0],
        among=pair[1],
        queries=len(sample.clip_ids),
        at_3=float(np.nanmean(at_3)),
        at_10=float(np.nanmean(at_10)),
        p50_ms=1e3 * float(np.median(seconds)),
    )


def _recall(hits: list[Hit], best_N: np.ndarray) -> float:
    """Share of the best scores that the hits reach; NaN if there are none."""
    best = best_N[np.isfinite(best_N)]
    if not best.size:
        return float("nan")
    return sum(hit.score >= best[-1] for hit in hits[: best.size]) / best.size


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


_Queries = Mapping[tuple[str, Modality], _Sample]  # by sample name and modality of the keys


def _best_scores(
    store: FeatureStore, version: int, among: Modality, queries: _Queries
) -> dict[tuple[str, Modality], np.ndarray]:
    """(Q, MANY) float32 for each: the best scores of other clips, padded with minus infinity.

    A clip in several samples is searched for once.
    """
    keys: dict[tuple[str, Modality], np.ndarray] = {}
    for (_, modality), sample in queries.items():
        for clip_id, key_D in zip(sample.clip_ids, sample.keys_QD, strict=True):
            keys[clip_id, modality] = key_D
    row = {clip: at for at, clip in enumerate(keys)}
    number = {clip_id: at for at, clip_id in enumerate(dict.fromkeys(clip_id for clip_id, _ in keys))}
    block = QueryBlock(
        queries_QD=np.stack(list(keys.values())).astype(np.float32),
        sources_Q=np.array([number[clip_id] for clip_id, _ in keys], dtype=np.int64),
        n=MANY,
        largest_source=1,  # a source is one query clip
    )
    nearest, _ = search_blocks(_blocks(store, version, among, number), block)
    return {
        (name, modality): nearest.others.scores_QN[[row[clip_id, modality] for clip_id in sample.clip_ids]]
        for (name, modality), sample in queries.items()
    }


def _blocks(store: FeatureStore, version: int, among: Modality, number: dict[str, int]) -> Iterator[KeyBlock]:
    """All keys of one modality.

    Each query clip has a source of its own, so that only the clip itself is excluded; all others share one.
    """
    column, dataset = KEY_COLUMNS[among], store.dataset(Table.CLIPS, version)
    with lance_errors("read keys of", dataset.uri):
        batches = dataset.to_batches(
            columns=["clip_id", column], filter=f"{column} IS NOT NULL", batch_size=BLOCK_KEYS
        )
        rank = 0
        for table in read_blocks(batches, BLOCK_KEYS):
            sources = [number.get(clip_id, len(number)) for clip_id in table["clip_id"].to_pylist()]
            yield KeyBlock(
                keys_KD=unit_keys(table, column, store.dim)[0],
                ranks_K=np.arange(rank, rank + table.num_rows, dtype=np.int64),
                sources_K=np.array(sources, dtype=np.int64),
            )
            rank += table.num_rows
