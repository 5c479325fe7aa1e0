"""Router and fusion: eqs. 11 and 12 of the paper."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from r2scp.model.batch import SOURCES, Tokens
from r2scp.model.experts import Sizes

Fusion = Literal["concat", "sum_pooled"]


class Router(nn.Module):
    """α of eq. 11: per source an MLP (D -> D -> 1) on its masked token mean, then softmax over sources."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes.dim, sizes.dim),
                nn.GELU(),
                nn.Dropout(sizes.dropout),
                nn.Linear(sizes.dim, 1),
            )
            for _ in SOURCES
        )

    def forward(self, sources: Sequence[Tokens], available_BS: Tensor) -> Tensor:
        """(B, S) float32; rows sum to 1, exactly 0 for sources that are not available."""
        scores = [gate(tokens.mean()) for gate, tokens in zip(self.gates, sources, strict=True)]
        return torch.cat(scores, dim=1).float().masked_fill(~available_BS, -math.inf).softmax(dim=1)


def uniform_weights(available_BS: Tensor) -> Tensor:
    """Equal weights for all available sources, (B, S) float32: those of stage I, which has no router."""
    return available_BS.float() / available_BS.sum(dim=1, keepdim=True)


def fuse(sources: Sequence[Tokens], weights_BS: Tensor, available_BS: Tensor, fusion: Fusion) -> Tokens:
    """Z_joint of eq. 12.

    `concat`: all weighted sequences one after another, since sequences of different lengths cannot be added.
    `sum_pooled`: one token, the weighted sum of the masked means, eq. 12 to the letter.
    """
    weighted = [
        (weights_BS[:, index, None, None].to(tokens.states_BLD.dtype), tokens)
        for index, tokens in enumerate(sources)
    ]
    if fusion == "sum_pooled":
        pooled_BD = torch.stack([weight[:, 0] * tokens.mean() for weight, tokens in weighted]).sum(dim=0)
        return Tokens(pooled_BD[:, None], torch.ones_like(available_BS[:, :1]))
    states_BLD = torch.cat([weight * tokens.states_BLD for weight, tokens in weighted], dim=1)
    masks = [tokens.mask_BL & available_BS[:, index, None] for index, tokens in enumerate(sources)]
    return Tokens(states_BLD, torch.cat(masks, dim=1))
