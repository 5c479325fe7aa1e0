"""How `extract` shows its progress: a bar on a terminal, plain lines elsewhere, an exit code."""

import time
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.progress import Progress

from r2scp.jobs.console import absolute, default_workers, log, progress_bar
from r2scp.jobs.ingest.extract import MAX_LISTED_GONE, Destination, ExtractReport, Source, run_extract
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
    """Progress as a bar on a terminal; elsewhere as a line every `LINE_EVERY_S`."""

    def __init__(self, bar: Progress, name: str = "extract") -> None:
        self._bar, self._name = bar, name
        self._task = bar.add_task(name, total=None, note="")
        self._started = self._logged_at = time.monotonic()

    def __call__(self, report: ExtractReport, total: int) -> None:
        done = report.decoded
        now = time.monotonic()
        rate = done / max(now - self._started, 1e-9)
        note = f"{rate:.2f} clips/s, {report.reasons.total()} failed"
        self._bar.update(self._task, total=total, completed=done, note=note)
        if self._bar.disable and (now - self._logged_at > LINE_EVERY_S or done >= total):
            left = f", about {(total - done) / rate:.0f} s left" if rate and done < total else ""
            log(f"{self._name}: {done}/{total} clips, {note}{left}")
            self._logged_at = now


def run_with_progress(
    source: Source, destination: Destination, encoder: EncoderSpec, resources: Resources
) -> ExtractReport:
    """`run_extract` with progress on stderr, and a warning where the features will not be meaningful."""
    for warning in _warnings(source, encoder):
        log(f"note: {warning}")
    with progress_bar() as bar:
        report = run_extract(source, destination, encoder, resources, ProgressReporter(bar))
    for clip_id in report.plan.gone[:MAX_LISTED_GONE]:
        log(f"gone: {clip_id!a} is in the store, but its file or its annotation no longer exists")
    if not report.decoded:
        failed = f" or failed before ({count})" if (count := report.plan.already_failed) else ""
        log(f"nothing to decode: all clips are already in the store{failed}")
    return report


def _warnings(source: Source, encoder: EncoderSpec) -> Iterator[str]:
    if Path(encoder.source).name == DEMO_WEIGHTS and source.corpus != "demo":
        yield "imagebind-demo knows generated clips only; results on real videos are not meaningful"
    if encoder.source.startswith("random:"):
        yield "random weights are for benchmarks; these features are not meaningful"


def exit_if_all_failed(report: ExtractReport) -> None:
    """Exit 3 where there was something to do and all of it failed."""
    if report.inputs and report.failed == report.inputs:
        log(f"all {report.inputs} inputs failed; `r2scp-pipe failures` lists the reasons")
        raise typer.Exit(ALL_FAILED)
