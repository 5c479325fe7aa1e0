"""Proves that the towers compute what ImageBind computes, and that a fingerprint names what was computed.

Oracles: reference inputs and outputs; the upstream package where it is installed; PyTorch's own layers, in
test_towers.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2scp.model.imagebind.imagebind import (
    ImageBind,
    ImageBindConfig,
    TowerConfig,
    WeightsError,
    best_dtype,
    normalise_frames,
)

SMALL = ImageBindConfig(
    vision=TowerConfig(width=48, depth=2, heads=4),
    audio=TowerConfig(width=36, depth=3, heads=3),
    text=TowerConfig(width=32, depth=1, heads=2),
    dim=24,
    patch=28,
    vocabulary=300,
)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(11)


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    ImageBind(SMALL).save(path)
    return path


def some_ids(rows: int = 3, width: int = 9) -> Tensor:
    """Token ids whose end token (the highest id, 299) stands at different places."""
    ids_BW = torch.randint(1, 298, (rows, width))
    ids_BW[torch.arange(rows), torch.arange(rows) + width - rows] = 299
    return ids_BW


def all_outputs(model: ImageBind) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        return {
            "vision": model.vision(torch.randn(3, 3, 224, 224, generator=generator)),
            "audio": model.audio(torch.randn(3, 1, 128, 204, generator=generator)),
            "text": model.text(torch.tensor([[1, 5, 299, 0], [7, 8, 9, 299]])).sentence_BD,
        }


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "cosine"), [(torch.float32, 1 - 1e-6), (torch.bfloat16, 0.999)])
def test_equals_the_reference_outputs(shared_dir: Path, dtype: torch.dtype, cosine: float) -> None:
    expected = load_file(shared_dir / "parity" / "imagebind_io.safetensors")
    model = ImageBind.load(shared_dir / "parity" / "imagebind_tiny.safetensors", dtype=dtype)
    with torch.inference_mode():
        text = model.text(expected["text_ids"])
        ours = {
            "vision_output": model.vision(expected["vision_input"]),
            "audio_output": model.audio(expected["audio_input"]),
            "text_output": text.sentence_BD,
            "text_token_output": text.words_BWD,
        }
    for name, got in ours.items():
        want = F.normalize(expected[name], dim=-1)
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got, want, dim=-1).min() >= cosine, name
        if dtype == torch.float32:
            assert (got - want).abs().max() <= 1e-4, name


@pytest.mark.parity
def test_equals_the_upstream_package(tmp_path: Path) -> None:
    upstream = pytest.importorskip(
        "imagebind.models.imagebind_model",
        reason="the extra `imagebind` is not installed",
        exc_type=ImportError,
    )
    rest = {
        f"{name}_{size}": 2 for name in ("depth", "thermal", "imu") for size in ("num_blocks", "num_heads")
    }
    rest |= {"depth_embed_dim": 16, "thermal_embed_dim": 16, "imu_embed_dim": 16}
    sizes = {"vision_embed_dim": 64, "vision_num_blocks": 2, "vision_num_heads": 4, "out_embed_dim": 40}
    sizes |= {"text_embed_dim": 48, "text_num_blocks": 2, "text_num_heads": 3}
    sizes |= {"audio_embed_dim": 48, "audio_num_blocks": 2, "audio_num_heads": 6}
    theirs = upstream.ImageBindModel(**sizes, **rest).eval()
    path = tmp_path / "upstream.safetensors"
    save_file(
        {k: v.contiguous() for k, v in theirs.state_dict().items()}, path, {"config": json.dumps(sizes)}
    )
    ours = ImageBind.load(path, dtype=torch.float32)
    ids_BW = torch.zeros(2, 77, dtype=torch.int64)
    ids_BW[0, :4], ids_BW[1, :7] = (
        torch.tensor([49406, 5, 6, 49407]),
        torch.tensor([49406, 9, 8, 7, 6, 5, 49407]),
    )
    frames, mels = torch.randn(2, 3, 224, 224), torch.randn(2, 1, 128, 204)
    with torch.inference_mode():
        want = theirs({"vision": frames, "audio": mels, "text": ids_BW})
        got = {
            "vision": ours.vision(frames),
            "audio": ours.audio(mels),
            "text": ours.text(ids_BW).sentence_BD,
        }
    for name in got:
        torch.testing.assert_close(got[name], F.normalize(want[name], dim=-1), atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32_at_the_published_width() -> None:
    config = ImageBindConfig(
        vision=TowerConfig(width=1280, depth=2, heads=16),
        audio=TowerConfig(width=768, depth=2, heads=12),
        text=TowerConfig(width=1024, depth=2, heads=16),
        vocabulary=300,
    )
    model = ImageBind(config)
    exact, coarse = all_outputs(model), all_outputs(model.to(torch.bfloat16))
    for name in exact:
        assert coarse[name].dtype == torch.float32
        assert F.cosine_similarity(exact[name], coarse[name]).min() >= 0.999, name
        assert not torch.equal(exact[name], coarse[name])


def test_learns_to_match_through_all_three_towers() -> None:
    model = ImageBind(SMALL)
    frames, mels, ids_BW = torch.randn(4, 3, 224, 224), torch.randn(4, 1, 128, 204), some_ids(4)
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(12):
        vision_BD, audio_BD, text_BD = model.vision(frames), model.audio(mels), model.text(ids_BW).sentence_BD
        targets_B = torch.arange(4)
        loss = F.cross_entropy(10 * vision_BD @ audio_BD.T, targets_B) + F.cross_entropy(
            10 * vision_BD @ text_BD.T, targets_B
        )
        optimiser.zero_grad()
        loss.backward()
        assert all(
            p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if p.numel()
        )
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_frames_are_normalised_channel_by_channel() -> None:
    frames_NHW3 = torch.zeros(2, 224, 224, 3, dtype=torch.uint8)
    frames_NHW3[0, 5, 7] = torch.tensor([255, 128, 64], dtype=torch.uint8)
    normal = normalise_frames(frames_NHW3)
    assert normal.shape == (2, 3, 224, 224)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    want = torch.tensor(
        [(value / 255 - m) / s for value, m, s in zip((255, 128, 64), mean, std, strict=True)]
    )
    torch.testing.assert_close(normal[0, :, 5, 7], want)
    torch.testing.assert_close(
        normal[1, :, 0, 0], torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    )
    with pytest.raises(ValueError, match="uint8 of shape"):
        normalise_frames(frames_NHW3.float())


def test_the_fingerprint_names_the_weights(small_file: Path, tmp_path: Path) -> None:
    model = ImageBind.load(small_file, dtype=torch.float32)
    assert model.fingerprint == ImageBind.load(small_file, dtype=torch.float32).fingerprint
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(small_file.read_bytes())
    other = tmp_path / "other.safetensors"
    ImageBind(SMALL).save(other)
    same = ImageBind.load(copy, dtype=torch.float32).fingerprint
    coarse = ImageBind.load(small_file, dtype=torch.bfloat16).fingerprint
    assert same == coarse == model.fingerprint  # a store filled in bf16 answers a machine without it
    assert ImageBind.load(other, dtype=torch.float32).fingerprint != same
    assert model.fingerprint.startswith("imagebind-24-")
    assert set(model.fingerprint) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_describe_says_what_load_will_give(small_file: Path) -> None:
    for dtype in (None, torch.float32, torch.bfloat16):
        described, model = (
            ImageBind.describe(small_file, dtype=dtype),
            ImageBind.load(small_file, dtype=dtype),
        )
        assert (described.fingerprint, described.dim, described.dtype) == (
            model.fingerprint,
            model.dim,
            model.dtype,
        )
        known = ImageBind.load(small_file, dtype=dtype, known_sha256=described.sha256)
        assert known.fingerprint == model.fingerprint


def test_a_model_without_a_file_has_no_fingerprint() -> None:
    with pytest.raises(WeightsError, match="save it, then load it"):
        _ = ImageBind(SMALL).fingerprint


def test_other_dtypes_are_refused(small_file: Path) -> None:
    with pytest.raises(WeightsError, match="dtype must be one of"):
        ImageBind.load(small_file, dtype=torch.float64)


def test_random_weights_follow_their_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageBindConfig, "huge", lambda: SMALL)  # the published size takes gigabytes
    first, again, other = (ImageBind.load(f"random:{seed}", dtype=torch.float32) for seed in (7, 7, 8))
    coarse = ImageBind.load("random:7", dtype=torch.bfloat16)
    assert first.fingerprint == "imagebind-24-random-7-r1"
    assert first.fingerprint == ImageBind.describe("random:7", dtype=torch.float32).fingerprint
    for a, b, c, d in zip(*(m.parameters() for m in (first, again, other, coarse)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.to(torch.bfloat16), d)
        assert a.ndim == 1 or not torch.equal(a, c)
    for embedding_BD in all_outputs(first).values():
        assert torch.isfinite(embedding_BD).all()
        assert (embedding_BD[0] @ embedding_BD[1]).abs() < 0.99


def test_the_published_sizes_add_up() -> None:
    with torch.device("meta"):
        model = ImageBind(ImageBindConfig.huge())
    millions = {
        name: sum(p.numel() for p in tower.parameters()) / 1e6 for name, tower in model.named_children()
    }
    assert millions["vision"] == pytest.approx(632, rel=0.01)  # ViT-H/14
    assert millions["text"] == pytest.approx(354, rel=0.01)
    assert millions["audio"] == pytest.approx(86, rel=0.01)  # ViT-B/16


def test_bfloat16_is_chosen_where_the_processor_has_it() -> None:
    lines = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    native = not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(lines)
    assert best_dtype() == (torch.bfloat16 if native else torch.float32)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(small_file: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_cpu = ImageBind.load(small_file, dtype=torch.float32)
    on_gpu = ImageBind.load(small_file, "cuda", torch.float32)
    for want, got in zip(all_outputs(on_cpu).values(), all_outputs(on_gpu).values(), strict=True):
        assert got.device.type == "cuda"
        assert F.cosine_similarity(want, got.cpu()).min() > 0.9999
