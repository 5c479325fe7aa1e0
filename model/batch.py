"""The model's input and output.

Legend of shapes, for all of the model except ImageBind's towers:

- B rows (questions) of a batch; M the two modalities that can go missing, in the order of `AUDIO`, `VISUAL`;
  S the three sources that the router weighs, `AUDIO`, `VISUAL`, `TEXT`
- L one-second tokens of a clip, U those of the available modality if both occur; W words of a question
- N neighbours of a clip; K answers: the classes of the train split, or four choices
- C width of the encoder, D width of the model, H heads, E width of a head

A mask is bool and True where a token is real. Values under False never affect a result, even if NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TensorDataclass = TypeVar("TensorDataclass", bound="DataclassInstance")

AUDIO, VISUAL, TEXT = 0, 1, 2  # columns of present_BM (the first two) and of router_BS
SOURCES = ("audio", "visual", "text")


class Tokens(NamedTuple):
    """Masked sequences: states_BLD floating, zero where mask_BL is False."""

    states_BLD: Tensor
    mask_BL: Tensor

    def mean(self) -> Tensor:
        """Masked mean over L, eq. 2 of the paper: (B, D), zero for a row without tokens."""
        count_B1 = self.mask_BL.sum(dim=1, keepdim=True).clamp(min=1)
        return self.states_BLD.masked_fill(~self.mask_BL[..., None], 0).sum(dim=1) / count_B1

    def keep_rows(self, rows_B: Tensor) -> "Tokens":
        """No tokens, and zeros, where rows_B is False."""
        mask_BL = self.mask_BL & rows_B[:, None]
        return Tokens(self.states_BLD.masked_fill(~mask_BL[..., None], 0), mask_BL)


class Neighbours(NamedTuple):
    """Sequences of the missing modality from other clips, best (or farthest) first.

    `mask_BNL` is all False where there is no neighbour; `ids_BN` int64, any number by which the caller knows
    the clip, -1 for none.
    """

    tokens_BNLC: Tensor
    mask_BNL: Tensor
    ids_BN: Tensor


class Question(NamedTuple):
    """The decoder's input: a question's sentence vector and, with choices, a vector per "question choice"."""

    sentence_BC: Tensor
    choices_BKC: Tensor | None
    choices_mask_BK: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B questions with the features of their clips, all in the encoder's space and of unit norm.

    Features may have any floating dtype. `present_BM`: the modalities that the model may use; features of an
    absent one never enter it. `retrieved` and `farthest` are of each row's missing modality. `target_B` is
    int64 in [0, K), or -1 for an unknown answer. Raises ValueError if shapes disagree, a question has no
    word, a present modality no token, a row no choice, or its answer is a missing choice.
    """

    audio_BLC: Tensor
    audio_mask_BL: Tensor
    visual_BLC: Tensor
    visual_mask_BL: Tensor
    words_BWC: Tensor
    words_mask_BW: Tensor
    sentence_BC: Tensor
    present_BM: Tensor
    retrieved: Neighbours | None = None
    farthest: Neighbours | None = None
    choices_BKC: Tensor | None = None
    choices_mask_BK: Tensor | None = None
    target_B: Tensor | None = None

    def __post_init__(self) -> None:
        rows, width = self.sentence_BC.shape
        for name in ("audio", "visual", "words"):
            tokens, mask = self.sequence(name)
            _check_shape(f"{name} features", tokens, (rows, None, width))
            _check_shape(f"{name} mask", mask, tuple(tokens.shape[:2]), bool_=True)
        _check_shape("present", self.present_BM, (rows, 2), bool_=True)
        for name, neighbours in (("retrieved", self.retrieved), ("farthest", self.farthest)):
            if neighbours is not None:
                _check_shape(f"{name} features", neighbours.tokens_BNLC, (rows, None, None, width))
                _check_shape(
                    f"{name} mask", neighbours.mask_BNL, tuple(neighbours.tokens_BNLC.shape[:3]), bool_=True
                )
                _check_shape(f"{name} ids", neighbours.ids_BN, tuple(neighbours.tokens_BNLC.shape[:2]))
        if (self.choices_BKC is None) != (self.choices_mask_BK is None):
            raise ValueError("choices must come with their mask; got one without the other")
        if self.choices_BKC is not None and self.choices_mask_BK is not None:
            _check_shape("choices", self.choices_BKC, (rows, None, width))
            _check_shape("choices mask", self.choices_mask_BK, tuple(self.choices_BKC.shape[:2]), bool_=True)
        self._check_values()

    def _check_values(self) -> None:
        _check_rows(
            ~self.words_mask_BW.any(dim=1),
            "a question must have at least one word",
        )
        for column, mask_BL in ((AUDIO, self.audio_mask_BL), (VISUAL, self.visual_mask_BL)):
            _check_rows(
                self.present_BM[:, column] & ~mask_BL.any(dim=1),
                f"{SOURCES[column]} must have a token where it is present; mark it absent",
            )
        if self.choices_mask_BK is not None:
            _check_rows(~self.choices_mask_BK.any(dim=1), "a question must have at least one choice")
            if self.target_B is not None:
                valid_B1 = self.choices_mask_BK.gather(1, self.target_B.clamp(min=0)[:, None])
                masked_B = (self.target_B >= 0) & ~valid_B1.squeeze(1)
                _check_rows(masked_B, "the answer must be one of the choices that are not masked")

    def __len__(self) -> int:
        return len(self.sentence_BC)

    @property
    def question(self) -> Question:
        """The part that the decoder reads."""
        return Question(self.sentence_BC, self.choices_BKC, self.choices_mask_BK)

    def sequence(self, name: str) -> tuple[Tensor, Tensor]:
        """Features and mask of "audio", "visual" or "words"."""
        return {
            "audio": (self.audio_BLC, self.audio_mask_BL),
            "visual": (self.visual_BLC, self.visual_mask_BL),
            "words": (self.words_BWC, self.words_mask_BW),
        }[name]

    def drop(self, modality: int, rows_B: Tensor | None = None) -> "Batch":
        """A batch with `modality` (`AUDIO` or `VISUAL`) absent, in all rows or where rows_B is True."""
        return replace(self, present_BM=drop_modality(self.present_BM, modality, rows_B))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for an asynchronous `to(..., non_blocking=True)`."""
        return map_tensors(self, Tensor.pin_memory)


class Purification(NamedTuple):
    """What CAP did to one modality. A row without purification has no noise and NaN scores."""

    dissonance_BL: Tensor  # eq. 3, in [0, 2]; NaN under padding
    noise_BL: Tensor  # bool, the purged tokens, Ω_noise of eq. 5
    source_BL: Tensor  # int64, the token of the available modality that replaced a purged one; else -1
    saliency_BU: Tensor  # the score behind eq. 7; NaN under padding

    def keep_rows(self, rows_B: Tensor) -> "Purification":
        """No purification where rows_B is False."""
        others_B1 = ~rows_B[:, None]
        return Purification(
            *(part.masked_fill(others_B1, value) for part, value in zip(self, NOT_PURIFIED, strict=True))
        )

    def merge(self, rows_B: Tensor, other: "Purification") -> "Purification":
        """This one where rows_B is True, `other` elsewhere."""
        merged = []
        for ours, theirs, value in zip(self, other, NOT_PURIFIED, strict=True):
            length = max(ours.shape[1], theirs.shape[1])
            parts = [F.pad(part, (0, length - part.shape[1]), value=value) for part in (ours, theirs)]
            merged.append(torch.where(rows_B[:, None], *parts))
        return Purification(*merged)


NOT_PURIFIED = (math.nan, False, -1, math.nan)  # fields of a `Purification`, and padding


class Evidence(NamedTuple):
    """Why the model answered as it did."""

    router_BS: Tensor  # α of eq. 11; exactly 0 for a source that is neither present nor recovered
    available_BM: Tensor  # bool, present or recovered
    recovered_BM: Tensor  # bool
    fallback_BM: Tensor  # bool, recovered without any neighbour, from the available modality alone
    neighbours_BN: Tensor | None  # int64, ids of the neighbours used, -1 for none
    purified: tuple[Purification | None, Purification | None]  # of AUDIO, of VISUAL
    joint_BD: Tensor  # the vector that the joint head scores


class Answer(NamedTuple):
    """Logits (float32; -inf for a missing choice) and their evidence.

    `logits_BK` is the prediction: the sum of the joint head and of those whose modality is available. The
    other heads give zeros.
    """

    logits_BK: Tensor
    joint_BK: Tensor
    audio_BK: Tensor
    visual_BK: Tensor
    evidence: Evidence


def drop_modality(present_BM: Tensor, modality: int, rows_B: Tensor | None = None) -> Tensor:
    """A copy of present_BM with `modality` absent, in all rows or where rows_B is True."""
    if modality not in (AUDIO, VISUAL):
        raise ValueError(f"only audio ({AUDIO}) or visual ({VISUAL}) can go missing; got {modality}")
    present_BM = present_BM.clone()
    present_BM[:, modality] &= False if rows_B is None else ~rows_B
    return present_BM


def map_tensors(value: TensorDataclass, function: Callable[[Tensor], Tensor]) -> TensorDataclass:
    """A copy of a dataclass with `function` applied to its tensors, in tuples at any depth too."""

    def apply(part: object) -> object:
        if isinstance(part, Tensor):
            return function(part)
        if isinstance(part, tuple):
            return getattr(part, "_make", tuple)(map(apply, part))
        return part

    return replace(value, **{field.name: apply(getattr(value, field.name)) for field in fields(value)})


def where_rows(rows_B: Tensor, yes: Tokens, no: Tokens) -> Tokens:
    """`yes` where rows_B is True, `no` elsewhere; padded to the longer one only if both are needed."""
    if bool(rows_B.all()):
        return yes
    if not bool(rows_B.any()):
        return no
    length = max(yes.mask_BL.shape[1], no.mask_BL.shape[1])
    states = [F.pad(part.states_BLD, (0, 0, 0, length - part.mask_BL.shape[1])) for part in (yes, no)]
    masks = [F.pad(part.mask_BL, (0, length - part.mask_BL.shape[1])) for part in (yes, no)]
    chosen_BLD = torch.where(rows_B[:, None, None], states[0], states[1].to(states[0].dtype))
    return Tokens(chosen_BLD, torch.where(rows_B[:, None], *masks))


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], *, bool_: bool = False) -> None:
    fits = tensor.ndim == len(shape) and all(
        size in (None, got) for size, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits or (bool_ and tensor.dtype != torch.bool):
        kind = "bool" if bool_ else "a tensor"
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be {kind} of shape ({sizes}); got {got}")


def _check_rows(wrong_B: Tensor, message: str) -> None:
    if bool(wrong_B.any()):
        raise ValueError(f"{message}; rows {wrong_B.nonzero().flatten().tolist()[:8]}")
