"""The vision, audio and text towers of ImageBind, on scaled-dot-product attention.

A tower is: patches or tokens -> + class token, + positions -> pre-norm transformer blocks -> layer norm and
a linear head on one token (the class token; for text the end token) -> unit norm. Each tower's `forward`
takes a batch in any floating dtype, computes in the dtype of its own parameters and returns float32.
Gradients are kept unless the caller enters `torch.inference_mode()`.

Legend of shapes: B batch, L tokens of a sequence, W words (text tokens), C width of a trunk, H heads, E width
of a head, D width of the shared embedding space.

Architecture: Girdhar et al., "ImageBind: One Embedding Space To Bind Them All", CVPR 2023; settings that the
paper leaves open come from the tensors of the published checkpoint.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2scp.model.imagebind.melspec import MEL_BINS, MEL_FRAMES
from r2scp.model.imagebind.packed_linear import linear, linear_add, linear_gelu

IMAGE_SIDE = 224  # pixels
FRAMES = 2  # a clip given to the vision tower is two frames; a still is repeated


AUDIO_PATCH = 16  # mel bins, mel frames
AUDIO_STRIDE = 10  # mel bins, mel frames: patches overlap
AUDIO_GRID = ((MEL_BINS - AUDIO_PATCH) // AUDIO_STRIDE + 1, (MEL_FRAMES - AUDIO_PATCH) // AUDIO_STRIDE + 1)
MLP_RATIO = 4
TRUNK_EPS = 1e-6  # of every layer norm but the audio stem's, which has PyTorch's 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """Sizes of one tower. `width` must be a multiple of `heads`."""

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                "a tower must have at least one block and a width that is a multiple of its heads; "
                f"got width {self.width}, heads {self.heads}, depth {self.depth}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBindConfig:
    """Sizes of a whole model. The defaults of the last four fields are the published checkpoint's."""

    vision: TowerConfig
    audio: TowerConfig
    text: TowerConfig
    dim: int = 1024  # of the shared embedding space
    patch: int = 14  # pixels; must divide 224
    vocabulary: int = 49408  # CLIP's byte-pair encoding; its highest id is the end token
    context: int = 77  # longest text in tokens, start and end included

    def __post_init__(self) -> None:
        if min(self.dim, self.patch, self.vocabulary, self.context) < 1 or IMAGE_SIDE % self.patch:
            raise ValueError(
                f"dim, vocabulary and context must be positive and patch must divide {IMAGE_SIDE}; got "
                f"dim {self.dim}, vocabulary {self.vocabulary}, context {self.context}, patch {self.patch}"
            )

    @classmethod
    def huge(cls) -> "ImageBindConfig":
        """The published checkpoint, imagebind_huge.pth: 1.1 billion parameters in these three towers."""
        return cls(
            vision=TowerConfig(width=1280, depth=32, heads=16),
            audio=TowerConfig(width=768, depth=12, heads=12),
            text=TowerConfig(width=1024, depth=24, heads=16),
        )


class TextOutput(NamedTuple):
    """What the text tower returns; both unit-norm over D, float32."""

    sentence_BD: Tensor
    words_BWD: Tensor  # the head applied to each position; padding positions carry no meaning


