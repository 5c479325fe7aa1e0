"""Commands that make or read a training run: `train`, `evaluate`, `study`, `answer`, `report`."""

from pathlib import Path
from typing import Annotated

import typer

from r2scp.jobs.cli.options import (
    DEFAULT_STORE,
    AtOption,
    BankAtOption,
    DeviceOption,
    FfmpegOption,
    FingerprintOption,
    JsonOption,
    NumWorkersOption,
    PresetOption,
    RayAddressOption,
    ReportSplitOption,
    RunOption,
    RunStoreOption,
    SeedOption,
    SettingsOption,
    StorageOption,
    StoreEncoderOption,
    StoreOption,
    WeightsOption,
    open_store,
    storage_options,
)
from r2scp.jobs.console import default_workers, exit_on_error, print_result


def train(
    run: Annotated[Path, typer.Argument(help="Folder of the run; run the same command again to resume.")],
    preset: PresetOption = "demo",
    change: SettingsOption = None,
    seed: SeedOption = 1,
    baselines: Annotated[bool, typer.Option(help="Also train the baselines for evaluate.")] = True,
    num_workers: Annotated[int, typer.Option(min=1, help="Number of processes that train one model.")] = 1,
    ray_address: RayAddressOption = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train both stages from the store. Experts first, then purification, router and heads."""
    with exit_on_error():
        from r2scp.jobs.training.command import TrainRequest, train_options, train_with_progress

        opened = open_store(store, fingerprint, storage_option, at)
        request = TrainRequest(
            preset=preset, settings=tuple(change or ()), seed=seed, with_baselines=baselines
        )
        options = train_options(num_workers, device, ray_address)
        print_result(train_with_progress(opened, run, request, options), as_json)


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    split: ReportSplitOption = "test",
    missing_rates: Annotated[
        bool, typer.Option("--missing-rates", help="Also drop each modality at rates of 30, 50 and 70 %.")
    ] = False,
    latest: Annotated[
        bool, typer.Option("--latest", help="Use the latest store version, not the one trained on.")
    ] = False,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy with sound only, picture only and both. Compares with the baselines."""
    with exit_on_error():
        from r2scp.jobs.ingest.encoders import pick_device
        from r2scp.jobs.training.command import evaluate_with_progress
        from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions

        opened = open_store(store, fingerprint, storage_option)
        rates = MISSING_RATES if missing_rates else ()
        options = EvaluateOptions(split=split, latest=latest, rates=rates, device=pick_device(device))
        report = evaluate_with_progress(opened, run, options, as_json)
        if as_json:
            print_result(report, as_json)


def study(
    name: Annotated[
        str,
        typer.Argument(
            help="components, strategy, retrieval, bank, n, k, saliency, rank, missing-rate or loads."
        ),
    ],
    folder: Annotated[Path, typer.Option(help="Folder for trainings and results, shared by studies.")] = Path(
        "studies"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings per variant.")] = 3,
    preset: PresetOption = "demo",
    change: SettingsOption = None,
    first_seed: Annotated[int, typer.Option(min=0, help="First random seed; the others follow it.")] = 1,
    split: ReportSplitOption = "test",
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Number of parallel trainings on CPUs (default: all cores).")
    ] = None,
    gpus_per_training: Annotated[float, typer.Option(min=0.01, help="GPU share per training.")] = 1.0,
    ray_address: RayAddressOption = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train variants with several seeds and compare them. Run the same command again to resume."""
    with exit_on_error():
        from r2scp.jobs.training.command import TrainRequest
        from r2scp.jobs.training.study.command import StudyResources, show, study_with_progress

        opened = open_store(store, fingerprint, storage_option, at)
        request = TrainRequest(preset=preset, settings=tuple(change or ()), seed=first_seed)
        resources = StudyResources(
            num_workers=num_workers,
            gpus_per_training=gpus_per_training,
            device=device,
            ray_address=ray_address,
        )
        report = study_with_progress(opened, name, folder, request, seeds, split, resources)
        print_result(report, as_json) if as_json else show(report)


def answer(
    run: RunOption,
    video: Annotated[str, typer.Argument(help="Media file, damaged or not.")] = "",
    question: Annotated[str, typer.Argument(help="The question.")] = "",
    missing: Annotated[
        str,
        typer.Option(help="audio or visual: ignore it; auto: detect; none: use silence and blank pictures."),
    ] = "auto",
    choice: Annotated[list[str] | None, typer.Option(help="A possible answer. Repeatable.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also show the evidence.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the evidence.")] = None,
    batch: Annotated[
        bool,
        typer.Option("--batch", help='Read JSON lines, {"video": ..., "question": ...}; write JSON lines.'),
    ] = False,
    top: Annotated[int, typer.Option(min=0, help="Show the N best answers; 0 for all.")] = 5,
    encoder: StoreEncoderOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    num_workers: NumWorkersOption = None,
    ffmpeg: FfmpegOption = None,
    store: RunStoreOption = None,
    fingerprint: FingerprintOption = None,
    at: BankAtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about a recording. Its sound or picture may be missing."""
    with exit_on_error("finished answers are written; pending files are decoded to their end"):
        from r2scp.jobs.answer.answerer import AnswerOptions
        from r2scp.jobs.answer.command import Output, answer_batch, answer_one, open_answerer
        from r2scp.jobs.answer.records import Request

        workers = num_workers or default_workers()
        options = AnswerOptions(
            encoder=encoder, weights=weights, device=device, at=at, workers=workers, ffmpeg=ffmpeg
        )
        output = Output(explain=explain, as_json=as_json, html=html, top=top)
        request = Request(video=video, question=question, missing=missing, choices=tuple(choice or ()))
        output.check(request, batch)
        answerer = open_answerer(run, store, fingerprint, storage_options(storage_option), options)
        answer_batch(answerer, top) if batch else answer_one(answerer, request, output)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, compared side by side.")],
    studies: Annotated[Path | None, typer.Option(help="Folder of `study`, for n and k (Fig. 4).")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for figures as PNG and SVG.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page (default: RUN/report.html).")] = None,
    gallery: Annotated[int, typer.Option(min=0, help="Number of questions shown with evidence.")] = 12,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    store: RunStoreOption = None,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a page about one or more runs. Accuracy, training, retrieval, answered questions, the store."""
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
