"""What frozen experts make of every clip and question, computed once.

In stage II the experts do not move, so E(Φ(·)) of a clip is the same in every epoch, for every question
about it and wherever it serves as a neighbour. Here each is computed once and batches are put together by
index. H_miss of eq. 4, the mean over the neighbours, is formed from the states of single clips, which is
what `Experts.nearby` does too.

Legend: S slots (clips that are needed), L tokens, D width of the model; others as in `r2scp.model.batch`.
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
from r2scp.pipelines.batches.dataset import NO_MODALITY, BatchRequest, Dataset
from r2scp.pipelines.batches.examples import MODALITIES
from r2scp.pipelines.batches.pooled_gather import take_rows
from r2scp.store.errors import StoreError

IN_MEMORY_BYTES = 8 << 30  # larger states go to files in the run's folder
CLIPS_PER_FORWARD = 256


@dataclass(frozen=True, slots=True)
class _ClipStates:
    """states_SLD float32 and mask_SL of one expert's view of one source, zeros under padding.

    The last slot is NOTHING's: it has no token.
    """

    states_SLD: Tensor
    mask_SL: Tensor

    def mask(self, slots: np.ndarray) -> Tensor:
        """(*slots, L), cut to the longest."""
        mask = self.mask_SL[torch.from_numpy(slots)]
        return mask[..., : max(int(mask.flatten(0, -2).any(dim=0).sum()), 1)]

    def take(self, slots_B: np.ndarray) -> Tokens:
        """States and mask, cut to the longest."""
        mask_BL = self.mask(slots_B)
        return Tokens(take_rows(self.states_SLD.flatten(0, 1), self._places(slots_B, mask_BL.shape[1])), mask_BL)

    def mean(self, slots_BN: np.ndarray) -> Tokens:
        """Per second, the mean over N of the slots that have it."""
        mask_BNL = self.mask(slots_BN)
        rows, longest = self.states_SLD.flatten(0, 1), mask_BNL.shape[2]
        sum_BLD = take_rows(rows, self._places(slots_BN[:, 0], longest))
        one_BLD = None
        for slots_B in slots_BN.T[1:]:  # one after another: all at once would take N times the memory
            one_BLD = take_rows(rows, self._places(slots_B, longest), one_BLD)
            sum_BLD += one_BLD
        sum_BLD /= mask_BNL.sum(dim=1).clamp(min=1)[..., None]
        return Tokens(sum_BLD, mask_BNL.any(dim=1))

    def _places(self, slots_B: np.ndarray, longest: int) -> Tensor:
        """(B, longest): rows of the states, all slots' one after another."""
        slots, length = self.mask_SL.shape
        return torch.from_numpy(slots_B % slots * length)[:, None] + torch.arange(longest)


