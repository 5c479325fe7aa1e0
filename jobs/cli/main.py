"""The command line. Each command's module is imported inside the command, so that --help is quick."""

from pathlib import Path
from typing import Annotated

import typer

from r2scp.jobs.cli.jobs import jobs_app
from r2scp.jobs.cli.store import store_app
from r2scp.jobs.console import (
    DEFAULT_STORE,
    AtOption,
    DeviceOption,
    EncoderName,
    EncoderOption,
    FingerprintOption,
    JsonOption,
    StorageOption,
    StoreOption,
    WeightsOption,
    print_result,
    exit_on_error,
    storage_options,
)

ChangeOption = Annotated[
    list[str] | None, typer.Option("--set", help="SETTING=VALUE, such as model.k=3. Repeatable.")
]

app = typer.Typer(
    name="r2scp-pipe",
    help="Features of videos into a store, and answers about recordings whose sound or picture is missing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(jobs_app, name="jobs")
app.add_typer(store_app, name="store")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the generated corpus and its store go.")] = Path("demo"),
    clips: Annotated[int, typer.Option(min=1, help="How many clips of 10 s to generate.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Which corpus: the same seed, the same clips.")] = 7,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Cores to use; all by default.")] = None,
    change: ChangeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The whole journey: generate mp4 files, extract, index, train, answer with a modality missing."""
    with exit_on_error():
        from r2scp.jobs.demo.run import DemoWanted, run_demo

        wanted = DemoWanted(
            folder=folder,
            clips=clips,
            seed=seed,
            num_workers=num_workers,
            settings=tuple(change or ()),
            as_json=as_json,
        )
        print_result(run_demo(wanted), as_json)


@app.command()
def extract(
    corpus: Annotated[str, typer.Option(help="vggsound, music-avqa, avqa, folder or demo.")],
    root: Annotated[Path, typer.Option(help="The folder that holds the media, at any depth.")],
    annotations: Annotated[
        list[Path] | None, typer.Option(help="Annotation file, or folder of them. Repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of rows that name none.")] = "",
    name: Annotated[str, typer.Option(help="What its clips' ids begin with; the corpus's by default.")] = "",
    encoder: EncoderOption = EncoderName.HUGE,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many clips.")] = None,
    retry_failed: Annotated[bool, typer.Option(help="Try dead letters of untouched files again.")] = False,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Cores to decode on; all by default.")
    ] = None,
    gpus_per_actor: Annotated[float, typer.Option(min=0.01, help="GPU share of one embedding actor.")] = 1.0,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster; a local Ray by default.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="Our wheel, for clusters that lack it.")] = None,
    ffmpeg: Annotated[str | None, typer.Option(help="Another ffmpeg than the one that comes along.")] = None,
    store: StoreOption = DEFAULT_STORE,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decode a corpus's videos, embed them with ImageBind, and store what the store does not hold yet."""
    with exit_on_error():
        from r2scp.jobs.ingest.encoders import encoder_spec, pick_device
        from r2scp.jobs.ingest.extract import Destination, Source
        from r2scp.jobs.ingest.extract_command import exit_if_all_failed, build_resources, run_with_progress

        paths = tuple(annotations or ())
        source = Source(corpus, root, paths, split, limit, retry_failed, name=name)
        spec = encoder_spec(encoder, weights, pick_device(device))
        means = build_resources(num_workers, gpus_per_actor, ray_address, wheel, ffmpeg)
        report = run_with_progress(source, Destination(store, storage_options(storage_option)), spec, means)
        print_result(report.to_json(), as_json)
        exit_if_all_failed(report)


@app.command()
def index(
    retrieval: Annotated[
        list[str] | None, typer.Option(help="cross, paired or hybrid; all by default. Repeatable.")
    ] = None,
    bank_corpus: Annotated[
        list[str] | None, typer.Option(help="Only clips of this corpus may serve. Repeatable.")
    ] = None,
    bank_split: Annotated[
        list[str] | None, typer.Option(help="Clips of this split may serve; train by default. Repeatable.")
    ] = None,
    disjoint: Annotated[
        bool, typer.Option("--disjoint", help="Split by source: no video is in two splits.")
    ] = False,
    query_corpus: Annotated[
        list[str] | None, typer.Option(help="Only clips of this corpus get neighbours. Repeatable.")
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="How many nearest, and how many farthest.")] = 15,
    cross_weight: Annotated[float, typer.Option(min=0, max=1, help="Weight of cross in hybrid.")] = 0.5,
    leak_guard: Annotated[bool, typer.Option(help="Never a hit of the clip's own source.")] = True,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find each clip's neighbours in the memory bank, for each modality that may be missing."""
    with exit_on_error():
        from r2scp.jobs.ingest.index_command import Scope, index_with_progress
        from r2scp.store.feature_store import FeatureStore

        opened = FeatureStore.open(store, fingerprint, storage_options(storage_option))
        scope = Scope(bank_corpus or [], bank_split or ["train"], query_corpus or [], disjoint)
        print_result(index_with_progress(opened, retrieval, scope, neighbours, cross_weight, leak_guard), as_json)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="Folder of the run; the same again goes on where it stopped.")],
    preset: Annotated[str, typer.Option(help="demo, paper_music_avqa or paper_avqa.")] = "demo",
    change: ChangeOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything left to chance.")] = 1,
    baselines: Annotated[bool, typer.Option(help="Also train what evaluate compares with.")] = True,
    num_workers: Annotated[int, typer.Option(min=1, help="Processes that train one model together.")] = 1,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster; a local Ray by default.")] = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train both stages from the store: experts first, then purification, router and heads."""
    with exit_on_error():
        from r2scp.jobs.training.command import TrainRequest, train_options, train_with_progress
        from r2scp.store.feature_store import FeatureStore

        opened = FeatureStore.open(store, fingerprint, storage_options(storage_option))
        opened = opened.at(at) if at else opened
        wanted = TrainRequest(preset=preset, settings=tuple(change or ()), seed=seed, with_baselines=baselines)
        means = train_options(num_workers, device, ray_address)
        print_result(train_with_progress(opened, run, wanted, means), as_json)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run that `train` made.")],
    split: Annotated[str, typer.Option(help="The test split is meant to be read once.")] = "test",
    missing_rates: Annotated[
        bool, typer.Option("--missing-rates", help="Also lose each modality at 30, 50 and 70 %.")
    ] = False,
    latest: Annotated[
        bool, typer.Option("--latest", help="The store as it is now, not as the training read it.")
    ] = False,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy with sound alone, picture alone and both, beside the baselines."""
    with exit_on_error():
        from r2scp.jobs.ingest.encoders import pick_device
        from r2scp.jobs.training.command import evaluate_with_progress
        from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions
        from r2scp.store.feature_store import FeatureStore

        opened = FeatureStore.open(store, fingerprint, storage_options(storage_option))
        rates = MISSING_RATES if missing_rates else ()
        means = EvaluateOptions(split=split, latest=latest, rates=rates, device=pick_device(device))
        report = evaluate_with_progress(opened, run, means, as_json)
        if as_json:
            print_result(report, as_json)


@app.command()
def answer(
    run: Annotated[Path, typer.Option(help="Folder of a run that `train` made.", show_default=False)],
    video: Annotated[str, typer.Argument(help="A media file, damaged or not.")] = "",
    question: Annotated[str, typer.Argument(help="What you want to know.")] = "",
    missing: Annotated[
        str,
        typer.Option(
            help="audio or visual: do without it; none: silence and blank pictures count; auto finds out."
        ),
    ] = "auto",
    choice: Annotated[list[str] | None, typer.Option(help="One of the answers. Repeatable.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also what the answer rests on.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also a page with all of it, and pictures.")] = None,
    batch: Annotated[
        bool,
        typer.Option("--batch", help='JSON lines in, {"video": ..., "question": ...}, JSON lines out.'),
    ] = False,
    top: Annotated[int, typer.Option(min=0, help="So many answers, best first; 0 for all.")] = 5,
    encoder: Annotated[
        EncoderName | None, typer.Option(help="Which ImageBind; the one that filled the store by default.")
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Files decoded at a time.")] = None,
    ffmpeg: Annotated[str | None, typer.Option(help="Another ffmpeg than the one that comes along.")] = None,
    store: Annotated[
        str | None,
        typer.Option(envvar="R2SCP_STORE", help="The store; by default the one that the model learned from."),
    ] = None,
    fingerprint: FingerprintOption = None,
    at: Annotated[
        str | None, typer.Option(help="Snapshot whose bank is searched; serving by default.")
    ] = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about a recording of which sound or picture may be missing, and say why so."""
    with exit_on_error("what was answered is written; files that are being decoded come to their end"):
        from r2scp.jobs.answer.command import Means, TrainRequest, answer_batch, answer_one, open_answerer
        from r2scp.jobs.answer.records import Request

        means = Means(encoder, weights, device, at, num_workers, ffmpeg)
        wanted = TrainRequest(explain=explain, as_json=as_json, html=html, top=top)
        ask = Request(video=video, question=question, missing=missing, choices=tuple(choice or ()))
        wanted.require(ask, batch)
        answerer = open_answerer(run, store, fingerprint, storage_options(storage_option), means)
        answer_batch(answerer, top) if batch else answer_one(answerer, ask, wanted)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folder of a run; several stand side by side.")],
    studies: Annotated[Path | None, typer.Option(help="Folder of `study`, for n and k (Fig. 4).")] = None,
    figures: Annotated[Path | None, typer.Option(help="A folder for a PNG and an SVG of each.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html by default.")] = None,
    gallery: Annotated[int, typer.Option(min=0, help="Questions to show with their evidence.")] = 12,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    store: Annotated[
        str | None,
        typer.Option(envvar="R2SCP_STORE", help="The store; by default the one that RUN learned from."),
    ] = None,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """One page of a run, or several: accuracy, training, retrieval, answered questions, the store."""
    with exit_on_error():
        from r2scp.jobs.report.run import ReportRequest, report_with_progress, summary

        request = ReportRequest(
            runs=tuple(runs),
            store=store,
            fingerprint=fingerprint,
            storage_options=storage_options(storage_option),
            studies=studies,
            out=out,
            figures=figures,
            gallery=gallery,
            weights=weights,
        )
        page = report_with_progress(request, device)
        print_result(page if as_json else summary(page), as_json)


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="components, strategy, retrieval, bank, n, k, saliency, rank, missing-rate or loads."
        ),
    ],
    folder: Annotated[Path, typer.Option(help="Where trainings and results go; shared by studies.")] = Path(
        "studies"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of each variant.")] = 3,
    preset: Annotated[str, typer.Option(help="demo, paper_music_avqa or paper_avqa.")] = "demo",
    change: ChangeOption = None,
    first_seed: Annotated[int, typer.Option(min=0, help="Seeds count up from here.")] = 1,
    split: Annotated[str, typer.Option(help="What is told: test, or val while you still choose.")] = "test",
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Trainings side by side on CPUs; all cores by default.")
    ] = None,
    gpus_per_training: Annotated[float, typer.Option(min=0.01, help="GPU share of one training.")] = 1.0,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster; a local Ray by default.")] = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train variants of the method with several seeds and compare them; goes on where it stopped."""
    with exit_on_error():
        from r2scp.jobs.training.command import TrainRequest
        from r2scp.jobs.training.study.command import Machines, show, study_with_progress
        from r2scp.store.feature_store import FeatureStore

        opened = FeatureStore.open(store, fingerprint, storage_options(storage_option))
        opened = opened.at(at) if at else opened
        wanted = TrainRequest(preset=preset, settings=tuple(change or ()), seed=first_seed)
        machines = Machines(
            num_workers=num_workers,
            gpus_per_training=gpus_per_training,
            device=device,
            ray_address=ray_address,
        )
        report = study_with_progress(opened, name, folder, wanted, seeds, split, machines)
        print_result(report, as_json) if as_json else show(report)


