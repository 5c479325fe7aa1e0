"""A study's results as a markdown table."""

from collections.abc import Mapping
from typing import Any

from r2scp.jobs.study import MEASURES


def markdown(report: Mapping[str, Any]) -> str:
    """Title, table and what the numbers are; accuracies in %, mean ± standard deviation over seeds."""
    variants = report["variants"]
    measures = [name for name in next(iter(variants.values()))["accuracy"] if name not in MEASURES]
    columns = [*MEASURES, *measures]
    seeds = ", ".join(map(str, report["seeds"]))
    out = [
        f"### {report['title']}",
        "",
        report["asks"],
        "",
        f"Accuracy in %, {report['split']} split, mean ± standard deviation over seeds {seeds}; in brackets "
        f"the difference in points from “{report['against']}”, paired by seed.",
        "",
        _row(["variant", *columns]),
        _row(["---", *["---:"] * len(columns)]),
    ]
    for name, row in variants.items():
        out.append(_row([name, *(_cell(row, column, name == report["against"]) for column in columns)]))
    for name, row in variants.items():
        for seed, epochs in zip(report["seeds"], row.get("loads", ()), strict=False):
            out += ["", f"Router weights, {name}, seed {seed}:", "", *_loads(epochs)]
    return "\n".join(out) + "\n"


def _loads(epochs: list[dict[str, float]]) -> list[str]:
    names = list(epochs[-1])
    rows = [_row(["epoch", *names]), _row(["---:"] * (len(names) + 1))]
    rows += [
        _row([str(at), *(f"{epoch[name]:.3f}" for name in names)]) for at, epoch in enumerate(epochs, start=1)
    ]
    return rows


def _cell(row: Mapping[str, Any], measure: str, compared_with: bool) -> str:
    accuracy, difference = row["accuracy"][measure], row["difference"][measure]
    text = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}"
    if compared_with:
        return text
    return f"{text} ({100 * difference['mean']:+.1f} ± {100 * difference['sd']:.1f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
