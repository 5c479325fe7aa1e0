"""Small pictures and the shape of the sound of a recording, for a person to look at.

What is shown is what was asked for, or nothing: where a store recorded a file's SHA-256, only a file that
still has it is shown. Pictures are the squares that the encoder saw, of the seconds that its tokens stand
for.
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
from r2scp.pipelines.extraction.stages import file_facts
from r2scp.store.errors import FailureReason, MediaError

SIDE = 160  # pixels, width and height of a picture
QUALITY = 60  # of WebP: about 4 kB a picture
PEAK_S = 0.1  # seconds of sound behind one peak ...
MOST_PEAKS = 600  # ... unless that would make more peaks than a drawing can show
KEPT_BYTES = 96 << 20  # of decoded recordings, kept for those asked for again: about 60 of 10 s
PREVIEW_LIMITS = DecodeLimits(seconds_per_file=120.0)


class Sight(StrEnum):
    """What became of the wish to see a file."""

    SHOWN = "shown"
    GONE = "gone"  # no file there
    CHANGED = "changed"  # another content than the store recorded
    UNREADABLE = "unreadable"  # it is there and cannot be decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What can be seen and heard of one file. `fault`: one line that says why there is less, "" otherwise."""

    sight: Sight
    pictures: Mapping[int, bytes] = field(default_factory=dict)  # second -> WebP of SIDE x SIDE
    peaks: tuple[tuple[float, float], ...] = ()  # lowest and highest sample of each `peak_s`, in [-1, 1]
    peak_s: float = PEAK_S
    duration_s: float = 0.0
    seconds: int = 0  # how many have a picture
    fault: str = ""


@dataclass(frozen=True, slots=True)
class _Look:
    """A file decoded, or why not."""

    sight: Sight
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
    """Pictures of some seconds of a local regular file, and the shape of its sound. No file makes it raise.

    `content_sha256`: what the store recorded; a file that has another is not shown. Seconds that the
    recording does not have are left out.
    """
    return _picked(_look(path, content_sha256, limits, ffmpeg), seconds)


def preview_of(clip: Clip, seconds: Iterable[int]) -> Preview:
    """The same of a recording that is decoded already."""
    return _picked(_Look(Sight.SHOWN, clip), seconds)


class Previews:
    """`preview` for many: a file that is asked for again is not decoded again, as far as `kept_bytes` go.

    Not for several threads at once. `decoded` counts the files that were decoded.
    """

    def __init__(
        self,
        kept_bytes: int = KEPT_BYTES,
        limits: DecodeLimits = PREVIEW_LIMITS,
        ffmpeg: str | None = None,
    ) -> None:
        self.decoded = 0
        self._kept_bytes = kept_bytes
        self._limits, self._ffmpeg = limits, ffmpeg
        self._looks: OrderedDict[tuple[str, str | None], _Look] = OrderedDict()

    def preview(self, path: str | Path, seconds: Iterable[int], content_sha256: str | None = None) -> Preview:
        """See the function of this name."""
        key = (str(path), content_sha256)
        look = self._looks.get(key)
        if look is None:
            look = _look(path, content_sha256, self._limits, self._ffmpeg)
            self.decoded += look.clip is not None
            self._looks[key] = look
        self._looks.move_to_end(key)
        while len(self._looks) > 1 and sum(kept.bytes for kept in self._looks.values()) > self._kept_bytes:
            self._looks.popitem(last=False)
        return _picked(look, seconds)


def _look(path: str | Path, content_sha256: str | None, limits: DecodeLimits, ffmpeg: str | None) -> _Look:
    try:
        before = _identity(path)
        if content_sha256 is not None:
            found = str(file_facts(str(path))["content_sha256"])
            if found != content_sha256:
                return _Look(Sight.CHANGED, fault=_changed(found, content_sha256))
        clip = decode(path, limits, ffmpeg)
        if content_sha256 is not None and _identity(path) != before:
            return _Look(Sight.CHANGED, fault="The file changed while it was read.")
    except FileNotFoundError:
        return _Look(Sight.GONE, fault="The file is gone from where it was.")
    except MediaError as error:
        return _Look(Sight.UNREADABLE, fault=f"The file cannot be shown: {error}.")
    return _Look(Sight.SHOWN, clip)


def _changed(found: str, recorded: str) -> str:
    return (
        f"The file is no longer the one that was stored: its SHA-256 begins with {found[:10]}; the store "
        f"recorded {recorded[:10] or 'none'}."
    )


def _identity(path: str | Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to. Raises `MediaError`, `FileNotFoundError`."""
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise MediaError(FailureReason.UNREADABLE, getattr(error, "strerror", None) or str(error)) from None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _picked(look: _Look, seconds: Iterable[int]) -> Preview:
    clip = look.clip
    if clip is None:
        return Preview(sight=look.sight, fault=look.fault)
    there = 0 if clip.frames is None else len(clip.frames)
    wanted = sorted({second for second in seconds if 0 <= second < there})
    pictures = {} if clip.frames is None else {second: _picture(clip.frames[second]) for second in wanted}
    peak_s, peaks = _peaks(clip.waveform)
    return Preview(
        sight=look.sight,
        pictures=pictures,
        peaks=peaks,
        peak_s=peak_s,
        duration_s=clip.duration_s,
        seconds=there,
    )


def _picture(frame: np.ndarray) -> bytes:
    """WebP of one uint8 frame (H, W, 3)."""
    out = io.BytesIO()
    small = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(out, "WEBP", quality=QUALITY, method=4)
    return out.getvalue()


def _peaks(waveform: np.ndarray | None) -> tuple[float, tuple[tuple[float, float], ...]]:
    """(seconds a peak, the peaks) of float32 (S,) at RATE; the last one may stand for less."""
    if waveform is None or not len(waveform):
        return PEAK_S, ()
    slice_S = max(round(PEAK_S * RATE), -(-len(waveform) // MOST_PEAKS))
    starts = np.arange(0, len(waveform), slice_S)
    sound = np.clip(np.nan_to_num(waveform), -1.0, 1.0)
    low, high = np.minimum.reduceat(sound, starts), np.maximum.reduceat(sound, starts)
    return slice_S / RATE, tuple(zip(low.tolist(), high.tolist(), strict=True))
