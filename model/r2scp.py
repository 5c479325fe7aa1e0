"""R²ScP: retrieve what is missing, purify it, weigh it, answer (section 3 of the paper).

Encoding (Φ, experts, neighbours) and answering (purification, router, heads) are two steps, `encode` and
`answer`: stage II trains only the second, answers each batch three times from one encoding, and an encoding
of frozen experts may come from a cache.
"""

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2scp.model.batch import (
    AUDIO,
    TEXT,
    VISUAL,
    Answer,
    Batch,
    Evidence,
    Neighbours,
    Purification,
    Question,
    Tokens,
    without,
)
from r2scp.model.decoder import Heads
from r2scp.model.experts import Experts, Positions, Sizes
from r2scp.model.mix import Fusion, Router, even, fuse
from r2scp.model.purify import CapGradient, Pairing, Purifier, PurifyConfig, Saliency

MODALITIES = (AUDIO, VISUAL)


class Stage(StrEnum):
    """What a model trains, and what it may use: stage I has neither router nor purification yet."""

    EXPERTS = "experts"  # I: Φ, experts, heads
    MIXING = "mixing"  # II: CAP, router, heads; experts too if they are not frozen


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Every setting of the model. Raises ValueError for one that cannot be."""

    encoder_dim: int = 1024  # C, of imagebind-huge
    classes: int | None = 42  # answers of MUSIC-AVQA's train split; None: score the choices of the question
    dim: int = 768  # D
    layers: int = 1  # of each expert
    heads: int = 8
    ffn: int | None = None  # inner width of feed-forward blocks; None: dim
    dropout: float = 0.1
    positions: Positions = "sinusoidal"
    cmr: bool = True  # cross-modal retrieval
    cap: bool = True  # purification
    neighbours: int = 3  # n, of those that the batch holds
    k: int = 5  # tokens purged at most
    cap_gradient: CapGradient = "straight_through"
    saliency: Saliency = "received"
    pairing: Pairing = "rank"
    purify_full: bool = False  # purify even when both modalities are present
    fusion: Fusion = "concat"
    freeze_experts: bool = True  # in stage II

    def __post_init__(self) -> None:
        sizes = (self.encoder_dim, self.dim, self.layers, self.heads, self.neighbours, self.sizes.ffn)
        if min(sizes) < 1 or self.k < 0 or (self.classes is not None and self.classes < 2):
            raise ValueError(f"sizes must be positive, k at least 0 and classes at least 2; got {self}")
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"dim must be even and a multiple of heads; got {self.dim} and {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        for field in fields(self):
            allowed, value = get_args(field.type), getattr(self, field.name)
            if allowed and all(isinstance(option, str) for option in allowed) and value not in allowed:
                raise ValueError(f"{field.name} must be one of {', '.join(allowed)}; got {value!r}")

    @property
    def sizes(self) -> Sizes:
        """The part that every module needs."""
        return Sizes(
            encoder_dim=self.encoder_dim,
            dim=self.dim,
            heads=self.heads,
            ffn=self.dim if self.ffn is None else self.ffn,
            dropout=self.dropout,
        )

    @property
    def recovers(self) -> bool:
        """Whether a missing modality is recovered at all; if not, it is dropped."""
        return self.cmr or self.cap


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A batch after the experts: all that `R2SCP.answer` reads. Rows may be stacked from a cache.

    `common[m]` is H_com = E_m(Φ_u(F_u)) for a missing modality m, with the mask of u; None if not needed.
    `retrieved` and `farthest` are H_miss of eq. 4 for each row's missing modality.
    """

    audio: Tokens
    visual: Tokens
    words: Tokens
    question: Question
    present_BM: Tensor
    common: tuple[Tokens | None, Tokens | None] = (None, None)
    retrieved: Tokens | None = None
    retrieved_ids_BN: Tensor | None = None
    farthest: Tokens | None = None
    farthest_ids_BN: Tensor | None = None

    def lacking(self, modality: int, rows_B: Tensor | None = None) -> "Encoded":
        """The same with `modality` absent, in all rows or where rows_B is True."""
        return replace(self, present_BM=without(self.present_BM, modality, rows_B))

    def with_farthest(self) -> "Encoded":
        """The same with the farthest clips in place of the nearest: R⁻ of eq. 14."""
        if self.farthest is None:
            raise ValueError("R⁻ needs the farthest neighbours; this batch was encoded without them")
        return replace(self, retrieved=self.farthest, retrieved_ids_BN=self.farthest_ids_BN)


