"""The training loop of both stages, as one worker runs it. Knows torch, and nothing of Ray.

Every step has its own seed, drawn from (seed, stage, epoch, step, worker), so that a resumed run repeats the
losses of an uninterrupted one: bit for bit on a CPU with the same number of workers and threads.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from r2scp.jobs.training.checkpoints import (
    EXPERTS,
    LAST,
    Checkpoint,
    load_optimiser,
    optimiser_tensors,
    read_checkpoint,
    read_last,
    write_checkpoint,
)
from r2scp.jobs.training.config import StageConfig
from r2scp.jobs.training.data import TrainingData, complete
from r2scp.jobs.training.log import TrainLog
from r2scp.jobs.training.stages import ExpertsStage, MixingStage, TrainStage, Worker, step_metrics
from r2scp.model.batch import Batch
from r2scp.model.r2scp import R2SCP, Encoded, Stage
from r2scp.pipelines.batches.prefetch import prefetch, shuffled_batches
from r2scp.store.errors import CheckpointError, R2SCPError

LOG_EVERY = 20  # steps
# parts of the seeds: the stage, and what is drawn
STAGE_NUMBER = {Stage.EXPERTS: 1, Stage.MIXING: 2}
MISSING_DRAW, STEP_DRAW = 1, 2


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A run's folder, another run's folder to take the experts from, and what to call after each epoch."""

    folder: Path
    experts: Path | None = None
    code: str = ""
    on_epoch: Callable[[dict[str, object]], None] = lambda _: None


class StepDraw(NamedTuple):
    """What a step gets besides its inputs: learning rate, missing modality and seed."""

    rate: float
    missing: int
    seed: int


