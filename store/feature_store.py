"""`FeatureStore`: the tables of a store, for notebooks, jobs and training.

    >>> store = FeatureStore.open("r2scp-store")
    >>> store.status()["clips"]["rows"]
    240
    >>> store.clips(columns=["clip_id", "visual_key"], where="corpus = 'demo' AND split = 'train'")

Layout: `encoders.lance` lists the encoders. Each has a folder of its own with all its tables, so that
embeddings of two encoders never mix::

    store/encoders.lance
    store/{encoder fingerprint}/clips.lance questions.lance neighbours.lance indexes.lance
                                failures.lance runs.lance snapshots.lance leases.lance

The folder of an encoder is an ordinary LanceDB database: `lancedb.connect(store.database)` opens it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import lance
import pyarrow as pa

from r2scp.store.commits import Staged, TableAddress, commit, lance_errors, sql_in, stage
from r2scp.store.errors import FingerprintMismatch, StoreError
from r2scp.store.lease import LEASE_SCHEMA, Lease, put_row
from r2scp.store.schema import (
    ENCODERS_SCHEMA,
    LATER_TABLES,
    METADATA_COLUMNS,
    SCHEMA_VERSION,
    SNAPSHOT_TABLES,
    Table,
    table_schema,
)
from r2scp.store.snapshots import Snapshot, name_versions, protect, publish, read_snapshots, rollback

UPDATE_ROWS = 512  # held in memory at a time, features included


class FeatureStore:
    """The tables of one encoder in one store. Cheap to create; reads the latest versions unless pinned.

    `uri` is a folder or an object store address (`s3://bucket/prefix`); `storage_options` are Lance's.
    """

    def __init__(
        self, uri: str, fingerprint: str, dim: int, storage_options: Mapping[str, str] | None = None
    ) -> None:
        self.uri = _absolute(uri)
        self.fingerprint = fingerprint
        self.dim = dim
        self.storage_options = dict(storage_options or {})
        self._schemas = {table: table_schema(table, dim) for table in Table}
        self._pinned: dict[Table, int] = {}

    def __repr__(self) -> str:
        return f"FeatureStore({self.uri!r}, encoder={self.fingerprint!r}, D={self.dim})"

    # -- opening

    @classmethod
    def encoders(cls, uri: str, storage_options: Mapping[str, str] | None = None) -> dict[str, int]:
        """Encoder fingerprint -> width D, for all encoders of a store; empty if there is no store."""
        catalogue = _catalogue(uri, storage_options)
        rows = catalogue.open().to_table().to_pylist() if catalogue.exists() else []
        for row in rows:
            if row["schema_version"] != SCHEMA_VERSION:
                raise StoreError(
                    f"the store at {uri} has layout {row['schema_version']}; this program reads layout "
                    f"{SCHEMA_VERSION}: use the version that wrote it, or extract into another store"
                )
        return {row["fingerprint"]: row["dim"] for row in rows}

    @classmethod
    def open(
        cls, uri: str, encoder: str | None = None, storage_options: Mapping[str, str] | None = None
    ) -> "FeatureStore":
        """Open an existing store. `encoder` is a fingerprint, needed only if the store has several.

        Raises `StoreError` if there is no store or no such encoder in it; the message lists those it has.
        """
        dims = cls.encoders(uri, storage_options)
        if not dims:
            raise StoreError(f"there is no store at {uri}; make one with `r2scp-pipe extract --store {uri}`")
        if encoder is None and len(dims) > 1:
            raise StoreError(f"the store at {uri} has several encoders; name one of: {', '.join(dims)}")
        encoder = encoder or next(iter(dims))
        if encoder not in dims:
            raise FingerprintMismatch(f"no encoder {encoder} in {uri}; it has: {', '.join(dims)}")
        return cls(uri, encoder, dims[encoder], storage_options)

    @classmethod
    def create(
        cls, uri: str, fingerprint: str, dim: int, storage_options: Mapping[str, str] | None = None
    ) -> "FeatureStore":
        """Open the tables of an encoder, creating those that do not exist yet."""
        dims = cls.encoders(uri, storage_options)
        if dims.get(fingerprint, dim) != dim:
            raise FingerprintMismatch(f"{fingerprint} has width {dims[fingerprint]} in {uri}; got {dim}")
        store = cls(uri, fingerprint, dim, storage_options)
        store.create_tables()
        if fingerprint not in dims:  # last, so that a store cut short while it is created is none yet
            row = {"fingerprint": fingerprint, "dim": dim, "schema_version": SCHEMA_VERSION}
            catalogue = _catalogue(uri, storage_options)
            upsert = catalogue.create().merge_insert("fingerprint").when_not_matched_insert_all()
            with lance_errors("write to", catalogue.uri):
                upsert.execute(pa.Table.from_pylist([row], schema=catalogue.schema))
        return store

    # -- reading

    @property
    def database(self) -> str:
        """Address of this encoder's LanceDB database."""
        return f"{self.uri}/{self.fingerprint}"

    def address(self, table: Table) -> TableAddress:
        """Where a table is stored; all that a worker needs to stage rows."""
        return TableAddress(
            uri=f"{self.database}/{table.value}.lance",
            schema=self._schemas[table],
            storage_options=self.storage_options,
        )

    def dataset(self, table: Table, version: int | str | None = None) -> lance.LanceDataset:
        """The Lance dataset behind a table, at a version or tag."""
        return self.address(table).open(self._pinned.get(table) if version is None else version)

    def tables(self) -> list[Table]:
        """The existing tables: an older store has some of them only once it is written to."""
        return [t for t in self._schemas if t not in LATER_TABLES or self.address(t).exists()]

    def clips(
        self, columns: Sequence[str] | None = None, where: str | None = None, version: int | str | None = None
    ) -> pa.Table:
        """Rows of `clips`; its columns are in `schema.COLUMNS`. `where` is an SQL condition."""
        return self._read(Table.CLIPS, columns, where, version)

    def questions(
        self, columns: Sequence[str] | None = None, where: str | None = None, version: int | str | None = None
    ) -> pa.Table:
        """Rows of `questions`."""
        return self._read(Table.QUESTIONS, columns, where, version)

    def neighbours(
        self, columns: Sequence[str] | None = None, where: str | None = None, version: int | str | None = None
    ) -> pa.Table:
        """Rows of `neighbours`."""
        return self._read(Table.NEIGHBOURS, columns, where, version)

    def failures(self, where: str | None = None) -> pa.Table:
        """Rows of `failures`: inputs that could not be stored, and why."""
        return self._read(Table.FAILURES, None, where, None)

    def missing(self, clip_ids: Iterable[str]) -> list[str]:
        """Those of `clip_ids` that have no row in `clips`, in their order."""
        stored = set(self.clips(columns=["clip_id"])["clip_id"].to_pylist())
        return [clip_id for clip_id in clip_ids if clip_id not in stored]

    def versions(self) -> dict[str, int]:
        """Table -> the version that is read: the latest, or the snapshot's."""
        return {table.value: self.dataset(table).version for table in self.tables()}

    def status(self) -> dict[str, object]:
        """Counts of rows, statuses and failures, versions and snapshots: plain values, ready for JSON."""
        clips = self.clips(columns=["corpus", "split", "visual_status", "audio_status"])
        failures = self.dataset(Table.FAILURES).to_table(columns=["corpus", "reason"])
        questions = self.questions(columns=["corpus", "split"])
        return {
            "store": self.uri,
            "encoder": self.fingerprint,
            "dim": self.dim,
            "clips": {
                "rows": clips.num_rows,
                "by_corpus": _counts(clips["corpus"]),
                "by_split": _counts(clips["split"]),
                "visual": _counts(clips["visual_status"]),
                "audio": _counts(clips["audio_status"]),
            },
            "questions": {"rows": questions.num_rows, "by_split": _counts(questions["split"])},
            "failures": {"rows": failures.num_rows, "by_reason": _counts(failures["reason"])},
            "versions": self.versions(),
            "snapshots": {name: snapshot.to_json() for name, snapshot in self.snapshots().items()},
        }

    # -- snapshots

    def snapshots(self) -> dict[str, Snapshot]:
        """The store's snapshots by name: `serving`, `previous`, and those you named."""
        return read_snapshots(self.address(Table.SNAPSHOTS))

    def at(self, name: str) -> "FeatureStore":
        """The store at a snapshot, read-only: clips, questions and neighbours that belong together, whatever
        is written meanwhile. Raises `StoreError` if there is no such snapshot."""
        snapshots = self.snapshots()
        if name not in snapshots:
            names = ", ".join(sorted(snapshots)) or "none; a re-index job publishes `serving`"
            raise StoreError(f"the store at {self.uri} has no snapshot {name!a}; it has: {names}")
        pinned = FeatureStore(self.uri, self.fingerprint, self.dim, self.storage_options)
        pinned._pinned = dict(snapshots[name].versions)
        return pinned

    def name_snapshot(self, name: str) -> Snapshot:
        """Name the latest versions, which are then never cleaned up. Raises `UsageError`."""
        snapshot = name_versions(self.address(Table.SNAPSHOTS), name, self.snapshot_versions())
        self.protect()
        return snapshot

    def publish(self, run_id: str) -> Snapshot:
        """Publish the latest versions as `serving`; the old `serving` becomes `previous`. Needs the lease."""
        published = publish(self.address(Table.SNAPSHOTS), self.snapshot_versions(), run_id)
        self.protect()
        return published

    def rollback(self) -> Snapshot:
        """Publish `previous` again. Needs the lease. Raises `StoreError`."""
        published = rollback(self.address(Table.SNAPSHOTS))
        self.protect()
        return published

    def snapshot_versions(self) -> dict[Table, int]:
        """The present versions of the tables of a snapshot."""
        return {table: self.dataset(table).version for table in SNAPSHOT_TABLES if table in self.tables()}

    def protect(self) -> None:
        """Keep the snapshots' versions from being cleaned up; also completes what a crash left undone."""
        existing = [(table, self.address(table)) for table in SNAPSHOT_TABLES if table in self.tables()]
        protect(existing, self.snapshots())

    # -- writing

    def create_tables(self) -> None:
        """Create the tables that do not exist: all of a new store, the later ones of an old store."""
        for table in self._schemas:
            if not self.address(table).exists():
                self.address(table).create()

    def stage(self, table: Table, rows: pa.Table) -> Staged:
        """Write rows that no reader sees until `commit`."""
        return stage(self.address(table), rows)

    def commit(
        self,
        table: Table,
        staged: Sequence[Staged],
        properties: Mapping[str, str],
        also_delete: Iterable[str] = (),
    ) -> int:
        """Make staged rows visible in one new version, replacing rows of the same keys; its number."""
        if self._pinned:
            raise StoreError("this store is open at a snapshot, read-only; open it without one to write")
        return commit(self.address(table), staged, properties, also_delete)

    def update_metadata(self, rows: Sequence[Mapping[str, object]], properties: Mapping[str, str]) -> None:
        """Replace METADATA_COLUMNS of clips in one new version; their features do not change.

        Each of `rows` has `clip_id` and METADATA_COLUMNS.
        """
        if not rows:
            return
        metadata = {str(row["clip_id"]): row for row in rows}
        clip_ids, staged = list(metadata), []
        for start in range(0, len(clip_ids), UPDATE_ROWS):
            table = self.clips(where=sql_in("clip_id", clip_ids[start : start + UPDATE_ROWS]))
            for name in METADATA_COLUMNS:
                values = [metadata[clip_id][name] for clip_id in table["clip_id"].to_pylist()]
                field = table.schema.field(name)
                column = table.schema.get_field_index(name)
                table = table.set_column(column, field, pa.array(values, field.type))
            staged.append(self.stage(Table.CLIPS, table))
        self.commit(Table.CLIPS, staged, properties)

    def lease(self, purpose: str) -> Lease:
        """The right to write, not yet acquired: `with store.lease("extract").hold() as lease: ...`."""
        address = TableAddress(
            uri=f"{self.database}/leases.lance", schema=LEASE_SCHEMA, storage_options=self.storage_options
        )
        return Lease(address, purpose)

    def record_run(self, row: Mapping[str, object]) -> None:
        """Insert or update one row of `runs`."""
        put_row(self.address(Table.RUNS), row)

    def record_index(self, row: Mapping[str, object]) -> None:
        """Insert or update one row of `indexes`."""
        put_row(self.address(Table.INDEXES), row)

    def _read(
        self, table: Table, columns: Sequence[str] | None, where: str | None, version: int | str | None
    ) -> pa.Table:
        try:
            return self.dataset(table, version).to_table(
                columns=list(columns) if columns is not None else None, filter=where
            )
        except ValueError as error:
            names = ", ".join(self._schemas[table].names)
            raise StoreError(
                f"cannot read {table.value} of {self.uri}: {error}; its columns: {names}"
            ) from error


