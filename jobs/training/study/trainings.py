"""The trainings of a study: what names them, where they rest, and what a task does for one.

    FOLDER/experts/KEY     stage I, shared by all variants that begin alike
    FOLDER/runs/KEY        one training, with its evaluation; shared by all studies that need it

KEY is of the whole config and of what the store holds, wherever it is and whatever was added to it that the
training does not see, such as other indexes. So a study that is started again, or another that needs the same
training, goes on from what is there, and trainings of two stores never meet.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

import torch

from r2scp.jobs.training.checkpoints import read_last, read_checkpoint
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
class Job:
    """One training and its evaluation; what a task gets. `name`: variant and seed, for people."""

    name: str
    plan: TrainPlan
    split: str  # "": do not evaluate
    rates: bool = False
    device: str = "cpu"

    @property
    def evaluation(self) -> Path:
        """Where its accuracies are kept."""
        return self.plan.folder / f"evaluation-{quote(self.split, safe='')}{'-rates' * self.rates}.json"

    @property
    def done(self) -> bool:
        """Whether it is trained to the end and, if it is to be, evaluated as it then was."""
        last = read_last(self.plan.folder)
        if last is None or not last.finished:
            return False
        if not self.split:
            return True
        if not self.evaluation.exists():
            return False
        said = json.loads(self.evaluation.read_bytes())
        return said["checkpoint"]["sha256"] == read_checkpoint(self.plan.folder).sha256


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job: a word about it, or what went wrong."""

    said: str
    failed: bool = False


@dataclass(kw_only=True)
class StoreContents:
    """What a store holds at pinned versions, as far as it decides what a training comes to."""

    store: FeatureStore
    pins: Pins
    _digest: str = ""
    _indexes: dict[str, str] = field(default_factory=dict)

    def key(self, config: TrainConfig) -> str:
        """Names a training by all of its settings and its data. Raises `StoreError` for a missing index."""
        parts = [config.to_json(), self.digest, self.index(config)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def digest(self) -> str:
        """Of clips and questions."""
        if not self._digest:
            found = hashlib.sha256(self.store.fingerprint.encode())
            tables = ((Table.CLIPS, CLIP_COLUMNS), (Table.QUESTIONS, QUESTION_COLUMNS))
            for (table, columns), version in zip(tables, (self.pins.clips, self.pins.questions), strict=True):
                dataset = self.store.dataset(table, version)
                for batch in dataset.to_batches(columns=list(columns), scan_in_order=True):
                    found.update(batch.serialize())
            self._digest = found.hexdigest()
        return self._digest

    def index(self, config: TrainConfig) -> str:
        """Names the neighbours that a training reads; "" where it reads none."""
        if not config.model.cmr or config.sees == "question":
            return ""
        named = config.index.settings_key(config.retrieval)
        if named not in self._indexes:
            self._indexes[named] = self._find(named)
        if not self._indexes[named]:
            raise StoreError(
                f"the store at {self.store.uri} lacks neighbours; run "
                f"`r2scp-pipe index {index_options(config.index, config.retrieval)}`"
            )
        return self._indexes[named]

    def _find(self, named: str) -> str:
        if not self.pins.neighbours:
            return ""
        where = f"settings = {sql_literal(named)}"
        rows = self.store.neighbours(["index"], where=where, version=self.pins.neighbours)
        return " ".join(sorted(set(rows["index"].to_pylist())))


def index_options(settings: IndexSettings, retrieval: Retrieval) -> str:
    """The options of `index` that make these neighbours."""
    words = [f"--retrieval {retrieval}", *(f"--bank-corpus {name}" for name in settings.bank.corpora)]
    if settings.bank.splits != ("train",):
        words += [f"--bank-split {name}" for name in settings.bank.splits]
    if settings.n != HITS:
        words.append(f"--neighbours {settings.n}")
    if retrieval is Retrieval.HYBRID:
        words.append(f"--cross-weight {settings.cross_weight}")
    if settings.bank.disjoint:
        words.append("--disjoint")
    return " ".join(words if settings.leak_guard else [*words, "--no-leak-guard"])


def training_task(name: str, template: Job, contents: StoreContents, config: TrainConfig) -> Job:
    """A variant's training below the folder of `template`; one without a stage II is that of its experts."""
    if not config.stage_two.epochs:
        job = experts_task(name, template, contents, config)
        return replace(job, split=template.split, rates=template.rates)
    experts = experts_task(name, template, contents, config).plan.folder if config.stage_one.epochs else None
    folder = template.plan.folder / "runs" / contents.key(config)
    return replace(
        template, name=name, plan=replace(template.plan, config=config, folder=folder, experts=experts)
    )


def experts_task(name: str, template: Job, contents: StoreContents, config: TrainConfig) -> Job:
    """Stage I of a variant; not evaluated."""
    experts = experts_of(config)
    folder = template.plan.folder / "experts" / contents.key(experts)
    plan = replace(template.plan, config=experts, folder=folder, experts=None)
    return replace(template, name=f"stage I of {name}", plan=plan, split="", rates=False)


def work(job: Job) -> Outcome:
    """Runs in a task: train, or go on training, and evaluate. What goes wrong leaves others alone."""
    torch.set_num_threads(1)
    try:
        run_training(job.plan, TrainOptions(device=job.device, threads=1), lambda _: None)
        best = read_checkpoint(job.plan.folder)
        if job.split:
            store = FeatureStore.open(job.plan.uri, job.plan.fingerprint, job.plan.storage_options)
            means = EvaluateOptions(
                split=job.split, rates=MISSING_RATES if job.rates else (), device=job.device
            )
            report = run_evaluate(store, job.plan.folder, means)
            replace_file(job.evaluation, (json.dumps(report, indent=1) + "\n").encode())
    except R2SCPError as error:
        return Outcome(said=str(error), failed=True)
    return Outcome(said=f"validation {100 * best.metrics['mean']:.1f} % at epoch {best.epoch}")
