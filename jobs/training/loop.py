"""Both stages of one training, in one of its workers. Knows torch and our own parts, and nothing of Ray.

Chance is drawn afresh for every step from (seed, stage, epoch, step, worker), so that a step gives the same
loss whether or not the run was interrupted before it: on a CPU, with the same number of workers and threads,
to the bit.
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
    read_last,
    load_optimiser,
    optimiser_tensors,
    read_checkpoint,
    write_checkpoint,
)
from r2scp.jobs.training.config import StageConfig
from r2scp.jobs.training.data import TrainingData, complete
from r2scp.jobs.training.log import TrainLog
from r2scp.jobs.training.stages import ExpertsStage, MixingStage, TrainStage, Worker, described
from r2scp.model.batch import Batch
from r2scp.model.r2scp import R2SCP, Encoded, Stage
from r2scp.pipelines.batches.prefetch import prefetch, shuffled_batches
from r2scp.store.errors import CheckpointError, R2SCPError

LOG_EVERY = 20  # steps
STAGE_NUMBER = {Stage.EXPERTS: 1, Stage.MIXING: 2}  # in seeds
DRAWS, STEPS = 1, 2  # what a seed is for


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a run writes, whose experts it takes if not its own, and who hears of each epoch."""

    folder: Path
    experts: Path | None = None  # another run's folder
    code: str = ""
    told: Callable[[dict[str, object]], None] = lambda _: None


class Draw(NamedTuple):
    """What a step is told beside its inputs."""

    rate: float
    missing: int  # modality
    chance: int  # seed