def read_rows(
    dataset: lance.LanceDataset, columns: Sequence[str], where: str | None = None
) -> Iterator[dict]:
    """Rows as plain values, a batch in memory at a time."""
    for batch in dataset.to_batches(columns=list(columns), filter=where):
        yield from batch.to_pylist()


def read_blocks(
    batches: Iterable[pa.RecordBatch],
    size: int,
    size_of: Callable[[pa.RecordBatch], int] = lambda batch: batch.num_rows,
) -> Iterator[pa.Table]:
    """Batches joined into tables of at least `size`, in rows unless `size_of` says otherwise; the last may be
    smaller. Lance's own batches never span two fragments, and fragments may be small."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(size_of, waiting)) >= size:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _catalogue(uri: str, storage_options: Mapping[str, str] | None) -> TableAddress:
    return TableAddress(
        uri=f"{_absolute(uri)}/encoders.lance",
        schema=ENCODERS_SCHEMA,
        storage_options=storage_options or {},
    )


def _absolute(uri: str) -> str:
    """A folder as an absolute path, since workers run in other folders; other addresses unchanged."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).absolute())


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Value -> rows, the most frequent first."""
    pairs = column.value_counts().to_pylist()
    return {pair["values"]: pair["counts"] for pair in sorted(pairs, key=lambda pair: -pair["counts"])}
