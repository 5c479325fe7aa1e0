"""`demo`: the whole pipeline on a generated corpus, from making the videos to a report on the results."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from r2scp.jobs.console import absolute, default_workers, log
from r2scp.jobs.ingest.encoders import encoder_spec, pick_device
from r2scp.jobs.ingest.extract import Destination, Source
from r2scp.jobs.ingest.extract_command import run_with_progress
from r2scp.jobs.ingest.index_command import index_with_progress
from r2scp.jobs.report.builder import ReportRequest
from r2scp.jobs.report.run import report_with_progress
from r2scp.jobs.training.command import (
    TrainRequest,
    evaluate_with_progress,
    train_options,
    train_with_progress,
)
from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions
from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.pipelines.ray_session import Resources
from r2scp.store.commits import sql_literal
from r2scp.store.feature_store import FeatureStore

STEPS = 6


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    """Which corpus to generate, and how to train: `settings` change the preset `demo`, as for `train`."""

    folder: Path
    clips: int
    seed: int
    num_workers: int | None
    settings: tuple[str, ...] = ()
    as_json: bool = False


def run_demo(request: DemoRequest) -> dict[str, object]:
    """Generates, extracts, indexes, trains, evaluates, reports; the results, and the seconds of each step."""
    workers = request.num_workers or default_workers()
    name = f"{request.clips}-seed{request.seed}"  # the clips of every corpus have the same ids
    folder = absolute(request.folder)
    corpus, uri, run = folder / f"corpus-{name}", str(folder / f"store-{name}"), folder / f"run-{name}"
    steps = _Steps()
    steps.start(f"generating {request.clips} clips with their questions in {corpus}")
    generated = generate(corpus, clips=request.clips, seed=request.seed, workers=workers)
    steps.finish("generate", f"{generated.written} written, {generated.questions} questions")
    steps.start(f"extracting them into {uri}")
    encoder = encoder_spec("imagebind-demo", None, pick_device(None))
    extracted = run_with_progress(
        Source("demo", corpus), Destination(uri), encoder, Resources(num_workers=workers)
    )
    summary = f"{extracted.stored} stored, {extracted.unchanged} unchanged, {extracted.failed} failed"
    steps.finish("extract", summary)
    store = FeatureStore.open(uri, encoder.fingerprint)
    steps.start("finding the neighbours of each clip in the memory bank")
    index = index_with_progress(store, IndexSettings())
    steps.finish("index", f"{index['searched']} searches among {index['bank_clips']} clips")
    steps.start(f"training the experts, then the model and its baselines, in {run}")
    training = TrainRequest(preset="demo", settings=request.settings)
    trained = train_with_progress(store, run, training, train_options(1, None, None, workers))
    steps.finish("train", f"best after epoch {trained['epoch']}")
    steps.start("evaluating on the test split with sound alone, picture alone and both")
    options = EvaluateOptions(rates=MISSING_RATES, device=pick_device(None))
    evaluation = evaluate_with_progress(store, run, options, request.as_json)
    steps.finish("evaluate", f"{100 * evaluation['average']:.1f} % on average")
    steps.start("writing a report")
    report = report_with_progress(ReportRequest(runs=(run,), store=uri), None)
    steps.finish("report", str(report["report"]))
    result: dict[str, object] = {"seconds": steps.seconds, "store": uri, "run": str(run)}
    result |= {"report": report["report"], "try_next": _example_command(store, run)}
    if not request.as_json:  # the tables are on the screen already
        return result
    counts = ("inputs", "stored", "unchanged", "dead", "decoded")
    result |= {key: evaluation[key] for key in ("conditions", "average", "baselines")}
    return result | {"extract": {name: extracted.to_json()[name] for name in counts}}


def _example_command(store: FeatureStore, run: Path) -> str:
    """A command that answers a question about a clip as if its sound were missing."""
    questions = store.questions(["clip_id", "question"], "split = 'test'").slice(0, 1).to_pylist()
    if not questions:
        return shlex.join(["r2scp-pipe", "status", "--store", store.uri])
    clip = store.clips(["uri"], f"clip_id = {sql_literal(questions[0]['clip_id'])}")["uri"][0].as_py()
    command = ["r2scp-pipe", "answer", "--run", str(run), clip, questions[0]["question"]]
    return shlex.join([*command, "--missing", "audio", "--explain"])


class _Steps:
    """Logs the beginning and the end of each step, and takes its seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def start(self, message: str) -> None:
        self._started = time.monotonic()
        log(f"{len(self.seconds) + 1}/{STEPS} {message}")

    def finish(self, step: str, summary: str) -> None:
        self.seconds[step] = round(time.monotonic() - self._started, 1)
        log(f"    {summary}, {self.seconds[step]:.1f} s")
