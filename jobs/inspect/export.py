"""`store export`: clips, questions and neighbours of one snapshot as Parquet.

    >>> export(FeatureStore.open("r2scp-store").at("serving"), Path("features"), ExportOptions())
    >>> datasets.load_dataset("features", "clips", split="train")

Layout: `data/{clips,questions,neighbours}/{split}-00000-of-0000N.parquet`, a dataset card `README.md`, and
the manifest `export.json` with the versions of the tables and all files. The folder appears whole or not at
all.

Clips and questions are in the files of their own split, neighbours in those of their clip's. `corpora` and
`splits` select clips and questions by their own columns (in MUSIC-AVQA a question of the test split may be
about a clip of the train split); `where` is a condition on clips, and only questions about these are
exported. Neighbours follow their clips.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from r2scp.jobs.console import absolute, progress_bar
from r2scp.jobs.inspect.condition import all_of, count_where
from r2scp.jobs.inspect.export_card import card
from r2scp.jobs.inspect.export_files import Limits, WrittenFile, file_names, portable, write_files
from r2scp.store.commits import lance_errors, sql_in, sql_literal
from r2scp.store.errors import R2SCPError, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import SNAPSHOT_TABLES, Table

FORMAT = 1  # of export.json
MANIFEST, CARD, DATA, LOCK = "export.json", "README.md", "data", "lock"
#: Columns with an embedding per second or word.
SEQUENCE_COLUMNS = {Table.CLIPS: {"visual", "audio"}, Table.QUESTIONS: {"words", "choice_sentences"}}
BATCH_ROWS = {Table.CLIPS: 16, Table.QUESTIONS: 256, Table.NEIGHBOURS: 1_024}  # a long clip is 2.5 MB
READ_AHEAD_BYTES = 32 << 20
SPLIT_ORDER = ("train", "val", "test")

OnProgress = Callable[[str, int, int], None]  # table, rows done, rows in all (0: unknown)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to export; see the module."""

    corpora: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    sequences: bool = True
    where: str | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableVersions:
    """The versions to export. `at`: when each was written, which distinguishes stores."""

    encoder: str
    dim: int
    versions: dict[str, int]
    at: dict[str, str]

    @classmethod
    def of(cls, store: FeatureStore) -> "TableVersions":
        """What `store` reads now: its snapshot, or the latest versions."""
        existing, versions, at = store.tables(), {}, {}
        for table in SNAPSHOT_TABLES:
            if table in existing:
                dataset = store.dataset(table)
                versions[table.value] = dataset.version
                with lance_errors("read the versions of", store.address(table).uri):
                    [written] = (
                        v["timestamp"] for v in dataset.versions() if v["version"] == dataset.version
                    )
                assert isinstance(written, datetime)
                at[table.value] = written.isoformat()
        return cls(encoder=store.fingerprint, dim=store.dim, versions=versions, at=at)


