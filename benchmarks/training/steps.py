"""Whole training steps, as `Training` makes them, by where their inputs come from."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contest import Row, Sheet, contest
from benchmarks.training.peers import in_memory, tensors_of
from benchmarks.training.site import Site
from r2scp.jobs.training.stages import ExpertsStage, MixingStage, TrainStage, Worker
from r2scp.model.batch import Batch
from r2scp.model.r2scp import R2SCP, Encoded
from r2scp.pipelines.batches.dataset import NO_MODALITY, BatchRequest
from r2scp.pipelines.batches.prefetch import prefetch

STORE, MEMORY, READY = "from the store", "tensors in memory", "batches ready"
NOT_KEPT = "states not kept"
MISSING = 0  # modality, in every step of stage II

Inputs = Batch | Encoded
Taken = Mapping[str, list[float]]


class Stepping:
    """A stage and its optimiser."""

    def __init__(self, stage: TrainStage) -> None:
        self.stage = stage
        trained = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        stage.module.train()

    def learn(self, inputs: Inputs) -> None:
        """One step."""
        step = self.stage.compute_loss(self.stage.module, inputs, MISSING, seed=1)
        self._optimiser.zero_grad(set_to_none=True)
        step.loss.total.backward()
        self._optimiser.step()

    def run(self, make: Callable[[np.ndarray], Inputs], batches: list[np.ndarray]) -> None:
        """Steps on what a thread makes ahead of them, as a training does."""
        with closing(prefetch(make, batches)) as prefetched:
            self.all(prefetched)

    def all(self, batches: Iterable[Inputs]) -> None:
        for inputs in batches:
            self.learn(inputs)


class Counted:
    """Rows that go through an expert, of clips and neighbours, counted from `nn.Module`'s own hook."""

    def __init__(self, model: R2SCP) -> None:
        self.rows = 0
        for expert in list(model.experts.experts)[:2]:  # not the text's
            expert.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[tuple[Tensor, Tensor]]) -> None:
        self.rows += len(inputs[0][0])


def step_seconds(site: Site, steps: int, rounds: int) -> Iterator[tuple[str, Taken, Sheet | None]]:
    """Of each stage: its name, seconds of a step by source of inputs, what kept states save."""
    batches = site.order[:steps]
    yield "I", _stage_one(site, batches, rounds), None
    with TemporaryDirectory(dir=site.folder) as folder:
        taken, saved = _stage_two(site, batches, rounds, Path(folder))
        yield "II", taken, saved


def _model(site: Site) -> R2SCP:
    torch.manual_seed(1)
    return R2SCP(site.opened.config.model)


def _stage_one(site: Site, batches: list[np.ndarray], rounds: int) -> Taken:
    stage = ExpertsStage(site.opened.config, _model(site), site.dataset, site.dataset, Worker())
    stepping = Stepping(stage)
    memory = in_memory(site.arrays, tensors_of(site.arrays), neighbours=False)
    ready = [stage.prepare(rows, NO_MODALITY) for rows in batches]
    works = {
        STORE: lambda: stepping.run(lambda rows: stage.prepare(rows, NO_MODALITY), batches),
        MEMORY: lambda: stepping.run(lambda rows: memory(rows, NO_MODALITY), batches),
        READY: lambda: stepping.all(ready),
    }
    return _taken(contest(works, rounds), len(batches))


def _stage_two(site: Site, batches: list[np.ndarray], rounds: int, folder: Path) -> tuple[Taken, Sheet]:
    model = _model(site)
    counted, started = Counted(model), time.perf_counter()
    # the questions that would choose the best checkpoint ask about the same clips
    stage = MixingStage(site.opened.config, model, site.dataset, site.dataset, Worker(), folder)
    making, once = time.perf_counter() - started, counted.rows
    stepping = Stepping(stage)
    memory = in_memory(site.arrays, tensors_of(site.arrays), neighbours=True)
    ready = [stage.prepare(rows, MISSING) for rows in batches]

    def encoded_here(rows: np.ndarray) -> Inputs:
        return site.dataset.batch(rows, BatchRequest.uniform(len(rows), MISSING, hide=False, farthest=True))

    works = {
        STORE: lambda: stepping.run(lambda rows: stage.prepare(rows, MISSING), batches),
        READY: lambda: stepping.all(ready),
        f"{STORE}, {NOT_KEPT}": lambda: stepping.run(encoded_here, batches),
        f"{MEMORY}, {NOT_KEPT}": lambda: stepping.run(lambda rows: memory(rows, MISSING), batches),
    }
    counted.rows = 0
    taken = _taken(contest(works, rounds), len(batches))
    each_step = counted.rows / (rounds + 1) / 2 / len(batches)  # a warming round; two contenders encode
    steps = len(site.order) * site.opened.config.stage_two.epochs
    clips = len(site.opened.clips.ids)
    kept, without = (statistics.median(taken[name]) for name in (STORE, f"{STORE}, {NOT_KEPT}"))
    figures = {
        "kept": (once, making, making + steps * kept),
        "not kept": (steps * each_step, 0.0, steps * without),
    }
    rows = [
        Row(
            name=name,
            figures={
                "expert forwards of a clip": forwards / clips,
                "hours to make": first / 3600,
                "hours in all": seconds / 3600,
            },
        )
        for name, (forwards, first, seconds) in figures.items()
    ]
    return taken, Sheet(title=f"States of frozen experts, {steps:,} steps of stage II (reckoned)", rows=rows)


def _taken(seconds: Mapping[str, list[float] | str], steps: int) -> Taken:
    return {
        name: [one / steps for one in taken] for name, taken in seconds.items() if not isinstance(taken, str)
    }
