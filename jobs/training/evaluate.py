"""`evaluate`: accuracy with a modality missing, compared with the baselines.

Conditions: A has only the sound, V only the picture, AV both. A missing modality is not even read from the
store. The test split is read here and nowhere else.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r2scp.jobs.training.checkpoints import Checkpoint, read_checkpoint, read_last
from r2scp.jobs.training.config import TrainConfig
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

BASELINES = Path("baselines")  # in a run's folder: a run per baseline
MISSING_SEED = 0  # draws which questions lose a modality at a missing rate: the same for every model
MISSING_RATES = (0.3, 0.5, 0.7)

OnProgress = Callable[[str, int, int], None]  # model and condition, questions done, questions in all


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How to evaluate. `rates`: also evaluate with each modality missing at these rates.

    `latest`: read the latest store version, not the one trained on.
    """

    split: str = "test"
    latest: bool = False
    rates: tuple[float, ...] = ()
    device: str = "cpu"
    on_progress: OnProgress = lambda *_: None


@dataclass(kw_only=True)
class ConditionResult:
    """How one model answered under one condition."""

    counts: AccuracyCounts = field(default_factory=AccuracyCounts)
    recovered: int = 0  # questions with a retrieved modality
    fallbacks: int = 0  # of these, questions without any neighbour
    loads: np.ndarray = field(default_factory=lambda: np.zeros(len(SOURCES)))  # sums of router weights

    def add(self, examples: Examples, rows: np.ndarray, answer: Answer) -> None:
        chosen_B = answer.logits_BK.argmax(dim=1).cpu().numpy()
        self.counts.add([examples.types[row] for row in rows], chosen_B == examples.target_B[rows])
        evidence = answer.evidence
        self.recovered += int(evidence.recovered_BM.any(dim=1).sum())
        self.fallbacks += int(evidence.fallback_BM.any(dim=1).sum())
        self.loads += evidence.router_BS.float().sum(dim=0).cpu().numpy()

    def to_json(self) -> dict[str, object]:
        """Plain values: the overall score, the scores of groups and types, recovery and router weights."""
        overall = self.counts.overall()
        loads = self.loads / max(overall.n, 1)
        return _score_to_json(overall) | {
            "groups": {name: _score_to_json(score) for name, score in self.counts.groups().items()},
            "types": {name: _score_to_json(score) for name, score in self.counts.types().items()},
            "recovered": self.recovered,
            "fallbacks": self.fallbacks,
            "router": dict(zip(SOURCES, loads.round(4).tolist(), strict=True)),
        }