@app.command()
def status(
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in the store: clips, statuses, questions, failures, versions, tags."""
    with exit_on_error():
        from r2scp.store.feature_store import FeatureStore

        print_result(FeatureStore.open(store, fingerprint, storage_options(storage_option)).status(), as_json)


@app.command()
def failures(
    reason: Annotated[str | None, typer.Option(help="Only dead letters of this reason.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many rows.")] = 100,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what could not be stored, and why."""
    with exit_on_error():
        from r2scp.jobs.inspect.failures import show_failures
        from r2scp.store.feature_store import FeatureStore

        opened = FeatureStore.open(store, fingerprint, storage_options(storage_option))
        show_failures(opened, reason, limit, as_json)


@app.command()
def weights(
    encoder: Annotated[EncoderName, typer.Argument(help="Which ImageBind.")],
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="You accept CC BY-NC-SA 4.0 (not for commercial use).")
    ] = False,
    dest: Annotated[Path | None, typer.Option(help="Where to; $R2SCP_HOME or ~/.cache/r2scp.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch the published ImageBind checkpoint (4.8 GB), resuming and checking its hash."""
    with exit_on_error():
        from r2scp.jobs.ingest.weights_command import fetch_with_progress

        print_result(fetch_with_progress(encoder, accept_license, dest), as_json)


@app.command()
def doctor(
    store: StoreOption = DEFAULT_STORE,
    storage_option: StorageOption = None,
    ffmpeg: Annotated[str | None, typer.Option(help="Another ffmpeg than the one that comes along.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check what is needed: packages, ffmpeg, devices, weights, the store; exit 1 where something lacks."""
    with exit_on_error():
        from r2scp.jobs.cli.doctor import examine

        findings, sound = examine(store, storage_options(storage_option), ffmpeg)
        print_result(findings, as_json)
        raise typer.Exit(0 if sound else 1)
