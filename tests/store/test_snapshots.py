"""Snapshots: readers see versions that belong together, through publishing, rollback and cleaning."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from r2scp.pipelines.batches.examples import Pins
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.maintenance import clean
from r2scp.store.schema import Table

Write = Callable[..., None]


@pytest.fixture
def store(tmp_path: object) -> FeatureStore:
    return FeatureStore.create(f"{tmp_path}/store", "encoder-a", 4)


@pytest.fixture
def grow(store: FeatureStore, write: Write) -> Callable[[int], None]:
    """`grow(n)`: clip n and its question, in two commits."""

    def add(number: int) -> None:
        write(store, Table.CLIPS, [{"clip_id": f"c/{number}", "corpus": "c"}])
        write(store, Table.QUESTIONS, [{"question_id": f"c/{number}", "clip_id": f"c/{number}"}])

    return add


def counts(store: FeatureStore) -> tuple[int, int]:
    return store.clips(["clip_id"]).num_rows, store.questions(["question_id"]).num_rows


def test_readers_see_one_snapshot(store: FeatureStore, grow: Callable[[int], None]) -> None:
    grow(1)
    store.publish("one")
    serving = store.at("serving")
    grow(2)
    assert counts(store) == (2, 2)
    assert counts(serving) == counts(store.at("serving")) == (1, 1)
    assert serving.versions()["clips"] == store.snapshots()["serving"].versions[Table.CLIPS]
    store.publish("two")
    assert counts(store.at("serving")) == (2, 2)
    assert counts(store.at("previous")) == counts(serving) == (1, 1), "a reader keeps the versions it opened"
    assert Pins.latest(serving).clips == serving.versions()["clips"] < Pins.latest(store).clips
    with pytest.raises(StoreError, match="open at a snapshot"):
        serving.commit(Table.CLIPS, [], {}, also_delete=["c/1"])


def test_a_new_store_has_no_snapshot(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"no snapshot 'serving'; it has: none; a re-index job publishes"):
        store.at("serving")
    with pytest.raises(StoreError, match="nothing to roll back to"):
        store.rollback()
    store.publish("one")
    with pytest.raises(StoreError, match="nothing to roll back to"):
        store.rollback()


def test_rollback_and_the_next_publication(store: FeatureStore, grow: Callable[[int], None]) -> None:
    for number, run in enumerate(("one", "two"), start=1):
        grow(number)
        store.publish(run)
    assert store.rollback().run_id == "one"
    assert counts(store.at("serving")) == (1, 1)
    previous = store.snapshots()["previous"]
    assert (previous.run_id, previous.rolled_back) == ("two", True)
    with pytest.raises(StoreError, match=r"run two\) was rolled back itself"):
        store.rollback()
    grow(3)
    store.publish("three")
    assert {name: (s.run_id, s.rolled_back) for name, s in store.snapshots().items()} == {
        "serving": ("three", False),
        "previous": ("one", False),
    }
    assert counts(store.at("serving")) == (3, 3)


def test_named_snapshots(store: FeatureStore, grow: Callable[[int], None]) -> None:
    grow(1)
    store.name_snapshot("paper-run")
    grow(2)
    clean(store, timedelta(0), exclusive=True)
    assert counts(store.at("paper-run")) == (1, 1)
    assert store.clips(version="paper-run").num_rows == 1, "Lance knows the name too"
    store.name_snapshot("paper-run")
    assert counts(store.at("paper-run")) == (2, 2)
    for name in ("serving", "previous", "", "a b", "../x", "-x", "a" * 65, "\x1b[2J"):
        with pytest.raises(UsageError, match="a snapshot's name must be"):
            store.name_snapshot(name)


def test_cleaning_keeps_snapshots_even_after_a_crash(
    store: FeatureStore, grow: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of `snapshots` is written before Lance's tags; cleaning sets them first."""
    grow(1)
    store.publish("one")
    grow(2)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "protect", lambda self: None)
        store.publish("two")
    grow(3)
    clean(store, timedelta(0), exclusive=True)
    assert counts(store.at("serving")) == (2, 2)
    assert counts(store.at("previous")) == (1, 1)
    for _ in range(2):
        grow(4)
        store.publish("later")
    clean(store, timedelta(0), exclusive=True)
    assert len(store.dataset(Table.CLIPS).versions()) <= 3, "versions without a snapshot are removed"
