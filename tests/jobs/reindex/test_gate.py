"""The gate's figures: drift of known distributions, counts of planted faults."""

from collections.abc import Callable
from pathlib import Path

import lance
import numpy as np
import pytest
from lance.fragment import FragmentMetadata

from r2scp.jobs.reindex.gate import Check, GateSettings, dead_check, drift, drift_checks, row_checks
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

DIM = 16
Write = Callable[..., None]


def failed(checks: list[Check]) -> list[str]:
    return [check.what for check in checks if not check.passed]


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=-1, keepdims=True)).astype(np.float32)


def row(number: int, **columns: object) -> dict[str, object]:
    key = unit(np.random.default_rng(number).standard_normal(DIM)).tolist()
    usual = {"corpus": "c", "visual_key": key, "visual_status": "present", "audio_status": "absent"}
    return {"clip_id": f"c/{number}", "run_id": "old"} | usual | columns


@pytest.fixture
def store(tmp_path: Path, write: Write) -> FeatureStore:
    store = FeatureStore.create(str(tmp_path / "store"), "encoder-a", DIM)
    write(store, Table.CLIPS, [row(number) for number in range(20)])
    write(store, Table.QUESTIONS, [{"question_id": f"q{n}", "clip_id": f"c/{n}"} for n in range(10)])
    store.publish("old")
    return store


def test_nothing_to_find_fault_with(store: FeatureStore) -> None:
    checks = row_checks(store, GateSettings())
    assert failed(checks) == []
    assert len(checks) == 6


def test_a_store_without_questions(tmp_path: Path, write: Write) -> None:
    store = FeatureStore.create(str(tmp_path / "other"), "encoder-a", DIM)
    write(store, Table.CLIPS, [row(1)])
    assert failed(row_checks(store, GateSettings())) == []
    store.publish("one")
    assert failed(row_checks(store, GateSettings())) == []


def test_what_is_lost(store: FeatureStore) -> None:
    store.commit(Table.CLIPS, [], {}, also_delete=["c/18", "c/19"])
    assert failed(row_checks(store, GateSettings())) == [], "two of twenty is not more than a tenth"
    store.commit(Table.CLIPS, [], {}, also_delete=["c/17"])
    store.commit(Table.QUESTIONS, [], {}, also_delete=["q0", "q1"])
    [clips, questions] = [check for check in row_checks(store, GateSettings()) if not check.passed]
    assert (clips.what, round(clips.value, 3)) == ("share of clips that serve and would be lost", 0.15)
    assert (questions.what, round(questions.value, 3)) == (
        "share of questions that serve and would be lost",
        0.2,
    )
    assert str(clips) == "share of clips that serve and would be lost is 0.15, and must be at most 0.1"
    assert failed(row_checks(store, GateSettings(max_lost_share=None))) == []
    assert failed(row_checks(store, GateSettings(min_clips=18, max_lost_share=None))) == ["clips"]


def test_what_is_twice_or_hangs_in_the_air(store: FeatureStore) -> None:
    staged = store.stage(Table.CLIPS, store.clips(where="clip_id = 'c/3'"))
    dataset = store.dataset(Table.CLIPS)
    fragments = [FragmentMetadata.from_json(text) for text in staged.fragments]
    lance.LanceDataset.commit(dataset, lance.LanceOperation.Append(fragments), read_version=dataset.version)
    store.commit(Table.CLIPS, [], {}, also_delete=["c/5"])
    assert failed(row_checks(store, GateSettings())) == [
        "clips that are there twice",
        "questions about clips that are not there",
    ]


def test_what_is_damaged(store: FeatureStore, write: Write) -> None:
    write(store, Table.CLIPS, [row(n, visual_status="partial", audio_status="corrupt") for n in range(11)])
    [partial] = [check for check in row_checks(store, GateSettings()) if not check.passed]
    assert (partial.what, partial.value) == ("share of partial clips", 11 / 20)
    assert failed(dead_check(3, 10, GateSettings())) == ["share of dead letters"]
    assert dead_check(0, 0, GateSettings()) == []


def test_drift_is_about_zero_for_one_distribution_and_one_for_a_shift_by_one_deviation() -> None:
    rng = np.random.default_rng(0)
    alike = [drift(rng.standard_normal((200, 8)), rng.standard_normal((30, 8))) for _ in range(300)]
    assert abs(np.mean(alike)) < 0.003, "without bias, whatever the sizes"
    assert max(alike) < 0.1
    shift = np.zeros(8)
    shift[0] = 8**0.5  # the distance that the coordinates' variances of 1 add up to
    far = [drift(rng.standard_normal((200, 8)), rng.standard_normal((30, 8)) + shift) for _ in range(300)]
    assert np.mean(far) == pytest.approx(1, abs=0.02)
    assert drift(np.ones((3, 8)), np.ones((3, 8))) == 0


def test_drift_looks_at_what_a_run_added(store: FeatureStore, write: Write) -> None:
    settings = GateSettings(max_drift=0.5)
    assert drift_checks(store, "new", settings, 1) == [], "nothing was added"
    write(store, Table.CLIPS, [row(100 + n, run_id="new") for n in range(40)])
    [alike] = drift_checks(store, "new", settings, 1)
    assert alike.passed
    away = unit(np.eye(DIM)[0] + 0.1 * np.random.default_rng(1).standard_normal((40, DIM)))
    rows = [row(100 + n, run_id="new", visual_key=away[n].tolist()) for n in range(40)]
    write(store, Table.CLIPS, rows)
    [shifted] = drift_checks(store, "new", settings, 1)
    assert (shifted.what, shifted.passed) == ("drift of visual keys", False)
    assert drift_checks(store, "new", GateSettings(), 1) == [], "not looked at unless asked for"
