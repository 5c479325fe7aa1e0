"""Tables of `store show` and `store search`. All text in them is treated as text from outside."""

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.console import printable

CELL_CHARS = 160  # of one cell; --json has all
MIN_WIDTH = 12  # characters of a cell that are kept on one line if possible


def cell(value: object) -> Text:
    """A value as text without control characters; long text is cut, None is a dash."""
    text = "–" if value is None else printable(str(value))
    return Text(text if len(text) <= CELL_CHARS else f"{text[: CELL_CHARS - 1]}…")


def listing(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], wide: int) -> Group:
    """A table below its title; if it gets narrow, the column numbered `wide` gives way first.

    Floats have three decimals. The title is printed as it is and must be trusted text.
    """
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    values = [list(row) for row in rows]
    cells = [[cell(f"{value:.3f}" if isinstance(value, float) else value) for value in row] for row in values]
    for at, heading in enumerate(columns):
        numeric = bool(values) and all(isinstance(row[at], int | float) for row in values)
        grid.add_column(
            Text(heading),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
            min_width=0 if at == wide else min(MIN_WIDTH, max((len(row[at]) for row in cells), default=0)),
        )
    for row in cells:
        grid.add_row(*row)
    return Group(Text(title, style="table.title"), grid)


def facts(title: str, pairs: Iterable[tuple[str, object]]) -> Group:
    """Names and values, one pair per line, without those that have no value."""
    grid = Grid(box=None, show_header=False, padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold", ratio=1)
    for name, value in pairs:
        if value not in (None, "", []):
            grid.add_row(Text(name), cell(value))
    return Group(Text(title, style="table.title"), grid)
