"""`jobs list`, `jobs show`, `jobs rollback`: the runs of a store, and rolling the last one back."""

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
LIST_COLUMNS = ("run_id", "kind", "status", "started_at", "ended_at", "counts")


def list_runs(store: FeatureStore, limit: int) -> list[dict[str, object]]:
    """The latest runs, newest first: run_id, kind, status, started_at, seconds, and a summary."""
    rows = store.dataset(Table.RUNS).to_table(columns=list(LIST_COLUMNS)).to_pylist()
    rows.sort(key=lambda row: (row["started_at"], row["run_id"]), reverse=True)
    serving = store.snapshots().get(SERVING)
    return [_list_row(row, serving.run_id if serving else "") for row in rows[:limit]]


def run_details(store: FeatureStore, run_id: str) -> dict[str, object]:
    """One run, by its id or a unique part of it. Raises `UsageError`."""
    rows = store.dataset(Table.RUNS).to_table(columns=["run_id"])["run_id"].to_pylist()
    matches = [run_id] if run_id in rows else [row for row in rows if run_id and run_id in row]
    if len(matches) != 1:
        count = f"{len(matches)} runs have" if matches else "no run has"
        raise UsageError(f"{count} {run_id!a} in its id; `r2scp-pipe jobs list` names them")
    [row] = (r for r in store.dataset(Table.RUNS).to_table().to_pylist() if r["run_id"] == matches[0])
    documents = {name: json.loads(row[name]) if row[name] else {} for name in JSON_COLUMNS}
    return {name: _to_plain(value) for name, value in row.items()} | documents


def rollback(store: FeatureStore) -> dict[str, object]:
    """Publish the previous snapshot again, under the lease and with a row in `runs`. Raises `StoreError`."""
    counts: dict[str, object] = {}
    spec = RunSpec(kind="rollback", purpose="jobs rollback", config={}, counts=lambda: counts)
    with recorded_run(store, spec) as run:
        run.lease.require()
        previous = store.snapshots().get(SERVING)
        published = store.rollback()
        counts |= {
            "serving": published.run_id,
            "rolled_back": previous.run_id if previous else "",
            "clips": store.at(SERVING).dataset(Table.CLIPS).count_rows(),
            "clips_before": store.at(PREVIOUS).dataset(Table.CLIPS).count_rows(),
        }
    return counts


def print_runs(rows: list[dict[str, object]]) -> None:
    """Print runs as a table on stdout."""
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "status", "started", "seconds"):
        grid.add_column(name, no_wrap=True)
    grid.add_column("what", overflow="fold")
    for row in rows:
        started = str(row["started_at"])[:19].replace("T", " ")
        cells = (row["run_id"], row["status"], started, row["seconds"], row["what"])
        grid.add_row(*(printable(str(cell)) for cell in cells))
    Console(markup=False, highlight=False, emoji=False).print(grid)


def _list_row(row: Mapping[str, object], serving: str) -> dict[str, object]:
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
        "started_at": _to_plain(started),
        "seconds": seconds,
        "what": _summary(str(row["kind"]), counts) + (" (published)" if row["run_id"] == serving else ""),
    }


def _summary(kind: str, counts: Mapping[str, object]) -> str:
    """What a run did, in one line."""
    if kind == "rollback":
        return f"rolled back to {counts.get('serving')}" if counts else ""
    if kind == "extract":
        words = {"stored": "stored", "unchanged": "unchanged", "dead": "failed"}
        return ", ".join(f"{counts.get(name, 0)} {word}" for name, word in words.items())
    if kind == "index":
        searched = [mode.get("searched", 0) for mode in counts.values() if isinstance(mode, Mapping)]
        return f"{sum(searched)} searched"
    if counts.get("why"):
        return str(counts["why"])
    due = counts.get("due")
    return "; ".join(map(str, due)) if isinstance(due, list) else ""


def _to_plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value
