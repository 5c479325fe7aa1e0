"""The file of a re-index job: YAML, checked strictly against the dataclasses below.

::

    name: nightly
    store: s3://bucket/features
    storage_options: {aws_access_key_id: "${KEY_ID}", aws_secret_access_key: "${SECRET}"}
    corpora:
      - {corpus: vggsound, root: /data/vggsound}
      - {corpus: folder, root: /data/porch, name: porch}
    schedule: {cron: "0 3 * * *", timezone: Europe/Berlin}

Relative paths start at the file's own folder. `${NAME}` in `store`, `root`, `annotations`, `weights` and the
values of `storage_options` is read from the environment, so that secrets stay out of the file.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import yaml

from r2scp.jobs.reindex.cron import ScheduleSettings
from r2scp.jobs.reindex.gate import GateSettings
from r2scp.jobs.settings import from_plain
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import UsageError
from r2scp.store.search.vector_search import ServingSettings

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
MAX_FILE_BYTES = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """One corpus, see `extract`. `name`: prefix of its clip ids, needed for a second corpus of one kind."""

    corpus: str
    root: str
    annotations: tuple[str, ...] = ()
    split: str = ""
    name: str = ""

    @property
    def stored_as(self) -> str:
        return self.name or self.corpus


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Resources of the job, see `extract`."""

    num_workers: int | None = None
    gpus_per_actor: float = 1.0
    ray_address: str | None = None
    wheel: str | None = None
    ffmpeg: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for key, minimum in (("num_workers", 1), ("gpus_per_actor", 0.01)):
            value = getattr(self, key)
            if value is not None and value < minimum:
                raise UsageError(f"{key} must be at least {minimum}; got {value}")


@dataclass(frozen=True, kw_only=True)
class ReindexConfig:
    """A re-index job.

    `gone`: what to do with clips and questions that disappeared from the corpus. `attempts`: total attempts
    for a failure that may be temporary. `index`: neighbours to keep up to date; null for none. `keep_days`:
    how long versions outside snapshots are kept. `wait_s`: how long to wait for another writer.
    """

    name: str
    store: str
    corpora: tuple[CorpusSettings, ...]
    storage_options: dict[str, str] = field(default_factory=dict, repr=False)
    encoder: Literal["imagebind-huge", "imagebind-demo"] = "imagebind-huge"
    weights: str | None = None
    gone: Literal["remove", "keep"] = "remove"
    attempts: int = 3
    index: IndexSettings | None = field(default_factory=IndexSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)
    keep_days: float = 7.0
    wait_s: float = 0.0
    schedule: ScheduleSettings | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"name must be lower-case letters, digits and '-', 40 at most; got {self.name!a}"
            )
        stored_as = [corpus.stored_as for corpus in self.corpora]
        if not stored_as or len(set(stored_as)) != len(stored_as):
            raise UsageError(
                f"corpora must be a list of at least one, each with its own name (give `name` "
                f"for a second one of a kind); got {', '.join(map(ascii, stored_as)) or 'none'}"
            )
        for key in ("attempts", "keep_days", "wait_s"):
            if getattr(self, key) < 0:
                raise UsageError(f"{key} must be at least 0; got {getattr(self, key)}")

    @property
    def retention(self) -> timedelta:
        return timedelta(days=self.keep_days)

    def to_record(self) -> dict[str, Any]:
        """Plain values for the run's row in `runs`, without possible secrets."""
        return {name: value for name, value in asdict(self).items() if name != "storage_options"}


def read_job_file(path: Path) -> ReindexConfig:
    """The job in a YAML file. Raises `UsageError`, naming the key, what is allowed and what it got."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: a job's file must be at most {MAX_FILE_BYTES} bytes")
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}; give the YAML file of a re-index job") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        allowed = ", ".join(field.name for field in fields(ReindexConfig))
        raise UsageError(f"{path} must be a YAML mapping with some of {allowed}; got {values!r:.60}")
    return from_plain(ReindexConfig, _resolve(values, path.parent.absolute()), path.name)


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, which YAML forbids and PyYAML allows."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _resolve(values: Mapping[Any, Any], folder: Path) -> dict[Any, Any]:
    """Substitute variables and make paths absolute."""
    resolved = dict(values)
    for key in ("store", "weights"):
        if isinstance(resolved.get(key), str):
            resolved[key] = _resolve_path(resolved[key], folder, key)
    if isinstance(resolved.get("storage_options"), Mapping):
        options = resolved["storage_options"].items()
        resolved["storage_options"] = {
            key: _substitute(value, f"storage_options.{key}") if isinstance(value, str) else value
            for key, value in options
        }
    if isinstance(resolved.get("corpora"), list):
        resolved["corpora"] = [
            _resolve_corpus(one, folder, f"corpora[{index}]") for index, one in enumerate(resolved["corpora"])
        ]
    return resolved


def _resolve_corpus(values: object, folder: Path, name: str) -> object:
    if not isinstance(values, Mapping):
        return values
    resolved = dict(values)
    if isinstance(resolved.get("root"), str):
        resolved["root"] = _resolve_path(resolved["root"], folder, f"{name}.root")
    if isinstance(resolved.get("annotations"), list):
        resolved["annotations"] = [
            _resolve_path(path, folder, f"{name}.annotations") if isinstance(path, str) else path
            for path in resolved["annotations"]
        ]
    return resolved


def _resolve_path(text: str, folder: Path, key: str) -> str:
    """An absolute path; addresses with a scheme and `random:SEED` stay as they are."""
    text = _substitute(text, key)
    return text if re.match(r"[a-z0-9+]+:", text) else str(folder / Path(text).expanduser())


def _substitute(text: str, key: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UsageError(f"{key} refers to the environment variable {match[1]}, which is not set")
        return os.environ[match[1]]

    return VARIABLE.sub(replace, text)
