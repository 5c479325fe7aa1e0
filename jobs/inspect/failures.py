"""`failures`: what could not be stored, as a table or as JSON."""

import json
import sys

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.console import printable
from r2scp.jobs.inspect.tables import CELL_CHARS
from r2scp.store.commits import sql_literal
from r2scp.store.errors import FailureReason, UsageError
from r2scp.store.feature_store import FeatureStore

COLUMNS = ("clip_id", "reason", "detail", "attempts", "uri", "stage", "at")
SHOWN = COLUMNS[:3]


def show_failures(store: FeatureStore, reason: str | None, limit: int, as_json: bool) -> None:
    """Print failures: a table, or one JSON object with `rows` and their `total` before the limit."""
    if reason is not None and reason not in set(FailureReason):
        raise UsageError(f"--reason must be one of {', '.join(FailureReason)}; got {reason!r}")
    failures = store.failures(where=f"reason = {sql_literal(reason)}" if reason else None)
    rows = failures.select(list(COLUMNS)).slice(0, limit).to_pylist()
    if as_json:
        sys.stdout.write(json.dumps({"total": failures.num_rows, "rows": rows}, default=str) + "\n")
        return
    grid = Grid(title=f"{failures.num_rows} failed clips, {len(rows)} shown", title_justify="left")
    for name in SHOWN:
        grid.add_column(name, overflow="fold")
    for row in rows:
        cells = (printable(str(row[name])) for name in SHOWN)
        # What the decoder said last is at the end.
        grid.add_row(*(Text(c if len(c) <= CELL_CHARS else f"…{c[1 - CELL_CHARS :]}") for c in cells))
    Console().print(grid)
