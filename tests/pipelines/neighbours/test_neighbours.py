"""`index` writes the neighbours that a search of the pinned bank gives, once, and only what is due.

Runs on real stores: what is written is compared row by row with what a fresh store of the same clips gets.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from r2scp.jobs.ingest.index import IndexReport, run_index
from r2scp.pipelines.neighbours import queries
from r2scp.pipelines.neighbours.settings import IndexSettings, read_neighbours
from r2scp.store.errors import LeaseHeld, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import now
from r2scp.store.maintenance import clean
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search import bank, exact
from r2scp.store.search.bank import BankScope
from r2scp.store.search.exact import BestHits, KeyBlock, QueryBlock

DIM = 16
WHEN = {"run_id", "at", "bank_version", "bank_fingerprint"}  # columns that say when, not what


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip as these tests see it."""

    clip_id: str
    source_id: str
    split: str
    audio: list[float] | None
    visual: list[float] | None


def unit(rng: np.random.Generator) -> list[float]:
    vector = rng.standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32).tolist()


def samples(count: int, seed: int = 0, first: int = 0, split: str = "") -> list[Sample]:
    """Two corpora that share sources; every 7th clip is deaf, every 11th blind; a quarter in test."""
    rng = np.random.default_rng(seed)
    return [
        Sample(
            clip_id=f"{('avqa', 'vggsound')[i % 2]}/{i:04d}",
            source_id=f"youtube{i // 2}",
            split=split or ("test" if i % 4 == 3 else "train"),
            audio=None if i % 7 == 6 else unit(rng),
            visual=None if i % 11 == 10 else unit(rng),
        )
        for i in range(first, first + count)
    ]


def write(store: FeatureStore, rows: Sequence[Sample]) -> None:
    address = store.address(Table.CLIPS)
    values = [
        {
            "clip_id": row.clip_id,
            "corpus": row.clip_id.partition("/")[0],
            "source_id": row.source_id,
            "split": row.split,
            "audio_key": row.audio,
            "visual_key": row.visual,
            "ingested_at": now(),
        }
        for row in rows
    ]
    store.commit(Table.CLIPS, [store.stage(Table.CLIPS, pa.Table.from_pylist(values, address.schema))], {})


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[[Sequence[Sample]], FeatureStore]:
    """`make_store(samples)`: a new store that holds them."""
    stores: list[FeatureStore] = []

    def make(rows: Sequence[Sample]) -> FeatureStore:
        store = FeatureStore.create(str(tmp_path / f"store{len(stores)}"), "tiny-encoder", DIM)
        write(store, rows)
        stores.append(store)
        return store

    return make


def index(store: FeatureStore, settings: IndexSettings | None = None) -> IndexReport:
    report = run_index(store, settings or IndexSettings(), lambda mode, done, total: None)
    for counts in report.modes.values():
        assert counts["queries"] == counts["searched"] + counts["unchanged"]
    return report


def what(store: FeatureStore) -> list[dict]:
    """All rows, without the columns that say when."""
    rows = store.neighbours().sort_by("neighbour_id").to_pylist()
    return [{name: value for name, value in row.items() if name not in WHEN} for row in rows]


