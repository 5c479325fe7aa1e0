"""Both stages train exactly their own parameters, from the store alone; validation chooses the best epoch.

Parameters that a stage must not change are compared bit for bit; accuracies are recounted per question.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from r2scp.jobs.training.checkpoints import BEST, EXPERTS, LAST, Checkpoint, read_checkpoint
from r2scp.jobs.training.config import StageConfig
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.log import read_metrics
from r2scp.jobs.training.loop import RunContext, Training
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.jobs.training.stages import ExpertsStage, Worker
from r2scp.model.batch import AUDIO, VISUAL, Batch
from r2scp.model.config import ModelConfig
from r2scp.model.losses import LossConfig
from r2scp.model.r2scp import R2SCP, Stage
from r2scp.pipelines.batches.dataset import MISSING_COLUMN, NO_MODALITY, BatchRequest, Dataset
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Condition, Table

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(encoder_dim=16, classes=6, dim=16, heads=2)
ONCE = {
    "stage_one": StageConfig(epochs=1, lr=1e-2, schedule="constant"),
    "stage_two": StageConfig(epochs=1, lr=1e-2, schedule="constant"),
}


def train(plan: TrainPlan, on_epoch: Callable[[dict[str, object]], None] = lambda _: None) -> Checkpoint:
    return run_training(plan, TrainOptions(), on_epoch)


def tensors(folder: Path, name: str) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(folder, name)
    return checkpoint.read_tensors(checkpoint.tensors, checkpoint.sha256)


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def epochs(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "epoch"]


def data_of(plan: TrainPlan) -> TrainingData:
    store = FeatureStore.open(plan.uri, plan.fingerprint)
    return TrainingData.read(store, plan.pins, plan.config, plan.answers)


def correct(model: R2SCP, dataset: Dataset, missing: int) -> list[bool]:
    """Of each question, asked alone."""
    results = []
    for row in range(len(dataset.examples)):
        batch = dataset.batch(np.array([row]), BatchRequest.uniform(1, missing))
        with torch.no_grad():
            results.append(int(model(batch).logits_BK.argmax()) == dataset.examples.target_B[row])
    return results


@pytest.fixture(scope="module")
def learned(quick_plan: Callable[..., TrainPlan], tmp_path_factory: pytest.TempPathFactory) -> TrainPlan:
    """A run of both stages until every answer is memorised, and every file it opened, in `opened.txt`."""
    folder = tmp_path_factory.mktemp("learned")
    lengths = {
        "stage_one": StageConfig(epochs=10, lr=1e-2, schedule="constant"),
        "stage_two": StageConfig(epochs=8, lr=1e-2, schedule="cosine", warmup_steps=3),
    }
    plan = quick_plan(folder / "run", **lengths)
    watched: list[str] | None = []

    def watch(event: str, arguments: tuple) -> None:
        if watched is not None and event in ("open", "socket.connect", "subprocess.Popen"):
            watched.append(f"{event} {arguments[0]}")

    sys.addaudithook(watch)
    train(plan)
    (folder / "opened.txt").write_text("\n".join(watched))
    watched = None
    return plan


def test_the_model_memorises_32_questions(learned: TrainPlan) -> None:
    seen = data_of(learned)
    examples = seen.train_and_validation()[0]
    whole = seen.dataset(examples.keep(np.logical_and.reduce(examples.present_BM, axis=1), "lacks one"))
    assert len(whole.examples) == 32
    for name, conditions in ((EXPERTS, [Condition.AV]), (LAST, list(Condition))):
        model = read_checkpoint(learned.folder, name).model()
        for condition in conditions:
            assert all(correct(model, whole, MISSING_COLUMN[condition])), (name, condition)
    first, *_, last = (line["train"]["loss"] for line in epochs(learned.folder) if line["stage"] == "experts")
    assert last < 0.2 * first


def test_nothing_but_the_store_and_the_run_is_opened(learned: TrainPlan) -> None:
    """The clips' files do not exist. Lance reads the store beneath Python, so it is not in the list."""
    store = FeatureStore.open(learned.uri)
    uris = store.clips(columns=["uri"])["uri"].to_pylist()
    assert uris
    assert not any(Path(uri).exists() for uri in uris)
    audit = (learned.folder.parent / "opened.txt").read_text().splitlines()
    assert not [line for line in audit if not line.startswith("open ")], "a connection or a program"
    allowed = (str(learned.folder), learned.uri, sys.prefix, sys.base_prefix, "/proc/", "/sys/", "/dev/")
    paths = [line.removeprefix("open ") for line in audit if "/" in line and not line.endswith(".py")]
    git = str(Path(__file__).resolve().parents[3] / ".git")  # for the version of the code
    assert [path for path in paths if not path.startswith((*allowed, git))] == []
    assert any(path.startswith(str(learned.folder)) for path in paths), "the watch works"


