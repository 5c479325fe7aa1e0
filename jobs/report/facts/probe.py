"""The model's internals on a sample of validation questions: joint vectors, dissonance, correct answers.

The joint vector is what the joint head classifies: the question's vector after attention to the fused
sequence, which the head's last layer turns into logits. The test split is not read.
"""

from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits
from torch import Tensor

from r2scp.jobs.report.facts.agreement import chance_agreement, mean_interval, neighbour_agreement
from r2scp.jobs.training.checkpoints import Checkpoint, read_checkpoint
from r2scp.jobs.training.config import NO_RECOVERY_DROPOUT
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.evaluate import BASELINES, data_for, questions_of
from r2scp.jobs.training.stages import Worker
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.batches.dataset import MISSING_COLUMN, NO_MODALITY, BatchRequest
from r2scp.pipelines.batches.examples import MODALITIES, NO_ANSWER, Examples
from r2scp.pipelines.batches.prefetch import prefetch, sequential_batches
from r2scp.store.errors import CheckpointError, StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

SPLIT = "val"
SAMPLE_SIZE = 600  # questions
SEED = 0  # of the sample and of t-SNE
PERPLEXITY = 30.0
MIN_VECTORS = 12  # for t-SNE
NEAREST_VECTORS = 10  # neighbours of a joint vector whose answers are compared with its own
WITH_RECOVERY, RECOVERY_OFF = "with recovery", "same weights, recovery off"
TRAINED_WITHOUT = "baseline trained without recovery"


@dataclass(frozen=True, kw_only=True)
class ModelOutputs:
    """Outputs of one model on the sample under one condition."""

    joint_QD: np.ndarray  # float32
    right_Q: np.ndarray  # bool


@dataclass(kw_only=True)
class Probe:
    """The sample, and each model's outputs. `population`: how many questions it was drawn from."""

    opened: TrainingData
    examples: Examples
    population: int
    answers: list[str]  # the correct ones
    outputs: dict[tuple[str, str], ModelOutputs] = field(default_factory=dict)  # by model and condition
    dissonance: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # see `_dissonance_of`

    def metrics(self) -> list[list[object]]:
        """Rows of model, condition, accuracy, and how well nearby joint vectors agree in their answer."""
        chance = chance_agreement(self.answers, self.examples.types)
        rows = []
        for (model, condition), outputs in self.outputs.items():
            agree_Q = neighbour_agreement(outputs.joint_QD, self.answers, NEAREST_VECTORS)
            low, high = mean_interval(agree_Q, self.examples.clip_row_B)
            shares = (outputs.right_Q.mean(), agree_Q.mean(), low, high, chance)
            percents = [round(100 * float(share), 2) for share in shares]
            rows.append([model, condition, *percents, self._silhouette(outputs)])
        return rows

    def _silhouette(self, outputs: ModelOutputs) -> float | None:
        if not 2 <= len(set(self.answers)) < len(self.answers):
            return None
        return round(float(silhouette_score(outputs.joint_QD, self.answers, metric="cosine")), 3)

    @property
    def perplexity(self) -> float:
        """Of t-SNE; lower for few vectors."""
        return min(PERPLEXITY, (len(self.answers) - 1) / 3)

    def tsne(self, model: str, condition: str) -> np.ndarray:
        """(Q, 2): t-SNE of the joint vectors, reproducible on one machine."""
        tsne = TSNE(perplexity=self.perplexity, init="pca", random_state=SEED, metric="cosine", n_jobs=1)
        with threadpool_limits(1):  # more threads are slower for so few points
            return tsne.fit_transform(self.outputs[model, condition].joint_QD)


