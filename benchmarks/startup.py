"""How long a command takes before it does anything: `python -m benchmarks.startup --help`.

Whole processes, from start to end. *Python alone* starts and ends, which is part of every command. `status`
runs on a store of 200,000 clips (a tenth of them with --short) without features, which it does not read. For
comparison: importing our packages, and those of the alternatives.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from benchmarks.contest import Grade, Report, Row, Sheet, Spread, contest, ratios, run
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import now
from r2scp.store.schema import Table

CLIPS, SHORT_CLIPS = 200_000, 20_000
HELP_GOAL_S, STATUS_GOAL_S = 0.5, 1.5
ALONE, HELP, STATUS = "Python alone", "r2scp-pipe --help", "r2scp-pipe status"
PACKAGES = ("r2scp.store.feature_store", "lance", "torch", "ray.data", "daft", "pixeltable")


def fill(folder: Path, clips: int) -> str:
    """Creates a store of rows without features; returns its address."""
    store = FeatureStore.create(str(folder / "store"), "benchmark", 8)
    schema = store.address(Table.CLIPS).schema
    known = {
        "clip_id": [f"folder/{number:07}" for number in range(clips)],
        "corpus": ["folder"] * clips,
        "split": ["train" if number % 5 else "test" for number in range(clips)],
        "visual_status": ["present"] * clips,
        "audio_status": ["partial" if number % 9 == 0 else "present" for number in range(clips)],
        "ingested_at": [now()] * clips,
    }
    columns = [pa.array(known.get(field.name, [None] * clips), field.type) for field in schema]
    store.commit(Table.CLIPS, [store.stage(Table.CLIPS, pa.Table.from_arrays(columns, schema=schema))], {})
    return store.uri


def command(*arguments: str) -> Callable[[], object]:
    """Runs Python with these arguments. Raises RuntimeError with the last line of stderr if that fails."""
    return partial(_run, [sys.executable, *arguments])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])


def benchmark(options: argparse.Namespace) -> Report:
    """Runs every process in turn, round after round."""
    clips = SHORT_CLIPS if options.short else CLIPS
    with tempfile.TemporaryDirectory(prefix="r2scp-startup-") as folder:
        uri = fill(Path(folder), clips)
        ours = ("-m", "r2scp.jobs")
        contenders = {
            ALONE: command("-c", "pass"),
            HELP: command(*ours, "--help"),
            STATUS: command(*ours, "status", "--store", uri),
        } | {f"import {name}": command("-c", f"import {name}") for name in PACKAGES}
        seconds = contest(contenders, options.rounds)
    alone = seconds[ALONE]
    rows = [
        Row(name=name, unable=taken)
        if isinstance(taken, str)
        else Row(name=name, figures={"s": Spread.of(taken), "of Python alone": ratios(taken, alone)})  # pyright: ignore[reportArgumentType]
        for name, taken in seconds.items()
    ]
    spent = {name: Spread.of(taken).median for name, taken in seconds.items() if not isinstance(taken, str)}
    grades = [
        Grade(what=f"{HELP}, s", goal=HELP_GOAL_S, reached=spent[HELP], at_most=True),
        Grade(
            what=f"{STATUS} of {clips:,} clips, s", goal=STATUS_GOAL_S, reached=spent[STATUS], at_most=True
        ),
    ]
    return Report(
        sheets=[Sheet(title="From the start of a process to its end", rows=rows)],
        grades=grades,
        settings={"clips in the store": clips},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return run("startup", __doc__ or "", lambda parser: None, benchmark, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
