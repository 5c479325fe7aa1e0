"""Every setting of a training: the presets, and the trainings derived from one (baselines, stage I alone).

A preset is a function of what the store decides (the encoder's width and the number of answers).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from r2scp.jobs.settings import check_types, from_plain
from r2scp.model.config import ModelConfig
from r2scp.model.losses import LossConfig
from r2scp.pipelines.batches.dataset import Negatives
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import UsageError
from r2scp.store.schema import Retrieval

Schedule = Literal["step", "cosine", "constant"]
Sees = Literal["everything", "question"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Epochs and learning rate of one stage. `epochs` 0 leaves the stage out.

    `step`: the rate is multiplied by `decay` every `step_epochs`; `cosine`: it falls to 0 at the stage's end.
    Raises `UsageError` for invalid values.
    """

    epochs: int
    lr: float = 1e-4
    schedule: Schedule = "step"
    step_epochs: int = 8
    decay: float = 0.1
    warmup_steps: int = 0  # over which the rate rises from 0

    def __post_init__(self) -> None:
        check_types(self)
        _require(self.epochs >= 0, "epochs", "at least 0", self.epochs)
        _require(self.lr > 0, "lr", "above 0", self.lr)
        _require(self.step_epochs >= 1, "step_epochs", "at least 1", self.step_epochs)
        _require(0 < self.decay <= 1, "decay", "above 0 and at most 1", self.decay)
        _require(self.warmup_steps >= 0, "warmup_steps", "at least 0", self.warmup_steps)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from the stage's start."""
        rate = self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "step":
            return rate * self.decay ** (step // steps_per_epoch // self.step_epochs)
        if self.schedule == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * step / (self.epochs * steps_per_epoch)))
        return rate


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Every setting of a training.

    `holdout`: share of the train split's videos held out as validation, for a corpus without a validation
    split; 0: use the `val` split. `expert_dropout`: in stage I, probability that a question loses a modality.
    `sees="question"` is the baseline that gets neither sound nor picture: it has no stage II.
    `evaluate_rows`: batch size of validation and evaluation. Raises `UsageError` for invalid values.
    """

    model: ModelConfig
    stage_one: StageConfig
    stage_two: StageConfig
    loss: LossConfig = field(default_factory=LossConfig)
    index: IndexSettings = field(default_factory=IndexSettings)  # whose neighbours are read
    retrieval: Retrieval = Retrieval.CROSS
    negatives: Negatives = "farthest"
    corpora: tuple[str, ...] = ()  # whose questions; empty for all
    sees: Sees = "everything"
    holdout: float = 0.0
    expert_dropout: float = 0.0
    batch_size: int = 64
    weight_decay: float = 0.0
    seed: int = 1
    evaluate_rows: int = 256

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_size", "evaluate_rows"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(0 <= self.holdout < 1, "holdout", "at least 0 and below 1", self.holdout)
        _require(0 <= self.expert_dropout <= 1, "expert_dropout", "in [0, 1]", self.expert_dropout)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(0 <= self.seed < 2**63, "seed", "at least 0 and below 2^63", self.seed)
        if self.sees == "question" and self.stage_two.epochs:
            raise UsageError("a model that sees only the question has no stage II; its epochs must be 0")
        if not self.stage_one.epochs and not self.stage_two.epochs:
            raise UsageError(
                "nothing to train: stage_one.epochs or stage_two.epochs must be above 0; got 0 and 0"
            )
        if self.model.cmr and self.model.neighbours > self.index.n:
            raise UsageError(
                f"model.neighbours must be at most index.n, {self.index.n}; got {self.model.neighbours}"
            )

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "TrainConfig":
        """The inverse of `to_json`. Raises `UsageError` for unknown keys and invalid values."""
        return from_plain(cls, values, "config")

    def differences(self, other: "TrainConfig") -> list[str]:
        """The settings in which `other` differs, as "key: own value, other's value"."""
        own, others = _flat(self.to_json()), _flat(other.to_json())
        return [f"{key}: {own[key]!r}, {others[key]!r}" for key in own if own[key] != others[key]]


def demo(encoder_dim: int, classes: int | None) -> TrainConfig:
    """The generated corpus with its small encoder: minutes on two cores.

    k = 1 of a clip's 10 tokens is about the share that the paper's 5 are of MUSIC-AVQA's 60.
    """
    return TrainConfig(
        model=ModelConfig(encoder_dim=encoder_dim, classes=classes, dim=64, heads=4, k=1),
        stage_one=StageConfig(epochs=24, lr=2e-3, schedule="cosine", warmup_steps=100),
        stage_two=StageConfig(epochs=8, lr=1e-3, schedule="cosine", warmup_steps=100),
        retrieval=Retrieval.PAIRED,
        weight_decay=0.05,
    )


def paper_music_avqa(encoder_dim: int, classes: int | None) -> TrainConfig:
    """The paper on MUSIC-AVQA; what it leaves open follows the authors' release."""
    return TrainConfig(
        model=ModelConfig(encoder_dim=encoder_dim, classes=classes),
        stage_one=StageConfig(epochs=5),
        stage_two=StageConfig(epochs=25),
        corpora=("music-avqa",),
    )


