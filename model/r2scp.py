"""R²ScP: retrieve what is missing, purify it, weigh it, answer (section 3 of the paper).

Encoding (Φ, experts, neighbours) and answering (purification, router, heads) are two steps, `encode` and
`answer`: stage II trains only the second, answers each batch three times from one encoding, and an encoding
of frozen experts may come from a cache.
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
    map_tensors,
    where_rows,
    drop_modality,
)
from r2scp.model.config import ModelConfig, Stage
from r2scp.model.decoder import Heads
from r2scp.model.experts import Experts
from r2scp.model.purification import Purifier
from r2scp.model.router import Router, uniform_weights, fuse

MODALITIES = (AUDIO, VISUAL)


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
    target_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.present_BM)

    def drop(self, modality: int, rows_B: Tensor | None = None) -> "Encoded":
        """The same with `modality` absent, in all rows or where rows_B is True."""
        return replace(self, present_BM=drop_modality(self.present_BM, modality, rows_B))

    def with_farthest(self) -> "Encoded":
        """The same with the farthest clips in place of the nearest: R⁻ of eq. 14."""
        if self.farthest is None:
            raise ValueError("R⁻ needs the farthest neighbours; this batch was encoded without them")
        return replace(self, retrieved=self.farthest, retrieved_ids_BN=self.farthest_ids_BN)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Encoded":
        """The same on another device."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Encoded":
        """The same in page-locked memory, from where `to(..., non_blocking=True)` overlaps work."""
        return map_tensors(self, Tensor.pin_memory)


