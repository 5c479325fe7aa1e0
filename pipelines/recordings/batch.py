"""Questions about recordings to `Batch`: what `r2scp.pipelines.batches.dataset` makes of store rows,
for files from outside the store.

Legend: the shapes of a batch are those of `r2scp.model.batch`; T tokens of one stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from r2scp.model.batch import Batch, Neighbours
from r2scp.pipelines.batches.examples import MODALITIES
from r2scp.pipelines.recordings.retriever import RetrievedClip
from r2scp.store.schema import Modality


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedQuestion:
    """One question about one recording, embedded, with what stands in for a modality that is missing.

    `choices_KD` is None for a model that has classes.
    """

    tokens: Mapping[Modality, np.ndarray]  # float16 (T, D), of what is there
    retrieved: Sequence[RetrievedClip]
    words_WD: np.ndarray  # float16
    sentence_D: np.ndarray  # float32
    choices_KD: np.ndarray | None  # float16, zeros for a choice that is missing

    @property
    def missing(self) -> Modality | None:
        """What is not there."""
        return next((modality for modality in MODALITIES if modality not in self.tokens), None)


def recorded_batch(questions: Sequence[RecordedQuestion], neighbours: int) -> Batch:
    """One row a question. `neighbours`: how many the model uses."""
    dim = len(questions[0].sentence_D)
    nothing = np.zeros((0, dim), dtype=np.float16)
    streams = {m: _padded([one.tokens.get(m, nothing) for one in questions]) for m in MODALITIES}
    words_BWC, words_mask_BW = _padded([one.words_WD for one in questions])
    choices = [one.choices_KD for one in questions if one.choices_KD is not None]
    choices_BKC, choices_mask_BK = _padded(choices) if choices else (None, None)
    if choices_BKC is not None and choices_mask_BK is not None:
        choices_mask_BK &= choices_BKC.any(dim=-1)
    return Batch(
        audio_BLC=streams[Modality.AUDIO][0],
        audio_mask_BL=streams[Modality.AUDIO][1],
        visual_BLC=streams[Modality.VISUAL][0],
        visual_mask_BL=streams[Modality.VISUAL][1],
        words_BWC=words_BWC,
        words_mask_BW=words_mask_BW,
        sentence_BC=torch.from_numpy(np.stack([one.sentence_D for one in questions])),
        present_BM=torch.tensor([[m in one.tokens for m in MODALITIES] for one in questions]),
        retrieved=_neighbours(questions, neighbours, nothing),
        choices_BKC=choices_BKC,
        choices_mask_BK=choices_mask_BK,
    )


def _neighbours(asked: Sequence[RecordedQuestion], count: int, nothing_0D: np.ndarray) -> Neighbours | None:
    """None where nothing is missing anywhere."""
    if all(one.missing is None for one in asked):
        return None
    parts, ids = [], []
    for one in asked:
        found = list(one.retrieved[:count])
        parts += [each.tokens_TD for each in found] + [nothing_0D] * (count - len(found))
        ids.append([*range(len(found)), *[-1] * (count - len(found))])
    tokens, mask = _padded(parts)
    shape = (len(asked), count)
    return Neighbours(tokens.unflatten(0, shape), mask.unflatten(0, shape), torch.tensor(ids))


def _padded(parts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(B, longest, C) float16, zeros behind each one's end, and the mask of what is real."""
    padded = pad_sequence([torch.from_numpy(part.astype(np.float16)) for part in parts], batch_first=True)
    if not padded.shape[1]:
        padded = padded.new_zeros(len(parts), 1, padded.shape[2])
    lengths_B1 = torch.tensor([len(part) for part in parts])[:, None]
    return padded, torch.arange(padded.shape[1]) < lengths_B1
