"""`jobs list`, `jobs show`, `jobs rollback`: what was done to a store, and taking the last of it back."""

import json
from collections.abc import Mapping
from datetime import datetime

from rich.console import Console
from rich.table import Table as Grid

from r2scp.jobs.console import printable
from r2scp.store.errors import UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.runs import RunSpec, recorded_run
from r2scp.store.schema import Table
from r2scp.store.snapshots import PREVIOUS, SERVING

JSON_COLUMNS = ("config", "counts", "versions_before", "versions_after")
LISTED = ("run_id", "kind", "status", "started_at", "ended_at", "counts")


def runs(store: FeatureStore, limit: int) -> list[dict[str, object]]:
    """The latest runs, newest first: run_id, kind, status, started_at, seconds, and what came of it."""
    rows = store.dataset(Table.RUNS).to_table(columns=list(LISTED)).to_pylist()
    rows.sort(key=lambda row: (row["started_at"], row["run_id"]), reverse=True)
    serving = store.snapshots().get(SERVING)
    return [_listed(row, serving.run_id if serving else "") for row in rows[:limit]]


def run(store: FeatureStore, run_id: str) -> dict[str, object]:
    """All that is known of one run; a part of its id that fits no other will do. Raises `UsageError`."""
    rows = store.dataset(Table.RUNS).to_table(columns=["run_id"])["run_id"].to_pylist()
    found = [run_id] if run_id in rows else [each for each in rows if run_id and run_id in each]
    if len(found) != 1:
        what = f"{len(found)} runs have" if found else "no run has"
        raise UsageError(f"{what} {run_id!a} in its id; `r2scp-pipe jobs list` names them")
    [row] = (r for r in store.dataset(Table.RUNS).to_table().to_pylist() if r["run_id"] == found[0])
    told = {name: json.loads(row[name]) if row[name] else {} for name in JSON_COLUMNS}
    return {name: _plain(value) for name, value in row.items()} | told


def rollback(store: FeatureStore) -> dict[str, object]:
    """Let the snapshot before serve again, under the lease and with a row in `runs`. Raises `StoreError`."""
    account: dict[str, object] = {}
    spec = RunSpec(kind="rollback", purpose="jobs rollback", config={}, account=lambda: account)
    with recorded_run(store, spec) as writer:
        writer.lease.require()
        served = store.snapshots().get(SERVING)
        now = store.rollback()
        account |= {
            "serving": now.run_id,
            "rolled_back": served.run_id if served else "",
            "clips": store.at(SERVING).dataset(Table.CLIPS).count_rows(),
            "clips_before": store.at(PREVIOUS).dataset(Table.CLIPS).count_rows(),
        }
    return account


def show_runs(rows: list[dict[str, object]]) -> None:
    """A table on stdout."""
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "status", "started", "seconds"):
        grid.add_column(name, no_wrap=True)
    grid.add_column("what", overflow="fold")
    for row in rows:
        started = str(row["started_at"])[:19].replace("T", " ")
        cells = (row["run_id"], row["status"], started, row["seconds"], row["what"])
        grid.add_row(*(printable(str(cell)) for cell in cells))
    Console(markup=False, highlight=False, emoji=False).print(grid)


def _listed(row: Mapping[str, object], serving: str) -> dict[str, object]:
    counts = json.loads(str(row["counts"])) if row["counts"] else {}
    started, ended = row["started_at"], row["ended_at"]
    seconds = None
    if isinstance(started, datetime) and isinstance(ended, datetime):
        seconds = round((ended - started).total_seconds(), 1)
    return {
        "run_id": row["run_id"],
        "kind": row["kind"],
        "status": row["status"],
        "serving": row["run_id"] == serving,
        "started_at": _plain(started),
        "seconds": seconds,
        "what": _what(str(row["kind"]), counts) + (" (serving)" if row["run_id"] == serving else ""),
    }


def _what(kind: str, counts: Mapping[str, object]) -> str:
    """One line on what a run did."""
    if kind == "rollback":
        return f"back to {counts.get('serving')}" if counts else ""
    if kind == "extract":
        return ", ".join(f"{counts.get(name, 0)} {name}" for name in ("stored", "unchanged", "dead"))
    if kind == "index":
        searched = [mode.get("searched", 0) for mode in counts.values() if isinstance(mode, Mapping)]
        return f"{sum(searched)} searched"
    if counts.get("why"):
        return str(counts["why"])
    due = counts.get("due")
    return "; ".join(map(str, due)) if isinstance(due, list) else ""


def _plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value
