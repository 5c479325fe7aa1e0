"""`train`: both stages, purely from the store. The only file that knows `ray.train`.

One worker runs in this process, without Ray's help. Several are Ray's: it starts them, joins them (gloo on
CPUs, NCCL on GPUs), and starts them anew when one dies; they then go on from the run's `last` checkpoint.
The run's folder must be one that all of them see.
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

from r2scp.jobs.training.checkpoints import EXPERTS, Checkpoint, code_version, read_last, read_checkpoint
from r2scp.jobs.training.config import TrainConfig
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.log import read_metrics
from r2scp.jobs.training.loop import Training, Where
from r2scp.jobs.training.stages import Worker
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import CheckpointError, R2SCPError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.token_cache import CACHE_BYTES

MAX_FAILURES = 3  # of the group of workers, before a training gives up
POLL_S = 0.5  # how often the driver looks at what distant workers wrote


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One run, whole: what a worker needs to know. Versions and answers are settled by the driver."""

    uri: str
    fingerprint: str
    pins: Pins
    config: TrainConfig
    answers: list[str] | None
    folder: Path
    experts: Path | None = None  # take stage I from this run
    storage_options: Mapping[str, str] = field(default_factory=dict, repr=False)
    cache_bytes: int = CACHE_BYTES


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a training may use. `num_workers` 1: this process; `threads`: of each worker, on CPUs."""

    num_workers: int = 1
    device: str = "cpu"
    threads: int | None = None
    max_failures: int = MAX_FAILURES
    resources: Resources = field(default_factory=Resources)


OnEpoch = Callable[[dict[str, object]], None]  # an epoch's line of metrics.jsonl


def run_training(plan: TrainPlan, options: TrainOptions, on_epoch: OnEpoch) -> Checkpoint:
    """Train, or go on training, into `plan.folder`; the best checkpoint.

    A folder that holds a finished training is left as it is. Raises `CheckpointError` where it holds a
    training of other settings, `StoreError` where the store lacks what is needed, `UsageError` for means
    that are not there, `KeyboardInterrupt` where it was stopped: the same call goes on.
    """
    if options.num_workers < 1:
        raise UsageError(f"a training needs at least 1 worker; got {options.num_workers}")
    folder = plan.folder.absolute()  # Ray's workers run in folders of their own
    experts = None if plan.experts is None else plan.experts.absolute()
    plan = replace(plan, folder=folder, experts=experts)
    last = read_last(folder)
    if last is not None:
        plan = _going_on(plan, last)
        if last.finished:
            return read_checkpoint(folder)
    if options.num_workers == 1 and options.threads:
        torch.set_num_threads(options.threads)
    # here also where others will train: what cannot be is said at once, and by one
    training = _training(plan, Worker(device=torch.device(options.device)), on_epoch)
    plan = replace(plan, uri=training.opened.store.uri)
    document = {"config": plan.config.to_json(), "store": plan.uri, "versions": asdict(plan.pins)}
    with _alone(folder):
        replace_file(folder / "config.json", (json.dumps(document, indent=1) + "\n").encode())
        if options.num_workers == 1:
            training.run()
        else:
            del training
            _train_on_ray(plan, options, on_epoch)
        return read_checkpoint(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run's folder until this one is over, or its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / "lock").open("ab")
    except OSError as error:
        raise R2SCPError(f"cannot write into {folder}: {error.strerror}") from error
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process is training into {folder}; wait for it, or stop it") from error
        yield


def _going_on(plan: TrainPlan, last: Checkpoint) -> TrainPlan:
    """The plan with the versions and answers of the training that it goes on with."""
    config, again = last.config, plan.config
    if None not in (config.model.classes, again.model.classes):  # there may be new answers since
        again = replace(again, model=replace(again.model, classes=config.model.classes))
    other = config.differences(again)
    if last.store["fingerprint"] != plan.fingerprint:
        other.append(f"encoder: {last.store['fingerprint']}, {plan.fingerprint}")
    if last.experts != ("" if plan.experts is None else read_checkpoint(plan.experts, EXPERTS).sha256):
        other.append("the experts that stage II begins with")
    if other:
        raise CheckpointError(
            f"{plan.folder} holds a training with other settings (there, here): {'; '.join(other)}; give the "
            "same ones to go on with it, or another folder for a new one"
        )
    versions = last.store["versions"]
    assert isinstance(versions, dict)
    return replace(plan, config=config, pins=Pins(**versions), answers=last.answers)


def _training(plan: TrainPlan, worker: Worker, told: OnEpoch) -> Training:
    store = FeatureStore.open(plan.uri, plan.fingerprint, plan.storage_options)
    opened = TrainingData.read(store, plan.pins, plan.config, plan.answers, plan.cache_bytes)
    where = Where(folder=plan.folder, experts=plan.experts, code=code_version(), told=told)
    return Training(opened, where, worker)


def _train_on_ray(plan: TrainPlan, means: TrainOptions, told: OnEpoch) -> None:
    trainer = TorchTrainer(
        _in_worker,
        train_loop_config={"plan": plan, "threads": means.threads},
        scaling_config=ScalingConfig(num_workers=means.num_workers, use_gpu=means.device == "cuda"),
        run_config=RunConfig(
            name="ray",
            storage_path=str(plan.folder),
            failure_config=FailureConfig(max_failures=means.max_failures),
        ),
    )
    with ray_session(means.resources), MetricsTail(plan.folder / "metrics.jsonl", told), _own_interrupts():
        _require_room(means)
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _told_plainly(error) from error
        except RayActorError as error:
            said = str(error).strip().splitlines()[0]
            raise R2SCPError(f"Ray's controller of it died ({said}); train again to go on") from error


def _require_room(means: TrainOptions) -> None:
    """Ray would wait for ever for a core or a GPU that it has not."""
    kind = "GPU" if means.device == "cuda" else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if means.num_workers > there:
        raise UsageError(f"{means.num_workers} workers need a {kind} each; Ray has {there}")


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Ray puts a handler of ctrl-C in place of ours, ends the workers by it, exits with 0, and leaves it."""
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
    # The driver reads of each epoch in metrics.jsonl; a report to Ray would wait up to 2 s for its next look.
    _training(settings["plan"], worker, lambda values: None).run()


def _told_plainly(error: ray.train.TrainingFailedError) -> R2SCPError:
    """What went wrong in the workers, as one line."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = sorted({str(cause).strip().splitlines()[-1] for cause in failures})
    return R2SCPError(f"training failed in {len(failures)} workers: {'; '.join(causes)}")


class MetricsTail:
    """Tells of each epoch that workers write down, as long as it is entered."""

    def __init__(self, path: Path, told: OnEpoch) -> None:
        self._path, self._told = path, told
        self._seen = len(self._epochs())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-metrics", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(POLL_S):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        epochs = self._epochs()
        for values in epochs[self._seen :]:
            self._told(values)
        self._seen = len(epochs)  # fewer after a restart: what was lost is told again

    def _epochs(self) -> list[dict[str, object]]:
        return [line for line in read_metrics(self._path) if line["kind"] == "epoch"]
