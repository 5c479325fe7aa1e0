"""What a training or an evaluation reads from the store."""

from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from r2scp.jobs.training.config import TrainConfig
from r2scp.pipelines.batches.dataset import Dataset, NeighbourRows
from r2scp.pipelines.batches.examples import NO_ANSWER, Clips, Examples, Pins, QuestionFilter, vocabulary
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.token_cache import CACHE_BYTES, TokenCache


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A store at pinned versions, as one config sees it."""

    store: FeatureStore
    pins: Pins
    config: TrainConfig
    answers: list[str] | None
    clips: Clips
    neighbours: NeighbourRows | None
    cache: TokenCache

    @classmethod
    def read(
        cls,
        store: FeatureStore,
        pins: Pins,
        config: TrainConfig,
        answers: list[str] | None,
        cache_bytes: int = CACHE_BYTES,
    ) -> "TrainingData":
        """Raises `StoreError` for missing neighbours, `UsageError` if the encoder's width differs."""
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
            cache=TokenCache(cache_bytes),
        )

    def examples(self, split: str) -> Examples:
        """The questions of a split, without their clips for a config that sees only the question."""
        query = question_filter(self.config, split)
        examples = Examples.read(self.store, self.pins, self.clips, query, self.answers)
        if self.config.sees == "question":
            return replace(examples, present_BM=np.zeros_like(examples.present_BM))
        return examples

    def train_and_validation(self) -> tuple[Examples, Examples]:
        """Train questions with known answers, and the questions that choose the best checkpoint.

        Raises `StoreError` if either is empty.
        """
        train = self.examples("train")
        share = self.config.holdout
        if not share:
            return answerable(train), self._validation()
        sources = [self.clips.sources[row] for row in train.clip_row_B]
        # by a hash of the video's name, so that other videos do not change the choice
        holdout_B = np.array([crc32(source.encode()) < share * 2**32 for source in sources])
        if holdout_B.all() or not holdout_B.any():
            raise StoreError(
                f"holdout={share} leaves no {'training' if holdout_B.all() else 'validation'} questions: the "
                f"questions are about {len(set(sources))} videos; choose another share"
            )
        return answerable(train.keep(~holdout_B, "held out")), train.keep(holdout_B, "learned from")

    def _validation(self) -> Examples:
        try:
            return self.examples("val")
        except StoreError as error:
            raise StoreError(
                f"{error}; without a validation split set holdout, for example to 0.1"
            ) from error

    def dataset(self, examples: Examples) -> Dataset:
        """Batches of the given questions."""
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
    """The classes, from the train split's answers; None if each question has its own choices."""
    if config.model.classes is None:
        return None
    return vocabulary(store, pins, Clips.read(store, pins.clips), question_filter(config, "train"))


def question_filter(config: TrainConfig, split: str) -> QuestionFilter:
    """Which questions of a split a config uses."""
    return QuestionFilter(split=split, corpora=config.corpora, disjoint=config.index.bank.disjoint)


def answerable(examples: Examples) -> Examples:
    """The questions whose answer is a known class. Raises `StoreError` if there are none."""
    kept = examples.keep(np.not_equal(examples.target_B, NO_ANSWER), "answer not known")
    if not len(kept):
        raise StoreError("no question of the split has a known answer; there is nothing to train on")
    return kept


def complete(examples: Examples) -> Examples:
    """The questions whose clip has both modalities. Raises `StoreError` if there are none."""
    kept = examples.keep(np.logical_and.reduce(examples.present_BM, axis=1), "clip lacks a modality")
    if not len(kept):
        raise StoreError("stage II needs clips with both modalities; no question is about one")
    return kept
