"""CAP equation by equation, against numbers computed by hand and a loop written from Algorithm 1."""

import math

import pytest
import torch
from torch import Tensor

from r2scp.model.batch import Tokens
from r2scp.model.experts import Sizes
from r2scp.model.purification import (
    GuidanceBlock,
    Guided,
    Purifier,
    PurifyConfig,
    Saliency,
    dissonance,
    inject,
    literal_saliency,
    received_attention,
)

SIZES = Sizes(encoder_dim=8, dim=8, heads=2, ffn=8, dropout=0.0)
DROPPING = Sizes(encoder_dim=8, dim=8, heads=2, ffn=8, dropout=0.5)


def config(**changes: object) -> PurifyConfig:
    settings = {"k": 2, "cap_gradient": "straight_through", "saliency": "received", "pairing": "rank"}
    return PurifyConfig(**(settings | changes))  # pyright: ignore[reportArgumentType]


def tokens(rows: int, length: int, seed: int, real: list[int] | None = None) -> Tokens:
    """Random states; `real[b]` of them are real in row b."""
    states_BLD = torch.randn(rows, length, SIZES.dim, generator=torch.Generator().manual_seed(seed))
    mask_BL = torch.arange(length) < torch.tensor(real or [length] * rows)[:, None]
    return Tokens(states_BLD.masked_fill(~mask_BL[..., None], 0), mask_BL)


def purifier(sizes: Sizes = SIZES, **changes: object) -> Purifier:
    torch.manual_seed(3)
    return Purifier(sizes, config(**changes)).eval()


def test_eq_2_anchor_is_the_mean_over_real_tokens() -> None:
    states_BLD = torch.tensor([[[1.0, 3.0], [5.0, 7.0], [100.0, math.nan]]])
    mask_BL = torch.tensor([[True, True, False]])
    assert Tokens(states_BLD, mask_BL).mean().tolist() == [[3.0, 5.0]]


def test_eq_3_by_hand() -> None:
    # g = (1, 0); tokens along, across, against and at 60° of it; a projection that swaps the axes
    half = math.sqrt(3) / 2
    states_BLD = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.5, half], [0.0, 0.0]]])
    anchor_BD = torch.tensor([[4.0, 0.0]])
    straight = dissonance(states_BLD, torch.eye(2), anchor_BD)
    torch.testing.assert_close(straight, torch.tensor([[0.0, 1.0, 2.0, 0.5, 1.0]]))
    swapped = dissonance(states_BLD, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), anchor_BD)
    torch.testing.assert_close(swapped, torch.tensor([[1.0, 0.0, 1.0, 1 - half, 1.0]]))


def test_the_projection_starts_as_identity() -> None:
    assert torch.equal(purifier().projection_DD, torch.eye(SIZES.dim))


def test_eq_5_takes_the_k_most_dissonant_real_tokens() -> None:
    module = purifier(k=3)
    missing, common = tokens(4, 7, 0, [7, 5, 2, 1]), tokens(4, 6, 1, [6, 6, 6, 2])
    purified = module(missing, common, common, tokens(4, 3, 2))
    anchor_BD = torch.stack([common.states_BLD[row, : [6, 6, 6, 2][row]].mean(0) for row in range(4)])
    for row, real in enumerate([7, 5, 2, 1]):
        cosine_L = torch.cosine_similarity(missing.states_BLD[row, :real], anchor_BD[row], dim=-1)
        worst = set((1 - cosine_L).topk(min(3, real)).indices.tolist())
        assert set(purified.purification.noise_BL[row].nonzero().flatten().tolist()) == worst
        assert purified.purification.dissonance_BL[row, real:].isnan().all()


def test_saliency_received_by_hand() -> None:
    # one head, two real tokens, one padded, two words; softmax over (ln 3, 0) is (3/4, 1/4)
    ln3 = math.log(3)
    inf = math.inf
    within = torch.tensor([[[[ln3, 0.0, -inf], [ln3, 0.0, -inf], [9.0, 0.0, -inf]]]])
    across = torch.tensor([[[[0.0, ln3], [0.0, 0.0], [50.0, 50.0]]]])
    mask_BU, mask_BW = torch.tensor([[True, True, False]]), torch.tensor([[True, True]])
    score_BU = received_attention(within, across, mask_BU, mask_BW)
    # columns: self 3/4 + 3/4 and 1/4 + 1/4; words give 1/2 + 3/4 and 1/2 + 1/4; both have mean 1 already
    torch.testing.assert_close(score_BU, torch.tensor([[1.5 + 1.25, 0.5 + 0.75, 0.0]]))


