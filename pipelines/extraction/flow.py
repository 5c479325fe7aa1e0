"""The flow of an extraction: a list of stages, run by Ray Data. The only file that knows `ray.data`.

    sources -> decode (tasks, one core each) -> embed (actors that keep the encoder) -> stage -> driver

Frames travel as uint8 through Ray's object store; when it fills up, Ray stops starting decode tasks until
the actors have caught up, so memory is bounded whatever the corpus's size.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from r2scp.pipelines.extraction.embed import EmbedClips, EncoderSpec
from r2scp.pipelines.extraction.stages import DecodeClips, Provenance, StageRows
from r2scp.pipelines.ray_session import Resources
from r2scp.store.commits import TableAddress
from r2scp.store.errors import R2SCPError, StoreError

CORES_PER_EMBED_ACTOR = 4  # on machines without a GPU; each actor holds a copy of the encoder
TASKS_PER_CORE = 8  # at least, so that no core waits long for the last task
STORE_RETRIES = 3  # of a stage whose write failed
STORE_ERROR = re.compile(r"^r2scp\.store\.errors\.StoreError: (.+)$", re.MULTILINE)
FRAGMENTS_PER_RUN = 32  # about as many commits in small runs
ROWS_PER_FRAGMENT = (8, 64)  # least and most: what a crash can cost in embedding work
CPU_SHARE = 0.01  # cores that an actor or a stage task requests from Ray
DECODE_SHARE = 0.95  # cores that a decode task requests: a node of one core fits it beside an actor


def extract(
    sources: pa.Table,
    encoder: EncoderSpec,
    tables: tuple[TableAddress, TableAddress],
    provenance: Provenance,
    resources: Resources,
) -> Iterator[dict]:
    """Run extraction; one dict per staged batch of rows (see `StageRows`), as they come.

    `sources`: rows of `SOURCE_SCHEMA`. `tables`: `clips` and `failures`. Needs a `ray_session`.
    """
    _configure_ray_data()
    cores, actors, threads, gpu_share = _allocate(encoder, resources)
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
            num_gpus=gpu_share,
        )
        .map_batches(
            stage.__call__,
            batch_size=_clamp(rows // FRAGMENTS_PER_RUN, *ROWS_PER_FRAGMENT),
            batch_format="pyarrow",
            # Without a bound Ray keeps half of the remaining cores for this stage, and decoding waits.
            compute=TaskPoolStrategy(size=cores),
            num_cpus=CPU_SHARE,
        )
    )
    with ray_errors():
        yield from staged.iter_rows()


def _configure_ray_data() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.retried_map_errors, context.max_map_retries = ["StoreError"], STORE_RETRIES
    # In small runs the last stage has fewer inputs than there are cores.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)


def _allocate(encoder: EncoderSpec, resources: Resources) -> tuple[int, int, int, float | None]:
    """Cores of the cluster, number of embed actors, threads of each, GPUs of each (None: on the CPU)."""
    cluster = ray.cluster_resources()
    cores = int(cluster.get("CPU", 1))
    gpus = cluster.get("GPU", 0.0) if encoder.device == "cuda" else 0.0
    if gpus:
        return cores, max(1, int(gpus / resources.gpus_per_actor)), 1, resources.gpus_per_actor
    return cores, max(1, cores // CORES_PER_EMBED_ACTOR), _clamp(cores, 1, CORES_PER_EMBED_ACTOR), None


@contextlib.contextmanager
def ray_errors() -> Iterator[None]:
    """Turn errors of the store or the machines, which are not faults of the code, into one clear line.

    Raises `StoreError` or `R2SCPError`. Ray passes on the exception of a worker as text.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if match := STORE_ERROR.search(str(error)):
            raise StoreError(match[1]) from error
        raise
    except ray.exceptions.RayError as error:
        message = str(error).strip().splitlines()[0]
        raise R2SCPError(
            f"extraction lost too many machines or processes ({message}); what was committed stays: run the "
            "same command again to resume"
        ) from error


def clips_per_task(rows: int, cores: int, batch: int) -> int:
    """Clips per decode task: a divisor of a batch, at most a whole batch.

    So whole blocks make up a batch: before Ray cuts a block it copies it, with all its frames.
    """
    most = max(1, rows // (TASKS_PER_CORE * cores))
    return next(count for count in range(min(most, batch), 0, -1) if batch % count == 0)


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)
