"""Eqs. 10 and 13-15 by hand, and where each rank loss sends its gradients."""

import math
from typing import cast

import pytest
import torch
from torch import Tensor

from r2scp.model.batch import Answer, Evidence
from r2scp.model.losses import LossConfig, Losses, Rank, expert_loss, mixing_loss, rank_losses, task_loss

# row 0: X worse than R⁺ and R⁺ worse than R⁻, both pay; row 1: all in order, none pays
REAL, NEAR, FAR = (3.0, 1.0), (2.0, 2.0), (0.5, 5.0)


def passes() -> tuple[Tensor, Tensor, Tensor]:
    real_B, near_B, far_B = (torch.tensor(values, requires_grad=True) for values in (REAL, NEAR, FAR))
    return real_B, near_B, far_B


def gradients(rank: Rank) -> list[list[float]]:
    parts = passes()
    positive, negative = rank_losses(*parts, rank)
    assert negative is not None
    (positive + negative).backward()
    return [[0.0, 0.0] if part.grad is None else part.grad.tolist() for part in parts]


def test_task_loss_is_minus_log_probability() -> None:
    logits_BK = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    expected = torch.tensor([math.log(4), math.log(2)])
    torch.testing.assert_close(task_loss(logits_BK, torch.tensor([1, 0])), expected)


def test_eq_10_counts_a_modality_only_where_it_is_there() -> None:
    joint_BK = torch.zeros(2, 4)
    audio_BK = torch.tensor([[math.log(3), 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    answer = Answer(joint_BK, joint_BK, audio_BK, joint_BK, cast(Evidence, None))
    present_BM = torch.tensor([[True, False], [False, False]])
    loss = expert_loss(answer, torch.tensor([0, 0]), present_BM)
    torch.testing.assert_close(loss.parts["joint"], torch.tensor(math.log(4)))
    torch.testing.assert_close(loss.parts["audio"], torch.tensor(math.log(2)))  # row 0 alone: 3 of 6
    assert float(loss.parts["visual"]) == 0.0
    torch.testing.assert_close(loss.total, torch.tensor(math.log(4) + math.log(2)))


@pytest.mark.parametrize("rank", ["stopgrad", "paper"])
def test_eqs_13_and_14_by_hand(rank: Rank) -> None:
    positive, negative = rank_losses(*passes(), rank)
    assert negative is not None
    assert [positive.item(), negative.item()] == [(3 - 2) / 2, (2 - 0.5) / 2]


def test_the_release_ranks_batch_means_with_x_and_retrieved_swapped() -> None:
    positive, negative = rank_losses(*passes(), "release")
    assert negative is not None
    # means: X 2, R⁺ 2, R⁻ 2.75
    assert [positive.item(), negative.item()] == [0.0, 0.0]
    real_B, near_B, far_B = passes()
    positive, negative = rank_losses(real_B - 1, near_B, far_B - 2.5, "release")
    assert negative is not None
    assert [positive.item(), negative.item()] == [2 - 1, 1 - 0.25]


def test_stopgrad_pulls_the_better_side_and_leaves_the_worse_one_alone() -> None:
    real, near, far = gradients("stopgrad")
    assert real == [0.5, 0.0]  # X is asked to improve
    assert near == [0.5, 0.0]  # R⁺ is asked to improve by rank⁻, and never pushed up by rank⁺
    assert far == [0.0, 0.0]  # the negatives are never worsened


def test_paper_pushes_the_worse_side_up() -> None:
    real, near, far = gradients("paper")
    assert real == [0.5, 0.0]
    assert near == [0.0, 0.0]  # -1/2 of rank⁺ fights +1/2 of rank⁻
    assert far == [-0.5, 0.0]  # rank⁻ is met by worsening the negatives


def test_release_gradients() -> None:
    real_B, near_B, far_B = passes()
    positive, negative = rank_losses(real_B - 1, near_B, far_B - 2.5, "release")
    assert negative is not None
    (positive + negative).backward()
    assert real_B.grad is not None
    assert near_B.grad is not None
    assert far_B.grad is not None
    assert real_B.grad.tolist() == [0.0, 0.0]  # -1/2 + 1/2
    assert near_B.grad.tolist() == [0.5, 0.5]
    assert far_B.grad.tolist() == [-0.5, -0.5]


def test_eq_15_and_its_weight() -> None:
    real_B, near_B, far_B = passes()
    losses = Losses(real_B=real_B, near_B=near_B, far_B=far_B)
    assert mixing_loss(losses, LossConfig()).total.item() == pytest.approx(2 + 2 + 0.5 + 0.75)
    assert mixing_loss(losses, LossConfig(rank_weight=2.0)).total.item() == pytest.approx(2 + 2 + 2 * 1.25)
    without = mixing_loss(losses, LossConfig(rank_weight=0.0))
    assert without.total.item() == 4.0
    assert set(without.parts) == {"real", "lacking"}
    assert mixing_loss(losses, LossConfig(), ranked=False).total.item() == 4.0


def test_without_negatives_only_rank_positive_is_asked() -> None:
    real_B, near_B, _ = passes()
    loss = mixing_loss(Losses(real_B=real_B, near_B=near_B, far_B=None), LossConfig())
    assert loss.total.item() == pytest.approx(2 + 2 + 0.5)
    alone = mixing_loss(Losses(real_B=real_B, near_B=None, far_B=None), LossConfig())
    assert alone.total.item() == 2.0


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="stopgrad, paper or release"):
        LossConfig(rank=cast(Rank, "other"))
    with pytest.raises(ValueError, match="weight"):
        LossConfig(rank_weight=-1.0)
