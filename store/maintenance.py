"""What keeps a store small and quick after many commits: fragments merged, old files gone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import lance
from lance.fragment import LanceFragment

from r2scp.store.commits import lance_errors
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import SNAPSHOT_TABLES, Table

SMALL_FRAGMENT_ROWS = 1_024  # fragments below this are worth merging
SMALL_FRAGMENTS = 32  # once there are this many of them
DELETED_SHARE = 0.25  # of a fragment's rows; above, it is worth writing again
TARGET_FRAGMENT_ROWS = 16_384  # of `clips`: about 0.7 GB of 10 s clips at D = 1024
LOOKED_UP = timedelta(minutes=10)  # of tables that have no tags: who opens the latest may be slow to read it
UNFINISHED = re.compile(r"\.tmp.*|.*#[0-9]+")  # names that Lance's writers give until they are done
KEPT = timedelta(days=7)  # a version that no snapshot names; longer than any reader reads


@dataclass(kw_only=True)
class Upkeep:
    """What was done, by table."""

    merged: dict[str, int]  # fragments fewer than before
    bytes_removed: int = 0
    versions_removed: int = 0


def compact(store: FeatureStore, tables: Iterable[Table] = (Table.CLIPS,)) -> dict[str, int]:
    """Merge small fragments, where there are many, and write fragments again of which much was deleted.

    No row changes. Returns how many fragments fewer each table has; where nothing was worth it, no version is
    written.
    """
    return {table.value: _compact(store, table) for table in tables if store.address(table).exists()}


def _compact(store: FeatureStore, table: Table) -> int:
    dataset = store.dataset(table)
    fragments = dataset.get_fragments()
    if sum(_rows(f) < SMALL_FRAGMENT_ROWS for f in fragments) < SMALL_FRAGMENTS and not any(
        f.num_deletions > DELETED_SHARE * f.physical_rows for f in fragments
    ):
        return 0
    with lance_errors("compact", store.address(table).uri):
        dataset.optimize.compact_files(target_rows_per_fragment=TARGET_FRAGMENT_ROWS)
    return len(fragments) - len(store.dataset(table).get_fragments())


def _rows(fragment: LanceFragment) -> int:
    return fragment.physical_rows - fragment.num_deletions


def _remove_unfinished(uri: str) -> int:
    """Files on a local disk that a killed process had not yet given their names, which Lance leaves alone;
    their bytes. An object store has none."""
    removed = 0
    for path in Path(uri).rglob("*") if "://" not in uri else ():
        if UNFINISHED.fullmatch(path.name) and path.is_file():
            removed += path.stat().st_size
            path.unlink(missing_ok=True)
    return removed


def clean(store: FeatureStore, older_than: timedelta = KEPT, alone: bool = False) -> Upkeep:
    """Remove versions older than `older_than` that no snapshot names, and files that no version names.

    A file that no version names may be somebody's work in progress, so it must be as old; with `alone`, for
    the holder of the lease, it is what a crash left, and goes at once.
    """
    store.protect()
    done = Upkeep(merged={})
    for table in store.tables():
        dataset: lance.LanceDataset = store.dataset(table)
        age = older_than if table in SNAPSHOT_TABLES else max(older_than, LOOKED_UP)
        with lance_errors("clean", store.address(table).uri):
            gone = dataset.cleanup_old_versions(
                older_than=age, delete_unverified=alone, error_if_tagged_old_versions=False
            )
        done.bytes_removed += gone.bytes_removed + (
            _remove_unfinished(store.address(table).uri) if alone else 0
        )
        done.versions_removed += gone.old_versions
    return done
