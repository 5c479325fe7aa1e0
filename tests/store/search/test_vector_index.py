"""The serving index finds what an exact search finds; it hides no row and shows no deleted one.

The oracle is a float64 product of all pairs, over the rows as the test keeps track of them. Keys are
clustered, some are null, and the sizes of partitions and of the unindexed rest are small, so that few rows
make many partitions and segments.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.maintenance import clean, compact
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search import vector_index, vector_search
from r2scp.store.search.bank import KEY_COLUMNS, BankScope, MemoryBank, Queries, Search
from r2scp.store.search.recall import Recall, Sampling, measure_recalls
from r2scp.store.search.vector_index import refresh_index, refresh_reasons
from r2scp.store.search.vector_search import ServingIndex, ServingSettings

DIM = 32
AUDIO, VISUAL = Modality.AUDIO, Modality.VISUAL
ALWAYS = ServingSettings(exact_below=0)
FEW_UNINDEXED = 20  # rows


@dataclass
class World:
    """A store and its expected rows: clip id -> keys. `corpus` is the part of the id before the slash."""

    store: FeatureStore
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    rows: dict[str, dict[Modality, np.ndarray | None]] = field(default_factory=dict)

    def put(self, clip_ids: list[str], domain: int = 0, null: float = 0.1, parts: int = 1) -> None:
        """Put clips with new keys, in one commit. Each domain has its own distant clusters."""
        dim, drawn = self.store.dim, np.random.default_rng(domain)
        far = 3 * drawn.standard_normal(dim)
        centres = far + 2 * drawn.standard_normal((12, dim))
        keys: dict[Modality, list[np.ndarray | None]] = {}
        near_QD = centres[self.rng.integers(12, size=len(clip_ids))]
        for modality in KEY_COLUMNS:
            keys_QD = near_QD + drawn.standard_normal(dim) + self.rng.standard_normal(near_QD.shape)
            keys_QD = (keys_QD / np.linalg.norm(keys_QD, axis=1, keepdims=True)).astype(np.float32)
            keys[modality] = [None if self.rng.random() < null else key for key in keys_QD]
        for at, clip_id in enumerate(clip_ids):
            self.rows[clip_id] = {modality: keys[modality][at] for modality in keys}
        schema, staged = self.store.address(Table.CLIPS).schema, []
        for part in np.array_split(np.arange(len(clip_ids)), parts):
            columns = {
                "clip_id": [clip_ids[at] for at in part],
                "corpus": [clip_ids[at].partition("/")[0] for at in part],
                **{KEY_COLUMNS[m]: [keys[m][at] for at in part] for m in keys},
            }
            arrays = [pa.array(columns.get(f.name, [None] * len(part)), f.type) for f in schema]
            staged.append(self.store.stage(Table.CLIPS, pa.Table.from_arrays(arrays, schema=schema)))
        self.store.commit(Table.CLIPS, staged, {})

    def delete(self, clip_ids: list[str]) -> None:
        for clip_id in clip_ids:
            del self.rows[clip_id]
        self.store.commit(Table.CLIPS, [], {}, also_delete=clip_ids)

    def scores(self, key_D: np.ndarray, among: Modality, prefix: str = "") -> dict[str, float]:
        """Scores of all clips that have the key and whose id starts with `prefix`."""
        clips = {
            clip_id: key
            for clip_id, keys in self.rows.items()
            if (key := keys[among]) is not None and clip_id.startswith(prefix)
        }
        keys_KD = np.array(list(clips.values()), np.float64).reshape(-1, key_D.size)
        products = keys_KD @ key_D.astype(np.float64)
        return dict(zip(clips, products.tolist(), strict=True))

    def queries(self, count: int, prefix: str = "") -> list[np.ndarray]:
        """Keys of clips, of either modality."""
        keys = [
            key
            for clip_id, both in self.rows.items()
            for key in both.values()
            if key is not None and clip_id.startswith(prefix)
        ]
        return [keys[at] for at in self.rng.integers(len(keys), size=count)] if keys else []

    def segments(self) -> dict[str, list[list[int]]]:
        """Index -> live rows of each fragment of each of its segments."""
        dataset = self.store.dataset(Table.CLIPS)
        rows = {f.fragment_id: f.count_rows() for f in dataset.get_fragments()}
        return {
            index.name: [[rows.get(f, 0) for f in segment.fragment_ids] for segment in index.segments]
            for index in dataset.describe_indices()
        }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows make many partitions and segments."""
    monkeypatch.setattr(vector_index, "PARTITION_KEYS", 64)
    monkeypatch.setattr(vector_index, "UNINDEXED_ROWS", FEW_UNINDEXED)


