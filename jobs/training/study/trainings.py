"""The trainings of a study: their keys, their folders, and the task that runs one.

    FOLDER/experts/KEY     stage I, shared by all variants with the same stage I
    FOLDER/runs/KEY        one training, with its evaluation; shared by all studies that need it

KEY hashes the whole config and the content of the store that the training reads: not its address, nor what
the training does not read, such as other indexes. So a restarted study, or another study that needs the same
training, reuses it, and trainings on stores of other content never share a folder.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

import torch

from r2scp.jobs.training.checkpoints import read_checkpoint, read_last
from r2scp.jobs.training.config import TrainConfig, experts_of
from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions, run_evaluate
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.atomic_file import replace_file
from r2scp.store.commits import sql_literal
from r2scp.store.errors import R2SCPError, StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table
from r2scp.store.search.bank import HITS

CLIP_COLUMNS = ("clip_id", "corpus", "split", "source_id", "content_sha256", "audio_key", "visual_key")
QUESTION_COLUMNS = ("question_id", "clip_id", "corpus", "split", "type", "answer", "choices", "sentence")


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """One training and its evaluation, run as a Ray task. `name`: variant and seed, for messages."""

    name: str
    plan: TrainPlan
    split: str  # "": do not evaluate
    rates: bool = False
    device: str = "cpu"

    @property
    def evaluation(self) -> Path:
        """File of the evaluation report."""
        return self.plan.folder / f"evaluation-{quote(self.split, safe='')}{'-rates' * self.rates}.json"

    @property
    def finished(self) -> bool:
        """Whether the training is complete and, unless `split` is "", its final checkpoint evaluated."""
        last = read_last(self.plan.folder)
        if last is None or not last.finished:
            return False
        if not self.split:
            return True
        if not self.evaluation.exists():
            return False
        report = json.loads(self.evaluation.read_bytes())
        return report["checkpoint"]["sha256"] == read_checkpoint(self.plan.folder).sha256


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a task: a summary, or the error."""

    message: str
    failed: bool = False


@dataclass(kw_only=True)
class StoreContents:
    """Identifies the content of a store at pinned versions that determines the result of a training."""

    store: FeatureStore
    pins: Pins
    _digest: str = ""
    _indexes: dict[str, str] = field(default_factory=dict)

    def key(self, config: TrainConfig) -> str:
        """Key of a training: a hash of its settings and its data. Raises `StoreError` for a missing index."""
        parts = [config.to_json(), self.digest, self.index_id(config)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def digest(self) -> str:
        """Hash of clips and questions."""
        if not self._digest:
            digest = hashlib.sha256(self.store.fingerprint.encode())
            tables = ((Table.CLIPS, CLIP_COLUMNS), (Table.QUESTIONS, QUESTION_COLUMNS))
            for (table, columns), version in zip(tables, (self.pins.clips, self.pins.questions), strict=True):
                dataset = self.store.dataset(table, version)
                for batch in dataset.to_batches(columns=list(columns), scan_in_order=True):
                    digest.update(batch.serialize())
            self._digest = digest.hexdigest()
        return self._digest

    def index_id(self, config: TrainConfig) -> str:
        """Id of the neighbour lists that a training reads; "" if it reads none."""
        if not config.model.cmr or config.sees == "question":
            return ""
        settings = config.index.settings_key(config.retrieval)
        if settings not in self._indexes:
            self._indexes[settings] = self._read_index_id(settings)
        if not self._indexes[settings]:
            raise StoreError(
                f"the store at {self.store.uri} has no neighbours for these settings; run "
                f"`r2scp-pipe index {index_options(config.index, config.retrieval)}`"
            )
        return self._indexes[settings]

    def _read_index_id(self, settings: str) -> str:
        if not self.pins.neighbours:
            return ""
        where = f"settings = {sql_literal(settings)}"
        rows = self.store.neighbours(["index"], where=where, version=self.pins.neighbours)
        return " ".join(sorted(set(rows["index"].to_pylist())))


def index_options(settings: IndexSettings, retrieval: Retrieval) -> str:
    """The options of `r2scp-pipe index` that create these neighbours."""
    options = [f"--retrieval {retrieval}", *(f"--bank-corpus {name}" for name in settings.bank.corpora)]
    if settings.bank.splits != ("train",):
        options += [f"--bank-split {name}" for name in settings.bank.splits]
    if settings.n != HITS:
        options.append(f"--neighbours {settings.n}")
    if retrieval is Retrieval.HYBRID:
        options.append(f"--cross-weight {settings.cross_weight}")
    if settings.bank.disjoint:
        options.append("--disjoint")
    return " ".join(options if settings.leak_guard else [*options, "--no-leak-guard"])


def training_task(
    name: str, template: TrainingTask, contents: StoreContents, config: TrainConfig
) -> TrainingTask:
    """A variant's training below the folder of `template`; without a stage II it is the experts' own."""
    if not config.stage_two.epochs:
        task = experts_task(name, template, contents, config)
        return replace(task, split=template.split, rates=template.rates)
    experts = experts_task(name, template, contents, config).plan.folder if config.stage_one.epochs else None
    folder = template.plan.folder / "runs" / contents.key(config)
    return replace(
        template, name=name, plan=replace(template.plan, config=config, folder=folder, experts=experts)
    )


def experts_task(
    name: str, template: TrainingTask, contents: StoreContents, config: TrainConfig
) -> TrainingTask:
    """Stage I of a variant, not evaluated."""
    experts = experts_of(config)
    folder = template.plan.folder / "experts" / contents.key(experts)
    plan = replace(template.plan, config=experts, folder=folder, experts=None)
    return replace(template, name=f"stage I of {name}", plan=plan, split="", rates=False)


def run_task(task: TrainingTask) -> Outcome:
    """Start or resume a training, and evaluate it. Its errors are returned, so that other tasks continue."""
    torch.set_num_threads(1)
    try:
        run_training(task.plan, TrainOptions(device=task.device, threads=1), lambda _: None)
        best = read_checkpoint(task.plan.folder)
        if task.split:
            store = FeatureStore.open(task.plan.uri, task.plan.fingerprint, task.plan.storage_options)
            options = EvaluateOptions(
                split=task.split, rates=MISSING_RATES if task.rates else (), device=task.device
            )
            report = run_evaluate(store, task.plan.folder, options)
            replace_file(task.evaluation, (json.dumps(report, indent=1) + "\n").encode())
    except R2SCPError as error:
        return Outcome(message=str(error), failed=True)
    return Outcome(message=f"validation {100 * best.metrics['mean']:.1f} % at epoch {best.epoch}")
