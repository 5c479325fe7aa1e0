"""The studies: the paper's ablations and ours, each a list of variants of one config.

Every variant is trained with every seed; all variants of a seed that have the same stage I share its experts.
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
    """`variants` by name, in the order of the table; differences are from the variant `reference`.

    `rates`: also evaluate at missing rates. `loads`: also report the router's weights over training.
    """

    title: str
    question: str
    variants: dict[str, TrainConfig]
    reference: str
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
        retrieved = replace(base, retrieval=retrieval)
        variants[f"CMR ({retrieval})"] = _model(retrieved, cmr=True, cap=False)
        variants[f"CMR+CAP ({retrieval})"] = _model(retrieved, cmr=True, cap=True)
    return Study(
        title="Components (Table 2)",
        question="What do retrieval (CMR) and purification (CAP) add to a model that drops what is missing?",
        variants=variants,
        reference="no recovery, modality dropout",
    )


def strategy(base: TrainConfig) -> Study:
    """Table 3."""
    base = _model(base, cmr=True, cap=True)
    return Study(
        title="Training strategy (Table 3)",
        question="What do the two stages and the rank loss add?",
        variants={
            FULL: base,
            "without pre-training (stage II trains all)": replace(
                _model(base, freeze_experts=False), stage_one=replace(base.stage_one, epochs=0)
            ),
            "without mixing (stage I alone)": replace(base, stage_two=replace(base.stage_two, epochs=0)),
            "without rank loss": replace(base, loss=replace(base.loss, rank_weight=0.0)),
        },
        reference=FULL,
    )


def retrieval(base: TrainConfig) -> Study:
    """Which keys a query is compared with, and which negatives the rank loss uses."""
    variants = {mode.value: replace(base, retrieval=mode) for mode in Retrieval}
    variants["random negatives"] = replace(base, negatives="random")
    return Study(
        title="Retrieval",
        question="Whose key should a query be compared with? Must negatives be the farthest?",
        variants=variants,
        reference=base.retrieval.value,
    )


def bank(base: TrainConfig, corpora: tuple[str, ...]) -> Study:
    """Table 4: banks of other corpora. Each needs its own `index --bank-corpus`."""
    variants = {"no bank": baselines(base)[NO_RECOVERY_DROPOUT]}
    for name, serving in {"all": (), **{corpus: (corpus,) for corpus in corpora}}.items():
        scope = replace(base.index.bank, corpora=serving)
        variants[name] = replace(base, index=replace(base.index, bank=scope))
    return Study(
        title="Bank corpus (Table 4)",
        question="Whose clips should be retrieved for a missing modality?",
        variants=variants,
        reference="no bank",
    )


def neighbours(base: TrainConfig) -> Study:
    """Figure 4, left, up to the number of neighbours in the index."""
    amounts = sorted({1, 3, 5, 10, base.model.neighbours})
    return Study(
        title="Neighbours n (Fig. 4)",
        question="How many clips should be retrieved for a missing modality?",
        variants={f"n = {n}": _model(base, neighbours=n) for n in amounts if n <= base.index.n},
        reference=f"n = {base.model.neighbours}",
    )


def budget(base: TrainConfig) -> Study:
    """Figure 4, right."""
    amounts = sorted({0, 1, 2, 5, base.model.k})
    return Study(
        title="Purification budget k (Fig. 4)",
        question="How many tokens should be replaced?",
        variants={f"k = {k}": _model(base, k=k) for k in amounts},
        reference=f"k = {base.model.k}",
    )


def saliency(base: TrainConfig) -> Study:
    """What the paper's saliency, which is a constant, costs; and other readings of CAP."""
    base = _model(base, cap=True, cap_gradient="straight_through")
    return Study(
        title="Saliency and gradient of CAP",
        question="What does the paper's saliency, which is constant, cost? Does W_proj need its gradient?",
        variants={
            "received": _model(base, saliency="received"),
            "output_norm": _model(base, saliency="output_norm"),
            "literal (the paper)": _model(base, saliency="literal"),
            "random": _model(base, saliency="random"),
            "received, no gradient to W_proj": _model(base, saliency="received", cap_gradient="none"),
        },
        reference="received",
    )


def rank(base: TrainConfig) -> Study:
    """Readings of the rank loss."""
    weight = base.loss.rank_weight or LossConfig().rank_weight

    def ranked(rank: Rank) -> TrainConfig:
        return replace(base, loss=replace(base.loss, rank=rank, rank_weight=weight))

    return Study(
        title="Rank loss",
        question="Which side of the rank loss should receive gradients?",
        variants={
            "stop-gradient": ranked("stopgrad"),
            "the paper": ranked("paper"),
            "the release": ranked("release"),
            "none": replace(base, loss=replace(base.loss, rank_weight=0.0)),
        },
        reference="none",
    )


def missing_rate(base: TrainConfig) -> Study:
    """Figure 5."""
    base = _model(base, cmr=True, cap=True)
    without = baselines(base)
    return Study(
        title="Missing rate (Fig. 5)",
        question="How does accuracy fall with the share of questions whose modality is missing?",
        variants={
            "no recovery": without[NO_RECOVERY],
            "no recovery, modality dropout": without[NO_RECOVERY_DROPOUT],
            FULL: base,
        },
        reference="no recovery, modality dropout",
        rates=True,
    )


def loads(base: TrainConfig) -> Study:
    """Figure 6."""
    base = _model(base, cmr=True, cap=True)
    return Study(
        title="Expert loads over training (Fig. 6)",
        question="Which experts does the router weight over training?",
        variants={FULL: base},
        reference=FULL,
        loads=True,
    )


#: All but `bank`, which needs the store's corpora.
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
    """The study of that name. `corpora`: the store's, for the study `bank`.

    Raises `UsageError` for an unknown name and for settings that no study can vary.
    """
    if name != "bank" and name not in STUDIES:
        raise UsageError(f"a study must be one of {', '.join((*STUDIES, 'bank'))}; got {name!r}")
    if base.sees == "question" or not (base.stage_one.epochs and base.stage_two.epochs):
        raise UsageError(
            "a study varies a training of both stages with sound and picture: stage_one.epochs and "
            "stage_two.epochs must be above 0, and sees must be everything"
        )
    return bank(base, corpora) if name == "bank" else STUDIES[name](base)


def _model(config: TrainConfig, **settings: object) -> TrainConfig:
    return replace(config, model=replace(config.model, **settings))
