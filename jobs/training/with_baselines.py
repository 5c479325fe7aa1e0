"""A model and its baselines: stage I once, then everything that starts from it, in parallel on several cores.

RUN/experts/              stage I, shared
RUN/                      stage II
RUN/baselines/NAME/       a baseline

A training of a single stage shares nothing and has all of its files in RUN/.
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

OnNamedEpoch = Callable[[str, dict[str, object]], None]  # training, line of metrics.jsonl
Plans = dict[str, TrainPlan]


@dataclass(frozen=True, kw_only=True)
class _Task:
    plan: TrainPlan
    options: TrainOptions


def train_with_baselines(
    plan: TrainPlan, options: TrainOptions, on_epoch: OnNamedEpoch, with_baselines: bool = True
) -> dict[str, Checkpoint]:
    """Train `plan` and its baselines; best checkpoints by name, that of `plan` under `OURS`.

    Finished trainings are left as they are, and all read the store at the versions that the first one read.
    On several CPU cores trainings run in parallel, one core each; otherwise one after another. Raises what
    `run_training` raises.
    """
    trained: dict[str, Checkpoint] = {}
    phases = _phases(plan, with_baselines)
    for plans in phases:
        if OURS in plans:
            _require_inputs(plans[OURS])
    most_unfinished = max(sum(not _finished(one) for one in plans.values()) for plans in phases)
    cores = options.threads or 1 if options.device == "cpu" and options.num_workers == 1 else 1
    parallel = cores > 1 and most_unfinished > 1
    with ray_session(options.resources) if parallel else nullcontext():
        for plans in phases:
            train = _train_in_parallel if parallel and len(plans) > 1 else _train_in_sequence
            trained |= train(plans, options, on_epoch)
    return trained


def _phases(plan: TrainPlan, with_baselines: bool) -> tuple[Plans, Plans]:
    """The trainings that can start at once, and those that start from their experts."""
    shared = bool(plan.config.stage_one.epochs and plan.config.stage_two.epochs)
    folder = plan.folder / EXPERTS_NAME
    plans, needs_experts = {OURS: plan}, {OURS} if shared else set()
    if shared:
        plans = {EXPERTS_NAME: replace(plan, config=experts_of(plan.config), folder=folder)} | plans
    for name, config in baselines(plan.config).items() if with_baselines else ():
        plans[name] = replace(plan, config=config, folder=plan.folder / BASELINES / name)
        if shared and shares_experts(config):
            needs_experts.add(name)
    plans = _pinned_to_first(plans)
    return (
        {name: one for name, one in plans.items() if name not in needs_experts},
        {name: replace(one, experts=folder) for name, one in plans.items() if name in needs_experts},
    )


def _pinned_to_first(plans: Plans) -> Plans:
    """All plans with the store versions and answers of the first one already started, if any."""
    last = next((last for one in plans.values() if (last := read_last(one.folder)) is not None), None)
    if last is None:
        return plans
    versions, pinned = last.store["versions"], {}
    assert isinstance(versions, dict)
    for name, plan in plans.items():
        model = plan.config.model
        if None not in (model.classes, last.config.model.classes):
            model = replace(model, classes=last.config.model.classes)
        config = replace(plan.config, model=model)
        pinned[name] = replace(plan, config=config, pins=Pins(**versions), answers=last.answers)
    return pinned


def _require_inputs(plan: TrainPlan) -> None:
    """Raises the store errors of its training before the experts are trained in vain."""
    if not _finished(plan):
        store = FeatureStore.open(plan.uri, plan.fingerprint, plan.storage_options)
        train = TrainingData.read(store, plan.pins, plan.config, plan.answers).train_and_validation()[0]
        if plan.config.stage_two.epochs:
            complete(train)


def _finished(plan: TrainPlan) -> bool:
    last = read_last(plan.folder)
    return last is not None and last.finished


def _train_in_sequence(plans: Plans, options: TrainOptions, on_epoch: OnNamedEpoch) -> dict[str, Checkpoint]:
    return {name: run_training(plan, options, partial(on_epoch, name)) for name, plan in plans.items()}


def _train_in_parallel(plans: Plans, options: TrainOptions, on_epoch: OnNamedEpoch) -> dict[str, Checkpoint]:
    tasks = [_Task(plan=plan, options=replace(options, threads=1)) for plan in plans.values()]
    names, trained = list(plans), {}
    with ExitStack() as stack:
        for name, plan in plans.items():
            tail = MetricsTail(plan.folder / "metrics.jsonl", partial(on_epoch, name))
            stack.enter_context(tail)
        for at, checkpoint in fan_out(_train, tasks):
            trained[names[at]] = checkpoint
    return {name: trained[name] for name in names}


def _train(task: _Task) -> Checkpoint:
    return run_training(task.plan, task.options, lambda _: None)
