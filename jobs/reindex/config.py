"""The file of a re-index job: YAML, held strictly to the dataclasses below.

::

    name: nightly
    store: s3://bucket/features
    storage_options: {aws_access_key_id: "${KEY_ID}", aws_secret_access_key: "${SECRET}"}
    corpora:
      - {corpus: vggsound, root: /data/vggsound}
      - {corpus: folder, root: /data/porch, name: porch}
    schedule: {cron: "0 3 * * *", timezone: Europe/Berlin}

Relative paths start at the file's own folder. `${NAME}` in `store`, `root`, `annotations`, `weights` and the
values of `storage_options` is taken from the environment, so that no secret need stand in the file.
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
from r2scp.store.search.vector_index import ServingSettings

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
LARGEST_FILE = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """One corpus: see `extract`. `name`: what its clips' ids begin with, where two are of one kind."""

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
    """What the job runs on: see `extract`."""

    num_workers: int | None = None
    gpus_per_actor: float = 1.0
    ray_address: str | None = None
    wheel: str | None = None
    ffmpeg: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for key, least in (("num_workers", 1), ("gpus_per_actor", 0.01)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UsageError(f"{key} must be at least {least}; got {value}")


@dataclass(frozen=True, kw_only=True)
class ReindexConfig:
    """A re-index job.

    `gone`: what becomes of clips and questions that are no longer there. `attempts`: how often a dead letter
    whose reason may pass is tried in all. `index`: which neighbours are kept; null for none. `keep_days`: how
    long versions stay that no snapshot names. `wait_s`: for another writer.
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
                f"corpora must be a list of at least one, each stored under a name of its own (give `name` "
                f"where two are of one kind); got {', '.join(map(ascii, stored_as)) or 'none'}"
            )
        for key in ("attempts", "keep_days", "wait_s"):
            if getattr(self, key) < 0:
                raise UsageError(f"{key} must be at least 0; got {getattr(self, key)}")

    @property
    def kept(self) -> timedelta:
        return timedelta(days=self.keep_days)

    def told(self) -> dict[str, Any]:
        """Plain values for the run's record, without what may be secret."""
        return {name: value for name, value in asdict(self).items() if name != "storage_options"}


def read_config(path: Path) -> ReindexConfig:
    """The job in a YAML file. Raises `UsageError`, naming the key, what is allowed and what came."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UsageError(f"{path}: a job's file must be at most {LARGEST_FILE} bytes")
        said = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}; give the YAML file of a re-index job") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(said, Mapping):
        allowed = ", ".join(field.name for field in fields(ReindexConfig))
        raise UsageError(f"{path} must be a YAML mapping with some of {allowed}; got {said!r:.60}")
    return from_plain(ReindexConfig, _resolved(said, path.parent.absolute()), path.name)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, which YAML forbids and PyYAML lets pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for at, key in enumerate(keys):
            if key in keys[:at]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.value[at][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _resolved(said: Mapping[Any, Any], folder: Path) -> dict[Any, Any]:
    """With variables filled in, and paths as seen from anywhere."""
    found = dict(said)
    for key in ("store", "weights"):
        if isinstance(found.get(key), str):
            found[key] = _place(found[key], folder, key)
    if isinstance(found.get("storage_options"), Mapping):
        options = found["storage_options"].items()
        found["storage_options"] = {
            key: _filled(value, f"storage_options.{key}") if isinstance(value, str) else value
            for key, value in options
        }
    if isinstance(found.get("corpora"), list):
        found["corpora"] = [_corpus(one, folder, f"corpora[{at}]") for at, one in enumerate(found["corpora"])]
    return found


def _corpus(said: object, folder: Path, name: str) -> object:
    if not isinstance(said, Mapping):
        return said
    found = dict(said)
    if isinstance(found.get("root"), str):
        found["root"] = _place(found["root"], folder, f"{name}.root")
    if isinstance(found.get("annotations"), list):
        found["annotations"] = [
            _place(one, folder, f"{name}.annotations") if isinstance(one, str) else one
            for one in found["annotations"]
        ]
    return found


def _place(text: str, folder: Path, key: str) -> str:
    """A path from the file's folder; addresses with a scheme and `random:SEED` as they are."""
    text = _filled(text, key)
    return text if re.match(r"[a-z0-9+]+:", text) else str(folder / Path(text).expanduser())


def _filled(text: str, key: str) -> str:
    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise UsageError(f"{key} names the environment variable {found[1]}, which is not set")
        return os.environ[found[1]]

    return VARIABLE.sub(value, text)
