"""Proves what embedding costs, in counts: tokens computed, forwards of a clip, copies of weights, operators.

Oracles: PyTorch's own flop counter; the shapes that reach each matrix product.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.embed.flops import audio_flops, block_flops, clip_flops, vision_flops
from r2scp.model.imagebind import packed_linear as linear
from r2scp.model.imagebind.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.pipelines.extraction.embed import TOKENS_PER_FORWARD, ImageBindEncoder

SMALL = ImageBindConfig(
    vision=TowerConfig(width=48, depth=3, heads=4),
    audio=TowerConfig(width=36, depth=3, heads=3),
    text=TowerConfig(width=32, depth=1, heads=2),
    dim=24,
    patch=28,
    vocabulary=300,
)
FRAMES, MELS = torch.zeros(2, 3, 224, 224), torch.zeros(2, 1, 128, 204)
needs_packing = pytest.mark.skipif(
    not linear.can_pack(torch.zeros(2, 2, dtype=torch.bfloat16)),
    reason="this CPU or this PyTorch has no bfloat16 products with packed weights",
)


class Operators(TorchDispatchMode):
    """Counts operators, and remembers the tensors that are copied or cast."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copied: list[int] = []  # elements of each

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        self.counts[name] += 1
        if name in ("aten::_to_copy", "aten::copy_", "aten::clone"):
            self.copied.append(args[-1 if name == "aten::copy_" else 0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [SMALL, ImageBindConfig.huge()], ids=["small", "huge"])
def test_the_towers_compute_what_the_formula_counts_and_nothing_that_nobody_reads(size: ImageBindConfig):
    with torch.device("meta"):
        model = ImageBind(size)
        inputs = {"vision": torch.zeros(2, 3, 224, 224), "audio": torch.zeros(2, 1, 128, 204)}
    for tower, of_one in (("vision", vision_flops(size)), ("audio", audio_flops(size))):
        with FlopCounterMode(display=False) as counter:
            getattr(model, tower)(inputs[tower])
        assert counter.get_total_flops() == 2 * of_one, tower


def test_the_last_block_goes_on_with_the_class_token_alone():
    for tower, batch in (("vision", FRAMES), ("audio", MELS)):
        model = getattr(ImageBind(SMALL), tower)
        seen: list[int] = []
        for block in model.blocks:
            block.mlp.register_forward_hook(
                lambda _module, inputs, _output, seen=seen: seen.append(inputs[0].shape[1])
            )
        model(batch)
        tokens = model.positions.shape[1]
        assert seen == [tokens, tokens, 1]


def test_the_arithmetic_of_a_clip():
    huge = ImageBindConfig.huge()
    width, tokens = 1280, 257
    assert block_flops(width, tokens, tokens, tokens) == 24 * tokens * width**2 + 4 * tokens**2 * width
    assert clip_flops(huge) == 10 * (vision_flops(huge) + audio_flops(huge))
    assert vision_flops(huge) / 1e9 == pytest.approx(326.7, abs=0.1)
    assert vision_flops(huge) / vision_flops(huge, whole=True) == pytest.approx(31.25 / 32, abs=0.001)
    assert audio_flops(huge) / audio_flops(huge, whole=True) == pytest.approx(11.25 / 12, abs=0.01)


def test_clips_share_forwards_and_no_row_is_computed_for_nothing():
    encoder = ImageBindEncoder(ImageBind(SMALL).eval())
    rows: dict[str, list[int]] = {"vision": [], "audio": []}
    for name, taken in rows.items():
        tower = getattr(encoder._model, name)
        tower.register_forward_hook(
            lambda _module, inputs, _output, taken=taken: taken.append(len(inputs[0]))
        )
    waveforms = [np.zeros(16_000 * seconds, np.float32) for seconds in (10, 3, 1, 10)]
    got = encoder.audio(waveforms)
    encoder.visual(np.zeros((24, 224, 224, 3), np.uint8))
    assert [len(one) for one in got] == [10, 3, 1, 10]
    most = TOKENS_PER_FORWARD["cpu"]
    assert rows == {"vision": [most, 24 - most], "audio": [most, 24 - most]}


@needs_packing
def test_packed_blocks_are_four_products_and_no_weight_is_copied_again():
    model = ImageBind(SMALL).eval().to(torch.bfloat16)
    tower = ImageBindEncoder(model)._model.vision
    with torch.no_grad(), Operators() as seen:  # inference mode would hide what an operator is made of
        tower(FRAMES.to(torch.bfloat16))
    assert seen.counts["mkldnn::_linear_pointwise"] == 4 * SMALL.vision.depth
    for gone in ("aten::addmm", "aten::gelu"):  # done within the products
        assert seen.counts[gone] == 0, gone
    assert seen.counts["aten::mm"] == 1  # the head
    assert seen.counts["aten::_scaled_dot_product_flash_attention_for_cpu"] == SMALL.vision.depth
    smallest = min(p.numel() for b in tower.blocks for p in b.parameters() if p.ndim == 2)
    tokens = tower.positions.shape[1] - 1
    activations = {FRAMES.numel(), 2 * tokens * SMALL.vision.width, 2 * SMALL.vision.width, 2 * SMALL.dim}
    assert not [n for n in seen.copied if n >= smallest and n not in activations]


@needs_packing
def test_packing_changes_neither_the_embeddings_nor_what_is_saved(tmp_path):
    torch.manual_seed(3)
    exact = ImageBind(SMALL).eval()
    plain = ImageBind(SMALL).eval().to(torch.bfloat16)
    plain.load_state_dict(exact.state_dict())
    frames, mels = torch.randn(2, 3, 224, 224), torch.randn(2, 1, 128, 204)
    ids = torch.tensor([[1, 5, 299, 0], [7, 8, 9, 299]])

    def outputs(model: ImageBind) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model.vision(frames), model.audio(mels), model.text(ids).sentence_BD]

    before, names = outputs(plain), list(plain.state_dict())
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    laid = plain.pack()
    fc1 = [weight for name, weight in laid.vision.named_parameters() if name.endswith("fc1.weight")]
    assert fc1
    assert all(weight.is_mkldnn for weight in fc1)
    for want, old, new in zip(outputs(exact), before, outputs(laid), strict=True):
        assert torch.cosine_similarity(want, new).min() >= 0.999
        assert torch.cosine_similarity(old, new).min() >= 0.999
    assert list(laid.pack().state_dict()) == names  # again: nothing happens
    laid.save(tmp_path / "laid.safetensors")
    again = ImageBind.load(tmp_path / "laid.safetensors", dtype=torch.bfloat16)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert laid.vision(frames[:0]).shape == (0, SMALL.dim)
    with pytest.raises(RuntimeError, match="does not require grad"):  # it only infers, and says so
        laid.vision(frames).sum().backward()


def test_without_the_operators_nothing_is_packed_and_results_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "can_pack", lambda _weight: False)
    model = ImageBind(SMALL).eval().to(torch.bfloat16)
    with torch.inference_mode():
        before = model.vision(FRAMES)
        assert torch.equal(before, model.pack().vision(FRAMES))
    assert not any(parameter.is_mkldnn for parameter in model.parameters())


def test_float32_weights_are_left_where_they_are():
    model = ImageBind(SMALL).eval()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert [parameter.data_ptr() for parameter in model.pack().parameters()] == places
