"""Context-aware adaptive purification (CAP): eqs. 2-9 and Algorithm 1 of the paper.

Tokens of the recovered modality that disagree with the available one are replaced with guided tokens: those
of the features common to both modalities that are most salient to the question.

Departures from the paper, and the setting that reverts each:

- A hard choice of k tokens leaves W_proj without gradient. Here the noise mask, which selects the k tokens,
  is straight-through: the gradient of the mask is that of the dissonance δ; `cap_gradient="none"` is the
  paper.
- The paper sums attention over keys. A softmax row sums to 1, so all tokens tie. Here a token's saliency is
  the attention that it *receives*; `saliency="literal"` is the paper.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2scp.model.batch import Purification, Tokens
from r2scp.model.experts import Attention, FeedForward, Sizes

CapGradient = Literal["straight_through", "none"]
Saliency = Literal["received", "output_norm", "literal", "random"]
Pairing = Literal["rank", "position"]

RANDOM_PERIOD = 4096  # tokens; the fixed random scores repeat in longer sequences
LITERAL_DECIMALS = 4  # a softmax row sums to 1 up to rounding errors, which must not break ties


@dataclass(frozen=True, kw_only=True, slots=True)
class PurifyConfig:
    """`k`: most tokens to replace per row. `pairing`: `rank`, the j-th noisiest token gets the j-th most
    salient one; `position`, the same two sets are paired in temporal order."""

    k: int
    cap_gradient: CapGradient
    saliency: Saliency
    pairing: Pairing


class Guided(NamedTuple):
    """H_guided of eq. 6 and σ of each of its tokens; σ carries no gradient."""

    tokens: Tokens
    saliency_BU: Tensor


class Purified(NamedTuple):
    """H_miss after eq. 9, and which tokens were replaced."""

    tokens: Tokens
    purification: Purification


class GuidanceBlock(nn.Module):
    """Eq. 6: self-attention over the common features and cross-attention to the question's words, in
    parallel; then residual, norm, feed-forward, residual, norm."""

    def __init__(self, sizes: Sizes, saliency: Saliency) -> None:
        super().__init__()
        self.saliency: Saliency = saliency
        self.self_attention = Attention(sizes)
        self.cross_attention = Attention(sizes)
        self.dropout = nn.Dropout(sizes.dropout)
        self.norm_attention = nn.LayerNorm(sizes.dim)
        self.feed_forward = FeedForward(sizes)
        self.norm_feed_forward = nn.LayerNorm(sizes.dim)

    def forward(self, common: Tokens, words: Tokens) -> Guided:
        within = self.self_attention.with_weights(common.states_BLD, common)
        across = self.cross_attention.with_weights(common.states_BLD, words)
        update_BUD = within.out_BQD + across.out_BQD
        states_BUD = self.norm_attention(common.states_BLD + self.dropout(update_BUD))
        states_BUD = self.norm_feed_forward(states_BUD + self.feed_forward(states_BUD))
        with torch.no_grad():
            if self.saliency == "received":
                score_BU = received_attention(
                    within.logits_BHQL, across.logits_BHQL, common.mask_BL, words.mask_BL
                )
            elif self.saliency == "output_norm":
                score_BU = update_BUD.float().norm(dim=-1)
            elif self.saliency == "literal":
                score_BU = literal_saliency(within.weights_BHQL, across.weights_BHQL)
            else:
                score_BU = random_saliency(common.mask_BL, fresh=self.training)
        return Guided(Tokens(states_BUD, common.mask_BL), score_BU)


class Purifier(nn.Module):
    """CAP, one for both directions: the paper's W_proj and guidance block carry no index of modality."""

    def __init__(self, sizes: Sizes, config: PurifyConfig) -> None:
        super().__init__()
        self.config = config
        self.projection_DD = nn.Parameter(torch.eye(sizes.dim))  # W_proj
        self.projection_DD.requires_grad_(self.learns_projection)
        self.guidance = GuidanceBlock(sizes, config.saliency)

    @property
    def learns_projection(self) -> bool:
        """Whether W_proj gets a gradient; if not, the optimiser must not get it."""
        return self.config.cap_gradient == "straight_through"

    def forward(self, missing: Tokens, available: Tokens, common: Tokens, words: Tokens) -> Purified:
        """Purify `missing` (H_miss) by `available` (H_u), `common` (H_com) and `words` (H_t).

        `common` has the mask of `available`. Nothing is changed in place.
        """
        dissonance_BL = dissonance(missing.states_BLD, self.projection_DD, available.mean())
        guided = self.guidance(common, words)
        noise_BL, source_BL = self._select(dissonance_BL, missing.mask_BL, guided)
        gate_BL = noise_BL.float()
        if self.learns_projection:
            # straight-through: the added term is exactly zero and has the gradient of δ
            gate_BL = gate_BL + (dissonance_BL - dissonance_BL.detach()) * missing.mask_BL
        states_BLD = inject(missing.states_BLD, guided.tokens.states_BLD, gate_BL, source_BL)
        purification = Purification(
            dissonance_BL.detach().masked_fill(~missing.mask_BL, math.nan),
            noise_BL,
            source_BL.masked_fill(~noise_BL, -1),
            guided.saliency_BU.masked_fill(~common.mask_BL, math.nan),
        )
        return Purified(Tokens(states_BLD, missing.mask_BL), purification)

    @torch.no_grad()
    def _select(self, dissonance_BL: Tensor, mask_BL: Tensor, guided: Guided) -> tuple[Tensor, Tensor]:
        """Mask of the k most dissonant tokens (Ω_noise), and for each token the guided one to replace it."""
        mask_BU = guided.tokens.mask_BL
        budget_B1 = torch.minimum(mask_BL.sum(1), mask_BU.sum(1)).clamp(max=self.config.k)[:, None]
        noisiest_BL = _descending(dissonance_BL, mask_BL)
        salient_BU = _descending(guided.saliency_BU, mask_BU)
        rank_BL = torch.arange(mask_BL.shape[1], device=mask_BL.device).expand_as(noisiest_BL)
        noise_BL = torch.zeros_like(mask_BL).scatter(1, noisiest_BL, rank_BL < budget_B1)
        # Tokens beyond the budget get a partner too, the salient token of their rank: it is not used, but the
        # gradient of the mask needs to know what a replacement would have changed.
        last_B1 = (mask_BU.sum(1, keepdim=True) - 1).clamp(min=0)
        partner_BL = salient_BU.gather(1, torch.minimum(rank_BL, last_B1))
        source_BL = torch.zeros_like(noisiest_BL).scatter(1, noisiest_BL, partner_BL)
        if self.config.pairing == "position":
            rank_BU = torch.arange(mask_BU.shape[1], device=mask_BU.device).expand_as(salient_BU)
            chosen_BU = torch.zeros_like(mask_BU).scatter(1, salient_BU, rank_BU < budget_B1)
            in_order_BU = _descending(chosen_BU.float(), mask_BU)
            nth_BL = (noise_BL.cumsum(1) - 1).clamp(min=0)
            source_BL = torch.where(noise_BL, in_order_BU.gather(1, nth_BL), source_BL)
        return noise_BL, source_BL


