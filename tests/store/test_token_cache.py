"""`Sequences` gives what a scan of the pinned version gives, whatever was cached or written since."""

from collections.abc import Callable, Mapping, Sequence

import lance
import numpy as np
import pytest

from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.token_cache import BLANK, NO_ROW, Found, SequenceCache, Sequences

Write = Callable[[FeatureStore, Table, Sequence[Mapping[str, object]]], None]
CLIP_COLUMNS = ("audio", "visual")


def scanned(store: FeatureStore, column: str, version: int, table: Table = Table.CLIPS) -> list[list]:
    """The column as plain lists, in the order of a scan; nothing where it is null."""
    rows = store.dataset(table, version).to_table(columns=[column], scan_in_order=True)[column].to_pylist()
    return [row or [] for row in rows]


def pinned(store: FeatureStore, most_bytes: int = 1 << 20) -> tuple[Sequences, dict[str, list[list]]]:
    """The columns of `clips` at the latest version, and their oracle."""
    version = store.versions()["clips"]
    found = Sequences(store, Table.CLIPS, CLIP_COLUMNS, version, SequenceCache(most_bytes))
    return found, {column: scanned(store, column, version) for column in CLIP_COLUMNS}


def plain(found: Found) -> list[list]:
    """Each row's tokens, once what stands behind its end is seen to be blank."""
    assert found.tokens_SD.dtype == np.float16
    padded = found.tokens_SD[found.places_BL]
    assert padded.shape[1] == max(found.lengths_B.max(initial=0), 1)
    for tokens, length in zip(padded, found.lengths_B, strict=True):
        assert not tokens[length:].any()
    return [tokens[:length].tolist() for tokens, length in zip(padded, found.lengths_B, strict=True)]


def one(sequences: Sequences, column: str, rows: Sequence[int] | np.ndarray) -> list[list]:
    return plain(sequences.find({column: np.asarray(rows, dtype=np.int64)}))


@pytest.mark.parametrize("column", ["audio", "visual", "words", "choice_sentences"])
def test_any_rows_in_any_order(question_store: FeatureStore, column: str) -> None:
    table = Table.CLIPS if column in CLIP_COLUMNS else Table.QUESTIONS
    version = question_store.versions()[table.value]
    wanted = scanned(question_store, column, version, table)
    assert len(question_store.dataset(table, version).get_fragments()) > 2
    assert ([] in wanted) is (column != "words")
    found = Sequences(question_store, table, [column], version, SequenceCache())
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = rng.integers(len(wanted), size=17)  # some of them twice
        assert one(found, column, rows) == [wanted[row] for row in rows]
    assert one(found, column, range(len(wanted))) == wanted
    assert found.rows_read == {column: len(wanted)}
    assert one(found, column, [NO_ROW, 3, NO_ROW]) == [[], wanted[3], []]
    assert one(found, column, [NO_ROW]) == [[]]
    assert one(found, column, []) == []


def test_one_batch_of_two_columns(question_store: FeatureStore) -> None:
    """What one column leaves out the other gives."""
    found, wanted = pinned(question_store)
    rows = {"audio": np.array([3, NO_ROW, 5, NO_ROW]), "visual": np.array([NO_ROW, 3, NO_ROW, NO_ROW])}
    assert plain(found.find(rows)) == [wanted["audio"][3], wanted["visual"][3], wanted["audio"][5], []]


