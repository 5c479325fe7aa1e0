"""`TokenReader` gives what a scan of the pinned version gives, whatever was cached or written since."""

from collections.abc import Callable, Mapping, Sequence

import lance
import numpy as np
import pytest

from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.token_cache import NO_ROW, PADDING_SLOT, CachedTokens, TokenCache, TokenReader

Write = Callable[[FeatureStore, Table, Sequence[Mapping[str, object]]], None]
CLIP_COLUMNS = ("audio", "visual")


def scanned(store: FeatureStore, column: str, version: int, table: Table = Table.CLIPS) -> list[list]:
    """The column as plain lists, in the order of a scan; nothing where it is null."""
    rows = store.dataset(table, version).to_table(columns=[column], scan_in_order=True)[column].to_pylist()
    return [row or [] for row in rows]


def pinned(store: FeatureStore, max_bytes: int = 1 << 20) -> tuple[TokenReader, dict[str, list[list]]]:
    """The columns of `clips` at the latest version, and their oracle."""
    version = store.versions()["clips"]
    reader = TokenReader(store, Table.CLIPS, CLIP_COLUMNS, version, TokenCache(max_bytes))
    return reader, {column: scanned(store, column, version) for column in CLIP_COLUMNS}


def plain(cached: CachedTokens) -> list[list]:
    """Each row's tokens, once the padding behind its end is seen to be zero."""
    assert cached.tokens_SD.dtype == np.float16
    padded = cached.tokens_SD[cached.slots_BL]
    assert padded.shape[1] == max(cached.lengths_B.max(initial=0), 1)
    for tokens, length in zip(padded, cached.lengths_B, strict=True):
        assert not tokens[length:].any()
    return [tokens[:length].tolist() for tokens, length in zip(padded, cached.lengths_B, strict=True)]


def one(reader: TokenReader, column: str, rows: Sequence[int] | np.ndarray) -> list[list]:
    return plain(reader.read({column: np.asarray(rows, dtype=np.int64)}))


@pytest.mark.parametrize("column", ["audio", "visual", "words", "choice_sentences"])
def test_any_rows_in_any_order(question_store: FeatureStore, column: str) -> None:
    table = Table.CLIPS if column in CLIP_COLUMNS else Table.QUESTIONS
    version = question_store.versions()[table.value]
    expected = scanned(question_store, column, version, table)
    assert len(question_store.dataset(table, version).get_fragments()) > 2
    assert ([] in expected) is (column != "words")
    reader = TokenReader(question_store, table, [column], version, TokenCache())
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = rng.integers(len(expected), size=17)  # some of them twice
        assert one(reader, column, rows) == [expected[row] for row in rows]
    assert one(reader, column, range(len(expected))) == expected
    assert reader.rows_read == {column: len(expected)}
    assert one(reader, column, [NO_ROW, 3, NO_ROW]) == [[], expected[3], []]
    assert one(reader, column, [NO_ROW]) == [[]]
    assert one(reader, column, []) == []


def test_one_batch_of_two_columns(question_store: FeatureStore) -> None:
    """Rows that one column leaves out the other gives."""
    reader, expected = pinned(question_store)
    rows = {"audio": np.array([3, NO_ROW, 5, NO_ROW]), "visual": np.array([NO_ROW, 3, NO_ROW, NO_ROW])}
    assert plain(reader.read(rows)) == [expected["audio"][3], expected["visual"][3], expected["audio"][5], []]


