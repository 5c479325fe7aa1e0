"""Frames, sound and questions to embeddings.

Legend: T one-second tokens of one stream, D the encoder's width, W real tokens of a question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from r2scp.model.imagebind import DTYPE_NAMES, ImageBind, normalise_frames
from r2scp.model.melspec import log_mel, windows
from r2scp.model.tokenizer import Tokenizer

TOKENS_PER_FORWARD = {"cpu": 16, "cuda": 128}  # frames or windows that go through a tower together
QUESTIONS_PER_FORWARD = 64


class Encoder(Protocol):
    """What turns decoded streams into unit-norm embeddings."""

    dim: int

    def visual(self, frames_TSS3: np.ndarray) -> np.ndarray:
        """uint8 (T, 224, 224, 3) -> float32 (T, D)."""
        ...

    def audio(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 (S,) at 16 kHz each -> float32 (T, D) each."""
        ...

    def questions(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """N texts -> words float32 (W, D) each, sentences float32 (N, D)."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Which encoder, described once by the driver and loaded by every actor."""

    source: str  # file, or random:SEED
    fingerprint: str
    dim: int
    dtype: str  # a value of DTYPE_NAMES
    device: str  # cpu | cuda
    sha256: str | None  # of the file, so that actors need not hash it again

    def load(self) -> Encoder:
        """Read the weights. Raises `WeightsError`."""
        dtype = {name: dtype for dtype, name in DTYPE_NAMES.items()}[self.dtype]
        return ImageBindEncoder(ImageBind.load(self.source, self.device, dtype, self.sha256))


class ImageBindEncoder:
    """`Encoder` on the three towers of ImageBind."""

    def __init__(self, model: ImageBind) -> None:
        self.dim = model.dim
        self._model = model
        self._tokenizer = Tokenizer()
        self._batch = TOKENS_PER_FORWARD[model.device.type]

    @torch.inference_mode()
    def visual(self, frames_TSS3: np.ndarray) -> np.ndarray:
        frames = torch.from_numpy(frames_TSS3)
        parts = [
            self._model.vision(normalise_frames(part.to(self._model.device))).cpu()
            for part in frames.split(self._batch)
        ]
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def audio(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        melspecs = [log_mel(windows(waveform)) for waveform in waveforms]
        lengths = [len(melspec) for melspec in melspecs]
        parts = [
            self._model.audio(part.to(self._model.device)).cpu()
            for part in torch.cat(melspecs).split(self._batch)
        ]
        return [part.numpy() for part in torch.cat(parts).split(lengths)]

    @torch.inference_mode()
    def questions(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        words: list[np.ndarray] = []
        sentences: list[np.ndarray] = []
        for start in range(0, len(texts), QUESTIONS_PER_FORWARD):
            ids_NW, lengths_N = self._tokenizer.tokens(texts[start : start + QUESTIONS_PER_FORWARD])
            longest = int(lengths_N.max())  # attention is causal: padding behind changes nothing
            output = self._model.text(ids_NW[:, :longest].to(self._model.device))
            for row, length in zip(output.words_BWD.cpu(), lengths_N.tolist(), strict=True):
                words.append(row[:length].numpy())
            sentences.append(output.sentence_BD.cpu().numpy())
        return words, np.concatenate(sentences)


def key_of(sequence_TD: np.ndarray) -> np.ndarray:
    """Retrieval key of one clip: the unit-norm mean of its unit-norm tokens (paper, eq. 1), float32 (D,)."""
    mean_D = sequence_TD.astype(np.float32).mean(axis=0)
    return mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