class ExpertCache:
    """States of all clips that the questions of some datasets can meet.

    Datasets share clips and store. `folder`: where states that outgrow memory go. Raises ValueError for a
    model whose experts are not frozen, `StoreError` where the folder has no room.
    """

    def __init__(self, model: R2SCP, datasets: list[Dataset], folder: Path, device: torch.device) -> None:
        if not model.experts_frozen:
            raise ValueError("states of experts can be kept only where experts are frozen (stage II)")
        self._model, self._device, self._folder = model, device, folder
        self._datasets = datasets
        rows = _referenced_clips(datasets)
        self.forwards = 0  # clips that went through an expert, for each of its views
        self._slot_of = np.full(len(datasets[0].clips.ids), NO_MODALITY, dtype=np.int64)
        self._slot_of[rows] = np.arange(len(rows))
        views = [self._views(rows, source) for source in (AUDIO, VISUAL)]
        self._own = [view[0] for view in views]
        self._common = [view[1] for view in reversed(views)] if model.config.recovers else None
        self._words = {id(dataset): self._texts(dataset) for dataset in datasets}

    def encoded_batch(self, dataset: Dataset, rows: np.ndarray, request: BatchRequest) -> Encoded:
        """What `R2SCP.encode` gives for `dataset.batch(rows, ask)`, on the CPU."""
        present_BM = dataset.present(rows, request)
        slots = self._slot_of[dataset.examples.clip_row_B[rows]]
        seen = [np.where(present_BM[:, column], slots, NO_MODALITY) for column in range(len(MODALITIES))]
        nearest_BN, farthest_BN = dataset.neighbour_rows(rows, request)
        sought_B = dataset.recovered_modality(rows, request)
        n = self._model.config.neighbours
        return Encoded(
            audio=self._own[0].take(seen[0]),
            visual=self._own[1].take(seen[1]),
            words=self._words[id(dataset)].take(dataset.text_B[rows]),
            question=dataset.question(rows),
            present_BM=torch.from_numpy(present_BM),
            common=self._common_of(seen, present_BM, sought_B),
            retrieved=self._nearby(nearest_BN, sought_B),
            retrieved_ids_BN=None if nearest_BN is None else torch.from_numpy(nearest_BN[:, :n]),
            farthest=self._nearby(farthest_BN, sought_B),
            farthest_ids_BN=None if farthest_BN is None else torch.from_numpy(farthest_BN[:, :n]),
            target_B=dataset.targets(rows),
        )

    def _common_of(
        self, seen: list[np.ndarray], present_BM: np.ndarray, sought_B: np.ndarray
    ) -> tuple[Tokens | None, Tokens | None]:
        """H_com of the modalities that some row may have to recover."""
        if self._common is None:
            return None, None
        audio, visual = (
            self._common[column].take(seen[1 - column])
            if self._model.config.purify_full or ((sought_B == column) | ~present_BM[:, column]).any()
            else None
            for column in (AUDIO, VISUAL)
        )
        return audio, visual

    def _nearby(self, rows_BN: np.ndarray | None, sought_B: np.ndarray) -> Tokens | None:
        """H_miss of eq. 4."""
        if rows_BN is None or not self._model.config.cmr:
            return None
        rows_BN = rows_BN[:, : self._model.config.neighbours]
        slots_BN = np.where(rows_BN == NO_MODALITY, NO_MODALITY, self._slot_of[rows_BN])
        parts = [
            self._own[column].mean(np.where((sought_B == column)[:, None], slots_BN, NO_MODALITY))
            for column in (AUDIO, VISUAL)
            if (sought_B == column).any()
        ]
        if len(parts) == 1:
            return parts[0]
        length = max(part.mask_BL.shape[1] for part in parts)
        states_BLD = torch.zeros(len(rows_BN), length, self._model.config.dim)
        mask_BL = torch.zeros(len(rows_BN), length, dtype=torch.bool)
        for part in parts:  # each row has neighbours in one of them at most
            long = part.mask_BL.shape[1]
            states_BLD[:, :long] += part.states_BLD
            mask_BL[:, :long] |= part.mask_BL
        return Tokens(states_BLD, mask_BL)

    def _views(self, rows: np.ndarray, source: int) -> list[_ClipStates]:
        """E_source(Φ_source(·)) of clips and, where anything is recovered, E_other(Φ_source(·))."""
        dataset, modality = self._datasets[0], MODALITIES[source]
        has = dataset.clips.present_RM[rows, source]

        def read(at: np.ndarray) -> tuple[Tensor, Tensor]:
            found = dataset.clip_tokens(modality, np.where(has[at], rows[at], NO_MODALITY))
            dataset.cache.clear()  # no clip is looked at again
            return found

        experts = [source, 1 - source] if self._model.config.recovers else [source]
        return self._through(len(rows), read, source, experts)

    def _texts(self, dataset: Dataset) -> _ClipStates:
        """States of each distinct question text of a dataset."""
        first = np.unique(dataset.text_B, return_index=True)[1]
        return self._through(len(first), lambda at: dataset.words(first[at]), TEXT, [TEXT])[0]

    def _through(
        self, count: int, read: Callable[[np.ndarray], tuple[Tensor, Tensor]], source: int, experts: list[int]
    ) -> list[_ClipStates]:
        """All of them through each of `experts`; as long as the longest of them. Each is read once."""
        rooms, mask_SL = [], torch.zeros(count + 1, 0, dtype=torch.bool)
        with torch.no_grad():
            for start in range(0, count, CLIPS_PER_FORWARD):
                part = np.arange(start, min(start + CLIPS_PER_FORWARD, count))
                features, mask = read(part)
                long = mask.shape[1]
                if long > mask_SL.shape[1]:
                    rooms = [
                        self._longer(room, start, (count + 1, long))
                        for room in rooms or [None] * len(experts)
                    ]
                    mask_SL = F.pad(mask_SL, (0, long - mask_SL.shape[1]))
                mask_SL[part, :long] = mask
                features, mask = features.to(self._device), mask.to(self._device)
                for states_SLD, expert in zip(rooms, experts, strict=True):
                    states_BLD = self._model.experts(features, mask, source, expert).states_BLD
                    states_SLD[part, :long] = states_BLD.float().cpu()
                    self.forwards += len(part)
        return [_ClipStates(states_SLD, mask_SL) for states_SLD in rooms]

    def _longer(self, room: Tensor | None, filled: int, shape: tuple[int, int]) -> Tensor:
        """A room for longer sequences, with what there is in the first `filled` slots."""
        longer = self._room((*shape, self._model.config.dim))
        if room is not None:
            longer[:filled, : room.shape[1]] = room[:filled]
        return longer

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros, in memory or in a file without a name, which goes with the tensor, or with the process."""
        size = 4 * math.prod(shape)
        if size <= IN_MEMORY_BYTES // 4:
            return torch.from_numpy(np.zeros(shape, dtype=np.float32))  # in large pages: see `gather`
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so here, not by a signal later
                return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=shape))
        except OSError as error:
            raise StoreError(f"cannot keep {size:,} bytes of states in {self._folder}: {error}") from error


def _referenced_clips(datasets: list[Dataset]) -> np.ndarray:
    """Rows of all clips that are asked about or serve one that is, ascending."""
    parts = [dataset.examples.clip_row_B for dataset in datasets]
    asked = np.unique(np.concatenate(parts))
    for dataset in datasets:
        if dataset.neighbours is not None:
            for side in (dataset.neighbours.nearest_RN, dataset.neighbours.farthest_RN):
                parts += [table[asked].ravel() for table in side.values()]
    rows = np.unique(np.concatenate(parts))
    return rows[rows != NO_MODALITY]
