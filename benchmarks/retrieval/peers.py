"""Who searches for one query at a time in `benchmarks.retrieval`: ours, LanceDB's defaults, faiss, hnswlib.

Each is built once and used as its documentation says. One that is approximate names settings from the
quickest to the most thorough; which of them it runs with is found by a sweep.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from lancedb import connect

from benchmarks.retrieval.data import AMONG, DIM, STEP, Bank, number
from r2scp.store.schema import Table
from r2scp.store.search.bank import IN_MEMORY_BYTES, KEY_COLUMNS
from r2scp.store.search.vector_index import refresh_index
from r2scp.store.search.vector_search import ServingIndex, ServingSettings

HITS = 10
M, CONSTRUCTION = 32, 100  # links of a node in HNSW, candidates when it is built
Ask = Callable[[np.ndarray], Sequence[int]]  # a key -> the HITS keys that are nearest, best first


@dataclass(frozen=True, kw_only=True)
class Index:
    """The index of a contender. `at`: search with a setting; `disk`, `memory`: bytes, without the keys."""

    settings: Sequence[object]
    at: Callable[[object], Ask]
    disk: int
    memory: int  # that it holds, as far as it says; of Lance, the index that it caches


@dataclass(frozen=True, kw_only=True)
class Contender:
    """`vectors`: times that it holds all keys in memory, whatever their number (numpy maps the file of keys;
    ours holds them up to IN_MEMORY_BYTES); `slow`: goes through all keys for a query."""

    name: str
    make: Callable[[Bank], Index]
    vectors: float = 0.0
    slow: bool = False
    most: int = 1 << 62  # keys with which it can be built in reasonable time


def _ours(kind: Literal["auto", "exact"], in_memory_bytes: int) -> Callable[[Bank], Index]:
    """`ServingIndex`; with `exact` without the help of its index."""

    def make(bank: Bank) -> Index:
        if kind != "exact":
            refresh_index(bank.store, ServingSettings())
        index = ServingIndex(bank.store, ServingSettings(kind=kind), in_memory_bytes=in_memory_bytes)
        size = 0 if kind == "exact" else _index_bytes(Path(bank.store.address(Table.CLIPS).uri))
        keys = len(bank.keys_KD) * DIM * 4
        cached = keys if len(KEY_COLUMNS) * keys <= in_memory_bytes else 0

        def at(setting: object) -> Ask:
            return lambda key_D: [number(hit.clip_id) for hit in index.nearest(key_D, AMONG, HITS)]

        return Index(settings=["as shipped"], at=at, disk=size, memory=size + cached)

    return make


def _lancedb(bank: Bank) -> Index:
    """IVF_PQ, as LanceDB makes it by default, but for the metric; on a copy of links."""
    folder = bank.folder / "lancedb"
    if not folder.exists():
        shutil.copytree(bank.store.address(Table.CLIPS).uri, folder / "clips.lance", copy_function=os.link)
        table = connect(folder).open_table("clips")
        for index in table.list_indices():
            table.drop_index(index.name)
        table.create_index(metric="cosine", vector_column_name=KEY_COLUMNS[AMONG])
    table = connect(folder).open_table("clips")
    size = _index_bytes(folder / "clips.lance")

    def at(setting: object) -> Ask:
        nprobes, refine = setting if isinstance(setting, tuple) else (None, None)

        def ask(key_D: np.ndarray) -> Sequence[int]:
            query = table.search(key_D, vector_column_name=KEY_COLUMNS[AMONG]).distance_type("cosine")  # pyright: ignore[reportAttributeAccessIssue]
            if nprobes is not None:
                query = query.nprobes(nprobes).refine_factor(refine)
            rows = query.select(["clip_id", "_distance"]).limit(HITS).to_arrow()
            return [number(clip_id) for clip_id in rows["clip_id"].to_pylist()]

        return ask

    probes = (20, 80, 320)
    settings = ["as shipped", *((some, refine) for refine in (10, 20, 50, 200) for some in probes)]
    return Index(settings=settings, at=at, disk=size, memory=size)


def _index_bytes(dataset: Path) -> int:
    files = (dataset / "_indices").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def _numpy(bank: Bank) -> Index:
    keys_KD = np.asarray(bank.keys_KD)

    def at(setting: object) -> Ask:
        def ask(key_D: np.ndarray) -> Sequence[int]:
            scores = keys_KD @ key_D
            best = np.argpartition(-scores, HITS)[:HITS]
            return best[np.argsort(-scores[best])].tolist()

        return ask

    return Index(settings=["exact"], at=at, disk=0, memory=keys_KD.nbytes)


def _faiss(factory: str, settings: Sequence[object], train: int, ef_construction: int = 0):
    """An index of faiss's `index_factory`, by inner product. `train`: keys it is trained on, at most."""

    def make(bank: Bank) -> Index:
        import faiss  # a peer that may not be installed

        count = len(bank.keys_KD)
        text = factory.format(lists=_lists(count))
        path = bank.folder / f"faiss-{text.replace(',', '-')}.index"
        if path.exists():
            index = faiss.read_index(str(path))
        else:
            index = faiss.index_factory(DIM, text, faiss.METRIC_INNER_PRODUCT)
            if ef_construction:
                index.hnsw.efConstruction = ef_construction
            if not index.is_trained:
                some = np.sort(np.random.default_rng(0).choice(count, min(train, count), replace=False))
                index.train(np.ascontiguousarray(bank.keys_KD[some]))
            for _, keys in bank.blocks():
                index.add(keys)
            if len(settings) > 1:
                faiss.write_index(index, str(path))

        def at(setting: object) -> Ask:
            if isinstance(setting, str) and setting != "exact":
                faiss.ParameterSpace().set_index_parameters(index, setting)
            return lambda key_D: index.search(key_D[None], HITS)[1][0].tolist()

        size = path.stat().st_size if path.exists() else count * DIM * 4
        return Index(settings=settings, at=at, disk=size, memory=size)

    return make