class R2SCP(nn.Module):
    """The whole model. A new one is in stage I; `enter` moves it on and says what trains."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = Experts(config.sizes, config.layers, config.positions)
        self.purifier = Purifier(
            config.sizes,
            PurifyConfig(
                k=config.k,
                cap_gradient=config.cap_gradient,
                saliency=config.saliency,
                pairing=config.pairing,
            ),
        )
        self.router = Router(config.sizes)
        self.decoders = Heads(config.sizes, config.classes)
        self.stage = Stage.EXPERTS
        self.enter(Stage.EXPERTS)

    def enter(self, stage: Stage) -> "R2SCP":
        """Move to `stage`: afterwards exactly the parameters that it trains require a gradient."""
        self.stage = Stage(stage)
        mixing = self.stage is Stage.MIXING
        self.experts.requires_grad_(not self.experts_frozen)
        self.decoders.requires_grad_(True)
        self.router.requires_grad_(mixing)
        self.purifier.requires_grad_(mixing and self.config.cap)
        if not self.purifier.learns_projection:
            self.purifier.projection_DD.requires_grad_(False)
        return self.train(self.training)

    @property
    def experts_frozen(self) -> bool:
        """Whether Φ and experts neither learn nor drop out."""
        return self.stage is Stage.MIXING and self.config.freeze_experts

    @property
    def purifies(self) -> bool:
        """Whether CAP is at work: not before stage II, where it is trained."""
        return self.config.cap and self.stage is Stage.MIXING

    def train(self, mode: bool = True) -> "R2SCP":
        """As of any module, but frozen experts stay in evaluation mode."""
        super().train(mode)
        if self.experts_frozen:
            self.experts.eval()
        return self

    def forward(self, batch: Batch) -> Answer:
        """Logits and evidence. A modality that is absent is recovered as the config says, or dropped."""
        return self.answer(self.encode(batch))

    def encode(self, batch: Batch, missing: int | None = None) -> Encoded:
        """Run Φ and the experts; no gradient is kept where they are frozen.

        `missing` asks that the rows' neighbours be encoded as that modality although it is present: stage II
        answers with it (X) and without it (R⁺, R⁻).
        """
        with torch.no_grad() if self.experts_frozen else nullcontext():
            audio, visual = (self._present(batch, column, column) for column in MODALITIES)
            words = self.experts(batch.words_BWC, batch.words_mask_BW, TEXT, TEXT)
            common = tuple(
                self._present(batch, 1 - column, column)
                if self._needs_common(batch, column, missing)
                else None
                for column in MODALITIES
            )
            retrieved = self._neighbours(batch, batch.retrieved, missing)
            farthest = self._neighbours(batch, batch.farthest, missing)
        ids, far_ids = (
            None if part is None else part.ids_BN[:, : self.config.neighbours]
            for part in (batch.retrieved, batch.farthest)
        )
        return Encoded(
            audio=audio,
            visual=visual,
            words=words,
            question=batch.question,
            present_BM=batch.present_BM,
            common=(common[AUDIO], common[VISUAL]),
            retrieved=retrieved,
            retrieved_ids_BN=ids,
            farthest=farthest,
            farthest_ids_BN=far_ids,
        )

    def answer(self, encoded: Encoded) -> Answer:
        """Recover, purify, weigh and decode what `encode` gave."""
        own = (encoded.audio, encoded.visual)
        found = [self._complete(encoded, column) for column in MODALITIES]
        recovered_BM = torch.stack([part.recovered_B for part in found], dim=1)
        fallback_BM = torch.stack([part.fallback_B for part in found], dim=1)
        there_BM = encoded.present_BM | recovered_BM
        if self.config.purify_full and self.purifies:
            found = [
                self._purify_present(encoded, column, part, own)
                for column, part in zip(MODALITIES, found, strict=True)
            ]
        sources = (found[AUDIO].tokens, found[VISUAL].tokens, encoded.words)
        there_BS = F.pad(there_BM, (0, 1), value=True)
        router_BS = self.router(sources, there_BS) if self.stage is Stage.MIXING else even(there_BS)
        joint = fuse(sources, router_BS, there_BS, self.config.fusion)
        logits = self.decoders(joint, sources[AUDIO], sources[VISUAL], there_BM, encoded.question)
        evidence = Evidence(
            router_BS=router_BS,
            there_BM=there_BM,
            recovered_BM=recovered_BM,
            fallback_BM=fallback_BM,
            neighbours_BN=self._used(encoded, (recovered_BM & ~fallback_BM).any(dim=1)),
            purified=(found[AUDIO].purification, found[VISUAL].purification),
        )
        return Answer(*logits, evidence)

    def _present(self, batch: Batch, source: int, expert: int) -> Tokens:
        """E_expert(Φ_source(F_source)), with no token in the rows where the source is absent."""
        features_BLC, mask_BL = batch.sequence(("audio", "visual")[source])
        mask_BL = mask_BL & batch.present_BM[:, source, None]
        if not bool(mask_BL.any()):  # nothing to encode: one empty place stands for all
            features_BLC, mask_BL = features_BLC[:, :1], mask_BL[:, :1]
            if features_BLC.shape[1] == 0:
                features_BLC, mask_BL = F.pad(features_BLC, (0, 0, 0, 1)), F.pad(mask_BL, (0, 1))
        return self.experts(features_BLC, mask_BL, source, expert)

    def _sought(self, batch: Batch, column: int, missing: int | None) -> Tensor:
        """Rows that need, or are asked for, the recovery of a modality, (B,) bool."""
        absent_B = ~batch.present_BM[:, column]
        if missing is not None:
            absent_B = torch.full_like(absent_B, missing == column)
        return absent_B & batch.present_BM[:, 1 - column]

    def _needs_common(self, batch: Batch, column: int, missing: int | None) -> bool:
        if not self.config.recovers:
            return False
        rows_B = self._sought(batch, column, missing)
        if self.config.cmr and not self.purifies and batch.retrieved is not None:
            # only a row without any neighbour, among the nearest or the farthest, falls back
            for part in (batch.retrieved, batch.farthest):
                if part is not None and bool((rows_B & ~self._hit(part)).any()):
                    return True
            return False
        if self.config.purify_full and self.purifies:
            rows_B = rows_B | batch.present_BM.all(dim=1)
        return bool(rows_B.any())

    def _hit(self, part: Neighbours) -> Tensor:
        return part.mask_BNL[:, : self.config.neighbours].flatten(1).any(dim=1)

    def _neighbours(self, batch: Batch, part: Neighbours | None, missing: int | None) -> Tokens | None:
        """H_miss of eq. 4 for each row's missing modality; no token where nothing is sought."""
        if part is None or not self.config.cmr:
            return None
        tokens_BNLC = part.tokens_BNLC[:, : self.config.neighbours]
        mask_BNL = part.mask_BNL[:, : self.config.neighbours]
        rows, _, length = mask_BNL.shape
        states_BLD: Tensor | None = None
        mask_BL = mask_BNL.new_zeros(rows, length)
        for column in MODALITIES:
            sought_B = self._sought(batch, column, missing)
            if bool(sought_B.all()):
                return self.experts.nearby(tokens_BNLC, mask_BNL, column)
            if bool(sought_B.any()):
                near = self.experts.nearby(tokens_BNLC[sought_B], mask_BNL[sought_B], column)
                if states_BLD is None:
                    states_BLD = near.states_BLD.new_zeros(rows, length, near.states_BLD.shape[-1])
                states_BLD = states_BLD.index_put((sought_B,), near.states_BLD)
                mask_BL = mask_BL.index_put((sought_B,), near.mask_BL)
        return None if states_BLD is None else Tokens(states_BLD, mask_BL)

    def _complete(self, encoded: Encoded, column: int) -> "_Found":
        """A modality as it is where present, recovered where absent and the other one present."""
        own = (encoded.audio, encoded.visual)
        tokens = _only(own[column], encoded.present_BM[:, column])
        rows_B = ~encoded.present_BM[:, column] & encoded.present_BM[:, 1 - column]
        nowhere_B = torch.zeros_like(rows_B)
        if not self.config.recovers or not bool(rows_B.any()):
            return _Found(tokens, nowhere_B, nowhere_B, None)
        missing, fallback_B = self._recover(encoded, column, rows_B)
        purification = None
        if self.purifies:
            available = _only(own[1 - column], encoded.present_BM[:, 1 - column])
            common = encoded.common[column]
            assert common is not None
            missing, purification = self.purifier(missing, available, common, encoded.words)
            purification = _only_rows(purification, rows_B)
        return _Found(_where(rows_B, missing, tokens), rows_B, fallback_B, purification)

    def _recover(self, encoded: Encoded, column: int, rows_B: Tensor) -> tuple[Tokens, Tensor]:
        """H_miss before purification, and the rows that found no neighbour although they should."""
        common = encoded.common[column]
        if not self.config.cmr:
            assert common is not None
            return common, torch.zeros_like(rows_B)
        if encoded.retrieved is None:
            raise ValueError("retrieval is on and a modality is missing: the batch must hold neighbours")
        fallback_B = rows_B & ~encoded.retrieved.mask_BL.any(dim=1)
        if common is None:
            return encoded.retrieved, fallback_B
        return _where(fallback_B, common, encoded.retrieved), fallback_B

    def _purify_present(
        self, encoded: Encoded, column: int, found: "_Found", own: tuple[Tokens, Tokens]
    ) -> "_Found":
        """The release's habit: with both modalities present, purify each by the other."""
        rows_B, common = encoded.present_BM.all(dim=1), encoded.common[column]
        if common is None or not bool(rows_B.any()):
            return found
        tokens, purification = self.purifier(own[column], own[1 - column], common, encoded.words)
        purification = _only_rows(purification, rows_B)
        if found.purification is not None:
            purification = _merge(rows_B, purification, found.purification)
        return replace(found, tokens=_where(rows_B, tokens, found.tokens), purification=purification)

    def _used(self, encoded: Encoded, rows_B: Tensor) -> Tensor | None:
        ids_BN = encoded.retrieved_ids_BN
        return None if ids_BN is None or not self.config.cmr else ids_BN.masked_fill(~rows_B[:, None], -1)


