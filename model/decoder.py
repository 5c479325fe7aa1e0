"""The decoder of eq. 12: the question attends to a sequence and is answered."""

import math

import torch
from torch import Tensor, nn

from r2scp.model.batch import Question, Tokens
from r2scp.model.experts import Layer, Sizes

DECODER_LAYERS = 2


class ChoiceScores(nn.Module):
    """Logit per choice: dot product of the projected joint vector and the projected "question choice".

    Divided by √D to be of order 1 at the start. The choices' projection has no bias: it would add the same
    to all of them.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.joint = nn.Linear(sizes.dim, sizes.dim)
        self.choice = nn.Linear(sizes.encoder_dim, sizes.dim, bias=False)
        self.encoder_scale = math.sqrt(sizes.encoder_dim)  # see `Projection`

    def forward(self, joint_BD: Tensor, choices_BKC: Tensor, choices_mask_BK: Tensor) -> Tensor:
        clean_BKC = choices_BKC.masked_fill(~choices_mask_BK[..., None], 0).to(self.choice.weight.dtype)
        projected_BKD = self.choice(clean_BKC * self.encoder_scale)
        scores_BK = (projected_BKD @ self.joint(joint_BD)[..., None]).squeeze(-1).float()
        return (scores_BK / math.sqrt(projected_BKD.shape[-1])).masked_fill(~choices_mask_BK, -math.inf)


class Decoder(nn.Module):
    """One head: the question's sentence vector passes `DECODER_LAYERS` layers of cross-attention.

    With `classes` it scores that many answers, with None the choices of the question.
    """

    def __init__(self, sizes: Sizes, classes: int | None) -> None:
        super().__init__()
        self.question = nn.Linear(sizes.encoder_dim, sizes.dim)
        self.question_scale = math.sqrt(sizes.encoder_dim)  # see `Projection`
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(DECODER_LAYERS))
        self.classes = None if classes is None else nn.Linear(sizes.dim, classes)
        self.choices = ChoiceScores(sizes) if classes is None else None

    def forward(self, tokens: Tokens, question: Question) -> Tensor:
        """Logits (B, K) float32, -inf for a missing choice. ValueError if the question needs choices."""
        return self.score(self.read(tokens, question), question)

    def read(self, tokens: Tokens, question: Question) -> Tensor:
        """The question's vector after the layers, (B, D): the only input of `score`."""
        sentence_BC = question.sentence_BC.to(self.question.weight.dtype) * self.question_scale
        query_B1D = self.question(sentence_BC)[:, None]
        for layer in self.layers:
            query_B1D = layer(query_B1D, tokens)
        return query_B1D[:, 0]

    def score(self, vector_BD: Tensor, question: Question) -> Tensor:
        """Logits (B, K) of a vector of `read`."""
        if self.classes is not None:
            return self.classes(vector_BD).float()
        assert self.choices is not None
        if question.choices_BKC is None or question.choices_mask_BK is None:
            raise ValueError("a model without classes needs choices_BKC; this batch has none")
        return self.choices(vector_BD, question.choices_BKC, question.choices_mask_BK)


class Heads(nn.Module):
    """The heads joint, audio and visual. The prediction is the sum of those whose modality is available."""

    def __init__(self, sizes: Sizes, classes: int | None) -> None:
        super().__init__()
        self.joint = Decoder(sizes, classes)
        self.audio = Decoder(sizes, classes)
        self.visual = Decoder(sizes, classes)

    def forward(
        self, joint: Tokens, audio: Tokens, visual: Tokens, available_BM: Tensor, question: Question
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits (sum, joint, audio, visual), each (B, K) float32, zeros where a modality is not available;
        then the vector that the joint head scores, (B, D).
        """
        joint_BD = self.joint.read(joint, question)
        joint_BK = self.joint.score(joint_BD, question)
        alone = [
            torch.where(available_BM[:, column, None], head(tokens, question), 0.0)
            for column, (head, tokens) in enumerate(((self.audio, audio), (self.visual, visual)))
        ]
        return joint_BK + alone[0] + alone[1], joint_BK, alone[0], alone[1], joint_BD
