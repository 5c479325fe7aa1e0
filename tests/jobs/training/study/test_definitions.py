"""Each study varies what its table names and nothing else; variants with the same stage I share its experts.

Which settings stage I depends on is measured: under all others the same model is drawn and learns the same,
bit for bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from r2scp.jobs.training.config import (
    STAGE_ONE_SETTINGS,
    StageConfig,
    TrainConfig,
    baselines,
    demo,
    experts_of,
)
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.run import TrainPlan
from r2scp.jobs.training.stages import ExpertsObjective, ExpertsStage, Worker
from r2scp.jobs.training.study.definitions import STUDIES, Study, study_of
from r2scp.model.config import ModelConfig
from r2scp.model.losses import LossConfig
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.batches.dataset import NO_MODALITY
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval
from r2scp.store.search.bank import BankScope

BASE = demo(24, 6)
NAMES = (*STUDIES, "bank")
CORPORA = ("avqa", "vggsound")
# another value for each setting that stage I depends on (FIRST) or does not (LATER)
LATER: dict[str, Any] = {"cmr": False, "cap": False, "neighbours": 1, "k": 3, "cap_gradient": "none"}
LATER |= {"saliency": "random", "pairing": "position", "purify_full": True, "freeze_experts": False}
LATER_IN_TRAINING: dict[str, Any] = {
    "stage_two": StageConfig(epochs=1),
    "loss": LossConfig(rank="paper", rank_weight=0.5, modality_dropout=False),
    "index": IndexSettings(n=3, bank=BankScope(corpora=("avqa",), splits=("val",)), leak_guard=False),
    "retrieval": Retrieval.HYBRID,
    "negatives": "random",
}
FIRST: dict[str, Any] = {"encoder_dim": 32, "classes": 7, "dim": 32, "layers": 2, "heads": 2, "ffn": 8}
FIRST |= {"dropout": 0.3, "positions": "none", "fusion": "sum_pooled"}
FIRST_IN_TRAINING: dict[str, Any] = {"stage_one": StageConfig(epochs=2), "corpora": ("avqa",)}
FIRST_IN_TRAINING |= {"sees": "question", "holdout": 0.1, "expert_dropout": 0.5, "batch_size": 7}
FIRST_IN_TRAINING |= {"weight_decay": 0.3, "seed": 9, "evaluate_rows": 5}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def settings(config: TrainConfig, *names: str) -> tuple[Any, ...]:
    known = flat(config.to_json())
    return tuple(known[name] for name in names)


def test_every_setting_is_classified_by_stage() -> None:
    assert set(STAGE_ONE_SETTINGS) == FIRST.keys()
    assert {field.name for field in fields(ModelConfig)} == FIRST.keys() | LATER.keys()
    rest = {field.name for field in fields(TrainConfig)} - {"model"}
    assert rest == FIRST_IN_TRAINING.keys() | LATER_IN_TRAINING.keys()
    for changes, config in ((FIRST | LATER, BASE.model), (FIRST_IN_TRAINING | LATER_IN_TRAINING, BASE)):
        for name, value in changes.items():
            assert getattr(config, name) != value, f"{name} is no change"


def test_experts_depend_on_stage_one_settings_alone() -> None:
    experts = experts_of(BASE)
    assert experts.stage_two.epochs == 0
    assert experts_of(experts) == experts
    for name, value in LATER.items():
        assert experts_of(replace(BASE, model=replace(BASE.model, **{name: value}))) == experts, name
    for name, value in LATER_IN_TRAINING.items():
        assert experts_of(replace(BASE, **{name: value})) == experts, name
    for name, value in FIRST.items():
        other = experts_of(replace(BASE, model=replace(BASE.model, **{name: value})))
        assert other != experts, name
        assert getattr(other.model, name) == value
    for name, value in FIRST_IN_TRAINING.items():
        without = replace(BASE, stage_two=StageConfig(epochs=0))
        assert experts_of(replace(without, **{name: value})) != experts, name


def test_experts_keep_the_disjoint_split() -> None:
    """Otherwise experts would be trained on test clips of the disjoint split."""
    disjoint = replace(BASE, index=IndexSettings(bank=BankScope(disjoint=True, corpora=("avqa",))))
    assert experts_of(disjoint).index.bank == BankScope(disjoint=True)
    assert experts_of(disjoint) != experts_of(BASE)
    for name in NAMES:
        study = study_of(name, disjoint, CORPORA)
        assert all(config.index.bank.disjoint for config in study.variants.values()), name


@pytest.fixture
def first_steps(quick_plan: Callable[..., TrainPlan], learnable_store: FeatureStore) -> Iterator[Callable]:
    """`first_steps(config)`: the model as drawn, losses of three steps of stage I, the model after them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def steps(config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]:
        plan = quick_plan("unused")
        opened = TrainingData.read(
            learnable_store, plan.pins, replace(plan.config, model=config.model), plan.answers
        )
        examples = opened.train_and_validation()[0]
        data = opened.dataset(examples)
        torch.manual_seed(config.seed)
        model = R2SCP(config.model)
        drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        stage = ExpertsStage(config, model, data, data, Worker())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=config.weight_decay)
        assert isinstance(stage.module, ExpertsObjective)
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            batch = stage.prepare(np.arange(8 * step, 8 * step + 8), NO_MODALITY)
            loss = stage.compute_loss(stage.module, batch, NO_MODALITY, step).loss.total
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return drawn, losses, model.state_dict()

    yield steps
    torch.set_num_threads(before)


