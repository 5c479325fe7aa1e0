"""Eqs. 11 and 12: router weights and fusion, with absent sources at exactly zero."""

import math

import pytest
import torch

from r2scp.model.batch import Tokens
from r2scp.model.experts import Sizes
from r2scp.model.router import Router, fuse, uniform_weights

SIZES = Sizes(encoder_dim=4, dim=4, heads=2, ffn=4, dropout=0.0)


def sources() -> list[Tokens]:
    torch.manual_seed(0)
    return [
        Tokens(torch.randn(2, length, 4), torch.ones(2, length, dtype=torch.bool)) for length in (3, 2, 4)
    ]


@torch.no_grad()
def test_eq_11_is_a_softmax_over_the_gates() -> None:
    router, parts = Router(SIZES).eval(), sources()
    available_BS = torch.tensor([[True, True, True], [False, True, True]])
    weights_BS = router(parts, available_BS)
    scores = [
        [float(router.gates[s](parts[s].states_BLD[row].mean(0))) for s in range(3)] for row in range(2)
    ]
    full = [math.exp(score) for score in scores[0]]
    torch.testing.assert_close(weights_BS[0], torch.tensor(full) / sum(full))
    rest = [math.exp(score) for score in scores[1][1:]]
    torch.testing.assert_close(weights_BS[1, 1:], torch.tensor(rest) / sum(rest))
    assert float(weights_BS[1, 0]) == 0.0


def test_uniform_weights() -> None:
    available_BS = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0, 0.5, 0.5], [0, 0, 1.0]])
    torch.testing.assert_close(uniform_weights(available_BS), expected)


def test_concat_keeps_each_weighted_token_and_masks_absent_sources() -> None:
    parts = sources()
    weights_BS = torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.6, 0.4]])
    available_BS = torch.tensor([[True, True, True], [False, True, True]])
    joint = fuse(parts, weights_BS, available_BS, "concat")
    assert joint.states_BLD.shape == (2, 9, 4)
    torch.testing.assert_close(joint.states_BLD[0, 3:5], 0.2 * parts[1].states_BLD[0])
    assert joint.mask_BL[1].tolist() == [False] * 3 + [True] * 6


def test_sum_pooled_is_eq_12_to_the_letter() -> None:
    parts = [
        Tokens(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])),
        Tokens(torch.tensor([[[10.0]]]), torch.tensor([[True]])),
        Tokens(torch.tensor([[[4.0], [8.0]]]), torch.tensor([[True, True]])),
    ]
    joint = fuse(parts, torch.tensor([[0.5, 0.25, 0.25]]), torch.ones(1, 3, dtype=torch.bool), "sum_pooled")
    assert joint.states_BLD.tolist() == [[[0.5 * 2 + 0.25 * 10 + 0.25 * 6]]]
    assert joint.mask_BL.tolist() == [[True]]


@pytest.mark.parametrize("fusion", ["concat", "sum_pooled"])
def test_every_weight_reaches_the_result(fusion: str) -> None:
    parts = sources()
    weights_BS = torch.full((2, 3), 1 / 3, requires_grad=True)
    fuse(parts, weights_BS, torch.ones(2, 3, dtype=torch.bool), fusion).states_BLD.sum().backward()  # pyright: ignore[reportArgumentType]
    assert weights_BS.grad is not None
    assert (weights_BS.grad != 0).all()
