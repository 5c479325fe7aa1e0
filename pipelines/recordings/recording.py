"""A media file from outside the store: decoded, checked for missing modalities, embedded.

Decoding reports a stream that is absent, corrupt or partial. A microphone or a camera can also fail and leave
a stream that decodes well and holds nothing: silence and blank pictures are detected here.

Legend: T one-second tokens of one stream, D the encoder's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from r2scp.pipelines.decoding.decode import DecodeLimits, StreamReport, decode
from r2scp.pipelines.extraction.embed import Encoder, embed_streams
from r2scp.pipelines.media_file import file_digest, file_identity
from r2scp.store.errors import FailureReason, MediaError
from r2scp.store.schema import MODALITY_NAMES, Modality, ModalityStatus

SILENT_PEAK = 3 / 2**15  # three steps of 16 bits, -81 dBFS: less than any room that a microphone hears
BLANK_DEVIATION = 2.0  # levels of 255, over one frame: less than the noise of a sensor in the dark


@dataclass(kw_only=True, eq=False)
class Recording:
    """The decoded or embedded content of one file.

    `unusable`: modality -> why it cannot be used; every other modality can be. `frames` and `waveform` are
    those of `decode`; `embed` replaces them with `tokens`.
    """

    path: str
    content_sha256: str
    duration_s: float
    streams: dict[Modality, StreamReport]
    unusable: dict[Modality, str]
    frames: np.ndarray | None
    waveform: np.ndarray | None
    tokens: dict[Modality, np.ndarray] = field(default_factory=dict)  # (T, D) float32, unit norm
    embedded: bool = False

    @classmethod
    def read(
        cls, path: str, limits: DecodeLimits, ffmpeg: str | None = None, *, detect_blank: bool = True
    ) -> "Recording":
        """Decode a file. Without `detect_blank`, silence and blank pictures count as usable.

        Raises `MediaError` if no stream can be decoded, or if the file is written to meanwhile: its digest
        would then be of another content than its frames.
        """
        before = file_identity(path)
        clip = decode(path, limits, ffmpeg)
        digest = file_digest(path)
        if before != file_identity(path):
            raise MediaError(FailureReason.UNREADABLE, "the file changed while it was read; ask again")
        streams = {Modality.AUDIO: clip.audio, Modality.VISUAL: clip.visual}
        reasons = {modality: _stream_fault(modality, report) for modality, report in streams.items()}
        if detect_blank:
            reasons[Modality.AUDIO] = reasons[Modality.AUDIO] or _silence(clip.waveform)
            reasons[Modality.VISUAL] = reasons[Modality.VISUAL] or _blank_picture(clip.frames)
        return cls(
            path=path,
            content_sha256=digest.sha256,
            duration_s=clip.duration_s,
            streams=streams,
            unusable={modality: reason for modality, reason in reasons.items() if reason},
            frames=clip.frames,
            waveform=clip.waveform,
        )

    @property
    def bytes(self) -> int:
        """Size of its arrays; may be called while `embed` runs."""
        arrays = [self.frames, self.waveform, *list(self.tokens.values())]
        return sum(array.nbytes for array in arrays if array is not None)

    def require(self) -> None:
        """Raise `MediaError` if neither modality can be used."""
        if len(self.unusable) == len(Modality):
            reasons = "; ".join(self.unusable[modality] for modality in Modality)
            raise MediaError(
                FailureReason.NOTHING_RECORDED, f"neither sound nor picture can be used: {reasons}"
            )


def embed(encoder: Encoder, recordings: Sequence[Recording]) -> None:
    """Replace the frames and waveforms of recordings with tokens of the usable modalities.

    All recordings go through the towers together, those already embedded are skipped. One whose embedding is
    not finite gets no tokens.
    """
    recordings = list({id(each): each for each in recordings if not each.embedded}.values())
    tokens = embed_streams(
        encoder,
        [None if Modality.VISUAL in each.unusable else each.frames for each in recordings],
        [None if Modality.AUDIO in each.unusable else each.waveform for each in recordings],
    )
    for recording, tokens_of_one in zip(recordings, tokens, strict=True):
        recording.tokens = tokens_of_one or {}
        recording.frames = recording.waveform = None
        recording.embedded = True


def mark_unusable(recording: Recording, modality: Modality, reason: str) -> None:
    """Treat a modality as missing, for `reason` unless it is unusable already."""
    recording.unusable.setdefault(modality, reason)


def _stream_fault(modality: Modality, report: StreamReport) -> str:
    """Why a stream is unusable; "" if it is not."""
    if report.status is ModalityStatus.ABSENT:
        return f"the file has no {MODALITY_NAMES[modality]}"
    if report.status is ModalityStatus.CORRUPT:
        return f"the {MODALITY_NAMES[modality]} of the file cannot be decoded"
    return ""


def _silence(waveform: np.ndarray | None) -> str:
    if waveform is None or float(np.abs(waveform).max(initial=0.0)) > SILENT_PEAK:
        return ""
    return "the sound is silence from beginning to end"


def _blank_picture(frames: np.ndarray | None) -> str:
    if frames is None or any(float(frame.std()) >= BLANK_DEVIATION for frame in frames):
        return ""
    return "the picture is blank from beginning to end"
