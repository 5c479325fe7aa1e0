"""Whether what retrieval found agrees with what it stands in for.

Two clips agree in label where they have one in common. They agree in answer where both are asked the same
question, word for word, and the answer is the same; where they are not, nothing can be told. Beside each
share stands what clips drawn from the bank at random would give on the same queries.

Legend: Q queries, N hits of one, best first; R clips, by row; U different sets of labels, V labels.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from r2scp.model.metrics import CONFIDENCE_Z, wilson

NO_ROW = -1  # in hits: there is none


class ClipAnswer(NamedTuple):
    """What one question says of one clip."""

    clip: int  # row
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BankClips:
    """What may serve: `serves_R` bool, and `sources_R`, a number for where each clip comes from."""

    serves_R: np.ndarray
    sources_R: np.ndarray

    def others(self, clip: int) -> np.ndarray:
        """Rows that may serve a clip: none of its own source."""
        return np.flatnonzero(self.in_bank_R & (self.sources_R != self.sources_R[clip]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreements:
    """`agree_QN`: 1 agrees, 0 does not, NaN cannot be told. `chance_Q`: the same of the bank at random.

    `clip_Q`: whose queries belong together, being of one clip.
    """

    agree_QN: np.ndarray
    chance_Q: np.ndarray
    clip_Q: np.ndarray

    def share(self, ranks: slice = slice(None)) -> "Share":
        """Of all pairs at these ranks; its interval takes the clips, not the pairs, to be independent."""
        agree_QN = self.agree_QN[:, ranks]
        told_Q = (~np.isnan(agree_QN)).sum(axis=1)
        pairs = int(told_Q.sum())
        if not pairs:
            return Share(share=math.nan, interval=(0.0, 1.0), chance=math.nan, pairs=0, clips=0)
        agreed_Q = np.nansum(agree_QN, axis=1)
        clips, at_Q = np.unique(self.clip_Q[told_Q > 0], return_inverse=True)
        agreed_C = np.bincount(at_Q, weights=agreed_Q[told_Q > 0])
        told_C = np.bincount(at_Q, weights=told_Q[told_Q > 0])
        drawn_Q = np.where(np.isnan(self.chance_Q), 0, told_Q)
        chance = float((np.nan_to_num(self.chance_Q) * drawn_Q).sum() / max(drawn_Q.sum(), 1))
        return Share(
            share=float(agreed_Q.sum()) / pairs,
            interval=_interval(agreed_C, told_C),
            chance=chance,
            pairs=pairs,
            clips=len(clips),
        )

    def by_rank(self) -> "list[Share]":
        """The share at each rank, the best hit first."""
        return [self.share(slice(rank, rank + 1)) for rank in range(self.agree_QN.shape[1])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Of `pairs` of a query and a hit, of `clips` clips; `interval` of 95 %. NaN where there is no pair."""

    share: float
    interval: tuple[float, float]
    chance: float
    pairs: int
    clips: int

    def to_json(self) -> dict[str, object]:
        """Plain values; None for what is not there."""
        told = bool(self.pairs)
        return {
            "share": self.share if told else None,
            "interval": list(self.interval) if told else None,
            "chance": self.chance if told else None,
            "pairs": self.pairs,
            "clips": self.clips,
        }


def label_agreement(
    labels: Sequence[Sequence[str]], queries_Q: np.ndarray, hits_QN: np.ndarray, bank: BankClips
) -> Agreements:
    """`labels` of all clips, by row; a clip without any can be told nothing of."""
    sets, set_R = _distinct(labels)
    number = {label: at for at, label in enumerate(sorted({label for one in sets for label in one}))}
    has_UV = np.zeros((len(sets), max(len(number), 1)), dtype=np.float32)
    for at, one in enumerate(sets):
        has_UV[at, [number[label] for label in one]] = 1
    labelled_U = np.logical_or.reduce(has_UV > 0, axis=1)
    agree_QN = np.full(hits_QN.shape, math.nan)
    chance_Q = np.full(len(queries_Q), math.nan)
    for at, clip in enumerate(queries_Q):
        if not labelled_U[set_R[clip]]:
            continue
        meets_U = np.greater(has_UV @ has_UV[set_R[clip]], 0)
        hits_N = hits_QN[at]
        told_N = (hits_N != NO_ROW) & labelled_U[set_R[hits_N]]
        agree_QN[at, told_N] = meets_U[set_R[hits_N[told_N]]]
        drawn = set_R[bank.others(clip)]
        drawn = drawn[labelled_U[drawn]]
        if len(drawn):
            chance_Q[at] = meets_U[drawn].mean()
    return Agreements(agree_QN=agree_QN, chance_Q=chance_Q, clip_Q=np.asarray(queries_Q))


