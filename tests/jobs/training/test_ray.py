"""Two workers train one model on disjoint shares of each batch; a worker may die, a training be stopped.

On real Ray and gloo. Workers log what they were given; one kills itself at a given step of an epoch.
"""

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from r2scp.jobs.training import run as train
from r2scp.jobs.training.checkpoints import BEST, EXPERTS, LAST, read_checkpoint
from r2scp.jobs.training.log import read_metrics
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.store.errors import R2SCPError, UsageError

pytestmark = pytest.mark.usefixtures("local_ray")
TWO = TrainOptions(num_workers=2, threads=1)
Worker = Callable[[dict], None]
PATIENCE_S = 240  # of a blocked worker, which is ended long before


def logged_worker(logs: Path, stage: str = "", step: int = 0, action: str = "") -> Worker:
    """The worker's function, with a log. At a step of a stage the second worker, once, "kill"s itself or
    "block"s.
    """
    logs.mkdir()

    def work(settings: dict) -> None:
        from r2scp.jobs.training import run as train
        from r2scp.jobs.training import stages as train_stages

        rank, taken = ray.train.get_context().get_world_rank(), Counter()
        stages: list[Any] = [train_stages.ExpertsStage, train_stages.MixingStage]

        def note(**words: object) -> None:
            with (logs / f"{rank}.jsonl").open("a") as file:
                file.write(json.dumps(words) + "\n")

        note(pid=os.getpid())
        for each in stages:

            def prepare(self: Any, rows: Any, missing: int, real: Any = each.prepare) -> Any:
                note(stage=self.stage.value, rows=rows.tolist())
                return real(self, rows, missing)

            def compute_loss(self: Any, *arguments: Any, real: Any = each.compute_loss) -> Any:
                taken[self.stage.value] += 1
                if (rank, self.stage.value, taken[stage]) == (1, stage, step) and not (
                    logs / action
                ).exists():
                    (logs / action).touch()
                    if action == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    threading.Event().wait(PATIENCE_S)
                return real(self, *arguments)

            each.prepare, each.compute_loss = prepare, compute_loss
        train._in_worker(settings)

    return work


def read_log(logs: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logs / f"{rank}.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the time it took."""
    whole = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in whole]


@pytest.fixture(scope="module")
def undisturbed(
    local_ray: None, quick_plan: Callable[..., TrainPlan], tmp_path_factory: pytest.TempPathFactory
) -> TrainPlan:
    """Two workers, and their logs beside the run's folder."""
    folder = tmp_path_factory.mktemp("two")
    plan, epochs = quick_plan(folder / "run"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "_in_worker", logged_worker(folder / "logs"))
        run_training(plan, TWO, epochs.append)
    assert epochs == [line for line in read_metrics(plan.folder / "metrics.jsonl") if line["kind"] == "epoch"]
    return plan


def test_two_workers_share_each_batch(undisturbed: TrainPlan) -> None:
    """34 questions of stage I in batches of 8, 8, 8, 8, 2; 32 of stage II."""
    one, two = (read_log(undisturbed.folder.parent / "logs", rank) for rank in (0, 1))
    assert one[0]["pid"] != two[0]["pid"]
    assert len(one) == len(two) == 1 + 3 * 5 + 3 * 4
    orders: list[list[int]] = []
    for at, questions in ((1, 34), (16, 32)):
        for epoch in range(3):
            size = -(-questions // 8)
            shares = list(zip(*(part[at + epoch * size :][:size] for part in (one, two)), strict=True))
            assert [len(a["rows"]) + len(b["rows"]) for a, b in shares][:4] == [8] * 4
            rows = [row for pair in shares for share in pair for row in share["rows"]]
            assert sorted(rows) == list(range(questions)), "each question once, in one worker"
            orders.append(rows)
    assert all(one != other for one, other in combinations(orders, 2)), "each epoch in an order of its own"


def test_two_workers_learn_what_one_learns(undisturbed: TrainPlan, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    one = run_training(replace(undisturbed, folder=tmp_path), TrainOptions(threads=1), lambda values: None)
    torch.set_num_threads(before)
    two = read_checkpoint(undisturbed.folder)
    assert one.step == two.step or {one.epoch, two.epoch} <= {1, 2, 3}
    for condition, accuracy in one.metrics.items():
        # 16 questions: a standard error of 0.1 at most
        assert two.metrics[condition] == pytest.approx(accuracy, abs=0.2)
    assert two.metrics["mean"] > 0.6, "a sixth would be chance"


@pytest.mark.slow
def test_resumed_after_an_interrupt_and_a_workers_death(
    undisturbed: TrainPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in stage I, then a resumed run, then SIGKILL to one worker in the middle of stage II."""
    plan, handler, epochs = replace(undisturbed, folder=tmp_path / "run"), signal.getsignal(signal.SIGINT), []

    def stop(values: dict[str, object]) -> None:
        epochs.append((values["stage"], values["epoch"]))
        if len(epochs) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "_in_worker", logged_worker(tmp_path / "stopped", "experts", 8, "block"))
    with pytest.raises(KeyboardInterrupt):
        run_training(plan, TWO, stop)
    assert signal.getsignal(signal.SIGINT) is handler
    assert epochs == [("experts", 1)]
    assert (read_checkpoint(plan.folder, LAST).stage.value, read_checkpoint(plan.folder, LAST).epoch) == (
        "experts",
        1,
    )

    monkeypatch.setattr(train, "_in_worker", logged_worker(tmp_path / "killed", "mixing", 6, "kill"))
    run_training(plan, TWO, lambda values: None)

    assert (tmp_path / "killed" / "kill").exists()
    pids = {line["pid"] for rank in (0, 1) for line in read_log(tmp_path / "killed", rank) if "pid" in line}
    assert len(pids) == 4, "both workers were restarted once"
    assert metrics(plan.folder) == metrics(undisturbed.folder)
    for name in (LAST, BEST, EXPERTS):
        one, two = read_checkpoint(plan.folder, name), read_checkpoint(undisturbed.folder, name)
        assert (one.sha256, one.optimiser_sha256) == (two.sha256, two.optimiser_sha256)
    assert "metrics-tail" not in [thread.name for thread in threading.enumerate()]


def test_more_workers_than_cores_are_refused(undisturbed: TrainPlan, tmp_path: Path) -> None:
    plan = replace(undisturbed, folder=tmp_path)
    with pytest.raises(UsageError, match="3 workers need a CPU each; Ray has 2"):
        run_training(plan, TrainOptions(num_workers=3), lambda values: None)


@pytest.mark.slow
def test_an_error_in_every_worker_is_one_line(
    undisturbed: TrainPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: dict) -> None:
        raise ValueError("first line\nall is lost")

    monkeypatch.setattr(train, "_in_worker", fail)
    plan = replace(undisturbed, folder=tmp_path)
    with pytest.raises(R2SCPError, match=r"training failed in . workers?: .*all is lost") as error:
        run_training(plan, replace(TWO, max_failures=0), lambda values: None)
    assert "\n" not in str(error.value)