def test_stage_one_does_not_depend_on_stage_two_settings(first_steps: Callable) -> None:
    base = replace(BASE, model=ModelConfig(encoder_dim=16, classes=6, dim=16, heads=4))
    drawn, losses, learned = first_steps(base)
    for name, value in LATER.items():
        other = replace(base, model=replace(base.model, **{name: value}))
        again = first_steps(other)
        assert again[1] == losses, name
        for one, two in ((drawn, again[0]), (learned, again[2])):
            assert one.keys() == two.keys(), name
            assert all(torch.equal(one[key], two[key]) for key in one), name
    shared = first_steps(experts_of(base))
    assert shared[1] == losses
    assert all(torch.equal(learned[key], shared[2][key]) for key in learned)
    for name in ("dropout", "positions", "fusion", "layers"):
        other = replace(base, model=replace(base.model, **{name: FIRST[name]}))
        assert first_steps(other)[1] != losses, f"{name}: the steps see what they should"


@pytest.mark.parametrize("name", NAMES)
def test_every_study_is_sound(name: str) -> None:
    study = study_of(name, BASE, CORPORA)
    assert study.reference in study.variants
    assert study.title
    assert study.question.endswith("?")
    configs = list(study.variants.values())
    assert all(one != other for at, one in enumerate(configs) for other in configs[:at]), (
        "no two are the same"
    )
    for config in configs:
        assert TrainConfig.from_json(config.to_json()) == config
        assert config.seed == BASE.seed, "seeds are the driver's"
    assert study.rates == (name == "missing-rate")
    assert study.loads == (name == "loads")


def changed(study: Study) -> dict[str, set[str]]:
    """Of each variant: which settings it has otherwise than the base."""
    known = flat(BASE.to_json())
    return {
        variant: {name for name, value in flat(config.to_json()).items() if value != known[name]}
        for variant, config in study.variants.items()
    }


def test_components_are_table_two_under_both_retrievals() -> None:
    variants = study_of("components", BASE, ()).variants
    names = ("model.cmr", "model.cap", "retrieval")
    assert [
        settings(variants[f"CMR{cap} ({mode})"], *names)
        for mode in ("cross", "paired")
        for cap in ("", "+CAP")
    ] == [(True, False, "cross"), (True, True, "cross"), (True, False, "paired"), (True, True, "paired")]
    assert settings(variants["CAP"], *names[:2]) == (False, True)
    without = baselines(BASE)
    assert variants["no recovery"] == without["no-recovery"]
    assert variants["no recovery, modality dropout"] == without["no-recovery-dropout"]
    assert variants["question only"] == without["question-only"]
    blind = {"question only"}
    assert len({experts_of(config) for name, config in variants.items() if name not in blind}) == 1


