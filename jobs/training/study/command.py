"""`study` with progress on stderr, and the command line's options as its settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from r2scp.jobs.console import absolute, default_workers, log
from r2scp.jobs.ingest.encoders import pick_device
from r2scp.jobs.training.command import TrainRequest, plan_training
from r2scp.jobs.training.study.definitions import study_of
from r2scp.jobs.training.study.run import StudyOptions, run_study
from r2scp.jobs.training.study.table import markdown, tables
from r2scp.pipelines.ray_session import Resources
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import UsageError
from r2scp.store.feature_store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class StudyResources:
    """Machines for the trainings of a study, which run in parallel."""

    num_workers: int | None
    gpus_per_training: float
    device: str | None
    ray_address: str | None


def study_with_progress(
    store: FeatureStore,
    name: str,
    folder: Path,
    request: TrainRequest,
    seeds: int,
    split: str,
    resources: StudyResources,
) -> dict[str, Any]:
    """`run_study` with progress on stderr; saves the tables as `NAME.md` beside `NAME.json`."""
    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1; got {seeds}")
    folder = absolute(folder)
    plan = plan_training(store, folder, request)
    corpora = tuple(sorted(set(store.clips(["corpus"], version=plan.pins.clips)["corpus"].to_pylist())))
    study = study_of(name, plan.config, corpora)
    device = pick_device(resources.device)
    options = StudyOptions(
        plan=plan,
        folder=folder,
        seeds=tuple(range(request.seed, request.seed + seeds)),
        split=split,
        device=device,
        gpus=resources.gpus_per_training if device == "cuda" else 0.0,
        resources=Resources(
            num_workers=resources.num_workers or default_workers(), ray_address=resources.ray_address
        ),
        log=log,
    )
    report = run_study(name, study, options)
    text = markdown(report)
    replace_file(folder / f"{name}.md", text.encode())
    log(f"Saved to {folder / name}.json and .md")
    return report | {"markdown": text}


def show(report: dict[str, Any]) -> None:
    """The tables, on stdout."""
    Console(markup=False, highlight=False, emoji=False).print(tables(report))
