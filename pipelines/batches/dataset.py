"""Makes a `Batch` of store rows: everything that training and evaluation see comes from here.

A modality that is hidden is not even read: its features never enter a batch. Neighbours of clips come from
the table `neighbours`, as rows of `clips`.

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
from r2scp.store.token_cache import CACHE_BYTES, NO_ROW, TokenCache, TokenReader

Negatives = Literal["farthest", "random"]
NO_MODALITY = -1  # instead of the number of a modality: nothing is missing
#: The value of missing_B under each condition.
MISSING_COLUMN = {Condition.A: VISUAL, Condition.V: AUDIO, Condition.AV: NO_MODALITY}


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighbourRows:
    """Neighbours of every clip, per missing modality: rows of `clips`, NO_ROW if there are fewer than N."""

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
        """The `n` first that are still stored. Raises `StoreError` if the store has no such neighbours."""
        if n > settings.n:
            raise StoreError(f"neighbours must be at most those of the index, {settings.n}; got {n}")
        if not pins.neighbours:
            raise StoreError(f"the store at {store.uri} has no neighbours; run `r2scp-pipe index`")
        table = read_neighbours(store, settings, retrieval, pins.neighbours)
        sides: list[dict[Modality, np.ndarray]] = []
        for side in ("nearest_ids", "farthest_ids"):
            rows = {m: np.full((len(clips.ids), n), NO_ROW, dtype=np.int64) for m in MODALITIES}
            columns = (table[name].to_pylist() for name in ("clip_id", "missing", side))
            for clip_id, missing, ids in zip(*columns, strict=True):
                if clip_id not in clips.row_of:
                    continue
                stored = [clips.row_of[other] for other in ids if other in clips.row_of][:n]
                rows[Modality(missing)][clips.row_of[clip_id], : len(stored)] = stored
            sides.append(rows)
        return cls(nearest_RN=sides[0], farthest_RN=sides[1])

    def with_random_farthest(self, clips: Clips, seed: int) -> "NeighbourRows":
        """Negatives drawn from all clips that are a neighbour of any, never from the clip's own source."""
        generator = np.random.default_rng(seed)
        sources = np.unique(np.array(clips.sources), return_inverse=True)[1]
        drawn = {}
        for modality, nearest_RN in self.nearest_RN.items():
            bank = np.unique(np.concatenate([nearest_RN.ravel(), self.farthest_RN[modality].ravel()]))
            bank = bank[bank != NO_ROW]
            farthest_RN = self.farthest_RN[modality].copy()
            if len(bank):
                picks_RN = bank[generator.integers(len(bank), size=farthest_RN.shape)]
                same_source_RN = sources[picks_RN] == sources[: len(picks_RN), None]
                farthest_RN = np.where(same_source_RN | (farthest_RN == NO_ROW), farthest_RN, picks_RN)
            drawn[modality] = farthest_RN
        return NeighbourRows(nearest_RN=self.nearest_RN, farthest_RN=drawn)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRequest:
    """Which modality of each question is missing, and whether farthest neighbours are needed too.

    `missing_B`: the number of a modality, or NO_MODALITY. With `hide` it is removed from the batch; without,
    it stays beside its neighbours (stage II compares the two). For NO_MODALITY and a clip that itself has
    only one modality, the batch holds neighbours for the other.
    """

    missing_B: np.ndarray
    hide: bool = True
    farthest: bool = False

    @classmethod
    def uniform(
        cls, count: int, missing: int, *, hide: bool = True, farthest: bool = False
    ) -> "BatchRequest":
        """The same for `count` questions."""
        return cls(missing_B=np.full(count, missing), hide=hide, farthest=farthest)


