"""An evaluation as tables for a person; at most 80 columns wide, as long as question types are short."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.console import printable
from r2scp.store.schema import MODALITY_NAMES, Condition, Modality

OURS = "R²ScP"
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
        parts.append(Text(f"Not trained to the end yet: {names}; `train` goes on.", style="yellow"))
    if not settings["leak_guard"]:
        parts.append(
            Text("Made WITHOUT the leak guard: a clip may have served as its own neighbour.", style="red")
        )
    return Group(*parts)


def grid(title: str, headings: tuple[str, ...]) -> Grid:
    """An empty table whose first column gives way where it gets narrow, and no number ever does."""
    made = Grid(
        title=Text(title, style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for at, heading in enumerate(headings):
        made.add_column(Text(heading), justify="right" if at else "left", no_wrap=at > 0, overflow="fold")
    return made


def _rows(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """(label, what it reached, style), the best baseline first."""
    others = sorted(report["baselines"].items(), key=lambda item: -item[1]["average"])
    return [
        (OURS, report, "bold"),
        *((TITLES[key] if key in TITLES else printable(key), row, "") for key, row in others),
    ]


def _types(report: Mapping[str, Any]) -> Grid:
    made = grid(f"\n{OURS} by question type", ("type", "n", *Condition))
    both = report["conditions"]["AV"]
    for group, score in both["groups"].items():
        kinds = [kind for kind in both["types"] if kind.split("/", 1)[0] == group]
        cells = [_cell(report["conditions"][c]["groups"][group]) for c in Condition]
        made.add_row(
            Text(printable(group) or "(none)"), Text(str(score["n"])), *map(Text, cells), style="bold"
        )
        for kind in kinds if kinds != [group] else ():
            cells = [_cell(report["conditions"][c]["types"][kind]) for c in Condition]
            label = printable(kind.partition("/")[2] or kind)
            made.add_row(Text(f"  {label}"), Text(str(both["types"][kind]["n"])), *map(Text, cells))
    return made


def _rates(report: Mapping[str, Any], modality: Modality) -> Grid:
    shares = [name.split()[1] for name in report["missing_rates"] if name.split()[0] == modality]
    gone = MODALITY_NAMES[modality]
    made = grid(f"\nWhere a share of the questions lacks its {gone}", ("model", *shares))
    for label, row, style in _rows(report):
        cells = [_cell(row["missing_rates"][f"{modality} {share}"]) for share in shares]
        made.add_row(Text(label), *map(Text, cells), style=style)
    return made


def _cell(score: Mapping[str, Any]) -> str:
    """Accuracy with the ends of its interval, in %."""
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f})"
