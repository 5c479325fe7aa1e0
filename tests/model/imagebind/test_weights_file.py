"""Proves that a weights file is read whole or refused, and written whole or not at all.

Foreign, damaged and hostile files are made here; each must end in one line of `WeightsError`, and nothing in
them may run.
"""

import json
import os
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2scp.model.imagebind.imagebind import ImageBind, ImageBindConfig, TowerConfig, WeightsError
from r2scp.model.imagebind.weights_file import PUBLISHED_HEADS, published_name

SMALL = ImageBindConfig(
    vision=TowerConfig(width=48, depth=2, heads=4),
    audio=TowerConfig(width=36, depth=3, heads=3),
    text=TowerConfig(width=32, depth=1, heads=2),
    dim=24,
    patch=28,
    vocabulary=300,
)


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    torch.manual_seed(11)
    path = tmp_path / "small.safetensors"
    ImageBind(SMALL).save(path)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_saved_model_comes_back_whole(tmp_path: Path) -> None:
    model = ImageBind(SMALL).eval()
    path = tmp_path / "model.safetensors"
    model.save(path, {"card": "made for a test"})
    again = ImageBind.load(path, dtype=torch.float32)
    assert again.config == SMALL
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert "modality_trunks.audio.blocks.2.attn.bias_k" in load_file(path)
    metadata = metadata_of(path)
    assert metadata["card"] == "made for a test"
    assert json.loads(metadata["config"])["audio_num_heads"] == 3
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_half_precision_files_load_into_the_wanted_dtype(tmp_path: Path) -> None:
    model, path = ImageBind(SMALL).eval(), tmp_path / "half.safetensors"
    model.save(path, dtype=torch.float16)
    again = ImageBind.load(path, dtype=torch.float32)
    assert path.stat().st_size < 2.1 * sum(p.numel() for p in model.parameters()) + 20_000
    for want, got in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(got, want.half().float(), atol=0, rtol=0)


def test_other_towers_and_unused_tensors_are_passed_over(small_file: Path, tmp_path: Path) -> None:
    tensors, more = load_file(small_file), tmp_path / "more.safetensors"
    tensors["modality_trunks.depth.blocks.0.attn.in_proj_weight"] = torch.ones(3)
    tensors["modality_heads.imu.3.weight"] = torch.ones(2, 2)
    tensors["modality_preprocessors.text.mask"] = torch.zeros(77, 77)
    tensors["modality_postprocessors.audio.1.log_logit_scale"] = torch.tensor(3.0)
    save_file(tensors, more, metadata_of(small_file))
    want, got = (ImageBind.load(path, dtype=torch.float32).parameters() for path in (small_file, more))
    assert all(map(torch.equal, want, got))


