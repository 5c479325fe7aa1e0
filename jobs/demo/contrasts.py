"""What `encoder` trains: four contrastive losses, and the towers that run in parallel."""

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2scp.model.imagebind.imagebind import ImageBind
from r2scp.model.imagebind.tokenizer import Tokenizer
from r2scp.model.imagebind.towers import AUDIO_STRIDE, AudioTower, VisionTower, unit
from r2scp.pipelines.demo.captions import AUDIO_GROUPS, VISION_GROUPS, Group, caption
from r2scp.pipelines.demo.questions import TEMPLATES, sample_wording

QUESTIONS_PER_BATCH = 24
PHRASES_PER_CAPTION = 5
MAX_SCALE = {"pair": 30.0, "phrases": 80.0, "captions": 80.0, "questions": 80.0}
_ZERO = torch.zeros(())  # start of sums of losses
WEIGHTS = {"pair": 0.7, "phrases": 0.15, "captions": 0.5, "questions": 0.2}


def embed_frames(tower: VisionTower, frames_B3HW: Tensor, keep: float) -> Tensor:
    """The vision tower on a random share of its patches (the same ones for the whole batch)."""
    if keep >= 1:
        return tower(frames_B3HW)
    patches_BLC = F.conv2d(frames_B3HW, tower.stem.sum(2), stride=tower.patch).flatten(2).transpose(1, 2)
    kept = torch.randperm(patches_BLC.shape[1])[: round(keep * patches_BLC.shape[1])]
    x_BLC = patches_BLC[:, kept] + tower.positions[:, 1 + kept]
    first_B1C = (tower.class_token + tower.positions[:, :1]).expand(len(x_BLC), -1, -1)
    x_BLC = tower.trunk_norm(torch.cat([first_B1C, x_BLC], dim=1))
    for block in tower.blocks:
        x_BLC = block(x_BLC)
    return unit(tower.head(tower.head_norm(x_BLC[:, 0])))


def embed_melspecs(tower: AudioTower, melspecs_B1MF: Tensor, keep: float) -> Tensor:
    """The audio tower on a random share of its patches (the same ones for the whole batch)."""
    if keep >= 1:
        return tower(melspecs_B1MF)
    patches_BLC = F.conv2d(melspecs_B1MF, tower.stem, stride=AUDIO_STRIDE).flatten(2).transpose(1, 2)
    kept = torch.randperm(patches_BLC.shape[1])[: round(keep * patches_BLC.shape[1])]
    x_BLC = tower.stem_norm(patches_BLC[:, kept]) + tower.positions[:, 1 + kept]
    first_B1C = (tower.class_token + tower.positions[:, :1]).expand(len(x_BLC), -1, -1)
    x_BLC = torch.cat([first_B1C, x_BLC], dim=1)
    for block in tower.blocks:
        x_BLC = block(x_BLC)
    return unit(tower.head(tower.head_norm(x_BLC[:, 0])))


