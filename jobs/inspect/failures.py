"""`failures`: the dead letters, for a person or for a program."""

import json
import sys

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.console import printable
from r2scp.store.commits import sql_literal
from r2scp.store.errors import FailureReason, UsageError
from r2scp.store.feature_store import FeatureStore

SHOWN = ("clip_id", "reason", "detail", "attempts", "uri", "stage", "at")
CELL = 160  # characters of one cell; --json has all


def show_failures(store: FeatureStore, reason: str | None, limit: int, as_json: bool) -> None:
    """Print dead letters: a table, or one JSON object with `rows` and the `total` they are of."""
    if reason is not None and reason not in set(FailureReason):
        raise UsageError(f"--reason must be one of {', '.join(FailureReason)}; got {reason!r}")
    found = store.failures(where=f"reason = {sql_literal(reason)}" if reason else None)
    rows = found.select(list(SHOWN)).slice(0, limit).to_pylist()
    if as_json:
        sys.stdout.write(json.dumps({"total": found.num_rows, "rows": rows}, default=str) + "\n")
        return
    grid = Grid(title=f"{found.num_rows} dead letters, {len(rows)} shown", title_justify="left")
    for name in SHOWN[:3]:
        grid.add_column(name, overflow="fold")
    for row in rows:
        cells = (printable(str(row[name])) for name in SHOWN[:3])
        grid.add_row(*(Text(cell if len(cell) <= CELL else f"…{cell[1 - CELL :]}") for cell in cells))
    Console().print(grid)
