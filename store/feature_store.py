"""`FeatureStore`: what a notebook, a job and a trainer see of the tables.

    >>> store = FeatureStore.open("r2scp-store")
    >>> store.status()["clips"]["rows"]
    240
    >>> store.clips(columns=["clip_id", "visual_key"], where="corpus = 'demo' AND split = 'train'")

Layout: `encoders.lance` names the encoders, and each encoder has a folder of its own with its tables, so
that embeddings of two encoders never meet::

    store/encoders.lance
    store/{encoder fingerprint}/clips.lance questions.lance neighbours.lance indexes.lance
                                failures.lance runs.lance snapshots.lance leases.lance

The folder of an encoder is an ordinary LanceDB database: `lancedb.connect(store.database)` opens it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lance
import pyarrow as pa

from r2scp.store import schema
from r2scp.store.commits import Staged, TableAddress, commit, lance_errors, sql_in, sql_literal, stage
from r2scp.store.errors import TRANSIENT_REASONS, FingerprintMismatch, StoreError
from r2scp.store.lease import LEASE_SCHEMA, Lease, put_row
from r2scp.store.schema import LATER_TABLES, PRIMARY_KEY, SCHEMA_VERSION, SNAPSHOT_TABLES, Table
from r2scp.store.snapshots import Snapshot, name_versions, protect, publish, read_snapshots, rollback

REDESCRIBED_AT_ONCE = 512  # rows in memory, features included

ENCODERS_SCHEMA = pa.schema(
    [
        pa.field("fingerprint", pa.string(), nullable=False, metadata=PRIMARY_KEY),
        pa.field("dim", pa.int32()),
        pa.field("schema_version", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class InputRecord:
    """What the store remembers of one input: enough to tell whether it must be read again."""

    bytes: int
    mtime_ns: int
    content_sha256: str
    decode_fingerprint: str
    failure: str = ""  # a FailureReason, "" where it was stored
    attempts: int = 0
    metadata: tuple[object, ...] | None = None  # values of METADATA_COLUMNS, None where it was not stored


#: Columns of `clips` that come from the annotations and the disk, not from the file's content.
METADATA_COLUMNS = ("split", "labels", "uri", "source_id")


class FeatureStore:
    """The tables of one encoder in one store. Cheap to make; reads see the latest version unless pinned.

    `uri` is a folder or an object store address (`s3://bucket/prefix`); `storage_options` are Lance's.
    """

    def __init__(
        self, uri: str, fingerprint: str, dim: int, storage_options: Mapping[str, str] | None = None
    ) -> None:
        self.uri = _absolute(uri)
        self.fingerprint = fingerprint
        self.dim = dim
        self.storage_options = dict(storage_options or {})
        self._schemas = {
            Table.CLIPS: schema.clips_schema(dim),
            Table.QUESTIONS: schema.questions_schema(dim),
            Table.NEIGHBOURS: schema.neighbours_schema(),
            Table.INDEXES: schema.indexes_schema(),
            Table.FAILURES: schema.failures_schema(),
            Table.RUNS: schema.runs_schema(),
            Table.SNAPSHOTS: schema.snapshots_schema(),
        }
        self._pinned: dict[Table, int] = {}

    def __repr__(self) -> str:
        return f"FeatureStore({self.uri!r}, encoder={self.fingerprint!r}, D={self.dim})"

    # -- opening

    @classmethod
    def encoders(cls, uri: str, storage_options: Mapping[str, str] | None = None) -> dict[str, int]:
        """Encoder fingerprint -> width D, of all encoders in the store; empty where there is no store."""
        catalogue = _catalogue(uri, storage_options)
        if not catalogue.exists():
            return {}
        rows = catalogue.open().to_table().to_pylist()
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
        """Open what is there. `encoder` is a fingerprint, needed only where the store holds several.

        Raises StoreError where there is no store or no such encoder in it; the message lists what there is.
        """
        found = cls.encoders(uri, storage_options)
        if not found:
            raise StoreError(f"there is no store at {uri}; make one with `r2scp-pipe extract --store {uri}`")
        if encoder is None and len(found) > 1:
            raise StoreError(f"the store at {uri} holds several encoders; name one of: {', '.join(found)}")
        encoder = encoder or next(iter(found))
        if encoder not in found:
            raise FingerprintMismatch(f"no encoder {encoder} in {uri}; there is: {', '.join(found)}")
        return cls(uri, encoder, found[encoder], storage_options)

    @classmethod
    def create(
        cls, uri: str, fingerprint: str, dim: int, storage_options: Mapping[str, str] | None = None
    ) -> "FeatureStore":
        """Open the tables of an encoder, and make those that are not there yet."""
        known = cls.encoders(uri, storage_options)
        store = cls(uri, fingerprint, dim, storage_options)
        if fingerprint in known:
            if known[fingerprint] != dim:
                raise FingerprintMismatch(f"{fingerprint} has width {known[fingerprint]} in {uri}; got {dim}")
            store.make_tables()
            return store
        store.make_tables()
        row = {"fingerprint": fingerprint, "dim": dim, "schema_version": SCHEMA_VERSION}
        catalogue = _catalogue(uri, storage_options)
        upsert = catalogue.create().merge_insert("fingerprint").when_not_matched_insert_all()
        with lance_errors("write to", catalogue.uri):
            upsert.execute(pa.Table.from_pylist([row], schema=ENCODERS_SCHEMA))
        return store

    # -- reading

    @property
    def database(self) -> str:
        """Address of this encoder's LanceDB database."""
        return f"{self.uri}/{self.fingerprint}"

    def address(self, table: Table) -> TableAddress:
        """Where a table rests; what a worker needs to stage rows."""
        return TableAddress(
            uri=f"{self.database}/{table.value}.lance",
            schema=self._schemas[table],
            storage_options=self.storage_options,
        )

    def dataset(self, table: Table, version: int | str | None = None) -> lance.LanceDataset:
        """The Lance dataset behind a table, at a version or tag."""
        return self.address(table).open(self._pinned.get(table) if version is None else version)

    def tables(self) -> list[Table]:
        """The tables that are there: a store of an earlier version lacks some until it is written to."""
        return [t for t in self._schemas if t not in LATER_TABLES or self.address(t).exists()]

    def clips(
        self, columns: Sequence[str] | None = None, where: str | None = None, version: int | str | None = None
    ) -> pa.Table:
        """Rows of `clips`: see `schema.clips_schema`. `where` is an SQL condition."""
        return self._read(Table.CLIPS, columns, where, version)

    def questions(
        self, columns: Sequence[str] | None = None, where: str | None = None, version: int | str | None = None
    ) -> pa.Table:
        """Rows of `questions`: see `schema.questions_schema`."""
        return self._read(Table.QUESTIONS, columns, where, version)

    def neighbours(
        self, columns: Sequence[str] | None = None, where: str | None = None, version: int | str | None = None
    ) -> pa.Table:
        """Rows of `neighbours`: see `schema.neighbours_schema`."""
        return self._read(Table.NEIGHBOURS, columns, where, version)

    def failures(self, where: str | None = None) -> pa.Table:
        """Rows of `failures`: what could not be stored, and why."""
        return self._read(Table.FAILURES, None, where, None)

    def input_records(self, corpus: str) -> dict[str, InputRecord]:
        """clip_id -> what the store remembers, of one corpus; the newer of a clip's row and its failure."""
        columns = ["clip_id", "bytes", "mtime_ns", "content_sha256", "decode_fingerprint"]
        where = f"corpus = {sql_literal(corpus)}"
        known, stored_at = {}, {}
        for row in _rows(self.dataset(Table.CLIPS), [*columns, *METADATA_COLUMNS, "ingested_at"], where):
            clip_id = row.pop("clip_id")
            stored_at[clip_id] = row.pop("ingested_at")
            known[clip_id] = InputRecord(metadata=metadata_of({name: row.pop(name) for name in METADATA_COLUMNS}), **row)
        for row in _rows(self.dataset(Table.FAILURES), [*columns, "reason", "attempts", "at"], where):
            clip_id, at = row.pop("clip_id"), row.pop("at")
            if clip_id not in stored_at or at > stored_at[clip_id]:
                known[clip_id] = InputRecord(failure=row.pop("reason"), **row)
        return known

    def missing(self, clip_ids: Iterable[str]) -> list[str]:
        """Those of `clip_ids` that have no row in `clips`, in their order."""
        have = set(self.clips(columns=["clip_id"])["clip_id"].to_pylist())
        return [clip_id for clip_id in clip_ids if clip_id not in have]

    def versions(self) -> dict[str, int]:
        """Table -> version that is read: the latest, or the snapshot's."""
        return {table.value: self.dataset(table).version for table in self.tables()}

    def status(self) -> dict[str, object]:
        """Rows, statuses, failures by reason, versions and tags: plain values, ready for JSON."""
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
        """Named moments of the store: `serving`, `previous`, and those with names of your own."""
        return read_snapshots(self.address(Table.SNAPSHOTS))

    def at(self, name: str) -> "FeatureStore":
        """The same store for reading, as it was at a snapshot: clips, questions and neighbours fit together,
        whatever is written meanwhile. Raises `StoreError` where there is no such snapshot."""
        found = self.snapshots()
        if name not in found:
            there = ", ".join(sorted(found)) or "none; a re-index job publishes `serving`"
            raise StoreError(f"the store at {self.uri} has no snapshot {name!a}; there is: {there}")
        pinned = FeatureStore(self.uri, self.fingerprint, self.dim, self.storage_options)
        pinned._pinned = dict(found[name].versions)
        return pinned

    def name_snapshot(self, name: str) -> Snapshot:
        """Give the present moment a name and keep it from being cleaned away. Raises `UsageError`."""
        named = name_versions(self.address(Table.SNAPSHOTS), name, self.snapshot_versions())
        self.protect()
        return named

    def publish(self, run_id: str) -> Snapshot:
        """Let the latest versions serve; what served is `previous`. For the holder of the lease only."""
        published = publish(self.address(Table.SNAPSHOTS), self.snapshot_versions(), run_id)
        self.protect()
        return published

    def rollback(self) -> Snapshot:
        """Let `previous` serve again. For the holder of the lease only. Raises `StoreError`."""
        published = rollback(self.address(Table.SNAPSHOTS))
        self.protect()
        return published

    def snapshot_versions(self) -> dict[Table, int]:
        """The versions of the tables that a snapshot names."""
        return {table: self.dataset(table).version for table in SNAPSHOT_TABLES if table in self.tables()}

    def protect(self) -> None:
        """Keep what snapshots name from being cleaned away; also what a crash left undone."""
        present = [(table, self.address(table)) for table in SNAPSHOT_TABLES if table in self.tables()]
        protect(present, self.snapshots())

    # -- writing

    def make_tables(self) -> None:
        """Make the tables that are not there: all of a new store, the newer ones of an old store."""
        for table in self._schemas:
            if not self.address(table).exists():
                self.address(table).create()

    def stage(self, table: Table, rows: pa.Table) -> Staged:
        """Write rows where no reader sees them yet; `commit` makes them visible."""
        return stage(self.address(table), rows)

    def commit(
        self,
        table: Table,
        staged: Sequence[Staged],
        properties: Mapping[str, str],
        also_delete: Iterable[str] = (),
    ) -> int:
        """Make staged rows visible in one new version, in place of rows with the same key; its number."""
        if self._pinned:
            raise StoreError("this store is read at a snapshot; open it without one to write")
        return commit(self.address(table), staged, properties, also_delete)

    def superseded(self) -> tuple[list[str], list[str]]:
        """(clips, failures) whose row is older than the same clip's row in the other table.

        A crash between the commits of the two tables leaves such pairs; the newer row is the truth. A failure
        that may go away by itself says nothing about the content: the clip's row stays beside it.
        """
        columns = ["clip_id", "reason", "at"]
        failed = {row["clip_id"]: row for row in _rows(self.dataset(Table.FAILURES), columns, None)}
        if not failed:
            return [], []
        stale_clips, stale_failures = [], []
        for row in _rows(self.dataset(Table.CLIPS), ["clip_id", "ingested_at"], None):
            failure = failed.get(row["clip_id"])
            if failure is None:
                continue
            if failure["at"] <= row["ingested_at"]:
                stale_failures.append(row["clip_id"])
            elif failure["reason"] not in TRANSIENT_REASONS:
                stale_clips.append(row["clip_id"])
        return stale_clips, stale_failures

    def update_metadata(self, rows: Sequence[Mapping[str, object]], properties: Mapping[str, str]) -> None:
        """Give clips other values of METADATA_COLUMNS, in one new version; their features stay as they are.

        Each of `rows` has `clip_id` and the columns of METADATA_COLUMNS.
        """
        if not rows:
            return
        metadata = {row["clip_id"]: row for row in rows}
        staged = []
        for start in range(0, len(rows), REDESCRIBED_AT_ONCE):
            ids = [str(row["clip_id"]) for row in rows[start : start + REDESCRIBED_AT_ONCE]]
            table = self.clips(where=sql_in("clip_id", ids))
            for name in METADATA_COLUMNS:
                values = [metadata[clip_id][name] for clip_id in table["clip_id"].to_pylist()]
                at, field = table.schema.get_field_index(name), table.schema.field(name)
                table = table.set_column(at, field, pa.array(values, field.type))
            staged.append(self.stage(Table.CLIPS, table))
        self.commit(Table.CLIPS, staged, properties)

    def lease(self, purpose: str) -> Lease:
        """The right to write, not acquired yet: `with store.lease("extract").hold() as lease: ...`."""
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

    def interrupt_runs(self) -> None:
        """Runs that never told their end were killed: say so. For the holder of the lease only."""
        runs, killed = self.dataset(Table.RUNS), "status = 'running'"
        if runs.count_rows(killed):
            runs.update({"status": "'interrupted'"}, where=killed)

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


def metadata_of(row: Mapping[str, object]) -> tuple[object, ...]:
    """The values of METADATA_COLUMNS in one row, comparable."""
    values = (row[name] for name in METADATA_COLUMNS)
    return tuple(tuple(value) if isinstance(value, list | tuple) else value for value in values)


def _catalogue(uri: str, storage_options: Mapping[str, str] | None) -> TableAddress:
    return TableAddress(
        uri=f"{_absolute(uri)}/encoders.lance", schema=ENCODERS_SCHEMA, storage_options=storage_options or {}
    )


def _absolute(uri: str) -> str:
    """A folder as seen from anywhere, since workers run in other folders; other addresses as they are."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).absolute())


def _rows(dataset: lance.LanceDataset, columns: Sequence[str], where: str | None) -> Iterable[dict]:
    for batch in dataset.to_batches(columns=list(columns), filter=where):
        yield from batch.to_pylist()


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    found = column.value_counts().to_pylist()  # the most first, as people look for them
    return {pair["values"]: pair["counts"] for pair in sorted(found, key=lambda pair: -pair["counts"])}