class Training:
    """A run. `run` resumes from the `last` checkpoint of its folder.

    Raises `StoreError` if the store lacks what either stage needs, `CheckpointError` and
    `FingerprintMismatch` for experts of another run that do not fit.
    """

    def __init__(self, data: TrainingData, context: RunContext, worker: Worker) -> None:
        self.config, self.context, self.worker = data.config, context, worker
        self.data = data
        self._examples, validation = data.train_and_validation()
        self._validation = data.dataset(validation)
        # checked for both stages before either starts
        self._complete_examples = complete(self._examples) if self.config.stage_two.epochs else None
        self._given_experts = None if context.experts is None else self._read_experts(context.experts)
        self._step = 0
        self._best: dict[str, float] = {}
        self._log: TrainLog | None = None

    def run(self) -> dict[str, float]:
        """Train the remaining epochs; metrics of the best checkpoint."""
        last = read_last(self.context.folder)
        if last is not None:
            self._step, self._best = last.step, last.best
            if last.finished:
                return self._best
        if self.worker.rank == 0:
            self._log = TrainLog(self.context.folder, self._step)
        try:
            if self._given_experts is None and (last is None or last.stage is Stage.EXPERTS):
                self._train_experts(last)
            if self.config.stage_two.epochs:
                self._train_mixing(last if last is not None and last.stage is Stage.MIXING else None)
        finally:
            if self._log is not None:
                self._log.close()
        return self._best

    def _train_experts(self, last: Checkpoint | None) -> None:
        if (last.epoch if last is not None else 0) >= self.config.stage_one.epochs:
            return
        model = self._model(last)
        train = self.data.dataset(self._examples)
        stage = ExpertsStage(self.config, model, train, self._validation, self.worker)
        self._train_stage(stage, self.config.stage_one, last)

    def _train_mixing(self, last: Checkpoint | None) -> None:
        start = last
        if last is None:
            self._best = {}  # stage II is not compared with stage I
            start = self._given_experts
            if start is None and self.config.stage_one.epochs:
                start = read_checkpoint(self.context.folder, EXPERTS)
        assert self._complete_examples is not None
        train = self.data.dataset(self._complete_examples)
        folder = self.context.folder / "states"
        stage = MixingStage(self.config, self._model(start), train, self._validation, self.worker, folder)
        self._train_stage(stage, self.config.stage_two, last)

    def _read_experts(self, folder: Path) -> Checkpoint:
        """Another run's experts. Raises `CheckpointError`, `FingerprintMismatch` if they do not fit."""
        experts = read_checkpoint(folder, EXPERTS)
        experts.require_store(self.data.store)
        if experts.answers != self.data.answers:
            raise CheckpointError(
                f"the experts in {experts.folder} were trained with other answers than this training; use "
                "experts that were trained on the same questions, or none"
            )
        experts.load_into(R2SCP(self.config.model))
        return experts

    def _model(self, start: Checkpoint | None) -> R2SCP:
        torch.manual_seed(self.config.seed)
        model = R2SCP(self.config.model)
        if start is not None:
            start.load_into(model)
        return model.to(self.worker.device)

    def _train_stage(self, stage: TrainStage, length: StageConfig, last: Checkpoint | None) -> None:
        parameters = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
        # without weight decay this is Adam
        optimiser = torch.optim.AdamW(parameters, lr=length.lr, weight_decay=self.config.weight_decay)
        if last is not None:
            load_optimiser(optimiser, stage.model, last.optimiser_state())
        module = DistributedDataParallel(stage.module) if self.worker.world > 1 else stage.module
        for epoch in range(last.epoch if last is not None else 0, length.epochs):
            started = time.monotonic()
            averages = self._train_epoch(stage, module, optimiser, length, epoch)
            metrics = stage.validate()
            better = not self._best or metrics["mean"] > self._best["mean"]
            if better:
                self._best = metrics | {"epoch": epoch + 1}
            values: dict[str, object] = {
                "stage": stage.stage.value,
                "epoch": epoch + 1,
                "of": length.epochs,
                "train": averages,
                "validation": metrics,
                "seconds": round(time.monotonic() - started, 2),
            }
            if self._log is not None:
                self._log.write("epoch", self._step, values)
                names = [LAST, *(stage.checkpoint_names if better else ())]
                checkpoint = self._checkpoint(stage.stage, epoch + 1, metrics)
                tensors = optimiser_tensors(optimiser, stage.model)
                write_checkpoint(self.context.folder, names, checkpoint, stage.model, tensors)
            if self.worker.world > 1:
                dist.barrier()  # no worker reads a checkpoint before it is written
            self.context.on_epoch(values)

    def _train_epoch(
        self,
        stage: TrainStage,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        length: StageConfig,
        epoch: int,
    ) -> dict[str, float]:
        """One pass over the questions; the means of the steps' metrics, weighted by batch size."""
        module.train()
        batches, missing, seeds = self._draw_epoch(stage, epoch)
        history: dict[str, list[tuple[float, int]]] = {}
        prepared = prefetch(lambda item: stage.prepare(*item), zip(batches, missing, strict=True))
        with closing(prepared):  # also if a step fails
            for at, inputs in enumerate(prepared):
                rate = length.rate(epoch * len(batches) + at, len(batches))
                draw = StepDraw(rate, missing[at], seeds[at])
                values = self._train_step(stage, module, optimiser, inputs, draw)
                for name, value in values.items():
                    history.setdefault(name, []).append((value, len(inputs)))
                if self._log is not None and self._step % LOG_EVERY == 0:
                    self._log.write("step", self._step, {"stage": stage.stage.value, "lr": rate, **values})
        return {
            name: sum(v * n for v, n in parts) / sum(n for _, n in parts) for name, parts in history.items()
        }

    def _draw_epoch(self, stage: TrainStage, epoch: int) -> tuple[list[np.ndarray], list[int], list[int]]:
        """For each step of an epoch: this worker's questions, the missing modality, a seed."""
        worker = self.worker
        seed = (self.config.seed, STAGE_NUMBER[stage.stage], epoch)
        count = len(stage.dataset.examples)
        batches = shuffled_batches(count, self.config.batch_size, seed, worker.rank, worker.world)
        missing = np.random.default_rng((*seed, MISSING_DRAW)).integers(2, size=len(batches))
        seeds = np.random.default_rng((*seed, STEP_DRAW, worker.rank)).integers(2**62, size=len(batches))
        return batches, missing.tolist(), seeds.tolist()

    def _train_step(
        self,
        stage: TrainStage,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        inputs: Batch | Encoded,
        draw: StepDraw,
    ) -> dict[str, float]:
        """One step; its metrics. Raises `R2SCPError` if the loss is not finite."""
        torch.manual_seed(draw.seed)
        for group in optimiser.param_groups:
            group["lr"] = draw.rate
        inputs = inputs.to(self.worker.device)
        with self.worker.autocast():
            step = stage.compute_loss(module, inputs, draw.missing, draw.seed)
        optimiser.zero_grad(set_to_none=True)
        step.loss.total.backward()
        optimiser.step()
        self._step += 1
        assert inputs.target_B is not None
        values = step_metrics(step, inputs.target_B, draw.missing)
        if not math.isfinite(values["loss"]):
            raise R2SCPError(
                f"the loss became {values['loss']} in step {self._step}, at a rate of {draw.rate:.3g}; lower "
                "lr, or check that all features in the store are finite"
            )
        return values

    def _checkpoint(self, stage: Stage, epoch: int, metrics: dict[str, float]) -> Checkpoint:
        store = self.data.store
        return Checkpoint(
            stage=stage,
            epoch=epoch,
            step=self._step,
            config=self.config,
            answers=self.data.answers,
            store={
                "uri": store.uri,
                "fingerprint": store.fingerprint,
                "dim": store.dim,
                "versions": asdict(self.data.pins),
            },
            metrics=metrics,
            best=self._best,
            code=self.context.code,
            experts="" if self._given_experts is None else self._given_experts.sha256,
        )
