"""An impossible training is refused in one line, before it starts if possible; no thread keeps running."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r2scp.jobs.training.checkpoints import EXPERTS, read_checkpoint
from r2scp.jobs.training.config import StageConfig
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.jobs.training.stages import ExpertsStage, MixingStage
from r2scp.model.config import ModelConfig
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import CheckpointError, FingerprintMismatch, R2SCPError, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table

MODEL = ModelConfig(encoder_dim=16, classes=6, dim=16, heads=2)
Quick = Callable[..., TrainPlan]
Copy = Callable[[FeatureStore], FeatureStore]


def check_refused(
    plan: TrainPlan, error: type[R2SCPError], message: str, options: TrainOptions | None = None
) -> None:
    with pytest.raises(error, match=message) as caught:
        run_training(plan, options or TrainOptions(), lambda values: None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not prefetch_threads()


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"retrieval": Retrieval.CROSS}, StoreError, r'no neighbours for .*"cross".*run `r2scp-pipe index`'),
        ({"index": IndexSettings(n=5)}, StoreError, r"no neighbours for .*run `r2scp-pipe index`"),
        ({"model": replace(MODEL, encoder_dim=32)}, UsageError, "encoder_dim must be 16, the width"),
        ({"corpora": ("avqa",)}, StoreError, r"no question .*'val'.*avqa.*set holdout"),
        ({"corpora": ("kinetics",)}, StoreError, r"no question .*'train'.*kinetics"),
        ({"holdout": 1e-9}, StoreError, "leaves no validation questions: .* about 17 videos"),
        ({"holdout": 1 - 1e-9}, StoreError, "leaves no training questions"),
    ],
)
def test_missing_data_is_reported_before_anything_is_written(
    quick_plan: Quick, tmp_path: Path, changes: dict[str, Any], error: type[R2SCPError], message: str
) -> None:
    plan, corpora = quick_plan(tmp_path / "run"), changes.get("corpora")
    plan = replace(plan, config=replace(plan.config, **changes), answers=None if corpora else plan.answers)
    for workers in (1, 2):  # not after Ray was started, either
        check_refused(plan, error, message, TrainOptions(num_workers=workers))
    assert not (tmp_path / "run").exists()


def test_a_store_without_an_index(learnable_store: FeatureStore, quick_plan: Quick, tmp_path: Path) -> None:
    """Never indexed: its table of neighbours is empty."""
    store = FeatureStore.create(str(tmp_path / "bare"), "bare", 16)
    for table in (Table.CLIPS, Table.QUESTIONS):
        rows = learnable_store.dataset(table).to_table()
        store.commit(table, [store.stage(table, rows)], {})
    check_refused(quick_plan(tmp_path / "run", store), StoreError, "no neighbours .*run `r2scp-pipe index`")
    without = replace(MODEL, cmr=False)
    run_training(quick_plan(tmp_path / "run", store, model=without), TrainOptions(), lambda values: None)


def test_stage_two_needs_complete_clips(
    learnable_store: FeatureStore, quick_plan: Quick, copy: Copy, write: Callable, tmp_path: Path
) -> None:
    """Stage II has no clips to train on, which is reported before stage I."""
    store = copy(learnable_store)
    deaf = [row | {"audio": None, "audio_key": None} for row in store.clips().to_pylist()]
    write(store, Table.CLIPS, deaf)
    config = quick_plan(tmp_path, store).config
    plan = replace(
        quick_plan(tmp_path / "run", store), config=replace(config, model=replace(MODEL, cmr=False))
    )
    check_refused(plan, StoreError, "stage II needs clips with both modalities")
    assert not (tmp_path / "run").exists()
    alone = replace(plan, config=replace(plan.config, stage_two=StageConfig(epochs=0)))
    best = run_training(alone, TrainOptions(), lambda values: None)
    assert best.metrics["mean"] > 0.5, "stage I learns from what there is"


def test_a_folder_in_use_by_another_training(quick_plan: Quick, tmp_path: Path) -> None:
    plan, epochs = quick_plan(tmp_path / "run"), []

    def on_epoch(values: dict[str, object]) -> None:
        epochs.append(values)
        if len(epochs) == 2:
            check_refused(plan, UsageError, r"another process is training in .*run")

    run_training(plan, TrainOptions(), on_epoch)
    assert len(epochs) == 6
    assert read_checkpoint(plan.folder).finished


def test_a_loss_that_is_not_finite(
    learnable_store: FeatureStore, quick_plan: Quick, copy: Copy, write: Callable, tmp_path: Path
) -> None:
    store = copy(learnable_store)
    [row] = store.clips(where="clip_id = 'music-avqa/3'").to_pylist()
    row["visual"] = [np.full(16, np.nan, np.float16)] * len(row["visual"])
    write(store, Table.CLIPS, [row])
    check_refused(
        quick_plan(tmp_path / "run", store), R2SCPError, r"the loss became nan in step [1-5], .*lower lr"
    )
    assert not (tmp_path / "run" / "last.json").exists()


@pytest.mark.parametrize(
    ("owner", "method"),
    [(ExpertsStage, "compute_loss"), (MixingStage, "compute_loss"), (R2SCP, "forward")],
    ids=["stage I", "stage II", "validation"],
)
def test_prefetching_stops_if_a_step_fails(
    quick_plan: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    """Even while the error, and with it the frame of the loop, is still referenced."""
    real, calls = getattr(owner, method), 0

    def failing(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += not (owner is R2SCP and self.training)
        if calls == 2:
            raise RuntimeError("out of memory")
        return real(self, *arguments)

    monkeypatch.setattr(owner, method, failing)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        run_training(quick_plan(tmp_path, evaluate_rows=1), TrainOptions(), lambda values: None)
    assert caught.tb is not None
    assert not prefetch_threads()


def test_invalid_workers_and_folders(quick_plan: Quick, tmp_path: Path) -> None:
    check_refused(quick_plan(tmp_path), UsageError, "at least 1 worker; got 0", TrainOptions(num_workers=0))
    (tmp_path / "file").write_text("not a folder")
    message = r"cannot write into .*file/run: Not a directory"
    check_refused(quick_plan(tmp_path / "file" / "run"), R2SCPError, message)


def test_experts_that_do_not_fit(
    learnable_store: FeatureStore, quick_plan: Quick, copy: Copy, tmp_path: Path
) -> None:
    experts, run = tmp_path / "experts", tmp_path / "run"
    run_training(quick_plan(experts, stage_two=StageConfig(epochs=0)), TrainOptions(), lambda values: None)
    good = replace(quick_plan(run), experts=experts)
    wider = replace(good, config=replace(good.config, model=replace(MODEL, dim=32)))
    check_refused(wider, CheckpointError, r"does not fit this model.* must be \(.*32.*\); got \(.*16.*\)")
    assert good.answers is not None
    check_refused(replace(good, answers=good.answers[::-1]), CheckpointError, "trained with other answers")
    check_refused(replace(good, experts=tmp_path), CheckpointError, r"no checkpoint .*experts\.json")
    other = FeatureStore.create(copy(learnable_store).uri, "another", 16)
    for table in (Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS):
        other.commit(table, [other.stage(table, learnable_store.dataset(table).to_table())], {})
    foreign = replace(quick_plan(run, other), experts=experts)
    check_refused(
        foreign, FingerprintMismatch, "trained on features of encoder learnable; .* holds those of another"
    )
    assert not run.exists()
    damaged = read_checkpoint(experts, EXPERTS)
    (experts / damaged.tensors).write_bytes(b"")
    check_refused(good, CheckpointError, "is damaged")
    assert not run.exists()


def test_a_missing_store(quick_plan: Quick, tmp_path: Path) -> None:
    gone = replace(quick_plan(tmp_path / "run"), uri=str(tmp_path / "gone"))
    check_refused(gone, StoreError, "there is no store at")
    other = replace(quick_plan(tmp_path / "run"), fingerprint="unheard-of")
    check_refused(other, FingerprintMismatch, "no encoder unheard-of")


def test_questions_with_unknown_answers_are_not_trained_on(
    learnable_store: FeatureStore, quick_plan: Quick
) -> None:
    """Those of a kind left out of the classes: out of training, and wrong in validation."""
    plan = quick_plan(Path("unused"))
    assert plan.answers is not None
    known = [answer for answer in plan.answers if answer != "kind 3"]
    store = FeatureStore.open(plan.uri)
    config = replace(plan.config, model=replace(MODEL, classes=5))
    learning, choosing = TrainingData.read(store, Pins.latest(store), config, known).train_and_validation()
    assert len(learning) == 34 - 4
    assert learning.left_out == {"answer not known": 4}
    assert len(choosing) == 16
    assert (choosing.target_B == -1).sum() == 2
