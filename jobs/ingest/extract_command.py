"""How `extract` shows itself: a bar on a terminal, plain lines elsewhere, an exit code that tells."""

import time
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.progress import Progress

from r2scp.jobs.console import absolute, default_workers, progress_bar, log
from r2scp.jobs.ingest.extract import Destination, ExtractReport, Source, run_extract
from r2scp.jobs.ingest.weights import DEMO_WEIGHTS
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.ray_session import Resources

LINE_EVERY_S = 30.0  # plain progress lines, where there is no terminal
ALL_FAILED = 3  # exit code: finished, but every input failed


def build_resources(
    num_workers: int | None,
    gpus_per_actor: float,
    ray_address: str | None,
    wheel: Path | None,
    ffmpeg: str | None,
) -> Resources:
    """The command line's options as `Resources`."""
    return Resources(
        num_workers=num_workers or default_workers(),
        gpus_per_actor=gpus_per_actor,
        ray_address=ray_address,
        wheel=str(absolute(wheel)) if wheel else None,
        ffmpeg=ffmpeg,
    )


class ProgressReporter:
    """Progress as it comes: to the bar, and now and then as a line where there is no terminal."""

    def __init__(self, bar: Progress, name: str = "extract") -> None:
        self._bar, self._name = bar, name
        self._task = bar.add_task(name, total=None, note="")
        self._started = self._said = time.monotonic()

    def __call__(self, report: ExtractReport, total: int) -> None:
        done = report.decoded
        present = time.monotonic()
        rate = done / max(present - self._started, 1e-9)
        note = f"{rate:.2f} clips/s, {report.dead - report.dead_before} failed"
        self._bar.update(self._task, total=total, completed=done, note=note)
        if self._bar.disable and (present - self._said > LINE_EVERY_S or done >= total):
            left = f", about {(total - done) / rate:.0f} s left" if rate and done < total else ""
            log(f"{self._name}: {done}/{total} clips, {note}{left}")
            self._said = present


def run_with_progress(
    source: Source, destination: Destination, encoder: EncoderSpec, means: Resources
) -> ExtractReport:
    """`run_extract`, seen on stderr; says what the demo encoder is not for."""
    for caution in _cautions(source, encoder):
        log(f"note: {caution}")
    with progress_bar() as bar:
        report = run_extract(source, destination, encoder, means, ProgressReporter(bar))
    for clip_id in report.gone_first:
        log(f"gone: {clip_id!a} is in the store, and its file or its annotation is no longer there")
    if not report.decoded:
        known = f", or knows why not ({report.dead_before} dead letters)" if report.dead_before else ""
        log(f"nothing to decode: the store holds all of it{known}")
    return report


def _cautions(source: Source, encoder: EncoderSpec) -> Iterator[str]:
    if Path(encoder.source).name == DEMO_WEIGHTS and source.corpus != "demo":
        yield "imagebind-demo knows generated clips only; its features of anything else mean little"
    if encoder.source.startswith("random:"):
        yield "random weights are for benchmarks; these features mean nothing"


def exit_if_all_failed(report: ExtractReport) -> None:
    """Exit 3 where there was something to do and all of it failed."""
    if report.inputs and report.dead == report.inputs:
        log(f"every one of {report.inputs} inputs failed; `r2scp-pipe failures` says why")
        raise typer.Exit(ALL_FAILED)
