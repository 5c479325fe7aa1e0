"""`report`: what a run, or several, came to, as one page that needs nothing beside it.

Everything is read from the run's folder, the studies' results and the store. A part that cannot be made says
why and which command makes it; the test split is never asked here.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from r2scp.jobs.console import absolute, console, printable, log
from r2scp.jobs.html.render import page
from r2scp.jobs.ingest.encoders import pick_device
from r2scp.jobs.report.builder import Making, ReportWanted, Told
from r2scp.jobs.report.facts.run_folder import read_runs
from r2scp.jobs.report.figures.style import Drawing, write_copies
from r2scp.jobs.report.internals import gallery, purity, vectors
from r2scp.jobs.report.provenance import provenance_section
from r2scp.jobs.report.results import accuracy, studies, training
from r2scp.jobs.report.store import store_section
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import R2SCPError, UsageError
from r2scp.store.feature_store import FeatureStore


def run_report(wanted: ReportWanted, told: Told = lambda _: None) -> dict[str, object]:
    """Write the page, and the figures if they are wanted; where, how large, how long, and what is missing.

    Raises `UsageError` without a run, `CheckpointError` for a folder that is none, `StoreError` for a store
    that was named and is not there.
    """
    if not wanted.runs:
        raise UsageError("a report is of one run at least; got none")
    if wanted.gallery < 0:
        raise UsageError(f"--gallery must be at least 0; got {wanted.gallery}")
    started = time.monotonic()
    made = Making(wanted=wanted, told=told, runs=read_runs(wanted.runs, wanted.store))
    made.store, made.no_store = _open(made)
    accuracy(made)
    training(made)
    studies(made)
    vectors(made)
    purity(made)
    gallery(made)
    with made.part("store", "The store") as section:
        found = store_section(made.opened())
        section.blocks, section.drawings = found.blocks, found.drawings
    _provenance(made)
    return _write(made, started)


def _open(made: Making) -> tuple[FeatureStore | None, str]:
    wanted = made.wanted
    if wanted.store is not None:
        return FeatureStore.open(wanted.store, wanted.fingerprint, wanted.storage_options), ""
    checkpoint = next((run.checkpoint for run in made.runs if run.checkpoint), None)
    if checkpoint is None:
        return None, "no run says which store it was trained on"
    uri, encoder = str(checkpoint.store["uri"]), str(checkpoint.store["fingerprint"])
    try:
        return FeatureStore.open(uri, wanted.fingerprint or encoder, wanted.storage_options), ""
    except R2SCPError as error:
        return None, str(error)


def _provenance(made: Making) -> None:
    with made.part("provenance", "Where it comes from") as section:
        found = provenance_section(made.runs, made.wanted.asked)
        section.blocks = found.blocks
        if made.gaps:
            section.head("What this report lacks")
            rows = [[gap.what, gap.section, gap.why, gap.make or None] for gap in made.gaps]
            section.table("Missing", ["what", "section", "why", "command that makes it"], rows)


def _write(made: Making, started: float) -> dict[str, object]:
    wanted = made.wanted
    names = ", ".join(run.name for run in made.runs)
    out = wanted.out or made.runs[0].folder / "report.html"
    html = page(
        "report.html",
        {
            "title": f"Report of {names}",
            "lede": _lede(made),
            "links": [(section.name, section.heading) for section in made.sections],
            "sections": made.sections,
        },
    ).encode()
    replace_file(out, html)
    drawings: list[Drawing] = [drawing for section in made.sections for drawing in section.drawings]
    copies: list[Path] = []
    if wanted.figures is not None:
        begun = time.monotonic()
        copies = [path for drawing in drawings for path in write_copies(drawing, wanted.figures)]
        made.seconds["copies"] = round(time.monotonic() - begun, 2)
    return {
        "report": str(out),
        "bytes": len(html),
        "runs": [str(run.folder) for run in made.runs],
        "sections": [section.name for section in made.sections],
        "figures": [drawing.name for drawing in drawings],
        "copies": [str(path) for path in copies],
        "missing": [asdict(gap) for gap in made.gaps],
        "seconds": made.seconds | {"all": round(time.monotonic() - started, 2)},
    }


def _lede(made: Making) -> str:
    """The main numbers, in a sentence."""
    said = [
        f"{run.name}: {100 * one.ours.average:.1f} % on average over sound alone, picture alone and both, "
        f"beside "
        f"{100 * one.models[1].average:.1f} % of the best baseline ({one.models[1].name}), {one.n:,} "
        f"questions"
        for run in made.runs
        if (one := run.evaluation) and len(one.models) > 1
    ]
    return "; ".join(said) + "." if said else "Not evaluated yet."


def report_with_progress(wanted: ReportWanted, device: str | None) -> dict[str, object]:
    """`run_report`, told on stderr part by part; what was written and what is missing."""
    wanted = replace(
        wanted,
        runs=tuple(absolute(run) for run in wanted.runs),
        out=absolute(wanted.out) if wanted.out else None,
        figures=absolute(wanted.figures) if wanted.figures else None,
        studies=absolute(wanted.studies) if wanted.studies else None,
        device=pick_device(device),
        asked=_asked(wanted),
    )
    report = run_report(wanted, _told)
    missing = report["missing"]
    assert isinstance(missing, list)
    for gap in missing:
        make = f"; `{gap['make']}` makes it" if gap["make"] else ""
        log(printable(f"missing: {gap['what']}: {gap['why']}{make}"))
    log(printable(f"kept in {report['report']}"))
    return report


def brief(report: dict[str, object]) -> dict[str, object]:
    """What a person is told on stdout."""
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


def _told(part: str) -> None:
    if console.is_terminal:
        log(f"report: {part}")


def _asked(wanted: ReportWanted) -> tuple[str, ...]:
    """The words of the command line."""
    words: list[str] = ["report", *map(str, wanted.runs)]
    named: Sequence[tuple[str, str | Path | None]] = (
        ("--store", wanted.store),
        ("--fingerprint", wanted.fingerprint),
        ("--studies", wanted.studies),
        ("--figures", wanted.figures),
        ("--out", wanted.out),
        ("--gallery", str(wanted.gallery)),
        ("--weights", wanted.weights),
    )
    return tuple(words + [word for name, value in named if value is not None for word in (name, str(value))])
