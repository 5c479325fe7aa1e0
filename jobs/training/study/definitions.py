"""The studies of SPEC.md: which trainings each needs. A study is a list of variants of one config.

Every variant is trained with every seed, and all of one seed begin with the same experts where stage I is the
same for them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from r2scp.jobs.training.config import NO_RECOVERY, NO_RECOVERY_DROPOUT, TrainConfig, baselines
from r2scp.model.losses import LossConfig, Rank
from r2scp.store.errors import UsageError
from r2scp.store.schema import Retrieval

FULL = "CMR+CAP"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """`variants` by name, in the order of the table; differences are told from `against`.

    `rates`: also evaluated where a modality is missing now and then. `loads`: the router's weights over
    training are told too.
    """

    title: str
    asks: str  # what it is to find out
    variants: dict[str, TrainConfig]
    against: str
    rates: bool = False
    loads: bool = False


def components(base: TrainConfig) -> Study:
    """Table 2, under `cross` and `paired` retrieval, with both baselines without recovery."""
    without = baselines(base)
    variants = {
        "question only": without["question-only"],
        "no recovery": without[NO_RECOVERY],
        "no recovery, modality dropout": without[NO_RECOVERY_DROPOUT],
        "CAP": _model(base, cmr=False, cap=True),
    }
    for retrieval in (Retrieval.CROSS, Retrieval.PAIRED):
        found = replace(base, retrieval=retrieval)
        variants[f"CMR ({retrieval})"] = _model(found, cmr=True, cap=False)
        variants[f"CMR+CAP ({retrieval})"] = _model(found, cmr=True, cap=True)
    return Study(
        title="Components (Table 2)",
        asks="What do retrieval (CMR) and purification (CAP) add to a model that drops what is missing?",
        variants=variants,
        against="no recovery, modality dropout",
    )


def strategy(base: TrainConfig) -> Study:
    """Table 3."""
    base = _model(base, cmr=True, cap=True)
    return Study(
        title="Training strategy (Table 3)",
        asks="What do the two stages and the rank loss add?",
        variants={
            FULL: base,
            "without pre-training (stage II trains all)": replace(
                _model(base, freeze_experts=False), stage_one=replace(base.stage_one, epochs=0)
            ),
            "without mixing (stage I alone)": replace(base, stage_two=replace(base.stage_two, epochs=0)),
            "without rank loss": replace(base, loss=replace(base.loss, rank_weight=0.0)),
        },
        against=FULL,
    )


def retrieval(base: TrainConfig) -> Study:
    """Whose key a query is compared with, and which negatives the rank loss sees."""
    variants = {mode.value: replace(base, retrieval=mode) for mode in Retrieval}
    variants["random negatives"] = replace(base, negatives="random")
    return Study(
        title="Retrieval",
        asks="Whose key should a query be compared with? Must negatives be the farthest?",
        variants=variants,
        against=base.retrieval.value,
    )


def bank(base: TrainConfig, corpora: tuple[str, ...]) -> Study:
    """Table 4: banks of other corpora. Each needs its own `index --bank-corpus`."""
    variants = {"no bank": baselines(base)[NO_RECOVERY_DROPOUT]}
    for name, serving in {"all": (), **{corpus: (corpus,) for corpus in corpora}}.items():
        scope = replace(base.index.bank, corpora=serving)
        variants[name] = replace(base, index=replace(base.index, bank=scope))
    return Study(
        title="Bank corpus (Table 4)",
        asks="Whose clips should stand in for what is missing?",
        variants=variants,
        against="no bank",
    )


def neighbours(base: TrainConfig) -> Study:
    """Figure 4, left; as far as the index goes."""
    amounts = sorted({1, 3, 5, 10, base.model.neighbours})
    return Study(
        title="Neighbours n (Fig. 4)",
        asks="How many clips should stand in for what is missing?",
        variants={f"n = {n}": _model(base, neighbours=n) for n in amounts if n <= base.index.n},
        against=f"n = {base.model.neighbours}",
    )


def budget(base: TrainConfig) -> Study:
    """Figure 4, right."""
    amounts = sorted({0, 1, 2, 5, base.model.k})
    return Study(
        title="Purification budget k (Fig. 4)",
        asks="How many tokens should give way?",
        variants={f"k = {k}": _model(base, k=k) for k in amounts},
        against=f"k = {base.model.k}",
    )


def saliency(base: TrainConfig) -> Study:
    """What the paper's saliency, a constant, costs; and the other readings of CAP."""
    base = _model(base, cap=True, cap_gradient="straight_through")
    return Study(
        title="Saliency and gradient of CAP",
        asks="What does the paper's saliency, which is constant, cost? Does W_proj need its gradient?",
        variants={
            "received": _model(base, saliency="received"),
            "output_norm": _model(base, saliency="output_norm"),
            "literal (the paper)": _model(base, saliency="literal"),
            "random": _model(base, saliency="random"),
            "received, no gradient to W_proj": _model(base, saliency="received", cap_gradient="none"),
        },
        against="received",
    )


def rank(base: TrainConfig) -> Study:
    """The rank loss and its readings."""
    weight = base.loss.rank_weight or LossConfig().rank_weight

    def ranked(rank: Rank) -> TrainConfig:
        return replace(base, loss=replace(base.loss, rank=rank, rank_weight=weight))

    return Study(
        title="Rank loss",
        asks="Which side of the rank loss may move?",
        variants={
            "stop-gradient": ranked("stopgrad"),
            "the paper": ranked("paper"),
            "the release": ranked("release"),
            "none": replace(base, loss=replace(base.loss, rank_weight=0.0)),
        },
        against="none",
    )


def missing_rate(base: TrainConfig) -> Study:
    """Figure 5."""
    base = _model(base, cmr=True, cap=True)
    without = baselines(base)
    return Study(
        title="Missing rate (Fig. 5)",
        asks="How do models hold out where a modality is missing now and then?",
        variants={
            "no recovery": without[NO_RECOVERY],
            "no recovery, modality dropout": without[NO_RECOVERY_DROPOUT],
            FULL: base,
        },
        against="no recovery, modality dropout",
        rates=True,
    )


def loads(base: TrainConfig) -> Study:
    """Figure 6."""
    base = _model(base, cmr=True, cap=True)
    return Study(
        title="Expert loads over training (Fig. 6)",
        asks="Whom does the router listen to?",
        variants={FULL: base},
        against=FULL,
        loads=True,
    )


#: All but that of banks, which needs to know the corpora.
STUDIES: dict[str, Callable[[TrainConfig], Study]] = {
    "components": components,
    "strategy": strategy,
    "retrieval": retrieval,
    "n": neighbours,
    "k": budget,
    "saliency": saliency,
    "rank": rank,
    "missing-rate": missing_rate,
    "loads": loads,
}


def study_of(name: str, base: TrainConfig, corpora: tuple[str, ...]) -> Study:
    """The study of that name. `corpora`: of the store's clips, for the study of banks.

    Raises `UsageError` for a name that is none, and for settings under which it cannot be.
    """
    if name != "bank" and name not in STUDIES:
        raise UsageError(f"a study is one of {', '.join((*STUDIES, 'bank'))}; got {name!r}")
    if base.sees == "question" or not (base.stage_one.epochs and base.stage_two.epochs):
        raise UsageError(
            "a study varies a training of both stages that sees everything: stage_one.epochs and "
            "stage_two.epochs must be above 0, and sees must be everything"
        )
    return bank(base, corpora) if name == "bank" else STUDIES[name](base)


def _model(config: TrainConfig, **settings: object) -> TrainConfig:
    return replace(config, model=replace(config.model, **settings))
