"""A model and its baselines start from the same experts, bit for bit, trained in parallel or in sequence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from r2scp.jobs.training.checkpoints import BEST, EXPERTS, LAST, read_checkpoint
from r2scp.jobs.training.config import StageConfig, baselines, experts_of
from r2scp.jobs.training.evaluate import EvaluateOptions, run_evaluate
from r2scp.jobs.training.log import read_metrics
from r2scp.jobs.training.run import TrainOptions, TrainPlan
from r2scp.jobs.training.with_baselines import OURS, train_with_baselines
from r2scp.pipelines.batches.examples import Pins
from r2scp.store.errors import CheckpointError, R2SCPError, StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table

pytestmark = pytest.mark.usefixtures("one_thread")

ONCE = StageConfig(epochs=1, lr=1e-2, schedule="constant")
Quick = Callable[..., TrainPlan]
ALONE = TrainOptions(threads=1)


def quiet(name: str, values: dict[str, object]) -> None: ...


def folders(run: Path) -> dict[str, Path]:
    below = {
        name: run / "baselines" / name for name in ("question-only", "no-recovery", "no-recovery-dropout")
    }
    return {OURS: run, "experts": run / "experts", **below}


def hashes(run: Path) -> dict[str, tuple[str, ...]]:
    """Of all tensors of all checkpoints, by training."""
    runs = {}
    for name, folder in folders(run).items():
        checkpoints = [
            read_checkpoint(folder, kind)
            for kind in (LAST, BEST, EXPERTS)
            if (folder / f"{kind}.json").exists()
        ]
        runs[name] = tuple(part for one in checkpoints for part in (one.sha256, one.optimiser_sha256))
    return runs


def stages(folder: Path) -> set[object]:
    return {line["stage"] for line in read_metrics(folder / "metrics.jsonl")}


@pytest.fixture(scope="module")
def sequential(quick_plan: Quick, tmp_path_factory: pytest.TempPathFactory) -> TrainPlan:
    plan = quick_plan(tmp_path_factory.mktemp("together") / "run", stage_one=ONCE, stage_two=ONCE)
    calls: list[tuple[str, object]] = []
    trained = train_with_baselines(plan, ALONE, lambda name, values: calls.append((name, values["stage"])))
    assert trained.keys() == folders(plan.folder).keys()
    for name, folder in folders(plan.folder).items():
        assert trained[name] == read_checkpoint(folder)
        assert {stage for training, stage in calls if training == name} == stages(folder)
    return plan


def test_all_start_from_the_same_experts(sequential: TrainPlan) -> None:
    runs = {name: read_checkpoint(folder) for name, folder in folders(sequential.folder).items()}
    experts = read_checkpoint(folders(sequential.folder)["experts"], EXPERTS).sha256
    assert {name for name, one in runs.items() if one.experts == experts} == {
        OURS,
        "no-recovery",
        "no-recovery-dropout",
    }
    assert stages(sequential.folder) == stages(sequential.folder / "baselines" / "no-recovery") == {"mixing"}
    assert stages(sequential.folder / "experts") == {"experts"}
    assert runs[OURS].config == sequential.config
    assert runs["experts"].config == experts_of(sequential.config)
    expected = baselines(sequential.config)
    assert {name: runs[name].config for name in expected} == expected


@pytest.mark.usefixtures("local_ray")
def test_parallel_training_gives_the_same_bits(sequential: TrainPlan, tmp_path: Path) -> None:
    calls: list[str] = []
    plan = replace(sequential, folder=tmp_path)
    trained = train_with_baselines(plan, TrainOptions(threads=2), lambda name, values: calls.append(name))
    assert hashes(tmp_path) == hashes(sequential.folder)
    assert sorted(calls) == sorted(trained), "every epoch is reported"


def test_training_again_changes_nothing(sequential: TrainPlan) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sequential.folder.rglob("*") if path.is_file()}

    before, calls = files(), []
    for with_baselines in (True, False):
        runs = train_with_baselines(
            sequential, ALONE, lambda *training: calls.append(training), with_baselines
        )
        assert runs[OURS] == read_checkpoint(sequential.folder)
    assert calls == []
    assert files() == before


def test_baselines_can_be_added_later(sequential: TrainPlan, tmp_path: Path) -> None:
    plan = replace(sequential, folder=tmp_path)
    assert train_with_baselines(plan, ALONE, quiet, with_baselines=False).keys() == {"experts", OURS}
    assert not (tmp_path / "baselines").exists()
    train_with_baselines(plan, ALONE, quiet)
    assert hashes(tmp_path) == hashes(sequential.folder)


def test_later_trainings_read_the_first_ones_versions(
    sequential: TrainPlan, tmp_path: Path, copy: Callable, write: Callable, learnable_store: FeatureStore
) -> None:
    """The store grew between two starts, by an answer too; all of a run are of one version of it."""
    store = copy(learnable_store)
    plan = replace(sequential, folder=tmp_path / "run", uri=store.uri)
    train_with_baselines(plan, ALONE, quiet, with_baselines=False)
    row = store.questions(where="question_id = 'music-avqa/1/0'").to_pylist()[0]
    write(store, Table.QUESTIONS, [row | {"question_id": "new", "answer": "a new answer"}])
    assert plan.answers is not None
    answers = [*plan.answers, "a new answer"]
    model = replace(plan.config.model, classes=7)
    grown = replace(plan, pins=Pins.latest(store), answers=answers, config=replace(plan.config, model=model))
    assert grown.pins != plan.pins
    train_with_baselines(grown, ALONE, quiet)
    assert hashes(tmp_path / "run") == hashes(sequential.folder)
    assert (
        run_evaluate(store, tmp_path / "run", EvaluateOptions(split="val"))["store"]["versions"]["questions"]
        == plan.pins.questions
    )


@pytest.mark.parametrize("left_out", ["stage_one", "stage_two"])
def test_one_stage_alone(
    sequential: TrainPlan, tmp_path: Path, left_out: str, learnable_store: FeatureStore
) -> None:
    config = replace(sequential.config, **{left_out: StageConfig(epochs=0)})
    plan = replace(sequential, folder=tmp_path, config=config)
    trained = train_with_baselines(plan, ALONE, quiet)
    assert trained.keys() == folders(tmp_path).keys() - {"experts"}
    stage = "mixing" if left_out == "stage_one" else "experts"
    assert stages(tmp_path) == {stage}
    assert stages(tmp_path / "baselines" / "question-only") == {"experts"}
    report = run_evaluate(learnable_store, tmp_path, EvaluateOptions(split="val"))
    assert len(report["baselines"]) == 4


def test_missing_data_is_reported_before_experts_are_trained(sequential: TrainPlan, tmp_path: Path) -> None:
    config = replace(sequential.config, retrieval=Retrieval.CROSS)
    with pytest.raises(StoreError, match="no neighbours"):
        train_with_baselines(replace(sequential, folder=tmp_path / "run", config=config), ALONE, quiet)
    assert not (tmp_path / "run").exists()


def test_other_settings_in_the_same_folder_are_refused(sequential: TrainPlan) -> None:
    document = (sequential.folder / "experts" / "last.json").read_text()
    other = replace(sequential, config=replace(sequential.config, seed=9))
    with pytest.raises(CheckpointError, match=r"other settings .*seed: 1, 9"):
        train_with_baselines(other, ALONE, quiet)
    assert json.loads((sequential.folder / "experts" / "last.json").read_text()) == json.loads(document)


@pytest.mark.usefixtures("local_ray")
def test_errors_come_out_of_tasks_in_one_line(sequential: TrainPlan, tmp_path: Path) -> None:
    broken = replace(sequential.config, stage_one=replace(ONCE, lr=1e30))
    plan = replace(sequential, folder=tmp_path, config=broken)
    with pytest.raises(R2SCPError, match="the loss became") as failed:
        train_with_baselines(plan, TrainOptions(threads=2), quiet)
    assert type(failed.value) is R2SCPError
    assert "\n" not in str(failed.value)