@pytest.fixture
def world(tmp_path: Path, small: None) -> World:
    return World(FeatureStore.create(str(tmp_path / "store"), "tiny", DIM))


def ids(count: int, prefix: str = "a", start: int = 0) -> list[str]:
    return [f"{prefix}/{number:05d}" for number in range(start, start + count)]


def check_all(world: World, settings: ServingSettings = ALWAYS) -> None:
    """A search for more hits than clips finds each clip with the key once, with its current score."""
    index = ServingIndex(world.store, settings)
    for modality in KEY_COLUMNS:
        query = next(iter(world.queries(1)), np.ones(DIM))
        expected = world.scores(query, modality)
        hits = index.nearest(query, modality, len(world.rows) + 5)
        assert sorted(hit.clip_id for hit in hits) == sorted(expected)
        assert [hit.score for hit in hits] == pytest.approx([expected[hit.clip_id] for hit in hits], abs=1e-6)
        assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.clip_id))


def recall(world: World, queries: list[np.ndarray], settings: ServingSettings = ALWAYS, n: int = 10) -> float:
    """Recall@n against the oracle, over both modalities."""
    index, shares = ServingIndex(world.store, settings), []
    for query in queries:
        for modality in KEY_COLUMNS:
            best = sorted(world.scores(query, modality).values(), reverse=True)[:n]
            hits = index.nearest(query, modality, n)
            shares.append(sum(hit.score >= best[-1] - 1e-6 for hit in hits) / len(best))
    return float(np.mean(shares))


def measure(store: FeatureStore, settings: ServingSettings, sampling: Sampling | None = None) -> Recall:
    return measure_recalls(store, settings, {"": sampling or Sampling()})[""]


def lowest(measured: Recall) -> float:
    return min(min(pair.at_3, pair.at_10) for pair in measured.pairs)


@pytest.mark.parametrize("kind", ["ivf_rq", "ivf_sq"])
def test_random_commits_hide_no_row_and_show_no_deleted_one(world: World, kind: str) -> None:
    settings = replace(ALWAYS, kind=kind)
    world.put(ids(300), parts=3)
    refresh_index(world.store, settings)
    rng, fresh, outcomes = np.random.default_rng(1), 300, set()
    for step in range(24):
        clip_ids = sorted(world.rows)
        match rng.integers(6):
            case 0 | 1:
                count = int(rng.integers(1, 60))
                world.put(ids(count, start=fresh), domain=int(rng.integers(3)), parts=int(rng.integers(1, 3)))
                fresh += count
            case 2:
                world.put(rng.choice(clip_ids, size=int(rng.integers(1, 40)), replace=False).tolist())
            case 3:  # adjacent rows: whole fragments go
                start = int(rng.integers(len(clip_ids) - 20))
                world.delete(clip_ids[start : start + int(rng.integers(1, 60))])
            case 4:
                outcomes |= {bool(refresh_index(world.store, settings).columns)}
            case 5:
                outcomes |= {compact(world.store)["clips"] > 0}
        check_all(world, settings)
        if step % 3 == 0:
            assert recall(world, world.queries(4), settings) >= 0.97
    assert outcomes == {False, True}
    refresh_index(world.store, settings)
    assert recall(world, world.queries(40), settings) >= 0.99
    assert refresh_reasons(world.store, settings) == []


def test_a_refresh_without_changes_writes_nothing(world: World) -> None:
    world.put(ids(200), parts=2)
    assert [why.partition(":")[0] for why in refresh_reasons(world.store, ALWAYS)] == [
        "audio_key",
        "visual_key",
    ]
    first = refresh_index(world.store, ALWAYS)
    assert [(column.rows, column.unindexed_before) for column in first.columns] == [(200, 200)] * 2
    assert refresh_reasons(world.store, ALWAYS) == []
    again = refresh_index(world.store, ALWAYS)
    assert again.columns == ()
    assert again.version == first.version == world.store.dataset(Table.CLIPS).version
    world.put(ids(FEW_UNINDEXED, "b"))
    assert refresh_reasons(world.store, ALWAYS) == []
    assert recall(world, world.queries(5, "b/")) == 1.0, "rows that are not indexed are compared one by one"
    world.put(ids(1, "c"))
    assert len(refresh_reasons(world.store, ALWAYS)) == 2
    assert refresh_reasons(world.store, replace(ALWAYS, kind="ivf_rq")) == refresh_reasons(
        world.store, ALWAYS
    )


