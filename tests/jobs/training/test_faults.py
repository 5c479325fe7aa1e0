"""What a training cannot do it says in one line, before it begins where that can be known.

Nothing is left running.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r2scp.jobs.training import stages as train_stages
from r2scp.jobs.training.checkpoints import EXPERTS, read_checkpoint
from r2scp.jobs.training.config import StageConfig
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.model.batch import Answer, Batch
from r2scp.model.config import ModelConfig
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import (
    CheckpointError,
    FingerprintMismatch,
    R2SCPError,
    StoreError,
    UsageError,
)
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table

MODEL = ModelConfig(encoder_dim=16, classes=6, dim=16, heads=2)
Quick = Callable[..., TrainPlan]
Copy = Callable[[FeatureStore], FeatureStore]


def refused(plan: TrainPlan, error: type[R2SCPError], said: str, means: TrainOptions | None = None) -> None:
    with pytest.raises(error, match=said) as caught:
        run_training(plan, means or TrainOptions(), lambda values: None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not reading()


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"retrieval": Retrieval.CROSS}, StoreError, r'no neighbours for .*"cross".*run `r2scp-pipe index`'),
        ({"index": IndexSettings(n=5)}, StoreError, r"no neighbours for .*run `r2scp-pipe index`"),
        ({"model": replace(MODEL, encoder_dim=32)}, UsageError, "encoder_dim must be 16, the width"),
        ({"corpora": ("avqa",)}, StoreError, r"no question .*'val'.*avqa.*set holdout"),
        ({"corpora": ("kinetics",)}, StoreError, r"no question .*'train'.*kinetics"),
        ({"holdout": 1e-9}, StoreError, "leaves nothing to choose by: .* about 17 videos"),
        ({"holdout": 1 - 1e-9}, StoreError, "leaves nothing to learn from"),
    ],
)
def test_what_the_store_lacks_is_said_before_anything_is_written(
    quick_plan: Quick, tmp_path: Path, changes: dict[str, Any], error: type[R2SCPError], said: str
) -> None:
    plan, corpora = quick_plan(tmp_path / "run"), changes.get("corpora")
    plan = replace(plan, config=replace(plan.config, **changes), answers=None if corpora else plan.answers)
    for workers in (1, 2):  # not after Ray was started, either
        refused(plan, error, said, TrainOptions(num_workers=workers))
    assert not (tmp_path / "run").exists()


def test_a_store_without_an_index(learnable_store: FeatureStore, quick_plan: Quick, tmp_path: Path) -> None:
    """Never indexed: its table of neighbours is empty."""
    store = FeatureStore.create(str(tmp_path / "bare"), "bare", 16)
    for table in (Table.CLIPS, Table.QUESTIONS):
        rows = learnable_store.dataset(table).to_table()
        store.commit(table, [store.stage(table, rows)], {})
    refused(quick_plan(tmp_path / "run", store), StoreError, "no neighbours .*run `r2scp-pipe index`")
    without = replace(MODEL, cmr=False)
    run_training(quick_plan(tmp_path / "run", store, model=without), TrainOptions(), lambda values: None)


def test_no_clip_has_both(
    learnable_store: FeatureStore, quick_plan: Quick, copy: Copy, write: Callable, tmp_path: Path
) -> None:
    """Stage II has nothing to learn from; that is said before stage I."""
    store = copy(learnable_store)
    deaf = [row | {"audio": None, "audio_key": None} for row in store.clips().to_pylist()]
    write(store, Table.CLIPS, deaf)
    config = quick_plan(tmp_path, store).config
    plan = replace(
        quick_plan(tmp_path / "run", store), config=replace(config, model=replace(MODEL, cmr=False))
    )
    refused(plan, StoreError, "stage II needs clips with both modalities")
    assert not (tmp_path / "run").exists()
    alone = replace(plan, config=replace(plan.config, stage_two=StageConfig(epochs=0)))
    best = run_training(alone, TrainOptions(), lambda values: None)
    assert best.metrics["mean"] > 0.5, "stage I learns from what there is"


def test_means_that_cannot_be(quick_plan: Quick, tmp_path: Path) -> None:
    refused(quick_plan(tmp_path), UsageError, "at least 1 worker; got 0", TrainOptions(num_workers=0))


def test_a_folder_that_cannot_be_written(quick_plan: Quick, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    refused(
        quick_plan(tmp_path / "file" / "run"), R2SCPError, r"cannot write into .*file/run: Not a directory"
    )


def test_a_folder_where_another_training_is_at_work(quick_plan: Quick, tmp_path: Path) -> None:
    plan, heard = quick_plan(tmp_path / "run"), []

    def told(values: dict[str, object]) -> None:
        heard.append(values)
        if len(heard) == 2:
            refused(plan, UsageError, r"another process is training into .*run")

    run_training(plan, TrainOptions(), told)
    assert len(heard) == 6
    assert read_checkpoint(plan.folder).finished


def test_a_loss_that_is_no_number(
    learnable_store: FeatureStore, quick_plan: Quick, copy: Copy, write: Callable, tmp_path: Path
) -> None:
    store = copy(learnable_store)
    [row] = store.clips(where="clip_id = 'music-avqa/3'").to_pylist()
    row["visual"] = [np.full(16, np.nan, np.float16)] * len(row["visual"])
    write(store, Table.CLIPS, [row])
    refused(quick_plan(tmp_path / "run", store), R2SCPError, r"the loss became nan in step [1-5], .*lower lr")
    assert not (tmp_path / "run" / "last.json").exists()


@pytest.mark.parametrize(("stage", "count"), [("ExpertsStage", 2), ("MixingStage", 2)])
def test_the_reader_stops_where_a_step_fails(
    quick_plan: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, count: int
) -> None:
    """Also while somebody still holds the error, and with it the loop's frame."""
    taken = 0

    def failing(*arguments: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == count:
            raise RuntimeError("out of memory")
        return learn(*arguments)

    learn = getattr(train_stages, stage).learn
    monkeypatch.setattr(getattr(train_stages, stage), "learn", failing)
    with pytest.raises(RuntimeError, match="out of memory") as held:
        run_training(quick_plan(tmp_path), TrainOptions(), lambda values: None)
    assert held.tb is not None
    assert not reading()


def test_the_reader_stops_where_validation_fails(
    quick_plan: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: R2SCP, batch: Batch) -> Answer:
        if self.training:
            return forward(self, batch)
        raise RuntimeError("out of patience")

    forward = R2SCP.forward
    monkeypatch.setattr(R2SCP, "forward", failing)
    with pytest.raises(RuntimeError, match="out of patience") as held:
        run_training(quick_plan(tmp_path, evaluate_rows=1), TrainOptions(), lambda values: None)
    assert held.tb is not None
    assert not reading()


def test_experts_that_do_not_fit(
    learnable_store: FeatureStore, quick_plan: Quick, copy: Copy, tmp_path: Path
) -> None:
    experts, run = tmp_path / "experts", tmp_path / "run"
    run_training(quick_plan(experts, stage_two=StageConfig(epochs=0)), TrainOptions(), lambda values: None)
    good = replace(quick_plan(run), experts=experts)
    wider = replace(good, config=replace(good.config, model=replace(MODEL, dim=32)))
    refused(wider, CheckpointError, r"does not fit the model .* must be \(.*32.*\); got \(.*16.*\)")
    assert good.answers is not None
    refused(replace(good, answers=good.answers[::-1]), CheckpointError, "learned other answers")
    refused(replace(good, experts=tmp_path), CheckpointError, r"no checkpoint .*experts\.json")
    other = FeatureStore.create(copy(learnable_store).uri, "another", 16)
    for table in (Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS):
        other.commit(table, [other.stage(table, learnable_store.dataset(table).to_table())], {})
    foreign = replace(quick_plan(run, other), experts=experts)
    refused(
        foreign, FingerprintMismatch, "trained on features of encoder learnable; .* holds those of another"
    )
    assert not run.exists()
    damaged = read_checkpoint(experts, EXPERTS)
    (experts / damaged.tensors).write_bytes(b"")
    refused(good, CheckpointError, "is damaged")
    assert not run.exists()


def test_a_store_that_is_not_there(quick_plan: Quick, tmp_path: Path) -> None:
    gone = replace(quick_plan(tmp_path / "run"), uri=str(tmp_path / "gone"))
    refused(gone, StoreError, "there is no store at")
    other = replace(quick_plan(tmp_path / "run"), fingerprint="unheard-of")
    refused(other, FingerprintMismatch, "no encoder unheard-of")


def test_questions_whose_answer_training_does_not_know_are_not_learned(
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
