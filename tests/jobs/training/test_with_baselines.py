"""A model and its baselines begin with the same experts, side by side or one by one, to the bit."""

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
    found = {}
    for name, folder in folders(run).items():
        there = [
            read_checkpoint(folder, kind)
            for kind in (LAST, BEST, EXPERTS)
            if (folder / f"{kind}.json").exists()
        ]
        found[name] = tuple(part for one in there for part in (one.sha256, one.optimiser_sha256))
    return found


def stages(folder: Path) -> set[object]:
    return {line["stage"] for line in read_metrics(folder / "metrics.jsonl")}


@pytest.fixture(scope="module")
def one_by_one(quick_plan: Quick, tmp_path_factory: pytest.TempPathFactory) -> TrainPlan:
    plan = quick_plan(tmp_path_factory.mktemp("together") / "run", stage_one=ONCE, stage_two=ONCE)
    heard: list[tuple[str, object]] = []
    trained = train_with_baselines(plan, ALONE, lambda name, values: heard.append((name, values["stage"])))
    assert trained.keys() == folders(plan.folder).keys()
    for name, folder in folders(plan.folder).items():
        assert trained[name] == read_checkpoint(folder)
        assert {stage for told, stage in heard if told == name} == stages(folder)
    return plan


def test_all_begin_with_the_same_experts(one_by_one: TrainPlan) -> None:
    found = {name: read_checkpoint(folder) for name, folder in folders(one_by_one.folder).items()}
    experts = read_checkpoint(folders(one_by_one.folder)["experts"], EXPERTS).sha256
    assert {name for name, one in found.items() if one.experts == experts} == {
        OURS,
        "no-recovery",
        "no-recovery-dropout",
    }
    assert stages(one_by_one.folder) == stages(one_by_one.folder / "baselines" / "no-recovery") == {"mixing"}
    assert stages(one_by_one.folder / "experts") == {"experts"}
    assert found[OURS].config == one_by_one.config
    assert found["experts"].config == experts_of(one_by_one.config)
    expected = baselines(one_by_one.config)
    assert {name: found[name].config for name in expected} == expected


@pytest.mark.usefixtures("local_ray")
def test_side_by_side_gives_the_same_bits(one_by_one: TrainPlan, tmp_path: Path) -> None:
    heard: list[str] = []
    plan = replace(one_by_one, folder=tmp_path)
    trained = train_with_baselines(plan, TrainOptions(threads=2), lambda name, values: heard.append(name))
    assert hashes(tmp_path) == hashes(one_by_one.folder)
    assert sorted(heard) == sorted(trained), "each one's epoch is told"


def test_again_trains_nothing(one_by_one: TrainPlan) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in one_by_one.folder.rglob("*") if path.is_file()}

    before, heard = files(), []
    for with_baselines in (True, False):
        found = train_with_baselines(one_by_one, ALONE, lambda *told: heard.append(told), with_baselines)
        assert found[OURS] == read_checkpoint(one_by_one.folder)
    assert heard == []
    assert files() == before


def test_baselines_can_come_later(one_by_one: TrainPlan, tmp_path: Path) -> None:
    plan = replace(one_by_one, folder=tmp_path)
    assert train_with_baselines(plan, ALONE, quiet, with_baselines=False).keys() == {"experts", OURS}
    assert not (tmp_path / "baselines").exists()
    train_with_baselines(plan, ALONE, quiet)
    assert hashes(tmp_path) == hashes(one_by_one.folder)


def test_what_comes_later_reads_what_the_first_read(
    one_by_one: TrainPlan, tmp_path: Path, copy: Callable, write: Callable, learnable_store: FeatureStore
) -> None:
    """The store grew between two starts, by an answer too; all of a run are of one version of it."""
    store = copy(learnable_store)
    plan = replace(one_by_one, folder=tmp_path / "run", uri=store.uri)
    train_with_baselines(plan, ALONE, quiet, with_baselines=False)
    row = store.questions(where="question_id = 'music-avqa/1/0'").to_pylist()[0]
    write(store, Table.QUESTIONS, [row | {"question_id": "new", "answer": "a new answer"}])
    assert plan.answers is not None
    answers = [*plan.answers, "a new answer"]
    model = replace(plan.config.model, classes=7)
    grown = replace(plan, pins=Pins.latest(store), answers=answers, config=replace(plan.config, model=model))
    assert grown.pins != plan.pins
    train_with_baselines(grown, ALONE, quiet)
    assert hashes(tmp_path / "run") == hashes(one_by_one.folder)
    assert (
        run_evaluate(store, tmp_path / "run", EvaluateOptions(split="val"))["store"]["versions"]["questions"]
        == plan.pins.questions
    )


@pytest.mark.parametrize("left_out", ["stage_one", "stage_two"])
def test_one_stage_alone(
    one_by_one: TrainPlan, tmp_path: Path, left_out: str, learnable_store: FeatureStore
) -> None:
    config = replace(one_by_one.config, **{left_out: StageConfig(epochs=0)})
    plan = replace(one_by_one, folder=tmp_path, config=config)
    trained = train_with_baselines(plan, ALONE, quiet)
    assert trained.keys() == folders(tmp_path).keys() - {"experts"}
    stage = "mixing" if left_out == "stage_one" else "experts"
    assert stages(tmp_path) == {stage}
    assert stages(tmp_path / "baselines" / "question-only") == {"experts"}
    report = run_evaluate(learnable_store, tmp_path, EvaluateOptions(split="val"))
    assert len(report["baselines"]) == 4


def test_what_the_store_lacks_is_said_before_experts_are_trained(
    one_by_one: TrainPlan, tmp_path: Path
) -> None:
    config = replace(one_by_one.config, retrieval=Retrieval.CROSS)
    with pytest.raises(StoreError, match="no neighbours"):
        train_with_baselines(replace(one_by_one, folder=tmp_path / "run", config=config), ALONE, quiet)
    assert not (tmp_path / "run").exists()


def test_other_settings_in_the_same_folder_are_refused(one_by_one: TrainPlan) -> None:
    document = (one_by_one.folder / "experts" / "last.json").read_text()
    other = replace(one_by_one, config=replace(one_by_one.config, seed=9))
    with pytest.raises(CheckpointError, match=r"other settings .*seed: 1, 9"):
        train_with_baselines(other, ALONE, quiet)
    assert json.loads((one_by_one.folder / "experts" / "last.json").read_text()) == json.loads(document)


@pytest.mark.usefixtures("local_ray")
def test_errors_come_out_of_tasks_in_one_line(one_by_one: TrainPlan, tmp_path: Path) -> None:
    broken = replace(one_by_one.config, stage_one=replace(ONCE, lr=1e30))
    plan = replace(one_by_one, folder=tmp_path, config=broken)
    with pytest.raises(R2SCPError, match="the loss became") as failed:
        train_with_baselines(plan, TrainOptions(threads=2), quiet)
    assert type(failed.value) is R2SCPError
    assert "\n" not in str(failed.value)
