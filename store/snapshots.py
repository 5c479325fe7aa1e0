"""Snapshots of a whole store: which versions of the tables belong together.

A row of `snapshots` names one version each of `clips`, `questions` and `neighbours`. `serving` is the
published snapshot, `previous` the one before; both change in one commit, so that no reader combines the clips
of one with the neighbours of the other. Lance tags of the same names follow on each table and keep the
versions from being cleaned up.
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
    """Versions with a name. `rolled_back`: it was published and then found to be wrong."""

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
    """All snapshots by name; none if the table does not exist yet."""
    rows = address.open().to_table().to_pylist() if address.exists() else []
    for row in rows:
        row["versions"] = {Table(name): version for name, version in json.loads(row["versions"]).items()}
    return {row["name"]: Snapshot(**row) for row in rows}


def publish(address: TableAddress, versions: Mapping[Table, int], run_id: str) -> Snapshot:
    """Publish `versions` as `serving`; what was `serving` becomes `previous`."""
    serving = read_snapshots(address).get(SERVING)
    rows = [_row(SERVING, versions, run_id)]
    if serving:
        rows.append(_row(PREVIOUS, serving.versions, serving.run_id))
    address.create()
    put_rows(address, rows)
    return read_snapshots(address)[SERVING]


def rollback(address: TableAddress) -> Snapshot:
    """Publish `previous` again; what was `serving` becomes `previous`, marked as rolled back, in one commit.

    Raises `StoreError` if there is no `previous`, or if it was rolled back itself.
    """
    snapshots = read_snapshots(address)
    serving, previous = snapshots.get(SERVING), snapshots.get(PREVIOUS)
    if serving is None or previous is None:
        raise StoreError("there is nothing to roll back to: no snapshot was published before this one")
    if previous.rolled_back:
        raise StoreError(
            f"the previous snapshot (run {previous.run_id}) was rolled back itself; the next run of the job "
            "publishes a new one"
        )
    rolled_back = _row(PREVIOUS, serving.versions, serving.run_id) | {"rolled_back": True}
    put_rows(address, [_row(SERVING, previous.versions, previous.run_id), rolled_back])
    return read_snapshots(address)[SERVING]


def name_versions(address: TableAddress, name: str, versions: Mapping[Table, int]) -> Snapshot:
    """Name `versions`; an existing name moves to them. Raises `UsageError`."""
    if not NAME.fullmatch(name) or name in (SERVING, PREVIOUS):
        raise UsageError(
            f"a snapshot's name must be letters, digits, '.', '_', '-', and not {SERVING} or {PREVIOUS}; "
            f"got {name!a}"
        )
    address.create()
    put_rows(address, [_row(name, versions, "")])
    return read_snapshots(address)[name]


def protect(addresses: Sequence[tuple[Table, TableAddress]], snapshots: Mapping[str, Snapshot]) -> None:
    """Tag each table's versions as `snapshots` says, so that they are not cleaned up."""
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
    text = json.dumps({table.value: versions[table] for table in SNAPSHOT_TABLES if table in versions})
    return {"name": name, "versions": text, "run_id": run_id, "rolled_back": False, "at": now()}
