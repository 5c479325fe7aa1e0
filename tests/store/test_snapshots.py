"""Snapshots: the tables of one moment stay together for readers, through publishing, rollback, cleaning."""

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

    def grown(number: int) -> None:
        write(store, Table.CLIPS, [{"clip_id": f"c/{number}", "corpus": "c"}])
        write(store, Table.QUESTIONS, [{"question_id": f"c/{number}", "clip_id": f"c/{number}"}])

    return grown


def seen(store: FeatureStore) -> tuple[int, int]:
    return store.clips(["clip_id"]).num_rows, store.questions(["question_id"]).num_rows


def test_readers_see_one_moment(store: FeatureStore, grow: Callable[[int], None]) -> None:
    grow(1)
    store.publish("one")
    serving = store.at("serving")
    grow(2)
    assert seen(store) == (2, 2)
    assert seen(serving) == seen(store.at("serving")) == (1, 1)
    assert serving.versions()["clips"] == store.snapshots()["serving"].versions[Table.CLIPS]
    store.publish("two")
    assert seen(store.at("serving")) == (2, 2)
    assert seen(store.at("previous")) == seen(serving) == (1, 1), "a reader keeps what it opened"
    assert Pins.latest(serving).clips == serving.versions()["clips"] < Pins.latest(store).clips
    with pytest.raises(StoreError, match="read at a snapshot"):
        serving.commit(Table.CLIPS, [], {}, also_delete=["c/1"])


def test_nothing_serves_at_first(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"no snapshot 'serving'; there is: none; a re-index job publishes"):
        store.at("serving")
    with pytest.raises(StoreError, match="nothing to roll back to"):
        store.rollback()
    store.publish("one")
    with pytest.raises(StoreError, match="nothing to roll back to"):
        store.rollback()


def test_rollback_and_what_comes_after(store: FeatureStore, grow: Callable[[int], None]) -> None:
    for number, run in enumerate(("one", "two"), start=1):
        grow(number)
        store.publish(run)
    assert store.rollback().run_id == "one"
    assert seen(store.at("serving")) == (1, 1)
    wrong = store.snapshots()["previous"]
    assert (wrong.run_id, wrong.rolled_back) == ("two", True)
    with pytest.raises(StoreError, match=r"run two\) was rolled back itself"):
        store.rollback()
    grow(3)
    store.publish("three")
    found = store.snapshots()
    assert {name: (s.run_id, s.rolled_back) for name, s in found.items()} == {
        "serving": ("three", False),
        "previous": ("one", False),
    }
    assert seen(store.at("serving")) == (3, 3)


def test_names_of_ones_own(store: FeatureStore, grow: Callable[[int], None]) -> None:
    grow(1)
    store.name_snapshot("paper-run")
    grow(2)
    clean(store, timedelta(0), alone=True)
    assert seen(store.at("paper-run")) == (1, 1)
    assert store.clips(version="paper-run").num_rows == 1, "Lance knows the name as well"
    store.name_snapshot("paper-run")
    assert seen(store.at("paper-run")) == (2, 2)
    for name in ("serving", "previous", "", "a b", "../x", "-x", "a" * 65, "\x1b[2J"):
        with pytest.raises(UsageError, match="a snapshot's name must be"):
            store.name_snapshot(name)


def test_cleaning_spares_what_snapshots_name_after_a_crash_too(
    store: FeatureStore, grow: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pointer moves before Lance's tags do; cleaning sets them first."""
    grow(1)
    store.publish("one")
    grow(2)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "protect", lambda self: None)
        store.publish("two")
    grow(3)
    clean(store, timedelta(0), alone=True)
    assert seen(store.at("serving")) == (2, 2)
    assert seen(store.at("previous")) == (1, 1)
    for _ in range(2):
        grow(4)
        store.publish("later")
    clean(store, timedelta(0), alone=True)
    assert len(store.dataset(Table.CLIPS).versions()) <= 3, "what no snapshot names is gone"
