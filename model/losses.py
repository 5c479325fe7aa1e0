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

    `rank`: `stopgrad` sends no gradient to the side that should be worse; `paper` sends gradients to both
    sides; `release` is the authors' release: both sides, on means over the batch, with X and R⁺ swapped.
    `rank_weight` is λ of eq. 15; 0 drops the rank loss. `modality_dropout`: a model that recovers nothing
    also learns from each batch with one modality dropped; without it, from complete data alone.
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
    """`total` is to be minimised; `parts` are its terms by name, detached scalars before weighting."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Task losses of stage II per row: from the real modality (X), the nearest (R⁺) and the farthest (R⁻)."""

    real_B: Tensor
    near_B: Tensor | None
    far_B: Tensor | None


def task_loss(logits_BK: Tensor, target_B: Tensor) -> Tensor:
    """-log P(y), (B,) float32."""
    return F.cross_entropy(logits_BK, target_B, reduction="none")


def expert_loss(answer: Answer, target_B: Tensor, present_BM: Tensor) -> Loss:
    """Eq. 10: CE_joint + CE_audio + CE_visual; the last two are means over rows that have the modality."""
    parts = {"joint": task_loss(answer.joint_BK, target_B).mean()}
    for name, logits_BK, column in (("audio", answer.audio_BK, AUDIO), ("visual", answer.visual_BK, VISUAL)):
        present_B = present_BM[:, column]
        # Rows without the modality have logits of zero, so their loss is finite and can be multiplied by 0.
        parts[name] = (task_loss(logits_BK, target_B) * present_B).sum() / present_B.sum().clamp(min=1)
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
    """Eqs. 13 and 14, which ask for L(X) ≤ L(R⁺) and L(R⁺) ≤ L(R⁻), as scalars; see `LossConfig.rank`."""
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
