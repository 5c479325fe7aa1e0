"""An evaluation as tables for a person."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.config import printable
from r2scp.pipelines.dataset import CONDITIONS

HEADINGS = {"A": "A: sound only", "V": "V: picture only", "AV": "AV: both"}
TITLES = {
    "majority": "majority of the type",
    "question-only": "question only",
    "no-recovery": "no recovery",
    "no-recovery-dropout": "no recovery, dropout",
}


def tables(report: Mapping[str, Any]) -> Group:
    """The model beside its baselines, then its question types. Intervals are of 95 % (Wilson)."""
    settings = report["settings"]
    name = " + ".join(part.upper() for part in ("cmr", "cap") if settings[part]) or "no recovery"
    n = report["conditions"]["AV"]["n"]
    title = (
        f"Accuracy in %, {report['split']} split, {n:,} questions ({name}, {settings['retrieval']} retrieval)"
    )
    main = Grid(title=title, title_justify="left")
    main.add_column("model", no_wrap=True)
    for condition in CONDITIONS:
        main.add_column(HEADINGS[condition], justify="right", no_wrap=True)
    main.add_column("mean", justify="right")
    rows = {
        "r2scp": report,
        **dict(sorted(report["baselines"].items(), key=lambda item: -item[1]["average"])),
    }
    for key, row in rows.items():
        cells = [_cell(row["conditions"][condition]) for condition in CONDITIONS]
        label = "R²ScP" if key == "r2scp" else TITLES.get(key, printable(key))
        style = "bold" if key == "r2scp" else ""
        main.add_row(Text(label), *map(Text, cells), Text(f"{100 * row['average']:.1f}"), style=style)
    parts = [main, _types(report)]
    if "missing_rates" in report:
        parts.append(_rates(report))
    if not settings["leak_guard"]:
        parts.append(
            Text("Made WITHOUT the leak guard: a clip may have served as its own neighbour.", style="red")
        )
    return Group(*parts)


def _types(report: Mapping[str, Any]) -> Grid:
    grid = Grid(title="R²ScP by question type", title_justify="left")
    for heading in ("type", "n", *CONDITIONS):
        grid.add_column(heading, justify="left" if heading == "type" else "right")
    both = report["conditions"]["AV"]
    for group, score in both["groups"].items():
        kinds = [kind for kind in both["types"] if kind.split("/", 1)[0] == group]
        cells = [_cell(report["conditions"][c]["groups"][group]) for c in CONDITIONS]
        grid.add_row(
            Text(printable(group) or "(none)"), Text(str(score["n"])), *map(Text, cells), style="bold"
        )
        for kind in kinds if kinds != [group] else ():
            cells = [_cell(report["conditions"][c]["types"][kind]) for c in CONDITIONS]
            label = printable(kind.split("/", 1)[1])
            grid.add_row(Text(f"  {label}"), Text(str(both["types"][kind]["n"])), *map(Text, cells))
    return grid


def _rates(report: Mapping[str, Any]) -> Grid:
    grid = Grid(title="Where a modality is missing now and then", title_justify="left")
    grid.add_column("missing")
    grid.add_column("accuracy", justify="right")
    for name, score in report["missing_rates"].items():
        grid.add_row(Text(name), Text(_cell(score)))
    return grid


def _cell(score: Mapping[str, Any]) -> str:
    """Accuracy with the ends of its interval, in %."""
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f})"
