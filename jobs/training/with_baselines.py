"""A model and its baselines: stage I once, then all that begins there side by side where there are cores.

RUN/experts/              stage I, shared
RUN/                      stage II
RUN/baselines/NAME/       each baseline

A training of one stage alone shares nothing and rests in RUN/ whole.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from r2scp.jobs.training.checkpoints import Checkpoint, read_last
from r2scp.jobs.training.config import baselines, experts_of, shares_experts
from r2scp.jobs.training.data import TrainingData, complete
from r2scp.jobs.training.evaluate import BASELINES
from r2scp.jobs.training.run import MetricsTail, TrainOptions, TrainPlan, run_training
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.ray_session import fan_out, ray_session
from r2scp.store.feature_store import FeatureStore

EXPERTS_NAME = "experts"
OURS = "r2scp"

Told = Callable[[str, dict[str, object]], None]  # which training, an epoch's line of metrics.jsonl
Plans = dict[str, TrainPlan]


@dataclass(frozen=True, kw_only=True)
class _Task:
    plan: TrainPlan
    means: TrainOptions


def train_with_baselines(
    plan: TrainPlan, means: TrainOptions, told: Told, with_baselines: bool = True
) -> dict[str, Checkpoint]:
    """Train `plan` and its baselines; best checkpoints by name, that of `plan` under `OURS`.

    What is finished is left as it is, and all of it reads the store at the versions that the first of it
    read. On CPUs with several cores trainings run side by side, each on one core; otherwise one after
    another. Raises what `run_training` raises.
    """
    found: dict[str, Checkpoint] = {}
    turns = _in_turn(plan, with_baselines)
    for plans in turns:
        if OURS in plans:
            _require_inputs(plans[OURS])
    most = max(sum(not _over(one) for one in plans.values()) for plans in turns)  # that could go side by side
    cores = means.threads or 1 if means.device == "cpu" and means.num_workers == 1 else 1
    side_by_side = cores > 1 and most > 1
    with ray_session(means.resources) if side_by_side else nullcontext():
        for plans in turns:
            train = _side_by_side if side_by_side and len(plans) > 1 else _one_by_one
            found |= train(plans, means, told)
    return found


def _in_turn(plan: TrainPlan, with_baselines: bool) -> tuple[Plans, Plans]:
    """What can begin at once, and what needs the experts of it."""
    shared = bool(plan.config.stage_one.epochs and plan.config.stage_two.epochs)
    folder = plan.folder / EXPERTS_NAME
    plans, second = {OURS: plan}, {OURS} if shared else set()
    if shared:
        plans = {EXPERTS_NAME: replace(plan, config=experts_of(plan.config), folder=folder)} | plans
    for name, config in baselines(plan.config).items() if with_baselines else ():
        plans[name] = replace(plan, config=config, folder=plan.folder / BASELINES / name)
        if shared and shares_experts(config):
            second.add(name)
    plans = _as_begun(plans)
    return (
        {name: one for name, one in plans.items() if name not in second},
        {name: replace(one, experts=folder) for name, one in plans.items() if name in second},
    )


def _as_begun(plans: Plans) -> Plans:
    """All with the store's versions and the answers of the first that has begun: the store may have grown."""
    last = next((last for one in plans.values() if (last := read_last(one.folder)) is not None), None)
    if last is None:
        return plans
    versions, begun = last.store["versions"], {}
    assert isinstance(versions, dict)
    for name, plan in plans.items():
        model = plan.config.model
        if None not in (model.classes, last.config.model.classes):
            model = replace(model, classes=last.config.model.classes)
        config = replace(plan.config, model=model)
        begun[name] = replace(plan, config=config, pins=Pins(**versions), answers=last.answers)
    return begun


def _require_inputs(plan: TrainPlan) -> None:
    """Raises what its training would raise of the store, before the experts are trained in vain."""
    if not _over(plan):
        store = FeatureStore.open(plan.uri, plan.fingerprint, plan.storage_options)
        learned = TrainingData.read(store, plan.pins, plan.config, plan.answers).learning()[0]
        if plan.config.stage_two.epochs:
            complete(learned)


def _over(plan: TrainPlan) -> bool:
    last = read_last(plan.folder)
    return last is not None and last.finished


def _one_by_one(plans: Plans, means: TrainOptions, told: Told) -> dict[str, Checkpoint]:
    return {name: run_training(plan, means, partial(told, name)) for name, plan in plans.items()}


def _side_by_side(plans: Plans, means: TrainOptions, told: Told) -> dict[str, Checkpoint]:
    tasks = [_Task(plan=plan, means=replace(means, threads=1)) for plan in plans.values()]
    names, found = list(plans), {}
    with ExitStack() as stack:
        for name, plan in plans.items():
            following = MetricsTail(plan.folder / "metrics.jsonl", partial(told, name))
            stack.enter_context(following)
        for at, checkpoint in fan_out(_train, tasks):
            found[names[at]] = checkpoint
    return {name: found[name] for name in names}


def _train(task: _Task) -> Checkpoint:
    return run_training(task.plan, task.means, lambda _: None)
