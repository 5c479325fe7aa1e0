"""R²ScP: retrieve a missing modality, purify it, weigh the sources, answer (section 3 of the paper).

`encode` runs Φ, experts and neighbours; `answer` runs purification, router and heads. They are apart because
stage II trains only the second, answers each batch three times from one encoding, and may take the encoding
of frozen experts from a cache.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

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
    drop_modality,
    map_tensors,
    where_rows,
)
from r2scp.model.config import ModelConfig, Stage
from r2scp.model.decoder import Heads
from r2scp.model.experts import Experts
from r2scp.model.purification import Purifier
from r2scp.model.router import Router, fuse, uniform_weights

MODALITIES = (AUDIO, VISUAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A batch after the experts, the input of `R2SCP.answer`.

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
    target_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.present_BM)

    def drop(self, modality: int, rows_B: Tensor | None = None) -> "Encoded":
        """An encoding with `modality` absent, in all rows or where rows_B is True."""
        return replace(self, present_BM=drop_modality(self.present_BM, modality, rows_B))

    def with_farthest(self) -> "Encoded":
        """An encoding with the farthest clips in place of the nearest: R⁻ of eq. 14."""
        if self.farthest is None:
            raise ValueError("R⁻ needs the farthest neighbours; this batch was encoded without them")
        return replace(self, retrieved=self.farthest, retrieved_ids_BN=self.farthest_ids_BN)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Encoded":
        """The same encoding on another device."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Encoded":
        """The same encoding in page-locked memory, for an asynchronous `to(..., non_blocking=True)`."""
        return map_tensors(self, Tensor.pin_memory)


