"""`study`: many trainings, side by side on Ray, and what they say together.

    FOLDER/experts/KEY     stage I, shared by all variants that begin alike
    FOLDER/runs/KEY        one training, with its evaluation; shared by all studies that need it
    FOLDER/NAME.json .md   a study's results

KEY is of the whole config, so a study that is started again, or another that needs the same training, goes
on from what is there.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from r2scp.jobs.checkpoints import code_version, find, find_last, replace_file
from r2scp.jobs.evaluate import MISSING_RATES, EvaluateMeans, run_evaluate
from r2scp.jobs.studies import Study, experts_of
from r2scp.jobs.train import TrainMeans, TrainPlan, run_training
from r2scp.jobs.train_config import TrainConfig
from r2scp.jobs.train_log import lines
from r2scp.pipelines.dataset import CONDITIONS
from r2scp.pipelines.flows import Resources, fan_out, ray_session
from r2scp.store.feature_store import FeatureStore

AVERAGE = "average"
MEASURES = (*CONDITIONS, AVERAGE)

Told = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StudyMeans:
    """What a study may use. `plan`: how its trainings read the store; config and folder are set for each."""

    plan: TrainPlan
    folder: Path
    seeds: tuple[int, ...]
    split: str = "test"
    device: str = "cpu"
    gpus: float = 0.0  # share of a GPU for one training
    resources: Resources = field(default_factory=Resources)
    told: Told = lambda _: None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One training and its evaluation; what a task gets."""

    plan: TrainPlan
    split: str  # "": do not evaluate
    rates: bool
    device: str


def run_study(name: str, study: Study, means: StudyMeans) -> dict[str, Any]:
    """Train what is not trained yet, evaluate, and write `NAME.json`; what it holds."""
    seeded = {
        (variant, seed): replace(config, seed=seed)
        for variant, config in study.variants.items()
        for seed in means.seeds
    }
    jobs = {at: _job(config, means, study.rates) for at, config in seeded.items()}
    with ray_session(means.resources):
        begun = [
            _experts(config, means) for at, config in seeded.items() if jobs[at].plan.experts is not None
        ]
        first = {job.plan.folder: job for job in begun if not _trained(job)}
        _run(list(first.values()), "stage I", means)
        due = {job.plan.folder: job for job in jobs.values() if not _evaluated(job)}
        _run(list(due.values()), name, means)
    report = {
        "study": name,
        "title": study.title,
        "asks": study.asks,
        "split": means.split,
        "seeds": list(means.seeds),
        "against": study.against,
        "variants": {
            variant: _variant(study, variant, [jobs[variant, seed] for seed in means.seeds], jobs, means)
            for variant in study.variants
        },
        "store": {
            "uri": means.plan.uri,
            "fingerprint": means.plan.fingerprint,
            "versions": asdict(means.plan.pins),
        },
        "code": code_version(),
    }
    replace_file(means.folder / f"{name}.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def key_of_config(config: TrainConfig) -> str:
    """Names a training by all of its settings."""
    return hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _job(config: TrainConfig, means: StudyMeans, rates: bool) -> _Job:
    """A variant's training; one without a stage II is that of its experts."""
    if not config.stage_two.epochs:
        return replace(_experts(config, means), split=means.split, rates=rates)
    experts = (
        means.folder / "experts" / key_of_config(experts_of(config)) if config.stage_one.epochs else None
    )
    plan = replace(
        means.plan, config=config, folder=means.folder / "runs" / key_of_config(config), experts=experts
    )
    return _Job(plan=plan, split=means.split, rates=rates, device=means.device)


def _experts(config: TrainConfig, means: StudyMeans) -> _Job:
    experts = experts_of(config)
    plan = replace(means.plan, config=experts, folder=means.folder / "experts" / key_of_config(experts))
    return _Job(plan=plan, split="", rates=False, device=means.device)


def _run(jobs: Sequence[_Job], what: str, means: StudyMeans) -> None:
    for done, (_, said) in enumerate(fan_out(_work, jobs, gpus=means.gpus), start=1):
        means.told(f"{what}: {done} of {len(jobs)} trainings; {said}")


def _work(job: _Job) -> str:
    """Runs in a task: train, or go on training, and evaluate."""
    torch.set_num_threads(1)
    run_training(job.plan, TrainMeans(device=job.device, threads=1), lambda _: None)
    best = find(job.plan.folder)
    if job.split:
        store = FeatureStore.open(job.plan.uri, job.plan.fingerprint, job.plan.storage_options)
        rates = MISSING_RATES if job.rates else ()
        report = run_evaluate(
            store, job.plan.folder, EvaluateMeans(split=job.split, rates=rates, device=job.device)
        )
        replace_file(_evaluation(job), (json.dumps(report, indent=1) + "\n").encode())
    return f"validation {100 * best.metrics['mean']:.1f} % at epoch {best.epoch}"


def _evaluation(job: _Job) -> Path:
    return job.plan.folder / f"evaluation-{job.split}{'-rates' if job.rates else ''}.json"


def _trained(job: _Job) -> bool:
    last = find_last(job.plan.folder)
    return last is not None and last.epoch == job.plan.config.stage_one.epochs


def _evaluated(job: _Job) -> bool:
    return _evaluation(job).exists()


def _variant(
    study: Study,
    variant: str,
    jobs: Sequence[_Job],
    all_jobs: Mapping[tuple[str, int], _Job],
    means: StudyMeans,
) -> dict[str, Any]:
    """A row: each measure over the seeds, and paired by seed against another variant."""
    values = [_measures(job) for job in jobs]
    others = [_measures(all_jobs[study.against, seed]) for seed in means.seeds]
    row: dict[str, Any] = {
        "runs": [str(job.plan.folder.relative_to(means.folder)) for job in jobs],
        "validation": [find(job.plan.folder).metrics["mean"] for job in jobs],
        "accuracy": {name: _spread([value[name] for value in values]) for name in values[0]},
        "difference": {
            name: _spread([value[name] - other[name] for value, other in zip(values, others, strict=True)])
            for name in values[0]
        },
    }
    if study.loads:
        row["loads"] = [_loads(job) for job in jobs]
    return row


def _measures(job: _Job) -> dict[str, float]:
    report = json.loads(_evaluation(job).read_bytes())
    accuracies = {name: report["conditions"][name]["accuracy"] for name in CONDITIONS}
    accuracies[AVERAGE] = report[AVERAGE]
    return accuracies | {name: part["accuracy"] for name, part in report.get("missing_rates", {}).items()}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (0 for one)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "values": list(values)}


def _loads(job: _Job) -> list[dict[str, float]]:
    """The router's mean weights by condition and source, epoch by epoch."""
    epochs = [line for line in lines(job.plan.folder / "metrics.jsonl") if line["kind"] == "epoch"]
    found = []
    for line in epochs:
        train = line["train"]
        assert isinstance(train, Mapping)
        found.append(
            {
                name.removeprefix("router/"): value
                for name, value in train.items()
                if name.startswith("router/")
            }
        )
    return found