class SelfAttention(nn.Module):
    """Multi-head self-attention of the first Q tokens, added to `residual_BQC`.

    With `extra_token` there is one more key and value, learned, to which every query attends.
    """

    def __init__(self, config: TowerConfig, *, causal: bool = False, extra_token: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = config.heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)
        self.bias_k = nn.Parameter(torch.empty(1, 1, config.width)) if extra_token else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, config.width)) if extra_token else None

    def forward(self, x_BLC: Tensor, residual_BQC: Tensor) -> Tensor:
        query_BLC, key_BLC, value_BLC = linear(x_BLC, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_k is not None and self.bias_v is not None:
            key_BLC = torch.cat([key_BLC, self.bias_k.expand(len(x_BLC), -1, -1)], dim=1)
            value_BLC = torch.cat([value_BLC, self.bias_v.expand(len(x_BLC), -1, -1)], dim=1)
        query_BQC = query_BLC[:, : residual_BQC.shape[1]]
        mixed_BHQE = F.scaled_dot_product_attention(
            self._split(query_BQC), self._split(key_BLC), self._split(value_BLC), is_causal=self.causal
        )
        mixed_BQC = mixed_BHQE.transpose(1, 2).flatten(2)
        return linear_add(mixed_BQC, self.out_proj.weight, self.out_proj.bias, residual_BQC)

    def _split(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Two layers with a GELU between them, added to `residual_BLC`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_BLC: Tensor, residual_BLC: Tensor) -> Tensor:
        inner_BLC = linear_gelu(x_BLC, self.fc1.weight, self.fc1.bias)
        return linear_add(inner_BLC, self.fc2.weight, self.fc2.bias, residual_BLC)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm_1 x), then x + mlp(norm_2 x).

    With `queries` only that many first tokens are computed; they still attend to all tokens.
    """

    def __init__(self, config: TowerConfig, *, causal: bool = False, extra_token: bool = False) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, eps=TRUNK_EPS)
        self.attn = SelfAttention(config, causal=causal, extra_token=extra_token)
        self.norm_2 = nn.LayerNorm(config.width, eps=TRUNK_EPS)
        self.mlp = Mlp(config.width)

    def forward(self, x_BLC: Tensor, queries: int | None = None) -> Tensor:
        x_BQC = self.attn(self.norm_1(x_BLC), x_BLC[:, :queries])
        return self.mlp(self.norm_2(x_BQC), x_BQC)


class VisionTower(nn.Module):
    """Frames -> embeddings: (B, 3, 224, 224), as `normalise_frames` makes them, to (B, D), unit-norm.

    The published stem convolves over two frames. A still is shown twice, so its two temporal slices see the
    same pixels and are summed first: the same result for half the multiplications.
    """

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        width, self.patch = config.vision.width, config.patch
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (IMAGE_SIDE // config.patch) ** 2, width))
        self.stem = nn.Parameter(torch.empty(width, 3, FRAMES, config.patch, config.patch))
        self.trunk_norm = nn.LayerNorm(width, eps=TRUNK_EPS)
        self.blocks = nn.ModuleList(Block(config.vision) for _ in range(config.vision.depth))
        self.head_norm = nn.LayerNorm(width, eps=TRUNK_EPS)
        self.head = nn.Linear(width, config.dim, bias=False)

    def forward(self, frames_B3HW: Tensor) -> Tensor:
        check_shape(frames_B3HW, "frames", (None, 3, IMAGE_SIDE, IMAGE_SIDE))
        frames_B3HW = frames_B3HW.to(self.stem)
        patches_BLC = F.conv2d(frames_B3HW, self.stem.sum(2), stride=self.patch).flatten(2).transpose(1, 2)
        x_BLC = torch.cat([self.class_token.expand(len(patches_BLC), -1, -1), patches_BLC], dim=1)
        x_BLC = self.trunk_norm(x_BLC + self.positions)
        for block in self.blocks[:-1]:
            x_BLC = block(x_BLC)
        class_B1C = self.blocks[-1](x_BLC, queries=1)  # the head reads no other token
        return unit(self.head(self.head_norm(class_B1C[:, 0])))


class AudioTower(nn.Module):
    """Log-mels -> embeddings: (B, 1, 128, 204), as `log_mel` makes them, to (B, D), unit-norm."""

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        width = config.audio.width
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + math.prod(AUDIO_GRID), width))
        self.stem = nn.Parameter(torch.empty(width, 1, AUDIO_PATCH, AUDIO_PATCH))
        self.stem_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config.audio, extra_token=True) for _ in range(config.audio.depth))
        self.head_norm = nn.LayerNorm(width, eps=TRUNK_EPS)
        self.head = nn.Linear(width, config.dim, bias=False)

    def forward(self, melspec_B1MF: Tensor) -> Tensor:
        check_shape(melspec_B1MF, "melspec", (None, 1, MEL_BINS, MEL_FRAMES))
        melspec_B1MF = melspec_B1MF.to(self.stem)
        patches_BLC = F.conv2d(melspec_B1MF, self.stem, stride=AUDIO_STRIDE).flatten(2).transpose(1, 2)
        patches_BLC = self.stem_norm(patches_BLC)
        x_BLC = torch.cat([self.class_token.expand(len(patches_BLC), -1, -1), patches_BLC], dim=1)
        x_BLC = x_BLC + self.positions
        for block in self.blocks[:-1]:
            x_BLC = block(x_BLC)
        class_B1C = self.blocks[-1](x_BLC, queries=1)  # the head reads no other token
        return unit(self.head(self.head_norm(class_B1C[:, 0])))


class TextTower(nn.Module):
    """Token ids -> sentence and word embeddings: int64 (B, W), W at most the model's context.

    Attention is causal and the sentence is read off the end token (where the highest id of a row first
    stands), so ids may be cut after the longest text of the batch: cheaper, and the same result.
    """

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        width = config.text.width
        self.words = nn.Parameter(torch.empty(config.vocabulary, width))
        self.positions = nn.Parameter(torch.empty(1, config.context, width))
        self.blocks = nn.ModuleList(Block(config.text, causal=True) for _ in range(config.text.depth))
        self.head_norm = nn.LayerNorm(width, eps=TRUNK_EPS)
        self.head = nn.Linear(width, config.dim, bias=False)

    def forward(self, ids_BW: Tensor) -> TextOutput:
        context = self.positions.shape[1]
        if ids_BW.ndim != 2 or not 1 <= ids_BW.shape[1] <= context or ids_BW.is_floating_point():
            got = f"{ids_BW.dtype} {tuple(ids_BW.shape)}"
            raise ValueError(f"ids must be integers of shape (batch, 1 to {context} tokens); got {got}")
        ids_BW = ids_BW.to(self.words.device)
        x_BWC = F.embedding(ids_BW, self.words) + self.positions[:, : ids_BW.shape[1]]
        for block in self.blocks:
            x_BWC = block(x_BWC)
        words_BWD = unit(self.head(self.head_norm(x_BWC)))
        end_B = ids_BW.argmax(dim=1)
        return TextOutput(words_BWD[torch.arange(len(ids_BW), device=end_B.device), end_B], words_BWD)


def unit(x: Tensor) -> Tensor:
    """Scale the last axis to length 1, in float32."""
    return F.normalize(x.float(), dim=-1)


def check_shape(x: Tensor, name: str, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `x` is floating point and has `shape`, where None stands for any length."""
    fits = x.ndim == len(shape) and all(size in (None, got) for size, got in zip(shape, x.shape, strict=True))
    if not fits or not x.is_floating_point():
        sizes = ", ".join("batch" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be floating point of shape ({sizes}); got {x.dtype} {tuple(x.shape)}")