class Contrasts(nn.Module):
    """The four losses, their learned scales, and the texts they need."""

    def __init__(self, model: ImageBind, rng: np.random.Generator) -> None:
        super().__init__()
        self.model, self.rng, self.tokenizer = [model], rng, Tokenizer()
        self.log_scales = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(15.0))) for name in WEIGHTS}
        )
        self.phrases = {
            name: self._ids([phrase for group in groups for phrase in group])
            for name, groups in (("vision", VISION_GROUPS), ("audio", AUDIO_GROUPS))
        }

    def _ids(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer.tokens(texts)
        return tokens.ids_NW[:, : int(tokens.lengths_N.max())]

    def _text(self, ids: Tensor) -> Tensor:
        return self.model[0].text(ids).sentence_BD

    def _scale(self, name: str) -> Tensor:
        return self.log_scales[name].exp().clamp(max=MAX_SCALE[name])

    def losses(
        self, embedded: tuple[Tensor, Tensor], identical: Tensor, labels: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, Tensor]:
        """The four losses of B pairs.

        `embedded`: picture and sound, (B, D) each; `identical`: bool (B, B), pairs with the same content;
        `labels`: true phrases of VISION_GROUPS and of AUDIO_GROUPS, int64 (B, groups) each.
        """
        groups = (VISION_GROUPS, AUDIO_GROUPS)
        streams = tuple(zip(embedded, ("vision", "audio"), groups, labels, strict=True))
        return {
            "pair": self.pair(*embedded, identical),
            "phrases": sum(
                (self.against_phrases(x, name, g, torch.from_numpy(y)) for x, name, g, y in streams), _ZERO
            ),
            "captions": sum((self.against_captions(x, g, y) for x, _, g, y in streams), _ZERO) / 2,
            "questions": self.between_questions(),
        }

    def pair(self, visual_BD: Tensor, audio_BD: Tensor, identical_BB: Tensor) -> Tensor:
        """InfoNCE of the picture and the sound of the same second."""
        logits_BB = self._scale("pair") * visual_BD @ audio_BD.T
        others_BB = identical_BB & ~torch.eye(len(identical_BB), dtype=torch.bool)
        logits_BB = logits_BB.masked_fill(others_BB, -1e4)
        target_B = torch.arange(len(logits_BB))
        return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2

    def against_phrases(
        self, embedding_BD: Tensor, name: str, groups: tuple[Group, ...], labels_BG: Tensor
    ) -> Tensor:
        """Cross-entropy of the true phrase of each group, summed over groups."""
        logits_BP = self._scale("phrases") * embedding_BD @ self._text(self.phrases[name]).T
        split = logits_BP.split([len(group) for group in groups], dim=1)
        return sum((F.cross_entropy(part, labels_BG[:, g]) for g, part in enumerate(split)), _ZERO)

    def against_captions(
        self, embedding_BD: Tensor, groups: tuple[Group, ...], labels_BG: np.ndarray
    ) -> Tensor:
        """Contrast with captions; a caption that is true of several pairs is a positive for each."""
        chosen = np.stack([self.rng.permutation(len(groups))[:PHRASES_PER_CAPTION] for _ in labels_BG])
        texts = [caption(groups, label, pick) for label, pick in zip(labels_BG, chosen, strict=True)]
        values_CK = np.take_along_axis(labels_BG, chosen, axis=1)
        true_BC = torch.from_numpy((labels_BG[:, chosen] == values_CK).all(axis=2))
        logits_BC = self._scale("captions") * embedding_BD @ self._text(self._ids(texts)).T
        return (_many_positives(logits_BC, true_BC) + _many_positives(logits_BC.T, true_BC.T)) / 2

    def between_questions(self) -> Tensor:
        """Contrast of questions with short descriptions of what they ask."""
        drawn = [
            sample_wording(self.rng, TEMPLATES[i])
            for i in self.rng.integers(len(TEMPLATES), size=QUESTIONS_PER_BATCH)
        ]
        questions, meanings = (self._text(self._ids([pair[i] for pair in drawn])) for i in (0, 1))
        texts = np.array([pair[1] for pair in drawn])
        true = torch.from_numpy(texts[:, None] == texts)
        logits = self._scale("questions") * questions @ meanings.T
        return (_many_positives(logits, true) + _many_positives(logits.T, true.T)) / 2


def _many_positives(logits_XY: Tensor, true_XY: Tensor) -> Tensor:
    """Cross-entropy against the uniform distribution over the true columns of each row."""
    return -(F.log_softmax(logits_XY, dim=1) * true_XY).sum(dim=1).div(true_XY.sum(dim=1)).mean()


class Towers:
    """Runs vision and audio in parallel, one thread each; audio in bfloat16 on a copy of the weights.

    On two cores this is faster than one tower after the other with two threads, above all under load.
    """

    def __init__(self, model: ImageBind) -> None:
        self.model, self.pool = model, ThreadPoolExecutor(2)
        self.audio = copy.deepcopy(model.audio).bfloat16()

    def __call__(
        self, frames: Callable[[], Tensor], melspecs: Callable[[], Tensor], keep: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of what `frames` and `melspecs` return, from shares `keep` of their patches: (B, D)."""
        with torch.no_grad():
            for master, half in zip(self.model.audio.parameters(), self.audio.parameters(), strict=True):
                half.copy_(master)
        visual = self.pool.submit(lambda: embed_frames(self.model.vision, frames(), keep[0]))
        audio = self.pool.submit(lambda: embed_melspecs(self.audio, melspecs().bfloat16(), keep[1]))
        return visual.result(), audio.result()

    def backward(self, outputs: tuple[Tensor, Tensor], leaves: tuple[Tensor, Tensor]) -> None:
        """Propagates the gradients of `leaves`, detached copies of `outputs`, to the weights."""
        self.audio.zero_grad()
        list(self.pool.map(lambda output, leaf: output.backward(leaf.grad), outputs, leaves))
        for master, half in zip(self.model.audio.parameters(), self.audio.parameters(), strict=True):
            master.grad = None if half.grad is None else half.grad.float()
