"""The flows: lists of stages, run by Ray Data, and tasks side by side. The only file that knows `ray.data`.

    sources -> decode (tasks, one core each) -> embed (actors that keep the encoder) -> stage -> driver

Frames travel as uint8 through Ray's object store; when it fills up, Ray stops starting decode tasks until
the actors have caught up, so memory is bounded whatever the corpus's size.
"""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from r2scp.pipelines.decode import DecodeLimits
from r2scp.pipelines.embed import EmbedClips, EncoderSpec
from r2scp.pipelines.stages import DecodeClips, Provenance, StageRows
from r2scp.store.errors import R2SCPError, StoreError, UsageError
from r2scp.store.transaction import TableAddress

OBJECT_STORE_BYTES = 2 << 30  # of a local Ray; about 1,300 decoded 10 s clips
CORES_PER_EMBED_ACTOR = 4  # on machines without a GPU; each actor holds a copy of the encoder
TASKS_PER_CORE = 8  # in small runs, so that no core waits long for the last task
MAX_RETRIES = 3  # of a task whose process died
STORE_RETRIES = 3  # of a stage that the store did not take
STORE_ERROR = re.compile(r"^r2scp\.store\.errors\.StoreError: (.+)$", re.MULTILINE)
FRAGMENTS_PER_RUN = 32  # small runs commit in about so many steps
ROWS_PER_FRAGMENT = (8, 64)  # least and most: what a crash can cost in embedding work
CPU_SHARE = 0.01  # what an actor or a stage task asks of Ray
DECODE_SHARE = 0.95  # and a decode task: a node of one core has room for it beside an actor


Item = TypeVar("Item")
Result = TypeVar("Result")

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning about it
    "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads, while they wait, leave the core to decoding
    # Stages take turns; after a second without work a worker would be killed, and be started anew later.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it warns of our actors' arguments, which live as long as the flow
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a flow may use. `num_workers`: cores to decode on; None: all there are."""

    num_workers: int | None = None
    gpus_per_actor: float = 1.0  # fractions let several actors share a GPU
    ray_address: str | None = None  # None: a local Ray that lives as long as the run
    wheel: str | None = None  # r2scp-pipe's wheel, for clusters where it is not installed
    clips_per_batch: int = 8  # that go through the towers together
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    ffmpeg: str | None = None


@contextlib.contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """A Ray to run flows on: a cluster where an address is given, else a local one shut down at the end.

    A Ray that the caller has started is used as it is.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray's own programs are started by fork and exec; nothing of Lance runs between the two.
    warnings.filterwarnings("ignore", message="lance is not fork-safe", category=UserWarning)
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
            except Exception as error:  # Ray's own words, of many kinds
                said = " ".join(str(error).split())
                raise R2SCPError(f"Ray did not start on this machine ({said}); run it again") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors come as exceptions
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray's threads tell of nodes that died
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep what Ray's C++ prints at start-up from the terminal; its errors come as exceptions."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def fan_out(
    function: Callable[[Item], Result], items: Sequence[Item], *, cpus: float = 1.0, gpus: float = 0.0
) -> Iterator[tuple[int, Result]]:
    """`function(item)` for each item as a task of its own; (number of the item, result) as they end.

    A task whose process dies is run again, `MAX_RETRIES` times at most. What a task raises is raised here,
    and the tasks that are left are cancelled. Needs a `ray_session`.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=MAX_RETRIES)(function)
    waiting = {task.remote(item): at for at, item in enumerate(items)}
    try:
        while waiting:
            for done in ray.wait(list(waiting), num_returns=1)[0]:
                at = waiting.pop(done)
                try:
                    yield at, ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, R2SCPError):
                        raise error.cause from None
                    raise
                except ray.exceptions.RayError as error:
                    said = str(error).strip().splitlines()[0]
                    raise R2SCPError(
                        f"the process of a task died {1 + MAX_RETRIES} times, for want of memory perhaps; "
                        f"give fewer --num-workers ({said})"
                    ) from error
    finally:
        for task_left in waiting:
            ray.cancel(task_left, force=True)


def extract(
    sources: pa.Table,
    encoder: EncoderSpec,
    tables: tuple[TableAddress, TableAddress],
    provenance: Provenance,
    resources: Resources,
) -> Iterator[dict]:
    """Run extraction; one dict for each staged batch of rows (see `StageRows`), as they come.

    `sources`: rows of `SOURCE_SCHEMA`. `tables`: `clips` and `failures`. Needs a `ray_session`.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    # Of small runs, whose writing stage has fewer inputs than there are cores.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)
    context.retried_map_errors, context.max_map_retries = ["StoreError"], STORE_RETRIES
    cores = int(ray.cluster_resources().get("CPU", 1))
    gpus = ray.cluster_resources().get("GPU", 0.0) if encoder.device == "cuda" else 0.0
    actors = max(1, int(gpus / resources.gpus_per_actor) if gpus else cores // CORES_PER_EMBED_ACTOR)
    threads = 1 if gpus else max(1, min(cores, CORES_PER_EMBED_ACTOR))
    decode = DecodeClips(resources.limits, resources.ffmpeg)
    stage = StageRows(*tables, provenance)
    rows = sources.num_rows
    per_task = clips_per_task(rows, cores, resources.clips_per_batch)
    staged = (
        ray.data.from_arrow([sources.slice(at, per_task) for at in range(0, rows, per_task)])
        .map_batches(decode.__call__, batch_size=None, batch_format="pyarrow", num_cpus=DECODE_SHARE)
        .map_batches(
            EmbedClips,
            fn_constructor_args=(encoder, threads),
            batch_size=resources.clips_per_batch,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=CPU_SHARE,
            num_gpus=resources.gpus_per_actor if gpus else None,
        )
        .map_batches(
            stage.__call__,
            batch_size=_between(ROWS_PER_FRAGMENT, rows // FRAGMENTS_PER_RUN),
            batch_format="pyarrow",
            # Without a bound Ray keeps half of the cores that are left for this stage, and decoding waits.
            compute=TaskPoolStrategy(size=cores),
            num_cpus=CPU_SHARE,
        )
    )
    with _told():
        yield from staged.iter_rows()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What comes of the store or the machines, not of our code, as one line: `StoreError`, `R2SCPError`.

    Ray brings an exception of a worker as text.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if found := STORE_ERROR.search(str(error)):
            raise StoreError(found[1]) from error
        raise
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[0]
        raise R2SCPError(
            f"the flow lost more machines or processes than it can stand ({said}); what was committed stays, "
            "run the same command again to go on"
        ) from error


def clips_per_task(rows: int, cores: int, batch: int) -> int:
    """How many clips one decode task goes through: a divisor of a batch, at most all of one.

    So whole blocks make up a batch. Of a block that must be cut Ray makes a copy first, with all its frames.
    """
    most = max(1, rows // (TASKS_PER_CORE * cores))
    return next(count for count in range(min(most, batch), 0, -1) if batch % count == 0)


def _between(bounds: tuple[int, int], value: int) -> int:
    return min(max(value, bounds[0]), bounds[1])
