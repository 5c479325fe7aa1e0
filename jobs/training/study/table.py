"""A study's results as tables: in Markdown, and narrower ones for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from r2scp.jobs.console import printable
from r2scp.jobs.training.evaluation_table import grid
from r2scp.jobs.training.study.run import MEASURES

PER_TABLE = 4  # columns that fit on a terminal
#: A table's title, its headings and its rows.
Part = tuple[str, list[str], list[list[str]]]


def markdown(report: Mapping[str, Any]) -> str:
    """Title, question, legend and table; accuracies in %, mean ± standard deviation over seeds."""
    columns = _columns(report)
    rows = [
        [name, *(_cell(row, column, name == report["against"]) for column in columns)]
        for name, row in report["variants"].items()
    ]
    out = [f"### {report['title']}", "", report["asks"], "", " ".join(_legend(report)), ""]
    out += _lines(["variant", *columns], rows)
    for title, headings, cells in _loads(report):
        out += ["", title, "", *_lines(headings, cells)]
    return "\n".join(out) + "\n"


def tables(report: Mapping[str, Any]) -> Group:
    """The same for a terminal, with each difference below its mean."""
    parts: list[RenderableType] = [Text(report["title"], style="bold"), Text(report["asks"])]
    columns = _columns(report)
    for at in range(0, len(columns), PER_TABLE):
        some = columns[at : at + PER_TABLE]
        table = grid("", ("variant", *some))
        for name, row in report["variants"].items():
            against = name == report["against"]
            cells = [_cell(row, column, against, between="\n") for column in some]
            table.add_row(Text(printable(name)), *map(Text, cells), style="bold" if against else "")
        parts.append(table)
    parts += [Text(""), *map(Text, _legend(report))]
    for title, headings, rows in _loads(report):
        names = headings[1:]
        for at in range(0, len(names), PER_TABLE):
            table = grid(f"\n{title}", (headings[0], *names[at : at + PER_TABLE]))
            for epoch, *cells in rows:
                table.add_row(Text(epoch), *map(Text, cells[at : at + PER_TABLE]))
            parts.append(table)
    return Group(*parts)


def _columns(report: Mapping[str, Any]) -> list[str]:
    accuracy = next(iter(report["variants"].values()))["accuracy"]
    return [*MEASURES, *(name for name in accuracy if name not in MEASURES)]


def _legend(report: Mapping[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, report["seeds"]))
    split = printable(report["split"]) + (" split by source" if report["disjoint"] else " split")
    sentences = [
        f"Accuracy in %, {split} ({report['n']:,} questions), mean ± standard deviation over seeds {seeds}; "
        f"in brackets the difference in points from “{printable(report['against'])}”, paired by seed."
    ]
    if not report["leak_guard"]:
        sentences.append("Made WITHOUT the leak guard: clips may have been retrieved for themselves.")
    if len(report["code"]) > 1:
        sentences.append(f"Trained by {len(report['code'])} versions of the program.")
    return sentences


def _loads(report: Mapping[str, Any]) -> list[Part]:
    """Router weights per epoch, of each variant and seed; – if an epoch had no batch of a condition."""
    parts: list[Part] = []
    for variant, row in report["variants"].items():
        for seed, epochs in zip(report["seeds"], row.get("loads", ()), strict="loads" in row):
            names = list(dict.fromkeys(name for epoch in epochs for name in epoch))
            cells = [
                [str(at), *(f"{epoch[name]:.3f}" if name in epoch else "–" for name in names)]
                for at, epoch in enumerate(epochs, start=1)
            ]
            parts.append((f"Router weights, {printable(variant)}, seed {seed}:", ["epoch", *names], cells))
    return parts


def _cell(row: Mapping[str, Any], measure: str, against: bool, between: str = " ") -> str:
    accuracy, difference = row["accuracy"][measure], row["difference"][measure]
    text = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}"
    if against:
        return text
    return f"{text}{between}({100 * difference['mean']:+.1f} ± {100 * difference['sd']:.1f})"


def _lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(headings), _line(["---", *["---:"] * (len(headings) - 1)]), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(printable(cell).replace('|', '&#124;') for cell in cells)} |"