def dissonance(missing_BLD: Tensor, projection_DD: Tensor, anchor_BD: Tensor) -> Tensor:
    """δ of eq. 3, (B, L) float32 in [0, 2]: 1 - cos(H_miss·W_proj, g_u). A zero vector gives 1."""
    projected_BLD = (missing_BLD @ projection_DD.to(missing_BLD.dtype)).float()
    unit_BD = F.normalize(anchor_BD.float(), dim=-1)
    return 1 - (F.normalize(projected_BLD, dim=-1) @ unit_BD[..., None]).squeeze(-1)


def inject(missing_BLD: Tensor, guided_BUD: Tensor, noise_BL: Tensor, source_BL: Tensor) -> Tensor:
    """Eq. 9: (1 - M) ⊙ H_miss + M ⊙ Gather(H_guided, Ω_salient)."""
    index_BLD = source_BL[..., None].expand(-1, -1, guided_BUD.shape[-1])
    gathered_BLD = guided_BUD.gather(1, index_BLD).to(missing_BLD.dtype)
    noise_BL1 = noise_BL[..., None].to(missing_BLD.dtype)
    return (1 - noise_BL1) * missing_BLD + noise_BL1 * gathered_BLD


def received_attention(
    self_logits_BHUU: Tensor, cross_logits_BHUW: Tensor, mask_BU: Tensor, mask_BW: Tensor
) -> Tensor:
    """Attention that each token receives from all tokens, plus that from all words, (B, U).

    The first term is the mean over heads of the column sums of self-attention. Cross-attention goes from
    tokens to words; for the second term its logits are read from words to tokens, with a softmax over the
    tokens for each word. Each term has mean 1 over the real tokens of a row; padding has no part in either.
    """
    weights_BHUU = self_logits_BHUU.softmax(dim=-1)
    within_BU = (weights_BHUU * mask_BU[:, None, :, None]).sum(dim=2).mean(dim=1)
    logits_BHWU = cross_logits_BHUW.transpose(-1, -2).masked_fill(~mask_BW[:, None, :, None], 0)
    empty_B1 = ~mask_BU.any(dim=1, keepdim=True)
    logits_BHWU = logits_BHWU.masked_fill(~(mask_BU | empty_B1)[:, None, None, :], -math.inf)
    across_BU = (logits_BHWU.softmax(dim=-1) * mask_BW[:, None, :, None]).sum(dim=2).mean(dim=1)
    return _with_mean_one(within_BU, mask_BU) + _with_mean_one(across_BU, mask_BU)


def literal_saliency(self_weights_BHUU: Tensor, cross_weights_BHUW: Tensor) -> Tensor:
    """The paper's saliency, (B, U): attention summed over keys, mean over heads. Without dropout it is 2 for
    every token, and the first tokens win; with dropout it is noise."""
    score_BU = self_weights_BHUU.sum(dim=-1).mean(dim=1) + cross_weights_BHUW.sum(dim=-1).mean(dim=1)
    return score_BU.round(decimals=LITERAL_DECIMALS)


def random_saliency(mask_BU: Tensor, *, fresh: bool) -> Tensor:
    """Random saliency, (B, U) in [0, 1): drawn again if `fresh`, else fixed per second of the clip."""
    rows, length = mask_BU.shape
    if fresh:
        return torch.rand(rows, length, device=mask_BU.device)
    scores = torch.rand(RANDOM_PERIOD, generator=torch.Generator().manual_seed(0))
    return scores[torch.arange(length) % RANDOM_PERIOD].to(mask_BU.device).expand(rows, -1)


def _with_mean_one(score_BU: Tensor, mask_BU: Tensor) -> Tensor:
    score_BU = score_BU * mask_BU
    return score_BU * mask_BU.sum(1, keepdim=True) / score_BU.sum(1, keepdim=True).clamp(min=1e-12)


def _descending(score: Tensor, mask: Tensor) -> Tensor:
    """Indices from high to low, padding last, ties in temporal order."""
    return score.masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
