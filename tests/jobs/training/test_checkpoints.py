"""A checkpoint is exact, written whole or not at all, and one line says why it cannot be used."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r2scp.jobs.training import checkpoints
from r2scp.jobs.training.checkpoints import (
    BEST,
    EXPERTS,
    LAST,
    Checkpoint,
    code_version,
    load_optimiser,
    optimiser_tensors,
    read_checkpoint,
    read_last,
    write_checkpoint,
)
from r2scp.jobs.training.config import StageConfig, TrainConfig
from r2scp.model.config import ModelConfig
from r2scp.model.r2scp import R2SCP, Stage
from r2scp.pipelines.batches.examples import Pins
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import CheckpointError, FingerprintMismatch
from r2scp.store.feature_store import FeatureStore

CONFIG = TrainConfig(
    model=ModelConfig(encoder_dim=12, classes=3, dim=8, heads=2),
    stage_one=StageConfig(epochs=2),
    stage_two=StageConfig(epochs=3),
)


def checkpoint(step: int, stage: Stage = Stage.MIXING, mean: float = 0.5) -> Checkpoint:
    return Checkpoint(
        stage=stage,
        epoch=step,
        step=step,
        config=CONFIG,
        answers=["zwei", "trois", "four"],
        store={
            "uri": "s",
            "fingerprint": "f",
            "dim": 12,
            "versions": asdict(Pins(clips=3, questions=2, neighbours=1)),
        },
        metrics={"AV": mean, "mean": mean},
        best={"mean": mean, "epoch": step},
        code="",
    )


class Learner:
    """A model with an optimiser that has taken some steps."""

    def __init__(self, seed: int = 0, steps: int = 3) -> None:
        torch.manual_seed(seed)
        self.model = R2SCP(CONFIG.model).set_stage(Stage.MIXING)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-2, weight_decay=0.1)
        for step in range(steps):
            self.step(step)

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimiser.step()

    def write(self, folder: Path, names: list[str], entry: Checkpoint) -> None:
        write_checkpoint(folder, names, entry, self.model, optimiser_tensors(self.optimiser, self.model))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    learner, entry = Learner(), checkpoint(5)
    learner.write(tmp_path / "run", [LAST, BEST], entry)
    read = read_checkpoint(tmp_path / "run")
    assert replace(read, folder=Path(), tensors="", sha256="") == entry
    assert read.model().stage is Stage.MIXING
    assert not read.model().training
    assert same(read.model().state_dict(), learner.model.state_dict())
    assert read.optimiser == "", "only where training goes on"
    assert read_checkpoint(tmp_path / "run" / "best.json") == read
    assert read_last(tmp_path / "run") is not None
    assert read_last(tmp_path) is None


def test_a_restored_optimiser_takes_the_same_step(tmp_path: Path) -> None:
    learner, other = Learner(steps=4), Learner(seed=1, steps=0)
    learner.write(tmp_path, [LAST], checkpoint(4))
    last = read_checkpoint(tmp_path, LAST)
    last.load_into(other.model)
    load_optimiser(other.optimiser, other.model, last.optimiser_state())
    assert same(
        optimiser_tensors(other.optimiser, other.model), optimiser_tensors(learner.optimiser, learner.model)
    )
    for each in (learner, other):
        each.step(99)
    assert same(other.model.state_dict(), learner.model.state_dict())
    fresh = Learner(seed=1, steps=0)
    last.load_into(fresh.model)
    fresh.step(99)
    assert not same(fresh.model.state_dict(), learner.model.state_dict()), "the state makes a difference"


def test_a_kill_while_writing_leaves_the_previous_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file that a checkpoint is made of, before and after its own place is taken."""
    old, new = Learner(seed=0), Learner(seed=1)
    kept = {old_new: learner.model.state_dict() for old_new, learner in (("old", old), ("new", new))}
    kills = 0
    for fatal in range(1, 20):
        folder = tmp_path / str(fatal)
        old.write(folder, [LAST, BEST, EXPERTS], checkpoint(1, mean=0.1))
        count = 0

        def dying(path: Path, data: bytes, fatal: int = fatal) -> None:
            nonlocal count
            count += 1
            if count == fatal:
                path.with_name(f"{path.name}.part{os.getpid()}").write_bytes(data[: len(data) // 2])
                raise KeyboardInterrupt
            replace_file(path, data)

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "replace_file", dying)
            try:
                new.write(folder, [LAST, BEST], checkpoint(2, mean=0.2))
            except KeyboardInterrupt:
                kills += 1
        steps = {}
        for name in (LAST, BEST, EXPERTS):
            read = read_checkpoint(folder, name)
            steps[name] = read.step
            assert same(
                read.read_tensors(read.tensors, read.sha256), kept["old" if read.step == 1 else "new"]
            )
        read_checkpoint(folder, LAST).optimiser_state()
        assert steps[LAST] <= steps[BEST], "`last` must not refer to a best one that does not exist"
        assert steps[EXPERTS] == 1
        new.write(folder, [LAST, BEST], checkpoint(2, mean=0.2))
        assert (read_checkpoint(folder, LAST).step, read_checkpoint(folder).step) == (2, 2)
        assert not list(folder.glob("*.part*"))
        if count < fatal:
            break
    assert kills == 4, "model, best.json, optimiser, last.json"


def test_unreferenced_files_are_deleted(tmp_path: Path) -> None:
    ours = {"step-000001-00000000.safetensors", "step-000001-00000000.optimiser.safetensors"}
    ours |= {"step-000009-12345678.safetensors.part77", "last.json.part3", "metrics.jsonl.part5"}
    others = {"step-notes.txt", "notes.json.part1", "evaluation-test.json", "mine.safetensors"}
    for name in ours | others:
        (tmp_path / name).write_text("x")
    for step in range(1, 6):
        names = [LAST] + [EXPERTS] * (step == 1) + [BEST] * (step == 3)
        Learner(seed=step).write(tmp_path, names, checkpoint(step))
    steps = {name: read_checkpoint(tmp_path, name).step for name in (EXPERTS, BEST, LAST)}
    assert steps == {EXPERTS: 1, BEST: 3, LAST: 5}
    files = {path.name for path in tmp_path.iterdir()}
    documents = {f"{name}.json" for name in (EXPERTS, BEST, LAST)}
    tensors = {read_checkpoint(tmp_path, name).tensors for name in (EXPERTS, BEST, LAST)}
    assert files == others | documents | tensors | {read_checkpoint(tmp_path, LAST).optimiser}


def test_the_same_step_with_other_weights_is_another_file(tmp_path: Path) -> None:
    """A GPU repeats an epoch only roughly: what `best` names must not be written over."""
    Learner(seed=0).write(tmp_path, [LAST, BEST], checkpoint(7))
    best = read_checkpoint(tmp_path)
    Learner(seed=1).write(tmp_path, [LAST], checkpoint(7))
    assert read_checkpoint(tmp_path) == best
    assert same(best.model().state_dict(), Learner(seed=0).model.state_dict())


def flip(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [flip, lambda data: data[:-1], lambda data: b""])
def test_damaged_tensors_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    learner = Learner()
    learner.write(tmp_path, [LAST, BEST], checkpoint(1))
    last = read_checkpoint(tmp_path, LAST)
    for name in (last.tensors, last.optimiser):
        path = tmp_path / name
        path.write_bytes(damage(path.read_bytes()))
    for act in (last.model, last.optimiser_state, lambda: last.load_into(learner.model)):
        with pytest.raises(CheckpointError, match="is damaged") as error:
            act()
        assert str(tmp_path) in one_line(error)
    (tmp_path / last.tensors).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read: No such file") as error:
        last.model()
    one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"name": "another tool's"}, "not a checkpoint of r2scp-pipe"),
        (lambda v: v | {"format": 99}, "another checkpoint format"),
        (lambda v: v | {"colour": "red"}, "has no colour; known"),
        (lambda v: {k: x for k, x in v.items() if k != "step"}, r"best\.json must have step"),
        (lambda v: v | {"step": "many"}, r"best\.json\.step must be a whole number; got 'many'"),
        (lambda v: v | {"config": v["config"] | {"batch_size": 0}}, r"batch_size must be at least 1"),
        (lambda v: v | {"store": {}}, "does not name the store"),
        (
            lambda v: v | {"tensors": "../../secret"},
            r"references tensors that no training writes: '\.\./\.\./secret'",
        ),
        (lambda v: v | {"optimiser": "/etc/passwd"}, "references tensors that no training writes"),
    ],
)
def test_foreign_documents_are_refused(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    Learner().write(tmp_path, [BEST], checkpoint(1))
    document = tmp_path / "best.json"
    document.write_text(json.dumps(change(json.loads(document.read_text()))))
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(tmp_path)
    assert str(document) in one_line(error)


def test_a_missing_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*best\.json .*holds: none") as error:
        read_checkpoint(tmp_path)
    one_line(error)
    Learner().write(tmp_path, [LAST, EXPERTS], checkpoint(1))
    with pytest.raises(CheckpointError, match=r"holds: experts, last"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "best.json").write_text("{half")
    with pytest.raises(CheckpointError, match="there is no checkpoint") as error:
        read_checkpoint(tmp_path)
    one_line(error)


@pytest.mark.parametrize("other", [{"dim": 16}, {"layers": 2}])
def test_a_model_of_other_sizes_is_refused(tmp_path: Path, other: dict[str, int]) -> None:
    Learner().write(tmp_path, [BEST], checkpoint(1))
    with pytest.raises(CheckpointError, match=r"does not fit .* must be .*; got ") as error:
        read_checkpoint(tmp_path).load_into(R2SCP(replace(CONFIG.model, **other)))
    one_line(error)


def test_a_store_of_another_encoder_is_refused(tmp_path: Path) -> None:
    Learner().write(tmp_path, [BEST], checkpoint(1))
    read = read_checkpoint(tmp_path)
    read.require_store(FeatureStore("elsewhere", "f", 12))
    with pytest.raises(
        FingerprintMismatch, match=r"encoder f; the store at .*elsewhere holds those of g"
    ) as error:
        read.require_store(FeatureStore("elsewhere", "g", 12))
    one_line(error)


def test_when_a_training_is_finished() -> None:
    done = replace(checkpoint(3), epoch=3)
    assert done.finished
    assert not replace(done, epoch=2).finished
    assert not replace(done, stage=Stage.EXPERTS).finished
    alone = replace(CONFIG, stage_two=StageConfig(epochs=0))
    assert replace(done, stage=Stage.EXPERTS, epoch=2, config=alone).finished
    assert not replace(done, stage=Stage.EXPERTS, epoch=1, config=alone).finished


def test_the_version_of_the_code_is_the_checkouts(tmp_path: Path) -> None:
    assert code_version(tmp_path) == ""
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs with: peeled\naaa refs/heads/other\nbbb refs/heads/main\n")
    assert code_version(tmp_path) == "bbb"
    (git / "refs/heads/main").write_text("ccc\n")
    assert code_version(tmp_path) == "ccc"
    (git / "HEAD").write_text("ddd\n")
    assert code_version(tmp_path) == "ddd"
