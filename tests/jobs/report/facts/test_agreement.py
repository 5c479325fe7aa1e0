"""Agreement of neighbours equals a count by hand: in label, in answer, by rank, and by chance."""

import math

import numpy as np
import pytest

from r2scp.jobs.report.facts.agreement import (
    NO_ROW,
    Agreements,
    BankClips,
    ClipAnswer,
    answer_agreement,
    chance_agreement,
    label_agreement,
    mean_interval,
    neighbour_agreement,
)

#: Clip 0 is the query; 1 to 4 are in the bank, 4 is of the same source as 0; 5 is not in the bank.
BANK = BankClips(
    in_bank_R=np.array([False, True, True, True, True, False]), sources_R=np.array([0, 1, 2, 3, 0, 5])
)
LABELS = [["a", "b"], ["b"], ["c"], [], ["a"], ["a"]]
HITS = np.array([[1, 2, 3, NO_ROW]])


def test_clips_agree_where_they_share_a_label() -> None:
    agreements = label_agreement(LABELS, np.array([0]), HITS, BANK)
    np.testing.assert_array_equal(agreements.agree_QN, [[1, 0, math.nan, math.nan]])
    # one of the two labelled clips of other sources in the bank shares a label
    assert agreements.chance_Q[0] == pytest.approx(1 / 2)
    share = agreements.share()
    assert (share.share, share.pairs, share.clips) == (0.5, 2, 1)
    assert [one.share for one in agreements.by_rank()[:2]] == [1.0, 0.0]
    assert agreements.by_rank()[2].to_json() == {
        "share": None,
        "interval": None,
        "chance": None,
        "pairs": 0,
        "clips": 0,
    }


def test_a_clip_without_labels_is_not_comparable() -> None:
    agreements = label_agreement(LABELS, np.array([3]), HITS, BANK)
    assert np.isnan(agreements.agree_QN).all()
    assert math.isnan(agreements.share().share)
    none = label_agreement([[]] * 6, np.array([0]), HITS, BANK)
    assert none.share().pairs == 0


def test_answers_agree_where_the_same_question_has_the_same_answer() -> None:
    queries = [ClipAnswer(0, "how many?", "two"), ClipAnswer(0, "where?", "left")]
    known = [
        ClipAnswer(1, "how many?", "two"),
        ClipAnswer(2, "how many?", "one"),
        ClipAnswer(2, "how many?", "two"),  # answered twice, differently: agrees by half
        ClipAnswer(3, "how loud?", "two"),  # another question
        ClipAnswer(4, "how many?", "two"),  # of the same source as the query: not part of chance
        ClipAnswer(5, "how many?", "two"),  # not in the bank: not part of chance
    ]
    hits_RN = np.full((6, 4), NO_ROW)
    hits_RN[0] = HITS[0]
    agreements = answer_agreement(queries, known, hits_RN, BANK)
    np.testing.assert_array_equal(agreements.agree_QN[0], [1, 0.5, math.nan, math.nan])
    assert np.isnan(agreements.agree_QN[1]).all()
    assert agreements.chance_Q[0] == pytest.approx(2 / 3)
    assert math.isnan(agreements.chance_Q[1])
    share = agreements.share()
    assert share.share == pytest.approx(0.75)
    assert share.chance == pytest.approx(2 / 3)
    assert (share.pairs, share.clips) == (2, 1)


def test_the_interval_treats_clips_as_independent() -> None:
    """Ten pairs of one clip count as one; the error of the ratio is that of the textbook."""
    agree_QN = np.array([[1.0] * 5, [0.0] * 5, [1.0] * 5, [1.0, 1.0, 0.0, 0.0, 0.0]])
    agreements = Agreements(agree_QN=agree_QN, chance_Q=np.full(4, 0.5), clip_Q=np.arange(4))
    share = agreements.share()
    assert share.share == pytest.approx(12 / 20)
    residual = np.array([5, 0, 5, 2]) - 0.6 * 5
    half = 1.959963984540054 * math.sqrt(4 / 3 * (residual**2).sum()) / 20
    assert share.interval == pytest.approx((max(0.0, 0.6 - half), min(1.0, 0.6 + half)))
    together = Agreements(agree_QN=agree_QN, chance_Q=np.full(4, 0.5), clip_Q=np.zeros(4, dtype=int))
    assert together.share().interval == (0.0, 1.0)
    sure = Agreements(agree_QN=np.ones((3, 2)), chance_Q=np.full(3, 0.5), clip_Q=np.arange(3))
    assert sure.share().interval[0] == pytest.approx(3 / (3 + 1.959963984540054**2))  # Wilson, 3 of 3


def test_chance_is_weighted_by_comparable_pairs() -> None:
    agree_QN = np.array([[1.0, 1.0, 1.0], [0.0, math.nan, math.nan], [math.nan] * 3])
    agreements = Agreements(agree_QN=agree_QN, chance_Q=np.array([0.2, 0.6, 0.9]), clip_Q=np.arange(3))
    assert agreements.share().chance == pytest.approx((3 * 0.2 + 0.6) / 4)


def test_neighbours_of_vectors_agree_by_count() -> None:
    angles = np.radians([0, 1, 3, 90, 92, 180])
    vectors_QD = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[3], [1], [1], [1], [9], [1]])
    answers = ["x", "x", "y", "y", "y", "x"]
    # one nearest: 0-1, 1-0, 2-1, 3-4, 4-3, 5-4
    np.testing.assert_array_equal(neighbour_agreement(vectors_QD, answers, 1), [1, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(neighbour_agreement(vectors_QD, answers, 2)[:2], [0.5, 0.5])
    assert np.isnan(neighbour_agreement(vectors_QD[:1], ["x"], 3)).all()


def test_chance_of_two_questions_of_a_kind() -> None:
    # of three of kind p two agree: 1/2 for both, 0 for the third; the one of kind q is alone
    assert chance_agreement(["x", "x", "y", "x"], ["p", "p", "p", "q"]) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert math.isnan(chance_agreement(["x"], ["p"]))


def test_the_interval_of_a_mean() -> None:
    assert mean_interval(np.array([0.4]), np.array([7])) == (0.0, 1.0)
    low, high = mean_interval(np.array([0.2, 0.4, 0.6]), np.array([7, 1, 4]))
    half = 1.959963984540054 * 0.2 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half))
    # ten equal questions per clip count as one
    repeated = mean_interval(np.repeat([0.2, 0.4, 0.6], 10), np.repeat([7, 1, 4], 10))
    assert repeated == pytest.approx((low, high))
