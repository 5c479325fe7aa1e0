"""Who reads what serves while `jobs torture` ill-treats the job that renews it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from r2scp.jobs.faults.audit import Finding, Kind, digest, inconsistencies
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import SNAPSHOT_TABLES
from r2scp.store.snapshots import SERVING, Snapshot

PAUSE_S = 0.25  # between two looks

Moment = tuple[int, ...]  # versions of the tables that a snapshot names


class Reader:
    """Opens `serving` again and again, and reads all of it each time."""

    def __init__(self, store: FeatureStore) -> None:
        self.findings: list[Finding] = []
        self.looks = 0
        self.seen: dict[Moment, str] = {}  # moment -> digest of its rows
        self._store = store
        self._stop = threading.Event()

    @contextmanager
    def reading(self) -> Iterator["Reader"]:
        """Read throughout, from a thread; and, at the end, once more what was read first."""
        named, first = self._serving()
        self._look(named, first)
        thread = threading.Thread(target=self._read, name="reader", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
        self._look(named, first)

    def _read(self) -> None:
        while not self._stop.wait(PAUSE_S):
            try:
                named, serving = self._serving()
            except Exception as error:
                self._torn(f"a reader could not open what serves: {error}")
                continue
            self._look(named, serving)

    def _serving(self) -> tuple[Moment, FeatureStore]:
        return _named(self._store.snapshots()[SERVING]), self._store.at(SERVING)

    def _look(self, named: Moment, serving: FeatureStore) -> None:
        try:
            found, seen = digest(serving), moment(serving)
            for what in () if seen in self.seen else inconsistencies(serving):
                self._torn(what)
            if self.seen.setdefault(seen, found) != found:
                self._torn(f"rows of the moment {seen} changed while it served")
            self.looks += 1
        except Exception as error:
            if named in map(_named, self._store.snapshots().values()):  # else it was cleaned away, as it may
                self._torn(f"a reader could not read what serves: {error}")

    def _torn(self, what: str) -> None:
        finding = Finding(kind=Kind.TORN, what=what)
        if finding not in self.findings:
            self.findings.append(finding)


def moment(serving: FeatureStore) -> Moment:
    """Which versions a pinned store reads."""
    return tuple(serving.dataset(table).version for table in SNAPSHOT_TABLES)


def _named(snapshot: Snapshot) -> Moment:
    return tuple(snapshot.versions[table] for table in SNAPSHOT_TABLES if table in snapshot.versions)
