"""Named moments of a whole store: which version of each table belongs together.

A row of `snapshots` names one version of `clips`, `questions` and `neighbours` each. `serving` is what
readers are given, `previous` what served before; both move in one commit, so that no reader meets the clips
of one moment and the neighbours of another. Lance's own tags of the same names follow on each table and keep
the versions from being cleaned away.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from r2scp.store.commits import TableAddress, lance_errors
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.lease import now, put_rows
from r2scp.store.schema import SNAPSHOT_TABLES, Table

SERVING, PREVIOUS = "serving", "previous"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One named moment. `rolled_back`: it served, and was found wrong."""

    name: str
    versions: dict[Table, int]
    run_id: str
    at: datetime  # when it was named
    rolled_back: bool = False

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        versions = {table.value: version for table, version in self.versions.items()}
        return {
            "versions": versions,
            "run_id": self.run_id,
            "at": self.at.isoformat(),
            "rolled_back": self.rolled_back,
        }


def read_snapshots(address: TableAddress) -> dict[str, Snapshot]:
    """All snapshots by name; none where the table is not there yet."""
    if not address.exists():
        return {}
    found = {}
    for row in address.open().to_table().to_pylist():
        versions = {Table(name): version for name, version in json.loads(row["versions"]).items()}
        found[row["name"]] = Snapshot(
            name=row["name"],
            versions=versions,
            run_id=row["run_id"],
            at=row["at"],
            rolled_back=row["rolled_back"],
        )
    return found


def publish(address: TableAddress, versions: Mapping[Table, int], run_id: str) -> Snapshot:
    """Let `versions` serve; what served is `previous` from now on."""
    serving = read_snapshots(address).get(SERVING)
    moved = [_row(SERVING, versions, run_id)]
    if serving:
        moved.append(_row(PREVIOUS, serving.versions, serving.run_id))
    address.create()
    put_rows(address, moved)
    return read_snapshots(address)[SERVING]


def rollback(address: TableAddress) -> Snapshot:
    """Let `previous` serve again; what served is `previous`, marked as rolled back. Both in one commit.

    Raises `StoreError` where there is none, or where it was rolled back itself.
    """
    found = read_snapshots(address)
    serving, previous = found.get(SERVING), found.get(PREVIOUS)
    if serving is None or previous is None:
        raise StoreError("there is nothing to roll back to: no snapshot served before the present one")
    if previous.rolled_back:
        raise StoreError(
            f"what served before (run {previous.run_id}) was rolled back itself; the next run of the job "
            "publishes anew"
        )
    wrong = _row(PREVIOUS, serving.versions, serving.run_id) | {"rolled_back": True}
    put_rows(address, [_row(SERVING, previous.versions, previous.run_id), wrong])
    return read_snapshots(address)[SERVING]


def name_versions(address: TableAddress, name: str, versions: Mapping[Table, int]) -> Snapshot:
    """Give `versions` a name of one's own; a name that is there moves. Raises `UsageError`."""
    if not NAME.fullmatch(name) or name in (SERVING, PREVIOUS):
        raise UsageError(
            f"a snapshot's name must be letters, digits, '.', '_', '-', and not {SERVING} or {PREVIOUS}; "
            f"got {name!a}"
        )
    address.create()
    put_rows(address, [_row(name, versions, "")])
    return read_snapshots(address)[name]


def protect(addresses: Sequence[tuple[Table, TableAddress]], snapshots: Mapping[str, Snapshot]) -> None:
    """Set Lance's tags on each table as `snapshots` says, so that cleaning spares these versions."""
    for table, address in addresses:
        dataset = address.open()
        tags = {name: tag["version"] for name, tag in dataset.tags.list().items()}
        for name, snapshot in snapshots.items():
            version = snapshot.versions.get(table)
            if version is None or tags.get(name) == version:
                continue
            with lance_errors(f"set tag {name!r} on", address.uri):
                if name in tags:
                    dataset.tags.update(name, version)
                else:
                    dataset.tags.create(name, version)


def _row(name: str, versions: Mapping[Table, int], run_id: str) -> dict[str, object]:
    unknown = set(versions) - set(SNAPSHOT_TABLES)
    assert not unknown, unknown
    said = json.dumps({table.value: versions[table] for table in SNAPSHOT_TABLES if table in versions})
    return {"name": name, "versions": said, "run_id": run_id, "rolled_back": False, "at": now()}