def answer_agreement(
    asked: Sequence[ClipAnswer], known: Sequence[ClipAnswer], hits_RN: np.ndarray, bank: BankClips
) -> Agreements:
    """A query is a question of `asked`; `known` are those of which a hit's answers are told.

    A hit that answers the question twice, differently, agrees in part.
    """
    said: dict[tuple[int, str], list[str]] = defaultdict(list)
    bank_said: dict[str, Counter[str]] = defaultdict(Counter)
    own_said: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for fact in known:
        said[fact.clip, fact.question].append(fact.answer)
        if bank.in_bank_R[fact.clip]:
            bank_said[fact.question][fact.answer] += 1
            own_said[fact.question, int(bank.sources_R[fact.clip])][fact.answer] += 1
    agree_QN = np.full((len(asked), hits_RN.shape[1]), math.nan)
    chance_Q = np.full(len(asked), math.nan)
    for at, fact in enumerate(asked):
        for rank, hit in enumerate(hits_RN[fact.clip]):
            answers = said.get((int(hit), fact.question)) if hit != NO_ROW else None
            if answers:
                agree_QN[at, rank] = answers.count(fact.answer) / len(answers)
        drawn, own = bank_said[fact.question], own_said[fact.question, int(bank.sources_R[fact.clip])]
        if total := drawn.total() - own.total():
            chance_Q[at] = (drawn[fact.answer] - own[fact.answer]) / total
    return Agreements(
        agree_QN=agree_QN, chance_Q=chance_Q, clip_Q=np.array([fact.clip for fact in asked], dtype=np.int64)
    )


def neighbour_agreement(vectors_QD: np.ndarray, answers: Sequence[str], k: int) -> np.ndarray:
    """(Q,): which share of the k nearest others of each vector, by cosine, has the same answer.

    Ties go to the one that comes first. NaN where there are no others.
    """
    count = len(answers)
    k = min(k, count - 1)
    if k < 1:
        return np.full(count, math.nan)
    unit_QD = vectors_QD / np.maximum(np.linalg.norm(vectors_QD, axis=1, keepdims=True), 1e-12)
    scores_QQ = unit_QD @ unit_QD.T
    np.fill_diagonal(scores_QQ, -np.inf)
    nearest_QN = np.argsort(-scores_QQ, axis=1, kind="stable")[:, :k]
    number_Q = np.unique(np.asarray(answers), return_inverse=True)[1]
    return (number_Q[nearest_QN] == number_Q[:, None]).mean(axis=1)


def chance_agreement(answers: Sequence[str], kinds: Sequence[str]) -> float:
    """How often two different questions of one kind, drawn at random, have the same answer: the mean over
    questions, those that are alone in their kind left out. NaN where all are."""
    size, same = Counter(kinds), Counter(zip(kinds, answers, strict=True))
    told = [
        (same[kind, answer] - 1) / (size[kind] - 1)
        for kind, answer in zip(kinds, answers, strict=True)
        if size[kind] > 1
    ]
    return float(np.mean(told)) if told else math.nan


def mean_interval(values_Q: np.ndarray, clip_Q: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of shares, within [0, 1]; it takes clips, not questions, to be independent.

    `clip_Q`: whose questions belong together.
    """
    at_Q = np.unique(clip_Q, return_inverse=True)[1]
    return _interval(np.bincount(at_Q, weights=values_Q), np.bincount(at_Q).astype(float))


def _interval(agreed_C: np.ndarray, told_C: np.ndarray) -> tuple[float, float]:
    """95 % interval of a ratio of sums over clips, by its linearisation (W. G. Cochran, "Sampling
    Techniques", 1977, section 6.4); Wilson's for the number of clips where all or none agree."""
    clips, share = len(told_C), agreed_C.sum() / told_C.sum()
    if clips < 2:
        return 0.0, 1.0
    if share in (0.0, 1.0):
        return wilson(round(share * clips), clips)
    residual_C = agreed_C - share * told_C
    error = math.sqrt(clips / (clips - 1) * float(np.square(residual_C).sum())) / told_C.sum()
    half = CONFIDENCE_Z * error
    return max(0.0, float(share - half)), min(1.0, float(share + half))


def _distinct(labels: Sequence[Sequence[str]]) -> tuple[list[frozenset[str]], np.ndarray]:
    """The different sets of labels, and the number of each clip's."""
    numbers: dict[frozenset[str], int] = {}
    set_R = np.array([numbers.setdefault(frozenset(one), len(numbers)) for one in labels], dtype=np.int64)
    return list(numbers), set_R
