"""A media file from outside the store: decoded, looked at for what is wrong with it, embedded.

Decoding finds a stream that is not there, that gives nothing, or not all of it. A microphone or a camera can
also fail and leave a stream that decodes well and holds nothing: such a stream is found here.

Legend: T one-second tokens of one stream, D the encoder's width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from r2scp.pipelines.decoding.decode import DecodeLimits, StreamReport, decode
from r2scp.pipelines.extraction.embed import Encoder
from r2scp.pipelines.extraction.stages import file_facts
from r2scp.store.errors import FailureReason, MediaError
from r2scp.store.schema import MODALITY_NAMES, Modality, ModalityStatus

SILENT_PEAK = 3 / 2**15  # three steps of 16 bits, -81 dBFS: less than any room that a microphone hears
BLANK_DEVIATION = 2.0  # levels of 255, over one frame: less than the noise of a sensor in the dark


@dataclass(kw_only=True, eq=False)
class Recording:
    """What one file gave.

    `empty`: modality -> why nothing of it can be used; every other modality can be. `frames` and `waveform`
    are those of `decode`; `embed` puts `tokens` in their place.
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
        """Decode a file. Without `judge` silence passes for sound and a blank picture for a picture.

        Raises `MediaError` where no stream gives anything, or where the file is written to meanwhile: then
        its digest would be of another content than its frames.
        """
        before = file_identity(path)
        clip = decode(path, limits, ffmpeg)
        facts = file_facts(path)
        if before != file_identity(path):
            raise MediaError(FailureReason.UNREADABLE, "the file changed while it was read; ask again")
        streams = {Modality.AUDIO: clip.audio, Modality.VISUAL: clip.visual}
        empty = {modality: _stream_fault(modality, report) for modality, report in streams.items()}
        if detect_blank:
            empty[Modality.AUDIO] = empty[Modality.AUDIO] or _silence(clip.waveform)
            empty[Modality.VISUAL] = empty[Modality.VISUAL] or _blank(clip.frames)
        return cls(
            path=path,
            content_sha256=str(facts["content_sha256"]),
            duration_s=clip.duration_s,
            streams=streams,
            unusable={modality: why for modality, why in empty.items() if why},
            frames=clip.frames,
            waveform=clip.waveform,
        )

    @property
    def bytes(self) -> int:
        """What it holds; may be asked while `embed` works."""
        arrays = [self.frames, self.waveform, *list(self.tokens.values())]
        return sum(array.nbytes for array in arrays if array is not None)

    def require(self) -> None:
        """Raises `MediaError` where neither modality can be used."""
        if len(self.unusable) == len(Modality):
            reasons = "; ".join(self.unusable[modality] for modality in Modality)
            raise MediaError(
                FailureReason.NOTHING_RECORDED, f"neither sound nor picture can be used: {reasons}"
            )


def file_identity(path: str) -> tuple[int, ...] | None:
    """What changes when a file is replaced, written to or given other rights; None where there is none."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def embed(encoder: Encoder, recordings: Sequence[Recording]) -> None:
    """Give recordings the tokens of all that can be used, and let go of frames and waveforms.

    All that have none yet go through the towers together. One whose embedding is not finite gets none.
    """
    recordings = list({id(one): one for one in recordings if not one.embedded}.values())
    seen = [recording for recording in recordings if Modality.VISUAL not in recording.unusable]
    if frames := [recording.frames for recording in seen if recording.frames is not None]:
        ends = np.cumsum([len(part) for part in frames])[:-1]
        for recording, tokens_TD in zip(
            seen, np.split(encoder.visual(np.concatenate(frames)), ends), strict=True
        ):
            recording.tokens[Modality.VISUAL] = tokens_TD
    heard = [recording for recording in recordings if Modality.AUDIO not in recording.unusable]
    if waveforms := [recording.waveform for recording in heard if recording.waveform is not None]:
        for recording, tokens_TD in zip(heard, encoder.audio(waveforms), strict=True):
            recording.tokens[Modality.AUDIO] = tokens_TD
    for recording in recordings:
        recording.frames = recording.waveform = None
        recording.embedded = True
        if not all(np.isfinite(tokens_TD).all() for tokens_TD in recording.tokens.values()):
            recording.tokens.clear()


def mark_unusable(recording: Recording, modality: Modality, why: str) -> None:
    """Do as if a recording had no such modality."""
    recording.unusable.setdefault(modality, why)


def _stream_fault(modality: Modality, report: StreamReport) -> str:
    """Why a stream gives nothing; "" where it gives something."""
    if report.status is ModalityStatus.ABSENT:
        return f"the file has no {MODALITY_NAMES[modality]}"
    if report.status is ModalityStatus.CORRUPT:
        return f"the {MODALITY_NAMES[modality]} of the file cannot be decoded"
    return ""


def _silence(waveform: np.ndarray | None) -> str:
    if waveform is None or float(np.abs(waveform).max(initial=0.0)) > SILENT_PEAK:
        return ""
    return "the sound is silence from beginning to end"


def _blank(frames: np.ndarray | None) -> str:
    if frames is None or any(float(frame.std()) >= BLANK_DEVIATION for frame in frames):
        return ""
    return "the picture is blank from beginning to end"
