"""Tables of `store show` and `store search` for a person. All text in them is taken for text from outside."""

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.console import printable

CELL = 160  # characters of one cell; --json has all
WORD = 12  # characters of a cell that are not broken without need


def cell(value: object) -> Text:
    """A value as text that steers nothing; a long one is cut, None is a dash."""
    text = "–" if value is None else printable(str(value))
    return Text(text if len(text) <= CELL else f"{text[: CELL - 1]}…")


def listing(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], wide: int) -> Group:
    """A table below its title; where it gets narrow the column numbered `wide` gives way first.

    Floats have three places. The title is taken as it is: it must be ours.
    """
    made = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    values = [list(row) for row in rows]
    cells = [[cell(f"{value:.3f}" if isinstance(value, float) else value) for value in row] for row in values]
    for at, heading in enumerate(columns):
        numeric = bool(values) and all(isinstance(row[at], int | float) for row in values)
        made.add_column(
            Text(heading),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
            min_width=0 if at == wide else min(WORD, max((len(row[at]) for row in cells), default=0)),
        )
    for row in cells:
        made.add_row(*row)
    return Group(Text(title, style="table.title"), made)


def facts(title: str, pairs: Iterable[tuple[str, object]]) -> Group:
    """Names and values, one pair a line; those without a value are left out."""
    made = Grid(box=None, show_header=False, padding=(0, 1, 0, 0))
    made.add_column(no_wrap=True, style="dim")
    made.add_column(overflow="fold", ratio=1)
    for name, value in pairs:
        if value not in (None, "", []):
            made.add_row(Text(name), cell(value))
    return Group(Text(title, style="table.title"), made)
