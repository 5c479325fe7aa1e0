"""An evaluation as tables for a terminal of 80 columns."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.console import printable
from r2scp.store.schema import MODALITY_NAMES, Condition, Modality

OURS_TITLE = "R²ScP"
TITLES = {
    "majority": "most frequent answer per question type",
    "question-only": "question only",
    "no-recovery": "no recovery",
    "no-recovery-dropout": "no recovery, trained with modality dropout",
}


def tables(report: Mapping[str, Any]) -> Group:
    """The model and its baselines, then the model by question type. Intervals are 95 % (Wilson)."""
    settings = report["settings"]
    name = " + ".join(part.upper() for part in ("cmr", "cap") if settings[part]) or "no recovery"
    n = report["conditions"]["AV"]["n"]
    split = printable(report["split"]) + (" split by source" if settings["disjoint"] else " split")
    main = grid(
        f"Accuracy in %, {split}, {n:,} questions\n({name}, {settings['retrieval']} retrieval)",
        ("model", *(condition.heading for condition in Condition), "mean"),
    )
    for label, row, style in _rows(report):
        cells = [_cell(row["conditions"][condition]) for condition in Condition]
        main.add_row(Text(label), *map(Text, cells), Text(f"{100 * row['average']:.1f}"), style=style)
    parts: list[RenderableType] = [main, _types(report)]
    if "missing_rates" in report:
        parts += [_rates(report, modality) for modality in Modality]
    if report["unfinished"]:
        names = printable(", ".join(report["unfinished"]))
        parts.append(Text(f"Training not finished: {names}; run `train` again to resume.", style="yellow"))
    if not settings["leak_guard"]:
        parts.append(
            Text("Made WITHOUT the leak guard: clips may have been retrieved for themselves.", style="red")
        )
    return Group(*parts)


def grid(title: str, headings: tuple[str, ...]) -> Grid:
    """An empty table. Only its first column wraps if the terminal is narrow; numbers never do."""
    table = Grid(
        title=Text(title, style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for at, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if at else "left", no_wrap=at > 0, overflow="fold")
    return table


def _rows(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """(label, results, style) of the model and its baselines, the best baseline first."""
    others = sorted(report["baselines"].items(), key=lambda item: -item[1]["average"])
    return [
        (OURS_TITLE, report, "bold"),
        *((TITLES[key] if key in TITLES else printable(key), row, "") for key, row in others),
    ]


def _types(report: Mapping[str, Any]) -> Grid:
    table = grid(f"\n{OURS_TITLE} by question type", ("type", "n", *Condition))
    both = report["conditions"]["AV"]
    for group, score in both["groups"].items():
        kinds = [kind for kind in both["types"] if kind.split("/", 1)[0] == group]
        cells = [_cell(report["conditions"][c]["groups"][group]) for c in Condition]
        table.add_row(
            Text(printable(group) or "(none)"), Text(str(score["n"])), *map(Text, cells), style="bold"
        )
        for kind in kinds if kinds != [group] else ():
            cells = [_cell(report["conditions"][c]["types"][kind]) for c in Condition]
            label = printable(kind.partition("/")[2] or kind)
            table.add_row(Text(f"  {label}"), Text(str(both["types"][kind]["n"])), *map(Text, cells))
    return table


def _rates(report: Mapping[str, Any], modality: Modality) -> Grid:
    shares = [name.split()[1] for name in report["missing_rates"] if name.split()[0] == modality]
    stream = MODALITY_NAMES[modality]
    table = grid(f"\nAccuracy in %, by share of questions whose {stream} is missing", ("model", *shares))
    for label, row, style in _rows(report):
        cells = [_cell(row["missing_rates"][f"{modality} {share}"]) for share in shares]
        table.add_row(Text(label), *map(Text, cells), style=style)
    return table


def _cell(score: Mapping[str, Any]) -> str:
    """Accuracy and the ends of its interval, in %."""
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f})"