def test_kinds(world: World) -> None:
    world.put(ids(150))
    assert refresh_index(world.store, ServingSettings(exact_below=151)).columns == ()
    assert world.segments() == {}
    assert refresh_index(world.store, ServingSettings(exact_below=150)).kind == "ivf_rq"
    done = refresh_index(world.store, ServingSettings(kind="ivf_sq"))
    assert [column.why for column in done.columns] == [
        f"{column}: its index is IVF_RQ, not IVF_SQ" for column in ("audio_key", "visual_key")
    ]
    types = {i.index_type for i in world.store.dataset(Table.CLIPS).describe_indices()}
    assert types == {"IVF_SQ"}
    check_all(world)
    assert recall(world, world.queries(5), ServingSettings(kind="exact")) == 1.0, "without its help"
    assert [column.rows for column in refresh_index(world.store, ServingSettings(kind="exact")).columns] == [
        0,
        0,
    ]
    assert world.segments() == {}
    assert refresh_reasons(world.store, ServingSettings(kind="exact")) == []
    check_all(world)


@pytest.mark.parametrize(
    "wrong", [{"kind": "ivf_pq"}, {"exact_below": -1}, {"effort": 1.1}, {"effort": float("nan")}]
)
def test_invalid_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        ServingSettings(**wrong)


def test_invalid_queries(world: World) -> None:
    index = ServingIndex(world.store)
    assert index.nearest(np.ones(DIM), AUDIO, 3) == [], "an empty store"
    world.put(ids(30))
    index = ServingIndex(world.store)
    for key in (np.zeros(DIM), np.full(DIM, np.nan), np.ones(DIM + 1), np.ones((2, DIM))):
        with pytest.raises(ValueError, match="a query must be a finite vector of 32"):
            index.nearest(key, AUDIO, 3)
    with pytest.raises(ValueError, match="n must be at least 1"):
        index.nearest(np.ones(DIM), AUDIO, 0)
    with pytest.raises(StoreError, match="cannot search"):
        index.nearest(np.ones(DIM), AUDIO, 3, where="nonsense = 3")


def test_a_condition_loses_no_hits(world: World) -> None:
    world.put(ids(600, "a"), parts=4)
    world.put(ids(40, "b"), domain=7)
    refresh_index(world.store, ALWAYS)
    world.put(ids(10, "b", start=40), domain=1)  # not indexed
    index, shares = ServingIndex(world.store, ALWAYS), []
    for query in world.queries(20, "a/"):
        for modality in KEY_COLUMNS:
            expected = world.scores(query, modality, "b/")
            best = sorted(expected.values(), reverse=True)[:10]
            hits = index.nearest(query, modality, 10, "corpus = 'b'")
            assert len(hits) == 10
            assert [hit.score for hit in hits] == pytest.approx(
                [expected[hit.clip_id] for hit in hits], abs=1e-6
            )
            shares.append(sum(hit.score >= best[-1] - 1e-6 for hit in hits) / 10)
    assert np.mean(shares) >= 0.98
    assert index.nearest(query, AUDIO, 10, "corpus = 'nobody'") == []


def test_clips_without_the_modality(world: World) -> None:
    world.put(ids(100, "mute"), null=1.0)
    assert refresh_reasons(world.store, ALWAYS) == [], "no key, no index"
    assert ServingIndex(world.store, ALWAYS).nearest(np.ones(DIM), AUDIO, 3) == []
    world.put(ids(1, "one"), null=0.0)
    refresh_index(world.store, ALWAYS)
    check_all(world)
    world.put(ids(200, "a"), null=0.0)
    refresh_index(world.store, ALWAYS)
    world.put(ids(100, "mute", start=100), null=1.0)
    assert refresh_reasons(world.store, ALWAYS) == []
    assert refresh_index(world.store, ALWAYS).columns == ()
    check_all(world)
    world.put(ids(30, "b"), null=0.0)
    assert [column.unindexed_before for column in refresh_index(world.store, ALWAYS).columns] == [130, 130]
    check_all(world)


def test_hits_are_those_of_the_bank(world: World) -> None:
    world.put(ids(300), null=0.0)
    refresh_index(world.store, ALWAYS)
    bank, index = MemoryBank.open(world.store, BankScope(splits=())), ServingIndex(world.store, ALWAYS)
    queries = np.array(world.queries(10))
    result = bank.search(
        Queries(keys_QD=queries, sources=["nobody"] * 10),
        Search(missing=VISUAL, retrieval=Retrieval.CROSS, n=5),
    )
    for at, query in enumerate(queries):
        expected = list(zip(result.nearest.ids(at), result.nearest.scores(at).tolist(), strict=True))
        assert [tuple(hit) for hit in index.nearest(query, VISUAL, 5)] == expected