class R2SCP(nn.Module):
    """The whole model. A new one is in stage I; `set_stage` changes that and which parameters train."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = Experts(config.sizes, config.layers, config.positions)
        self.purifier = Purifier(config.sizes, config.purify)
        self.router = Router(config.sizes)
        self.decoders = Heads(config.sizes, config.classes)
        self.stage = Stage.EXPERTS
        self.set_stage(Stage.EXPERTS)

    def set_stage(self, stage: Stage) -> "R2SCP":
        """Switch to `stage`: exactly the parameters that it trains then require a gradient."""
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
        """Whether Φ and experts are frozen: without gradients and without dropout."""
        return self.stage is Stage.MIXING and self.config.freeze_experts

    @property
    def purifies(self) -> bool:
        """Whether CAP is active: not before stage II, which trains it."""
        return self.config.cap and self.stage is Stage.MIXING

    @property
    def recovers(self) -> bool:
        """Whether a missing modality is recovered: in stage I it is always dropped."""
        return self.config.recovers and self.stage is Stage.MIXING

    def train(self, mode: bool = True) -> "R2SCP":
        """Set training mode, except for frozen experts, which stay in evaluation mode."""
        super().train(mode)
        if self.experts_frozen:
            self.experts.eval()
        return self

    def forward(self, batch: Batch) -> Answer:
        """Logits and evidence. An absent modality is recovered or dropped, as configured."""
        return self.answer(self.encode(batch))

    def encode(self, batch: Batch, missing: int | None = None) -> Encoded:
        """Run Φ and the experts, without gradients if they are frozen.

        With `missing` the neighbours are encoded for that modality although it is present: stage II answers
        with it (X) and without it (R⁺, R⁻).
        """
        with torch.no_grad() if self.experts_frozen else nullcontext():
            audio, visual = (self._encode_present(batch, column, column) for column in MODALITIES)
            words = self.experts(batch.words_BWC, batch.words_mask_BW, TEXT, TEXT)
            common_audio, common_visual = (
                self._encode_present(batch, 1 - column, column)
                if self._needs_common(batch, column, missing)
                else None
                for column in MODALITIES
            )
            retrieved = self._encode_neighbours(batch, batch.retrieved, missing)
            farthest = self._encode_neighbours(batch, batch.farthest, missing)
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
            common=(common_audio, common_visual),
            retrieved=retrieved,
            retrieved_ids_BN=ids,
            farthest=farthest,
            farthest_ids_BN=far_ids,
            target_B=batch.target_B,
        )

    def answer(self, encoded: Encoded) -> Answer:
        """Recover, purify, weigh and decode an encoding."""
        own = (encoded.audio, encoded.visual)
        recovered = [self._recover(encoded, column) for column in MODALITIES]
        recovered_BM = torch.stack([part.recovered_B for part in recovered], dim=1)
        fallback_BM = torch.stack([part.fallback_B for part in recovered], dim=1)
        available_BM = encoded.present_BM | recovered_BM
        if self.config.purify_full and self.purifies:
            recovered = [
                self._purify_present(encoded, column, recovered[column], own) for column in MODALITIES
            ]
        audio, visual = (part.tokens for part in recovered)
        sources = (audio, visual, encoded.words)
        available_BS = F.pad(available_BM, (0, 1), value=True)
        if self.stage is Stage.MIXING:
            router_BS = self.router(sources, available_BS)
        else:
            router_BS = uniform_weights(available_BS)
        joint = fuse(sources, router_BS, available_BS, self.config.fusion)
        *logits, joint_BD = self.decoders(joint, audio, visual, available_BM, encoded.question)
        evidence = Evidence(
            router_BS=router_BS,
            available_BM=available_BM,
            recovered_BM=recovered_BM,
            fallback_BM=fallback_BM,
            neighbours_BN=self._used_neighbours(encoded, (recovered_BM & ~fallback_BM).any(dim=1)),
            purified=(recovered[AUDIO].purification, recovered[VISUAL].purification),
            joint_BD=joint_BD.detach(),
        )
        return Answer(*logits, evidence=evidence)

    def _encode_present(self, batch: Batch, source: int, expert: int) -> Tokens:
        """E_expert(Φ_source(F_source)), without tokens in rows where the source is absent."""
        features_BLC, mask_BL = batch.sequence(("audio", "visual")[source])
        mask_BL = mask_BL & batch.present_BM[:, source, None]
        if not bool(mask_BL.any()):  # nothing to encode: one token of padding is enough
            features_BLC, mask_BL = features_BLC[:, :1], mask_BL[:, :1]
            if features_BLC.shape[1] == 0:
                features_BLC, mask_BL = F.pad(features_BLC, (0, 0, 0, 1)), F.pad(mask_BL, (0, 1))
        return self.experts(features_BLC, mask_BL, source, expert)

    def _needs_recovery(self, batch: Batch, column: int, missing: int | None) -> Tensor:
        """Rows whose modality must be recovered, (B,) bool: all of `missing`, or those absent."""
        absent_B = ~batch.present_BM[:, column]
        if missing is not None:
            absent_B = torch.full_like(absent_B, missing == column)
        return absent_B & batch.present_BM[:, 1 - column]

    def _needs_common(self, batch: Batch, column: int, missing: int | None) -> bool:
        if not self.recovers:
            return False
        rows_B = self._needs_recovery(batch, column, missing)
        if self.config.cmr and not self.purifies and batch.retrieved is not None:
            # only rows without any nearest, or any farthest, neighbour fall back on common features
            for part in (batch.retrieved, batch.farthest):
                if part is not None and bool((rows_B & ~self._has_neighbours(part)).any()):
                    return True
            return False
        if self.config.purify_full and self.purifies:
            rows_B = rows_B | batch.present_BM.all(dim=1)
        return bool(rows_B.any())

    def _has_neighbours(self, part: Neighbours) -> Tensor:
        return part.mask_BNL[:, : self.config.neighbours].flatten(1).any(dim=1)

    def _encode_neighbours(self, batch: Batch, part: Neighbours | None, missing: int | None) -> Tokens | None:
        """H_miss of eq. 4 for each row's missing modality; no token where nothing is missing."""
        if part is None or not (self.config.cmr and self.recovers):
            return None
        tokens_BNLC = part.tokens_BNLC[:, : self.config.neighbours]
        mask_BNL = part.mask_BNL[:, : self.config.neighbours]
        rows, _, length = mask_BNL.shape
        states_BLD = batch.sentence_BC.new_zeros(rows, length, self.config.dim, dtype=torch.float32)
        mask_BL = mask_BNL.new_zeros(rows, length)
        for column in MODALITIES:
            rows_B = self._needs_recovery(batch, column, missing)
            if bool(rows_B.all()):
                return self.experts.encode_neighbours(tokens_BNLC, mask_BNL, column)
            if bool(rows_B.any()):
                tokens = self.experts.encode_neighbours(tokens_BNLC[rows_B], mask_BNL[rows_B], column)
                states_BLD = states_BLD.index_put((rows_B,), tokens.states_BLD.float())
                mask_BL = mask_BL.index_put((rows_B,), tokens.mask_BL)
        return Tokens(states_BLD, mask_BL)

    def _recover(self, encoded: Encoded, column: int) -> "_Recovery":
        """A modality where present, recovered where only the other one is present."""
        own = (encoded.audio, encoded.visual)
        tokens = own[column].keep_rows(encoded.present_BM[:, column])
        rows_B = ~encoded.present_BM[:, column] & encoded.present_BM[:, 1 - column]
        if not self.recovers or not bool(rows_B.any()):
            no_rows_B = torch.zeros_like(rows_B)
            return _Recovery(tokens, no_rows_B, no_rows_B, None)
        missing, fallback_B = self._missing_tokens(encoded, column, rows_B)
        purification = None
        if self.purifies:
            available = own[1 - column].keep_rows(encoded.present_BM[:, 1 - column])
            common = encoded.common[column]
            assert common is not None
            missing, purification = self.purifier(missing, available, common, encoded.words)
            purification = purification.keep_rows(rows_B)
        return _Recovery(where_rows(rows_B, missing, tokens), rows_B, fallback_B, purification)

    def _missing_tokens(self, encoded: Encoded, column: int, rows_B: Tensor) -> tuple[Tokens, Tensor]:
        """H_miss before purification, and the rows that fall back because they have no neighbour."""
        common = encoded.common[column]
        if not self.config.cmr:
            assert common is not None
            return common, torch.zeros_like(rows_B)
        if encoded.retrieved is None:
            raise ValueError("the batch must hold neighbours: retrieval is on and a modality is missing")
        fallback_B = rows_B & ~encoded.retrieved.mask_BL.any(dim=1)
        if common is None:
            return encoded.retrieved, fallback_B
        return where_rows(fallback_B, common, encoded.retrieved), fallback_B

    def _purify_present(
        self, encoded: Encoded, column: int, recovery: "_Recovery", own: tuple[Tokens, Tokens]
    ) -> "_Recovery":
        """With both modalities present purify each by the other, as the authors' release does."""
        rows_B, common = encoded.present_BM.all(dim=1), encoded.common[column]
        if common is None or not bool(rows_B.any()):
            return recovery
        tokens, purification = self.purifier(own[column], own[1 - column], common, encoded.words)
        purification = purification.keep_rows(rows_B)
        if recovery.purification is not None:
            purification = purification.merge(rows_B, recovery.purification)
        tokens = where_rows(rows_B, tokens, recovery.tokens)
        return replace(recovery, tokens=tokens, purification=purification)

    def _used_neighbours(self, encoded: Encoded, rows_B: Tensor) -> Tensor | None:
        ids_BN = encoded.retrieved_ids_BN
        if ids_BN is None or not (self.config.cmr and self.recovers):
            return None
        return ids_BN.masked_fill(~rows_B[:, None], -1)


@dataclass(frozen=True, slots=True)
class _Recovery:
    """Tokens of one modality, and the rows in which they were recovered or purified."""

    tokens: Tokens
    recovered_B: Tensor
    fallback_B: Tensor
    purification: Purification | None
