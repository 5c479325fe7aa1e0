"""`study`: many trainings, in parallel on Ray, and their results in one table.

FOLDER/experts/ FOLDER/runs/   the trainings (`r2scp.jobs.training.study.trainings`), shared by all studies
FOLDER/NAME.json .md           a study's results
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from r2scp.jobs.training.checkpoints import read_checkpoint
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.evaluate import questions_of
from r2scp.jobs.training.log import read_metrics
from r2scp.jobs.training.run import TrainPlan
from r2scp.jobs.training.study.definitions import Study
from r2scp.jobs.training.study.trainings import (
    StoreContents,
    TrainingTask,
    experts_task,
    run_task,
    training_task,
)
from r2scp.pipelines.ray_session import Resources, fan_out, ray_session
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import R2SCPError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Condition

AVERAGE = "average"
MEASURES = (*Condition, AVERAGE)

Log = Callable[[str], None]
Tasks = Mapping[tuple[str, int], TrainingTask]  # by variant and seed


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How to run a study. `plan`: how its trainings read the store; each sets its own config and folder."""

    plan: TrainPlan
    folder: Path
    seeds: tuple[int, ...]
    split: str = "test"
    device: str = "cpu"
    gpus: float = 0.0  # GPUs per training
    resources: Resources = field(default_factory=Resources)
    log: Log = lambda _: None


def run_study(name: str, study: Study, options: StudyOptions) -> dict[str, Any]:
    """Train what is not trained yet, evaluate, and write `NAME.json`; its content.

    Raises `StoreError` before any training if the store lacks what a variant or the split needs, and
    `R2SCPError` at the end if trainings failed; the results of the others are kept.
    """
    store = FeatureStore.open(options.plan.uri, options.plan.fingerprint, options.plan.storage_options)
    contents = StoreContents(store=store, pins=options.plan.pins)
    plan = replace(options.plan, folder=options.folder.absolute())
    template = TrainingTask(
        name=name, plan=plan, split=options.split, rates=study.rates, device=options.device
    )
    tasks, experts = {}, []
    for variant, config in study.variants.items():
        for seed in options.seeds:
            seeded, title = replace(config, seed=seed), f"{variant}, seed {seed}"
            tasks[variant, seed] = task = training_task(title, template, contents, seeded)
            if task.plan.experts is not None:
                experts.append(experts_task(title, template, contents, seeded))
    _require_split(store, template)
    with ExitStack() as stack:
        if not all(task.finished for task in [*experts, *tasks.values()]):
            stack.enter_context(ray_session(options.resources))
        _run_pending(experts, "stage I", options)
        _run_pending(list(tasks.values()), name, options)
    report = _report(name, study, tasks, options) | {"store": _store_to_json(store, plan)}
    replace_file(options.folder / f"{name}.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def _require_split(store: FeatureStore, template: TrainingTask) -> None:
    """Raises `StoreError` for a split without questions, before hours of training."""
    config = template.plan.config
    plain = replace(config, model=replace(config.model, cmr=False))  # reads no neighbours
    data = TrainingData.read(store, template.plan.pins, plain, template.plan.answers)
    questions_of(data, template.split)


def _run_pending(tasks: Sequence[TrainingTask], title: str, options: StudyOptions) -> None:
    """Run the unfinished tasks, each once."""
    pending = list({task.plan.folder: task for task in tasks if not task.finished}.values())
    failed = []
    outcomes = fan_out(run_task, pending, gpus=options.gpus) if pending else ()
    for done, (at, outcome) in enumerate(outcomes, start=1):
        options.log(f"{title}: {done} of {len(pending)} trainings; {pending[at].name}: {outcome.message}")
        if outcome.failed:
            failed.append(f"{pending[at].name}: {outcome.message}")
    if failed:
        raise R2SCPError(
            f"{len(failed)} of {len(pending)} trainings failed: {failed[0]} (the others are kept; run the "
            "same command again to resume)"
        )


def _report(name: str, study: Study, tasks: Tasks, options: StudyOptions) -> dict[str, Any]:
    reports = {key: json.loads(task.evaluation.read_bytes()) for key, task in tasks.items()}
    measures = {key: _measures(report) for key, report in reports.items()}
    variants = {}
    for variant in study.variants:
        variant_tasks = [tasks[variant, seed] for seed in options.seeds]
        variants[variant] = row = _row(
            [measures[variant, seed] for seed in options.seeds],
            [measures[study.reference, seed] for seed in options.seeds],
        )
        row["runs"] = [
            task.plan.folder.relative_to(options.folder.absolute()).as_posix() for task in variant_tasks
        ]
        row["validation"] = [read_checkpoint(task.plan.folder).metrics["mean"] for task in variant_tasks]
        if study.loads:
            row["loads"] = [_loads(task) for task in variant_tasks]
    return {
        "study": name,
        "title": study.title,
        "asks": study.question,
        "split": options.split,
        "n": next(iter(reports.values()))["conditions"]["AV"]["n"],
        "seeds": list(options.seeds),
        "against": study.reference,
        "variants": variants,
        "leak_guard": all(report["settings"]["leak_guard"] for report in reports.values()),
        "disjoint": options.plan.config.index.bank.disjoint,
        "code": sorted(
            {report["code"] for report in reports.values()}
        ),  # earlier trainings may be from other versions
    }


def _row(values: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Each measure over the seeds, and its difference from another variant, paired by seed."""
    accuracy, difference = {}, {}
    for name in values[0]:
        accuracy[name] = _spread([value[name] for value in values])
        pairs = zip(values, others, strict=True)
        difference[name] = _spread([value[name] - other[name] for value, other in pairs])
    return {"accuracy": accuracy, "difference": difference}


def _measures(report: Mapping[str, Any]) -> dict[str, float]:
    accuracies: dict[str, float] = {name: report["conditions"][name]["accuracy"] for name in Condition}
    accuracies[AVERAGE] = report[AVERAGE]
    return accuracies | {name: part["accuracy"] for name, part in report.get("missing_rates", {}).items()}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (0 for a single seed)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "values": list(values)}


def _loads(task: TrainingTask) -> list[dict[str, float]]:
    """The router's mean weights per epoch, by condition and source."""
    epochs = []
    for line in read_metrics(task.plan.folder / "metrics.jsonl"):
        train = line.get("train")
        if line["kind"] == "epoch" and isinstance(train, Mapping):
            weights = {name: value for name, value in train.items() if name.startswith("router/")}
            epochs.append({name.removeprefix("router/"): value for name, value in weights.items()})
    return epochs


def _store_to_json(store: FeatureStore, plan: TrainPlan) -> dict[str, Any]:
    return {"uri": store.uri, "fingerprint": store.fingerprint, "versions": asdict(plan.pins)}
