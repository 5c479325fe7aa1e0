"""The bank finds exactly what a search through all pairs in float64 finds, whatever the block sizes.

The oracle scores every pair with `math.fsum`, sorts in Python, and leaves out the query's own source before
it takes n. Keys are clustered and some are copies, so that there are many ties and near ties.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search import bank as bank_module
from r2scp.store.search import exact
from r2scp.store.search.bank import BankScope, Hits, MemoryBank, Queries, Search
from r2scp.store.sources import SHARES, disjoint_split, source_of

DIM = 24
AUDIO, VISUAL = Modality.AUDIO, Modality.VISUAL


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A clip of these tests."""

    clip_id: str
    source_id: str
    split: str
    audio: np.ndarray | None
    visual: np.ndarray | None

    def key(self, modality: Modality) -> np.ndarray | None:
        return self.audio if modality is AUDIO else self.visual

    @property
    def corpus(self) -> str:
        return self.clip_id.partition("/")[0]


def unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Clustered keys, a tenth of them copies, some absent; two corpora that share sources; shuffled ids."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((6, DIM))
    rows: list[Sample] = []
    for number in rng.permutation(count):
        keys: list[np.ndarray | None] = [
            unit(centres[rng.integers(6)] + 0.3 * rng.standard_normal(DIM)) for _ in range(2)
        ]
        if rows and rng.random() < 0.1:
            twin = rows[rng.integers(len(rows))]
            keys = [twin.audio, twin.visual]
        if rng.random() < 0.15:
            keys[rng.integers(2)] = None
        rows.append(
            Sample(
                clip_id=f"{('avqa', 'vggsound')[number % 2]}/{number:04d}",
                source_id=f"youtube{number // 3}",
                split=("train", "train", "train", "test")[rng.integers(4)],
                audio=keys[0],
                visual=keys[1],
            )
        )
    return rows


