"""What a search may cost, in counts: looks into an index, readings of keys, products, pairs scored exactly.

Each count is taken of the real thing by wrapping what does the work; nothing is replaced.
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
from r2scp.store.search import recall as serving_recall
from r2scp.store.search import vector_index as serving_index
from r2scp.store.search import vector_search as serving_search
from r2scp.store.search.bank import KEY_COLUMNS, BankScope, MemoryBank, Queries, Search
from r2scp.store.search.recall import Sampling, measure_recalls
from r2scp.store.search.vector_index import ServingSettings, refresh_index
from r2scp.store.search.vector_search import MOST_CANDIDATES, ServingIndex

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
    monkeypatch.setattr(serving_index, "PARTITION_KEYS", 64)
    made = FeatureStore.create(str(tmp_path / "store"), "tiny", DIM)
    put(made, CLIPS, seed=1)
    refresh_index(made, ALWAYS)
    return made


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """Counts calls from then on: name -> calls, and `name rows` -> what `size` says of their arguments."""

    def wrap(owner: object, name: str, size: Callable[..., int] = lambda *_, **__: 0) -> Counter[str]:
        counts, real = Counter(), getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts["calls"] += 1
            counts["rows"] += size(*arguments, **named)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)
        return counts

    return wrap


def test_keys_in_memory_are_not_read_again(store: FeatureStore, count: Callable[..., Counter[str]]) -> None:
    index = ServingIndex(store, ALWAYS)
    looks, readings = count(lance.LanceDataset, "scanner"), count(lance.LanceDataset, "take")
    queries = keys(50, seed=77)
    for query in queries:
        index.nearest(query, VISUAL, HITS)
    assert readings["calls"] == 0
    assert len(queries) <= looks["calls"] <= 1.2 * len(queries), "one look, rarely a second"


def test_keys_on_disk_are_read_together(store: FeatureStore, count: Callable[..., Counter[str]]) -> None:
    index = ServingIndex(store, ALWAYS, in_memory_bytes=0)
    looks = count(lance.LanceDataset, "scanner")
    readings = count(lance.LanceDataset, "take", lambda _, places, **__: len(places))
    queries = keys(50, seed=77)
    for query in queries:
        index.nearest(query, VISUAL, HITS)
    assert looks["calls"] <= 1.2 * len(queries)
    assert readings["calls"] <= 1.7 * len(queries), "one reading, sometimes a second"
    assert readings["rows"] <= 0.25 * MOST_CANDIDATES * HITS * len(queries)


def test_rows_that_no_index_holds_cost_no_look(
    store: FeatureStore, count: Callable[..., Counter[str]]
) -> None:
    put(store, 200, seed=5)
    new = keys(200, seed=2 * 5 + 1)
    index = ServingIndex(store, ALWAYS, in_memory_bytes=0)
    scans = count(lance.LanceDataset, "scanner")
    for at, query in enumerate(new[:30]):
        (hit,) = index.nearest(query, VISUAL, 1)
        assert (hit.clip_id, hit.score) == (f"5/{at:05}", pytest.approx(1.0))
    assert scans["calls"] <= 1.5 * 30


def test_a_store_without_an_index_is_searched_in_memory(
    tmp_path: Path, count: Callable[..., Counter[str]]
) -> None:
    store = FeatureStore.create(str(tmp_path / "small"), "tiny", DIM)
    put(store, 500, seed=1)
    index = ServingIndex(store)
    scans = count(lance.LanceDataset, "scanner")
    scored = count(serving_search, "exact_scores", lambda *a: a[2].size)
    for query in keys(20, seed=77):
        assert len(index.nearest(query, AUDIO, HITS)) == HITS
    assert scans["calls"] == 0
    assert scored["rows"] <= 2 * HITS * 20, "a product tells which few are worth an exact score"


def test_samples_of_recall_share_one_exact_search(
    store: FeatureStore, count: Callable[..., Counter[str]]
) -> None:
    searches = count(serving_recall, "search_blocks", lambda _, wanted: len(wanted.queries_QD))
    samplings = {"all": Sampling(queries=40), "again": Sampling(queries=40), "few": Sampling(queries=10)}
    found = measure_recalls(store, ALWAYS, samplings)
    assert found["all"].pairs[0].at_10 == found["again"].pairs[0].at_10 > 0.9
    assert {who: recall.pairs[0].queries for who, recall in found.items()} == {
        "all": 40,
        "again": 40,
        "few": 10,
    }
    assert searches["calls"] == len(KEY_COLUMNS), "all keys of a modality are gone through once"
    assert searches["rows"] == len(KEY_COLUMNS) * len(KEY_COLUMNS) * 40, "nobody is searched for twice"


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


def test_keys_that_all_serve_are_not_copied(store: FeatureStore) -> None:
    bank = MemoryBank.open(store, BankScope(splits=()))
    assert bank._held is not None
    blocks = bank._blocks(Search(missing=VISUAL, retrieval=Retrieval.CROSS))
    for rows, block in zip(bank._held, blocks, strict=True):
        assert np.shares_memory(block.keys_KD, rows.keys[VISUAL])