def test_a_reader_and_a_snapshot_stay_at_their_version(world: World) -> None:
    world.put(ids(200))
    refresh_index(world.store, ALWAYS)
    world.store.name_snapshot("kept")
    index, before = ServingIndex(world.store, ALWAYS), dict(world.rows)
    (query,) = world.queries(1)
    hits = index.nearest(query, AUDIO, 10)
    world.delete(ids(100))
    world.put(ids(300, "b"))
    refresh_index(world.store, ALWAYS)
    compact(world.store)
    assert index.nearest(query, AUDIO, 10) == hits
    assert ServingIndex(world.store, ALWAYS, index.version).nearest(query, AUDIO, 10) == hits
    clean(world.store, timedelta(0), exclusive=True)
    assert ServingIndex(world.store.at("kept"), ALWAYS).nearest(query, AUDIO, 10) == hits
    world.rows = before
    assert next(hit.clip_id for hit in hits) in world.scores(query, AUDIO)


def test_the_cost_of_a_refresh_grows_with_the_change(world: World) -> None:
    world.put(ids(2_000), parts=4)
    refresh_index(world.store, ALWAYS)
    indexed, most_segments = [], 0
    for number in range(30):
        world.put(ids(FEW_UNINDEXED + 5, "b", start=100 * number))
        done = refresh_index(world.store, ALWAYS)
        assert [column.unindexed_before for column in done.columns] == [FEW_UNINDEXED + 5] * 2
        indexed.append(done.columns[0].rows)
        most_segments = max(most_segments, *map(len, world.segments().values()))
    assert max(indexed) <= 30 * 25, "the largest segment was left alone"
    assert sum(indexed) <= 8 * 30 * 25, "each row was indexed a few times, not thirty"
    assert most_segments <= 6
    check_all(world)
    assert recall(world, world.queries(20)) >= 0.99


def test_an_index_of_deleted_rows_is_rebuilt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_index, "FILE_OVERHEAD", 0)
    world.put(ids(3_000), parts=3)
    refresh_index(world.store, ALWAYS)
    assert refresh_reasons(world.store, ALWAYS) == [], "a new index is not wasteful"
    world.delete(ids(2_600))
    check_all(world)
    assert all("mostly of rows that are gone" in why for why in refresh_reasons(world.store, ALWAYS))
    assert [column.rows for column in refresh_index(world.store, ALWAYS).columns] == [400, 400]
    assert refresh_reasons(world.store, ALWAYS) == []
    check_all(world)
    world.delete(ids(400, start=2_600))
    assert refresh_index(world.store, ALWAYS).columns == ()
    check_all(world)


def test_segments_of_deleted_rows_do_not_accumulate(world: World) -> None:
    world.put(ids(1_000))
    refresh_index(world.store, ALWAYS)
    for number in range(6):
        world.put(ids(30, "b", start=100 * number))
        refresh_index(world.store, ALWAYS)
        assert set(map(len, world.segments().values())) == {2}
        world.delete(ids(30, "b", start=100 * number))
        check_all(world)


def test_a_crash_before_the_commit_leaves_only_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.put(ids(300))
    refresh_index(world.store, ALWAYS)
    world.put(ids(40, "b"))

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("lance.LanceDataset.commit_existing_index_segments", killed)
        with pytest.raises(Killed):
            refresh_index(world.store, ALWAYS)
    folder = Path(world.store.address(Table.CLIPS).uri) / "_indices"
    assert len(list(folder.iterdir())) == 3
    check_all(world)
    clean(world.store, timedelta(days=1), exclusive=True)
    assert len(list(folder.iterdir())) == 2
    assert len(refresh_index(world.store, ALWAYS).columns) == 2
    check_all(world)


def test_a_new_domain_is_found_before_and_after_a_refresh(world: World) -> None:
    world.put(ids(2_000), parts=2)
    refresh_index(world.store, ALWAYS)
    for count, domain in ((15, 5), (200, 6), (1_500, 8)):
        prefix = f"domain{domain}"
        world.put(ids(count, prefix), domain=domain)
        sampling = Sampling(where=f"corpus = '{prefix}'", queries=40, seed=3)
        for _ in range(2):
            measured = measure(world.store, ALWAYS, sampling)
            assert len(measured.pairs) == 4
            assert lowest(measured) >= 0.99
            refresh_index(world.store, ALWAYS)
    check_all(world)