def test_received_ignores_padded_words() -> None:
    within, across = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 3)
    mask_BU, mask_BW = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, True, False]])
    blocked = across.clone()
    blocked[..., 2] = -math.inf
    short = received_attention(within, across[..., :2], mask_BU, mask_BW[:, :2])
    torch.testing.assert_close(received_attention(within, blocked, mask_BU, mask_BW), short)


def test_the_terms_of_received_have_mean_one() -> None:
    mask_BU, mask_BW = torch.ones(3, 6, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    score_BU = received_attention(torch.randn(3, 2, 6, 6), torch.randn(3, 2, 6, 4), mask_BU, mask_BW)
    torch.testing.assert_close(score_BU.mean(dim=1), torch.full((3,), 2.0))


def guide(saliency: Saliency, *, training: bool = False, sizes: Sizes = SIZES) -> Guided:
    torch.manual_seed(11)
    block = GuidanceBlock(sizes, saliency).train(training)
    return block(tokens(3, 6, 5), tokens(3, 4, 6))


def test_literal_saliency_is_constant_and_received_is_not() -> None:
    assert torch.equal(guide("literal").saliency_BU, torch.full((3, 6), 2.0))
    assert (guide("received").saliency_BU.std(dim=1) > 1e-3).all()
    assert (guide("output_norm").saliency_BU.std(dim=1) > 1e-3).all()


def test_literal_saliency_is_dropout_noise_in_training() -> None:
    assert guide("literal", training=True, sizes=DROPPING).saliency_BU.std() > 0.1


def test_literal_sums_over_keys() -> None:
    weights = torch.tensor([[[[0.25, 0.5], [0.0, 2.0]]]])
    torch.testing.assert_close(literal_saliency(weights, weights * 2), torch.tensor([[2.25, 6.0]]))


def test_random_saliency_is_fixed_in_evaluation_and_fresh_in_training() -> None:
    assert torch.equal(guide("random").saliency_BU, guide("random").saliency_BU)
    torch.manual_seed(0)
    block = GuidanceBlock(SIZES, "random")
    first, second = (block(tokens(1, 6, 5), tokens(1, 4, 6)).saliency_BU for _ in range(2))
    assert not torch.equal(first, second)
    long, short = (block.eval()(tokens(1, n, 5), tokens(1, 4, 6)).saliency_BU for n in (9, 6))
    assert torch.equal(long[:, :6], short)


def test_eq_9_is_the_masked_formula() -> None:
    missing_BLD = torch.tensor([[[1.0], [2.0], [3.0]]])
    guided_BUD = torch.tensor([[[10.0], [20.0]]])
    mixed = inject(missing_BLD, guided_BUD, torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1, 0, 0]]))
    assert mixed.tolist() == [[[20.0], [2.0], [10.0]]]


def algorithm_1(
    module: Purifier, missing: Tokens, available: Tokens, common: Tokens, words: Tokens
) -> Tensor:
    """Lines 3 to 31, token by token, for rows without padding."""
    guided = module.guidance(common, words)
    result = missing.states_BLD.clone()
    for row in range(len(result)):
        anchor_D = available.states_BLD[row].mean(dim=0)
        delta = [
            1 - float(torch.cosine_similarity(h @ module.projection_DD, anchor_D, dim=0)) for h in result[row]
        ]
        noisy = sorted(range(len(delta)), key=lambda i: -delta[i])[: module.config.k]
        sigma = guided.saliency_BU[row].tolist()
        salient = sorted(range(len(sigma)), key=lambda i: -sigma[i])[: module.config.k]
        if module.config.pairing == "position":
            noisy, salient = sorted(noisy), sorted(salient)
        for target, source in zip(noisy, salient, strict=True):
            result[row, target] = guided.tokens.states_BLD[row, source]
    return result


@pytest.mark.parametrize("pairing", ["rank", "position"])
@pytest.mark.parametrize("saliency", ["received", "output_norm", "random"])
@torch.no_grad()
def test_purification_is_algorithm_1(pairing: str, saliency: str) -> None:
    module = purifier(k=3, pairing=pairing, saliency=saliency)
    module.projection_DD.add_(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) / 4)
    inputs = tokens(5, 7, 0), tokens(5, 6, 1), tokens(5, 6, 2), tokens(5, 4, 3)
    before = [part.states_BLD.clone() for part in inputs]
    purified = module(*inputs)
    torch.testing.assert_close(purified.tokens.states_BLD, algorithm_1(module, *inputs))
    assert all(torch.equal(part.states_BLD, old) for part, old in zip(inputs, before, strict=True))
    assert purified.purification.noise_BL.sum(dim=1).tolist() == [3] * 5


