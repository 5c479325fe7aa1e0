"""`evaluate`: accuracy where sound or picture is missing, always beside what little it could have been.

Conditions: A has the sound alone, V the picture alone, AV both. What is missing is not even read from the
store. The test split is meant to be read once, here.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r2scp.jobs.training.checkpoints import Checkpoint, read_last, read_checkpoint
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.stages import Worker
from r2scp.model.batch import SOURCES, Answer
from r2scp.model.metrics import AccuracyCounts, Score
from r2scp.pipelines.batches.dataset import MISSING_COLUMN, NO_MODALITY, BatchRequest
from r2scp.pipelines.batches.examples import MODALITIES, NO_ANSWER, Examples, Pins
from r2scp.pipelines.batches.prefetch import prefetch, sequential_batches
from r2scp.store.errors import CheckpointError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Condition

BASELINES = Path("baselines")  # in a run's folder, a run each
MISSING_SEED = 0  # who loses what at a missing rate: the same questions for every model
MISSING_RATES = (0.3, 0.5, 0.7)

Progress = Callable[[str, int, int], None]  # what, questions done, questions to do


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How to evaluate. `rates`: also lose each modality with these probabilities.

    `latest`: read the store as it is now, with whatever the bank has gained since the training.
    """

    split: str = "test"
    latest: bool = False
    rates: tuple[float, ...] = ()
    device: str = "cpu"
    progress: Progress = lambda *_: None


@dataclass(kw_only=True)
class ConditionResult:
    """What one model answered under one condition."""

    tally: AccuracyCounts = field(default_factory=AccuracyCounts)
    recovered: int = 0  # questions with a modality fetched from elsewhere
    fallbacks: int = 0  # of these, without any neighbour
    loads: np.ndarray = field(default_factory=lambda: np.zeros(len(SOURCES)))  # sums of router weights

    def add(self, examples: Examples, rows: np.ndarray, answer: Answer) -> None:
        chosen_B = answer.logits_BK.argmax(dim=1).cpu().numpy()
        self.tally.add([examples.types[row] for row in rows], chosen_B == examples.target_B[rows])
        evidence = answer.evidence
        self.recovered += int(evidence.recovered_BM.any(dim=1).sum())
        self.fallbacks += int(evidence.fallback_BM.any(dim=1).sum())
        self.loads += evidence.router_BS.float().sum(dim=0).cpu().numpy()

    def to_json(self) -> dict[str, object]:
        """Plain values: the overall score, those of groups and types, and how it was answered."""
        overall = self.tally.overall()
        loads = self.loads / max(overall.n, 1)
        return _plain(overall) | {
            "groups": {name: _plain(score) for name, score in self.tally.groups().items()},
            "types": {name: _plain(score) for name, score in self.tally.types().items()},
            "recovered": self.recovered,
            "fallbacks": self.fallbacks,
            "router": dict(zip(SOURCES, loads.round(4).tolist(), strict=True)),
        }


def run_evaluate(store: FeatureStore, run: Path, means: EvaluateOptions) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run and its baselines.

    Reads the store at the versions that the training read, unless `means` say otherwise. `unfinished` in what
    comes back names trainings that had not ended. Raises `FingerprintMismatch` for another encoder's store,
    `CheckpointError` where the run has no checkpoint or its baselines are of other versions of the store.
    """
    checkpoint = read_checkpoint(run)
    opened = data_for(checkpoint, store, means.latest)
    asked = questions_of(opened, means.split)
    others = {
        path.parent.name: read_checkpoint(path)
        for path in (checkpoint.folder / BASELINES).glob("*/best.json")
    }
    for other in others.values():
        if _data(other) != _data(checkpoint):
            raise CheckpointError(
                f"{other.folder} was trained on other versions of the store than {checkpoint.folder}; remove "
                "it and train again to compare"
            )
    answered = evaluate_model(checkpoint, opened, asked, means)
    majority = dict.fromkeys(answered, _majority(opened, asked))  # whatever is missing
    baselines: dict[str, object] = {"majority": _report(majority)}
    for name, other in sorted(others.items()):
        seen = data_for(other, store, means.latest)
        baselines[name] = _report(evaluate_model(other, seen, questions_of(seen, means.split), means))
    return {
        "run": str(checkpoint.folder),
        "split": means.split,
        **_report(answered),
        "baselines": baselines,
        "settings": {
            "retrieval": checkpoint.config.retrieval.value,
            "cmr": checkpoint.config.model.cmr,
            "cap": checkpoint.config.model.cap,
            "neighbours": checkpoint.config.model.neighbours,
            "k": checkpoint.config.model.k,
            "seed": checkpoint.config.seed,
            "leak_guard": checkpoint.config.index.leak_guard,
            "disjoint": checkpoint.config.index.bank.disjoint,
        },
        "unfinished": [name for name, one in {"r2scp": checkpoint, **others}.items() if not _finished(one)],
        "left_out": asked.left_out,
        "answers_unknown": int((asked.target_B == NO_ANSWER).sum()),
        "store": checkpoint.store | {"uri": store.uri, "versions": asdict(opened.pins)},
        "latest": means.latest,
        "trained_on": checkpoint.store["uri"],
        "checkpoint": {"epoch": checkpoint.epoch, "step": checkpoint.step, "sha256": checkpoint.sha256},
        "code": checkpoint.code,
    }


def data_for(checkpoint: Checkpoint, store: FeatureStore, latest: bool = False) -> TrainingData:
    """The store as the checkpoint's training saw it, or as it is now. Raises `FingerprintMismatch`."""
    checkpoint.require_store(store)
    versions = checkpoint.store["versions"]
    assert isinstance(versions, dict)
    pins = Pins.latest(store) if latest else Pins(**versions)
    return TrainingData.read(store, pins, checkpoint.config, checkpoint.answers)