def test_the_strategies_of_table_three() -> None:
    result = changed(study_of("strategy", BASE, ()))
    assert result == {
        "CMR+CAP": set(),
        "without pre-training (stage II trains all)": {"stage_one.epochs", "model.freeze_experts"},
        "without mixing (stage I alone)": {"stage_two.epochs"},
        "without rank loss": {"loss.rank_weight"},
    }


def test_variants_of_one_setting_vary_that_one() -> None:
    for name, setting, values in (
        ("n", "model.neighbours", {1, 3, 5, 10}),
        ("k", "model.k", {0, 1, 2, 5}),
        ("retrieval", "retrieval", {"cross", "paired", "hybrid"}),
        ("saliency", "model.saliency", {"received", "output_norm", "literal", "random"}),
        ("rank", "loss.rank", set(get_args(LossConfig.__annotations__["rank"]))),
    ):
        study = study_of(name, BASE, ())
        assert {settings(config, setting)[0] for config in study.variants.values()} == values, name
        others = set().union(*changed(study).values()) - {setting}
        allowed = {
            "retrieval": {"negatives"},
            "saliency": {"model.cap_gradient"},
            "rank": {"loss.rank_weight"},
        }
        assert others <= allowed.get(name, set()), name
    few = replace(BASE, index=IndexSettings(n=4))
    assert list(study_of("n", few, ()).variants) == ["n = 1", "n = 3"], "no further than the index goes"
    many = replace(BASE, model=replace(BASE.model, neighbours=8, k=9))
    assert study_of("n", many, ()).reference == "n = 8"
    assert study_of("k", many, ()).reference == "k = 9"


def test_banks_of_each_corpus_and_of_none() -> None:
    narrow = replace(BASE, index=IndexSettings(bank=BankScope(corpora=("demo",))))
    variants = study_of("bank", narrow, CORPORA).variants
    banks = {name: config.index.bank.corpora for name, config in variants.items() if config.model.cmr}
    assert banks == {"all": (), "avqa": ("avqa",), "vggsound": ("vggsound",)}
    assert variants["no bank"] == baselines(narrow)["no-recovery-dropout"]


def test_variants_match_their_names_for_any_base() -> None:
    """A base with other settings must not make a variant something that its name does not say."""
    odd = replace(
        BASE,
        model=replace(BASE.model, cap=False, saliency="literal", cap_gradient="none"),
        loss=replace(BASE.loss, rank_weight=0.0),
    )
    for study in ("strategy", "missing-rate", "loads"):
        assert settings(study_of(study, odd, ()).variants["CMR+CAP"], "model.cmr", "model.cap") == (
            True,
            True,
        )
    saliency = study_of("saliency", odd, ()).variants
    names = ("model.saliency", "model.cap_gradient", "model.cap")
    assert settings(saliency["received"], *names) == ("received", "straight_through", True)
    assert settings(saliency["received, no gradient to W_proj"], *names) == ("received", "none", True)
    weights = {name: config.loss.rank_weight for name, config in study_of("rank", odd, ()).variants.items()}
    assert weights.pop("none") == 0.0
    assert set(weights.values()) == {1.0}


def test_baselines_are_trained_as_fairly() -> None:
    without = {"model.cmr", "model.cap"}
    result = {name: TrainConfig.differences(BASE, config) for name, config in baselines(BASE).items()}
    changed_settings = {name: {line.split(":")[0] for line in lines} for name, lines in result.items()}
    assert changed_settings == {
        "question-only": {"sees", "stage_two.epochs"},
        "no-recovery": without | {"loss.modality_dropout"},
        "no-recovery-dropout": without,
    }
    one_stage = replace(BASE, stage_one=StageConfig(epochs=0))
    assert baselines(one_stage)["question-only"].stage_one == BASE.stage_two, "something must train"


def test_invalid_bases_are_refused() -> None:
    with pytest.raises(UsageError, match=r"one of components, .*bank; got 'weather'"):
        study_of("weather", BASE, ())
    for changes in (
        {"stage_one": StageConfig(epochs=0)},
        {"stage_two": StageConfig(epochs=0)},
        {"sees": "question", "stage_two": StageConfig(epochs=0)},
    ):
        with pytest.raises(UsageError, match=r"stage_one\.epochs and stage_two\.epochs must be above 0"):
            study_of("components", replace(BASE, **changes), ())
