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
        f"Accuracy in %, {report['split']} split, mean ± standard deviation over seeds {seeds}. Differences "
        f"are points against “{report['against']}”, paired by seed.",
        "",
        _row(["variant", *columns, *(f"Δ {name}" for name in MEASURES)]),
        _row(["---", *["---:"] * (len(columns) + len(MEASURES))]),
    ]
    for name, row in variants.items():
        cells = [_cell(row["accuracy"][column]) for column in columns]
        deltas = [
            "" if name == report["against"] else _cell(row["difference"][c], signed=True) for c in MEASURES
        ]
        out.append(_row([name, *cells, *deltas]))
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


def _cell(spread: Mapping[str, Any], *, signed: bool = False) -> str:
    return f"{100 * spread['mean']:{'+' if signed else ''}.1f} ± {100 * spread['sd']:.1f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
