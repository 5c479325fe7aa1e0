"""The model's settings, and the two stages of its training."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import get_args

from r2scp.model.experts import Positions, Sizes
from r2scp.model.purification import CapGradient, Pairing, PurifyConfig, Saliency
from r2scp.model.router import Fusion


class Stage(StrEnum):
    """Which parts of a model train and are in use: stage I has neither router nor purification yet."""

    EXPERTS = "experts"  # I: Φ, experts, heads
    MIXING = "mixing"  # II: CAP, router, heads; experts too if they are not frozen


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model's settings. Raises ValueError for an invalid one."""

    encoder_dim: int = 1024  # C, of imagebind-huge
    classes: int | None = 42  # answers in MUSIC-AVQA's train split; None: score each question's choices
    dim: int = 768  # D
    layers: int = 1  # of each expert
    heads: int = 8
    ffn: int | None = None  # inner width of feed-forward blocks; None: same as dim
    dropout: float = 0.1
    positions: Positions = "sinusoidal"
    cmr: bool = True  # cross-modal retrieval
    cap: bool = True  # purification
    neighbours: int = 3  # n, the nearest of those in the batch
    k: int = 5  # most tokens to purge
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
        """The settings that every module needs."""
        return Sizes(
            encoder_dim=self.encoder_dim,
            dim=self.dim,
            heads=self.heads,
            ffn=self.dim if self.ffn is None else self.ffn,
            dropout=self.dropout,
        )

    @property
    def purify(self) -> PurifyConfig:
        """The settings that CAP needs."""
        return PurifyConfig(
            k=self.k, cap_gradient=self.cap_gradient, saliency=self.saliency, pairing=self.pairing
        )

    @property
    def recovers(self) -> bool:
        """Whether a missing modality is recovered; if not, it is dropped."""
        return self.cmr or self.cap