def test_a_pth_without_metadata_has_the_published_head_counts(tmp_path: Path) -> None:
    config = ImageBindConfig(
        vision=TowerConfig(width=32, depth=1, heads=16),
        audio=TowerConfig(width=24, depth=1, heads=12),
        text=TowerConfig(width=32, depth=1, heads=16),
        dim=8,
        vocabulary=300,
    )
    model = ImageBind(config).eval()
    tensors = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
        again = ImageBind.load(tmp_path / "m.pth", dtype=torch.float32)
        assert again.config == config
        assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_training_a_loaded_model_leaves_the_file_alone(small_file: Path) -> None:
    before = small_file.read_bytes()
    model = ImageBind.load(small_file, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert small_file.read_bytes() == before


def test_missing_unexpected_and_misshapen_tensors_are_refused(small_file: Path) -> None:
    tensors = load_file(small_file)
    metadata = metadata_of(small_file)
    block, cls_token = "modality_trunks.vision.blocks.1.", "modality_preprocessors.audio.cls_token"
    faults: list[tuple[dict[str, Tensor], str]] = [
        (
            {k: v for k, v in tensors.items() if k != block + "mlp.fc1.bias"},
            r"1 missing \(.*fc1.bias\); none unexp",
        ),
        ({k: v for k, v in tensors.items() if "trunks" not in k}, "at least one block"),
        ({k: v for k, v in tensors.items() if "text" not in k}, "has no tensor"),
        ({**tensors, block + "gate": torch.ones(1)}, r"none missing; 1 unexpected \(.*blocks.1.gate\)"),
        ({**tensors, "modality_trunks.vision.blocks.99999999.x": torch.ones(1)}, r"missing \(.*, \.\.\.\)"),
        (
            {**tensors, cls_token: torch.ones(1, 1, 5)},
            r"cls_token must be .* \(1, 1, 36\); got .* \(1, 1, 5\)",
        ),
        (
            {**tensors, cls_token: torch.ones(1, 1, 36, dtype=torch.int32)},
            "floating point .* got torch.int32",
        ),
        ({"weight": torch.ones(1)}, "not an ImageBind model"),
        ({**tensors, published_name("text.positions"): torch.tensor(1.0)}, "not an ImageBind model"),
    ]
    for state, message in faults:
        save_file(state, small_file, metadata)
        with pytest.raises(WeightsError, match=message) as caught:
            ImageBind.load(small_file)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"vision_num_heads": "x"}', '{"vision_num_heads": 0}', '{"text_num_heads": 5}']
)
def test_nonsense_in_the_metadata_is_refused(small_file: Path, config: str) -> None:
    save_file(load_file(small_file), small_file, {"config": config})
    with pytest.raises(WeightsError, match="not an ImageBind model"):
        ImageBind.load(small_file)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Bomb(tmp_path / "ran")}, tmp_path / "zipped.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    for name in ("zipped.pth", "plain.pth"):
        with pytest.raises(WeightsError, match="only tensors") as caught:
            ImageBind.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str, small_file: Path) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(load_file(small_file), whole)
    else:
        whole.write_bytes(small_file.read_bytes())
    damaged, content = tmp_path / f"damaged{suffix}", whole.read_bytes()
    for broken in (
        b"",
        b"\x00" * 100,
        b"<html>404 Not Found</html>",
        content[:50],
        content[: len(content) // 2],
    ):
        damaged.write_bytes(broken)
        with pytest.raises(WeightsError, match="damaged"):
            ImageBind.load(damaged)


def test_a_source_that_is_not_a_weights_file_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "weights.bin").write_bytes(b"x")
    for source, message in (
        (tmp_path / "none.pth", "does not exist"),
        (tmp_path, "not a file"),
        (tmp_path / "weights.bin", "must be a .pth or .safetensors file"),
        (tmp_path / "list.pth", "must hold a dictionary of tensors"),
        ("random:", "random:SEED"),
        ("random:-1", "random:SEED"),
        ("random:1.5", "random:SEED"),
    ):
        with pytest.raises(WeightsError, match=message):
            ImageBind.load(source)
        with pytest.raises(WeightsError, match=message):
            ImageBind.describe(source)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bit_rot_loads_or_is_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    """Random bytes changed anywhere: what is not noticed is a changed weight, which the fingerprint shows."""
    # Widths that the published head counts divide: a .pth carries no others.
    towers = {
        name: TowerConfig(width=48, depth=1, heads=PUBLISHED_HEADS[name])
        for name in ("vision", "audio", "text")
    }
    config = ImageBindConfig(**towers, dim=4, patch=112, vocabulary=10, context=4)
    whole, rotten, rng = tmp_path / f"whole{suffix}", tmp_path / f"rotten{suffix}", random.Random(6)
    tensors = {published_name(name): tensor for name, tensor in ImageBind(config).state_dict().items()}
    heads = json.dumps({f"{name}_num_heads": PUBLISHED_HEADS[name] for name in towers})
    torch.save(tensors, whole) if suffix == ".pth" else save_file(tensors, whole, {"config": heads})
    content, errors = whole.read_bytes(), []
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 5))):
            changed[rng.randrange(min(len(changed), 30_000))] = rng.randrange(256)
        rotten.write_bytes(changed)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch may remark on what it is about to refuse
                ImageBind.load(rotten)
        except WeightsError as error:
            errors.append(str(error))
    assert 5 < len(errors) < 60
    assert not any("\n" in error for error in errors)