def test_rows_are_what_the_bank_says(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    clips = {row.clip_id: row for row in samples(160)}
    store = make_store(list(clips.values()))
    report = index(store)
    rows = store.neighbours().to_pylist()
    deaf = sum(row.audio is None for row in clips.values())
    blind = sum(row.visual is None for row in clips.values())
    assert len(rows) == report.searched == 3 * (2 * len(clips) - deaf - blind)
    assert report.bank_serving["audio"] == sum(
        row.audio is not None for row in clips.values() if row.split == "train"
    )
    for row in rows:
        clip = clips[row["clip_id"]]
        available = "visual" if row["missing"] == "audio" else "audio"
        assert getattr(clip, available) is not None
        assert row["leak_guard"]
        assert row["bank_version"] == store.dataset(Table.CLIPS).version
        for side, sign in (("nearest", 1), ("farthest", -1)):
            hits, scores = row[f"{side}_ids"], np.array(row[f"{side}_scores"])
            assert len(hits) == len(set(hits)) == 15
            assert (np.diff(sign * scores) <= 0).all()
            for hit in hits:
                assert clips[hit].split == "train"
                assert clips[hit].source_id != clip.source_id
                assert getattr(clips[hit], row["missing"]) is not None
            compared = row["missing"] if row["retrieval"] == "cross" else available
            if row["retrieval"] != "hybrid":
                query = np.array(getattr(clip, available))
                expected = [float(query @ getattr(clips[hit], compared)) for hit in hits]
                np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_a_second_run_writes_nothing(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    store = make_store(samples(60))
    first = index(store)
    versions = store.versions()
    second = index(store)
    assert first.run_id
    assert second.run_id == ""
    assert second.searched == 0
    assert store.versions() == versions
    runs = store.dataset(Table.RUNS).to_table().to_pylist()
    assert [(run["kind"], run["status"]) for run in runs] == [("index", "done")]


def test_two_stores_agree(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    one, two = make_store(samples(80)), make_store(samples(80)[::-1])
    index(one)
    index(two)
    assert what(one) == what(two)


@pytest.mark.parametrize("split", ["test", "train"])
def test_incremental_is_full(
    make_store: Callable[[Sequence[Sample]], FeatureStore], split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "QUERY_CHUNK", 37)
    old, new = samples(90), samples(21, seed=1, first=90, split=split)
    store, fresh = make_store(old), make_store([*old, *new])
    index(store)
    write(store, new)
    report = index(store)
    index(fresh)
    assert what(store) == what(fresh)
    counts = report.modes["cross"]
    if split == "test":  # outside the bank: only the new ones were searched
        assert counts["searched"] == sum((row.audio is not None) + (row.visual is not None) for row in new)
    assert counts["removed"] == 0


def test_a_clip_that_changed_or_went(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    old = samples(60)
    store = make_store(old)
    index(store)
    tests = [row for row in old if row.split == "test" and row.audio and row.visual]
    changed = replace(tests[0], visual=unit(np.random.default_rng(9)))
    deaf = replace(tests[1], audio=None)
    write(store, [changed, deaf])
    store.commit(Table.CLIPS, [], {}, also_delete=[tests[2].clip_id])
    report = index(store)
    assert report.modes["cross"]["searched"] == 3  # two of the clip that changed, the deaf one's other
    assert report.modes["cross"]["removed"] == 3  # one query of the deaf clip, two of the one that went
    now = {row.clip_id: row for row in old} | {changed.clip_id: changed, deaf.clip_id: deaf}
    del now[tests[2].clip_id]
    fresh = make_store(list(now.values()))
    index(fresh)
    assert what(store) == what(fresh)


@pytest.mark.parametrize(("seed", "leak_guard"), [(0, True), (1, True), (2, False)])
def test_any_change_leaves_what_a_fresh_store_gets(
    make_store: Callable[[Sequence[Sample]], FeatureStore], seed: int, leak_guard: bool
) -> None:
    """Clips come, change, go, move to another split or source; few rows are searched again, none is wrong."""
    rng = np.random.default_rng(seed)
    settings = IndexSettings(
        n=3, retrieval=(Retrieval.CROSS, Retrieval.HYBRID, Retrieval.PAIRED), leak_guard=leak_guard
    )
    clips = {row.clip_id: row for row in samples(150, seed)}
    store = make_store(list(clips.values()))
    index(store, settings)
    searched = extended = queries = 0
    for turn in range(4):
        added = samples(2, seed=seed + 10 + turn, first=1000 + 10 * turn)
        picked = [clips[clip_id] for clip_id in rng.choice(sorted(clips), 4, replace=False)]
        changed = replace(picked[0], audio=unit(rng))
        moved = replace(picked[1], split="test" if picked[1].split == "train" else "train")
        adopted = replace(picked[2], source_id=picked[3].source_id)
        put = [*added, changed, moved, adopted]
        write(store, put)
        clips |= {row.clip_id: row for row in put}
        store.commit(Table.CLIPS, [], {}, also_delete=[picked[3].clip_id])
        del clips[picked[3].clip_id]
        counts = index(store, settings).modes
        fresh = make_store(list(clips.values()))
        index(fresh, settings)
        assert what(store) == what(fresh)
        searched += sum(mode["searched"] for mode in counts.values())
        extended += sum(mode["extended"] for mode in counts.values())
        queries += sum(mode["queries"] for mode in counts.values())
    assert 0 < extended < searched < 0.6 * queries


@pytest.mark.parametrize("leak_guard", [True, False])
def test_added_clips_alone_are_compared_with_the_stored_hits(
    make_store: Callable[[Sequence[Sample]], FeatureStore], monkeypatch: pytest.MonkeyPatch, leak_guard: bool
) -> None:
    settings = IndexSettings(retrieval=(Retrieval.PAIRED,), leak_guard=leak_guard)
    old, new = samples(120), samples(4, seed=1, first=200, split="train")
    store, fresh = make_store(old), make_store([*old, *new])
    index(store, settings)
    write(store, new)
    products: list[tuple[int, int]] = []

    def counted(blocks: Iterable[KeyBlock], queries: QueryBlock, *more: Any) -> tuple[BestHits, BestHits]:
        all_blocks = list(blocks)
        products.append((len(queries.queries_QD), sum(len(block.keys_KD) for block in all_blocks)))
        return exact.search_blocks(all_blocks, queries, *more)

    monkeypatch.setattr(bank, "search_blocks", counted)
    counts = index(store, settings).modes["paired"]
    new_queries = sum((row.audio is not None) + (row.visual is not None) for row in new)
    assert counts["searched"] - counts["extended"] == new_queries
    assert counts["extended"] > 100, "a few new keys are near enough to many"
    assert sum(queries for queries, keys in products if keys > len(new)) == new_queries
    assert sum(queries for queries, keys in products if keys <= len(new)) == counts["extended"]
    monkeypatch.undo()
    index(fresh, settings)
    assert what(store) == what(fresh)


def test_rows_newer_than_the_index_says_are_searched_again(
    make_store: Callable[[Sequence[Sample]], FeatureStore],
) -> None:
    """A crash between the two: a clip that came and went unnoticed must not stay in anybody's hits."""
    old, passing = samples(60), samples(8, seed=1, first=60, split="train")
    store = make_store(old)
    index(store)
    before = store.dataset(Table.INDEXES).to_table().to_pylist()
    write(store, passing)
    index(store)
    for row in before:
        store.record_index(row)
    store.commit(Table.CLIPS, [], {}, also_delete=[row.clip_id for row in passing])
    index(store)
    fresh = make_store(old)
    index(fresh)
    assert what(store) == what(fresh)


def test_a_version_that_was_cleaned_away_costs_a_search(
    make_store: Callable[[Sequence[Sample]], FeatureStore],
) -> None:
    old, new = samples(40), samples(4, seed=1, first=40)
    store = make_store(old)
    index(store)
    write(store, new)
    clean(store, timedelta(0), exclusive=True)
    counts = index(store).modes["cross"]
    assert counts["searched"] == counts["queries"]
    fresh = make_store([*old, *new])
    index(fresh)
    assert what(store) == what(fresh)


def test_without_the_guard_rows_say_so(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    rows = samples(40)
    both = next(row for row in rows if row.audio and row.visual and row.split == "train")
    copy = replace(both, clip_id="vggsound/elsewhere", split="train")
    store = make_store([*rows, copy])
    guarded, unguarded = IndexSettings(), IndexSettings(leak_guard=False)
    first = index(store, guarded)
    before = what(store)
    second = index(store, unguarded)
    assert first.leak_guard
    assert not second.leak_guard
    assert [row for row in what(store) if row["leak_guard"]] == before  # the two live side by side
    with_guard = read_neighbours(store, guarded, Retrieval.PAIRED).to_pylist()
    without = read_neighbours(store, unguarded, Retrieval.PAIRED).to_pylist()
    assert {row["leak_guard"] for row in with_guard} == {True}
    assert {row["leak_guard"] for row in without} == {False}
    mine = [row for row in without if row["clip_id"] == both.clip_id]
    assert len(mine) == 2
    for row in mine:
        assert row["nearest_ids"][:2] == sorted([both.clip_id, copy.clip_id])
        assert row["nearest_own_source"] >= 2
    for row in (row for row in with_guard if row["clip_id"] == both.clip_id):
        assert not {both.clip_id, copy.clip_id} & {*row["nearest_ids"], *row["farthest_ids"]}
        assert row["nearest_own_source"] >= 2
    assert first.modes["paired"]["nearest_own_source"] == second.modes["paired"]["nearest_own_source"] > 0


def test_bank_of_another_corpus(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    rows = {row.clip_id: row for row in samples(120)}
    store = make_store(list(rows.values()))
    settings = IndexSettings(
        retrieval=(Retrieval.CROSS,), bank=BankScope(corpora=("vggsound",)), query_corpora=("avqa",)
    )
    index(store, settings)
    written = read_neighbours(store, settings, Retrieval.CROSS).to_pylist()
    assert {row["clip_id"].partition("/")[0] for row in written} == {"avqa"}
    for row in written:
        hits = [rows[hit] for hit in (*row["nearest_ids"], *row["farthest_ids"])]
        assert {hit.clip_id.partition("/")[0] for hit in hits} == {"vggsound"}
        assert rows[row["clip_id"]].source_id not in {hit.source_id for hit in hits}
    index(store, replace(settings, query_corpora=("vggsound",)))  # the rows of the other corpus stay
    both = read_neighbours(store, settings, Retrieval.CROSS)
    assert both.num_rows > len(written)
    assert index(store, replace(settings, query_corpora=())).searched == 0


def test_small_bank_is_counted(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    rng = np.random.default_rng(0)
    lone = Sample(clip_id="avqa/a", source_id="a", split="train", audio=unit(rng), visual=unit(rng))
    other = Sample(clip_id="avqa/b", source_id="b", split="test", audio=unit(rng), visual=unit(rng))
    store = make_store([lone, other])
    counts = index(store, IndexSettings(retrieval=(Retrieval.CROSS,))).modes["cross"]
    assert counts["short"] == counts["searched"] == 4
    assert counts["empty"] == 2  # the bank's only clip finds nobody but itself
    nearest = {(r["clip_id"], r["missing"]): r["nearest_ids"] for r in store.neighbours().to_pylist()}
    assert nearest[("avqa/b", "audio")] == ["avqa/a"]
    assert nearest[("avqa/a", "audio")] == []


def test_a_store_from_before_the_table(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    store = make_store(samples(30))
    lance.LanceDataset.drop(store.address(Table.NEIGHBOURS).uri)
    old = FeatureStore.open(store.uri)
    assert "neighbours" not in old.versions()
    assert old.status()["clips"]
    clean(old)
    assert index(old).searched > 0
    lance.LanceDataset.drop(store.address(Table.NEIGHBOURS).uri)
    assert FeatureStore.create(store.uri, "tiny-encoder", DIM).neighbours().num_rows == 0


def test_refusals(make_store: Callable[[Sequence[Sample]], FeatureStore]) -> None:
    store = make_store(samples(30))
    with pytest.raises(StoreError, match=r"no clip of .* is in the bank"):
        index(store, IndexSettings(bank=BankScope(splits=("val",))))
    with pytest.raises(StoreError, match=r"has no neighbours for .*run `r2scp-pipe index`"):
        read_neighbours(store, IndexSettings(), Retrieval.CROSS)
    for wrong in ({"n": 0}, {"cross_weight": 1.5}, {"retrieval": ()}):
        with pytest.raises(UsageError):
            IndexSettings(**wrong)
    with store.lease("another").hold(), pytest.raises(LeaseHeld):
        index(store)
    assert store.neighbours().num_rows == 0


def test_nothing_is_seen_of_a_run_that_fails(
    make_store: Callable[[Sequence[Sample]], FeatureStore],
) -> None:
    store = make_store(samples(60))

    def stop(mode: str, done: int, total: int) -> None:
        if mode == "paired" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_index(store, IndexSettings(), stop)
    assert {row["retrieval"] for row in what(store)} == {"cross"}
    assert store.dataset(Table.RUNS).to_table()["status"].to_pylist() == ["interrupted"]
    fresh = make_store(samples(60))
    report = index(store)
    index(fresh)
    assert report.modes["cross"]["searched"] == 0
    assert what(store) == what(fresh)
    assert {Modality(row["missing"]) for row in what(store)} == set(Modality)