def questions_of(opened: TrainingData, split: str) -> Examples:
    """The questions of a split; `val` are those that chose the best checkpoint, also where they were held out
    from `train`. Raises `StoreError` where there are none."""
    if split == "val" and opened.config.holdout:
        return opened.learning()[1]
    return opened.examples(split)


def evaluate_model(
    checkpoint: Checkpoint, opened: TrainingData, examples: Examples, means: EvaluateOptions
) -> dict[str, ConditionResult]:
    """Condition -> what the model answered. Conditions at a missing rate are named like "audio 30%"."""
    worker = Worker(device=torch.device(means.device))
    model, dataset = checkpoint.model(worker.device), opened.dataset(examples)
    asks = {name: np.full(len(examples), missing) for name, missing in MISSING_COLUMN.items()}
    for rate in means.rates:
        asks |= missing_at_rate(len(examples), rate)
    answered = {}
    for name, missing_N in asks.items():
        answered[name] = asked = ConditionResult()
        batches = sequential_batches(len(examples), checkpoint.config.evaluate_rows)
        prepared = prefetch(
            lambda rows, missing_N=missing_N: dataset.batch(rows, BatchRequest(missing_B=missing_N[rows])),
            batches,
        )
        with closing(prepared):  # also where a batch fails
            for rows, batch in zip(batches, prepared, strict=True):
                with torch.no_grad(), worker.autocast():
                    answer = model(batch.to(worker.device))
                asked.add(examples, rows, answer)
                means.progress(f"{checkpoint.folder.name} {name}", int(rows[-1]) + 1, len(examples))
    return answered


def missing_at_rate(count: int, rate: float) -> dict[str, np.ndarray]:
    """Which of `count` questions lose each modality, as `Ask.missing_B`, for every model the same ones.

    Those that lose it at a lower rate also do at a higher one.
    """
    draw_MN = np.random.default_rng(MISSING_SEED).random((len(MODALITIES), count))
    return {
        f"{modality.value} {rate:.0%}": np.where(draw_MN[column] < rate, column, NO_MODALITY)
        for column, modality in enumerate(MODALITIES)
    }


def _majority(opened: TrainingData, examples: Examples) -> ConditionResult:
    """The most frequent answer of the question's type in training; neither model nor clip is asked.

    Where questions bring their choices it is the most frequent place. Types that training has not get the
    most frequent of all.
    """
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    overall: Counter[int] = Counter()
    learned = opened.learning()[0]
    for kind, target in zip(learned.types, learned.target_B.tolist(), strict=True):
        counts[kind][target] += 1
        overall[target] += 1
    guesses = [(counts.get(kind) or overall).most_common(1)[0][0] for kind in examples.types]
    asked = ConditionResult()
    asked.tally.add(examples.types, np.equal(guesses, examples.target_B).tolist())
    return asked


def _data(checkpoint: Checkpoint) -> dict[str, object]:
    """What a training read, wherever it was."""
    return {name: value for name, value in checkpoint.store.items() if name != "uri"}


def _finished(checkpoint: Checkpoint) -> bool:
    """Whether nothing was left to train; a checkpoint by itself says nothing of it."""
    last = read_last(checkpoint.folder)
    return last is None or last.finished


def _report(answered: Mapping[str, ConditionResult]) -> dict[str, object]:
    conditions = {name: asked.to_json() for name, asked in answered.items() if name in MISSING_COLUMN}
    report: dict[str, object] = {
        "conditions": conditions,
        "average": sum(answered[name].tally.overall().accuracy for name in Condition) / len(Condition),
    }
    rates = {name: asked.to_json() for name, asked in answered.items() if name not in MISSING_COLUMN}
    return report | ({"missing_rates": rates} if rates else {})


def _plain(score: Score) -> dict[str, object]:
    return {"accuracy": score.accuracy, "n": score.n, "interval": list(score.interval)}
