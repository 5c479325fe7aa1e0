"""The section on the store: its contents, what failed and why, and what needs attention."""

import json
from collections.abc import Mapping
from typing import Any

from r2scp.jobs.reindex.gate import GateSettings, row_checks
from r2scp.jobs.reindex.history import list_runs
from r2scp.jobs.report.builder import Section
from r2scp.pipelines.neighbours.plan import read_validity
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

FAILURES_PER_REASON = 3  # shown
MAX_RUNS = 12  # shown
MAX_DETAIL = 300  # characters of a failure's detail


def store_section(store: FeatureStore) -> Section:
    """Counts, statuses, failures, versions, runs, recall, and the problems that are cheap to find."""
    section = Section(name="store", heading="The store")
    status: Any = store.status()
    clips, questions = status["clips"], status["questions"]
    section.add_definitions(
        [
            ("store", store.uri),
            ("encoder", f"{store.fingerprint} (width {store.dim})"),
            ("clips", f"{clips['rows']:,} ({_counted(clips['by_split'])})"),
            ("corpora", _counted(clips["by_corpus"])),
            ("questions", f"{questions['rows']:,} ({_counted(questions['by_split'])})"),
            ("versions", ", ".join(f"{name} {version}" for name, version in status["versions"].items())),
        ]
    )
    statuses = [*dict.fromkeys([*clips["visual"], *clips["audio"]])]
    section.add_table(
        "Decoding results, clips by status",
        ["status", "picture", "sound"],
        [[_named(one), clips["visual"].get(one, 0), clips["audio"].get(one, 0)] for one in statuses],
        "Partial: less could be decoded than the file declares. Corrupt: the stream exists, but nothing "
        "could be decoded.",
    )
    _checks(section, store)
    _failures(section, store, int(status["failures"]["rows"]), int(clips["rows"]))
    _snapshots(section, status["snapshots"])
    _runs(section, store)
    return section


def _checks(section: Section, store: FeatureStore) -> None:
    """The row checks of the publication gate, and how far neighbour lists are behind."""
    settings = GateSettings(min_clips=0, max_partial_share=None, max_lost_share=None)
    rows = [
        [check.what, check.value, "yes" if check.passed else "no"]
        for check in row_checks(store, settings)
        if check.what != "clips"
    ]
    if Table.INDEXES in store.tables():
        latest = store.dataset(Table.CLIPS).version
        for row in store.dataset(Table.INDEXES).to_table(columns=["index", "settings"]).to_pylist():
            validity = read_validity(store, row["index"])
            behind = latest - validity.bank_version if validity else None
            name = f"neighbour lists: versions behind clips, {row['settings']}"
            rows.append([name, behind, "no" if behind else "yes"])
    note = "To bring neighbour lists up to date: r2scp-pipe index."
    section.add_table("Checks", ["check", "value", "passed"], rows, note)


def _failures(section: Section, store: FeatureStore, failed: int, stored: int) -> None:
    if not failed:
        section.add_text(f"No failures: all {stored:,} inputs that were tried are stored.")
        return
    rows = store.failures().select(["reason", "clip_id", "stage", "attempts", "detail"]).to_pylist()
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(row)
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    section.add_table(
        f"Failures by reason, {failed:,} in all",
        ["reason", "inputs", "share of all, %"],
        [
            [reason, len(failures), round(100 * len(failures) / (failed + stored), 2)]
            for reason, failures in ordered
        ],
    )
    shown = [
        [row["clip_id"], reason, row["stage"], row["attempts"], (row["detail"] or "")[-MAX_DETAIL:]]
        for reason, failures in ordered
        for row in failures[:FAILURES_PER_REASON]
    ]
    section.add_table(
        f"Failures, up to {FAILURES_PER_REASON} per reason",
        ["clip", "reason", "stage", "attempts", "end of the error message"],
        shown,
        "r2scp-pipe failures lists all.",
    )


def _snapshots(section: Section, snapshots: Mapping[str, Mapping[str, Any]]) -> None:
    if not snapshots:
        section.add_text("No snapshots: nothing has been published yet, so readers see the latest versions.")
        return
    rows = [[name, json.dumps(one, default=str, ensure_ascii=False)] for name, one in snapshots.items()]
    section.add_table("Snapshots", ["name", "contents"], rows)


def _runs(section: Section, store: FeatureStore) -> None:
    rows = [
        [run["run_id"], run["status"], str(run["started_at"])[:19], run["seconds"], run["what"]]
        for run in list_runs(store, MAX_RUNS)
    ]
    total = store.dataset(Table.RUNS).count_rows()
    section.add_table(
        f"Latest {len(rows)} of {total} runs",
        ["run", "status", "started (UTC)", "seconds", "result"],
        rows,
    )
    all_runs = store.dataset(Table.RUNS).to_table(columns=["run_id", "started_at", "counts"]).to_pylist()
    for row in sorted(all_runs, key=lambda row: row["started_at"], reverse=True):
        counts = json.loads(row["counts"] or "{}")
        if recall := counts.get("recall"):
            _recall(section, row["run_id"], recall)
            return
    section.add_text(
        "Recall of the vector index has not been measured: no re-index run (r2scp-pipe jobs run) records it."
    )


def _recall(section: Section, run_id: str, recall: Mapping[str, list[Mapping[str, Any]]]) -> None:
    columns = ("query", "among", "queries", "at_3", "at_10", "p50_ms")
    rows = [
        [clips, *(pair.get(name) for name in columns)] for clips, pairs in recall.items() for pair in pairs
    ]
    section.add_table(
        f"Recall of the vector index, run {run_id}",
        ["clips", "query", "among", "queries", "recall@3", "recall@10", "median ms"],
        rows,
        "Compared with exact search, on a sample of the store's own clips.",
    )


def _counted(counts: Mapping[str | None, int]) -> str:
    return ", ".join(f"{_named(name)} {count:,}" for name, count in counts.items()) or "none"


def _named(name: str | None) -> str:
    return name or "(none)"
