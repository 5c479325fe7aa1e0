"""Makes a `Batch` of questions about recordings, as `r2scp.pipelines.batches.dataset` does of store rows.

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
    """One question about one recording, embedded, with the clips retrieved for a missing modality.

    `choices_KD` is None for a model that has classes.
    """

    tokens: Mapping[Modality, np.ndarray]  # float16 (T, D), of the available modalities
    retrieved: Sequence[RetrievedClip]
    words_WD: np.ndarray  # float16
    sentence_D: np.ndarray  # float32
    choices_KD: np.ndarray | None  # float16, zeros for a choice that is missing

    @property
    def missing(self) -> Modality | None:
        """The missing modality; None if both are available."""
        return next((modality for modality in MODALITIES if modality not in self.tokens), None)


def recorded_batch(questions: Sequence[RecordedQuestion], neighbours: int) -> Batch:
    """One row per question. `neighbours`: how many the model uses."""
    no_tokens_0D = np.zeros((0, len(questions[0].sentence_D)), dtype=np.float16)
    streams = {m: _padded([each.tokens.get(m, no_tokens_0D) for each in questions]) for m in MODALITIES}
    words_BWC, words_mask_BW = _padded([each.words_WD for each in questions])
    choices = [each.choices_KD for each in questions if each.choices_KD is not None]
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
        sentence_BC=torch.from_numpy(np.stack([each.sentence_D for each in questions])),
        present_BM=torch.tensor([[m in each.tokens for m in MODALITIES] for each in questions]),
        retrieved=_neighbours(questions, neighbours, no_tokens_0D),
        choices_BKC=choices_BKC,
        choices_mask_BK=choices_mask_BK,
    )


def _neighbours(
    questions: Sequence[RecordedQuestion], count: int, no_tokens_0D: np.ndarray
) -> Neighbours | None:
    """None if no question misses a modality."""
    if all(each.missing is None for each in questions):
        return None
    parts, ids = [], []
    for each in questions:
        clips = list(each.retrieved[:count])
        absent = count - len(clips)
        parts += [clip.tokens_TD for clip in clips] + [no_tokens_0D] * absent
        ids.append([*range(len(clips)), *[-1] * absent])
    tokens, mask = _padded(parts)
    shape = (len(questions), count)
    return Neighbours(tokens.unflatten(0, shape), mask.unflatten(0, shape), torch.tensor(ids))


def _padded(parts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(B, longest, C) float16, padded with zeros, and the mask of real tokens."""
    padded = pad_sequence([torch.from_numpy(part.astype(np.float16)) for part in parts], batch_first=True)
    if not padded.shape[1]:
        padded = padded.new_zeros(len(parts), 1, padded.shape[2])
    lengths_B1 = torch.tensor([len(part) for part in parts])[:, None]
    return padded, torch.arange(padded.shape[1]) < lengths_B1
