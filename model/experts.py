"""Φ and the three experts: encoder features in, hidden states out (eqs. 4 and 10 of the paper).

`Attention` and `Layer` also serve purification and decoder. Keys have no bias: it would shift all logits of a
row alike, which softmax cancels, and so never learn anything.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2scp.model.batch import SOURCES, Tokens

Positions = Literal["sinusoidal", "none"]
WAVELENGTH = 10_000.0  # tokens; the longest wavelength of the sinusoids is 2π times this


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes that all parts of the model share. `dim` is even and a multiple of `heads`."""

    encoder_dim: int  # C
    dim: int  # D
    heads: int
    ffn: int  # inner width of a feed-forward block
    dropout: float  # probability


class AttentionDetails(NamedTuple):
    """Output of an attention, its weights after dropout and its logits (-inf under padding)."""

    out_BQD: Tensor
    weights_BHQL: Tensor
    logits_BHQL: Tensor


class Attention(nn.Module):
    """Multi-head attention of queries over a masked source; a row without source tokens attends to zeros."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.dropout = sizes.heads, sizes.dropout
        self.query = nn.Linear(sizes.dim, sizes.dim)
        self.key = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.value = nn.Linear(sizes.dim, sizes.dim)
        self.out = nn.Linear(sizes.dim, sizes.dim)

    def forward(self, query_BQD: Tensor, source: Tokens) -> Tensor:
        """(B, Q, D), by the fused kernel."""
        query, key, value = self._split(query_BQD, source.states_BLD)
        mixed_BHQE = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_without_empty_rows(source.mask_BL)[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(mixed_BHQE.transpose(1, 2).flatten(2))

    def with_weights(self, query_BQD: Tensor, source: Tokens) -> AttentionDetails:
        """The output with weights and logits, which are computed in float32."""
        query, key, value = self._split(query_BQD, source.states_BLD)
        logits = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
        logits = logits.masked_fill(~_without_empty_rows(source.mask_BL)[:, None, None, :], -math.inf)
        weights = F.dropout(logits.softmax(dim=-1), self.dropout, self.training)
        mixed_BHQE = weights.to(value.dtype) @ value
        return AttentionDetails(self.out(mixed_BHQE.transpose(1, 2).flatten(2)), weights, logits)

    def _split(self, query_BQD: Tensor, source_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = (self.query(query_BQD), self.key(source_BLD), self.value(source_BLD))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value


class FeedForward(nn.Sequential):
    """D -> ffn -> D with one nonlinearity."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(
            nn.Linear(sizes.dim, sizes.ffn),
            nn.GELU(),
            nn.Dropout(sizes.dropout),
            nn.Linear(sizes.ffn, sizes.dim),
            nn.Dropout(sizes.dropout),
        )


class Layer(nn.Module):
    """Attention of a query over a source and feed-forward, each followed by residual and layer norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.norm_attention = nn.LayerNorm(sizes.dim)
        self.feed_forward = FeedForward(sizes)
        self.norm_feed_forward = nn.LayerNorm(sizes.dim)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, query_BQD: Tensor, source: Tokens) -> Tensor:
        query_BQD = self.norm_attention(query_BQD + self.dropout(self.attention(query_BQD, source)))
        return self.norm_feed_forward(query_BQD + self.feed_forward(query_BQD))


class Expert(nn.Module):
    """E_m: positions, then `layers` layers of self-attention; zeros under padding."""

    def __init__(self, sizes: Sizes, layers: int, positions: Positions) -> None:
        super().__init__()
        self.positions: Positions = positions
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(layers))

    def forward(self, tokens: Tokens) -> Tokens:
        states_BLD, mask_BL = tokens
        if self.positions == "sinusoidal":
            positions_LD = sinusoids(states_BLD.shape[1], states_BLD.shape[2], states_BLD.device)
            states_BLD = states_BLD + positions_LD.to(states_BLD.dtype)
        for layer in self.layers:
            states_BLD = layer(states_BLD, Tokens(states_BLD, mask_BL))
        return Tokens(states_BLD.masked_fill(~mask_BL[..., None], 0), mask_BL)


class Projection(nn.Module):
    """Φ_m: one linear from C to D, then dropout.

    Encoder features have unit norm, so an entry is about 1/√C; they are first scaled by √C to the magnitude
    of the sinusoids. Unscaled, the position of a token would drown its content.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.scale = math.sqrt(sizes.encoder_dim)
        self.linear = nn.Linear(sizes.encoder_dim, sizes.dim)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, features_BLC: Tensor, mask_BL: Tensor) -> Tokens:
        clean_BLC = features_BLC.masked_fill(~mask_BL[..., None], 0).to(self.linear.weight.dtype)
        return Tokens(self.dropout(self.linear(clean_BLC * self.scale)), mask_BL)


class Experts(nn.Module):
    """Φ and E of audio, visual and text: trained in stage I, frozen in stage II."""

    def __init__(self, sizes: Sizes, layers: int, positions: Positions) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Projection(sizes) for _ in SOURCES)
        self.experts = nn.ModuleList(Expert(sizes, layers, positions) for _ in SOURCES)

    def forward(self, features_BLC: Tensor, mask_BL: Tensor, source: int, expert: int) -> Tokens:
        """E_expert(Φ_source(features)), masked. `expert` differs from `source` for common features."""
        return self.experts[expert](self.projections[source](features_BLC, mask_BL))

    def encode_neighbours(self, tokens_BNLC: Tensor, mask_BNL: Tensor, source: int) -> Tokens:
        """H_miss of eq. 4: per second, the mean over the neighbours that have it of E(Φ(neighbour))."""
        states_BLD = self(tokens_BNLC.flatten(0, 1), mask_BNL.flatten(0, 1), source, source).states_BLD
        count_BL1 = mask_BNL.sum(dim=1).clamp(min=1)[..., None]
        return Tokens(states_BLD.unflatten(0, mask_BNL.shape[:2]).sum(dim=1) / count_BL1, mask_BNL.any(dim=1))


def sinusoids(length: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """(length, dim) float32: sin(t·ω) in the even columns, cos(t·ω) in the odd, ω = 10000^(-column/dim)."""
    times_L1 = torch.arange(length, dtype=torch.float32, device=device)[:, None]
    even = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    angles = times_L1 * torch.exp(-math.log(WAVELENGTH) / dim * even)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _without_empty_rows(mask_BL: Tensor) -> Tensor:
    """A row without tokens attends to all its (zeroed) padding: softmax over nothing is NaN."""
    return mask_BL | ~mask_BL.any(dim=1, keepdim=True)
