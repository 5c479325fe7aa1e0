"""Contenders that do the same work in turn, round after round, and the table of their results.

A figure is the median over the rounds, with the minimum and the maximum. A ratio is taken within each round,
where both contenders ran under the same load; the median of the ratios is reported, not the ratio of medians.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from benchmarks.machine import machine, versions
from r2scp.store.errors import R2SCPError, UsageError

Work = Callable[[], object]  # runs once; returns a float if only that many of its seconds count


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median=statistics.median(values), least=min(values), most=max(values))

    def __str__(self) -> str:
        shown = (f"{value:,.{_digits(value)}f}" for value in (self.median, self.least, self.most))
        return "{} ({} – {})".format(*shown)


def _digits(value: float) -> int:
    """Decimals for about three significant digits."""
    return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender: its figures by column, or why it could not run."""

    name: str
    figures: Mapping[str, Spread | float | str] = field(default_factory=dict)
    unable: str = ""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A goal and the result: `reached` must be at least, or at most, `goal`."""

    what: str
    goal: float
    reached: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.reached <= self.goal if self.at_most else self.reached >= self.goal


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One table of a benchmark."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of a benchmark, and its settings."""

    sheets: Sequence[Sheet]
    grades: Sequence[Grade] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


def timed(work: Work) -> float:
    """Seconds that the work takes, or those that it returns."""
    started = time.perf_counter()
    result = work()
    return result if isinstance(result, float) else time.perf_counter() - started


def contest(contenders: Mapping[str, Work], rounds: int) -> dict[str, list[float] | str]:
    """Seconds of each contender per round, or the reason why it cannot run.

    All run in every round, and every round begins with another one. Each runs once before, untimed: a
    contender that fails then is left out; one that fails later raises.
    """
    seconds: dict[str, list[float] | str] = {name: [] for name in contenders}
    running = dict(contenders)
    for name, work in contenders.items():
        try:
            work()
        except Exception as error:  # a peer may raise anything
            seconds[name] = reason(error)
            del running[name]
    names = list(running)
    for number in range(rounds):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            taken = seconds[name]
            assert isinstance(taken, list)
            taken.append(timed(running[name]))
    return seconds


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratios of two contenders' figures, round by round."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def reason(error: BaseException) -> str:
    """The error in one line, for the table."""
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message}"[:160]


def run(
    module: str,
    description: str,
    add_options: Callable[[argparse.ArgumentParser], None],
    benchmark: Callable[[argparse.Namespace], Report],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a benchmark: parse, measure, print, write; returns the exit status.

    Each has `--short` (seconds, not minutes: `make bench`), `--rounds`, `--json` and options of its own.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--short", action="store_true", help="a shorter run, for a first look")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of each contender (default: 5; short: 3)"
    )
    parser.add_argument("--json", type=Path, help="write all results to this file")
    add_options(parser)
    options = parser.parse_args(arguments)
    if options.short:
        options.rounds = min(options.rounds, 3)
    out = Console(markup=False, highlight=False, emoji=False)
    about = {"benchmark": module, "machine": machine(), "versions": versions()}
    try:
        if options.rounds < 1:
            raise UsageError(f"--rounds must be at least 1; got {options.rounds}")
        report = benchmark(options)
    except R2SCPError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, UsageError) else 1
    show(report, about, out)
    if options.json:
        results = about | {"short": options.short, "rounds": options.rounds} | asdict(report)
        options.json.write_text(json.dumps(results, indent=1, default=str) + "\n")
    return 0


def show(report: Report, about: Mapping[str, object], out: Console) -> None:
    """Prints the report as tables."""
    for sheet in report.sheets:
        columns = list(dict.fromkeys(name for row in sheet.rows for name in row.figures))
        grid = Grid(title=sheet.title, title_justify="left")
        grid.add_column("")
        for name in columns:
            grid.add_column(name, justify="right")
        for row in sheet.rows:
            if row.unable:
                grid.add_row(row.name, row.unable)
            else:
                grid.add_row(row.name, *(_cell(row.figures.get(name)) for name in columns))
        out.print(grid)
    for grade in report.grades:
        bound = "at most" if grade.at_most else "at least"
        verdict = "met" if grade.met else "not met"
        out.print(f"{grade.what}: {grade.reached:.3g}; goal {bound} {grade.goal:g}: {verdict}")
    for part, values in (*about.items(), ("settings", report.settings)):
        if isinstance(values, Mapping):
            out.print(f"{part}: " + ", ".join(f"{name} {value}" for name, value in values.items()))


def _cell(figure: Spread | float | str | None) -> str:
    if figure is None:
        return ""
    return f"{figure:,.{_digits(abs(figure))}f}" if isinstance(figure, float | int) else str(figure)
