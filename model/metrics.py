"""Accuracy per question type and per group, always with its count and a 95 % interval."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

CONFIDENCE_Z = 1.959963984540054  # standard deviations that hold 95 % of a normal distribution
GROUP_MARK = "/"  # a type is "group/kind": Audio-Visual/Counting; one without a mark is a group of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """`accuracy` in [0, 1], NaN for n = 0; `interval` the 95 % Wilson interval of it."""

    accuracy: float
    n: int
    interval: tuple[float, float]


@dataclass(slots=True)
class AccuracyCounts:
    """Right and asked, per question type. Two tallies (of two workers, two batches) add up with `merge`."""

    correct: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, types: Iterable[str], correct: Iterable[bool]) -> None:
        """Count answers; both of one length. ValueError otherwise."""
        for kind, hit in zip(types, correct, strict=True):
            self.total[kind] += 1
            self.correct[kind] += bool(hit)

    def merge(self, other: "AccuracyCounts") -> None:
        """Add the counts of another tally to this one."""
        for kind, asked in other.total.items():
            self.total[kind] += asked
            self.correct[kind] += other.correct[kind]

    def types(self) -> dict[str, Score]:
        """Score of each question type, by name."""
        return {kind: score(self.correct[kind], self.total[kind]) for kind in sorted(self.total)}

    def groups(self) -> dict[str, Score]:
        """Micro average of each group, by name: every question counts the same."""
        right: dict[str, int] = defaultdict(int)
        asked: dict[str, int] = defaultdict(int)
        for kind in self.total:
            group = kind.split(GROUP_MARK, 1)[0]
            right[group] += self.correct[kind]
            asked[group] += self.total[kind]
        return {group: score(right[group], asked[group]) for group in sorted(asked)}

    def overall(self) -> Score:
        """Micro average over everything."""
        return score(sum(self.correct.values()), sum(self.total.values()))


def score(correct: int, total: int) -> Score:
    """`right` of `asked` as a `Score`. ValueError unless 0 <= right <= asked."""
    accuracy = correct / total if total else math.nan
    return Score(accuracy=accuracy, n=total, interval=wilson(correct, total))


def wilson(correct: int, total: int, z: float = CONFIDENCE_Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion, within [0, 1]; nothing asked: (0, 1).

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"right answers must lie between 0 and the number asked; got {correct} of {total}")
    if not total:
        return 0.0, 1.0
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # rounding may leave a hair outside where none or all are right
    return max(0.0, centre - half), min(1.0, centre + half)
