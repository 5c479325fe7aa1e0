"""Memory of a process that reads an epoch: `python -m benchmarks.training.memory STORE CACHE_BYTES BATCHES`.

Prints one JSON object: bytes when all is imported and opened, and the most and the last of the epoch. *Own*
is what would be free if the process ended (private pages); *resident* counts shared pages and mapped files
too.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import psutil

from benchmarks.contest import Row
from benchmarks.training.site import SEED, open_dataset
from benchmarks.training.store import Scale, fill
from r2scp.pipelines.batches.dataset import NO_MODALITY, BatchRequest
from r2scp.pipelines.batches.prefetch import prefetch, shuffled_batches
from r2scp.store.feature_store import FeatureStore
from r2scp.store.token_cache import CACHE_BYTES

SHARES = (10, 3, 1)  # of the store: a tenth, a third, all
SMALL_CACHE = 256 << 20  # bytes
ALL, FEW = 1 << 30, 60  # batches that are read; with the small cache most of each comes from the table
MIB = 1 << 20


def memory_rows(folder: Path, scale: Scale, short: bool) -> list[Row]:
    """A process for each size of store; the largest also with a small cache. `short`: only the extremes.

    Stores of other sizes go into `folder`.
    """
    rows = []
    for share in SHARES[::2] if short else SHARES:
        part = Scale.of(scale.clips // share)
        uri = fill(folder / f"one in {share}" if share > 1 else folder, part).uri
        for cache in (CACHE_BYTES, SMALL_CACHE) if share == 1 and not short else (CACHE_BYTES,):
            batches = FEW if cache == SMALL_CACHE else ALL
            words = [sys.executable, "-m", "benchmarks.training.memory", uri, str(cache), str(batches)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            size = part.feature_bytes / MIB
            name = f"{part.clips:,} clips, {size:,.0f} MiB, cache of at most {cache / MIB:,.0f} MiB"
            rows.append(Row(name=name, figures=figures))
    return rows


def main(uri: str, cache_bytes: int, most: int) -> dict[str, float]:
    """Read one epoch of stage II's batches."""
    dataset = open_dataset(FeatureStore.open(uri), cache_bytes)[1]
    process, own = psutil.Process(), []
    opened = process.memory_full_info().uss
    batches = shuffled_batches(len(dataset.examples), 64, SEED)[:most]
    started = process.cpu_times()
    for at, _ in enumerate(prefetch(lambda rows: dataset.batch(rows, ask(len(rows))), batches)):
        if at % 8 == 0:
            own.append(process.memory_full_info().uss)
    ended, last = process.cpu_times(), process.memory_full_info()
    seconds = ended.user + ended.system - started.user - started.system
    return {
        "opened, own, MiB": opened / MIB,
        "most, own": max(own) / MIB,
        "most, resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB,
        "shared at the end": (last.rss - last.uss) / MIB,
        "cache": dataset.cache.bytes / MIB,
        "CPU ms a question": 1e3 * seconds / sum(map(len, batches)),
    }


def ask(count: int) -> BatchRequest:
    """Stage II's, with experts that learn: the most that a batch holds."""
    return BatchRequest.uniform(count, NO_MODALITY + 1, hide=False, farthest=True)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
