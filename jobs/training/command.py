"""How `train` and `evaluate` show themselves, and the command line's options as their settings."""

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

PLACEHOLDER_CLASSES = 2  # what a preset is told before the store was asked


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train: a preset, settings of it to change ("model.k=3"), and whether its baselines too."""

    preset: str
    settings: tuple[str, ...] = ()
    seed: int = 1
    with_baselines: bool = True


def train_with_progress(
    store: FeatureStore, run: Path, wanted: TrainRequest, means: TrainOptions
) -> dict[str, object]:
    """Train a model and its baselines into a run's folder, seen on stderr; what came out."""
    folder = absolute(run)
    plan = plan_training(store, folder, wanted)
    trained = train_with_baselines(plan, means, log_epoch, wanted.with_baselines)
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
    """The command line's options as `TrainOptions`. `cores`: to use; all by default."""
    cores = cores or default_workers()
    return TrainOptions(
        num_workers=num_workers,
        device=pick_device(device),
        threads=max(1, cores // num_workers),
        resources=Resources(num_workers=max(cores, num_workers), ray_address=ray_address),
    )


def plan_training(store: FeatureStore, folder: Path, wanted: TrainRequest) -> TrainPlan:
    """The training that is asked for, on the store as it is now. Raises `UsageError`, `StoreError`."""
    if wanted.preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}; got {wanted.preset!r}")
    if any(setting.partition("=")[0] == "seed" for setting in wanted.settings):
        raise UsageError("--set does not reach the seed; --seed does (--first-seed where there are several)")
    pins = Pins.latest(store)
    preset = PRESETS[wanted.preset]
    draft = changed(preset(store.dim, PLACEHOLDER_CLASSES), wanted.settings)
    answers = answers_of(store, pins, draft)
    classes = None if answers is None else len(answers)
    config = changed(preset(store.dim, classes), wanted.settings)
    if config.model.classes != classes:
        raise UsageError(
            f"model.classes must be {classes}, the answers of the train split, or null where questions bring "
            f"their choices; got {config.model.classes}"
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
        config=replace(config, seed=wanted.seed),
        answers=answers,
        folder=folder,
        storage_options=store.storage_options,
    )


def changed(config: TrainConfig, settings: tuple[str, ...]) -> TrainConfig:
    """A config with some values replaced: "model.k=3", "stage_two.epochs=10", "retrieval=paired".

    Values are JSON where they parse as such, text otherwise. Raises `UsageError` for a setting that does not
    exist or cannot be so.
    """
    values = json.loads(json.dumps(config.to_json()))
    for setting in settings:
        path, equals, text = setting.partition("=")
        *parents, name = path.split(".")
        place: object = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, Mapping) else None
        if not equals or not isinstance(place, dict) or name not in place:
            there = ", ".join(place) if isinstance(place, dict) else ", ".join(values)
            raise UsageError(
                f"--set must be SETTING=VALUE with a setting that exists; got {setting!r}; there is: {there}"
            )
        try:
            place[name] = json.loads(text)
        except ValueError:
            place[name] = text
    return TrainConfig.from_json(values)


def log_epoch(name: str, values: Mapping[str, object]) -> None:
    """One line on stderr for each epoch."""
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
    store: FeatureStore, run: Path, means: EvaluateOptions, as_json: bool
) -> dict[str, Any]:
    """`run_evaluate`, seen on stderr, its tables on stdout unless JSON is wanted there; kept in the run."""
    with progress_bar() as bar:
        tasks: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(escape(printable(what)), total=total, note="questions")
            bar.update(tasks[what], completed=done)  # pyright: ignore[reportArgumentType]

        report = run_evaluate(store, absolute(run), replace(means, progress=show))
    if report["trained_on"] != store.uri:
        log(f"note: it was trained on the store at {printable(str(report['trained_on']))}")
    if not as_json:
        Console().print(tables(report))
    name = f"evaluation-{quote(means.split, safe='')}{'-latest' if means.latest else ''}.json"
    kept = read_checkpoint(absolute(run)).folder / name
    try:
        replace_file(kept, (json.dumps(report, indent=1) + "\n").encode())
        log(f"kept in {kept}")
    except R2SCPError as error:  # a run of somebody else's
        log(f"not kept: {error}")
    return report
