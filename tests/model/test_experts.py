"""Φ, attention and experts against written-out formulas; eq. 4; padding and empty rows."""

import math

import torch
import torch.nn.functional as F

from r2scp.model.batch import AUDIO, VISUAL, Tokens
from r2scp.model.experts import Attention, Expert, Experts, Projection, Sizes, sinusoids

SIZES = Sizes(encoder_dim=6, dim=8, heads=2, ffn=12, dropout=0.0)


def masked(rows: int, length: int, width: int, real: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask_BL = torch.arange(length) < torch.tensor(real)[:, None]
    return torch.randn(rows, length, width).masked_fill(~mask_BL[..., None], 0), mask_BL


def experts(positions: str = "sinusoidal") -> Experts:
    torch.manual_seed(0)
    return Experts(SIZES, 1, positions).eval()  # pyright: ignore[reportArgumentType]


def test_sinusoids_by_hand() -> None:
    table_LD = sinusoids(4, 6)
    for time in range(4):
        for pair in range(3):
            angle = time / 10_000 ** (2 * pair / 6)
            assert abs(float(table_LD[time, 2 * pair]) - math.sin(angle)) < 1e-6
            assert abs(float(table_LD[time, 2 * pair + 1]) - math.cos(angle)) < 1e-6


def test_projection_is_one_linear_on_the_scaled_features() -> None:
    torch.manual_seed(0)
    phi = Projection(SIZES)
    x_BLC, mask_BL = masked(2, 3, 6, [3, 3])
    expected = x_BLC @ phi.linear.weight.T * math.sqrt(6) + phi.linear.bias
    torch.testing.assert_close(phi(x_BLC, mask_BL).states_BLD, expected)
    half = phi(x_BLC.half(), mask_BL).states_BLD
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-2)


def test_projected_unit_vectors_are_of_the_size_of_the_positions() -> None:
    torch.manual_seed(0)
    phi = Projection(Sizes(encoder_dim=1024, dim=768, heads=8, ffn=768, dropout=0.0))
    x_BLC = F.normalize(torch.randn(2, 50, 1024), dim=-1)
    size = phi(x_BLC, torch.ones(2, 50, dtype=torch.bool)).states_BLD.detach().std()
    assert 0.4 < float(size / sinusoids(50, 768).std()) < 2.5


def test_attention_is_the_formula_and_both_ways_agree() -> None:
    torch.manual_seed(0)
    attention = Attention(SIZES).eval()
    query_BQD = torch.randn(2, 3, 8)
    source = Tokens(*masked(2, 5, 8, [5, 2]))
    details = attention.with_weights(query_BQD, source)
    torch.testing.assert_close(attention(query_BQD, source), details.out_BQD)
    q, k, v = (
        f(x)
        for f, x in ((attention.query, query_BQD), (attention.key, source[0]), (attention.value, source[0]))
    )
    for row, real in enumerate([5, 2]):
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = (q[row, :, head] @ k[row, :real, head].T / 2).softmax(-1)
            heads.append(weights @ v[row, :real, head])
        torch.testing.assert_close(details.out_BQD[row], attention.out(torch.cat(heads, dim=-1)))
    torch.testing.assert_close(details.weights_BHQL.sum(-1), torch.ones(2, 2, 3))
    assert (details.weights_BHQL[1, :, :, 2:] == 0).all()


def test_a_row_without_tokens_is_zero_and_finite_both_ways() -> None:
    model = experts()
    attention, source = Attention(SIZES).eval(), Tokens(*masked(2, 4, 8, [4, 0]))
    details = attention.with_weights(source.states_BLD, source)
    torch.testing.assert_close(details.out_BQD, attention(source.states_BLD, source))
    assert torch.isfinite(details.out_BQD).all()
    x_BLC, mask_BL = masked(2, 4, 6, [4, 0])
    states_BLD = model(x_BLC, mask_BL, AUDIO, AUDIO).states_BLD
    assert not states_BLD[1].any()
    states_BLD.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padding_and_what_lies_under_it_change_nothing() -> None:
    model = experts()
    x_BLC, mask_BL = masked(3, 5, 6, [5, 5, 5])
    plain = model(x_BLC, mask_BL, VISUAL, VISUAL).states_BLD
    poisoned_BLC = F.pad(x_BLC, (0, 0, 0, 3), value=math.nan)
    longer = model(poisoned_BLC, F.pad(mask_BL, (0, 3)), VISUAL, VISUAL).states_BLD
    torch.testing.assert_close(longer[:, :5], plain, rtol=0, atol=1e-6)
    assert not longer[:, 5:].any()


def test_an_expert_with_positions_tells_order_and_one_without_does_not() -> None:
    torch.manual_seed(0)
    x = Tokens(*masked(1, 4, 8, [4]))
    turned = Tokens(x.states_BLD.flip(1), x.mask_BL)
    for positions, same in (("sinusoidal", False), ("none", True)):
        expert = Expert(SIZES, 2, positions).eval()  # pyright: ignore[reportArgumentType]
        assert torch.allclose(expert(x).mean(), expert(turned).mean(), atol=1e-5) is same


def test_common_features_take_one_projection_and_the_other_expert() -> None:
    model = experts()
    x_BLC, mask_BL = masked(2, 3, 6, [3, 2])
    expected = model.experts[VISUAL](model.projections[AUDIO](x_BLC, mask_BL)).states_BLD
    torch.testing.assert_close(model(x_BLC, mask_BL, source=AUDIO, expert=VISUAL).states_BLD, expected)


def test_eq_4_is_the_mean_over_the_neighbours_that_have_the_second() -> None:
    model = experts()
    x_BNLC = torch.randn(2, 3, 4, 6)
    # row 0: lengths 4, 2 and a neighbour that was not found; row 1: nothing found
    mask_BNL = torch.arange(4) < torch.tensor([[4, 2, 0], [0, 0, 0]])[..., None]
    result = model.encode_neighbours(x_BNLC, mask_BNL, AUDIO)
    first = model(x_BNLC[:1, 0], mask_BNL[:1, 0], AUDIO, AUDIO).states_BLD[0]
    second = model(x_BNLC[:1, 1, :2], mask_BNL[:1, 1, :2], AUDIO, AUDIO).states_BLD[0]
    torch.testing.assert_close(result.states_BLD[0, :2], (first[:2] + second) / 2)
    torch.testing.assert_close(result.states_BLD[0, 2:], first[2:])
    assert result.mask_BL.tolist() == [[True] * 4, [False] * 4]
    assert not result.states_BLD[1].any()
