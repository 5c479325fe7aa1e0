"""Every setting of a training, and the presets.

A preset is a function of what the store says (the encoder's width and the answers); everything else is in
its body, to be read.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from r2scp.jobs.settings import built, hold_to_types
from r2scp.model.config import ModelConfig
from r2scp.model.losses import LossConfig
from r2scp.pipelines.batches.dataset import Negatives
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import UsageError
from r2scp.store.schema import Retrieval

Schedule = Literal["step", "cosine", "constant"]
Sees = Literal["everything", "question"]

QUESTION_ONLY = "question-only"
NO_RECOVERY = "no-recovery"
NO_RECOVERY_DROPOUT = "no-recovery-dropout"
#: Settings of the model that stage I looks at.
STAGE_ONE_SETTINGS = (
    "encoder_dim",
    "classes",
    "dim",
    "layers",
    "heads",
    "ffn",
    "dropout",
    "positions",
    "fusion",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """How long one stage trains, and how fast. `epochs` 0 leaves the stage out.

    `step`: the rate falls to `decay` of itself every `step_epochs`; `cosine`: to 0 at the stage's end. Raises
    `UsageError` for what cannot be.
    """

    epochs: int
    lr: float = 1e-4
    schedule: Schedule = "step"
    step_epochs: int = 8
    decay: float = 0.1
    warmup_steps: int = 0  # over which the rate rises from 0

    def __post_init__(self) -> None:
        hold_to_types(self)
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

    `holdout`: share of the train split's videos whose questions choose the best checkpoint instead of being
    learned from, for a corpus without a validation split; 0: there is one. `expert_dropout`: in stage I each
    question loses one modality with this probability. `sees="question"` is the baseline that gets neither
    sound nor picture: it has no stage II. `evaluate_rows`: questions that go through the model together when
    nothing is learned. Raises `UsageError` for what cannot be.
    """

    model: ModelConfig
    stage_one: StageConfig
    stage_two: StageConfig
    loss: LossConfig = field(default_factory=LossConfig)
    index: IndexSettings = field(default_factory=IndexSettings)  # which neighbours are read
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
        hold_to_types(self)
        for name in ("batch_size", "evaluate_rows"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(0 <= self.holdout < 1, "holdout", "at least 0 and below 1", self.holdout)
        _require(0 <= self.expert_dropout <= 1, "expert_dropout", "in [0, 1]", self.expert_dropout)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(0 <= self.seed < 2**63, "seed", "at least 0 and below 2^63", self.seed)
        if self.sees == "question" and self.stage_two.epochs:
            raise UsageError("a model that sees the question alone has no stage II; its epochs must be 0")
        if not self.stage_one.epochs and not self.stage_two.epochs:
            raise UsageError("there is nothing to train: stage_one.epochs and stage_two.epochs are both 0")
        if self.model.cmr and self.model.neighbours > self.index.n:
            raise UsageError(
                f"model.neighbours must be at most index.n, {self.index.n}; got {self.model.neighbours}"
            )

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "TrainConfig":
        """What `to_json` gave. Raises `UsageError` for a key or a value that cannot be."""
        return built(cls, values, "config")

    def differences(self, other: "TrainConfig") -> list[str]:
        """What `other` has otherwise, as "key: here, there"."""
        here, there = _flat(self.to_json()), _flat(other.to_json())
        return [f"{key}: {here[key]!r}, {there[key]!r}" for key in here if here[key] != there[key]]


def demo(encoder_dim: int, classes: int | None) -> TrainConfig:
    """The generated corpus with its small encoder: minutes on two cores.

    k = 1 is as large a share of the 10 tokens of a clip as the paper's 5 are of MUSIC-AVQA's 60.
    """
    return TrainConfig(
        model=ModelConfig(encoder_dim=encoder_dim, classes=classes, dim=64, heads=4, k=1),
        stage_one=StageConfig(epochs=24, lr=2e-3, schedule="cosine", warmup_steps=100),
        stage_two=StageConfig(epochs=8, lr=1e-3, schedule="cosine", warmup_steps=100),
        retrieval=Retrieval.PAIRED,
        weight_decay=0.05,
    )


def paper_music_avqa(encoder_dim: int, classes: int | None) -> TrainConfig:
    """The paper on MUSIC-AVQA; what it leaves open as in its authors' release."""
    return TrainConfig(
        model=ModelConfig(encoder_dim=encoder_dim, classes=classes),
        stage_one=StageConfig(epochs=5),
        stage_two=StageConfig(epochs=25),
        corpora=("music-avqa",),
    )


def paper_avqa(encoder_dim: int, classes: int | None) -> TrainConfig:
    """The paper on AVQA: the same, but each question brings its four choices."""
    config = paper_music_avqa(encoder_dim, classes)
    return replace(
        config,
        model=replace(config.model, classes=None),
        corpora=("avqa",),
        holdout=0.05,  # its second file is the test split
    )


PRESETS = {"demo": demo, "paper_music_avqa": paper_music_avqa, "paper_avqa": paper_avqa}


def experts_of(config: TrainConfig) -> TrainConfig:
    """The training of stage I that `config` begins with: the same for all that differ in stage II alone.

    Of the index only the way to split matters here.
    """
    nothing = StageConfig(epochs=0)
    plain = TrainConfig(model=ModelConfig(), stage_one=config.stage_one, stage_two=nothing)
    ours = {name: getattr(config.model, name) for name in STAGE_ONE_SETTINGS}
    return replace(
        config,
        model=replace(plain.model, cmr=False, cap=False, **ours),
        stage_two=nothing,
        loss=plain.loss,
        index=replace(plain.index, bank=replace(plain.index.bank, disjoint=config.index.bank.disjoint)),
        retrieval=plain.retrieval,
        negatives=plain.negatives,
    )


def baselines(config: TrainConfig) -> dict[str, TrainConfig]:
    """Name -> config.

    `question-only` gets neither sound nor picture. `no-recovery` drops what is missing and has learned from
    complete data alone, as in the paper's Table 2; `no-recovery-dropout` has learned to do without as well.
    """
    without = replace(config, model=replace(config.model, cmr=False, cap=False))
    only_stage = config.stage_one if config.stage_one.epochs else config.stage_two
    blind = replace(config, stage_one=only_stage, stage_two=replace(config.stage_two, epochs=0))
    return {
        QUESTION_ONLY: replace(blind, sees="question"),
        NO_RECOVERY: replace(without, loss=replace(config.loss, modality_dropout=False)),
        NO_RECOVERY_DROPOUT: replace(without, loss=replace(config.loss, modality_dropout=True)),
    }


def takes_experts(config: TrainConfig) -> bool:
    """Whether a baseline begins where stage I of the model that it is compared with ended."""
    return config.sees == "everything"


def _require(holds: bool, name: str, must: str, got: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {must}; got {got!r}")


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
