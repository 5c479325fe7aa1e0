"""A Ray to run on, and independent tasks side by side on it."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import ray
import ray.exceptions

from r2scp.pipelines.decoding.decode import DecodeLimits
from r2scp.store.errors import R2SCPError, UsageError

OBJECT_STORE_BYTES = 2 << 30  # of a local Ray; about 1,300 decoded 10 s clips
MAX_RETRIES = 3  # of a task whose process ended

Item = TypeVar("Item")
Result = TypeVar("Result")

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning about it
    "OMP_WAIT_POLICY": "PASSIVE",  # torch's waiting threads leave the core to decoding
    # Stages take turns; by default a worker is killed after a second without work and has to start again.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it warns of actors' arguments, which live as long as the flow
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a flow may use. `num_workers`: cores to decode on; None: all of them."""

    num_workers: int | None = None
    gpus_per_actor: float = 1.0  # fractions let several actors share a GPU
    ray_address: str | None = None  # None: a local Ray that lives as long as the run
    wheel: str | None = None  # r2scp-pipe's wheel, for clusters where it is not installed
    clips_per_batch: int = 8  # that are embedded together
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    ffmpeg: str | None = None


@contextlib.contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """A Ray to run flows on: a cluster where an address is given, else a local one shut down at the end.

    A Ray that is already initialised is used as it is.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray's own programs are started by fork and exec; nothing of Lance runs between the two.
    warnings.filterwarnings("ignore", message="lance is not fork-safe", category=UserWarning)
    warnings.filterwarnings("ignore", message="lancedb fork support", category=RuntimeWarning)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    with _quiet_stderr():
        if resources.ray_address:
            wheel = {"py_modules": [resources.wheel]} if resources.wheel else None
            try:
                ray.init(
                    resources.ray_address, runtime_env=wheel, log_to_driver=False, logging_level=logging.ERROR
                )
            except ConnectionError as error:
                raise UsageError(
                    f"--ray-address {resources.ray_address} cannot be reached ({error}); leave it out to run "
                    "on this machine alone"
                ) from error
        else:
            try:
                ray.init(num_cpus=resources.num_workers, object_store_memory=OBJECT_STORE_BYTES, **quiet)
            except Exception as error:  # Ray raises errors of many kinds
                message = " ".join(str(error).split())
                raise R2SCPError(f"Ray did not start on this machine ({message}); run it again") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors come as exceptions
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray's threads report lost nodes
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide what Ray's C++ prints at start-up; its errors are raised as exceptions."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def fan_out(
    function: Callable[[Item], Result], items: Sequence[Item], *, cpus: float = 1.0, gpus: float = 0.0
) -> Iterator[tuple[int, Result]]:
    """Run `function(item)` as one task per item; yields (index of the item, result) as they end.

    A task whose process ends early is run again, at most `MAX_RETRIES` times. What a task raises is raised
    here, and the remaining tasks are cancelled. Needs a `ray_session`.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=MAX_RETRIES)(function)
    running = {task.remote(item): index for index, item in enumerate(items)}
    try:
        while running:
            for done in ray.wait(list(running), num_returns=1)[0]:
                index = running.pop(done)
                try:
                    yield index, ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, R2SCPError):
                        raise error.cause from None
                    raise
                except ray.exceptions.RayError as error:
                    message = str(error).strip().splitlines()[0]
                    raise R2SCPError(
                        f"the process of a task died {1 + MAX_RETRIES} times, perhaps for lack of memory; "
                        f"use fewer --num-workers ({message})"
                    ) from error
    finally:
        for remaining in running:
            ray.cancel(remaining, force=True)