class Training:
    """A run. `run` goes on where its folder's `last` checkpoint says.

    Raises `StoreError` where the store lacks what either stage needs, `CheckpointError` and
    `FingerprintMismatch` for experts of another run that do not fit.
    """

    def __init__(self, opened: TrainingData, where: Where, worker: Worker) -> None:
        self.config, self.where, self.worker = opened.config, where, worker
        self.opened = opened
        self._examples, chosen_by = opened.learning()
        self._validation = opened.dataset(chosen_by)
        # what a stage will miss is said before either begins
        self._complete = complete(self._examples) if self.config.stage_two.epochs else None
        self._given = None if where.experts is None else self._fitting(read_checkpoint(where.experts, EXPERTS))
        self._step = 0
        self._best: dict[str, float] = {}
        self._log: TrainLog | None = None

    def run(self) -> dict[str, float]:
        """Train what is left to train; metrics of the best checkpoint."""
        last = read_last(self.where.folder)
        if last is not None:
            self._step, self._best = last.step, last.best
            if last.finished:
                return self._best
        if self.worker.rank == 0:
            self._log = TrainLog(self.where.folder, self._step)
        try:
            if self._given is None and (last is None or last.stage is Stage.EXPERTS):
                self._experts(last)
            if self.config.stage_two.epochs:
                self._mixing(last if last is not None and last.stage is Stage.MIXING else None)
        finally:
            if self._log is not None:
                self._log.close()
        return self._best

    def _experts(self, last: Checkpoint | None) -> None:
        if (last.epoch if last is not None else 0) >= self.config.stage_one.epochs:
            return
        model = self._model(last)
        train = self.opened.dataset(self._examples)
        stage = ExpertsStage(self.config, model, train, self._validation, self.worker)
        self._epochs(stage, self.config.stage_one, last)

    def _mixing(self, last: Checkpoint | None) -> None:
        start = last
        if last is None:
            self._best = {}  # what stage I reached is no measure for stage II
            start = self._given
            if start is None and self.config.stage_one.epochs:
                start = read_checkpoint(self.where.folder, EXPERTS)
        assert self._complete is not None
        train = self.opened.dataset(self._complete)
        folder = self.where.folder / "states"
        stage = MixingStage(self.config, self._model(start), train, self._validation, self.worker, folder)
        self._epochs(stage, self.config.stage_two, last)

    def _fitting(self, experts: Checkpoint) -> Checkpoint:
        """Another run's experts. Raises `CheckpointError`, `FingerprintMismatch` where they do not fit."""
        experts.require_store(self.opened.store)
        if experts.answers != self.opened.answers:
            raise CheckpointError(
                f"the experts in {experts.folder} learned other answers than those asked for here; take "
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

    def _epochs(self, stage: TrainStage, length: StageConfig, last: Checkpoint | None) -> None:
        trained = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
        # without weight decay this is Adam
        optimiser = torch.optim.AdamW(trained, lr=length.lr, weight_decay=self.config.weight_decay)
        if last is not None:
            load_optimiser(optimiser, stage.model, last.optimiser_state())
        module = DistributedDataParallel(stage.module) if self.worker.world > 1 else stage.module
        for epoch in range(last.epoch if last is not None else 0, length.epochs):
            started = time.monotonic()
            averages = self._epoch(stage, module, optimiser, length, epoch)
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
                names = [LAST, *(stage.names if better else ())]
                checkpoint = self._checkpoint(stage.stage, epoch + 1, metrics)
                tensors = optimiser_tensors(optimiser, stage.model)
                write_checkpoint(self.where.folder, names, checkpoint, stage.model, tensors)
            if self.worker.world > 1:
                dist.barrier()  # nobody reads what is not yet written
            self.where.told(values)

    def _epoch(
        self,
        stage: TrainStage,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        length: StageConfig,
        epoch: int,
    ) -> dict[str, float]:
        """One pass over the questions; means over them of what its steps said."""
        module.train()
        batches, missing, chances = self._draws(stage, epoch)
        said: dict[str, list[tuple[float, int]]] = {}
        prepared = prefetch(lambda item: stage.prepare(*item), zip(batches, missing, strict=True))
        with closing(prepared):  # also where a step fails
            for at, inputs in enumerate(prepared):
                rate = length.rate(epoch * len(batches) + at, len(batches))
                values = self._learn(stage, module, optimiser, inputs, Draw(rate, missing[at], chances[at]))
                for name, value in values.items():
                    said.setdefault(name, []).append((value, len(inputs)))
                if self._log is not None and self._step % LOG_EVERY == 0:
                    self._log.write("step", self._step, {"stage": stage.stage.value, "lr": rate, **values})
        return {name: sum(v * n for v, n in parts) / sum(n for _, n in parts) for name, parts in said.items()}

    def _draws(self, stage: TrainStage, epoch: int) -> tuple[list[np.ndarray], list[int], list[int]]:
        """Of each step of an epoch: this worker's questions, the missing modality, a seed."""
        worker = self.worker
        seed = (self.config.seed, STAGE_NUMBER[stage.stage], epoch)
        count = len(stage.dataset.examples)
        batches = shuffled_batches(count, self.config.batch_size, seed, worker.rank, worker.world)
        missing = np.random.default_rng((*seed, DRAWS)).integers(2, size=len(batches))
        chances = np.random.default_rng((*seed, STEPS, worker.rank)).integers(2**62, size=len(batches))
        return batches, missing.tolist(), chances.tolist()

    def _learn(
        self,
        stage: TrainStage,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        inputs: Batch | Encoded,
        draw: Draw,
    ) -> dict[str, float]:
        """One step; what it says of itself. Raises `R2SCPError` where the loss is no number."""
        torch.manual_seed(draw.chance)
        for group in optimiser.param_groups:
            group["lr"] = draw.rate
        inputs = inputs.to(self.worker.device)
        with self.worker.autocast():
            step = stage.learn(module, inputs, draw.missing, draw.chance)
        optimiser.zero_grad(set_to_none=True)
        step.loss.total.backward()
        optimiser.step()
        self._step += 1
        assert inputs.target_B is not None
        values = described(step, inputs.target_B, draw.missing)
        if not math.isfinite(values["loss"]):
            raise R2SCPError(
                f"the loss became {values['loss']} in step {self._step}, at a rate of {draw.rate:.3g}; lower "
                "lr, or see whether the features in the store are all finite"
            )
        return values

    def _checkpoint(self, stage: Stage, epoch: int, metrics: dict[str, float]) -> Checkpoint:
        store = self.opened.store
        return Checkpoint(
            stage=stage,
            epoch=epoch,
            step=self._step,
            config=self.config,
            answers=self.opened.answers,
            store={
                "uri": store.uri,
                "fingerprint": store.fingerprint,
                "dim": store.dim,
                "versions": asdict(self.opened.pins),
            },
            metrics=metrics,
            best=self._best,
            code=self.where.code,
            experts="" if self._given is None else self._given.sha256,
        )
