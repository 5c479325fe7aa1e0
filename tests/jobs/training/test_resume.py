"""A training that was stopped or killed and then resumed equals an uninterrupted one, bit for bit.

Compared are all lines of `metrics.jsonl` but their times, and all tensors of all checkpoints. Kills are
SIGKILL to a process that is blocked in the middle of an epoch.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r2scp.jobs.ingest.index import run_index
from r2scp.jobs.training import loop as train_loop
from r2scp.jobs.training.checkpoints import BEST, EXPERTS, LAST, read_checkpoint
from r2scp.jobs.training.log import read_metrics
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import CheckpointError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table

pytestmark = pytest.mark.usefixtures("one_thread")

LOG_EVERY = 2  # steps; an epoch of stage I has 5, of stage II 4
SEED = 4  # with it neither stage is best at its end
PATIENCE_S = 240  # for anything waited for; far beyond what a busy machine needs

#: One training, which says so and stands still at the n-th step that it takes in a stage.
DRIVER = f"""
import json, sys
from pathlib import Path
from r2scp.jobs.training import loop as train_loop, stages as train_stages
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.jobs.training.config import TrainConfig
from r2scp.pipelines.batches.examples import Pins

values, stage, count = json.loads(sys.argv[1]), getattr(train_stages, sys.argv[2]), int(sys.argv[3])
taken = 0

def pausing(self, *arguments, compute_loss=stage.compute_loss):
    global taken
    taken += 1
    if taken == count:
        print("in the middle", file=sys.__stdout__, flush=True)
        sys.stdin.readline()
    return compute_loss(self, *arguments)

stage.compute_loss = pausing
train_loop.LOG_EVERY = {LOG_EVERY}
places = {{"pins": Pins(**values.pop("pins")), "folder": Path(values.pop("folder"))}}
plan = TrainPlan(config=TrainConfig.from_json(values.pop("config")), **places, **values)
run_training(plan, TrainOptions(threads=1), lambda line: None)
"""


@pytest.fixture(autouse=True)
def many_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_loop, "LOG_EVERY", LOG_EVERY)


def train(plan: TrainPlan, on_epoch: Callable[[dict[str, object]], None] = lambda _: None) -> None:
    run_training(plan, TrainOptions(threads=1), on_epoch)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the time it took."""
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a run, by checkpoint and name."""
    found = {}
    for name in (LAST, BEST, EXPERTS):
        checkpoint = read_checkpoint(folder, name)
        parts = checkpoint.read_tensors(checkpoint.tensors, checkpoint.sha256)
        if name == LAST:
            parts |= {f"optimiser/{key}": value for key, value in checkpoint.optimiser_state().items()}
        found |= {f"{name}/{key}": value for key, value in parts.items()}
    return found


def check_same(folder: Path, other: Path) -> None:
    assert metrics(folder) == metrics(other)
    assert (folder / "metrics.jsonl").read_text().count("\n") == len(metrics(other)), "a partial line remains"
    one, two = all_tensors(folder), all_tensors(other)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    for name in (LAST, BEST, EXPERTS):
        documents = [json.loads((run / f"{name}.json").read_text()) for run in (folder, other)]
        assert documents[0] == documents[1]


@pytest.fixture(scope="module")
def undisturbed(quick_plan: Callable[..., TrainPlan], tmp_path_factory: pytest.TempPathFactory) -> TrainPlan:
    plan = quick_plan(tmp_path_factory.mktemp("undisturbed") / "run", seed=SEED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_loop, "LOG_EVERY", LOG_EVERY)
        train(plan)
    steps = [line["step"] for line in metrics(plan.folder) if line["kind"] == "step"]
    assert steps == list(range(2, 28, 2)), "3 epochs of 5 steps, 3 of 4"
    assert (read_checkpoint(plan.folder, EXPERTS).epoch, read_checkpoint(plan.folder).epoch) == (2, 1), (
        "the last is not the best"
    )
    return plan


class Stop(Exception):
    """What ends a training in these tests."""


@pytest.mark.parametrize(
    "stops",
    [
        [("experts", 3)],  # stage I is complete, stage II has not started
        [("mixing", 3)],  # training is complete
        [("experts", 1), ("experts", 2), ("experts", 3), ("mixing", 1)],
    ],
)
def test_stopped_between_epochs(undisturbed: TrainPlan, tmp_path: Path, stops: list[tuple[str, int]]) -> None:
    plan = replace(undisturbed, folder=tmp_path)
    epochs = []

    def on_epoch(values: dict[str, object]) -> None:
        epochs.append((values["stage"], values["epoch"]))
        if epochs[-1] in stops:
            raise Stop

    for _ in stops:
        with pytest.raises(Stop):
            train(plan, on_epoch)
    train(plan, on_epoch)
    check_same(tmp_path, undisturbed.folder)
    assert epochs == [(line["stage"], line["epoch"]) for line in metrics(tmp_path) if line["kind"] == "epoch"]


@pytest.mark.parametrize("fatal", [1, 4])
def test_stopped_between_the_log_line_and_its_checkpoint(
    undisturbed: TrainPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    """The epoch's line is written, its checkpoint is not: the epoch runs again and is logged once."""
    plan, real, count = replace(undisturbed, folder=tmp_path), train_loop.write_checkpoint, 0

    def failing(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == fatal:
            raise Stop
        real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "write_checkpoint", failing)
        with pytest.raises(Stop):
            train(plan)
    assert len([line for line in metrics(tmp_path) if line["kind"] == "epoch"]) == fatal
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # a line cut off by the kill
    train(plan)
    check_same(tmp_path, undisturbed.folder)


