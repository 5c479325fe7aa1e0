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
TASKS_PER_CORE = 8  # in small runs, so that no core waits long for the last task
STORE_RETRIES = 3  # of a stage that the store did not take
STORE_ERROR = re.compile(r"^r2scp\.store\.errors\.StoreError: (.+)$", re.MULTILINE)
FRAGMENTS_PER_RUN = 32  # small runs commit in about so many steps
ROWS_PER_FRAGMENT = (8, 64)  # least and most: what a crash can cost in embedding work
CPU_SHARE = 0.01  # what an actor or a stage task asks of Ray
DECODE_SHARE = 0.95  # and a decode task: a node of one core has room for it beside an actor


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
    with ray_errors():
        yield from staged.iter_rows()


@contextlib.contextmanager
def ray_errors() -> Iterator[None]:
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