def export_with_progress(store: FeatureStore, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """`export` with a progress bar on stderr."""
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def update(table: str, done: int, total: int) -> None:
            if table not in tasks:
                tasks[table] = bar.add_task(table, total=total or None, note="rows")
            bar.update(tasks[table], completed=done)

        return export(store, absolute(folder), options, update)


def export(
    store: FeatureStore, folder: Path, options: ExportOptions, on_progress: OnProgress = lambda *_: None
) -> dict[str, Any]:
    """Write `folder`; a summary of its contents, as plain values.

    A folder with an export of the same versions and options is left as it is. Raises `UsageError` for any
    other folder that is not empty, and for an invalid condition; `StoreError` if there is no clip to export;
    `R2SCPError` if the folder cannot be written.
    """
    started, versions = time.monotonic(), TableVersions.of(store)
    if options.where is not None:
        count_where(store, options.where)
    choice = {name: value for name, value in asdict(options).items() if name != "limits"}
    manifest = {"format": FORMAT, **asdict(versions), "choice": json.loads(json.dumps(choice))}
    existing = _existing(folder, manifest)
    if existing is not None:
        return _summary(folder, existing, started) | {"unchanged": True}
    writer = _Writer(store=store, versions=versions.versions, options=options, on_progress=on_progress)
    with _atomic_folder(folder) as part:
        manifest |= writer.write(part)
        (part / CARD).write_text(card(manifest), encoding="utf-8")
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return _summary(folder, manifest, started) | {"unchanged": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Writer:
    """Writes the data files of one export."""

    store: FeatureStore
    versions: dict[str, int]
    options: ExportOptions
    on_progress: OnProgress

    def write(self, part: Path) -> dict[str, Any]:
        """Write all files below `part`; the manifest's `split_names`, `configs` and `files`."""
        clips = self._split_rows(Table.CLIPS)
        if not clips:
            raise StoreError("there is no clip to export; `r2scp-pipe status` says what the store has")
        names = file_names({*clips, *self._split_rows(Table.QUESTIONS)})
        clip_ids = {split: self._clip_ids(split) for split in clips}
        asked_about = None if self.options.where is None else pa.concat_arrays(list(clip_ids.values()))
        configs: dict[str, dict[str, int]] = {}
        files: dict[str, dict[str, int]] = {}
        for table in SNAPSHOT_TABLES:
            if table.value not in self.versions:
                continue
            done, splits = 0, dict.fromkeys(clips, 0)
            if table is not Table.NEIGHBOURS:
                splits = self._split_rows(table)
            for split in splits:
                about = {Table.NEIGHBOURS: clip_ids.get(split), Table.QUESTIONS: asked_about}.get(table)
                for file in self._write_split(part, table, split, names[split], about):
                    path = file.path.relative_to(part).as_posix()
                    files[path] = {"rows": file.rows, "bytes": file.bytes}
                    rows = configs.setdefault(table.value, {})
                    rows[names[split]] = rows.get(names[split], 0) + file.rows
                    done += file.rows
                    self.on_progress(table.value, done, sum(splits.values()))
        used = {name for rows in configs.values() for name in rows}
        split_names = {name: split for split, name in names.items() if name in used}
        return {"split_names": split_names, "configs": configs, "files": files}

    def _write_split(
        self, part: Path, table: Table, split: str | None, name: str, about: pa.StringArray | None
    ) -> list[WrittenFile]:
        schema = self.store.address(table).schema
        omitted = set() if self.options.sequences else SEQUENCE_COLUMNS.get(table, set())
        columns = [column for column in schema.names if column not in omitted]
        condition = None if table is Table.NEIGHBOURS else self._of_split(table, split)
        batches = self._batches(table, columns, condition, BATCH_ROWS[table], about)
        file_schema = portable(pa.schema([schema.field(column) for column in columns]))
        return write_files(batches, file_schema, part / DATA / table.value, name, self.options.limits)

    def _of_split(self, table: Table, split: str | None) -> str | None:
        is_split = "split IS NULL" if split is None else f"split = {sql_literal(split)}"
        return all_of(self._selection(table), is_split)

    def _selection(self, table: Table) -> str | None:
        """The condition on rows of clips or questions."""
        columns = (("corpus", self.options.corpora), ("split", self.options.splits))
        conditions = [sql_in(column, values) for column, values in columns if values]
        return all_of(self.options.where if table is Table.CLIPS else None, *conditions)

    def _split_rows(self, table: Table) -> dict[str | None, int]:
        """Split -> rows, in the order in which they are written."""
        counts: dict[str | None, int] = {}
        for batch in self._batches(table, ["split"], self._selection(table)):
            for pair in batch["split"].value_counts().to_pylist():
                counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]
        return dict(sorted(counts.items(), key=lambda item: _split_order(item[0])))

    def _clip_ids(self, split: str | None) -> pa.StringArray:
        batches = self._batches(Table.CLIPS, ["clip_id"], self._of_split(Table.CLIPS, split))
        return pa.concat_arrays([batch["clip_id"] for batch in batches])

    def _batches(
        self,
        table: Table,
        columns: list[str],
        condition: str | None,
        batch_rows: int = 65_536,
        about: pa.StringArray | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Rows in the table's order; with `about`, only of these clips."""
        if table.value not in self.versions:
            return
        dataset = self.store.dataset(table, self.versions[table.value])
        with lance_errors("read", self.store.address(table).uri):
            scanner = dataset.scanner(
                columns=columns,
                filter=condition,
                batch_size=batch_rows,
                batch_readahead=1,
                fragment_readahead=1,
                io_buffer_size=READ_AHEAD_BYTES,
                scan_in_order=True,
            )
            reader = iter(scanner.to_batches())
        while True:
            with lance_errors("read", self.store.address(table).uri):
                batch = next(reader, None)
            if batch is None:
                return
            yield batch if about is None else batch.filter(pc.field("clip_id").isin(about))


def _split_order(split: str | None) -> tuple[int, str]:
    return SPLIT_ORDER.index(split) if split in SPLIT_ORDER else len(SPLIT_ORDER), split or ""


def _existing(folder: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an existing export of the same, None for a new or empty folder."""
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        existing = json.loads((folder / MANIFEST).read_bytes())
        same = all(existing.get(name) == value for name, value in manifest.items())
        sizes = {name: (folder / name).stat().st_size for name in existing["files"]} if same else {}
        if same and all(sizes[name] == facts["bytes"] for name, facts in existing["files"].items()):
            return existing
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UsageError(
        f"{folder} must be a new or empty folder, or hold an export of the same versions with the same "
        "options; it holds something else: name another folder, or remove it"
    )


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end; if anything fails, it is removed."""
    part = folder.with_name(f".{folder.name}.r2scp-export")
    try:
        part.mkdir(parents=True, exist_ok=True)
        with (part / LOCK).open("ab") as lock:
            _lock(lock.fileno(), part)
            shutil.rmtree(part / DATA, ignore_errors=True)  # of an export that was killed
            for name in (CARD, MANIFEST):
                (part / name).unlink(missing_ok=True)
            try:
                yield part
                (part / LOCK).unlink()
                part.rename(folder)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except OSError as error:
        raise R2SCPError(f"cannot write {folder}: {error.strerror or error}; it is unchanged") from error


def _lock(file: int, part: Path) -> None:
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another export writes into {part}; wait for it, or stop it") from error


def _summary(folder: Path, manifest: dict[str, Any], started: float) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "encoder": manifest["encoder"],
        "versions": manifest["versions"],
        "rows": manifest["configs"],
        "files": len(manifest["files"]),
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        "seconds": round(time.monotonic() - started, 1),
    }
