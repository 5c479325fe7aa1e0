"""The gate's checks: drift of known distributions, counts of planted faults."""

from collections.abc import Callable
from pathlib import Path

import lance
import numpy as np
import pytest
from lance.fragment import FragmentMetadata

from r2scp.jobs.reindex.gate import Check, GateSettings, drift, drift_checks, failed_check, row_checks
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
    defaults = {"corpus": "c", "visual_key": key, "visual_status": "present", "audio_status": "absent"}
    return {"clip_id": f"c/{number}", "run_id": "old"} | defaults | columns


@pytest.fixture
def store(tmp_path: Path, write: Write) -> FeatureStore:
    store = FeatureStore.create(str(tmp_path / "store"), "encoder-a", DIM)
    write(store, Table.CLIPS, [row(number) for number in range(20)])
    write(store, Table.QUESTIONS, [{"question_id": f"q{n}", "clip_id": f"c/{n}"} for n in range(10)])
    store.publish("old")
    return store


def test_good_stores_pass(store: FeatureStore, tmp_path: Path, write: Write) -> None:
    checks = row_checks(store, GateSettings())
    assert (failed(checks), len(checks)) == ([], 6)
    store = FeatureStore.create(str(tmp_path / "no questions"), "encoder-a", DIM)
    write(store, Table.CLIPS, [row(1)])
    assert failed(row_checks(store, GateSettings())) == []
    store.publish("one")
    assert failed(row_checks(store, GateSettings())) == []


def test_lost_rows(store: FeatureStore) -> None:
    store.commit(Table.CLIPS, [], {}, also_delete=["c/18", "c/19"])
    assert failed(row_checks(store, GateSettings())) == [], "two of twenty is a tenth"
    store.commit(Table.CLIPS, [], {}, also_delete=["c/17"])
    store.commit(Table.QUESTIONS, [], {}, also_delete=["q0", "q1"])
    [clips, questions] = [check for check in row_checks(store, GateSettings()) if not check.passed]
    assert (clips.what, round(clips.value, 3)) == ("share of published clips that would disappear", 0.15)
    assert (questions.what, round(questions.value, 3)) == (
        "share of published questions that would disappear",
        0.2,
    )
    assert str(clips) == "share of published clips that would disappear is 0.15, and must be at most 0.1"
    assert failed(row_checks(store, GateSettings(max_lost_share=None))) == []
    assert failed(row_checks(store, GateSettings(min_clips=18, max_lost_share=None))) == ["clips"]


def test_duplicate_clips_and_questions_without_a_clip(store: FeatureStore) -> None:
    staged = store.stage(Table.CLIPS, store.clips(where="clip_id = 'c/3'"))
    dataset = store.dataset(Table.CLIPS)
    fragments = [FragmentMetadata.from_json(text) for text in staged.fragments]
    lance.LanceDataset.commit(dataset, lance.LanceOperation.Append(fragments), read_version=dataset.version)
    store.commit(Table.CLIPS, [], {}, also_delete=["c/5"])
    assert failed(row_checks(store, GateSettings())) == [
        "duplicate clips",
        "questions without a clip",
    ]


def test_damaged_and_failed_clips(store: FeatureStore, write: Write) -> None:
    write(store, Table.CLIPS, [row(n, visual_status="partial", audio_status="corrupt") for n in range(11)])
    [partial] = [check for check in row_checks(store, GateSettings()) if not check.passed]
    assert (partial.what, partial.value) == ("share of partial clips", 11 / 20)
    assert failed(failed_check(3, 10, GateSettings())) == ["share of failed clips"]
    assert failed_check(0, 0, GateSettings()) == []


def test_drift_is_about_zero_for_one_distribution_and_one_for_a_shift_by_one_deviation() -> None:
    rng = np.random.default_rng(0)
    same = [drift(rng.standard_normal((200, 8)), rng.standard_normal((30, 8))) for _ in range(300)]
    assert abs(np.mean(same)) < 0.003, "unbiased, whatever the sizes"
    assert max(same) < 0.1
    shift = np.zeros(8)
    shift[0] = 8**0.5  # distance 1: the coordinates' variances of 1 add up to 8
    shifted = [drift(rng.standard_normal((200, 8)), rng.standard_normal((30, 8)) + shift) for _ in range(300)]
    assert np.mean(shifted) == pytest.approx(1, abs=0.02)
    assert drift(np.ones((3, 8)), np.ones((3, 8))) == 0


def test_drift_of_the_keys_that_a_run_added(store: FeatureStore, write: Write) -> None:
    settings = GateSettings(max_drift=0.5)
    assert drift_checks(store, "new", settings, 1) == [], "nothing was added"
    write(store, Table.CLIPS, [row(100 + n, run_id="new") for n in range(40)])
    [check] = drift_checks(store, "new", settings, 1)
    assert check.passed
    away = unit(np.eye(DIM)[0] + 0.1 * np.random.default_rng(1).standard_normal((40, DIM)))
    rows = [row(100 + n, run_id="new", visual_key=away[n].tolist()) for n in range(40)]
    write(store, Table.CLIPS, rows)
    [check] = drift_checks(store, "new", settings, 1)
    assert (check.what, check.passed) == ("drift of visual keys", False)
    assert drift_checks(store, "new", GateSettings(), 1) == [], "disabled by default"
