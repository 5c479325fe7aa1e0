"""Frames, sound and questions to embeddings: the encoder, and the stage that runs it.

Legend: T one-second tokens of one stream, D the encoder's width, W real tokens of a question.
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch

from r2scp.model.imagebind.imagebind import DTYPE_NAMES, ImageBind, normalise_frames
from r2scp.model.imagebind.melspec import log_mel, windows
from r2scp.model.imagebind.tokenizer import Tokenizer
from r2scp.pipelines.extraction.stages import DECODED_SCHEMA, FRAME_SHAPE, failure_columns
from r2scp.store.errors import FailureReason
from r2scp.store.schema import Modality, sequence, vector

TOKENS_PER_FORWARD = {"cpu": 16, "cuda": 128}  # frames or windows per forward pass
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's names, malloc.h
MAX_FREE_BYTES = 1 << 30  # freed memory that is kept; more goes back to the system
QUESTIONS_PER_FORWARD = 64


class Encoder(Protocol):
    """Turns decoded streams and texts into unit-norm embeddings."""

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
    """`Encoder` on the three towers of ImageBind. Packs the model, which can then only infer."""

    def __init__(self, model: ImageBind) -> None:
        self.dim = model.dim
        self._model = model.pack()
        self._tokenizer = Tokenizer()
        self._batch = TOKENS_PER_FORWARD[model.device.type]
        if model.device.type == "cpu":
            keep_freed_memory()

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


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees instead of returning it to the system.

    A forward pass frees and allocates the same few tens of MiB for every block; by default glibc returns each
    to the system, which then has to find and clear the pages again. No effect with another C library.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if libc.mallopt(M_MMAP_THRESHOLD, MAX_FREE_BYTES):  # some versions refuse so high a bound
            libc.mallopt(M_TRIM_THRESHOLD, MAX_FREE_BYTES)


def key_of(sequence_TD: np.ndarray) -> np.ndarray:
    """Retrieval key of one clip: the unit-norm mean of its unit-norm tokens (paper, eq. 1), float32 (D,)."""
    mean_D = sequence_TD.astype(np.float32).mean(axis=0)
    return mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)


#: Columns that the four embedding columns replace.
_RAW_COLUMNS = ("frames", "waveform")


def embedded_schema(dim: int) -> pa.Schema:
    """Schema of the rows of `EmbedClips`, for an encoder of width `dim`."""
    return pa.schema(
        [
            *(field for field in DECODED_SCHEMA if field.name not in _RAW_COLUMNS),
            pa.field("visual", sequence(dim)),
            pa.field("audio", sequence(dim)),
            pa.field("visual_key", vector(dim)),
            pa.field("audio_key", vector(dim)),
        ]
    )


class EmbedClips:
    """Decoded rows to embedded rows. Loads its encoder once; lives in an actor.

    All clips of a batch go through the towers together, so that a GPU gets full batches.
    """

    def __init__(self, spec: EncoderSpec, threads: int) -> None:
        torch.set_num_threads(threads)
        self._encoder: Encoder = spec.load()
        self._schema = embedded_schema(spec.dim)

    def __call__(self, batch: pa.Table) -> pa.Table:
        frames = [_view(cell, np.uint8, FRAME_SHAPE) for cell in batch["frames"]]
        waveforms = [_view(cell, np.float32, ()) for cell in batch["waveform"]]
        rows = batch.drop_columns(list(_RAW_COLUMNS)).to_pylist()
        for row, tokens in zip(rows, embed_streams(self._encoder, frames, waveforms), strict=True):
            if tokens is None:
                detail = "the encoder's output is not finite"
                row |= failure_columns("embed", FailureReason.EMBED_FAILED, detail)
            for modality in Modality:
                tokens_TD = (tokens or {}).get(modality)
                row[modality.value] = None if tokens_TD is None else list(tokens_TD.astype(np.float16))
                row[f"{modality.value}_key"] = None if tokens_TD is None else key_of(tokens_TD)
        return pa.Table.from_pylist(rows, schema=self._schema)


def embed_streams(
    encoder: Encoder, frames: Sequence[np.ndarray | None], waveforms: Sequence[np.ndarray | None]
) -> list[dict[Modality, np.ndarray] | None]:
    """Tokens of several clips, which go through the towers together.

    `frames`: uint8 (T, 224, 224, 3) per clip, `waveforms`: float32 (S,) per clip, None where a clip has no
    such stream. Returns float32 (T, D) per stream of each clip; None for a clip whose tokens are not finite.
    """
    tokens: list[dict[Modality, np.ndarray]] = [{} for _ in frames]
    seen = [(clip, part) for clip, part in zip(tokens, frames, strict=True) if part is not None]
    heard = [(clip, part) for clip, part in zip(tokens, waveforms, strict=True) if part is not None]
    if seen:
        ends = np.cumsum([len(part) for _, part in seen])[:-1]
        visual = np.split(encoder.visual(np.concatenate([part for _, part in seen])), ends)
        for (clip, _), tokens_TD in zip(seen, visual, strict=True):
            clip[Modality.VISUAL] = tokens_TD
    if heard:
        for (clip, _), tokens_TD in zip(heard, encoder.audio([part for _, part in heard]), strict=True):
            clip[Modality.AUDIO] = tokens_TD
    return [clip if all(np.isfinite(part).all() for part in clip.values()) else None for clip in tokens]


def _view(cell: pa.LargeBinaryScalar, dtype: type, item: tuple[int, ...]) -> np.ndarray | None:
    """The array in a binary cell, without a copy."""
    buffer = cell.as_buffer()
    return None if buffer is None else np.frombuffer(buffer, dtype=dtype).reshape(-1, *item)
