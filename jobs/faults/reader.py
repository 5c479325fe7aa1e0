"""A reader of the published snapshot while `jobs torture` injects faults into the job."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from r2scp.jobs.faults.audit import Finding, Kind, inconsistencies, snapshot_digest
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import SNAPSHOT_TABLES
from r2scp.store.snapshots import SERVING, Snapshot

READ_EVERY_S = 0.25

Versions = tuple[int, ...]  # of the tables in a snapshot


class SnapshotReader:
    """Opens `serving` repeatedly and reads all of it each time."""

    def __init__(self, store: FeatureStore) -> None:
        self.findings: list[Finding] = []
        self.reads = 0
        self.digests: dict[Versions, str] = {}  # of all rows, by versions read
        self._store = store
        self._stop = threading.Event()

    @contextmanager
    def reading(self) -> Iterator["SnapshotReader"]:
        """Read from a thread throughout, and at the end read the first snapshot once more."""
        named, first = self._open_serving()
        self._check(named, first)
        thread = threading.Thread(target=self._read, name="reader", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
        self._check(named, first)

    def _read(self) -> None:
        while not self._stop.wait(READ_EVERY_S):
            try:
                named, serving = self._open_serving()
            except Exception as error:
                self._report(f"a reader could not open the published snapshot: {error}")
                continue
            self._check(named, serving)

    def _open_serving(self) -> tuple[Versions, FeatureStore]:
        return _versions_of(self._store.snapshots()[SERVING]), self._store.at(SERVING)

    def _check(self, named: Versions, serving: FeatureStore) -> None:
        try:
            digest, versions = snapshot_digest(serving), versions_read(serving)
            for what in () if versions in self.digests else inconsistencies(serving):
                self._report(what)
            if self.digests.setdefault(versions, digest) != digest:
                self._report(f"rows of versions {versions} changed while they were published")
            self.reads += 1
        except Exception as error:
            # a snapshot that is no longer named may have been cleaned away
            if named in map(_versions_of, self._store.snapshots().values()):
                self._report(f"a reader could not read the published snapshot: {error}")

    def _report(self, what: str) -> None:
        finding = Finding(kind=Kind.TORN, what=what)
        if finding not in self.findings:
            self.findings.append(finding)


def versions_read(serving: FeatureStore) -> Versions:
    """The versions that a pinned store reads."""
    return tuple(serving.dataset(table).version for table in SNAPSHOT_TABLES)


def _versions_of(snapshot: Snapshot) -> Versions:
    return tuple(snapshot.versions[table] for table in SNAPSHOT_TABLES if table in snapshot.versions)
