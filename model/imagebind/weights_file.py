"""Reads and writes weights files with the published checkpoint's names and sizes.

A file is refused, with a one-line reason, unless it holds exactly the three towers' parameters; the depth,
thermal and IMU towers of the published checkpoint are skipped. Only tensors are unpickled.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r2scp.model.imagebind.towers import ImageBindConfig, TowerConfig

TOWERS = ("vision", "audio", "text")
PUBLISHED_HEADS = {"vision": 16, "audio": 12, "text": 16}  # imagebind_huge.pth carries no metadata
OTHER_TOWERS = ("depth", "thermal", "imu")  # towers of the published checkpoint that are skipped
UNUSED = frozenset(  # names that have no effect on the unit-norm output of a causal tower
    {
        "modality_preprocessors.text.mask",
        "modality_postprocessors.audio.1.log_logit_scale",
        "modality_postprocessors.text.1.log_logit_scale",
    }
)
PUBLISHED_NAMES = {  # our module or parameter: its name in the published checkpoint
    "vision.class_token": "modality_preprocessors.vision.cls_token",
    "vision.positions": "modality_preprocessors.vision.pos_embedding_helper.pos_embed",
    "vision.stem": "modality_preprocessors.vision.rgbt_stem.proj.1.weight",
    "vision.trunk_norm": "modality_trunks.vision.pre_transformer_layer.0",
    "vision.blocks": "modality_trunks.vision.blocks",
    "vision.head_norm": "modality_heads.vision.0",
    "vision.head": "modality_heads.vision.2",
    "audio.class_token": "modality_preprocessors.audio.cls_token",
    "audio.positions": "modality_preprocessors.audio.pos_embedding_helper.pos_embed",
    "audio.stem": "modality_preprocessors.audio.rgbt_stem.proj.weight",
    "audio.stem_norm": "modality_preprocessors.audio.rgbt_stem.norm_layer",
    "audio.blocks": "modality_trunks.audio.blocks",
    "audio.head_norm": "modality_heads.audio.0",
    "audio.head": "modality_heads.audio.2",
    "text.words": "modality_preprocessors.text.token_embedding.weight",
    "text.positions": "modality_preprocessors.text.pos_embed",
    "text.blocks": "modality_trunks.text.blocks",
    "text.head_norm": "modality_heads.text.proj.0",
    "text.head": "modality_heads.text.proj.1",
}


class WeightsError(ValueError):
    """A weights file that is missing, damaged or not an ImageBind model; the message is one line."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, mapped from the file if its format allows, and metadata (none in a `.pth`)."""
    if not path.is_file():
        raise WeightsError(
            f"weights must be a .pth or .safetensors file; {path} does not exist or is not a file"
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    if path.suffix not in (".pth", ".pt"):
        raise WeightsError(f"weights must be a .pth or .safetensors file; got {path.name!r}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as a checkpoint that holds only tensors: {reason}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise WeightsError(f"{path} must hold a dictionary of tensors by name; got {type(tensors).__name__}")
    return tensors, {}


def config_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> ImageBindConfig:
    """Sizes from the tensors; head counts from the metadata, or else the published ones."""
    try:
        stored = json.loads(metadata.get("config", "{}"))
        heads = {tower: int(stored.get(f"{tower}_num_heads", PUBLISHED_HEADS[tower])) for tower in TOWERS}
        widths = {tower: tensors[published_name(f"{tower}.positions")].shape[-1] for tower in TOWERS}
        towers = {
            tower: TowerConfig(width=widths[tower], depth=_depth(tensors, tower), heads=heads[tower])
            for tower in TOWERS
        }
        return ImageBindConfig(
            **towers,
            dim=tensors[published_name("vision.head.weight")].shape[0],
            patch=tensors[published_name("vision.stem")].shape[-1],
            vocabulary=tensors[published_name("text.words")].shape[0],
            context=tensors[published_name("text.positions")].shape[1],
        )
    except KeyError as error:
        raise WeightsError(f"{path} is not an ImageBind model: it has no tensor {error}") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(f"{path} is not an ImageBind model: {error}") from error


def select_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: Path
) -> dict[str, Tensor]:
    """The tensors for our parameters (name: shape), by our names; any mismatch is a WeightsError."""
    ours = {published_name(name): name for name in shapes}
    ignored = re.compile(rf"modality_\w+\.(?:{'|'.join(OTHER_TOWERS)})\.")
    missing = ours.keys() - tensors.keys()
    unexpected = {name for name in tensors.keys() - ours.keys() - UNUSED if not ignored.match(name)}
    if missing or unexpected:
        raise WeightsError(
            f"{path} does not fit ImageBind's vision, audio and text towers: "
            f"{_summary('missing', missing)}; {_summary('unexpected', unexpected)}"
        )
    for theirs, name in ours.items():
        if tensors[theirs].shape != shapes[name] or not tensors[theirs].is_floating_point():
            got = f"{tensors[theirs].dtype} {tuple(tensors[theirs].shape)}"
            raise WeightsError(
                f"{path}: {theirs} must be floating point of shape {tuple(shapes[name])}; got {got}"
            )
    return {name: tensors[theirs] for theirs, name in ours.items()}


def write_weights(
    path: Path, state: Mapping[str, Tensor], config: ImageBindConfig, metadata: Mapping[str, str] | None
) -> None:
    """Write tensors (by our names) under the published names. The file is written whole or not at all."""
    sizes: dict[str, int] = {"out_embed_dim": config.dim}
    for tower, tower_config in zip(TOWERS, (config.vision, config.audio, config.text), strict=True):
        sizes[f"{tower}_embed_dim"] = tower_config.width
        sizes[f"{tower}_num_blocks"] = tower_config.depth
        sizes[f"{tower}_num_heads"] = tower_config.heads
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        tensors = {published_name(name): tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, partial, {**(metadata or {}), "config": json.dumps(sizes)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def published_name(name: str) -> str:
    """The published checkpoint's name for one of our parameters."""
    for ours, theirs in PUBLISHED_NAMES.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _depth(tensors: Mapping[str, Tensor], tower: str) -> int:
    """Number of blocks in the file. Not the highest index: a forged one could make us build too many."""
    prefix = published_name(f"{tower}.blocks") + "."
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _summary(kind: str, names: set[str], limit: int = 3) -> str:
    """`3 missing (a, b, c)`, with at most `limit` names."""
    if not names:
        return f"none {kind}"
    more = ", ..." if len(names) > limit else ""
    return f"{len(names)} {kind} ({', '.join(sorted(names)[:limit])}{more})"