def test_prefetched_rows_are_read_once(question_store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that need both columns in one call, rows that need one in another."""
    reader, expected = pinned(question_store)
    calls: list[tuple[list[int], list[str]]] = []
    real = lance.LanceDataset.take

    def recorded(self: lance.LanceDataset, rows: list[int], columns: list[str]) -> object:
        calls.append((rows, [str(column) for column in columns]))
        return real(self, rows, columns=columns)

    monkeypatch.setattr(lance.LanceDataset, "take", recorded)
    audio, visual, near = np.array([7, 2, 2]), np.array([2, 7, NO_ROW]), np.array([9, 4])
    reader.prefetch([{"audio": audio, "visual": visual}, {"audio": near}, {}])
    assert sorted(calls) == [([2, 7], ["audio", "visual"]), ([4, 9], ["audio"])]
    for column, rows in (("audio", audio), ("visual", visual), ("audio", near)):
        assert one(reader, column, rows) == [[] if row == NO_ROW else expected[column][row] for row in rows]
    assert len(calls) == 2
    assert reader.rows_read == {"audio": 4, "visual": 2}


def test_later_writes_are_not_seen(own_store: FeatureStore, write: Write) -> None:
    before, old = pinned(own_store)
    clips = own_store.clips().to_pylist()
    other = [clips[row] | {"audio": clips[row]["visual"]} for row in (0, 1, 20)]
    write(own_store, Table.CLIPS, other)
    own_store.commit(Table.CLIPS, [], {}, also_delete=[clips[row]["clip_id"] for row in (5, 30)])
    after, new = pinned(own_store)
    assert len(new["audio"]) == len(old["audio"]) - 2
    assert one(before, "audio", range(len(old["audio"]))) == old["audio"]
    assert one(after, "audio", range(len(new["audio"]))) == new["audio"]
    assert one(before, "audio", [39, 0, 5]) == [old["audio"][row] for row in (39, 0, 5)]


def test_two_versions_share_a_cache(own_store: FeatureStore, write: Write) -> None:
    """Equal row numbers of two versions, or of two columns, are not the same rows."""
    cache, version = TokenCache(), own_store.versions()["clips"]
    clips = own_store.clips().to_pylist()
    write(own_store, Table.CLIPS, [clips[0] | {"audio": clips[0]["visual"]}])
    for at in (version, version + 1):
        reader = TokenReader(own_store, Table.CLIPS, CLIP_COLUMNS, at, cache)
        for column in CLIP_COLUMNS:
            assert one(reader, column, range(40)) == scanned(own_store, column, at)
        assert reader.rows_read == {"audio": 40, "visual": 40}


@pytest.mark.parametrize("seconds", [40, 31, 7])
def test_the_cache_stays_within_its_bytes(question_store: FeatureStore, seconds: int) -> None:
    """Also where rows of other lengths take the slots that became free."""
    max_bytes = seconds * question_store.dim * 2
    cache = TokenCache(max_bytes)
    version = question_store.versions()["clips"]
    reader = TokenReader(question_store, Table.CLIPS, CLIP_COLUMNS, version, cache)
    expected = {name: scanned(question_store, name, version) for name in CLIP_COLUMNS}
    rng = np.random.default_rng(1)
    for _ in range(200):
        column, rows = CLIP_COLUMNS[rng.integers(2)], rng.integers(40, size=rng.integers(1, 8))
        if rng.integers(2):
            reader.prefetch([{name: rng.integers(40, size=3) for name in CLIP_COLUMNS}])
        assert one(reader, column, rows) == [expected[column][row] for row in rows]
        assert 0 < cache.bytes <= max_bytes
        assert cache.tokens(question_store.dim).nbytes == max_bytes + 2 * question_store.dim
    assert min(reader.rows_read.values()) > 40, "nothing was evicted"


def test_rows_that_do_not_fit_are_read_uncached(question_store: FeatureStore) -> None:
    reader, expected = pinned(question_store, max_bytes=1)
    assert one(reader, "audio", [3, 3, 4, NO_ROW]) == [*(expected["audio"][row] for row in (3, 3, 4)), []]
    rows = {"audio": np.array([3, NO_ROW]), "visual": np.array([NO_ROW, 3])}
    assert plain(reader.read(rows)) == [expected["audio"][3], expected["visual"][3]]


def test_the_least_recently_used_row_is_evicted_first(question_store: FeatureStore) -> None:
    reader, expected = pinned(question_store)
    sizes = [2 * len(value) * question_store.dim for value in expected["audio"]]
    first, second, third = [row for row, size in enumerate(sizes) if size][:3]
    max_bytes = sizes[first] + sizes[second] + sizes[third] - 1
    reader, _ = pinned(question_store, max_bytes=max_bytes)
    for row, read in ((first, 1), (second, 2), (first, 2), (third, 3), (first, 3), (second, 4)):
        one(reader, "audio", [row])
        assert reader.rows_read["audio"] == read, f"after row {row}"


def test_cleared_rows_are_read_again(question_store: FeatureStore) -> None:
    cache, version = TokenCache(1 << 20), question_store.versions()["clips"]
    reader = TokenReader(question_store, Table.CLIPS, CLIP_COLUMNS, version, cache)
    expected = one(reader, "audio", range(40))
    cache.clear()
    assert cache.bytes == 0
    assert one(reader, "audio", range(40)) == expected
    assert reader.rows_read == {"audio": 80, "visual": 0}


def test_a_cache_has_one_width() -> None:
    cache = TokenCache(1 << 10)
    assert not cache.tokens(4)[PADDING_SLOT].any()
    with pytest.raises(ValueError, match="width 4; got 8"):
        cache.tokens(8)


def test_a_broken_store_is_reported(own_store: FeatureStore) -> None:
    reader, _ = pinned(own_store)
    lance.LanceDataset.drop(own_store.address(Table.CLIPS).uri)
    with pytest.raises(StoreError, match=r"cannot read .*clips\.lance@\d+/audio"):
        one(reader, "audio", [0])
    with pytest.raises(StoreError, match="cannot open"):
        TokenReader(own_store, Table.CLIPS, ["audio"], 99, TokenCache())
