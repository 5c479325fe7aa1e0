"""How `report` shows itself."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from r2scp.jobs.config import absolute, console, printable, tell
from r2scp.jobs.encoders import pick_device
from r2scp.jobs.report import ReportWanted, run_report


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
        tell(printable(f"missing: {gap['what']}: {gap['why']}{make}"))
    tell(printable(f"kept in {report['report']}"))
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
        tell(f"report: {part}")


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
