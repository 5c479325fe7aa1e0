"""`Sequences` gives what a scan of the pinned version gives, whatever was cached or written since."""

from collections.abc import Callable, Mapping, Sequence

import lance
import numpy as np
import pytest

from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.sequences import SequenceCache, Sequences

Write = Callable[[FeatureStore, Table, Sequence[Mapping[str, object]]], None]


def scanned(store: FeatureStore, column: str, version: int, table: Table = Table.CLIPS) -> list:
    """The column as plain lists, in the order of a scan."""
    return store.dataset(table, version).to_table(columns=[column], scan_in_order=True)[column].to_pylist()


def pinned(store: FeatureStore, column: str = "audio", most_bytes: int = 1 << 20) -> tuple[Sequences, list]:
    """A column of `clips` at the latest version, and its oracle."""
    version = store.versions()["clips"]
    found = Sequences(store, Table.CLIPS, column, version, SequenceCache(most_bytes))
    return found, scanned(store, column, version)


def plain(parts: Sequence[np.ndarray | None]) -> list:
    return [None if part is None else part.tolist() for part in parts]


@pytest.mark.parametrize("column", ["audio", "visual", "words", "choice_sentences"])
def test_any_rows_in_any_order(asked_store: FeatureStore, column: str) -> None:
    table = Table.CLIPS if column in ("audio", "visual") else Table.QUESTIONS
    version = asked_store.versions()[table.value]
    wanted = scanned(asked_store, column, version, table)
    assert len(asked_store.dataset(table, version).get_fragments()) > 2
    assert (None in wanted) is (column != "words")
    found = Sequences(asked_store, table, column, version, SequenceCache())
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = rng.integers(len(wanted), size=17)  # some of them twice
        assert plain(found.take(rows)) == [wanted[row] for row in rows]
    taken = found.take(range(len(wanted)))
    assert plain(taken) == wanted
    assert found.rows_read == len(wanted)
    for part in taken:
        assert part is None or (part.dtype == np.float16 and part.shape[1] == asked_store.dim)
    assert found.take([]) == []


def test_what_is_written_later_is_not_seen(own_store: FeatureStore, write: Write) -> None:
    before, old = pinned(own_store)
    clips = own_store.clips().to_pylist()
    other = [clips[row] | {"audio": clips[row]["visual"]} for row in (0, 1, 20)]
    write(own_store, Table.CLIPS, other)
    own_store.commit(Table.CLIPS, [], {}, also_delete=[clips[row]["clip_id"] for row in (5, 30)])
    after, new = pinned(own_store)
    assert len(new) == len(old) - 2
    assert plain(before.take(range(len(old)))) == old
    assert plain(after.take(range(len(new)))) == new
    assert plain(before.take([39, 0, 5])) == [old[39], old[0], old[5]]


def test_two_versions_share_a_cache(own_store: FeatureStore, write: Write) -> None:
    """Equal row numbers of two versions, or of two columns, are not the same rows."""
    cache, version = SequenceCache(), own_store.versions()["clips"]
    clips = own_store.clips().to_pylist()
    write(own_store, Table.CLIPS, [clips[0] | {"audio": clips[0]["visual"]}])
    for at in (version, version + 1):
        for column in ("audio", "visual"):
            found = Sequences(own_store, Table.CLIPS, column, at, cache)
            assert plain(found.take(range(40))) == scanned(own_store, column, at)
            assert found.rows_read == 40


def test_the_cache_stays_within_its_bytes(asked_store: FeatureStore) -> None:
    most_bytes = 10 * 4 * asked_store.dim * 2  # ten rows of 4 s
    cache = SequenceCache(most_bytes)
    version = asked_store.versions()["clips"]
    columns = [Sequences(asked_store, Table.CLIPS, name, version, cache) for name in ("audio", "visual")]
    wanted = [scanned(asked_store, name, version) for name in ("audio", "visual")]
    rng = np.random.default_rng(1)
    for _ in range(30):
        column, rows = int(rng.integers(2)), rng.integers(40, size=8)
        assert plain(columns[column].take(rows)) == [wanted[column][row] for row in rows]
        assert 0 < cache.bytes <= most_bytes
    assert columns[0].rows_read > 40, "nothing was evicted"
    alone = Sequences(asked_store, Table.CLIPS, "audio", version, SequenceCache(1))  # nothing fits
    assert plain(alone.take([3, 3, 4])) == [wanted[0][3], wanted[0][3], wanted[0][4]]


def test_the_least_recently_used_goes_first(asked_store: FeatureStore) -> None:
    found, wanted = pinned(asked_store)
    sizes = [0 if value is None else 2 * len(value) * asked_store.dim for value in wanted]
    first, second, third = [row for row, size in enumerate(sizes) if size][:3]
    most_bytes = sizes[first] + sizes[second] + sizes[third] - 1
    found, _ = pinned(asked_store, most_bytes=most_bytes)
    for row, read in ((first, 1), (second, 2), (first, 2), (third, 3), (first, 3), (second, 4)):
        found.take([row])
        assert found.rows_read == read, f"after row {row}"


def test_rows_are_read_only_and_keep_no_more_than_themselves(asked_store: FeatureStore) -> None:
    found, wanted = pinned(asked_store)
    for part in found.take(range(40)):
        if part is not None:
            assert part.base is None or part.base.nbytes == part.nbytes
            with pytest.raises(ValueError, match="read-only"):
                part[0] = 0
    assert plain(found.take(range(40))) == wanted


def test_a_store_that_is_broken_says_so(own_store: FeatureStore) -> None:
    found, _ = pinned(own_store)
    lance.LanceDataset.drop(own_store.address(Table.CLIPS).uri)
    with pytest.raises(StoreError, match=r"cannot read .*clips\.lance@\d+/audio"):
        found.take([0])
    with pytest.raises(StoreError, match="cannot open"):
        Sequences(own_store, Table.CLIPS, "audio", 99, SequenceCache())
