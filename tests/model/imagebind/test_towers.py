"""Proves that each part of a tower computes what it should and that a batch of another shape is refused.

Oracles: PyTorch's own multi-head attention and encoder layer (which ours do not use); a convolution over two
frames; what causality and independence of the rows of a batch demand.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2scp.model.imagebind.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.model.imagebind.towers import Block, SelfAttention

SMALL = ImageBindConfig(
    vision=TowerConfig(width=48, depth=2, heads=4),
    audio=TowerConfig(width=36, depth=3, heads=3),
    text=TowerConfig(width=32, depth=1, heads=2),
    dim=24,
    patch=28,
    vocabulary=300,
)


NOTHING = torch.zeros(2, 7, 24)  # what an attention's output is added to


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(11)


def some_ids(rows: int = 3, width: int = 9) -> Tensor:
    """Token ids whose end token (the highest id, 299) stands at different places."""
    ids_BW = torch.randint(1, 298, (rows, width))
    ids_BW[torch.arange(rows), torch.arange(rows) + width - rows] = 299
    return ids_BW


@pytest.mark.parametrize("extra_token", [False, True])
def test_attention_equals_pytorchs_own(extra_token: bool) -> None:
    ours = SelfAttention(TowerConfig(width=24, depth=1, heads=3), extra_token=extra_token)
    theirs = nn.MultiheadAttention(24, 3, add_bias_kv=extra_token, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    x_BLC = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x_BLC, NOTHING), theirs(x_BLC, x_BLC, x_BLC)[0], atol=1e-5, rtol=1e-5)


def test_causal_attention_equals_pytorchs_own() -> None:
    ours = SelfAttention(TowerConfig(width=24, depth=1, heads=3), causal=True)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x_BLC = torch.randn(2, 7, 24)
    mask_LL = torch.full((7, 7), -math.inf).triu(1)
    torch.testing.assert_close(
        ours(x_BLC, NOTHING), theirs(x_BLC, x_BLC, x_BLC, attn_mask=mask_LL)[0], atol=1e-5, rtol=1e-5
    )


def test_a_block_equals_pytorchs_own() -> None:
    ours = Block(TowerConfig(width=24, depth=1, heads=3))
    theirs = nn.TransformerEncoderLayer(
        24, 3, 96, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    names = {
        "self_attn": "attn",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "norm1": "norm_1",
        "norm2": "norm_2",
    }
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = {
        names[name.split(".")[0]] + name[name.index(".") :]: t for name, t in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    x_BLC = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x_BLC), theirs(x_BLC), atol=2e-5, rtol=1e-5)


def test_a_still_is_a_clip_of_two_equal_frames() -> None:
    tower = ImageBind(SMALL).vision
    frame_B3HW, seen = torch.randn(1, 3, 224, 224), []
    tower.trunk_norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    tower(frame_B3HW)
    clip_B3THW = frame_B3HW.unsqueeze(2).expand(-1, -1, 2, -1, -1)
    patches_BLC = F.conv3d(clip_B3THW, tower.stem, stride=(2, 28, 28)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0][:, 1:] - tower.positions[:, 1:], patches_BLC, atol=1e-4, rtol=1e-4)


def test_outputs_are_unit_norm_float32_and_depend_on_their_own_row_alone() -> None:
    model = ImageBind(SMALL).eval()
    frames, mels, ids_BW = torch.randn(3, 3, 224, 224), torch.randn(3, 1, 128, 204), some_ids()
    for tower, batch in ((model.vision, frames), (model.audio, mels)):
        together = tower(batch)
        assert together.shape == (3, model.dim)
        torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(together[1:2], tower(batch[1:2]), atol=1e-5, rtol=1e-4)
        assert (together[0] - together[1]).abs().max() > 1e-3
        assert tower(batch[:0]).shape == (0, model.dim)
    sentence_BD, words_BWD = model.text(ids_BW)
    assert sentence_BD.shape == (3, model.dim)
    assert words_BWD.shape == (3, 9, model.dim)
    torch.testing.assert_close(words_BWD.norm(dim=-1), torch.ones(3, 9))
    torch.testing.assert_close(sentence_BD[0], model.text(ids_BW[:1]).sentence_BD[0], atol=1e-5, rtol=1e-4)


def test_nothing_after_the_end_token_matters() -> None:
    model = ImageBind(SMALL)
    ids_BW = some_ids(1, 6)
    full, cut = model.text(F.pad(ids_BW, (0, 71))), model.text(ids_BW)
    torch.testing.assert_close(full.sentence_BD, cut.sentence_BD, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(full.words_BWD[:, :6], cut.words_BWD, atol=1e-6, rtol=1e-5)
    assert torch.equal(cut.sentence_BD[0], cut.words_BWD[0, 5])
    assert not torch.allclose(cut.sentence_BD, model.text(ids_BW.flip(1).roll(-1, 1)).sentence_BD)


@pytest.mark.parametrize(
    ("tower", "batch", "message"),
    [
        (
            "vision",
            torch.zeros(1, 224, 224, 3),
            r"frames must be floating point of shape \(batch, 3, 224, 224\)",
        ),
        ("vision", torch.zeros(1, 3, 224, 224, dtype=torch.uint8), "got torch.uint8"),
        ("audio", torch.zeros(1, 128, 204), r"got torch.float32 \(1, 128, 204\)"),
        ("text", torch.zeros(1, 78, dtype=torch.int64), "1 to 77 tokens"),
        ("text", torch.zeros(1, 7), "must be integers"),
    ],
)
def test_refuses_a_batch_of_another_shape(tower: str, batch: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ImageBind(SMALL), tower)(batch)
