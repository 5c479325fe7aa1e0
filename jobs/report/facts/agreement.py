"""Whether retrieved clips agree with the clip they were retrieved for, in label and in answer.

Two clips agree in label if they share one. They agree in answer if both have the same question, word for
word, with the same answer; without a common question the pair is not comparable. Each share comes with
chance: the same share for clips drawn from the memory bank at random, for the same queries.

Legend: Q queries, N hits per query, best first; C clips with a query; R clips, by row; U distinct label sets,
V labels.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from r2scp.model.metrics import CONFIDENCE_Z, wilson

NO_ROW = -1  # in hits: no hit


class ClipAnswer(NamedTuple):
    """The answer to one question about one clip."""

    clip: int  # row
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BankClips:
    """The clips that can be retrieved: `in_bank_R` bool; `sources_R`: the number of each clip's source."""

    in_bank_R: np.ndarray
    sources_R: np.ndarray

    def candidates(self, clip: int) -> np.ndarray:
        """Rows that can be retrieved for a clip: those in the bank, of other sources."""
        return np.flatnonzero(self.in_bank_R & (self.sources_R != self.sources_R[clip]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreements:
    """`agree_QN`: 1 agrees, 0 does not, NaN is not comparable. `chance_Q`: the same for random clips.

    `clip_Q`: the clip of each query.
    """

    agree_QN: np.ndarray
    chance_Q: np.ndarray
    clip_Q: np.ndarray

    def share(self, ranks: slice = slice(None)) -> "Share":
        """Over all pairs at these ranks; the interval treats clips, not pairs, as independent."""
        agree_QN = self.agree_QN[:, ranks]
        comparable_Q = (~np.isnan(agree_QN)).sum(axis=1)
        pairs = int(comparable_Q.sum())
        if not pairs:
            return Share(share=math.nan, interval=(0.0, 1.0), chance=math.nan, pairs=0, clips=0)
        agreed_Q = np.nansum(agree_QN, axis=1)
        clips, at_Q = np.unique(self.clip_Q[comparable_Q > 0], return_inverse=True)
        agreed_C = np.bincount(at_Q, weights=agreed_Q[comparable_Q > 0])
        comparable_C = np.bincount(at_Q, weights=comparable_Q[comparable_Q > 0])
        weight_Q = np.where(np.isnan(self.chance_Q), 0, comparable_Q)
        chance = float((np.nan_to_num(self.chance_Q) * weight_Q).sum() / max(weight_Q.sum(), 1))
        return Share(
            share=float(agreed_Q.sum()) / pairs,
            interval=_interval(agreed_C, comparable_C),
            chance=chance,
            pairs=pairs,
            clips=len(clips),
        )

    def by_rank(self) -> "list[Share]":
        """The share at each rank, best hit first."""
        return [self.share(slice(rank, rank + 1)) for rank in range(self.agree_QN.shape[1])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Over `pairs` of a query and a hit, from `clips` clips; 95 % `interval`. NaN without pairs."""

    share: float
    interval: tuple[float, float]
    chance: float
    pairs: int
    clips: int

    def to_json(self) -> dict[str, object]:
        """Plain values; None without pairs."""
        comparable = bool(self.pairs)
        return {
            "share": self.share if comparable else None,
            "interval": list(self.interval) if comparable else None,
            "chance": self.chance if comparable else None,
            "pairs": self.pairs,
            "clips": self.clips,
        }


def label_agreement(
    labels: Sequence[Sequence[str]], queries_Q: np.ndarray, hits_QN: np.ndarray, bank: BankClips
) -> Agreements:
    """`labels` of all clips, by row; a clip without labels is not comparable."""
    sets, set_R = _distinct_sets(labels)
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
        overlaps_U = np.greater(has_UV @ has_UV[set_R[clip]], 0)
        hits_N = hits_QN[at]
        comparable_N = (hits_N != NO_ROW) & labelled_U[set_R[hits_N]]
        agree_QN[at, comparable_N] = overlaps_U[set_R[hits_N[comparable_N]]]
        candidates = set_R[bank.candidates(clip)]
        candidates = candidates[labelled_U[candidates]]
        if len(candidates):
            chance_Q[at] = overlaps_U[candidates].mean()
    return Agreements(agree_QN=agree_QN, chance_Q=chance_Q, clip_Q=np.asarray(queries_Q))


def answer_agreement(
    queries: Sequence[ClipAnswer], known: Sequence[ClipAnswer], hits_RN: np.ndarray, bank: BankClips
) -> Agreements:
    """`queries`: one per question; `known`: the answers of hits. `hits_RN` by clip.

    A hit with several answers to the question agrees in part.
    """
    answers: dict[tuple[int, str], list[str]] = defaultdict(list)
    bank_answers: dict[str, Counter[str]] = defaultdict(Counter)
    source_answers: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for item in known:
        answers[item.clip, item.question].append(item.answer)
        if bank.in_bank_R[item.clip]:
            bank_answers[item.question][item.answer] += 1
            source_answers[item.question, int(bank.sources_R[item.clip])][item.answer] += 1
    agree_QN = np.full((len(queries), hits_RN.shape[1]), math.nan)
    chance_Q = np.full(len(queries), math.nan)
    for at, item in enumerate(queries):
        for rank, hit in enumerate(hits_RN[item.clip]):
            given = answers.get((int(hit), item.question)) if hit != NO_ROW else None
            if given:
                agree_QN[at, rank] = given.count(item.answer) / len(given)
        bank_counts = bank_answers[item.question]
        own_counts = source_answers[item.question, int(bank.sources_R[item.clip])]
        if total := bank_counts.total() - own_counts.total():
            chance_Q[at] = (bank_counts[item.answer] - own_counts[item.answer]) / total
    return Agreements(
        agree_QN=agree_QN, chance_Q=chance_Q, clip_Q=np.array([item.clip for item in queries], dtype=np.int64)
    )


def neighbour_agreement(vectors_QD: np.ndarray, answers: Sequence[str], k: int) -> np.ndarray:
    """(Q,): the share of the k nearest other vectors, by cosine, with the same answer.

    Ties go to the first. NaN for a single vector.
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
    """How often two random questions of one kind have the same answer: the mean over questions, without
    those that are the only one of their kind. NaN if all are."""
    size, same = Counter(kinds), Counter(zip(kinds, answers, strict=True))
    shares = [
        (same[kind, answer] - 1) / (size[kind] - 1)
        for kind, answer in zip(kinds, answers, strict=True)
        if size[kind] > 1
    ]
    return float(np.mean(shares)) if shares else math.nan


def mean_interval(values_Q: np.ndarray, clip_Q: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of shares, within [0, 1]; treats clips, not questions, as independent.

    `clip_Q`: the clip of each question.
    """
    at_Q = np.unique(clip_Q, return_inverse=True)[1]
    return _interval(np.bincount(at_Q, weights=values_Q), np.bincount(at_Q).astype(float))


def _interval(agreed_C: np.ndarray, comparable_C: np.ndarray) -> tuple[float, float]:
    """95 % interval of a ratio of sums over clips, by its linearisation (W. G. Cochran, "Sampling
    Techniques", 1977, section 6.4); Wilson's, over clips, where all or none agree."""
    clips, share = len(comparable_C), agreed_C.sum() / comparable_C.sum()
    if clips < 2:
        return 0.0, 1.0
    if share in (0.0, 1.0):
        return wilson(round(share * clips), clips)
    residual_C = agreed_C - share * comparable_C
    error = math.sqrt(clips / (clips - 1) * float(np.square(residual_C).sum())) / comparable_C.sum()
    half = CONFIDENCE_Z * error
    return max(0.0, float(share - half)), min(1.0, float(share + half))


def _distinct_sets(labels: Sequence[Sequence[str]]) -> tuple[list[frozenset[str]], np.ndarray]:
    """The distinct label sets, and the number of each clip's set."""
    numbers: dict[frozenset[str], int] = {}
    set_R = np.array([numbers.setdefault(frozenset(one), len(numbers)) for one in labels], dtype=np.int64)
    return list(numbers), set_R
