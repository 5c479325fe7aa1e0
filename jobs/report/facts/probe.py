"""Asking a sample of validation questions again, to look inside: joint vectors, dissonance, what was right.

The joint vector is what the joint head answers from: the question's vector after it has read the fused
sequence, which the head's last layer turns into logits. The test split is not touched.
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
from r2scp.jobs.training.evaluation_table import TITLES
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
MIN_VECTORS = 12  # vectors of which a picture makes sense
NEAREST_VECTORS = 10  # joint vectors that should agree in their answer
WITH_RECOVERY, RECOVERY_OFF = "with recovery", "same weights, recovery off"
TRAINED_WITHOUT = f"trained without ({TITLES[NO_RECOVERY_DROPOUT]})"


@dataclass(frozen=True, kw_only=True)
class ModelOutputs:
    """What one model made of the sample under one condition."""

    joint_QD: np.ndarray  # float32
    right_Q: np.ndarray  # bool


@dataclass(kw_only=True)
class Probe:
    """The sample, and what each model made of it. `of`: how many questions it is a sample of."""

    opened: TrainingData
    examples: Examples
    of: int
    answers: list[str]  # the right ones
    seen: dict[tuple[str, str], ModelOutputs] = field(default_factory=dict)  # by model and condition
    dissonance: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # see `_told_of`

    def numbers(self) -> list[list[object]]:
        """Model, condition, accuracy, then how far joint vectors of one answer are together."""
        chance = chance_agreement(self.answers, self.examples.types)
        rows = []
        for (model, condition), seen in self.outputs.items():
            agree_Q = neighbour_agreement(seen.joint_QD, self.answers, NEAREST_VECTORS)
            low, high = mean_interval(agree_Q, self.examples.clip_row_B)
            ends = [round(100 * float(share), 2) for share in (agree_Q.mean(), low, high, chance)]
            rows.append(
                [model, condition, round(100 * float(seen.right_Q.mean()), 2), *ends, self._silhouette(seen)]
            )
        return rows

    def _silhouette(self, seen: ModelOutputs) -> float | None:
        if not 2 <= len(set(self.answers)) < len(self.answers):
            return None
        return round(float(silhouette_score(seen.joint_QD, self.answers, metric="cosine")), 3)

    @property
    def perplexity(self) -> float:
        """Of t-SNE; less where there are few vectors."""
        return min(PERPLEXITY, (len(self.answers) - 1) / 3)

    def placed(self, model: str, condition: str) -> np.ndarray:
        """(Q, 2): t-SNE of the joint vectors, the same on every run on one machine."""
        tsne = TSNE(perplexity=self.perplexity, init="pca", random_state=SEED, metric="cosine", n_jobs=1)
        with threadpool_limits(1):  # many threads wait for each other over so few points
            return tsne.fit_transform(self.outputs[model, condition].joint_QD)


def probe(checkpoint: Checkpoint, store: FeatureStore, device: str = "cpu") -> Probe:
    """Ask the sample of ours, of ours with its recovery off, and of the baseline without any, if it is there.

    Raises `StoreError`, `FingerprintMismatch` or `CheckpointError` for what is not there or does not fit.
    """
    opened = data_for(checkpoint, store)
    everything = questions_of(opened, SPLIT)
    known = everything.keep(everything.target_B != NO_ANSWER, "answer not known")
    if not len(known):
        raise StoreError(f"no question of the split {SPLIT!r} has an answer that training knows")
    keep = np.zeros(len(known), dtype=bool)
    drawn = np.random.default_rng(SEED).permutation(len(known))[:SAMPLE_SIZE]
    keep[drawn] = True
    examples = known.keep(keep, "not in the sample")
    found = Probe(opened=opened, examples=examples, of=len(known), answers=_answers(opened, examples))
    worker = Worker(device=torch.device(device))
    ours = checkpoint.model(worker.device)
    _ask(found, WITH_RECOVERY, ours, checkpoint, worker)
    if ours.recovers:
        ours.config = replace(ours.config, cmr=False, cap=False)
        _ask(found, RECOVERY_OFF, ours, checkpoint, worker)
        if (rival := _baseline(checkpoint, NO_RECOVERY_DROPOUT)) is not None:
            _ask(found, TRAINED_WITHOUT, rival.model(worker.device), rival, worker)
    return found


def _baseline(checkpoint: Checkpoint, name: str) -> Checkpoint | None:
    """One that was trained on the same data; None where it was not."""
    folder: Path = checkpoint.folder / BASELINES / name
    try:
        rival = read_checkpoint(folder)
    except CheckpointError:
        return None
    same = rival.store["versions"] == checkpoint.store["versions"] and rival.answers == checkpoint.answers
    return rival if same and rival.config.sees == "everything" else None


def _answers(opened: TrainingData, examples: Examples) -> list[str]:
    table = opened.store.dataset(Table.QUESTIONS, opened.pins.questions).take(
        examples.question_row_B, columns=["answer", "choices"]
    )
    if opened.answers is not None:
        return [opened.answers[target] for target in examples.target_B]
    listed = table["choices"].to_pylist()
    return [str(row[target]) for row, target in zip(listed, examples.target_B, strict=True)]


def _ask(found: Probe, name: str, model: R2SCP, checkpoint: Checkpoint, worker: Worker) -> None:
    opened = found.opened if name != TRAINED_WITHOUT else replace(found.opened, neighbours=None)
    dataset = opened.dataset(found.examples)
    batches = sequential_batches(len(found.examples), checkpoint.config.evaluate_rows)
    for condition, missing in MISSING_COLUMN.items():
        if missing == NO_MODALITY and name == RECOVERY_OFF:
            continue  # nothing to recover: as with recovery
        asked = BatchRequest.uniform(len(found.examples), missing)
        prepared = prefetch(
            lambda rows, asked=asked: dataset.batch(rows, replace(asked, missing_B=asked.missing_B[rows])),
            batches,
        )
        vectors, right, noted = [], [], []
        with closing(prepared), torch.inference_mode(), worker.autocast():
            for rows, batch in zip(batches, prepared, strict=True):
                answer = model(batch.to(worker.device))
                vectors.append(answer.evidence.joint_BD.float().cpu().numpy())
                right.append(answer.logits_BK.argmax(dim=1).cpu().numpy() == found.examples.target_B[rows])
                if missing != NO_MODALITY and (purified := answer.evidence.purified[missing]) is not None:
                    noted.append(_told_of(purified.dissonance_BL, purified.noise_BL))
        found.outputs[name, condition] = ModelOutputs(
            joint_QD=np.concatenate(vectors), right_Q=np.concatenate(right)
        )
        if noted and name == WITH_RECOVERY:
            parts = zip(*noted, strict=True)
            found.dissonance[MODALITIES[missing].value] = tuple(np.concatenate(part) for part in parts)  # pyright: ignore


def _told_of(dissonance_BL: Tensor, noise_BL: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """δ of all recovered tokens of a batch, and which of them were purged."""
    values_BL = dissonance_BL.float().cpu().numpy()
    there_BL = ~np.isnan(values_BL)
    return values_BL[there_BL], noise_BL.cpu().numpy()[there_BL]
