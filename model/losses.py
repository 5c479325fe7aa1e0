"""What each stage minimises: eq. 10 in stage I, eqs. 13-15 in stage II."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r2scp.model.batch import AUDIO, VISUAL, Answer

Rank = Literal["stopgrad", "paper", "release"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Settings of stage II's loss.

    `rank`: `stopgrad` holds the side that is meant to be worse fixed; `paper` lets gradients flow to both
    sides; `release` is what the authors' release computes: both sides, on means over the batch, and with X
    and R⁺ in each other's place. `rank_weight` is λ of eq. 15, 0 leaves the rank loss out.
    `modality_dropout`: a model that recovers nothing also learns from each batch with the drawn modality
    dropped; without it, it learns from complete data alone.
    """

    rank: Rank = "stopgrad"
    rank_weight: float = 1.0
    modality_dropout: bool = True

    def __post_init__(self) -> None:
        if self.rank not in ("stopgrad", "paper", "release") or not self.rank_weight >= 0:
            raise ValueError(
                f"rank must be stopgrad, paper or release and its weight at least 0; got {self.rank!r} "
                f"and {self.rank_weight}"
            )


class Loss(NamedTuple):
    """`total` is what to minimise; `parts` its summands by name, detached scalars before any weight."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Task losses of the passes of stage II, per row: X, R⁺ and R⁻."""

    real_B: Tensor
    near_B: Tensor | None
    far_B: Tensor | None


def task_loss(logits_BK: Tensor, target_B: Tensor) -> Tensor:
    """-log P(y), (B,) float32."""
    return F.cross_entropy(logits_BK, target_B, reduction="none")


def expert_loss(answer: Answer, target_B: Tensor, present_BM: Tensor) -> Loss:
    """Eq. 10: CE_joint + CE_audio + CE_visual; the last two are means over the rows that have it."""
    parts = {"joint": task_loss(answer.joint_BK, target_B).mean()}
    for name, logits_BK, column in (("audio", answer.audio_BK, AUDIO), ("visual", answer.visual_BK, VISUAL)):
        there_B = present_BM[:, column]
        # A row without the modality has logits of zero, which is finite: times 0 it adds nothing.
        parts[name] = (task_loss(logits_BK, target_B) * there_B).sum() / there_B.sum().clamp(min=1)
    return _sum(parts, {})


def mixing_loss(losses: Losses, config: LossConfig, *, ranked: bool = True) -> Loss:
    """Eq. 15: CE(R⁺) + CE(X) + λ(rank⁺ + rank⁻), means over rows."""
    parts = {"real": losses.real_B.mean()}
    if losses.near_B is not None:
        parts["lacking"] = losses.near_B.mean()
        if ranked and config.rank_weight:
            positive, negative = rank_losses(losses.real_B, losses.near_B, losses.far_B, config.rank)
            parts["rank_positive"] = positive
            if negative is not None:
                parts["rank_negative"] = negative
    weights = {"rank_positive": config.rank_weight, "rank_negative": config.rank_weight}
    return _sum(parts, weights)


def rank_losses(
    real_B: Tensor, near_B: Tensor, far_B: Tensor | None, rank: Rank
) -> tuple[Tensor, Tensor | None]:
    """Eqs. 13 and 14, as scalars: L(X) ≤ L(R⁺) and L(R⁺) ≤ L(R⁻) are asked for; see `LossConfig.rank`."""
    if rank == "release":
        positive = F.relu(near_B.mean() - real_B.mean())
        return positive, None if far_B is None else F.relu(real_B.mean() - far_B.mean())
    worse_B, worst_B = near_B, far_B
    if rank == "stopgrad":
        worse_B, worst_B = near_B.detach(), None if far_B is None else far_B.detach()
    positive = F.relu(real_B - worse_B).mean()
    return positive, None if worst_B is None else F.relu(near_B - worst_B).mean()


def _sum(parts: dict[str, Tensor], weights: dict[str, float]) -> Loss:
    total = torch.stack([part * weights.get(name, 1.0) for name, part in parts.items()]).sum()
    return Loss(total, {name: part.detach() for name, part in parts.items()})