@dataclass(kw_only=True)
class Dataset:
    """Makes batches of the questions of `examples`. Not thread-safe.

    With `neighbours` None nothing is retrieved. With `choices` each question has its own choices.
    """

    store: FeatureStore
    pins: Pins
    clips: Clips
    examples: Examples
    neighbours: NeighbourRows | None
    choices: bool = False
    cache: TokenCache = field(default_factory=lambda: TokenCache(CACHE_BYTES))

    def __post_init__(self) -> None:
        pins, columns = self.pins, ("words", "choice_sentences")
        self._clips = TokenReader(self.store, Table.CLIPS, MODALITIES, pins.clips, self.cache)
        self._questions = TokenReader(self.store, Table.QUESTIONS, columns, pins.questions, self.cache)
        dataset = self.store.dataset(Table.QUESTIONS, pins.questions)
        rows_B = self.examples.question_row_B
        table = dataset.take(rows_B, columns=["question", *(["choices"] if self.choices else [])])
        # Questions with the same text have the same embeddings: read and keep them once per text.
        texts = np.unique(table["question"].to_numpy(), return_index=True, return_inverse=True)
        self._text_rows_T, self.text_B = rows_B[texts[1]], texts[2]
        sentences = dataset.take(self._text_rows_T, columns=["sentence"])["sentence"].combine_chunks()
        flat = sentences.flatten().to_numpy()
        self._sentences_TC = torch.from_numpy(flat.reshape(-1, self.store.dim).copy())
        choices = table["choices"].to_pylist() if self.choices else []
        self._choice_present = [[choice is not None for choice in row] for row in choices]

    def batch(self, rows: np.ndarray, request: BatchRequest) -> Batch:
        """The batch of the questions `rows` (indices into `examples`)."""
        present_BM = self.present(rows, request)
        clip_rows_B = self.examples.clip_row_B[rows]
        own = [np.where(present_BM[:, column], clip_rows_B, NO_ROW) for column in range(len(MODALITIES))]
        nearest_BN, farthest_BN = self.neighbour_rows(rows, request)
        recovered_B = self.recovered_modality(rows, request)
        nearest, farthest = (_by_modality(rows_BN, recovered_B) for rows_BN in (nearest_BN, farthest_BN))
        self._clips.prefetch([dict(zip(MODALITIES, own, strict=True)), nearest, farthest])
        audio, visual = (self.clip_tokens(m, clips) for m, clips in zip(MODALITIES, own, strict=True))
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
            retrieved=self._neighbours(nearest_BN, nearest),
            farthest=self._neighbours(farthest_BN, farthest),
            choices_BKC=question.choices_BKC,
            choices_mask_BK=question.choices_mask_BK,
            target_B=self.targets(rows),
        )

    def present(self, rows: np.ndarray, request: BatchRequest) -> np.ndarray:
        """(B, M) bool: the modalities that the model may use."""
        present_BM = self.examples.present_BM[rows].copy()
        if request.hide:
            for column in range(len(MODALITIES)):
                present_BM[request.missing_B == column, column] = False
        return present_BM

    def recovered_modality(self, rows: np.ndarray, request: BatchRequest) -> np.ndarray:
        """(B,): the modality whose neighbours the batch holds, or NO_MODALITY."""
        present_BM = self.examples.present_BM[rows]
        absent_B = np.where(present_BM.sum(axis=1) == 1, present_BM.argmin(axis=1), NO_MODALITY)
        return np.where(request.missing_B == NO_MODALITY, absent_B, request.missing_B)

    def targets(self, rows: np.ndarray) -> Tensor:
        """(B,) int64."""
        return torch.from_numpy(self.examples.target_B[rows])

    def words(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Word embeddings (B, W, C) and their mask."""
        return self._padded(self._questions, {"words": self._text_rows_T[self.text_B[rows]]})

    def question(self, rows: np.ndarray) -> Question:
        """The part of the questions that the decoder reads."""
        sentence_BC = self._sentences_TC[torch.from_numpy(self.text_B[rows])]
        if not self.choices:
            return Question(sentence_BC, None, None)
        question_rows = {"choice_sentences": self.examples.question_row_B[rows]}
        choices_BKC, mask_BK = self._padded(self._questions, question_rows)
        for index, row in enumerate(rows):
            present_K = torch.tensor(self._choice_present[row])
            mask_BK[index, : len(present_K)] &= present_K
        return Question(sentence_BC, choices_BKC, mask_BK)

    def neighbour_rows(
        self, rows: np.ndarray, request: BatchRequest
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Nearest and farthest neighbours, rows (B, N) of `clips` each; None if none are needed."""
        recovered_B = self.recovered_modality(rows, request)
        if self.neighbours is None or (recovered_B == NO_MODALITY).all():
            return None, None
        clip_rows_B = self.examples.clip_row_B[rows]

        def select(table: Mapping[Modality, np.ndarray]) -> np.ndarray:
            rows_BN = np.full((len(rows), table[MODALITIES[0]].shape[1]), NO_ROW, dtype=np.int64)
            for column, modality in enumerate(MODALITIES):
                questions = np.flatnonzero(recovered_B == column)
                rows_BN[questions] = table[modality][clip_rows_B[questions]]
            return rows_BN

        farthest_BN = select(self.neighbours.farthest_RN) if request.farthest else None
        return select(self.neighbours.nearest_RN), farthest_BN

    def clip_tokens(self, modality: Modality, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (len(rows), L, C) and mask of clips by row; no token for NO_ROW."""
        return self._padded(self._clips, {modality: rows})

    def _neighbours(
        self, rows_BN: np.ndarray | None, by_modality: Mapping[str, np.ndarray]
    ) -> Neighbours | None:
        if rows_BN is None:
            return None
        tokens, mask = self._padded(self._clips, by_modality)
        shape = rows_BN.shape
        return Neighbours(tokens.unflatten(0, shape), mask.unflatten(0, shape), torch.from_numpy(rows_BN))

    def _padded(self, reader: TokenReader, rows: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """(rows, longest, C) float16, padded with zeros, and the mask of real tokens."""
        cached = reader.read(rows)
        tokens = take_rows(torch.from_numpy(cached.tokens_SD), torch.from_numpy(cached.slots_BL))
        mask = np.arange(tokens.shape[1]) < cached.lengths_B[:, None]
        return tokens, torch.from_numpy(mask)


def _by_modality(rows_BN: np.ndarray | None, recovered_B: np.ndarray) -> dict[str, np.ndarray]:
    """Flattened rows of neighbours under the modality that each recovers, NO_ROW under the other."""
    if rows_BN is None:
        return {}
    return {
        modality: np.where((recovered_B == column)[:, None], rows_BN, NO_ROW).ravel()
        for column, modality in enumerate(MODALITIES)
    }
