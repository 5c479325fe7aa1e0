"""`demo`: the whole journey on the generated corpus, from making videos to a report of what came of it."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from r2scp.jobs.console import absolute, default_workers, log
from r2scp.jobs.ingest.encoders import encoder_spec, pick_device
from r2scp.jobs.ingest.extract import Destination, Source
from r2scp.jobs.ingest.extract_command import run_with_progress
from r2scp.jobs.ingest.index_command import Scope, index_with_progress
from r2scp.jobs.report.builder import ReportRequest
from r2scp.jobs.report.run import report_with_progress
from r2scp.jobs.training.command import TrainRequest, evaluate_with_progress, train_options, train_with_progress
from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions
from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.pipelines.ray_session import Resources
from r2scp.store.commits import sql_literal
from r2scp.store.feature_store import FeatureStore
from r2scp.store.search.bank import HITS

STEPS = 6


@dataclass(frozen=True, kw_only=True)
class DemoWanted:
    """Which corpus, and what to do it with. `settings` of the preset `demo` to change, as for `train`."""

    folder: Path
    clips: int
    seed: int
    num_workers: int | None
    settings: tuple[str, ...] = ()
    as_json: bool = False


def run_demo(wanted: DemoWanted) -> dict[str, object]:
    """Generate, extract, index, train, evaluate, report; what came out, and the seconds of each."""
    workers = wanted.num_workers or default_workers()
    which = f"{wanted.clips}-seed{wanted.seed}"  # clips of another corpus have the same names
    folder = absolute(wanted.folder)
    corpus, uri, run = folder / f"corpus-{which}", str(folder / f"store-{which}"), folder / f"run-{which}"
    clock = _Clock()
    log(f"1/{STEPS} generating {wanted.clips} clips with their questions in {corpus}")
    generated = generate(corpus, clips=wanted.clips, seed=wanted.seed, workers=workers)
    clock.done("generate", f"{generated.written} written, {generated.questions} questions")
    log(f"2/{STEPS} extracting them into {uri}")
    encoder = encoder_spec("imagebind-demo", None, pick_device(None))
    extracted = run_with_progress(
        Source("demo", corpus), Destination(uri), encoder, Resources(num_workers=workers)
    )
    clock.done(
        "extract", f"{extracted.stored} stored, {extracted.unchanged} unchanged, {extracted.dead} dead"
    )
    store = FeatureStore.open(uri, encoder.fingerprint)
    log(f"3/{STEPS} finding each clip's neighbours in the memory bank")
    scope = Scope([], list(IndexSettings().bank.splits), [])
    index = index_with_progress(store, None, scope, HITS, IndexSettings().cross_weight, leak_guard=True)
    clock.done("index", f"{index['searched']} searches among {index['bank_clips']} clips")
    log(f"4/{STEPS} training experts, then the model and what it must beat, in {run}")
    asked = TrainRequest(preset="demo", settings=wanted.settings)
    trained = train_with_progress(store, run, asked, train_options(1, None, None, workers))
    clock.done("train", f"best after epoch {trained['epoch']}")
    log(f"5/{STEPS} asking the test split's questions with sound alone, picture alone and both")
    means = EvaluateOptions(rates=MISSING_RATES, device=pick_device(None))
    evaluation = evaluate_with_progress(store, run, means, wanted.as_json)
    clock.done("evaluate", f"{100 * evaluation['average']:.1f} % on average")
    log(f"6/{STEPS} writing a report of it")
    report = report_with_progress(ReportRequest(runs=(run,), store=uri), None)
    clock.done("report", str(report["report"]))
    ended: dict[str, object] = {
        "seconds": clock.seconds,
        "store": uri,
        "run": str(run),
        "report": report["report"],
        "try_next": _question(store, run),
    }
    if not wanted.as_json:  # the tables are on the screen already
        return ended
    counts = ("inputs", "stored", "unchanged", "dead", "decoded")
    told = {name: evaluation[name] for name in ("conditions", "average", "baselines")}
    return ended | told | {"extract": {name: getattr(extracted, name) for name in counts}}


def _question(store: FeatureStore, run: Path) -> str:
    """A command that answers a question about a clip as if its sound were lost."""
    asked = store.questions(["clip_id", "question"], "split = 'test'").slice(0, 1).to_pylist()
    if not asked:
        return shlex.join(["r2scp-pipe", "status", "--store", store.uri])
    clip = store.clips(["uri"], f"clip_id = {sql_literal(asked[0]['clip_id'])}")["uri"][0].as_py()
    words = ["r2scp-pipe", "answer", "--run", str(run), clip, asked[0]["question"]]
    return shlex.join([*words, "--missing", "audio", "--explain"])


class _Clock:
    """Seconds of each step, told as it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def done(self, step: str, what: str) -> None:
        now = time.monotonic()
        self.seconds[step] = round(now - self._since, 1)
        self._since = now
        log(f"    {what}, {self.seconds[step]:.1f} s")