def probe(checkpoint: Checkpoint, store: FeatureStore, device: str = "cpu") -> Probe:
    """Run the sample through our model, with recovery on and off, and the baseline trained without it.

    Raises `StoreError`, `FingerprintMismatch` or `CheckpointError` for what is missing or does not fit.
    """
    opened = data_for(checkpoint, store)
    everything = questions_of(opened, SPLIT)
    known = everything.keep(everything.target_B != NO_ANSWER, "answer not known")
    if not len(known):
        raise StoreError(f"no question of the {SPLIT} split has an answer that occurs in training")
    keep = np.zeros(len(known), dtype=bool)
    keep[np.random.default_rng(SEED).permutation(len(known))[:SAMPLE_SIZE]] = True
    examples = known.keep(keep, "not in the sample")
    answers = _answers(opened, examples)
    result = Probe(opened=opened, examples=examples, population=len(known), answers=answers)
    worker = Worker(device=torch.device(device))
    ours = checkpoint.model(worker.device)
    _run_model(result, WITH_RECOVERY, ours, checkpoint, worker)
    if ours.recovers:
        ours.config = replace(ours.config, cmr=False, cap=False)
        _run_model(result, RECOVERY_OFF, ours, checkpoint, worker)
        if (baseline := _baseline(checkpoint, NO_RECOVERY_DROPOUT)) is not None:
            _run_model(result, TRAINED_WITHOUT, baseline.model(worker.device), baseline, worker)
    return result


def _baseline(checkpoint: Checkpoint, name: str) -> Checkpoint | None:
    """A baseline that was trained on the same data, or None."""
    folder: Path = checkpoint.folder / BASELINES / name
    try:
        baseline = read_checkpoint(folder)
    except CheckpointError:
        return None
    same = (
        baseline.store["versions"] == checkpoint.store["versions"] and baseline.answers == checkpoint.answers
    )
    return baseline if same and baseline.config.sees == "everything" else None


def _answers(opened: TrainingData, examples: Examples) -> list[str]:
    table = opened.store.dataset(Table.QUESTIONS, opened.pins.questions).take(
        examples.question_row_B, columns=["answer", "choices"]
    )
    if opened.answers is not None:
        return [opened.answers[target] for target in examples.target_B]
    choices = table["choices"].to_pylist()
    return [str(row[target]) for row, target in zip(choices, examples.target_B, strict=True)]


def _run_model(probe: Probe, name: str, model: R2SCP, checkpoint: Checkpoint, worker: Worker) -> None:
    opened = probe.opened if name != TRAINED_WITHOUT else replace(probe.opened, neighbours=None)
    dataset = opened.dataset(probe.examples)
    batches = sequential_batches(len(probe.examples), checkpoint.config.evaluate_rows)
    for condition, missing in MISSING_COLUMN.items():
        if missing == NO_MODALITY and name == RECOVERY_OFF:
            continue  # nothing is recovered, so the outputs are those with recovery
        request = BatchRequest.uniform(len(probe.examples), missing)
        prepared = prefetch(
            lambda rows, request=request: dataset.batch(
                rows, replace(request, missing_B=request.missing_B[rows])
            ),
            batches,
        )
        vectors, right, dissonance = [], [], []
        with closing(prepared), torch.inference_mode(), worker.autocast():
            for rows, batch in zip(batches, prepared, strict=True):
                answer = model(batch.to(worker.device))
                vectors.append(answer.evidence.joint_BD.float().cpu().numpy())
                right.append(answer.logits_BK.argmax(dim=1).cpu().numpy() == probe.examples.target_B[rows])
                if missing != NO_MODALITY and (purified := answer.evidence.purified[missing]) is not None:
                    dissonance.append(_dissonance_of(purified.dissonance_BL, purified.noise_BL))
        probe.outputs[name, condition] = ModelOutputs(
            joint_QD=np.concatenate(vectors), right_Q=np.concatenate(right)
        )
        if dissonance and name == WITH_RECOVERY:
            parts = zip(*dissonance, strict=True)
            probe.dissonance[MODALITIES[missing].value] = tuple(np.concatenate(part) for part in parts)  # pyright: ignore


def _dissonance_of(dissonance_BL: Tensor, noise_BL: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """δ of all recovered tokens of a batch, flat, and which of them were purged."""
    values_BL = dissonance_BL.float().cpu().numpy()
    recovered_BL = ~np.isnan(values_BL)
    return values_BL[recovered_BL], noise_BL.cpu().numpy()[recovered_BL]