def killed_at(plan: TrainPlan, stage: str, count: int) -> None:
    """Start a training in a process of its own and end it by SIGKILL in its `count`-th step of a stage."""
    values = {"config": plan.config.to_json(), "pins": asdict(plan.pins), "folder": str(plan.folder)}
    values |= {"uri": plan.uri, "fingerprint": plan.fingerprint, "answers": plan.answers}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(values), stage, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert driver.stdout is not None
        assert select.select([driver.stdout], [], [], PATIENCE_S)[0], "the training says nothing"
        assert driver.stdout.readline() == b"in the middle\n"
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait(30) == -signal.SIGKILL
    finally:
        driver.kill()
        driver.communicate()


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_of_each_stage(undisturbed: TrainPlan, tmp_path: Path) -> None:
    plan = replace(undisturbed, folder=tmp_path)
    killed_at(plan, "ExpertsStage", 9)
    last = read_checkpoint(tmp_path, LAST)
    assert (last.stage.value, last.epoch, last.step) == ("experts", 1, 5)
    assert metrics(tmp_path)[-1]["step"] == 8, "lines of the lost epoch"
    killed_at(plan, "MixingStage", 7)
    last = read_checkpoint(tmp_path, LAST)
    assert (last.stage.value, last.epoch, last.step) == ("mixing", 1, 19)
    train(plan)
    check_same(tmp_path, undisturbed.folder)


def test_a_finished_training_is_left_as_it_is(undisturbed: TrainPlan, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")}
    epochs: list[object] = []
    again = replace(undisturbed, uri=str(tmp_path / "the store is gone"))
    assert run_training(again, TrainOptions(), epochs.append) == read_checkpoint(undisturbed.folder)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")} == before
    assert epochs == []


def test_resuming_reads_the_versions_of_the_first_start(
    undisturbed: TrainPlan,
    quick_plan: Callable[..., TrainPlan],
    learnable_store: FeatureStore,
    copy: Callable[[FeatureStore], FeatureStore],
    write: Callable,
    tmp_path: Path,
) -> None:
    """Meanwhile all clips, the bank and the answers have changed."""
    store, folder = copy(learnable_store), tmp_path / "run"

    def stop(values: dict[str, object]) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(quick_plan(folder, store, seed=SEED), stop)
    clips = store.clips().to_pylist()
    turned = {row["clip_id"]: other for row, other in zip(clips, clips[1:] + clips[:1], strict=True)}
    features = ("audio", "visual", "audio_key", "visual_key")
    write(store, Table.CLIPS, [row | {f: turned[row["clip_id"]][f] for f in features} for row in clips])
    [question] = store.questions(where="question_id = 'music-avqa/0/0'").to_pylist()
    write(store, Table.QUESTIONS, [question | {"question_id": "music-avqa/0/new", "answer": "a seventh"}])
    run_index(store, IndexSettings(retrieval=(Retrieval.PAIRED,), n=4), lambda mode, done, total: None)
    later = quick_plan(folder, store, seed=SEED)
    assert later.pins != undisturbed.pins
    assert later.answers is not None
    assert len(later.answers) == 7
    later = replace(later, config=replace(later.config, model=replace(later.config.model, classes=7)))

    train(later)

    assert metrics(folder) == metrics(undisturbed.folder)
    assert read_checkpoint(folder).answers == undisturbed.answers
    assert read_checkpoint(folder).store["versions"] == asdict(undisturbed.pins)
    assert read_checkpoint(folder).config == undisturbed.config
    fresh = tmp_path / "fresh"
    train(replace(later, folder=fresh))
    assert read_checkpoint(fresh).store["versions"] == asdict(Pins.latest(store))
    assert metrics(fresh) != metrics(undisturbed.folder)


def test_other_settings_in_the_same_folder_are_refused(undisturbed: TrainPlan, tmp_path: Path) -> None:
    config = undisturbed.config
    before = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")}
    others = {
        rf"seed: {SEED}, 2": replace(undisturbed, config=replace(config, seed=2)),
        r"model\.k: 5, 4; batch_size: 8, 9": replace(
            undisturbed, config=replace(config, model=replace(config.model, k=4), batch_size=9)
        ),
        r"encoder: learnable, another": replace(undisturbed, fingerprint="another"),
        r"the experts that stage II starts from": replace(undisturbed, experts=undisturbed.folder),
    }
    for name, other in others.items():
        with pytest.raises(CheckpointError, match=name) as error:
            train(other)
        assert "\n" not in str(error.value)
        assert str(undisturbed.folder) in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")} == before
    (tmp_path / "last.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a checkpoint of r2scp-pipe"):
        train(replace(undisturbed, folder=tmp_path))