def test_the_two_pairings_differ() -> None:
    inputs = tokens(5, 7, 0), tokens(5, 6, 1), tokens(5, 6, 2), tokens(5, 4, 3)
    ranked, placed = (purifier(k=3, pairing=pairing)(*inputs) for pairing in ("rank", "position"))
    assert torch.equal(ranked.purification.noise_BL, placed.purification.noise_BL)
    assert not torch.equal(ranked.purification.source_BL, placed.purification.source_BL)


@pytest.mark.parametrize("pairing", ["rank", "position"])
def test_k_beyond_the_sequence_purges_what_both_sides_allow(pairing: str) -> None:
    module = purifier(k=50, pairing=pairing)
    missing, common = tokens(3, 5, 0, [5, 3, 4]), tokens(3, 4, 1, [2, 4, 1])
    purified = module(missing, common, common, tokens(3, 3, 2))
    assert purified.purification.noise_BL.sum(dim=1).tolist() == [2, 3, 1]
    for row, real in enumerate([2, 4, 1]):
        sources = purified.purification.source_BL[row][purified.purification.noise_BL[row]]
        assert sources.max() < real
        assert sources.unique().numel() == sources.numel()


def test_k_zero_changes_nothing() -> None:
    missing, common = tokens(2, 5, 0), tokens(2, 4, 1)
    assert torch.equal(
        purifier(k=0)(missing, common, common, tokens(2, 3, 2)).tokens.states_BLD, missing.states_BLD
    )


@pytest.mark.parametrize("saliency", ["received", "output_norm", "literal", "random"])
@pytest.mark.parametrize("pairing", ["rank", "position"])
def test_padding_changes_nothing(saliency: str, pairing: str) -> None:
    def padded(part: Tokens, by: int) -> Tokens:
        states_BLD = torch.nn.functional.pad(part.states_BLD, (0, 0, 0, by))
        return Tokens(states_BLD, torch.nn.functional.pad(part.mask_BL, (0, by)))

    module = purifier(saliency=saliency, pairing=pairing)
    missing, common, words = tokens(3, 5, 0), tokens(3, 6, 1), tokens(3, 4, 2)
    plain = module(missing, common, common, words)
    longer = module(padded(missing, 4), padded(common, 2), padded(common, 2), padded(words, 3))
    torch.testing.assert_close(longer.tokens.states_BLD[:, :5], plain.tokens.states_BLD, rtol=0, atol=1e-6)
    assert not longer.tokens.states_BLD[:, 5:].any()
    assert torch.equal(longer.purification.source_BL[:, :5], plain.purification.source_BL)


def test_straight_through_leaves_the_value_and_moves_the_projection() -> None:
    inputs = tokens(2, 5, 0), tokens(2, 6, 1), tokens(2, 6, 2), tokens(2, 4, 3)
    hard = purifier(cap_gradient="none")
    soft = purifier()
    assert torch.equal(hard(*inputs).tokens.states_BLD, soft(*inputs).tokens.states_BLD)
    soft(*inputs).tokens.states_BLD.square().sum().backward()
    assert soft.projection_DD.grad is not None
    assert soft.projection_DD.grad.abs().max() > 0
    assert not hard.projection_DD.requires_grad


def test_straight_through_gradient_is_that_of_the_mask() -> None:
    """∂loss/∂W = Σ_i ∂loss/∂M_i · ∂δ_i/∂W with M the noise mask of eq. 9."""
    inputs = missing, available, common, words = (
        tokens(1, 4, 0),
        tokens(1, 4, 1),
        tokens(1, 4, 2),
        tokens(1, 3, 3),
    )
    module = purifier(k=2)
    weight_BLD = torch.randn(1, 4, SIZES.dim, generator=torch.Generator().manual_seed(9))
    purified = module(*inputs)
    (purified.tokens.states_BLD * weight_BLD).sum().backward()

    guided = module.guidance(common, words)
    by_noise = purified.purification.dissonance_BL[0].argsort(descending=True)
    by_saliency = guided.saliency_BU[0].argsort(descending=True)
    mask_gradient_L = torch.zeros(4)
    for noisy, salient in zip(by_noise, by_saliency, strict=True):
        exchange_D = guided.tokens.states_BLD[0, salient] - missing.states_BLD[0, noisy]
        mask_gradient_L[noisy] = (exchange_D * weight_BLD[0, noisy]).sum().detach()
    projection_DD = torch.eye(SIZES.dim, requires_grad=True)
    delta_L = dissonance(missing.states_BLD, projection_DD, available.mean())[0]
    (delta_L * mask_gradient_L).sum().backward()
    torch.testing.assert_close(module.projection_DD.grad, projection_DD.grad)
