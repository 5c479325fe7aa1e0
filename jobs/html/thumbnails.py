"""Previews of a recording for a page: small pictures, and the waveform of its sound.

A file is shown only if it still has the SHA-256 that the store recorded. Pictures are the squares that the
encoder saw, of the seconds that its tokens represent.
"""

import io
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
from PIL import Image

from r2scp.pipelines.decoding.decode import Clip, DecodeLimits, decode
from r2scp.pipelines.decoding.ffmpeg_command import RATE
from r2scp.pipelines.media_file import file_digest, file_identity
from r2scp.store.errors import MediaError

SIDE = 160  # pixels, width and height of a picture
QUALITY = 60  # of WebP: about 4 kB a picture
PEAK_S = 0.1  # seconds of sound per peak, more if ...
MAX_PEAKS = 600  # ... there would be more peaks than a drawing can show
CACHE_BYTES = 96 << 20  # of decoded recordings: about 60 of 10 s
PREVIEW_LIMITS = DecodeLimits(seconds_per_file=120.0)


class PreviewStatus(StrEnum):
    """Whether a file is shown, or why not."""

    SHOWN = "shown"
    GONE = "gone"  # no file there
    CHANGED = "changed"  # other content than the store recorded
    UNREADABLE = "unreadable"  # it exists but cannot be decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """Pictures and waveform of one file. `fault`: one line that says why something is missing, or ""."""

    status: PreviewStatus
    pictures: Mapping[int, bytes] = field(default_factory=dict)  # second -> WebP of SIDE x SIDE
    peaks: tuple[tuple[float, float], ...] = ()  # lowest and highest sample of each `peak_s`, in [-1, 1]
    peak_s: float = PEAK_S
    duration_s: float = 0.0
    seconds: int = 0  # how many have a picture
    fault: str = ""


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A decoded file, or why it is not decoded."""

    status: PreviewStatus
    clip: Clip | None = None
    fault: str = ""

    @property
    def bytes(self) -> int:
        arrays = (self.clip.frames, self.clip.waveform) if self.clip else ()
        return sum(array.nbytes for array in arrays if array is not None)


def preview(
    path: str | Path,
    seconds: Iterable[int],
    content_sha256: str | None = None,
    limits: DecodeLimits = PREVIEW_LIMITS,
    ffmpeg: str | None = None,
) -> Preview:
    """Pictures of some seconds of a local regular file, and its waveform. Raises for no file.

    `content_sha256`: as recorded in the store; a file with another one is not shown. Seconds beyond the
    recording are left out.
    """
    return _preview(_decode(path, content_sha256, limits, ffmpeg), seconds)


class Previews:
    """`preview` with a cache of decoded files, least recently used first out, of about `cache_bytes`.

    Not thread-safe. `decoded` counts the files that were decoded.
    """

    def __init__(
        self,
        cache_bytes: int = CACHE_BYTES,
        limits: DecodeLimits = PREVIEW_LIMITS,
        ffmpeg: str | None = None,
    ) -> None:
        self.decoded = 0
        self._cache_bytes = cache_bytes
        self._limits, self._ffmpeg = limits, ffmpeg
        self._cache: OrderedDict[tuple[str, str | None], _Decoded] = OrderedDict()

    def preview(self, path: str | Path, seconds: Iterable[int], content_sha256: str | None = None) -> Preview:
        """See the function `preview`."""
        key = (str(path), content_sha256)
        decoded = self._cache.get(key)
        if decoded is None:
            decoded = _decode(path, content_sha256, self._limits, self._ffmpeg)
            self.decoded += decoded.clip is not None
            self._cache[key] = decoded
        self._cache.move_to_end(key)
        while len(self._cache) > 1 and sum(one.bytes for one in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)
        return _preview(decoded, seconds)


def _decode(
    path: str | Path, content_sha256: str | None, limits: DecodeLimits, ffmpeg: str | None
) -> _Decoded:
    if _is_gone(path):
        return _Decoded(PreviewStatus.GONE, fault="The file no longer exists.")
    try:
        before = file_identity(path)
        if content_sha256 is not None:
            digest = file_digest(path).sha256
            if digest != content_sha256:
                return _Decoded(PreviewStatus.CHANGED, fault=_changed(digest, content_sha256))
        clip = decode(path, limits, ffmpeg)
        if content_sha256 is not None and file_identity(path) != before:
            return _Decoded(PreviewStatus.CHANGED, fault="The file changed while it was being read.")
    except MediaError as error:
        return _Decoded(PreviewStatus.UNREADABLE, fault=f"The file cannot be shown: {error}.")
    return _Decoded(PreviewStatus.SHOWN, clip)


def _changed(digest: str, recorded: str) -> str:
    return (
        f"The file is not the one that was stored: its SHA-256 begins with {digest[:10]}, the store "
        f"recorded {recorded[:10] or 'none'}."
    )


def _is_gone(path: str | Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):  # unreadable; ValueError: a zero byte in the name
        pass
    return False


def _preview(decoded: _Decoded, seconds: Iterable[int]) -> Preview:
    clip = decoded.clip
    if clip is None:
        return Preview(status=decoded.status, fault=decoded.fault)
    frames = () if clip.frames is None else clip.frames
    shown = sorted({second for second in seconds if 0 <= second < len(frames)})
    pictures = {second: _picture(frames[second]) for second in shown}
    peak_s, peaks = _peaks(clip.waveform)
    return Preview(
        status=decoded.status,
        pictures=pictures,
        peaks=peaks,
        peak_s=peak_s,
        duration_s=clip.duration_s,
        seconds=len(frames),
    )


def _picture(frame: np.ndarray) -> bytes:
    """WebP of one uint8 frame (H, W, 3)."""
    out = io.BytesIO()
    small = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(out, "WEBP", quality=QUALITY, method=4)
    return out.getvalue()


def _peaks(waveform: np.ndarray | None) -> tuple[float, tuple[tuple[float, float], ...]]:
    """(seconds per peak, the peaks) of float32 (S,) at RATE; the last peak may cover less."""
    if waveform is None or not len(waveform):
        return PEAK_S, ()
    slice_S = max(round(PEAK_S * RATE), -(-len(waveform) // MAX_PEAKS))
    starts = np.arange(0, len(waveform), slice_S)
    sound = np.clip(np.nan_to_num(waveform), -1.0, 1.0)
    low, high = np.minimum.reduceat(sound, starts), np.maximum.reduceat(sound, starts)
    return slice_S / RATE, tuple(zip(low.tolist(), high.tolist(), strict=True))
