"""The two stages of training: the inputs of a step, its loss, and validation."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from r2scp.jobs.training.checkpoints import BEST, EXPERTS
from r2scp.jobs.training.config import TrainConfig
from r2scp.model.batch import AUDIO, SOURCES, VISUAL, Answer, Batch
from r2scp.model.losses import Loss, LossConfig, Losses, expert_loss, mixing_loss, task_loss
from r2scp.model.r2scp import R2SCP, Encoded, Stage
from r2scp.pipelines.batches.dataset import MISSING_COLUMN, NO_MODALITY, BatchRequest, Dataset
from r2scp.pipelines.batches.expert_cache import ExpertCache
from r2scp.pipelines.batches.prefetch import prefetch, sequential_batches


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One process of a training."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU, nothing on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def all_reduce(self, counts: Tensor) -> Tensor:
        """The sum over all workers."""
        if self.world > 1:
            counts = counts.to(self.device)
            dist.all_reduce(counts)
        return counts.cpu()


class Step(NamedTuple):
    """Loss of a training step, answers from complete rows and, in stage II, with one modality missing."""

    loss: Loss
    full: Answer
    incomplete: Answer | None


class ExpertsObjective(nn.Module):
    """Stage I as one call: batch -> loss. Modalities may be missing from the batch (modality dropout).

    A module around the model, so that data-parallel training sees one forward and one backward per step.
    """

    def __init__(self, model: R2SCP) -> None:
        super().__init__()
        self.model = model.set_stage(Stage.EXPERTS)

    def forward(self, batch: Batch) -> Step:
        """One answer from what is present. ValueError without targets."""
        target_B = _target(batch)
        answer = self.model(batch)
        return Step(expert_loss(answer, target_B, batch.present_BM), answer, None)


class MixingObjective(nn.Module):
    """Stage II as one call: (batch, missing modality) -> loss. Every row must be complete.

    Where the experts are frozen their output may come instead of a batch.
    """

    def __init__(self, model: R2SCP, config: LossConfig | None = None) -> None:
        super().__init__()
        self.model = model.set_stage(Stage.MIXING)
        self.config = config or LossConfig()

    def forward(self, batch: Batch | Encoded, missing: int) -> Step:
        """Three answers from one encoding: real (X in the paper), recovered (R⁺), from the farthest (R⁻).

        The last needs retrieval and farthest neighbours in the batch. If the model recovers nothing, the
        second has the modality `missing` dropped, and nothing is ranked.
        """
        target_B = _target(batch)
        if not bool(batch.present_BM.all()):
            raise ValueError("stage II compares with the real modality: every row must have audio and visual")
        recovers = self.model.config.recovers
        if isinstance(batch, Encoded):
            encoded = batch
        else:
            encoded = self.model.encode(batch, missing if recovers else None)
        full = self.model.answer(encoded)
        incomplete = farthest = None
        if recovers or self.config.modality_dropout:
            incomplete = self.model.answer(encoded.drop(missing))
        if self.config.rank_weight and encoded.farthest is not None:
            farthest = self.model.answer(encoded.drop(missing).with_farthest())
        losses = Losses(
            real_B=task_loss(full.logits_BK, target_B),
            near_B=None if incomplete is None else task_loss(incomplete.logits_BK, target_B),
            far_B=None if farthest is None else task_loss(farthest.logits_BK, target_B),
        )
        return Step(mixing_loss(losses, self.config, ranked=recovers), full, incomplete)


class TrainStage(Protocol):
    """A stage, as the training loop uses it.

    The weights of its best epoch are saved under each of `checkpoint_names`.
    """

    stage: Stage
    checkpoint_names: list[str]
    model: R2SCP
    dataset: Dataset

    @property
    def module(self) -> nn.Module:
        """Called as `module(inputs, missing)`; returns a `Step`."""
        ...

    def prepare(self, rows: np.ndarray, missing: int) -> Batch | Encoded:
        """Inputs of one step, on the CPU; called in the prefetch thread."""
        ...

    def compute_loss(self, module: nn.Module, inputs: Batch | Encoded, missing: int, seed: int) -> Step:
        """The loss of one step, whose own random draws come from `seed`."""
        ...

    def validate(self) -> dict[str, float]:
        """Accuracy on the validation split by condition, and their `mean`."""
        ...


class ExpertsStage:
    """Stage I: Φ, experts and heads, on the modalities that each clip has."""

    stage = Stage.EXPERTS

    def __init__(
        self, config: TrainConfig, model: R2SCP, train: Dataset, validation: Dataset, worker: Worker
    ) -> None:
        self.config, self.model, self.dataset = config, model, train
        self.module = ExpertsObjective(model)
        self.checkpoint_names = [EXPERTS] if config.stage_two.epochs else [EXPERTS, BEST]
        self._validation, self._worker = validation, worker

    def prepare(self, rows: np.ndarray, missing: int) -> Batch:
        return self.dataset.batch(rows, BatchRequest.uniform(len(rows), NO_MODALITY))

    def compute_loss(self, module: nn.Module, inputs: Batch | Encoded, missing: int, seed: int) -> Step:
        assert isinstance(inputs, Batch)
        return module(self._drop_modality(inputs, seed))

    def _drop_modality(self, batch: Batch, seed: int) -> Batch:
        """Drop one modality of each question with probability `expert_dropout`."""
        rate = self.config.expert_dropout
        if not rate:
            return batch
        draw_B = torch.rand(len(batch), generator=torch.Generator().manual_seed(seed))
        for modality, rows_B in ((AUDIO, draw_B < rate / 2), (VISUAL, draw_B >= 1 - rate / 2)):
            batch = batch.drop(modality, rows_B.to(batch.present_BM.device))
        return batch

    def validate(self) -> dict[str, float]:
        """Accuracy with both modalities only: stage I has no recovery yet."""

        def prepare(rows: np.ndarray) -> Batch:
            return self._validation.batch(rows, BatchRequest.uniform(len(rows), NO_MODALITY))

        accuracy = _accuracy(self.model, self._validation, self.config, self._worker, prepare)
        return {"AV": accuracy, "mean": accuracy}


class MixingStage:
    """Stage II: CAP, router and heads; each batch once complete and once with one modality missing.

    `folder`: for the states of frozen experts, if they do not fit in memory.
    """

    stage = Stage.MIXING

    def __init__(
        self,
        config: TrainConfig,
        model: R2SCP,
        train: Dataset,
        validation: Dataset,
        worker: Worker,
        folder: Path,
    ) -> None:
        self.config, self.model = config, model
        self.dataset = train
        self.module = MixingObjective(model, config.loss)
        self.checkpoint_names = [BEST]
        self._validation, self._worker = validation, worker
        self.expert_cache: ExpertCache | None = None
        if model.experts_frozen:
            model.eval()
            self.expert_cache = ExpertCache(model, [train, validation], folder, worker.device)

    def prepare(self, rows: np.ndarray, missing: int) -> Batch | Encoded:
        farthest = self.config.model.cmr and self.config.loss.rank_weight > 0
        # hide=False: the real modality stays in the batch, to be compared with
        request = BatchRequest.uniform(len(rows), missing, hide=False, farthest=farthest)
        return self._inputs(self.dataset, rows, request)

    def compute_loss(self, module: nn.Module, inputs: Batch | Encoded, missing: int, seed: int) -> Step:
        return module(inputs, missing)

    def validate(self) -> dict[str, float]:
        accuracies = {}
        for condition, missing in MISSING_COLUMN.items():

            def prepare(rows: np.ndarray, missing: int = missing) -> Batch | Encoded:
                return self._inputs(self._validation, rows, BatchRequest.uniform(len(rows), missing))

            accuracies[condition] = _accuracy(
                self.model, self._validation, self.config, self._worker, prepare
            )
        return accuracies | {"mean": sum(accuracies.values()) / len(accuracies)}

    def _inputs(self, dataset: Dataset, rows: np.ndarray, request: BatchRequest) -> Batch | Encoded:
        return (
            self.expert_cache.encoded_batch(dataset, rows, request)
            if self.expert_cache
            else dataset.batch(rows, request)
        )


def step_metrics(step: Step, target_B: Tensor, missing: int) -> dict[str, float]:
    """Metrics of one step: losses, and accuracy and mean router weights by condition."""
    values = {"loss": step.loss.total.item()}
    values |= {f"loss/{name}": part.item() for name, part in step.loss.parts.items()}
    conditions = {number: name for name, number in MISSING_COLUMN.items()}
    for name, answer in ((conditions[NO_MODALITY], step.full), (conditions[missing], step.incomplete)):
        if answer is not None:
            correct_B = answer.logits_BK.argmax(dim=1) == target_B
            values[f"accuracy/{name}"] = correct_B.float().mean().item()
            loads = answer.evidence.router_BS.detach().mean(dim=0).tolist()
            values |= {f"router/{name}/{source}": load for source, load in zip(SOURCES, loads, strict=True)}
    return values


@torch.no_grad()
def _accuracy(
    model: R2SCP,
    dataset: Dataset,
    config: TrainConfig,
    worker: Worker,
    prepare: Callable[[np.ndarray], Batch | Encoded],
) -> float:
    """Accuracy on a dataset, over all workers."""
    model.eval()
    correct = 0
    batches = sequential_batches(len(dataset.examples), config.evaluate_rows, worker.rank, worker.world)
    with closing(prefetch(prepare, batches)) as prepared:
        for rows, inputs in zip(batches, prepared, strict=True):
            inputs = inputs.to(worker.device)
            with worker.autocast():
                answer = model(inputs) if isinstance(inputs, Batch) else model.answer(inputs)
            correct += int((answer.logits_BK.argmax(dim=1).cpu() == dataset.targets(rows)).sum())
    return float(worker.all_reduce(torch.tensor(correct))) / len(dataset.examples)


def _target(batch: Batch | Encoded) -> Tensor:
    if batch.target_B is None:
        raise ValueError("training needs answers: the batch must hold target_B")
    if bool((batch.target_B < 0).any()):
        raise ValueError("training needs answers: rows whose answer is not known (-1) must be left out")
    return batch.target_B