def test_validation_is_accurate_and_chooses_the_best(learned: TrainPlan) -> None:
    seen = data_of(learned)
    validation = seen.dataset(seen.train_and_validation()[1])
    for name in (BEST, LAST):
        checkpoint = read_checkpoint(learned.folder, name)
        accuracies = {
            condition: float(np.mean(correct(checkpoint.model(), validation, missing)))
            for condition, missing in MISSING_COLUMN.items()
        }
        expected = accuracies | {"mean": float(np.mean(list(accuracies.values())))}
        assert checkpoint.metrics == pytest.approx(expected, abs=1e-12)
    means = [line["validation"]["mean"] for line in epochs(learned.folder) if line["stage"] == "mixing"]
    best = read_checkpoint(learned.folder)
    assert best.epoch == 1 + means.index(max(means))
    assert best.metrics["mean"] == max(means)
    assert best.best["epoch"] == best.epoch
    experts = [line["validation"]["AV"] for line in epochs(learned.folder) if line["stage"] == "experts"]
    assert read_checkpoint(learned.folder, EXPERTS).epoch == 1 + experts.index(max(experts))


def test_checkpoints_and_logs_hold_their_provenance(learned: TrainPlan) -> None:
    checkpoint = read_checkpoint(learned.folder)
    assert checkpoint.config == learned.config
    assert checkpoint.answers == learned.answers
    assert checkpoint.answers is not None
    assert set(checkpoint.answers[:2]) == {"yes", "no"}, "the most frequent first"
    assert checkpoint.store["versions"] == {"clips": learned.pins.clips, "questions": 2, "neighbours": 2}
    checkpoint.require_store(FeatureStore.open(learned.uri))
    whole: list[dict[str, Any]] = read_metrics(learned.folder / "metrics.jsonl")
    assert [line["epoch"] for line in whole if line["kind"] == "epoch"] == [*range(1, 11), *range(1, 9)]
    steps = [line for line in whole if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [20, 40, 60, 80]
    one, two = learned.config.stage_one, learned.config.stage_two
    per_epoch = {"experts": 5, "mixing": 4}  # of 8 questions; 34 and 32 are there
    assert steps[0]["lr"] == one.rate(19, per_epoch["experts"])
    assert steps[3]["lr"] == two.rate(79 - 50, per_epoch["mixing"])
    losses = {name for line in steps for name in line if name.startswith("loss/")}
    assert losses >= {"loss/joint", "loss/audio", "loss/real", "loss/lacking", "loss/rank_negative"}
    assert steps[3]["loss"] == pytest.approx(
        sum(steps[3][name] for name in losses if name in steps[3]), rel=1e-5
    )
    assert sum(steps[3][f"router/AV/{source}"] for source in ("audio", "visual", "text")) == pytest.approx(1)


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "learning experts": {"model": replace(MODEL, freeze_experts=False)},
    "cap_gradient none": {"model": replace(MODEL, cap_gradient="none")},
    "retrieval alone": {"model": replace(MODEL, cap=False)},
    "purification alone": {"model": replace(MODEL, cmr=False)},
    "no recovery": {
        "model": replace(MODEL, cmr=False, cap=False),
        "loss": LossConfig(modality_dropout=False),
    },
    "no recovery, dropout": {"model": replace(MODEL, cmr=False, cap=False)},
    "all at once": {
        "model": replace(MODEL, fusion="sum_pooled", saliency="random", pairing="position", purify_full=True),
        "loss": LossConfig(rank="paper"),
        "negatives": "random",
        "expert_dropout": 0.5,
        "weight_decay": 0.01,
    },
    "choices": {"model": replace(MODEL, classes=None), "corpora": ("avqa",), "holdout": 0.2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_each_stage_moves_exactly_what_it_trains(
    changes: dict[str, Any], quick_plan: Callable[..., TrainPlan], tmp_path: Path
) -> None:
    plan = quick_plan(tmp_path, **ONCE, **changes)
    train(plan)
    torch.manual_seed(plan.config.seed)
    model = R2SCP(plan.config.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for stage, start, end in (
        (Stage.EXPERTS, before, tensors(tmp_path, EXPERTS)),
        (Stage.MIXING, tensors(tmp_path, EXPERTS), tensors(tmp_path, LAST)),
    ):
        model.set_stage(stage)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert changed(start, end) == trained, stage
    frozen = plan.config.model.freeze_experts
    mixed = changed(tensors(tmp_path, EXPERTS), tensors(tmp_path, LAST))
    assert any(name.startswith("experts.") for name in mixed) != frozen
    learns = plan.config.model.cap and plan.config.model.cap_gradient == "straight_through"
    identity = torch.equal(tensors(tmp_path, LAST)["purifier.projection_DD"], torch.eye(16))
    assert identity != learns
    [experts, mixing] = [set(line["train"]) for line in epochs(tmp_path)]
    assert {"accuracy/AV", "loss/joint"} <= experts
    recovers, dropout = plan.config.model.recovers, plan.config.loss.modality_dropout
    assert ("loss/lacking" in mixing) == (recovers or dropout)
    assert ("loss/rank_positive" in mixing) == recovers
    assert ("loss/rank_negative" in mixing) == plan.config.model.cmr


def test_choices_are_learned(quick_plan: Callable[..., TrainPlan], tmp_path: Path) -> None:
    """AVQA: no classes, no validation split; a share of the videos is held out."""
    lengths = {"stage_one": StageConfig(epochs=12, lr=1e-2), "stage_two": StageConfig(epochs=6, lr=1e-2)}
    choices = {"model": replace(MODEL, classes=None), "corpora": ("avqa",), "holdout": 0.3}
    plan = quick_plan(tmp_path, **lengths, **choices)
    assert plan.answers is None
    best = train(plan)
    learning, choosing = data_of(plan).train_and_validation()
    assert len(learning) + len(choosing) == 24
    assert 2 <= len(choosing) <= 12
    assert not set(learning.clip_row_B) & set(choosing.clip_row_B)
    assert best.metrics["mean"] >= 0.8, "a quarter would be chance"


def test_a_model_that_sees_the_question_reads_no_clip(
    quick_plan: Callable[..., TrainPlan],
    poisoned: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requested_rows: list[np.ndarray] = []
    real = Dataset.clip_tokens

    def noted(self: Dataset, modality: Any, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        requested_rows.append(rows)
        return real(self, modality, rows)

    monkeypatch.setattr(Dataset, "clip_tokens", noted)
    blind = {"sees": "question", "stage_two": StageConfig(epochs=0)}
    plan = quick_plan(tmp_path / "run", poisoned, **blind)
    best = train(plan)
    assert requested_rows
    assert all((rows == NO_MODALITY).all() for rows in requested_rows)
    assert 1 / 6 <= best.metrics["mean"] <= 0.5, "half of the yes-or-no questions, a quarter of the others"
    assert best.stage is Stage.EXPERTS
    assert {line["stage"] for line in epochs(tmp_path / "run")} == {"experts"}
    assert best.metrics == read_checkpoint(tmp_path / "run", EXPERTS).metrics


@pytest.fixture
def poisoned(learnable_store: FeatureStore, tmp_path: Path, write: Callable, copy: Callable) -> FeatureStore:
    """A store whose clips have no number in their features; keys are as they were."""
    store = copy(learnable_store)
    rows = store.clips().to_pylist()
    for row in rows:
        for name in ("audio", "visual"):
            if row[name] is not None:
                row[name] = [np.full(16, np.nan, np.float16)] * len(row[name])
    write(store, Table.CLIPS, rows)
    return store


def test_validation_does_not_depend_on_how_many_go_together(
    quick_plan: Callable[..., TrainPlan], tmp_path: Path
) -> None:
    seen = []
    for rows in (1, 5, 256):
        train(quick_plan(tmp_path / str(rows), **ONCE, evaluate_rows=rows))
        seen.append([line["validation"] for line in epochs(tmp_path / str(rows))])
    assert seen[0] == seen[1] == seen[2]


def test_the_rate_is_what_moves(quick_plan: Callable[..., TrainPlan], tmp_path: Path) -> None:
    """Nothing moves any more where it has fallen to nothing."""
    falling = StageConfig(epochs=2, lr=1e-2, step_epochs=1, decay=1e-12)
    seen: list[dict[str, Tensor]] = []
    plan = quick_plan(tmp_path, stage_one=falling, stage_two=falling)
    train(plan, lambda values: seen.append(tensors(tmp_path, LAST)))
    for stage, first in (("experts.", 0), ("router.", 2)):
        names = [name for name in seen[0] if name.startswith(stage)]
        assert names
        before = dict(R2SCP(plan.config.model).state_dict()) if first == 0 else seen[first - 1]
        moves = [
            max(float((one[name] - other[name]).abs().max()) for name in names)
            for one, other in ((before, seen[first]), (seen[first], seen[first + 1]))
        ]
        assert moves[0] > 5e-3, "Adam moves by about the rate in each step"
        assert moves[1] < 1e-9


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_expert_dropout_takes_one_modality_at_its_rate(
    rate: float, quick_plan: Callable[..., TrainPlan], tmp_path: Path
) -> None:
    plan = quick_plan(tmp_path, expert_dropout=rate)
    seen = data_of(plan)
    data = seen.dataset(seen.train_and_validation()[0])
    stage = ExpertsStage(plan.config, R2SCP(plan.config.model), data, data, Worker())
    batch = stage.prepare(
        np.flatnonzero(np.logical_and.reduce(data.examples.present_BM, axis=1)), NO_MODALITY
    )
    given: list[Batch] = []

    class Given(nn.Module):
        def forward(self, batch: Batch) -> None:
            given.append(batch)

    for chance in range(50):
        stage.compute_loss(Given(), batch, NO_MODALITY, chance)
    lost_BM = ~torch.cat([one.present_BM for one in given])
    assert int(lost_BM.sum(dim=1).max()) <= 1
    shares = lost_BM.float().mean(dim=0)
    for modality in (AUDIO, VISUAL):
        assert float(shares[modality]) == pytest.approx(rate / 2, abs=0.04)  # 1,600 draws: 3 standard errors
    stage.compute_loss(Given(), batch, NO_MODALITY, 7)
    assert torch.equal(given[-1].present_BM, given[7].present_BM), "the chance decides"


def test_stage_two_of_another_runs_experts(
    learned: TrainPlan, quick_plan: Callable[..., TrainPlan], tmp_path: Path
) -> None:
    plan = replace(quick_plan(tmp_path), experts=learned.folder)
    best = train(plan)
    assert {line["stage"] for line in epochs(tmp_path)} == {"mixing"}
    assert not (tmp_path / "experts.json").exists()
    started = tensors(learned.folder, EXPERTS)
    assert not [name for name in changed(started, tensors(tmp_path, LAST)) if name.startswith("experts.")]
    assert best.experts == read_checkpoint(learned.folder, EXPERTS).sha256
    assert best.metrics["AV"] == 1.0, "what those experts know"


def test_training_does_not_need_ray_or_a_worker_of_its_own(learned: TrainPlan, tmp_path: Path) -> None:
    """`Training` by itself, as one would use it in a notebook."""
    config = replace(learned.config, **ONCE)
    on_epoch: list[dict[str, object]] = []
    training = Training(
        data_of(replace(learned, config=config)),
        RunContext(folder=tmp_path, on_epoch=on_epoch.append),
        Worker(),
    )
    best = training.run()
    assert [values["stage"] for values in on_epoch] == ["experts", "mixing"]
    assert read_checkpoint(tmp_path).metrics["mean"] == best["mean"]
