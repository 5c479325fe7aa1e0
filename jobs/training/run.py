"""`train`: both stages, from the store alone. The only file that knows `ray.train`.

A single worker runs in this process, without Ray. Ray starts several workers, connects them (gloo on CPUs,
NCCL on GPUs) and restarts all of them when one dies; they then resume from the run's `last` checkpoint. The
run's folder must be one that all of them can reach.
"""

import fcntl
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from r2scp.jobs.training.checkpoints import EXPERTS, Checkpoint, code_version, read_checkpoint, read_last
from r2scp.jobs.training.config import TrainConfig
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.log import read_metrics
from r2scp.jobs.training.loop import RunContext, Training
from r2scp.jobs.training.stages import Worker
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import CheckpointError, R2SCPError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.token_cache import CACHE_BYTES

MAX_FAILURES = 3  # of the worker group, before a training fails
POLL_S = 0.5  # how often the driver reads what workers logged


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Everything a worker needs for a run. The driver determines versions and answers."""

    uri: str
    fingerprint: str
    pins: Pins
    config: TrainConfig
    answers: list[str] | None
    folder: Path
    experts: Path | None = None  # start stage II from this run's experts
    storage_options: Mapping[str, str] = field(default_factory=dict, repr=False)
    cache_bytes: int = CACHE_BYTES


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to run a training. `num_workers` 1: in this process; `threads`: per worker, on CPUs."""

    num_workers: int = 1
    device: str = "cpu"
    threads: int | None = None
    max_failures: int = MAX_FAILURES
    resources: Resources = field(default_factory=Resources)


OnEpoch = Callable[[dict[str, object]], None]  # an epoch's line of metrics.jsonl


def run_training(plan: TrainPlan, options: TrainOptions, on_epoch: OnEpoch) -> Checkpoint:
    """Start or resume a training in `plan.folder`; its best checkpoint.

    A finished training is left as it is. Raises `CheckpointError` if the folder holds a training with other
    settings, `StoreError` if the store lacks what is needed, `UsageError` for workers that Ray has no room
    for, `KeyboardInterrupt` if it was stopped: the same call resumes it.
    """
    if options.num_workers < 1:
        raise UsageError(f"a training needs at least 1 worker; got {options.num_workers}")
    folder = plan.folder.absolute()  # Ray's workers run in other folders
    experts = None if plan.experts is None else plan.experts.absolute()
    plan = replace(plan, folder=folder, experts=experts)
    last = read_last(folder)
    if last is not None:
        plan = _resumed(plan, last)
        if last.finished:
            return read_checkpoint(folder)
    if options.num_workers == 1 and options.threads:
        torch.set_num_threads(options.threads)
    # built here even if Ray's workers do the training, so that errors come before they start, and once
    training = _make_training(plan, Worker(device=torch.device(options.device)), on_epoch)
    plan = replace(plan, uri=training.data.store.uri)
    document = {"config": plan.config.to_json(), "store": plan.uri, "versions": asdict(plan.pins)}
    with _locked(folder):
        replace_file(folder / "config.json", (json.dumps(document, indent=1) + "\n").encode())
        if options.num_workers == 1:
            training.run()
        else:
            del training
            _train_on_ray(plan, options, on_epoch)
        return read_checkpoint(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder against other trainings, until this one or its process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("ab")
    except OSError as error:
        raise R2SCPError(f"cannot write into {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process is training in {folder}; wait for it, or stop it") from error
        yield


def _resumed(plan: TrainPlan, last: Checkpoint) -> TrainPlan:
    """`plan` with the versions and answers of the training it resumes."""
    config, requested = last.config, plan.config
    if None not in (config.model.classes, requested.model.classes):  # the store may have new answers
        requested = replace(requested, model=replace(requested.model, classes=config.model.classes))
    differences = config.differences(requested)
    if last.store["fingerprint"] != plan.fingerprint:
        differences.append(f"encoder: {last.store['fingerprint']}, {plan.fingerprint}")
    if last.experts != ("" if plan.experts is None else read_checkpoint(plan.experts, EXPERTS).sha256):
        differences.append("the experts that stage II starts from")
    if differences:
        raise CheckpointError(
            f"{plan.folder} holds a training with other settings (there, here): {'; '.join(differences)}; "
            "use the same settings to resume it, or another folder"
        )
    versions = last.store["versions"]
    assert isinstance(versions, dict)
    return replace(plan, config=config, pins=Pins(**versions), answers=last.answers)


def _make_training(plan: TrainPlan, worker: Worker, on_epoch: OnEpoch) -> Training:
    store = FeatureStore.open(plan.uri, plan.fingerprint, plan.storage_options)
    data = TrainingData.read(store, plan.pins, plan.config, plan.answers, plan.cache_bytes)
    context = RunContext(folder=plan.folder, experts=plan.experts, code=code_version(), on_epoch=on_epoch)
    return Training(data, context, worker)


def _train_on_ray(plan: TrainPlan, options: TrainOptions, on_epoch: OnEpoch) -> None:
    trainer = TorchTrainer(
        _in_worker,
        train_loop_config={"plan": plan, "threads": options.threads},
        scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=options.device == "cuda"),
        run_config=RunConfig(
            name="ray",
            storage_path=str(plan.folder),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )
    with (
        ray_session(options.resources),
        MetricsTail(plan.folder / "metrics.jsonl", on_epoch),
        _keep_interrupt_handler(),
    ):
        _require_capacity(options)
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _one_line_error(error) from error
        except RayActorError as error:
            reason = str(error).strip().splitlines()[0]
            raise R2SCPError(
                f"Ray's training controller died ({reason}); run the same command again to resume"
            ) from error


def _require_capacity(options: TrainOptions) -> None:
    """Raises `UsageError` for more workers than Ray has cores or GPUs: it would wait for them for ever."""
    kind = "GPU" if options.device == "cuda" else "CPU"
    available = int(ray.cluster_resources().get(kind, 0))
    if options.num_workers > available:
        raise UsageError(f"{options.num_workers} workers need a {kind} each; Ray has {available}")


@contextmanager
def _keep_interrupt_handler() -> Iterator[None]:
    """Undo what Ray does to ctrl-C: it installs a handler of its own, which exits with 0, and leaves it."""
    ours = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)


def _in_worker(settings: dict) -> None:
    context = ray.train.get_context()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    worker = Worker(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    # The driver reads epochs from metrics.jsonl: a report through Ray would take up to 2 s.
    _make_training(settings["plan"], worker, lambda values: None).run()


def _one_line_error(error: ray.train.TrainingFailedError) -> R2SCPError:
    """The workers' errors as one line."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = sorted({str(cause).strip().splitlines()[-1] for cause in failures})
    return R2SCPError(f"training failed in {len(failures)} workers: {'; '.join(causes)}")


class MetricsTail:
    """Calls `on_epoch` for each epoch that workers append to a `metrics.jsonl`, while entered."""

    def __init__(self, path: Path, on_epoch: OnEpoch) -> None:
        self._path, self._on_epoch = path, on_epoch
        self._seen = len(self._epochs())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-tail", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._report()
        self._report()

    def _report(self) -> None:
        epochs = self._epochs()
        for values in epochs[self._seen :]:
            self._on_epoch(values)
        self._seen = len(epochs)  # fewer after a restart: lost epochs are reported again

    def _epochs(self) -> list[dict[str, object]]:
        return [line for line in read_metrics(self._path) if line["kind"] == "epoch"]