def run_evaluate(store: FeatureStore, run: Path, options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run and its baselines.

    Reads the store at the versions that the training read, unless `options.latest`. `unfinished` in the
    result names trainings that are not complete. Raises `FingerprintMismatch` for another encoder's store,
    `CheckpointError` if the run has no checkpoint or its baselines were trained on other store versions.
    """
    checkpoint = read_checkpoint(run)
    data = data_for(checkpoint, store, options.latest)
    examples = questions_of(data, options.split)
    others = _baselines(checkpoint)
    results = evaluate_model(checkpoint, data, examples, options)
    # the majority baseline sees neither modality: it answers alike under every condition
    majority = dict.fromkeys(results, _majority(data, examples))
    baselines: dict[str, object] = {"majority": _report(majority)}
    for name, other in sorted(others.items()):
        other_data = data_for(other, store, options.latest)
        questions = questions_of(other_data, options.split)
        baselines[name] = _report(evaluate_model(other, other_data, questions, options))
    return {
        "run": str(checkpoint.folder),
        "split": options.split,
        **_report(results),
        "baselines": baselines,
        "settings": _settings(checkpoint.config),
        "unfinished": [name for name, one in {"r2scp": checkpoint, **others}.items() if not _finished(one)],
        "left_out": examples.left_out,
        "answers_unknown": int((examples.target_B == NO_ANSWER).sum()),
        "store": checkpoint.store | {"uri": store.uri, "versions": asdict(data.pins)},
        "latest": options.latest,
        "trained_on": checkpoint.store["uri"],
        "checkpoint": {"epoch": checkpoint.epoch, "step": checkpoint.step, "sha256": checkpoint.sha256},
        "code": checkpoint.code,
    }


def _baselines(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """The best checkpoints of a run's baselines. Raises `CheckpointError` for other store versions."""
    paths = (checkpoint.folder / BASELINES).glob("*/best.json")
    baselines = {path.parent.name: read_checkpoint(path) for path in paths}
    for other in baselines.values():
        if _data_read(other) != _data_read(checkpoint):
            raise CheckpointError(
                f"{other.folder} was trained on other versions of the store than {checkpoint.folder}; remove "
                "it and train again to compare"
            )
    return baselines


def _settings(config: TrainConfig) -> dict[str, object]:
    return {
        "retrieval": config.retrieval.value,
        "cmr": config.model.cmr,
        "cap": config.model.cap,
        "neighbours": config.model.neighbours,
        "k": config.model.k,
        "seed": config.seed,
        "leak_guard": config.index.leak_guard,
        "disjoint": config.index.bank.disjoint,
    }


def data_for(checkpoint: Checkpoint, store: FeatureStore, latest: bool = False) -> TrainingData:
    """The store as the training read it, or its latest version. Raises `FingerprintMismatch`."""
    checkpoint.require_store(store)
    versions = checkpoint.store["versions"]
    assert isinstance(versions, dict)
    pins = Pins.latest(store) if latest else Pins(**versions)
    return TrainingData.read(store, pins, checkpoint.config, checkpoint.answers)


def questions_of(data: TrainingData, split: str) -> Examples:
    """The questions of a split. `val`: those that chose the best checkpoint, held out from `train` or not.

    Raises `StoreError` if there are none.
    """
    if split == "val" and data.config.holdout:
        return data.train_and_validation()[1]
    return data.examples(split)


def evaluate_model(
    checkpoint: Checkpoint, data: TrainingData, examples: Examples, options: EvaluateOptions
) -> dict[str, ConditionResult]:
    """Results by condition. Conditions at a missing rate are named like "audio 30%"."""
    worker = Worker(device=torch.device(options.device))
    model, dataset = checkpoint.model(worker.device), data.dataset(examples)
    missing_by_condition = {name: np.full(len(examples), missing) for name, missing in MISSING_COLUMN.items()}
    for rate in options.rates:
        missing_by_condition |= missing_at_rate(len(examples), rate)
    results = {}
    for name, missing_N in missing_by_condition.items():
        results[name] = result = ConditionResult()
        batches = sequential_batches(len(examples), checkpoint.config.evaluate_rows)
        prepared = prefetch(
            lambda rows, missing_N=missing_N: dataset.batch(rows, BatchRequest(missing_B=missing_N[rows])),
            batches,
        )
        with closing(prepared):  # also if a batch fails
            for rows, batch in zip(batches, prepared, strict=True):
                with torch.no_grad(), worker.autocast():
                    answer = model(batch.to(worker.device))
                result.add(examples, rows, answer)
                options.on_progress(f"{checkpoint.folder.name} {name}", int(rows[-1]) + 1, len(examples))
    return results


def missing_at_rate(count: int, rate: float) -> dict[str, np.ndarray]:
    """Which of `count` questions lose each modality, as `BatchRequest.missing_B`; the same for every model.

    A question that loses it at one rate also loses it at every higher rate.
    """
    draw_MN = np.random.default_rng(MISSING_SEED).random((len(MODALITIES), count))
    return {
        f"{modality.value} {rate:.0%}": np.where(draw_MN[column] < rate, column, NO_MODALITY)
        for column, modality in enumerate(MODALITIES)
    }


def _majority(data: TrainingData, examples: Examples) -> ConditionResult:
    """The baseline that gives the most frequent training answer of the question's type.

    If each question has its own choices, it is the most frequent position. Types that do not occur in
    training get the most frequent answer overall.
    """
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    overall: Counter[int] = Counter()
    train = data.train_and_validation()[0]
    for kind, target in zip(train.types, train.target_B.tolist(), strict=True):
        counts[kind][target] += 1
        overall[target] += 1
    guesses = [(counts.get(kind) or overall).most_common(1)[0][0] for kind in examples.types]
    result = ConditionResult()
    result.counts.add(examples.types, np.equal(guesses, examples.target_B).tolist())
    return result


def _data_read(checkpoint: Checkpoint) -> dict[str, object]:
    """Encoder and versions that a training read, wherever the store was."""
    return {name: value for name, value in checkpoint.store.items() if name != "uri"}


def _finished(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's training is complete; a checkpoint without its run counts as complete."""
    last = read_last(checkpoint.folder)
    return last is None or last.finished


def _report(results: Mapping[str, ConditionResult]) -> dict[str, object]:
    conditions = {name: result.to_json() for name, result in results.items() if name in MISSING_COLUMN}
    report: dict[str, object] = {
        "conditions": conditions,
        "average": sum(results[name].counts.overall().accuracy for name in Condition) / len(Condition),
    }
    rates = {name: result.to_json() for name, result in results.items() if name not in MISSING_COLUMN}
    return report | ({"missing_rates": rates} if rates else {})


def _score_to_json(score: Score) -> dict[str, object]:
    return {"accuracy": score.accuracy, "n": score.n, "interval": list(score.interval)}
