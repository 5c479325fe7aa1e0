"""A model and its baselines: stage I once, then all that begins there side by side where there are cores.

RUN/experts/              stage I, shared
RUN/                      stage II
RUN/baselines/NAME/       each baseline
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from r2scp.jobs.baselines import baselines, takes_experts
from r2scp.jobs.checkpoints import Checkpoint
from r2scp.jobs.evaluate import BASELINES
from r2scp.jobs.studies import experts_of
from r2scp.jobs.train import Following, TrainMeans, TrainPlan, run_training
from r2scp.pipelines.flows import fan_out, ray_session

EXPERTS_NAME = "experts"
OURS = "r2scp"

Told = Callable[[str, dict[str, object]], None]  # which training, an epoch's line of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class _Task:
    plan: TrainPlan
    means: TrainMeans


def run_together(plan: TrainPlan, means: TrainMeans, told: Told) -> dict[str, Checkpoint]:
    """Train `plan` and its baselines; best checkpoints by name, that of `plan` under `OURS`.

    On CPUs with several cores trainings run side by side, each on one core; otherwise one after another.
    """
    experts = replace(plan, config=experts_of(plan.config), folder=plan.folder / EXPERTS_NAME)
    first, second = {EXPERTS_NAME: experts}, {OURS: replace(plan, experts=experts.folder)}
    for name, config in baselines(plan.config).items():
        other = replace(plan, config=config, folder=plan.folder / BASELINES / name)
        if takes_experts(config):
            second[name] = replace(other, experts=experts.folder)
        else:
            first[name] = other
    side_by_side = means.device == "cpu" and means.num_workers == 1 and (means.threads or 1) > 1
    train = _side_by_side if side_by_side else _one_by_one
    return train(first, means, told) | train(second, means, told)


def _one_by_one(plans: Mapping[str, TrainPlan], means: TrainMeans, told: Told) -> dict[str, Checkpoint]:
    return {name: run_training(plan, means, partial(told, name)) for name, plan in plans.items()}


def _side_by_side(plans: Mapping[str, TrainPlan], means: TrainMeans, told: Told) -> dict[str, Checkpoint]:
    tasks = [_Task(plan=plan, means=replace(means, threads=1)) for plan in plans.values()]
    names, found = list(plans), {}
    with ExitStack() as stack:
        stack.enter_context(ray_session(means.resources))
        for name, plan in plans.items():
            following = Following(plan.folder / "metrics.jsonl", partial(told, name))
            stack.enter_context(following)
        for at, checkpoint in fan_out(_train, tasks):
            found[names[at]] = checkpoint
    return {name: found[name] for name in names}


def _train(task: _Task) -> Checkpoint:
    return run_training(task.plan, task.means, lambda _: None)