@dataclass(frozen=True, slots=True)
class _Found:
    tokens: Tokens
    recovered_B: Tensor
    fallback_B: Tensor
    purification: Purification | None


def _only(tokens: Tokens, rows_B: Tensor) -> Tokens:
    """No token, and zeros, where rows_B is False."""
    mask_BL = tokens.mask_BL & rows_B[:, None]
    return Tokens(tokens.states_BLD.masked_fill(~mask_BL[..., None], 0), mask_BL)


def _where(rows_B: Tensor, yes: Tokens, no: Tokens) -> Tokens:
    """Row by row one or the other, padded to the longer one's length unless one is not needed."""
    if bool(rows_B.all()):
        return yes
    if not bool(rows_B.any()):
        return no
    length = max(yes.mask_BL.shape[1], no.mask_BL.shape[1])
    states = [F.pad(part.states_BLD, (0, 0, 0, length - part.mask_BL.shape[1])) for part in (yes, no)]
    masks = [F.pad(part.mask_BL, (0, length - part.mask_BL.shape[1])) for part in (yes, no)]
    states[1] = states[1].to(states[0].dtype)
    return Tokens(torch.where(rows_B[:, None, None], *states), torch.where(rows_B[:, None], *masks))


def _only_rows(purification: Purification, rows_B: Tensor) -> Purification:
    other_B1 = ~rows_B[:, None]
    return Purification(
        purification.dissonance_BL.masked_fill(other_B1, torch.nan),
        purification.noise_BL & rows_B[:, None],
        purification.source_BL.masked_fill(other_B1, -1),
        purification.saliency_BU.masked_fill(other_B1, torch.nan),
    )


def _merge(rows_B: Tensor, yes: Purification, no: Purification) -> Purification:
    merged = []
    for one, other, blank in zip(yes, no, (torch.nan, False, -1, torch.nan), strict=True):
        length = max(one.shape[1], other.shape[1])
        parts = [F.pad(part, (0, length - part.shape[1]), value=blank) for part in (one, other)]
        merged.append(torch.where(rows_B[:, None], *parts))
    return Purification(*merged)
