"""The decoder listens to the question and to real tokens only; both answer heads; the sum of the heads."""

import math

import pytest
import torch
import torch.nn.functional as F

from r2scp.model.batch import Question, Tokens
from r2scp.model.decoder import ChoiceScores, Decoder, Heads
from r2scp.model.experts import Sizes

SIZES = Sizes(encoder_dim=6, dim=8, heads=2, ffn=8, dropout=0.0)


def some_tokens(rows: int = 2, length: int = 4) -> Tokens:
    return Tokens(torch.randn(rows, length, 8), torch.ones(rows, length, dtype=torch.bool))


def make_question(choices: bool = False, rows: int = 2) -> Question:
    sentence_BC = F.normalize(torch.randn(rows, 6), dim=-1)
    if not choices:
        return Question(sentence_BC, None, None)
    mask_BK = torch.ones(rows, 4, dtype=torch.bool)
    mask_BK[-1, 2] = False
    return Question(sentence_BC, F.normalize(torch.randn(rows, 4, 6), dim=-1), mask_BK)


@torch.no_grad()
def test_the_answer_depends_on_the_question_and_on_the_tokens() -> None:
    torch.manual_seed(0)
    decoder, tokens, question = Decoder(SIZES, 5).eval(), some_tokens(), make_question()
    logits_BK = decoder(tokens, question)
    assert logits_BK.shape == (2, 5)
    assert not torch.allclose(decoder(tokens, make_question()), logits_BK)
    assert not torch.allclose(decoder(some_tokens(), question), logits_BK)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    decoder, tokens, question = Decoder(SIZES, 5).eval(), some_tokens(), make_question()
    padded = Tokens(F.pad(tokens.states_BLD, (0, 0, 0, 3), value=7.0), F.pad(tokens.mask_BL, (0, 3)))
    torch.testing.assert_close(decoder(padded, question), decoder(tokens, question), rtol=0, atol=1e-6)


def test_a_choice_scores_the_dot_product_of_both_projections() -> None:
    torch.manual_seed(0)
    head, joint_BD, question = ChoiceScores(SIZES), torch.randn(2, 8), make_question(choices=True)
    assert question.choices_BKC is not None
    assert question.choices_mask_BK is not None
    scores_BK = head(joint_BD, question.choices_BKC, question.choices_mask_BK)
    for row in range(2):
        for choice in range(4):
            if not question.choices_mask_BK[row, choice]:
                assert scores_BK[row, choice] == -math.inf
                continue
            projected_D = head.choice.weight @ question.choices_BKC[row, choice] * math.sqrt(6)
            expected = (head.joint(joint_BD[row]) @ projected_D) / math.sqrt(8)
            torch.testing.assert_close(scores_BK[row, choice], expected)


def test_a_missing_choice_takes_no_probability_no_gradient_and_may_be_nan() -> None:
    torch.manual_seed(0)
    heads, question, tokens = Heads(SIZES, None), make_question(choices=True), some_tokens()
    assert question.choices_BKC is not None
    poisoned_BKC = question.choices_BKC.clone()
    poisoned_BKC[-1, 2] = math.nan
    available_BM = torch.tensor([[True, True], [True, False]])
    question = question._replace(choices_BKC=poisoned_BKC)
    logits = heads(tokens, tokens, tokens, available_BM, question)[0]
    assert logits[-1].softmax(dim=-1)[2] == 0
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(torch.isfinite(p.grad).all() for p in heads.parameters() if p.grad is not None)


def test_choices_must_come_with_the_question() -> None:
    with pytest.raises(ValueError, match="choices"):
        Decoder(SIZES, None)(some_tokens(), make_question())


@torch.no_grad()
def test_the_prediction_sums_the_heads_that_have_something_to_read() -> None:
    torch.manual_seed(0)
    heads, tokens, question = Heads(SIZES, 5).eval(), some_tokens(4), make_question(rows=4)
    available_BM = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    total, joint, audio, visual, vector_BD = heads(tokens, tokens, tokens, available_BM, question)
    torch.testing.assert_close(heads.joint.score(vector_BD, question), joint)
    alone = heads.audio(tokens, question), heads.visual(tokens, question)
    torch.testing.assert_close(total[0], joint[0] + alone[0][0] + alone[1][0])
    torch.testing.assert_close(total[1], joint[1] + alone[0][1])
    torch.testing.assert_close(total[2], joint[2] + alone[1][2])
    torch.testing.assert_close(total[3], joint[3])
    assert not audio[2:].any()
    assert not visual[1].any()