def test_measured_recall_is_that_of_the_oracle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_search, "MAX_CANDIDATES", 2)  # fewer than in a partition; no second search
    world.put(ids(600, "later"), null=0.3)  # rows are not in the order of their ids
    world.put(ids(1_200, "earlier"), parts=2)
    world.rng = np.random.default_rng(9)
    refresh_index(world.store, ALWAYS)
    careless = replace(ALWAYS, effort=0.0)
    measured = measure(world.store, careless, Sampling(queries=60, seed=1))
    assert measured.version == world.store.dataset(Table.CLIPS).version
    assert {(pair.query, pair.among) for pair in measured.pairs} == {
        (q, a) for q in KEY_COLUMNS for a in KEY_COLUMNS
    }
    index = ServingIndex(world.store, careless)
    drawn = np.sort(world.store.clips(["clip_id"])["clip_id"].to_numpy())
    drawn = drawn[np.random.default_rng(1).permutation(drawn.size)].tolist()
    for pair in measured.pairs:
        queries = [clip_id for clip_id in drawn if world.rows[clip_id][pair.query] is not None][:60]
        assert pair.queries == len(queries) == 60
        for n, share in ((3, pair.at_3), (10, pair.at_10)):
            shares = []
            for clip_id in queries:
                query = world.rows[clip_id][pair.query]
                assert query is not None
                scores = world.scores(query, pair.among)
                scores.pop(clip_id, None)
                bar = sorted(scores.values())[-n]
                hits = [hit for hit in index.nearest(query, pair.among, 11) if hit.clip_id != clip_id][:n]
                shares.append(sum(hit.score >= bar - 1e-7 for hit in hits) / n)
            assert share == pytest.approx(np.mean(shares), abs=1e-9)
    assert lowest(measured) < 0.99, "one partition is too few"
    exact = measure(world.store, replace(careless, kind="exact"), Sampling(queries=50))
    assert lowest(exact) == 1.0


def test_recall_with_few_or_no_queries(world: World) -> None:
    nothing = measure(world.store, ALWAYS)
    assert nothing.pairs == ()
    world.put(ids(2), null=0.0)
    assert lowest(measure(world.store, ALWAYS)) == 1.0, "one other clip"
    world.put(ids(5, "mute"), null=1.0)
    assert measure(world.store, ALWAYS, Sampling(where="corpus = 'mute'")).pairs == ()
    with pytest.raises(StoreError):
        measure(world.store, ALWAYS, Sampling(where="nonsense = 3"))
    with pytest.raises(ValueError, match="queries must be at least 1"):
        Sampling(queries=0)


def test_on_an_object_store(object_store: Callable, small: None) -> None:
    bucket = object_store("serving")
    world = World(FeatureStore.create(bucket.uri, "tiny", DIM, bucket.options))
    world.put(ids(150))
    assert len(refresh_index(world.store, ALWAYS).columns) == 2
    world.put(ids(30, "b"), domain=2)
    world.delete(ids(20))
    check_all(world)
    assert len(refresh_index(world.store, ALWAYS).columns) == 2
    assert refresh_reasons(world.store, ALWAYS) == []
    check_all(world)
    assert lowest(measure(world.store, ALWAYS, Sampling(queries=20))) >= 0.99


@pytest.mark.slow
def test_two_hundred_thousand_clips(tmp_path: Path) -> None:
    """At the published width: recall of old and new clips, and what a small change costs."""
    world = World(FeatureStore.create(str(tmp_path / "store"), "wide", 1024))
    for start in range(0, 200_000, 10_000):
        world.put(ids(10_000, start=start))
        world.rows.clear()
    settings = ServingSettings()
    whole = refresh_index(world.store, settings)
    assert whole.kind == "ivf_rq"
    assert lowest(measure(world.store, settings, Sampling(queries=64))) >= 0.99
    world.put(ids(1_000, "new"), domain=9)
    started = time.perf_counter()
    assert len(refresh_reasons(world.store, settings)) == 2
    assert time.perf_counter() - started < 2.0
    part = refresh_index(world.store, settings)
    assert [column.rows for column in part.columns] == [1_000, 1_000]
    assert sum(c.seconds for c in part.columns) < sum(c.seconds for c in whole.columns) / 10
    of_new = measure(world.store, settings, Sampling(where="corpus = 'new'", queries=64))
    assert lowest(of_new) >= 0.99
