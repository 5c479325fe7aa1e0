"""Accuracy per question type and per group, always with its count and a 95 % interval."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

CONFIDENCE_Z = 1.959963984540054  # standard deviations that contain 95 % of a normal distribution
GROUP_SEPARATOR = "/"  # a type is "group/kind": Audio-Visual/Counting; one without it is a group of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """`accuracy` in [0, 1], NaN for n = 0; `interval` its 95 % Wilson interval."""

    accuracy: float
    n: int
    interval: tuple[float, float]


@dataclass(slots=True)
class AccuracyCounts:
    """Correct answers and questions, per question type; `merge` adds the counts of another worker."""

    correct: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, types: Iterable[str], correct: Iterable[bool]) -> None:
        """Count answers. ValueError unless both have one length."""
        for kind, hit in zip(types, correct, strict=True):
            self.total[kind] += 1
            self.correct[kind] += bool(hit)

    def merge(self, other: "AccuracyCounts") -> None:
        """Add other counts to these."""
        for kind, total in other.total.items():
            self.total[kind] += total
            self.correct[kind] += other.correct[kind]

    def types(self) -> dict[str, Score]:
        """Score of each question type, by name."""
        return {kind: score(self.correct[kind], self.total[kind]) for kind in sorted(self.total)}

    def groups(self) -> dict[str, Score]:
        """Micro average of each group, by name: every question counts the same."""
        groups = AccuracyCounts()
        for kind, total in self.total.items():
            group = kind.split(GROUP_SEPARATOR, 1)[0]
            groups.correct[group] += self.correct[kind]
            groups.total[group] += total
        return groups.types()

    def overall(self) -> Score:
        """Micro average over all questions."""
        return score(sum(self.correct.values()), sum(self.total.values()))


def score(correct: int, total: int) -> Score:
    """The `Score` of `correct` answers to `total` questions. ValueError unless 0 <= correct <= total."""
    accuracy = correct / total if total else math.nan
    return Score(accuracy=accuracy, n=total, interval=wilson(correct, total))


def wilson(correct: int, total: int, z: float = CONFIDENCE_Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion, within [0, 1]; of no questions: (0, 1).

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct answers must be between 0 and all questions; got {correct} of {total}")
    if not total:
        return 0.0, 1.0
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # rounding errors may leave [0, 1] where no or all answers are correct
    return max(0.0, centre - half), min(1.0, centre + half)