class R2SCP(nn.Module):
    """The whole model. A new one is in stage I; `enter` moves it on and says what trains."""

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

    @property
    def recovers(self) -> bool:
        """Whether a missing modality is recovered: in stage I it is dropped, whatever the config says."""
        return self.config.recovers and self.stage is Stage.MIXING

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
            audio, visual = (self._encode_present(batch, column, column) for column in MODALITIES)
            words = self.experts(batch.words_BWC, batch.words_mask_BW, TEXT, TEXT)
            common_audio, common_visual = (
                self._encode_present(batch, 1 - column, column) if needed else None
                for column, needed in enumerate(self._common_needed(batch, missing))
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
        """Recover, purify, weigh and decode what `encode` gave."""
        own = (encoded.audio, encoded.visual)
        found = [self._recover(encoded, column) for column in MODALITIES]
        recovered_BM = torch.stack([part.recovered_B for part in found], dim=1)
        fallback_BM = torch.stack([part.fallback_B for part in found], dim=1)
        there_BM = encoded.present_BM | recovered_BM
        if self.config.purify_full and self.purifies:
            found = [self._purify_present(encoded, column, found[column], own) for column in MODALITIES]
        sources = (found[AUDIO].tokens, found[VISUAL].tokens, encoded.words)
        there_BS = F.pad(there_BM, (0, 1), value=True)
        router_BS = self.router(sources, there_BS) if self.stage is Stage.MIXING else uniform_weights(there_BS)
        joint = fuse(sources, router_BS, there_BS, self.config.fusion)
        *logits, joint_BD = self.decoders(joint, sources[AUDIO], sources[VISUAL], there_BM, encoded.question)
        evidence = Evidence(
            router_BS=router_BS,
            available_BM=there_BM,
            recovered_BM=recovered_BM,
            fallback_BM=fallback_BM,
            neighbours_BN=self._used_neighbours(encoded, (recovered_BM & ~fallback_BM).any(dim=1)),
            purified=(found[AUDIO].purification, found[VISUAL].purification),
            joint_BD=joint_BD.detach(),
        )
        return Answer(*logits, evidence=evidence)

    def _encode_present(self, batch: Batch, source: int, expert: int) -> Tokens:
        """E_expert(Φ_source(F_source)), with no token in the rows where the source is absent."""
        features_BLC, mask_BL = batch.sequence(("audio", "visual")[source])
        mask_BL = mask_BL & batch.present_BM[:, source, None]
        if not bool(mask_BL.any()):  # nothing to encode: one empty place stands for all
            features_BLC, mask_BL = features_BLC[:, :1], mask_BL[:, :1]
            if features_BLC.shape[1] == 0:
                features_BLC, mask_BL = F.pad(features_BLC, (0, 0, 0, 1)), F.pad(mask_BL, (0, 1))
        return self.experts(features_BLC, mask_BL, source, expert)

    def _needs_recovery(self, batch: Batch, column: int, missing: int | None) -> Tensor:
        """Rows that need, or are asked for, the recovery of a modality, (B,) bool."""
        absent_B = ~batch.present_BM[:, column]
        if missing is not None:
            absent_B = torch.full_like(absent_B, missing == column)
        return absent_B & batch.present_BM[:, 1 - column]

    def _common_needed(self, batch: Batch, missing: int | None) -> list[bool]:
        return [self._needs_common(batch, column, missing) for column in MODALITIES]

    def _needs_common(self, batch: Batch, column: int, missing: int | None) -> bool:
        if not self.recovers:
            return False
        rows_B = self._needs_recovery(batch, column, missing)
        if self.config.cmr and not self.purifies and batch.retrieved is not None:
            # only a row without any neighbour, among the nearest or the farthest, falls back
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
        """H_miss of eq. 4 for each row's missing modality; no token where nothing is sought."""
        if part is None or not (self.config.cmr and self.recovers):
            return None
        tokens_BNLC = part.tokens_BNLC[:, : self.config.neighbours]
        mask_BNL = part.mask_BNL[:, : self.config.neighbours]
        rows, _, length = mask_BNL.shape
        states_BLD = batch.sentence_BC.new_zeros(rows, length, self.config.dim, dtype=torch.float32)
        mask_BL = mask_BNL.new_zeros(rows, length)
        for column in MODALITIES:
            sought_B = self._needs_recovery(batch, column, missing)
            if bool(sought_B.all()):
                return self.experts.encode_neighbours(tokens_BNLC, mask_BNL, column)
            if bool(sought_B.any()):
                near = self.experts.encode_neighbours(tokens_BNLC[sought_B], mask_BNL[sought_B], column)
                states_BLD = states_BLD.index_put((sought_B,), near.states_BLD.float())
                mask_BL = mask_BL.index_put((sought_B,), near.mask_BL)
        return Tokens(states_BLD, mask_BL)

    def _recover(self, encoded: Encoded, column: int) -> "_Recovery":
        """A modality as it is where present, recovered where absent and the other one present."""
        own = (encoded.audio, encoded.visual)
        tokens = own[column].keep_rows(encoded.present_BM[:, column])
        rows_B = ~encoded.present_BM[:, column] & encoded.present_BM[:, 1 - column]
        nowhere_B = torch.zeros_like(rows_B)
        if not self.recovers or not bool(rows_B.any()):
            return _Recovery(tokens, nowhere_B, nowhere_B, None)
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
        return where_rows(fallback_B, common, encoded.retrieved), fallback_B

    def _purify_present(
        self, encoded: Encoded, column: int, found: "_Recovery", own: tuple[Tokens, Tokens]
    ) -> "_Recovery":
        """The release's habit: with both modalities present, purify each by the other."""
        rows_B, common = encoded.present_BM.all(dim=1), encoded.common[column]
        if common is None or not bool(rows_B.any()):
            return found
        tokens, purification = self.purifier(own[column], own[1 - column], common, encoded.words)
        purification = purification.keep_rows(rows_B)
        if found.purification is not None:
            purification = purification.merge(rows_B, found.purification)
        return replace(found, tokens=where_rows(rows_B, tokens, found.tokens), purification=purification)

    def _used_neighbours(self, encoded: Encoded, rows_B: Tensor) -> Tensor | None:
        ids_BN = encoded.retrieved_ids_BN
        if ids_BN is None or not (self.config.cmr and self.recovers):
            return None
        return ids_BN.masked_fill(~rows_B[:, None], -1)


@dataclass(frozen=True, slots=True)
class _Recovery:
    tokens: Tokens
    recovered_B: Tensor
    fallback_B: Tensor
    purification: Purification | None