def write(store: FeatureStore, rows: Sequence[Sample]) -> None:
    """Into `clips`, in two fragments of one commit."""
    address = store.address(Table.CLIPS)
    staged = []
    for part in (rows[: len(rows) // 3], rows[len(rows) // 3 :]):
        values: list[dict[str, object]] = [
            {
                "clip_id": row.clip_id,
                "corpus": row.corpus,
                "source_id": row.source_id,
                "split": row.split,
                "audio_key": None if row.audio is None else row.audio.tolist(),
                "visual_key": None if row.visual is None else row.visual.tolist(),
                "ingested_at": datetime(2026, 1, 31, tzinfo=UTC),
            }
            for row in part
        ]
        staged.append(store.stage(Table.CLIPS, pa.Table.from_pylist(values, schema=address.schema)))
    store.commit(Table.CLIPS, staged, {})


MakeStore = Callable[[Sequence[Sample]], FeatureStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """`make_store(samples)`: a new store with these clips."""
    numbers = itertools.count()

    def make(rows: Sequence[Sample]) -> FeatureStore:
        store = FeatureStore.create(str(tmp_path / f"store{next(numbers)}"), "tiny-encoder", DIM)
        write(store, rows)
        return store

    return make


def score(query: np.ndarray, row: Sample, how: Search) -> float | None:
    """The score of a clip, None if it cannot be a hit."""
    missing, available = row.key(how.missing), row.key(how.missing.other)
    if missing is None or (how.retrieval is not Retrieval.CROSS and available is None):
        return None
    cross = math.fsum(map(lambda a, b: float(a) * float(b), query, missing))
    if how.retrieval is Retrieval.CROSS or available is None:
        return cross
    paired = math.fsum(map(lambda a, b: float(a) * float(b), query, available))
    if how.retrieval is Retrieval.PAIRED:
        return paired
    return how.cross_weight * cross + (1 - how.cross_weight) * paired


def oracle(query: Sample, rows: Sequence[Sample], how: Search, sign: int) -> list[tuple[str, float, bool]]:
    """(clip id, score, of the query's own source) of the n best, best first."""
    key = query.key(how.missing.other)
    assert key is not None
    scored = [(score(key, row, how), row) for row in rows]
    ranked = sorted(
        (-sign * np.float32(value), row.clip_id, value, row.source_id == query.source_id)
        for value, row in scored
        if value is not None and not (how.leak_guard and row.source_id == query.source_id)
    )
    return [(clip_id, value, own) for _, clip_id, value, own in ranked[: how.n]]


def search(bank: MemoryBank, queries: Sequence[Sample], how: Search) -> Iterator[tuple[int, Hits]]:
    """(+1, nearest) and (-1, farthest)."""
    keys = [row.key(how.missing.other) for row in queries]
    stacked = np.stack([key for key in keys if key is not None])
    result = bank.search(Queries(keys_QD=stacked, sources=[row.source_id for row in queries]), how)
    yield 1, result.nearest
    yield -1, result.farthest


def check(bank: MemoryBank, rows: Sequence[Sample], queries: Sequence[Sample], how: Search) -> None:
    tolerance = 1e-6 if how.retrieval is Retrieval.HYBRID else 6e-8  # the mixed key is rounded, too
    for sign, hits in search(bank, queries, how):
        for at, query in enumerate(queries):
            expected = oracle(query, rows, how, sign)
            unguarded = oracle(query, rows, replace(how, leak_guard=False), sign)
            assert hits.own_source_Q[at] == sum(own for _, _, own in unguarded)
            np.testing.assert_allclose(hits.scores(at), [value for _, value, _ in expected], atol=tolerance)
            if how.retrieval is not Retrieval.HYBRID:
                assert hits.ids(at) == [clip_id for clip_id, _, _ in expected]
            assert len(hits.ids(at)) == len(set(hits.ids(at)))


def having(rows: Sequence[Sample], modality: Modality) -> list[Sample]:
    return [row for row in rows if row.key(modality) is not None]


def test_agrees_with_all_pairs(make_store: MakeStore) -> None:
    rows = samples(240)
    bank = MemoryBank.open(make_store(rows))
    in_bank = [row for row in rows if row.split == "train"]
    for missing, retrieval, guard in itertools.product(Modality, Retrieval, (True, False)):
        how = Search(missing=missing, retrieval=retrieval, leak_guard=guard, cross_weight=0.3)
        check(bank, in_bank, having(rows, missing.other)[:70], how)
    assert [bank.count_with(modality) for modality in Modality] == [len(having(in_bank, m)) for m in Modality]


@pytest.mark.parametrize(
    ("query_rows", "tile", "group", "block"), [(7, 32, 4, 50), (64, 1000, 16, 1), (1, 9, 8, 97)]
)
def test_block_sizes_change_nothing(
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
    query_rows: int,
    tile: int,
    group: int,
    block: int,
) -> None:
    rows = samples(240, seed=1)
    store = make_store(rows)
    queries = having(rows, VISUAL)
    how = Search(missing=AUDIO, retrieval=Retrieval.CROSS)
    whole = [hits for _, hits in search(MemoryBank.open(store), queries, how)]
    monkeypatch.setattr(exact, "QUERY_ROWS", query_rows)
    monkeypatch.setattr(exact, "TILE_KEYS", tile)
    monkeypatch.setattr(exact, "GROUP", group)
    monkeypatch.setattr(bank_module, "BLOCK_KEYS", block)
    streamed = MemoryBank.open(store, in_memory_bytes=0)
    assert streamed.fingerprint == MemoryBank.open(store).fingerprint
    for left, (_, right) in zip(whole, search(streamed, queries, how), strict=True):
        np.testing.assert_array_equal(left.rows_QN, right.rows_QN)
        np.testing.assert_array_equal(left.scores_QN, right.scores_QN)
        np.testing.assert_array_equal(left.own_source_Q, right.own_source_Q)


def test_other_queries_change_nothing(make_store: MakeStore) -> None:
    rows = samples(200, seed=2)
    bank = MemoryBank.open(make_store(rows))
    queries = having(rows, AUDIO)[:40]
    how = Search(missing=VISUAL, retrieval=Retrieval.HYBRID)
    together = dict(search(bank, queries, how))
    for at, query in enumerate(queries):
        for sign, alone in search(bank, [query], how):
            np.testing.assert_array_equal(alone.rows_QN[0], together[sign].rows_QN[at])
            np.testing.assert_array_equal(alone.scores_QN[0], together[sign].scores_QN[at])


def test_duplicates_of_the_query_source(make_store: MakeStore) -> None:
    rows = samples(120, seed=3)
    key = unit(np.arange(DIM) - 3.0)  # of no other clip
    query = Sample(clip_id="avqa/query", source_id="leak", split="test", audio=key, visual=key)
    copies = [
        replace(query, clip_id=f"{c}/copy{i}", split="train") for i in range(10) for c in ("avqa", "vggsound")
    ]
    bank = MemoryBank.open(make_store([*rows, query, *copies]))
    how = Search(missing=AUDIO, retrieval=Retrieval.PAIRED)
    guarded = dict(search(bank, [query], how))
    unguarded = dict(search(bank, [query], replace(how, leak_guard=False)))
    ids = guarded[1].ids(0)
    assert len(ids) == how.n
    assert not {clip_id for clip_id in ids + guarded[-1].ids(0) if "copy" in clip_id}
    assert unguarded[1].ids(0) == sorted(copy.clip_id for copy in copies)[: how.n]  # a tie: by clip id
    np.testing.assert_allclose(unguarded[1].scores(0), 1.0, atol=1e-6)
    assert guarded[1].own_source_Q[0] == unguarded[1].own_source_Q[0] == how.n
    check(bank, [row for row in [*rows, *copies] if row.split == "train"], [query], how)


def test_a_thousand_silent_clips(make_store: MakeStore) -> None:
    rows = samples(60, seed=4)
    silence = unit(np.ones(DIM))
    silent = [
        replace(
            rows[0], clip_id=f"avqa/s{i:04d}", source_id=f"s{i}", split="train", audio=silence, visual=silence
        )
        for i in range(1000)
    ]
    bank = MemoryBank.open(make_store([*rows, *silent]))
    train = [row for row in [*rows, *silent] if row.split == "train"]
    queries = [silent[3], silent[700], *having(rows, VISUAL)[:5]]
    check(bank, train, queries, Search(missing=AUDIO, retrieval=Retrieval.CROSS))


def test_fewer_clips_than_requested(make_store: MakeStore) -> None:
    rows = [replace(row, split="train") for row in samples(9, seed=5)]
    bank = MemoryBank.open(make_store(rows))
    how = Search(missing=AUDIO, retrieval=Retrieval.CROSS, n=40)
    queries = having(rows, VISUAL)
    check(bank, rows, queries, how)
    for _, hits in search(bank, queries, how):
        for at, query in enumerate(queries):
            others = [row for row in having(rows, AUDIO) if row.source_id != query.source_id]
            assert len(hits.ids(at)) == len(others) < how.n
            assert np.isnan(hits.scores_QN[at, len(others) :]).all()


def test_scope_is_corpora_and_splits(make_store: MakeStore) -> None:
    rows = samples(80, seed=6)
    store = make_store(rows)
    assert len(MemoryBank.open(store, BankScope(splits=()))) == len(rows)
    vggsound = MemoryBank.open(store, BankScope(corpora=("vggsound",)))
    assert vggsound.clip_ids == sorted(
        row.clip_id for row in rows if row.corpus == "vggsound" and row.split == "train"
    )
    empty = MemoryBank.open(store, BankScope(corpora=("x' OR '1'='1",)))
    assert len(empty) == 0
    how = Search(missing=AUDIO, retrieval=Retrieval.CROSS)
    assert [hits.ids(0) for _, hits in search(empty, having(rows, VISUAL)[:1], how)] == [[], []]


def test_a_disjoint_scope_is_by_source(make_store: MakeStore) -> None:
    rows = samples(120)
    store = make_store(rows)
    banks = {split: MemoryBank.open(store, BankScope(splits=(split,), disjoint=True)) for split in SHARES}
    for split, bank in banks.items():
        expected = [row for row in rows if disjoint_split(source_of(row.clip_id, row.source_id)) == split]
        assert bank.clip_ids == sorted(row.clip_id for row in expected)
        assert bank.count_with(AUDIO) == len(having(expected, AUDIO))
    assert sum(map(len, banks.values())) == len(rows)


def test_pinned_version_and_fingerprint(make_store: MakeStore) -> None:
    rows = samples(40, seed=7)
    store = make_store(rows)
    before = MemoryBank.open(store)
    extra = replace(rows[0], clip_id="avqa/new", split="test")
    write(store, [extra])
    after = MemoryBank.open(store)
    assert after.version > before.version
    assert after.fingerprint == before.fingerprint  # a test clip is outside the bank
    write(store, [replace(extra, clip_id="avqa/new2", split="train")])
    changed = MemoryBank.open(store)
    assert changed.fingerprint != before.fingerprint
    assert MemoryBank.open(store, version=before.version).clip_ids == before.clip_ids
    assert len(changed) == len(before) + 1


def test_a_key_that_is_not_a_unit_vector_is_refused(make_store: MakeStore) -> None:
    rows = [replace(row, split="train") for row in samples(6, seed=8)]
    for wrong in (np.zeros(DIM), np.full(DIM, np.nan), 20 * unit(np.ones(DIM))):
        bad = replace(rows[0], clip_id="avqa/bad", audio=wrong.astype(np.float32))
        with pytest.raises(
            StoreError, match=r"audio_key of 1 clips must be of length 1; that of avqa/bad is"
        ):
            MemoryBank.open(make_store([*rows, bad]))


def test_a_clip_without_a_source_is_its_own_source(make_store: MakeStore) -> None:
    rows = [replace(row, source_id="", split="train") for row in samples(30, seed=9)]
    bank = MemoryBank.open(make_store(rows))
    query = having(rows, VISUAL)[0]
    key = query.visual
    assert key is not None
    result = bank.search(
        Queries(keys_QD=key[None], sources=[source_of(query.clip_id, query.source_id)]),
        Search(missing=VISUAL, retrieval=Retrieval.CROSS, n=len(rows)),
    )
    expected = {row.clip_id for row in having(rows, VISUAL)} - {query.clip_id}
    assert set(result.nearest.ids(0)) == expected
