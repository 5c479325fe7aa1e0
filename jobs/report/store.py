"""The section of a report on the store: what is in it, what is not and why, and what to see to."""

import json
from collections.abc import Mapping
from typing import Any

from r2scp.jobs.reindex.gate import GateSettings, row_checks
from r2scp.jobs.reindex.history import runs
from r2scp.jobs.report.builder import Section
from r2scp.pipelines.neighbours.plan import read_validity
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

EXAMPLES = 3  # dead letters shown of each reason
LATEST = 12  # runs shown
LONGEST = 300  # characters of a dead letter's detail


def store_section(store: FeatureStore) -> Section:
    """Counts, statuses, dead letters, versions, runs, recall, and what is wrong as far as is cheap to see."""
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
    found = [*dict.fromkeys([*clips["visual"], *clips["audio"]])]
    section.add_table(
        "What decoding found",
        ["status", "picture", "sound"],
        [[_named(one), clips["visual"].get(one, 0), clips["audio"].get(one, 0)] for one in found],
        "Clips. Partial: less was decoded than the file promises; corrupt: the stream is there and gave "
        "nothing.",
    )
    _checks(section, store)
    _failures(section, store, int(status["failures"]["rows"]), int(clips["rows"]))
    _snapshots(section, status["snapshots"])
    _runs(section, store)
    return section


def _checks(section: Section, store: FeatureStore) -> None:
    """What the gate of a re-index run would look at in the rows, and indexes that are behind."""
    settings = GateSettings(min_clips=0, max_partial_share=None, max_lost_share=None)
    rows = [
        [check.what, check.value, "yes" if check.passed else "no"]
        for check in row_checks(store, settings)
        if check.what != "clips"
    ]
    if Table.INDEXES in store.tables():
        latest = store.dataset(Table.CLIPS).version
        for row in store.dataset(Table.INDEXES).to_table(columns=["index", "settings"]).to_pylist():
            said = read_validity(store, row["index"])
            behind = latest - said.bank_version if said else None
            rows.append(
                [
                    f"versions of clips behind which neighbours are: {row['settings']}",
                    behind,
                    "yes" if not behind else "no",
                ]
            )
    section.add_table(
        "Checks",
        ["what", "value", "in order"],
        rows,
        "Versions behind: r2scp-pipe index brings neighbours up.",
    )


def _failures(section: Section, store: FeatureStore, dead: int, stored: int) -> None:
    if not dead:
        section.add_text(f"No dead letters: all {stored:,} inputs that were tried were stored.")
        return
    rows = store.failures().select(["reason", "clip_id", "stage", "attempts", "detail"]).to_pylist()
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(row)
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    section.add_table(
        f"Dead letters by reason, {dead:,} in all",
        ["reason", "inputs", "share of all, %"],
        [[reason, len(some), round(100 * len(some) / (dead + stored), 2)] for reason, some in ordered],
    )
    shown = [
        [row["clip_id"], reason, row["stage"], row["attempts"], (row["detail"] or "")[-LONGEST:]]
        for reason, some in ordered
        for row in some[:EXAMPLES]
    ]
    section.add_table(
        f"Dead letters, up to {EXAMPLES} of each reason",
        ["clip", "reason", "stage", "attempts", "the tool's own words, their end"],
        shown,
        "r2scp-pipe failures has all.",
    )


def _snapshots(section: Section, snapshots: Mapping[str, Mapping[str, Any]]) -> None:
    if not snapshots:
        section.add_text("No snapshot: nothing was published yet, so readers see the latest versions.")
        return
    rows = [[name, json.dumps(one, default=str, ensure_ascii=False)] for name, one in snapshots.items()]
    section.add_table("Snapshots", ["name", "what it holds"], rows)


def _runs(section: Section, store: FeatureStore) -> None:
    listed = runs(store, LATEST)
    rows = [
        [one["run_id"], one["status"], str(one["started_at"])[:19], one["seconds"], one["what"]]
        for one in listed
    ]
    total = store.dataset(Table.RUNS).count_rows()
    section.add_table(
        f"Runs, the latest {len(rows)} of {total}",
        ["run", "status", "started (UTC)", "seconds", "what"],
        rows,
    )
    kept = store.dataset(Table.RUNS).to_table(columns=["run_id", "started_at", "counts"]).to_pylist()
    for row in sorted(kept, key=lambda row: row["started_at"], reverse=True):
        counts = json.loads(row["counts"] or "{}")
        if recall := counts.get("recall"):
            _recall(section, row["run_id"], recall)
            return
    section.add_text(
        "Recall of the serving index was not measured: no re-index run (r2scp-pipe jobs run) tells of it."
    )


def _recall(section: Section, run_id: str, recall: Mapping[str, list[Mapping[str, Any]]]) -> None:
    columns = ("query", "among", "queries", "at_3", "at_10", "p50_ms")
    rows = [[who, *(pair.get(name) for name in columns)] for who, pairs in recall.items() for pair in pairs]
    section.add_table(
        f"Recall of the serving index, run {run_id}",
        ["clips", "query", "among", "queries", "recall@3", "recall@10", "median ms"],
        rows,
        "Against an exact search, on a sample of the store's own clips.",
    )


def _counted(counts: Mapping[str | None, int]) -> str:
    return ", ".join(f"{_named(name)} {count:,}" for name, count in counts.items()) or "none"


def _named(name: str | None) -> str:
    return name or "(none)"
