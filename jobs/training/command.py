"""`train` and `evaluate` with progress on stderr, and the command line's options as their settings."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.markup import escape

from r2scp.jobs.console import absolute, default_workers, log, printable, progress_bar
from r2scp.jobs.ingest.encoders import pick_device
from r2scp.jobs.training.checkpoints import BEST, read_checkpoint
from r2scp.jobs.training.config import PRESETS, TrainConfig
from r2scp.jobs.training.data import answers_of
from r2scp.jobs.training.evaluate import EvaluateOptions, run_evaluate
from r2scp.jobs.training.evaluation_table import tables
from r2scp.jobs.training.run import TrainOptions, TrainPlan
from r2scp.jobs.training.with_baselines import OURS, train_with_baselines
from r2scp.model.config import Stage
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.ray_session import Resources
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import R2SCPError, UsageError
from r2scp.store.feature_store import FeatureStore

PLACEHOLDER_CLASSES = 2  # in a preset, until the store's answers are counted


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train: a preset, changes to its settings ("model.k=3"), and whether to train baselines too."""

    preset: str
    settings: tuple[str, ...] = ()
    seed: int = 1
    with_baselines: bool = True


def train_with_progress(
    store: FeatureStore, run: Path, request: TrainRequest, options: TrainOptions
) -> dict[str, object]:
    """Train a model and its baselines into a run's folder; a summary of the result."""
    folder = absolute(run)
    plan = plan_training(store, folder, request)
    trained = train_with_baselines(plan, options, log_epoch, request.with_baselines)
    best = trained[OURS]
    return {
        "run": str(folder),
        "validation": {name: checkpoint.metrics for name, checkpoint in trained.items()},
        "epoch": best.epoch,
        "step": best.step,
        "checkpoint": str(folder / f"{BEST}.json"),
        "try_next": shlex.join(["r2scp-pipe", "evaluate", str(run), "--store", store.uri]),
    }


def train_options(
    num_workers: int, device: str | None, ray_address: str | None, cores: int | None = None
) -> TrainOptions:
    """The command line's options as `TrainOptions`. `cores`: how many to use, all by default."""
    cores = cores or default_workers()
    return TrainOptions(
        num_workers=num_workers,
        device=pick_device(device),
        threads=max(1, cores // num_workers),
        resources=Resources(num_workers=max(cores, num_workers), ray_address=ray_address),
    )


def plan_training(store: FeatureStore, folder: Path, request: TrainRequest) -> TrainPlan:
    """The requested training on the latest store version. Raises `UsageError`, `StoreError`."""
    if request.preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}; got {request.preset!r}")
    if any(setting.partition("=")[0] == "seed" for setting in request.settings):
        raise UsageError("--set must not name the seed; use --seed (--first-seed for several seeds)")
    pins = Pins.latest(store)
    preset = PRESETS[request.preset]
    draft = with_settings(preset(store.dim, PLACEHOLDER_CLASSES), request.settings)
    answers = answers_of(store, pins, draft)
    classes = None if answers is None else len(answers)
    config = with_settings(preset(store.dim, classes), request.settings)
    if config.model.classes != classes:
        raise UsageError(
            f"model.classes must be {classes}, the number of answers of the train split, or null if each "
            f"question has its own choices; got {config.model.classes}"
        )
    if config.model.encoder_dim != store.dim:
        raise UsageError(
            f"model.encoder_dim must be {store.dim}, the width of the store's encoder; got "
            f"{config.model.encoder_dim}"
        )
    return TrainPlan(
        uri=store.uri,
        fingerprint=store.fingerprint,
        pins=pins,
        config=replace(config, seed=request.seed),
        answers=answers,
        folder=folder,
        storage_options=store.storage_options,
    )


def with_settings(config: TrainConfig, settings: tuple[str, ...]) -> TrainConfig:
    """A config with some values replaced: "model.k=3", "stage_two.epochs=10", "retrieval=paired".

    Values that do not parse as JSON are strings. Raises `UsageError` for unknown settings and invalid values.
    """
    values = json.loads(json.dumps(config.to_json()))
    for setting in settings:
        path, equals, text = setting.partition("=")
        *parents, name = path.split(".")
        place: object = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, Mapping) else None
        if not equals or not isinstance(place, dict) or name not in place:
            known = ", ".join(place if isinstance(place, dict) else values)
            raise UsageError(
                f"--set must be SETTING=VALUE with a setting that exists; got {setting!r}; known: {known}"
            )
        try:
            place[name] = json.loads(text)
        except ValueError:
            place[name] = text
    return TrainConfig.from_json(values)


def log_epoch(name: str, values: Mapping[str, object]) -> None:
    """One line on stderr per epoch."""
    validation, train = values["validation"], values["train"]
    assert isinstance(validation, Mapping)
    assert isinstance(train, Mapping)
    shown = "  ".join(f"{key} {100 * number:.1f}" for key, number in validation.items() if key != "mean")
    log(
        f"{name}: stage {'I' if values['stage'] == Stage.EXPERTS else 'II'}, "
        f"epoch {values['epoch']}/{values['of']}, loss {train['loss']:.3f}, validation {shown} %, "
        f"{values['seconds']:.1f} s"
    )


def evaluate_with_progress(
    store: FeatureStore, run: Path, options: EvaluateOptions, as_json: bool
) -> dict[str, Any]:
    """`run_evaluate` with progress on stderr; saves the report, prints its tables unless `as_json`."""
    with progress_bar() as bar:
        tasks: dict[str, int] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(escape(printable(label)), total=total, note="questions")
            bar.update(tasks[label], completed=done)  # pyright: ignore[reportArgumentType]

        report = run_evaluate(store, absolute(run), replace(options, on_progress=show))
    if report["trained_on"] != store.uri:
        log(f"note: the run was trained on the store at {printable(str(report['trained_on']))}")
    if not as_json:
        Console().print(tables(report))
    name = f"evaluation-{quote(options.split, safe='')}{'-latest' if options.latest else ''}.json"
    path = read_checkpoint(absolute(run)).folder / name
    try:
        replace_file(path, (json.dumps(report, indent=1) + "\n").encode())
        log(f"Saved to {path}")
    except R2SCPError as error:  # a read-only run
        log(f"not saved: {error}")
    return report