def test_what_is_fetched_is_read_once(question_store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lack both columns in one call, rows that lack one in another."""
    found, wanted = pinned(question_store)
    calls: list[tuple[list[int], list[str]]] = []
    real = lance.LanceDataset.take

    def noted(self: lance.LanceDataset, rows: list[int], columns: list[str]) -> object:
        calls.append((rows, [str(column) for column in columns]))
        return real(self, rows, columns=columns)

    monkeypatch.setattr(lance.LanceDataset, "take", noted)
    audio, visual, near = np.array([7, 2, 2]), np.array([2, 7, NO_ROW]), np.array([9, 4])
    found.fetch([{"audio": audio, "visual": visual}, {"audio": near}, {}])
    assert sorted(calls) == [([2, 7], ["audio", "visual"]), ([4, 9], ["audio"])]
    for column, rows in (("audio", audio), ("visual", visual), ("audio", near)):
        assert one(found, column, rows) == [[] if row == NO_ROW else wanted[column][row] for row in rows]
    assert len(calls) == 2
    assert found.rows_read == {"audio": 4, "visual": 2}


def test_what_is_written_later_is_not_seen(own_store: FeatureStore, write: Write) -> None:
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
    cache, version = SequenceCache(), own_store.versions()["clips"]
    clips = own_store.clips().to_pylist()
    write(own_store, Table.CLIPS, [clips[0] | {"audio": clips[0]["visual"]}])
    for at in (version, version + 1):
        found = Sequences(own_store, Table.CLIPS, CLIP_COLUMNS, at, cache)
        for column in CLIP_COLUMNS:
            assert one(found, column, range(40)) == scanned(own_store, column, at)
        assert found.rows_read == {"audio": 40, "visual": 40}


@pytest.mark.parametrize("seconds", [40, 31, 7])
def test_the_cache_stays_within_its_bytes(question_store: FeatureStore, seconds: int) -> None:
    """Also where rows of other lengths take the places that became free."""
    most_bytes = seconds * question_store.dim * 2
    cache = SequenceCache(most_bytes)
    version = question_store.versions()["clips"]
    found = Sequences(question_store, Table.CLIPS, CLIP_COLUMNS, version, cache)
    wanted = {name: scanned(question_store, name, version) for name in CLIP_COLUMNS}
    rng = np.random.default_rng(1)
    for _ in range(200):
        column, rows = CLIP_COLUMNS[rng.integers(2)], rng.integers(40, size=rng.integers(1, 8))
        if rng.integers(2):
            found.fetch([{name: rng.integers(40, size=3) for name in CLIP_COLUMNS}])
        assert one(found, column, rows) == [wanted[column][row] for row in rows]
        assert 0 < cache.bytes <= most_bytes
        assert cache.tokens(question_store.dim).nbytes == most_bytes + 2 * question_store.dim
    assert min(found.rows_read.values()) > 40, "nothing was evicted"


def test_without_room_for_any(question_store: FeatureStore) -> None:
    found, wanted = pinned(question_store, most_bytes=1)
    assert one(found, "audio", [3, 3, 4, NO_ROW]) == [*(wanted["audio"][row] for row in (3, 3, 4)), []]
    rows = {"audio": np.array([3, NO_ROW]), "visual": np.array([NO_ROW, 3])}
    assert plain(found.find(rows)) == [wanted["audio"][3], wanted["visual"][3]]


def test_the_least_recently_used_goes_first(question_store: FeatureStore) -> None:
    found, wanted = pinned(question_store)
    sizes = [2 * len(value) * question_store.dim for value in wanted["audio"]]
    first, second, third = [row for row, size in enumerate(sizes) if size][:3]
    most_bytes = sizes[first] + sizes[second] + sizes[third] - 1
    found, _ = pinned(question_store, most_bytes=most_bytes)
    for row, read in ((first, 1), (second, 2), (first, 2), (third, 3), (first, 3), (second, 4)):
        one(found, "audio", [row])
        assert found.rows_read["audio"] == read, f"after row {row}"


def test_what_was_cleared_is_read_again(question_store: FeatureStore) -> None:
    cache, version = SequenceCache(1 << 20), question_store.versions()["clips"]
    found = Sequences(question_store, Table.CLIPS, CLIP_COLUMNS, version, cache)
    wanted = one(found, "audio", range(40))
    cache.clear()
    assert cache.bytes == 0
    assert one(found, "audio", range(40)) == wanted
    assert found.rows_read == {"audio": 80, "visual": 0}


def test_one_width_to_a_cache() -> None:
    cache = SequenceCache(1 << 10)
    assert not cache.tokens(4)[BLANK].any()
    with pytest.raises(ValueError, match="width 4; got 8"):
        cache.tokens(8)


def test_a_store_that_is_broken_says_so(own_store: FeatureStore) -> None:
    found, _ = pinned(own_store)
    lance.LanceDataset.drop(own_store.address(Table.CLIPS).uri)
    with pytest.raises(StoreError, match=r"cannot read .*clips\.lance@\d+/audio"):
        one(found, "audio", [0])
    with pytest.raises(StoreError, match="cannot open"):
        Sequences(own_store, Table.CLIPS, ["audio"], 99, SequenceCache())
