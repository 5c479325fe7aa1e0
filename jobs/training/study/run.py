"""`study`: many trainings, side by side on Ray, and what they say together.

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
from r2scp.jobs.training.study.trainings import StoreContents, Job, experts_task, training_task, work
from r2scp.pipelines.ray_session import Resources, fan_out, ray_session
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import R2SCPError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Condition

AVERAGE = "average"
MEASURES = (*Condition, AVERAGE)

Told = Callable[[str], None]
Jobs = Mapping[tuple[str, int], Job]  # by variant and seed


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a study may use. `plan`: how its trainings read the store; config and folder are set for each."""

    plan: TrainPlan
    folder: Path
    seeds: tuple[int, ...]
    split: str = "test"
    device: str = "cpu"
    gpus: float = 0.0  # share of a GPU for one training
    resources: Resources = field(default_factory=Resources)
    told: Told = lambda _: None


def run_study(name: str, study: Study, means: StudyOptions) -> dict[str, Any]:
    """Train what is not trained yet, evaluate, and write `NAME.json`; what it holds.

    Raises `StoreError` before anything is trained where the store lacks what a variant or the split needs,
    and `R2SCPError` at the end where trainings failed: what the others reached stays.
    """
    store = FeatureStore.open(means.plan.uri, means.plan.fingerprint, means.plan.storage_options)
    contents = StoreContents(store=store, pins=means.plan.pins)
    plan = replace(means.plan, folder=means.folder.absolute())
    template = Job(name=name, plan=plan, split=means.split, rates=study.rates, device=means.device)
    jobs, begun = {}, []
    for variant, config in study.variants.items():
        for seed in means.seeds:
            seeded, named = replace(config, seed=seed), f"{variant}, seed {seed}"
            jobs[variant, seed] = job = training_task(named, template, contents, seeded)
            if job.plan.experts is not None:
                begun.append(experts_task(named, template, contents, seeded))
    _require_split(store, template)
    with ExitStack() as stack:
        if not all(job.done for job in [*begun, *jobs.values()]):
            stack.enter_context(ray_session(means.resources))
        _run(begun, "stage I", means)
        _run(list(jobs.values()), name, means)
    report = _report(name, study, jobs, means) | {"store": _described(store, plan)}
    replace_file(means.folder / f"{name}.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def _require_split(store: FeatureStore, template: Job) -> None:
    """Raises `StoreError` for a split without questions, before hours are spent."""
    config = template.plan.config
    plain = replace(config, model=replace(config.model, cmr=False))  # reads no neighbours
    opened = TrainingData.read(store, template.plan.pins, plain, template.plan.answers)
    questions_of(opened, template.split)


def _run(jobs: Sequence[Job], what: str, means: StudyOptions) -> None:
    """Those that are not done yet, each once."""
    due = list({job.plan.folder: job for job in jobs if not job.done}.values())
    failed = []
    for done, (at, outcome) in enumerate(fan_out(work, due, gpus=means.gpus) if due else (), start=1):
        means.told(f"{what}: {done} of {len(due)} trainings; {due[at].name}: {outcome.said}")
        if outcome.failed:
            failed.append(f"{due[at].name}: {outcome.said}")
    if failed:
        raise R2SCPError(
            f"{len(failed)} of {len(due)} trainings failed: {failed[0]} (the others are kept; the same study "
            "goes on with what is left)"
        )


def _report(name: str, study: Study, jobs: Jobs, means: StudyOptions) -> dict[str, Any]:
    reports = {at: json.loads(job.evaluation.read_bytes()) for at, job in jobs.items()}
    measures = {at: _measures(report) for at, report in reports.items()}
    variants = {}
    for variant in study.variants:
        mine = [jobs[variant, seed] for seed in means.seeds]
        variants[variant] = row = _row(
            [measures[variant, seed] for seed in means.seeds],
            [measures[study.against, seed] for seed in means.seeds],
        )
        row["runs"] = [job.plan.folder.relative_to(means.folder.absolute()).as_posix() for job in mine]
        row["validation"] = [read_checkpoint(job.plan.folder).metrics["mean"] for job in mine]
        if study.loads:
            row["loads"] = [_loads(job) for job in mine]
    return {
        "study": name,
        "title": study.title,
        "asks": study.asks,
        "split": means.split,
        "n": next(iter(reports.values()))["conditions"]["AV"]["n"],
        "seeds": list(means.seeds),
        "against": study.against,
        "variants": variants,
        "leak_guard": all(report["settings"]["leak_guard"] for report in reports.values()),
        "disjoint": means.plan.config.index.bank.disjoint,
        "code": sorted({report["code"] for report in reports.values()}),  # some may be of earlier days
    }


def _row(values: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Each measure over the seeds, and paired by seed against another variant."""
    accuracy, difference = {}, {}
    for name in values[0]:
        accuracy[name] = _spread([value[name] for value in values])
        pairs = zip(values, others, strict=True)
        difference[name] = _spread([value[name] - other[name] for value, other in pairs])
    return {"accuracy": accuracy, "difference": difference}


def _measures(report: Mapping[str, Any]) -> dict[str, float]:
    accuracies = {name: report["conditions"][name]["accuracy"] for name in Condition}
    accuracies[AVERAGE] = report[AVERAGE]
    return accuracies | {name: part["accuracy"] for name, part in report.get("missing_rates", {}).items()}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (0 for one)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "values": list(values)}


def _loads(job: Job) -> list[dict[str, float]]:
    """The router's mean weights by condition and source, epoch by epoch."""
    found = []
    for line in read_metrics(job.plan.folder / "metrics.jsonl"):
        train = line.get("train")
        if line["kind"] == "epoch" and isinstance(train, Mapping):
            weights = {name: value for name, value in train.items() if name.startswith("router/")}
            found.append({name.removeprefix("router/"): value for name, value in weights.items()})
    return found


def _described(store: FeatureStore, plan: TrainPlan) -> dict[str, Any]:
    return {"uri": store.uri, "fingerprint": store.fingerprint, "versions": asdict(plan.pins)}
