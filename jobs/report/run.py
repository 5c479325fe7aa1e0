"""`report`: the results of one run or several, on one self-contained page.

Everything is read from the run folders, the results of studies, and the store. A part that cannot be shown
says why, and which command makes it. The test split is never evaluated here.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from r2scp.jobs.console import absolute, console, log, printable
from r2scp.jobs.html.render import page
from r2scp.jobs.ingest.encoders import pick_device
from r2scp.jobs.report.builder import OnProgress, ReportBuilder, ReportRequest
from r2scp.jobs.report.facts.run_folder import read_runs
from r2scp.jobs.report.figures.style import write_images
from r2scp.jobs.report.internals import add_gallery, add_joint_vectors, add_retrieval
from r2scp.jobs.report.provenance import provenance_section
from r2scp.jobs.report.results import add_accuracy, add_studies, add_training
from r2scp.jobs.report.store import store_section
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import R2SCPError, UsageError
from r2scp.store.feature_store import FeatureStore


def report_with_progress(request: ReportRequest, device: str | None) -> dict[str, object]:
    """`run_report` with paths made absolute, and progress and missing parts on stderr."""
    request = replace(
        request,
        runs=tuple(absolute(run) for run in request.runs),
        out=absolute(request.out) if request.out else None,
        figures=absolute(request.figures) if request.figures else None,
        studies=absolute(request.studies) if request.studies else None,
        device=pick_device(device),
        command_words=_command_words(request),
    )
    report = run_report(request, _log_section)
    missing = report["missing"]
    assert isinstance(missing, list)
    for part in missing:
        make = f"; to make it: {part['make']}" if part["make"] else ""
        log(printable(f"not included: {part['what']}: {part['why']}{make}"))
    log(printable(f"Saved to {report['report']}"))
    return report


def run_report(request: ReportRequest, on_progress: OnProgress = lambda _: None) -> dict[str, object]:
    """Write the page, and the figures if requested; returns what was written and what is missing.

    Raises `UsageError` for no runs, `CheckpointError` for a folder that is not a run, `StoreError` for a
    named store that does not exist.
    """
    if not request.runs:
        raise UsageError("a report needs at least one run; got none")
    if request.gallery < 0:
        raise UsageError(f"--gallery must be at least 0; got {request.gallery}")
    started = time.monotonic()
    runs = read_runs(request.runs, request.store)
    builder = ReportBuilder(request=request, on_progress=on_progress, runs=runs)
    builder.store, builder.store_error = _open_store(builder)
    add_accuracy(builder)
    add_training(builder)
    add_studies(builder)
    add_joint_vectors(builder)
    add_retrieval(builder)
    add_gallery(builder)
    with builder.section("store", "The store") as section:
        contents = store_section(builder.require_store())
        section.blocks, section.figures = contents.blocks, contents.figures
    _add_provenance(builder)
    return _write(builder, started)


def summary(report: dict[str, object]) -> dict[str, object]:
    """The lines printed on stdout."""
    bytes_, seconds = report["bytes"], report["seconds"]
    assert isinstance(bytes_, int)
    assert isinstance(seconds, dict)
    figures, missing, copies = (report[name] for name in ("figures", "missing", "copies"))
    assert isinstance(figures, list)
    assert isinstance(missing, list)
    assert isinstance(copies, list)
    return {
        "report": report["report"],
        "size": f"{bytes_ / 1e6:.1f} MB",
        "figures": len(figures),
        "copies": len(copies),
        "missing": len(missing),
        "seconds": seconds["all"],
    }


def _open_store(builder: ReportBuilder) -> tuple[FeatureStore | None, str]:
    """The store, or None and the reason. Raises only for a store that was named."""
    request = builder.request
    if request.store is not None:
        return FeatureStore.open(request.store, request.fingerprint, request.storage_options), ""
    checkpoint = next((run.checkpoint for run in builder.runs if run.checkpoint), None)
    if checkpoint is None:
        return None, "no run records which store it was trained on"
    uri, encoder = str(checkpoint.store["uri"]), str(checkpoint.store["fingerprint"])
    try:
        return FeatureStore.open(uri, request.fingerprint or encoder, request.storage_options), ""
    except R2SCPError as error:
        return None, str(error)


def _add_provenance(builder: ReportBuilder) -> None:
    with builder.section("provenance", "Provenance") as section:
        section.blocks = provenance_section(builder.runs, builder.request.command_words).blocks
        if builder.missing:
            section.add_heading("Not included in this report")
            headings = {section.name: section.heading for section in builder.sections}
            rows = [
                [part.what, headings.get(part.section, part.section), part.why, part.make or None]
                for part in builder.missing
            ]
            section.add_table("Missing", ["what", "section", "why", "command that makes it"], rows)


def _write(builder: ReportBuilder, started: float) -> dict[str, object]:
    request, sections = builder.request, builder.sections
    out = request.out or builder.runs[0].folder / "report.html"
    html = page(
        "report.html",
        {
            "title": f"Report of {', '.join(run.name for run in builder.runs)}",
            "lede": _headline(builder),
            "links": [(section.name, section.heading) for section in sections],
            "sections": sections,
        },
    ).encode()
    replace_file(out, html)
    figures = [figure for section in sections for figure in section.figures]
    images: list[Path] = []
    if request.figures is not None:
        images_started = time.monotonic()
        images = [path for figure in figures for path in write_images(figure, request.figures)]
        builder.seconds["copies"] = round(time.monotonic() - images_started, 2)
    return {
        "report": str(out),
        "bytes": len(html),
        "runs": [str(run.folder) for run in builder.runs],
        "sections": [section.name for section in sections],
        "figures": [figure.name for figure in figures],
        "copies": [str(path) for path in images],
        "missing": [asdict(part) for part in builder.missing],
        "seconds": builder.seconds | {"all": round(time.monotonic() - started, 2)},
    }


def _headline(builder: ReportBuilder) -> str:
    """The main numbers of each run, in a sentence."""
    parts = []
    for run in builder.runs:
        if run.evaluation and len(run.evaluation.models) > 1:
            ours, best, *_ = run.evaluation.models
            parts.append(
                f"{run.name}: {100 * ours.average:.1f} % on average over sound only, picture only and both, "
                f"compared with {100 * best.average:.1f} % for the best baseline ({best.name}), "
                f"{run.evaluation.n:,} questions"
            )
    return "; ".join(parts) + "." if parts else "Not evaluated yet."


def _log_section(heading: str) -> None:
    if console.is_terminal:
        log(f"report: {heading}")


def _command_words(request: ReportRequest) -> tuple[str, ...]:
    """The command line that makes this report."""
    words: list[str] = ["report", *map(str, request.runs)]
    options: Sequence[tuple[str, str | Path | None]] = (
        ("--store", request.store),
        ("--fingerprint", request.fingerprint),
        ("--studies", request.studies),
        ("--figures", request.figures),
        ("--out", request.out),
        ("--gallery", str(request.gallery)),
        ("--weights", request.weights),
    )
    return tuple(
        words + [word for name, value in options if value is not None for word in (name, str(value))]
    )
