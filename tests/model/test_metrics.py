"""Accuracy by type and group, against counting by hand and against the definition of Wilson's interval."""

import math

import pytest

from r2scp.model.metrics import CONFIDENCE_Z, AccuracyCounts, score, wilson


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (3, 10), (999, 1000)])
def test_wilson_bounds_solve_the_score_equation(correct: int, total: int) -> None:
    """Both bounds p satisfy |p̂ - p| = z·sqrt(p(1-p)/n), which defines the interval."""
    share = correct / total
    low, high = wilson(correct, total)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        spread = CONFIDENCE_Z * math.sqrt(bound * (1 - bound) / total)
        assert abs(abs(share - bound) - spread) < 1e-9


def test_wilson_at_published_values() -> None:
    # 81 of 263 and 0 of 20, in Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert [round(bound, 4) for bound in wilson(81, 263)] == [0.2553, 0.3662]
    assert [round(bound, 4) for bound in wilson(0, 20)] == [0.0, 0.1611]


def test_no_questions_give_no_accuracy() -> None:
    empty = score(0, 0)
    assert math.isnan(empty.accuracy)
    assert empty.interval == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 of 4"):
        wilson(5, 4)


def test_types_groups_and_micro_average() -> None:
    counts = AccuracyCounts()
    counts.add(["Audio/Counting"] * 3 + ["Audio/Comparative"], [True, True, False, False])
    counts.add(["Visual/Counting", "Happening"], [True, False])
    assert {kind: (part.accuracy, part.n) for kind, part in counts.types().items()} == {
        "Audio/Comparative": (0.0, 1),
        "Audio/Counting": (2 / 3, 3),
        "Happening": (0.0, 1),
        "Visual/Counting": (1.0, 1),
    }
    # micro: 2 of 4, not the mean of 2/3 and 0
    assert {group: part.accuracy for group, part in counts.groups().items()} == {
        "Audio": 0.5,
        "Happening": 0.0,
        "Visual": 1.0,
    }
    assert (counts.overall().accuracy, counts.overall().n) == (0.5, 6)


def test_counts_of_two_workers_add_up() -> None:
    whole, left, correct = AccuracyCounts(), AccuracyCounts(), AccuracyCounts()
    kinds, hits = ["a", "b", "a", "c"], [True, False, True, True]
    whole.add(kinds, hits)
    left.add(kinds[:2], hits[:2])
    correct.add(kinds[2:], hits[2:])
    left.merge(correct)
    assert left.types() == whole.types()


def test_every_answer_needs_its_type() -> None:
    with pytest.raises(ValueError, match="shorter"):
        AccuracyCounts().add(["a", "b"], [True])