def _lists(count: int) -> int:
    """By faiss's guidelines: four times the square root of the number of keys, as a power of two."""
    return 1 << round(np.log2(4 * count**0.5))


def _hnswlib(bank: Bank) -> Index:
    import hnswlib  # a peer that may not be installed

    index, path, count = hnswlib.Index("ip", DIM), bank.folder / "hnswlib.index", len(bank.keys_KD)
    if path.exists():
        index.load_index(str(path), max_elements=count)
    else:
        index.init_index(max_elements=count, M=M, ef_construction=CONSTRUCTION)
        for start, keys in bank.blocks():
            index.add_items(keys, np.arange(start, start + len(keys)))
        index.save_index(str(path))

    def at(setting: object) -> Ask:
        def ask(key_D: np.ndarray) -> Sequence[int]:
            return index.knn_query(key_D[None], k=HITS, num_threads=1)[0][0].tolist()

        index.set_ef(int(str(setting)))
        return ask

    size = path.stat().st_size
    return Index(settings=[16, 32, 64, 128, 256, 512, 1024], at=at, disk=size, memory=size)


PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
OURS, NUMPY = "ours", "numpy, all keys"
LEARN = 4 * STEP  # keys that an IVF learns from

CONTENDERS = (
    Contender(name=OURS, make=_ours("auto", IN_MEMORY_BYTES)),
    Contender(name="ours, keys on disk", make=_ours("auto", 0)),
    Contender(name="ours, all keys", make=_ours("exact", IN_MEMORY_BYTES), slow=True),
    Contender(name="LanceDB, IVF_PQ and refine", make=_lancedb),
    Contender(name=NUMPY, make=_numpy, slow=True),
    Contender(
        name="faiss IVF,Flat",
        make=_faiss("IVF{lists},Flat", [f"nprobe={some}" for some in PROBES], LEARN),
        vectors=1,
    ),
    Contender(
        name="faiss IVF,PQ fast scan, refine",
        make=_faiss(
            "IVF{lists},PQ256x4fs,RFlat",
            [f"nprobe={some},k_factor_rf={more}" for more in (8, 32, 128) for some in PROBES[4::2]],
            LEARN,
        ),
        vectors=1.2,
    ),
    Contender(
        name=f"faiss HNSW, M {M}",
        make=_faiss(
            f"HNSW{M},Flat", [f"efSearch={some}" for some in (16, 32, 64, 128, 256, 512)], 0, CONSTRUCTION
        ),
        vectors=1.1,
        most=300_000,
    ),
    Contender(name=f"hnswlib, M {M}", make=_hnswlib, vectors=1.1, most=300_000),
    Contender(name="faiss Flat", make=_faiss("Flat", ["exact"], 0), vectors=1, slow=True),
)
