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
class Tally:
    """Right and asked, per question type. Two tallies (of two workers, two batches) add up with `merge`."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, types: Iterable[str], correct: Iterable[bool]) -> None:
        """Count answers; both of one length. ValueError otherwise."""
        for kind, hit in zip(types, correct, strict=True):
            self.asked[kind] += 1
            self.right[kind] += bool(hit)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another tally to this one."""
        for kind, asked in other.asked.items():
            self.asked[kind] += asked
            self.right[kind] += other.right[kind]

    def types(self) -> dict[str, Score]:
        """Score of each question type, by name."""
        return {kind: score(self.right[kind], self.asked[kind]) for kind in sorted(self.asked)}

    def groups(self) -> dict[str, Score]:
        """Micro average of each group, by name: every question counts the same."""
        right: dict[str, int] = defaultdict(int)
        asked: dict[str, int] = defaultdict(int)
        for kind in self.asked:
            group = kind.split(GROUP_MARK, 1)[0]
            right[group] += self.right[kind]
            asked[group] += self.asked[kind]
        return {group: score(right[group], asked[group]) for group in sorted(asked)}

    def overall(self) -> Score:
        """Micro average over everything."""
        return score(sum(self.right.values()), sum(self.asked.values()))


def score(right: int, asked: int) -> Score:
    """`right` of `asked` as a `Score`. ValueError unless 0 <= right <= asked."""
    accuracy = right / asked if asked else math.nan
    return Score(accuracy=accuracy, n=asked, interval=wilson(right, asked))


def wilson(right: int, asked: int, z: float = CONFIDENCE_Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion, within [0, 1]; nothing asked: (0, 1).

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= right <= asked:
        raise ValueError(f"right answers must lie between 0 and the number asked; got {right} of {asked}")
    if not asked:
        return 0.0, 1.0
    share, spread = right / asked, z * z / asked
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # rounding may leave a hair outside where none or all are right
    return max(0.0, centre - half), min(1.0, centre + half)
