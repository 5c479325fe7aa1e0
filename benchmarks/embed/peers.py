"""Who embeds in `benchmarks.embed`: our towers, transformers' vision encoder at their size, upstream itself.

Each is a function that embeds given tensors, without gradients, as its documentation runs it.
"""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from r2scp.model.imagebind.imagebind import ImageBind
from r2scp.model.imagebind.towers import IMAGE_SIDE, ImageBindConfig
from r2scp.model.imagebind.weights_file import select_tensors
from r2scp.store.errors import UsageError

Embed = Callable[[Tensor], Tensor]  # frames (N, 3, 224, 224) or log-mels (N, 1, 128, 204) -> (N, D)
CONFIG = ImageBindConfig.huge()


def upstream_model(folder: Path) -> nn.Module:
    """Upstream's `imagebind_huge(pretrained=False)` from a checkout, in float32. Raises UsageError.

    Its package imports loaders for video and sound that have no part here, so its models are imported
    without it.
    """
    package = ModuleType("imagebind")
    package.__path__ = [str(folder / "imagebind")]
    sys.modules["imagebind"] = package
    try:
        return importlib.import_module("imagebind.models.imagebind_model").imagebind_huge().eval()
    except ImportError as error:
        raise UsageError(
            f"--upstream must be a checkout of ImageBind whose requirements are installed: {error}"
        ) from error


def with_weights_of(upstream: nn.Module) -> ImageBind:
    """Our towers on upstream's own tensors, which both then share."""
    with torch.device("meta"):
        ours = ImageBind(CONFIG)
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    ours.load_state_dict(select_tensors(upstream.state_dict(), shapes, Path("upstream")), assign=True)
    return ours.eval()


def cast(model: ImageBind, dtype: torch.dtype) -> ImageBind:
    """A copy in another dtype."""
    with torch.device("meta"):
        copied = ImageBind(model.config)
    state = {name: tensor.detach().to(dtype, copy=True) for name, tensor in model.state_dict().items()}
    copied.load_state_dict(state, assign=True)
    return copied.eval()


def cast_upstream(model: nn.Module) -> nn.Module:
    """A copy in bf16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def peer_vision(dtype: torch.dtype) -> Embed:
    """transformers' CLIP vision encoder at ViT-H/14's size, random weights, PyTorch's fused attention."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = CONFIG.vision
    config = CLIPVisionConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        patch_size=CONFIG.patch,
        image_size=IMAGE_SIDE,
        hidden_act="gelu",
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):  # left empty with all else
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return lambda frames: model(pixel_values=frames.to(dtype)).pooler_output


def upstream_embed(model: nn.Module, modality: str, dtype: torch.dtype) -> Embed:
    """Upstream's forward for "vision" or "audio"; a cast model is given cast inputs."""
    return lambda batch: model({modality: batch.to(dtype)})[modality]


def compiled(embed: nn.Module) -> Embed:
    """The tower through `torch.compile`, its weights frozen, so that their layout may change."""
    return torch.compile(embed, options={"freezing": True})
