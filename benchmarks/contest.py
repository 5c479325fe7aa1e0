"""Contenders that do the same work in turn, round after round, and the table that comes of it.

A figure is the median over the rounds with the least and the most beside it; a ratio is taken within each
round, where both ran under the same load, and its median is told, not the ratio of the medians.
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

Work = Callable[[], object]  # does it once; gives a float where only so many seconds of it count


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of the same figure over the rounds."""

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
    """Decimals that leave three figures or so."""
    return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender: its figures by column, or why it could not run."""

    name: str
    figures: Mapping[str, Spread | float | str] = field(default_factory=dict)
    unable: str = ""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A goal and what was reached: `reached` must be at least, or at most, `goal`."""

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
    """What a benchmark found, and on what terms."""

    sheets: Sequence[Sheet]
    grades: Sequence[Grade] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


def timed(work: Work) -> float:
    """Seconds that it takes, or says that it took."""
    started = time.perf_counter()
    said = work()
    return said if isinstance(said, float) else time.perf_counter() - started


def contest(contenders: Mapping[str, Work], rounds: int) -> dict[str, list[float] | str]:
    """Seconds of each contender in each round; instead of them, the reason of one that cannot run.

    All take their turn in every round, and every round begins with another one. Each runs once before,
    untimed: a contender that fails then is out; one that fails later raises.
    """
    seconds: dict[str, list[float] | str] = {name: [] for name in contenders}
    able = dict(contenders)
    for name, work in contenders.items():
        try:
            work()
        except Exception as error:  # a peer's own, of any kind
            seconds[name] = reason(error)
            del able[name]
    names = list(able)
    for at in range(rounds):
        turn = at % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            taken = seconds[name]
            assert isinstance(taken, list)
            taken.append(timed(able[name]))
    return seconds


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Of two contenders' figures, round by round."""
    return Spread.of([one / other for one, other in zip(over, under, strict=True)])


def reason(error: BaseException) -> str:
    """The first line of what went wrong, for the table."""
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {words}"[:160]


def run(
    module: str,
    description: str,
    options: Callable[[argparse.ArgumentParser], None],
    benchmark: Callable[[argparse.Namespace], Report],
    arguments: Sequence[str] | None = None,
) -> int:
    """A benchmark's command line: parse, measure, print, write. The exit status.

    Each has `--short` (minutes become seconds: `make bench`), `--rounds` and `--json` beside its own options.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--short", action="store_true", help="less of everything, for a first look")
    parser.add_argument("--rounds", type=int, default=5, help="of each contender (default: 5; short: 3)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options(parser)
    wanted = parser.parse_args(arguments)
    if wanted.short:
        wanted.rounds = min(wanted.rounds, 3)
    out = Console(markup=False, highlight=False, emoji=False)
    about = {"benchmark": module, "machine": machine(), "versions": versions()}
    try:
        if wanted.rounds < 1:
            raise UsageError(f"--rounds must be at least 1; got {wanted.rounds}")
        report = benchmark(wanted)
    except R2SCPError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, UsageError) else 1
    show(report, about, out)
    if wanted.json:
        told = about | {"short": wanted.short, "rounds": wanted.rounds} | asdict(report)
        wanted.json.write_text(json.dumps(told, indent=1, default=str) + "\n")
    return 0


def show(report: Report, about: Mapping[str, object], out: Console) -> None:
    """The report as a person reads it."""
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
