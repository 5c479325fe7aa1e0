"""What a training or an evaluation reads from the store, opened once."""

from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from r2scp.jobs.training.config import TrainConfig
from r2scp.pipelines.batches.dataset import Dataset, NeighbourRows
from r2scp.pipelines.batches.examples import NO_ANSWER, Clips, Examples, Pins, QuestionFilter, vocabulary
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.token_cache import CACHE_BYTES, SequenceCache


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A store at pinned versions, as one config sees it."""

    store: FeatureStore
    pins: Pins
    config: TrainConfig
    answers: list[str] | None
    clips: Clips
    neighbours: NeighbourRows | None
    cache: SequenceCache

    @classmethod
    def read(
        cls,
        store: FeatureStore,
        pins: Pins,
        config: TrainConfig,
        answers: list[str] | None,
        cache_bytes: int = CACHE_BYTES,
    ) -> "TrainingData":
        """Raises `StoreError` where neighbours are needed and not there, `UsageError` for another width."""
        if config.model.encoder_dim != store.dim:
            raise UsageError(
                f"model.encoder_dim must be {store.dim}, the width of the encoder of {store.uri}; got "
                f"{config.model.encoder_dim}"
            )
        clips = Clips.read(store, pins.clips)
        neighbours = None
        if config.model.cmr and config.sees == "everything":
            n = config.model.neighbours
            neighbours = NeighbourRows.read(store, pins, clips, config.index, config.retrieval, n)
            if config.negatives == "random":
                neighbours = neighbours.with_random_farthest(clips, config.seed)
        return cls(
            store=store,
            pins=pins,
            config=config,
            answers=answers,
            clips=clips,
            neighbours=neighbours,
            cache=SequenceCache(cache_bytes),
        )

    def examples(self, split: str) -> Examples:
        """The questions of a split, as this config may see them."""
        asked = question_filter(self.config, split)
        examples = Examples.read(self.store, self.pins, self.clips, asked, self.answers)
        if self.config.sees == "question":
            return replace(examples, present_BM=np.zeros_like(examples.present_BM))
        return examples

    def learning(self) -> tuple[Examples, Examples]:
        """Questions to learn from, with known answers, and those that choose the best checkpoint.

        Raises `StoreError` where there are none of either.
        """
        train = self.examples("train")
        share = self.config.holdout
        if not share:
            return answerable(train), self._validation()
        sources = [self.clips.sources[row] for row in train.clip_row_B]
        # drawn by name: the same however many others there are
        held_B = np.array([crc32(source.encode()) < share * 2**32 for source in sources])
        if held_B.all() or not held_B.any():
            raise StoreError(
                f"holdout={share} leaves nothing to {'learn from' if held_B.all() else 'choose by'}: the "
                f"questions are about {len(set(sources))} videos; give another share"
            )
        return answerable(train.keep(~held_B, "held out")), train.keep(held_B, "learned from")

    def _validation(self) -> Examples:
        try:
            return self.examples("val")
        except StoreError as error:
            raise StoreError(f"{error}; without a validation split, set holdout, say to 0.1") from error

    def dataset(self, examples: Examples) -> Dataset:
        """Batches of some questions."""
        return Dataset(
            store=self.store,
            pins=self.pins,
            clips=self.clips,
            examples=examples,
            neighbours=self.neighbours,
            choices=self.answers is None,
            cache=self.cache,
        )


def answers_of(store: FeatureStore, pins: Pins, config: TrainConfig) -> list[str] | None:
    """The classes of the train split, or None where questions bring their choices."""
    if config.model.classes is None:
        return None
    return vocabulary(store, pins, Clips.read(store, pins.clips), question_filter(config, "train"))


def question_filter(config: TrainConfig, split: str) -> QuestionFilter:
    """The questions of a split, as a config asks for them."""
    return QuestionFilter(split=split, corpora=config.corpora, disjoint=config.index.bank.disjoint)


def answerable(examples: Examples) -> Examples:
    """Those whose answer is known, from which one can learn. Raises `StoreError` where none is left."""
    kept = examples.keep(np.not_equal(examples.target_B, NO_ANSWER), "answer not known")
    if not len(kept):
        raise StoreError("no question of the split has an answer that training knows; nothing can be learned")
    return kept


def complete(examples: Examples) -> Examples:
    """Those whose clip has both modalities. Raises `StoreError` where none is left."""
    kept = examples.keep(np.logical_and.reduce(examples.present_BM, axis=1), "clip lacks a modality")
    if not len(kept):
        raise StoreError("stage II needs clips with both modalities; no question is about one")
    return kept
