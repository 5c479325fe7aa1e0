"""Keeps a store small and fast after many commits, and consistent after a crash."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from lance.fragment import LanceFragment

from r2scp.store.commits import lance_errors
from r2scp.store.errors import TRANSIENT_REASONS
from r2scp.store.feature_store import FeatureStore, read_rows
from r2scp.store.schema import SNAPSHOT_TABLES, Table

SMALL_FRAGMENT_ROWS = 1_024  # fragments below this are worth merging
SMALL_FRAGMENTS = 32  # once there are this many of them
MAX_DELETED_SHARE = 0.25  # of a fragment's rows; above, it is worth rewriting
TARGET_FRAGMENT_ROWS = 16_384  # of `clips`: about 0.7 GB of 10 s clips at D = 1024
RETENTION = timedelta(days=7)  # of versions that no snapshot names; longer than any reader reads
LOOKUP_RETENTION = timedelta(minutes=10)  # of tables without tags: a reader of the latest may be slow
UNFINISHED = re.compile(r"\.tmp.*|.*#[0-9]+")  # how Lance names files that it is still writing


@dataclass(kw_only=True)
class CleanupResult:
    """What was removed."""

    bytes_removed: int = 0
    versions_removed: int = 0


def superseded(store: FeatureStore) -> tuple[list[str], list[str]]:
    """(clips, failures) whose row is older than the same clip's row in the other table.

    A crash between the commits of the two tables leaves such pairs; the newer row is right. A transient
    failure says nothing about the content, so the clip's row stays beside it.
    """
    failures = {
        row["clip_id"]: row for row in read_rows(store.dataset(Table.FAILURES), ["clip_id", "reason", "at"])
    }
    stale_clips, stale_failures = [], []
    for row in read_rows(store.dataset(Table.CLIPS), ["clip_id", "ingested_at"]) if failures else ():
        failure = failures.get(row["clip_id"])
        if failure is None:
            continue
        if failure["at"] <= row["ingested_at"]:
            stale_failures.append(row["clip_id"])
        elif failure["reason"] not in TRANSIENT_REASONS:
            stale_clips.append(row["clip_id"])
    return stale_clips, stale_failures


def compact(store: FeatureStore, tables: Iterable[Table] = (Table.CLIPS,)) -> dict[str, int]:
    """Merge small fragments where there are many, and rewrite fragments with many deleted rows.

    No row changes. Returns how many fragments fewer each table has; if nothing is worth it, no version is
    written.
    """
    return {table.value: _compact(store, table) for table in tables if store.address(table).exists()}


def _compact(store: FeatureStore, table: Table) -> int:
    dataset = store.dataset(table)
    fragments = dataset.get_fragments()
    small = sum(_live_rows(f) < SMALL_FRAGMENT_ROWS for f in fragments)
    if small < SMALL_FRAGMENTS and not any(
        f.num_deletions > MAX_DELETED_SHARE * f.physical_rows for f in fragments
    ):
        return 0
    with lance_errors("compact", store.address(table).uri):
        dataset.optimize.compact_files(target_rows_per_fragment=TARGET_FRAGMENT_ROWS)
    return len(fragments) - len(store.dataset(table).get_fragments())


def _live_rows(fragment: LanceFragment) -> int:
    return fragment.physical_rows - fragment.num_deletions


def clean(store: FeatureStore, older_than: timedelta = RETENTION, exclusive: bool = False) -> CleanupResult:
    """Remove versions older than `older_than` that no snapshot names, and files that no version names.

    A file that no version names may be work in progress, so it must be as old; with `exclusive`, for the
    holder of the lease, a crash left it, and it is removed at once.
    """
    store.protect()
    result = CleanupResult()
    for table in store.tables():
        uri = store.address(table).uri
        age = older_than if table in SNAPSHOT_TABLES else max(older_than, LOOKUP_RETENTION)
        with lance_errors("clean", uri):
            removed = store.dataset(table).cleanup_old_versions(
                older_than=age, delete_unverified=exclusive, error_if_tagged_old_versions=False
            )
        result.bytes_removed += removed.bytes_removed + (_remove_unfinished(uri) if exclusive else 0)
        result.versions_removed += removed.old_versions
    return result


def _remove_unfinished(uri: str) -> int:
    """Remove the files of killed writers, which Lance leaves alone; their bytes. Object stores have none."""
    removed = 0
    for path in Path(uri).rglob("*") if "://" not in uri else ():
        if UNFINISHED.fullmatch(path.name) and path.is_file():
            removed += path.stat().st_size
            path.unlink(missing_ok=True)
    return removed
