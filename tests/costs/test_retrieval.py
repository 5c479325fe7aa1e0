"""The cost of a search in counts: scans of the index, reads of keys, products, pairs scored exactly.

The functions that do the work are wrapped and counted; nothing is replaced.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search import exact as nearest
from r2scp.store.search import recall, vector_index, vector_search
from r2scp.store.search.bank import IN_MEMORY_BYTES, KEY_COLUMNS, BankScope, MemoryBank, Queries, Search
from r2scp.store.search.recall import Sampling, measure_recalls
from r2scp.store.search.vector_index import refresh_index
from r2scp.store.search.vector_search import CANDIDATES, EXTRA_CANDIDATES, ServingIndex, ServingSettings

DIM, CLIPS, HITS = 32, 3_000, 10
ALWAYS = ServingSettings(exact_below=0)
AUDIO, VISUAL = Modality.AUDIO, Modality.VISUAL


def keys(count: int, seed: int) -> np.ndarray:
    """Unit keys about forty centres."""
    centres = np.random.default_rng(0).standard_normal((40, DIM))
    rng = np.random.default_rng(seed)
    drawn = centres[rng.integers(40, size=count)] + 0.5 * rng.standard_normal((count, DIM))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def put(store: FeatureStore, count: int, seed: int) -> None:
    """Clips with both keys, in one commit."""
    schema = store.address(Table.CLIPS).schema
    known = {"clip_id": pa.array([f"{seed}/{at:05}" for at in range(count)])}
    known |= {"source_id": known["clip_id"], "split": pa.array(["train"] * count)}
    for at, column in enumerate(KEY_COLUMNS.values()):
        drawn = pa.array(keys(count, 2 * seed + at).reshape(-1))
        known[column] = pa.FixedSizeListArray.from_arrays(drawn, DIM)
    columns = [known.get(field.name, pa.nulls(count, field.type)) for field in schema]
    store.commit(Table.CLIPS, [store.stage(Table.CLIPS, pa.Table.from_arrays(columns, schema=schema))], {})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """Some thousand clips, all indexed."""
    monkeypatch.setattr(vector_index, "PARTITION_KEYS", 64)
    made = FeatureStore.create(str(tmp_path / "store"), "tiny", DIM)
    put(made, CLIPS, seed=1)
    refresh_index(made, ALWAYS)
    return made


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """Counts the calls of a function from then on, and as `rows` the sum of `size` of their arguments."""

    def wrap(owner: object, name: str, size: Callable[..., int] = lambda *_, **__: 0) -> Counter[str]:
        counts, real = Counter(), getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts["calls"] += 1
            counts["rows"] += size(*arguments, **named)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)
        return counts

    return wrap


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_search_is_one_scan_and_reads_keys_only_from_disk(
    store: FeatureStore, count: Callable[..., Counter[str]], in_memory: bool
) -> None:
    put(store, 200, seed=5)  # rows outside the index are found by the same scan
    index = ServingIndex(store, ALWAYS, in_memory_bytes=IN_MEMORY_BYTES if in_memory else 0)
    scans = count(lance.LanceDataset, "scanner", lambda *_, columns, **__: columns.count("visual_key"))
    takes = count(lance.LanceDataset, "take")
    scored = count(vector_search, "exact_scores", lambda *a: a[2].size)
    queries = [*keys(30, seed=77), *keys(200, seed=2 * 5 + 1)[:20]]
    for query in queries:
        hits = index.nearest(query, VISUAL, HITS)
    assert hits[0] == ("5/00019", pytest.approx(1.0))
    assert len(queries) <= scans["calls"] <= 1.2 * len(queries), "rarely a second"
    assert scans["rows"] == (0 if in_memory else scans["calls"])
    assert takes["calls"] == 0
    assert scored["rows"] <= 2 * (CANDIDATES * HITS + EXTRA_CANDIDATES) * len(queries)


def test_without_an_index_keys_in_memory_are_searched(
    tmp_path: Path, count: Callable[..., Counter[str]]
) -> None:
    store = FeatureStore.create(str(tmp_path / "small"), "tiny", DIM)
    put(store, 500, seed=1)
    index = ServingIndex(store)
    scans = count(lance.LanceDataset, "scanner")
    scored = count(vector_search, "exact_scores", lambda *a: a[2].size)
    for query in keys(20, seed=77):
        assert len(index.nearest(query, AUDIO, HITS)) == HITS
    assert scans["calls"] == 0
    assert scored["rows"] == (CANDIDATES * HITS + EXTRA_CANDIDATES) * 20, (
        "the best products are scored exactly"
    )


def test_samples_of_recall_share_one_exact_search(
    store: FeatureStore, count: Callable[..., Counter[str]]
) -> None:
    searches = count(recall, "search_blocks", lambda _, wanted: len(wanted.queries_QD))
    samplings = {"all": Sampling(queries=40), "again": Sampling(queries=40), "few": Sampling(queries=10)}
    measured = measure_recalls(store, ALWAYS, samplings)
    assert measured["all"].pairs[0].at_10 == measured["again"].pairs[0].at_10 > 0.9
    assert {name: each.pairs[0].queries for name, each in measured.items()} == {
        "all": 40,
        "again": 40,
        "few": 10,
    }
    assert searches["calls"] == len(KEY_COLUMNS), "one pass over the keys of a modality"
    assert searches["rows"] == len(KEY_COLUMNS) * len(KEY_COLUMNS) * 40, "no clip is searched for twice"


def test_an_exact_search_is_little_more_than_its_product(
    store: FeatureStore, count: Callable[..., Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "TILE_KEYS", 512)
    monkeypatch.setattr(nearest, "QUERY_ROWS", 256)
    bank = MemoryBank.open(store, BankScope(splits=()))
    products = count(np, "matmul", lambda queries, keys, **_: queries.shape[0] * keys.shape[1])
    scored = count(nearest, "exact_scores", lambda *a: a[2].size)
    asked = keys(600, seed=9)
    found = bank.search(
        Queries(keys_QD=asked, sources=["nobody"] * 600),
        Search(missing=VISUAL, retrieval=Retrieval.CROSS, n=HITS),
    )
    assert (found.nearest.rows_QN >= 0).all()
    assert products["rows"] == 600 * CLIPS, "each pair is multiplied once"
    assert products["calls"] == 3 * 6, "in tiles"
    assert 2 * HITS * 600 <= scored["rows"] <= 2.5 * HITS * 600, "of the others hardly any is scored again"


def test_keys_are_not_copied_if_all_clips_have_one(store: FeatureStore) -> None:
    bank = MemoryBank.open(store, BankScope(splits=()))
    assert bank._cached is not None
    blocks = bank._blocks(Search(missing=VISUAL, retrieval=Retrieval.CROSS))
    for rows, block in zip(bank._cached, blocks, strict=True):
        assert np.shares_memory(block.keys_KD, rows.keys[VISUAL])
