"""`store export`: clips, questions and neighbours of one moment as Parquet, for all that reads Parquet.

    >>> export(FeatureStore.open("r2scp-store").at("serving"), Path("features"), Export())
    >>> datasets.load_dataset("features", "clips", split="train")

Layout: `data/{clips,questions,neighbours}/{split}-00000-of-0000N.parquet`, a dataset card `README.md`, and
`export.json`, which says of what moment this is and names every file. The folder appears whole or not at
all.

Clips and questions are each in the files of their own split, neighbours in those of their clip's. `corpora`
and `splits` choose clips and questions by their own columns (in MUSIC-AVQA a question of the test split may
be about a clip of the train split); `where` is a condition on clips, and questions follow it. Neighbours
follow their clips.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from r2scp.jobs.console import absolute, progress_bar
from r2scp.jobs.inspect.condition import both, count_where
from r2scp.jobs.inspect.export_card import card
from r2scp.jobs.inspect.export_files import Limits, Written, file_names, portable, write_files
from r2scp.store.commits import lance_errors, sql_literal
from r2scp.store.errors import R2SCPError, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import SNAPSHOT_TABLES, Table

FORMAT = 1  # of export.json
ACCOUNT, CARD, DATA, LOCK = "export.json", "README.md", "data", "lock"
#: Columns that hold a token a second or a word; without them keys and whole sentences stay.
SEQUENCES = {Table.CLIPS: {"visual", "audio"}, Table.QUESTIONS: {"words", "choice_sentences"}}
ROWS_READ = {Table.CLIPS: 16, Table.QUESTIONS: 256, Table.NEIGHBOURS: 1_024}  # at once; a long clip is 2.5 MB
IO_BYTES = 32 << 20  # that Lance reads ahead
SPLIT_ORDER = ("train", "val", "test")

Progress = Callable[[str, int, int], None]  # table, rows done, rows in all (0: not known)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What to export; see the module."""

    corpora: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    sequences: bool = True
    where: str | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One version of each table. `at`: when each was written, which tells stores apart."""

    encoder: str
    dim: int
    versions: dict[str, int]
    at: dict[str, str]

    @classmethod
    def of(cls, store: FeatureStore) -> "Moment":
        """What `store` reads now: its snapshot, or the latest."""
        there, versions, at = store.tables(), {}, {}
        for table in SNAPSHOT_TABLES:
            if table in there:
                dataset = store.dataset(table)
                versions[table.value] = dataset.version
                with lance_errors("read the versions of", store.address(table).uri):
                    [when] = (v["timestamp"] for v in dataset.versions() if v["version"] == dataset.version)
                at[table.value] = when.isoformat()
        return cls(encoder=store.fingerprint, dim=store.dim, versions=versions, at=at)


def export_with_progress(store: FeatureStore, folder: Path, wanted: Export) -> dict[str, Any]:
    """`export`, seen on stderr."""
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total or None, note="rows")
            bar.update(tasks[name], completed=done)

        return export(store, absolute(folder), wanted, progress)


def export(
    store: FeatureStore, folder: Path, wanted: Export, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Write `folder`; what is in it, as plain values.

    A folder that holds an export of the same moment and choice is left as it is. Raises `UsageError` for any
    other folder that is not empty, and for a condition that is none; `StoreError` where there is no clip to
    export; `R2SCPError` where the disk does not take it.
    """
    started, moment = time.monotonic(), Moment.of(store)
    if wanted.where is not None:
        count_where(store, wanted.where)
    choice = {name: value for name, value in asdict(wanted).items() if name != "limits"}
    account = {"format": FORMAT, **asdict(moment), "choice": json.loads(json.dumps(choice))}
    held = _held(folder, account)
    if held is not None:
        return _report(folder, held, started) | {"unchanged": True}
    work = _Work(store=store, moment=moment, wanted=wanted, progress=progress)
    with _whole(folder) as part:
        account |= work.write(part)
        (part / CARD).write_text(card(account), encoding="utf-8")
        (part / ACCOUNT).write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")
    return _report(folder, account, started) | {"unchanged": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    store: FeatureStore
    moment: Moment
    wanted: Export
    progress: Progress

    def write(self, part: Path) -> dict[str, Any]:
        """All data files, below `part`: `split_names`, `configs` and `files` of the account."""
        clips = self._splits(Table.CLIPS, self.wanted.where)
        if not clips:
            raise StoreError("there is no clip to export; `r2scp-pipe status` says what there is")
        names = file_names({*clips, *self._splits(Table.QUESTIONS, None)})
        # Ids of the clips that are exported, where another table must follow them.
        ids = {split: self._ids(split) for split in clips}
        chosen = None if self.wanted.where is None else pa.concat_arrays(list(ids.values()))
        configs: dict[str, dict[str, int]] = {}
        files: dict[str, dict[str, int]] = {}
        for table in SNAPSHOT_TABLES:
            if table.value not in self.moment.versions:
                continue
            done, total, splits = 0, 0, {split: 0 for split in clips}
            if table is not Table.NEIGHBOURS:
                splits = self._splits(table, self.wanted.where if table is Table.CLIPS else None)
                total = sum(splits.values())
            for split in splits:
                among = {Table.NEIGHBOURS: ids.get(split), Table.QUESTIONS: chosen}.get(table)
                for file in self._files(part, table, split, names[split], among):
                    told = {"rows": file.rows, "bytes": file.bytes}
                    files[file.path.relative_to(part).as_posix()] = told
                    rows = configs.setdefault(table.value, {})
                    rows[names[split]] = rows.get(names[split], 0) + file.rows
                    done += file.rows
                    self.progress(table.value, done, total)
        used = {name for rows in configs.values() for name in rows}
        return {
            "split_names": {name: split for split, name in names.items() if name in used},
            "configs": configs,
            "files": files,
        }

    def _files(
        self, part: Path, table: Table, split: str | None, name: str, among: pa.StringArray | None
    ) -> list[Written]:
        schema = self.store.address(table).schema
        left_out = set() if self.wanted.sequences else SEQUENCES.get(table, set())
        columns = [column for column in schema.names if column not in left_out]
        condition = None if table is Table.NEIGHBOURS else self._condition(table, split)
        batches = self._batches(table, columns, condition, among)
        kept = portable(pa.schema([schema.field(column) for column in columns]))
        return write_files(batches, kept, part / DATA / table.value, name, self.wanted.limits)

    def _condition(self, table: Table, split: str | None) -> str | None:
        own = "split IS NULL" if split is None else f"split = {sql_literal(split)}"
        return both(self._choice(self.wanted.where if table is Table.CLIPS else None), own)

    def _choice(self, where: str | None) -> str | None:
        return both(where, _one_of("corpus", self.wanted.corpora), _one_of("split", self.wanted.splits))

    def _splits(self, table: Table, where: str | None) -> dict[str | None, int]:
        """Split -> rows, in the order in which they are written."""
        counts: dict[str | None, int] = {}
        for batch in self._batches(table, ["split"], self._choice(where), None, rows=65_536):
            for pair in pc.value_counts(batch["split"]).to_pylist():
                counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]
        return dict(sorted(counts.items(), key=lambda item: _place(item[0])))

    def _ids(self, split: str | None) -> pa.StringArray:
        condition = self._condition(Table.CLIPS, split)
        parts = [
            batch["clip_id"] for batch in self._batches(Table.CLIPS, ["clip_id"], condition, None, 65_536)
        ]
        return pa.concat_arrays(parts)

    def _batches(
        self,
        table: Table,
        columns: list[str],
        condition: str | None,
        among: pa.StringArray | None,
        rows: int | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Rows in the table's order; with `among`, of these clips alone."""
        if table.value not in self.moment.versions:
            return
        dataset = self.store.dataset(table, self.moment.versions[table.value])
        with lance_errors("read", self.store.address(table).uri):
            scanner = dataset.scanner(
                columns=columns,
                filter=condition,
                batch_size=rows or ROWS_READ[table],
                batch_readahead=1,
                fragment_readahead=1,
                io_buffer_size=IO_BYTES,
                scan_in_order=True,
            )
            reader = iter(scanner.to_batches())
        while True:
            with lance_errors("read", self.store.address(table).uri):
                batch = next(reader, None)
            if batch is None:
                return
            yield batch if among is None else batch.filter(pc.is_in(batch["clip_id"], value_set=among))


def _one_of(column: str, values: tuple[str, ...]) -> str | None:
    return f"{column} IN ({', '.join(map(sql_literal, values))})" if values else None


def _place(split: str | None) -> tuple[int, str]:
    known = split in SPLIT_ORDER
    return (SPLIT_ORDER.index(split) if known else len(SPLIT_ORDER)), split or ""


def _held(folder: Path, account: dict[str, Any]) -> dict[str, Any] | None:
    """The account of an export that is there already, None for a new or an empty folder."""
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        found = json.loads((folder / ACCOUNT).read_bytes())
        same = all(found.get(name) == value for name, value in account.items())
        sizes = {name: (folder / name).stat().st_size for name in found["files"]} if same else {}
        if same and all(sizes[name] == facts["bytes"] for name, facts in found["files"].items()):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UsageError(
        f"{folder} must be a new or empty folder, or hold an export of this very moment and choice; it holds "
        "something else: name another folder, or remove it"
    )


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end; nothing of it stays where that fails."""
    part = folder.with_name(f".{folder.name}.r2scp-export")
    try:
        part.mkdir(parents=True, exist_ok=True)
        with (part / LOCK).open("ab") as lock:
            _take(lock.fileno(), part)
            shutil.rmtree(part / DATA, ignore_errors=True)  # of an export that was killed
            for name in (CARD, ACCOUNT):
                (part / name).unlink(missing_ok=True)
            try:
                yield part
                (part / LOCK).unlink()
                part.rename(folder)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except OSError as error:
        raise R2SCPError(
            f"cannot write {folder}: {error.strerror or error}; nothing there has changed"
        ) from error


def _take(lock: int, part: Path) -> None:
    try:
        flock(lock, LOCK_EX | LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another export writes into {part}; wait for it, or stop it") from error


def _report(folder: Path, account: dict[str, Any], started: float) -> dict[str, Any]:
    size = sum(facts["bytes"] for facts in account["files"].values())
    return {
        "folder": str(folder),
        "encoder": account["encoder"],
        "versions": account["versions"],
        "rows": account["configs"],
        "files": len(account["files"]),
        "bytes": size,
        "seconds": round(time.monotonic() - started, 1),
    }
