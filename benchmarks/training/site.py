"""A filled store, opened as `train` opens it, and the same data as arrays."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.training.peers import Arrays
from benchmarks.training.store import ANSWERS, Scale, fill
from r2scp.jobs.training.config import paper_music_avqa
from r2scp.jobs.training.data import TrainingData, answers_of, complete
from r2scp.pipelines.batches.dataset import Dataset
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.batches.prefetch import shuffled_batches
from r2scp.store.feature_store import FeatureStore
from r2scp.store.token_cache import CACHE_BYTES

SEED = (1, 1, 0)  # of the order of questions


@dataclass(frozen=True, kw_only=True)
class Site:
    """`dataset` asks the train split's questions, in batches of `order`."""

    folder: Path
    store: FeatureStore
    opened: TrainingData
    dataset: Dataset
    arrays: Arrays
    order: list[np.ndarray]

    def again(self) -> Dataset:
        """The dataset as in a new process: with nothing read yet."""
        return open_dataset(self.store)[1]


def open_dataset(store: FeatureStore, cache_bytes: int = CACHE_BYTES) -> tuple[TrainingData, Dataset]:
    """The train split under the preset `paper_music_avqa`."""
    pins, config = Pins.latest(store), paper_music_avqa(store.dim, ANSWERS)
    opened = TrainingData.read(store, pins, config, answers_of(store, pins, config), cache_bytes)
    return opened, opened.dataset(complete(opened.train_and_validation()[0]))


def open_site(folder: Path, scale: Scale) -> Site:
    """Opens the store, filled first if need be."""
    store = fill(folder, scale)
    opened, dataset = open_dataset(store)
    return Site(
        folder=folder,
        store=store,
        opened=opened,
        dataset=dataset,
        arrays=Arrays.read(opened, dataset, folder),
        order=shuffled_batches(len(dataset.examples), opened.config.batch_size, SEED),
    )
