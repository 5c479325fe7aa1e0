"""Store rows to `Batch`: everything that training and evaluation see comes from here.

A modality that is taken away is not even read: its features never enter a batch. Neighbours of clips come
from the table `neighbours`, as rows of `clips`.

Legend: B questions, R clips, M the modalities in the order of `MODALITIES`, N neighbours; the shapes of a
batch are those of `r2scp.model.batch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from r2scp.model.batch import AUDIO, VISUAL, Batch, Neighbours, Question
from r2scp.pipelines.batches.examples import MODALITIES, Clips, Examples, Pins
from r2scp.pipelines.batches.pooled_gather import take_rows
from r2scp.pipelines.neighbours.settings import IndexSettings, read_neighbours
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Condition, Modality, Retrieval, Table
from r2scp.store.token_cache import CACHE_BYTES, NO_ROW, SequenceCache, Sequences

Negatives = Literal["farthest", "random"]
NO_MODALITY = NO_ROW  # in missing_B: nothing is missing in this row; in rows of neighbours: there is none
#: The value of missing_B under each condition.
MISSING_COLUMN = {Condition.A: VISUAL, Condition.V: AUDIO, Condition.AV: NO_MODALITY}


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighbourRows:
    """Neighbours of every clip, per missing modality: rows of `clips`, NOTHING where there are fewer."""

    nearest_RN: dict[Modality, np.ndarray]  # int64
    farthest_RN: dict[Modality, np.ndarray]

    @classmethod
    def read(
        cls,
        store: FeatureStore,
        pins: Pins,
        clips: Clips,
        settings: IndexSettings,
        retrieval: Retrieval,
        n: int,
    ) -> "NeighbourRows":
        """The `n` first that are there. Raises `StoreError` where nothing is indexed so, or for fewer."""
        if n > settings.n:
            raise StoreError(f"{n} neighbours are asked for; the index was asked for {settings.n}")
        if not pins.neighbours:
            raise StoreError(f"the store at {store.uri} has no neighbours; run `r2scp-pipe index`")
        table = read_neighbours(store, settings, retrieval, pins.neighbours)
        sides: list[dict[Modality, np.ndarray]] = []
        for side in ("nearest_ids", "farthest_ids"):
            rows = {m: np.full((len(clips.ids), n), NO_MODALITY, dtype=np.int64) for m in MODALITIES}
            columns = (table[name].to_pylist() for name in ("clip_id", "missing", side))
            for clip_id, missing, ids in zip(*columns, strict=True):
                if clip_id not in clips.row_of:
                    continue
                found = [clips.row_of[other] for other in ids if other in clips.row_of][:n]
                rows[Modality(missing)][clips.row_of[clip_id], : len(found)] = found
            sides.append(rows)
        return cls(nearest_RN=sides[0], farthest_RN=sides[1])

    def with_random_farthest(self, clips: Clips, seed: int) -> "NeighbourRows":
        """Negatives drawn from all that serve as anybody's neighbour, never of the clip's own source."""
        generator = np.random.default_rng(seed)
        sources = np.unique(np.array(clips.sources), return_inverse=True)[1]
        drawn = {}
        for modality, nearest_RN in self.nearest_RN.items():
            bank = np.unique(np.concatenate([nearest_RN.ravel(), self.farthest_RN[modality].ravel()]))
            bank = bank[bank != NO_MODALITY]
            farthest_RN = self.farthest_RN[modality].copy()
            if len(bank):
                picks_RN = bank[generator.integers(len(bank), size=farthest_RN.shape)]
                own_RN = sources[picks_RN] == sources[: len(picks_RN), None]
                farthest_RN = np.where(own_RN | (farthest_RN == NO_MODALITY), farthest_RN, picks_RN)
            drawn[modality] = farthest_RN
        return NeighbourRows(nearest_RN=self.nearest_RN, farthest_RN=drawn)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRequest:
    """How to ask questions: what is missing, and what else is wanted.

    `missing_B`: for each question the number of a modality, or NOTHING. With `hide` it is taken away;
    without, it stays, and its neighbours come beside it (stage II compares the two). Where NOTHING is asked
    for and the clip itself lacks one modality, that one's neighbours come.
    """

    missing_B: np.ndarray
    hide: bool = True
    farthest: bool = False

    @classmethod
    def uniform(cls, count: int, missing: int, *, hide: bool = True, farthest: bool = False) -> "BatchRequest":
        """The same for `count` questions."""
        return cls(missing_B=np.full(count, missing), hide=hide, farthest=farthest)


@dataclass(kw_only=True)
class Dataset:
    """Makes batches of the questions of `examples`. One thread at a time may use it.

    `neighbours` None: nothing is retrieved.
    """

    store: FeatureStore
    pins: Pins
    clips: Clips
    examples: Examples
    neighbours: NeighbourRows | None
    choices: bool = False  # each question brings its own
    cache: SequenceCache = field(default_factory=lambda: SequenceCache(CACHE_BYTES))

    def __post_init__(self) -> None:
        pins, columns = self.pins, ("words", "choice_sentences")
        self._clips = Sequences(self.store, Table.CLIPS, MODALITIES, pins.clips, self.cache)
        self._questions = Sequences(self.store, Table.QUESTIONS, columns, pins.questions, self.cache)
        dataset = self.store.dataset(Table.QUESTIONS, pins.questions)
        rows_B = self.examples.question_row_B
        read = ["question", *(["choices"] if self.choices else [])]
        table = dataset.take(rows_B, columns=read)
        # Embeddings are the text's, whoever asks it: they are read and held once for all its questions.
        texts = np.unique(table["question"].to_numpy(), return_index=True, return_inverse=True)
        self._text_rows_T, self.text_B = rows_B[texts[1]], texts[2]
        sentences = dataset.take(self._text_rows_T, columns=["sentence"])["sentence"].combine_chunks()
        flat = sentences.flatten().to_numpy()
        self._sentences_TC = torch.from_numpy(flat.reshape(-1, self.store.dim).copy())
        listed = table["choices"].to_pylist() if self.choices else []
        self._choice_there = [[choice is not None for choice in row] for row in listed]

    def batch(self, rows: np.ndarray, request: BatchRequest) -> Batch:
        """The questions `rows` (numbers in `examples`) as `ask` says."""
        present_BM = self.present(rows, request)
        own_B = self.examples.clip_row_B[rows]
        own = [np.where(present_BM[:, column], own_B, NO_MODALITY) for column in range(len(MODALITIES))]
        nearest_BN, farthest_BN = self.neighbour_rows(rows, request)
        sought_B = self.recovered_modality(rows, request)
        beside = [_by_modality(found_BN, sought_B) for found_BN in (nearest_BN, farthest_BN)]
        self._clips.fetch([dict(zip(MODALITIES, own, strict=True)), *beside])
        audio, visual = (self.clip_tokens(m, found) for m, found in zip(MODALITIES, own, strict=True))
        words = self.words(rows)
        question = self.question(rows)
        return Batch(
            audio_BLC=audio[0],
            audio_mask_BL=audio[1],
            visual_BLC=visual[0],
            visual_mask_BL=visual[1],
            words_BWC=words[0],
            words_mask_BW=words[1],
            sentence_BC=question.sentence_BC,
            present_BM=torch.from_numpy(present_BM),
            retrieved=self._neighbours(nearest_BN, beside[0]),
            farthest=self._neighbours(farthest_BN, beside[1]),
            choices_BKC=question.choices_BKC,
            choices_mask_BK=question.choices_mask_BK,
            target_B=self.targets(rows),
        )

    def present(self, rows: np.ndarray, request: BatchRequest) -> np.ndarray:
        """(B, M) bool: what the model may use."""
        present_BM = self.examples.present_BM[rows].copy()
        if request.hide:
            for column in range(len(MODALITIES)):
                present_BM[request.missing_B == column, column] = False
        return present_BM

    def recovered_modality(self, rows: np.ndarray, request: BatchRequest) -> np.ndarray:
        """(B,): the modality whose neighbours come, or NOTHING."""
        present_BM = self.examples.present_BM[rows]
        own_B = np.where(present_BM.sum(axis=1) == 1, present_BM.argmin(axis=1), NO_MODALITY)
        return np.where(request.missing_B == NO_MODALITY, own_B, request.missing_B)

    def targets(self, rows: np.ndarray) -> Tensor:
        """(B,) int64."""
        return torch.from_numpy(self.examples.target_B[rows])

    def words(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B, W, C) and its mask."""
        return self._padded(self._questions, {"words": self._text_rows_T[self.text_B[rows]]})

    def question(self, rows: np.ndarray) -> Question:
        """What the decoder reads of the questions."""
        sentence_BC = self._sentences_TC[torch.from_numpy(self.text_B[rows])]
        if not self.choices:
            return Question(sentence_BC, None, None)
        asked = {"choice_sentences": self.examples.question_row_B[rows]}
        choices_BKC, mask_BK = self._padded(self._questions, asked)
        for at, row in enumerate(rows):
            there = torch.tensor(self._choice_there[row])
            mask_BK[at, : len(there)] &= there
        return Question(sentence_BC, choices_BKC, mask_BK)

    def neighbour_rows(self, rows: np.ndarray, request: BatchRequest) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(B, N) rows of `clips` each, nearest and farthest, of what is sought; None if nothing is."""
        sought_B = self.recovered_modality(rows, request)
        if self.neighbours is None or (sought_B == NO_MODALITY).all():
            return None, None
        clip_rows = self.examples.clip_row_B[rows]
        tables = [self.neighbours.nearest_RN, self.neighbours.farthest_RN][: 2 if request.farthest else 1]
        found: list[np.ndarray | None] = [None, None]
        for side, table in enumerate(tables):
            n = table[MODALITIES[0]].shape[1]
            found_BN = np.full((len(rows), n), NO_MODALITY, dtype=np.int64)
            for column, modality in enumerate(MODALITIES):
                at = np.flatnonzero(sought_B == column)
                found_BN[at] = table[modality][clip_rows[at]]
            found[side] = found_BN
        return found[0], found[1]

    def clip_tokens(self, modality: Modality, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (len(rows), L, C) and mask of clips by row; no token for NOTHING."""
        return self._padded(self._clips, {modality: rows})

    def _neighbours(self, found_BN: np.ndarray | None, beside: Mapping[str, np.ndarray]) -> Neighbours | None:
        if found_BN is None:
            return None
        tokens, mask = self._padded(self._clips, beside)
        shape = found_BN.shape
        return Neighbours(tokens.unflatten(0, shape), mask.unflatten(0, shape), torch.from_numpy(found_BN))

    def _padded(self, sequences: Sequences, rows: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """(rows, longest, C) float16, zeros behind each one's end, and the mask of what is real."""
        found = sequences.find(rows)
        tokens = take_rows(torch.from_numpy(found.tokens_SD), torch.from_numpy(found.places_BL))
        mask = np.arange(tokens.shape[1]) < found.lengths_B[:, None]
        return tokens, torch.from_numpy(mask)


def _by_modality(found_BN: np.ndarray | None, sought_B: np.ndarray) -> dict[str, np.ndarray]:
    """Neighbours, one after another, under the modality that each is asked for."""
    if found_BN is None:
        return {}
    return {
        modality: np.where((sought_B == column)[:, None], found_BN, NO_MODALITY).ravel()
        for column, modality in enumerate(MODALITIES)
    }
