"""Hidden states of frozen experts for every clip and question text, computed once.

In stage II the experts do not change, so E(Φ(·)) of a clip is the same in every epoch, for every question
about it and as anybody's neighbour. Each is computed once here, and batches are gathered by index. H_miss of
eq. 4, the mean over the neighbours, is computed from the states of single clips, as in
`Experts.encode_neighbours`.

Legend: S slots (clips in the cache), L tokens, D width of the model; others as in `r2scp.model.batch`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r2scp.model.batch import AUDIO, TEXT, VISUAL, Tokens
from r2scp.model.r2scp import R2SCP, Encoded
from r2scp.pipelines.batches.dataset import BatchRequest, Dataset
from r2scp.pipelines.batches.examples import MODALITIES
from r2scp.pipelines.batches.pooled_gather import take_rows
from r2scp.store.errors import StoreError
from r2scp.store.token_cache import NO_ROW

IN_MEMORY_BYTES = 8 << 30  # larger caches go to files in the run's folder
CLIPS_PER_FORWARD = 256


@dataclass(frozen=True, slots=True)
class _States:
    """states_SLD float32 and mask_SL of one expert over one source, zeros under padding.

    The last slot, which is also NO_ROW, has no token.
    """

    states_SLD: Tensor
    mask_SL: Tensor

    def mask(self, slots: np.ndarray) -> Tensor:
        """(*slots, L), trimmed to the longest."""
        mask = self.mask_SL[torch.from_numpy(slots)]
        return mask[..., : max(int(mask.flatten(0, -2).any(dim=0).sum()), 1)]

    def take(self, slots_B: np.ndarray) -> Tokens:
        """States and mask, trimmed to the longest."""
        mask_BL = self.mask(slots_B)
        states_BLD = take_rows(self.states_SLD.flatten(0, 1), self._index(slots_B, mask_BL.shape[1]))
        return Tokens(states_BLD, mask_BL)

    def mean(self, slots_BN: np.ndarray) -> Tokens:
        """Per second, the mean over those of the N slots that have it."""
        mask_BNL = self.mask(slots_BN)
        rows, longest = self.states_SLD.flatten(0, 1), mask_BNL.shape[2]
        sum_BLD = take_rows(rows, self._index(slots_BN[:, 0], longest))
        next_BLD = None
        for slots_B in slots_BN.T[1:]:  # one at a time: all at once would take N times the memory
            next_BLD = take_rows(rows, self._index(slots_B, longest), next_BLD)
            sum_BLD += next_BLD
        sum_BLD /= mask_BNL.sum(dim=1).clamp(min=1)[..., None]
        return Tokens(sum_BLD, mask_BNL.any(dim=1))

    def _index(self, slots_B: np.ndarray, longest: int) -> Tensor:
        """(B, longest): rows of the states flattened over slots and tokens."""
        slots, length = self.mask_SL.shape
        return torch.from_numpy(slots_B % slots * length)[:, None] + torch.arange(longest)


class ExpertCache:
    """States of all clips that batches of some datasets can hold.

    The datasets share clips and store. `folder`: for caches too large for memory. Raises ValueError for a
    model whose experts are not frozen, `StoreError` if the folder's disk is full.
    """

    def __init__(self, model: R2SCP, datasets: list[Dataset], folder: Path, device: torch.device) -> None:
        if not model.experts_frozen:
            raise ValueError("the experts must be frozen (stage II) to cache their states; these still train")
        self._model, self._device, self._folder = model, device, folder
        self._datasets = datasets
        rows = _referenced_clips(datasets)
        self.forwards = 0  # clips and texts, times the experts that each went through
        self._slot_of = np.full(len(datasets[0].clips.ids), NO_ROW, dtype=np.int64)
        self._slot_of[rows] = np.arange(len(rows))
        by_source = [self._clip_states(rows, source) for source in (AUDIO, VISUAL)]
        self._own = [states[0] for states in by_source]
        self._common = [states[1] for states in reversed(by_source)] if model.config.recovers else None
        self._words = {id(dataset): self._text_states(dataset) for dataset in datasets}

    def encoded_batch(self, dataset: Dataset, rows: np.ndarray, request: BatchRequest) -> Encoded:
        """The same as `R2SCP.encode` of `dataset.batch(rows, request)`, on the CPU."""
        present_BM = dataset.present(rows, request)
        slots = self._slot_of[dataset.examples.clip_row_B[rows]]
        own = [np.where(present_BM[:, column], slots, NO_ROW) for column in range(len(MODALITIES))]
        nearest_BN, farthest_BN = dataset.neighbour_rows(rows, request)
        recovered_B = dataset.recovered_modality(rows, request)
        n = self._model.config.neighbours
        return Encoded(
            audio=self._own[0].take(own[0]),
            visual=self._own[1].take(own[1]),
            words=self._words[id(dataset)].take(dataset.text_B[rows]),
            question=dataset.question(rows),
            present_BM=torch.from_numpy(present_BM),
            common=self._common_tokens(own, present_BM, recovered_B),
            retrieved=self._neighbour_tokens(nearest_BN, recovered_B),
            retrieved_ids_BN=None if nearest_BN is None else torch.from_numpy(nearest_BN[:, :n]),
            farthest=self._neighbour_tokens(farthest_BN, recovered_B),
            farthest_ids_BN=None if farthest_BN is None else torch.from_numpy(farthest_BN[:, :n]),
            target_B=dataset.targets(rows),
        )

    def _common_tokens(
        self, own: list[np.ndarray], present_BM: np.ndarray, recovered_B: np.ndarray
    ) -> tuple[Tokens | None, Tokens | None]:
        """H_com of the modalities that some row may have to recover."""
        if self._common is None:
            return None, None
        audio, visual = (
            self._common[column].take(own[1 - column])
            if self._model.config.purify_full or ((recovered_B == column) | ~present_BM[:, column]).any()
            else None
            for column in (AUDIO, VISUAL)
        )
        return audio, visual

    def _neighbour_tokens(self, rows_BN: np.ndarray | None, recovered_B: np.ndarray) -> Tokens | None:
        """H_miss of eq. 4."""
        if rows_BN is None or not self._model.config.cmr:
            return None
        rows_BN = rows_BN[:, : self._model.config.neighbours]
        slots_BN = np.where(rows_BN == NO_ROW, NO_ROW, self._slot_of[rows_BN])
        parts = [
            self._own[column].mean(np.where((recovered_B == column)[:, None], slots_BN, NO_ROW))
            for column in (AUDIO, VISUAL)
            if (recovered_B == column).any()
        ]
        if len(parts) == 1:
            return parts[0]
        length = max(part.mask_BL.shape[1] for part in parts)
        states_BLD = torch.zeros(len(rows_BN), length, self._model.config.dim)
        mask_BL = torch.zeros(len(rows_BN), length, dtype=torch.bool)
        for part in parts:  # each row has neighbours in at most one of them
            part_length = part.mask_BL.shape[1]
            states_BLD[:, :part_length] += part.states_BLD
            mask_BL[:, :part_length] |= part.mask_BL
        return Tokens(states_BLD, mask_BL)

    def _clip_states(self, rows: np.ndarray, source: int) -> list[_States]:
        """E_source(Φ_source(·)) of clips and, if the model recovers, E_other(Φ_source(·))."""
        dataset, modality = self._datasets[0], MODALITIES[source]
        present = dataset.clips.present_RM[rows, source]

        def read(slots: np.ndarray) -> tuple[Tensor, Tensor]:
            tokens = dataset.clip_tokens(modality, np.where(present[slots], rows[slots], NO_ROW))
            dataset.cache.clear()  # each clip is read once
            return tokens

        experts = [source, 1 - source] if self._model.config.recovers else [source]
        return self._compute(len(rows), read, source, experts)

    def _text_states(self, dataset: Dataset) -> _States:
        """States of each distinct question text of a dataset."""
        first = np.unique(dataset.text_B, return_index=True)[1]
        return self._compute(len(first), lambda slots: dataset.words(first[slots]), TEXT, [TEXT])[0]

    def _compute(
        self, count: int, read: Callable[[np.ndarray], tuple[Tensor, Tensor]], source: int, experts: list[int]
    ) -> list[_States]:
        """States of `count` sequences under each of `experts`, padded to the longest. Each is read once."""
        tables, mask_SL = [], torch.zeros(count + 1, 0, dtype=torch.bool)
        with torch.no_grad():
            for start in range(0, count, CLIPS_PER_FORWARD):
                slots = np.arange(start, min(start + CLIPS_PER_FORWARD, count))
                features, mask = read(slots)
                length = mask.shape[1]
                if length > mask_SL.shape[1]:
                    tables = [
                        self._lengthened(table, start, (count + 1, length))
                        for table in tables or [None] * len(experts)
                    ]
                    mask_SL = F.pad(mask_SL, (0, length - mask_SL.shape[1]))
                mask_SL[slots, :length] = mask
                features, mask = features.to(self._device), mask.to(self._device)
                for states_SLD, expert in zip(tables, experts, strict=True):
                    states_BLD = self._model.experts(features, mask, source, expert).states_BLD
                    states_SLD[slots, :length] = states_BLD.float().cpu()
                    self.forwards += len(slots)
        return [_States(states_SLD, mask_SL) for states_SLD in tables]

    def _lengthened(self, table: Tensor | None, filled: int, shape: tuple[int, int]) -> Tensor:
        """A table for longer sequences, with the first `filled` slots of `table`."""
        longer = self._zeros((*shape, self._model.config.dim))
        if table is not None:
            longer[:filled, : table.shape[1]] = table[:filled]
        return longer

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros in memory, or in an unnamed file that is deleted with the tensor or with the process."""
        size = 4 * math.prod(shape)
        if size <= IN_MEMORY_BYTES // 4:
            return torch.from_numpy(np.zeros(shape, dtype=np.float32))  # numpy asks for pages of 2 MiB
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self._folder) as file:
                # reports a full disk now; without it, a later write would end in a signal
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=shape))
        except OSError as error:
            raise StoreError(f"cannot keep {size:,} bytes of states in {self._folder}: {error}") from error


def _referenced_clips(datasets: list[Dataset]) -> np.ndarray:
    """Rows of all clips with questions, and of their neighbours, ascending."""
    parts = [dataset.examples.clip_row_B for dataset in datasets]
    rows = np.unique(np.concatenate(parts))
    for dataset in datasets:
        if dataset.neighbours is not None:
            for side in (dataset.neighbours.nearest_RN, dataset.neighbours.farthest_RN):
                parts += [table[rows].ravel() for table in side.values()]
    rows = np.unique(np.concatenate(parts))
    return rows[rows != NO_ROW]