def paper_avqa(encoder_dim: int, classes: int | None) -> TrainConfig:
    """The paper on AVQA: the same, but each question has four choices of its own."""
    config = paper_music_avqa(encoder_dim, classes)
    return replace(
        config,
        model=replace(config.model, classes=None),
        corpora=("avqa",),
        holdout=0.05,  # its second file is the test split
    )


PRESETS = {"demo": demo, "paper_music_avqa": paper_music_avqa, "paper_avqa": paper_avqa}


QUESTION_ONLY = "question-only"
NO_RECOVERY = "no-recovery"
NO_RECOVERY_DROPOUT = "no-recovery-dropout"


def baselines(config: TrainConfig) -> dict[str, TrainConfig]:
    """The baselines of a training, by name.

    `question-only` gets neither sound nor picture. `no-recovery` drops what is missing and was trained on
    complete clips alone, as in the paper's Table 2; `no-recovery-dropout` was trained with modality dropout.
    """
    without = replace(config, model=replace(config.model, cmr=False, cap=False))
    only_stage = config.stage_one if config.stage_one.epochs else config.stage_two
    blind = replace(config, stage_one=only_stage, stage_two=replace(config.stage_two, epochs=0))
    return {
        QUESTION_ONLY: replace(blind, sees="question"),
        NO_RECOVERY: replace(without, loss=replace(config.loss, modality_dropout=False)),
        NO_RECOVERY_DROPOUT: replace(without, loss=replace(config.loss, modality_dropout=True)),
    }


def shares_experts(config: TrainConfig) -> bool:
    """Whether a baseline starts from the experts of the model that it is compared with."""
    return config.sees == "everything"


#: The model's settings that stage I depends on.
STAGE_ONE_SETTINGS = (
    *("encoder_dim", "classes", "dim", "layers", "heads", "ffn"),
    *("dropout", "positions", "fusion"),
)


def experts_of(config: TrainConfig) -> TrainConfig:
    """Stage I of `config` as a training of its own, the same for all configs that differ only in stage II.

    Settings that stage I does not depend on are reset to their defaults; of the index it depends only on
    whether splits are disjoint.
    """
    plain = TrainConfig(model=ModelConfig(), stage_one=config.stage_one, stage_two=StageConfig(epochs=0))
    stage_one = {name: getattr(config.model, name) for name in STAGE_ONE_SETTINGS}
    return replace(
        config,
        model=replace(plain.model, cmr=False, cap=False, **stage_one),
        stage_two=plain.stage_two,
        loss=plain.loss,
        index=replace(plain.index, bank=replace(plain.index.bank, disjoint=config.index.bank.disjoint)),
        retrieval=plain.retrieval,
        negatives=plain.negatives,
    )


def _require(holds: bool, name: str, must: str, got: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {must}; got {got!r}")


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
