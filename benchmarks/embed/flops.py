"""Floating-point operations of the towers' matrix products, from their sizes; each multiply-add counts twice.

A transformer block of width C over L tokens, of which Q go on, with K keys each:

    queries, keys, values   2 L C 3C          attention    2 Q K C (scores) + 2 Q K C (mixing)
    its output              2 Q C C           MLP          2 Q C 4C + 2 Q 4C C

Q = L in every block but the last, where Q = 1: the head reads the class token alone. That is what our towers
compute; `whole=True` counts Q = L in the last block, too, which is what others compute. Patches are a product
of (grid, pixels of a patch) by (pixels, C). Layer norms, GELUs, softmax and additions count nothing.
"""

import math

from r2scp.model.imagebind.towers import (
    AUDIO_GRID,
    AUDIO_PATCH,
    IMAGE_SIDE,
    MLP_RATIO,
    ImageBindConfig,
    TowerConfig,
)


def block_flops(width: int, tokens: int, going_on: int, keys: int) -> int:
    """Of one block, for one sequence."""
    projections = 2 * tokens * width * 3 * width + 2 * going_on * width * width
    attention = 4 * going_on * keys * width
    return projections + attention + 4 * going_on * width * MLP_RATIO * width


def vision_flops(config: ImageBindConfig, whole: bool = False) -> int:
    """Of one frame. The stem's two temporal slices are summed before: a patch has 3 x patch^2 inputs."""
    grid = (IMAGE_SIDE // config.patch) ** 2
    return _tower(config.vision, config.dim, grid, 3 * config.patch**2, extra_keys=0, whole=whole)


def audio_flops(config: ImageBindConfig, whole: bool = False) -> int:
    """Of one window of 2 s. Each attention has one learned key and value more."""
    return _tower(config.audio, config.dim, math.prod(AUDIO_GRID), AUDIO_PATCH**2, extra_keys=1, whole=whole)


def clip_flops(config: ImageBindConfig, seconds: int = 10) -> int:
    """Of one clip: a frame and a window for each second."""
    return seconds * (vision_flops(config) + audio_flops(config))


def _tower(sizes: TowerConfig, dim: int, grid: int, patch: int, *, extra_keys: int, whole: bool) -> int:
    tokens = grid + 1  # the class token
    keys = tokens + extra_keys
    blocks = (sizes.depth - 1) * block_flops(sizes.width, tokens, tokens, keys)
    last = block_flops(sizes.width, tokens, tokens if whole else 1, keys)
    return 2 * grid * patch * sizes.width + blocks + last + 2 * sizes.width * dim
