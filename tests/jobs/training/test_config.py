"""A training's settings survive JSON, are refused by name if invalid, and give the right learning rates."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from r2scp.jobs.training.config import PRESETS, StageConfig, TrainConfig, paper_avqa, paper_music_avqa
from r2scp.model.config import ModelConfig
from r2scp.model.losses import LossConfig
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import UsageError
from r2scp.store.schema import Retrieval
from r2scp.store.search.bank import BankScope

BASE = TrainConfig(
    model=ModelConfig(encoder_dim=24, classes=6, dim=32, heads=4),
    stage_one=StageConfig(epochs=4),
    stage_two=StageConfig(epochs=3),
)


def plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_json()))


def changed(path: str, value: object) -> dict[str, Any]:
    """BASE as plain values, with one of them another."""
    values = place = plain(BASE)
    *parents, name = path.split(".")
    for parent in parents:
        place = place[parent]
    place[name] = value
    return values


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("classes", [42, None])
def test_a_preset_is_the_same_after_json(preset: Any, classes: int | None) -> None:
    config = preset(1024, classes)
    assert TrainConfig.from_json(plain(config)) == config
    assert plain(TrainConfig.from_json(plain(config))) == plain(config)


def test_nested_settings_are_the_same_after_json() -> None:
    config = replace(
        BASE,
        model=replace(BASE.model, classes=None, ffn=48, saliency="random", dropout=0.0),
        stage_two=StageConfig(epochs=3, lr=1, schedule="constant"),
        loss=LossConfig(rank="paper", rank_weight=0.5, modality_dropout=False),
        index=IndexSettings(
            retrieval=(Retrieval.HYBRID,), bank=BankScope(corpora=("vggsound",), splits=()), n=7
        ),
        retrieval=Retrieval.HYBRID,
        negatives="random",
        corpora=("avqa", "demo"),
        seed=2**40,
    )
    again = TrainConfig.from_json(plain(config))
    assert again == config
    assert again.index.bank.corpora == ("vggsound",)
    assert again.retrieval is Retrieval.HYBRID
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("bach_size", 3, r"config has no bach_size; known: .*batch_size.*weight_decay"),
        ("model.heds", 2, r"config\.model has no heds; known: .*heads"),
        ("index.bank.split", [], r"config\.index\.bank has no split; known: .*corpora, .*splits"),
        ("model", [1], r"config\.model must be an object; got \[1\]"),
        ("batch_size", "64", r"config\.batch_size must be a whole number; got '64'"),
        ("batch_size", True, r"config\.batch_size must be a whole number; got True"),
        ("batch_size", 0, r"config: batch_size must be at least 1; got 0"),
        ("evaluate_rows", 0, r"evaluate_rows must be at least 1; got 0"),
        ("seed", -1, r"seed must be at least 0 .*; got -1"),
        ("weight_decay", -0.1, r"weight_decay must be at least 0; got -0\.1"),
        ("weight_decay", math.nan, r"config\.weight_decay must be a finite number; got nan"),
        ("expert_dropout", 1.5, r"expert_dropout must be in \[0, 1\]; got 1\.5"),
        ("expert_dropout", False, r"config\.expert_dropout must be a finite number; got False"),
        ("holdout", 1.0, r"holdout must be at least 0 and below 1; got 1\.0"),
        ("sees", ["question"], r"config\.sees must be one of everything, question; got \['question'\]"),
        ("retrieval", "pared", r"config\.retrieval must be one of cross, paired, hybrid; got 'pared'"),
        ("corpora", "avqa", r"config\.corpora must be a list; got 'avqa'"),
        ("corpora", ["avqa", 3], r"config\.corpora\[1\] must be a string; got 3"),
        ("stage_one.schedule", "slow", r"config\.stage_one\.schedule must be one of step, cosine, constant"),
        ("stage_one.epochs", -1, r"config\.stage_one: epochs must be at least 0; got -1"),
        ("stage_one.lr", 0, r"config\.stage_one: lr must be above 0; got 0"),
        ("stage_one.lr", math.inf, r"config\.stage_one\.lr must be a finite number; got inf"),
        ("stage_two.step_epochs", 0, r"config\.stage_two: step_epochs must be at least 1; got 0"),
        ("stage_two.decay", 0.0, r"config\.stage_two: decay must be above 0 and at most 1; got 0\.0"),
        ("stage_two.warmup_steps", -5, r"config\.stage_two: warmup_steps must be at least 0; got -5"),
        ("model.saliency", "loud", r"config\.model\.saliency must be one of received, .*; got 'loud'"),
        ("model.cmr", 1, r"config\.model\.cmr must be true or false; got 1"),
        ("model.k", None, r"config\.model\.k must be a whole number; got None"),
        ("model.classes", 1, r"config\.model: .*classes at least 2"),
        ("model.dim", 30, r"config\.model: dim must be even and a multiple of heads; got 30 and 4"),
        ("model.neighbours", 16, r"model\.neighbours must be at most index\.n, 15; got 16"),
        ("loss.rank_weight", -1.0, r"config\.loss: rank .* at least 0"),
        ("index.n", 0, r"config\.index: the number of neighbours must be at least 1; got 0"),
        ("index.retrieval", ["cross", "cross"], r"config\.index: retrieval must name .* each once"),
    ],
)
def test_invalid_settings_are_refused_by_name(path: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        TrainConfig.from_json(changed(path, value))
    assert "\n" not in str(error.value)


def test_missing_settings_have_defaults_or_are_refused() -> None:
    values = plain(BASE)
    del values["negatives"], values["loss"]["rank"], values["index"]["bank"]
    assert TrainConfig.from_json(values) == BASE
    del values["model"], values["stage_one"]["epochs"]
    with pytest.raises(UsageError, match="config must have model"):
        TrainConfig.from_json(values)
    with pytest.raises(UsageError, match=r"config\.stage_one must have epochs"):
        TrainConfig.from_json(values | {"model": {}})


def test_settings_from_code_are_checked_too() -> None:
    nothing = {"stage_one": StageConfig(epochs=0), "stage_two": StageConfig(epochs=0)}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"retrieval": "paired "}, "retrieval must be one of"),
        ({"corpora": "avqa"}, "corpora must be a list"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"sees": "question"}, "no stage II; its epochs must be 0"),
        (nothing, "nothing to train"),
    ]
    for changes, message in wrong:
        with pytest.raises(UsageError, match=message):
            replace(BASE, **changes)


def test_differences_name_each_setting_and_both_values() -> None:
    other = replace(BASE, seed=7, model=replace(BASE.model, k=3), corpora=("demo",))
    assert BASE.differences(other) == ["model.k: 5, 3", "corpora: (), ('demo',)", "seed: 1, 7"]
    assert BASE.differences(TrainConfig.from_json(plain(BASE))) == []


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "constant"}, {0: 1.0, 99: 1.0}),
        # 5 steps an epoch: a tenth after every 2 epochs
        ({"schedule": "step", "step_epochs": 2}, {0: 1.0, 9: 1.0, 10: 0.1, 19: 0.1, 20: 0.01}),
        ({"schedule": "step", "step_epochs": 1, "decay": 0.5}, {4: 1.0, 5: 0.5, 14: 0.25}),
        # 20 steps in all: (1 + cos(pi step / 20)) / 2
        ({"schedule": "cosine"}, {0: 1.0, 5: 0.8535534, 10: 0.5, 15: 0.1464466, 19: 0.0061558}),
        ({"schedule": "constant", "warmup_steps": 4}, {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 5: 1.0}),
        ({"schedule": "cosine", "warmup_steps": 19}, {0: 0.05, 10: 0.275}),
    ],
)
def test_rates(settings: Mapping[str, Any], rates: Mapping[int, float]) -> None:
    stage = StageConfig(epochs=4, lr=2e-3, **settings)
    for step, share in rates.items():
        assert stage.rate(step, steps_per_epoch=5) == pytest.approx(2e-3 * share, rel=1e-5)


def test_the_paper_presets_are_the_paper_and_its_release() -> None:
    music = paper_music_avqa(1024, 42)
    for stage, epochs in ((music.stage_one, 5), (music.stage_two, 25)):
        assert (stage.epochs, stage.lr, stage.schedule, stage.step_epochs) == (epochs, 1e-4, "step", 8)
        assert stage.rate(8 * 500, 500) == pytest.approx(1e-5)
    assert (music.batch_size, music.seed, music.weight_decay) == (64, 1, 0.0)
    assert (music.model.neighbours, music.model.k, music.model.dim) == (3, 5, 768)
    assert (music.retrieval, music.negatives, music.loss.rank_weight) == (Retrieval.CROSS, "farthest", 1.0)
    assert music.model.freeze_experts
    assert (music.corpora, music.holdout) == (("music-avqa",), 0.0)
    avqa = paper_avqa(1024, None)
    assert (avqa.model.classes, avqa.corpora) == (None, ("avqa",))
    assert avqa.holdout > 0, "AVQA is published in two parts, of which one is the test split"
