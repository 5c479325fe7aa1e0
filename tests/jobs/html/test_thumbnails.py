"""A preview shows the requested seconds of the recorded file, and nothing if the file is another one.

Each second of the picture has its own grey and the sound gets louder at a known second, so pictures and peaks
can be located. Files are replaced, removed, damaged, and swapped while they are read.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r2scp.jobs.html import thumbnails as preview_module
from r2scp.jobs.html.thumbnails import (
    MAX_PEAKS,
    PEAK_S,
    SIDE,
    Preview,
    Previews,
    PreviewStatus,
    preview,
)
from r2scp.pipelines.decoding.decode import decode
from r2scp.store.errors import UsageError

Render = Callable[[Path, Sequence[str]], Path]
SECONDS = 6
LOUD_FROM = 4  # second


def grey(second: int) -> int:
    return 40 + 30 * second


@pytest.fixture(scope="session")
def stepped(tmp_path_factory: pytest.TempPathFactory, render: Render) -> Path:
    """6 s, each second its own grey; soft up to second 4, loud from then on."""
    path = tmp_path_factory.mktemp("preview") / "stepped.mp4"
    shades = "geq=lum='16+(40+30*floor(T))*219/255':cb=128:cr=128"
    level = f"color=black:s=64x64:r=8:d={SECONDS},format=yuv420p,{shades}"
    sound = f"aevalsrc='0.1*sin(2*PI*440*t)*(1+7*gte(t,{LOUD_FROM}))':s=16000:d={SECONDS}"
    inputs = ["-f", "lavfi", "-i", level, "-f", "lavfi", "-i", sound]
    return render(path, [*inputs, "-c:v", "libx264", "-qp", "0", "-c:a", "aac"])


@pytest.fixture
def own(stepped: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copy(stepped, tmp_path / "own.mp4"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def picture(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "WEBP"
        assert image.size == (SIDE, SIDE)
        return np.asarray(image.convert("L"), dtype=float)


def is_empty(shown: Preview) -> bool:
    return not (shown.pictures or shown.peaks)


def test_pictures_are_of_the_requested_seconds(stepped: Path) -> None:
    shown = preview(stepped, [5, 0, 3, 3, 99, -1], digest(stepped))
    assert shown.status is PreviewStatus.SHOWN
    assert shown.fault == ""
    assert list(shown.pictures) == [0, 3, 5]
    for second, content in shown.pictures.items():
        assert abs(picture(content).mean() - grey(second)) < 4, second
    assert shown.seconds == SECONDS
    assert shown.duration_s == pytest.approx(SECONDS, abs=0.1)


def test_peaks_are_the_extremes_of_each_tenth_of_a_second(stepped: Path) -> None:
    shown = preview(stepped, [])
    assert shown.peak_s == PEAK_S
    assert abs(len(shown.peaks) - SECONDS / PEAK_S) <= 2
    low, high = np.array(shown.peaks).T
    soft, loud = slice(2, int(LOUD_FROM / PEAK_S) - 2), slice(int(LOUD_FROM / PEAK_S) + 2, len(low) - 3)
    assert high[soft] == pytest.approx(0.1, abs=0.03)
    assert high[loud] == pytest.approx(0.8, abs=0.1)
    assert low[loud] == pytest.approx(-0.8, abs=0.1)


def test_long_sound_has_a_bounded_number_of_peaks() -> None:
    rng = np.random.default_rng(1)
    for samples in (1, 1599, 1600, 1601, 16_000 * 61 + 7, 16_000 * 900):
        waveform = rng.uniform(-1, 1, samples).astype(np.float32)
        peak_s, peaks = preview_module._peaks(waveform)
        assert 1 <= len(peaks) <= MAX_PEAKS
        assert max(high for _, high in peaks) == waveform.max()
        assert min(low for low, _ in peaks) == waveform.min()
        assert len(peaks) * peak_s >= samples / 16_000


def test_invalid_samples_stay_within_full_scale() -> None:
    waveform = np.array([np.nan, np.inf, -np.inf, 7, -7] * 900, np.float32)
    _, peaks = preview_module._peaks(waveform)
    assert set(peaks) == {(-1.0, 1.0)}


def test_a_file_that_no_longer_exists_is_gone(own: Path) -> None:
    recorded = digest(own)
    own.unlink()
    for path in (own, own / "below", "s3://bucket/clip.mp4"):
        shown = preview(path, [0], recorded)
        assert shown.status is PreviewStatus.GONE
        assert "no longer exists" in shown.fault
        assert is_empty(shown)


def test_a_file_with_other_content_is_not_shown(own: Path) -> None:
    recorded = digest(own)
    content = bytearray(own.read_bytes())
    content[-1] ^= 1  # plays just as well
    own.write_bytes(content)
    shown = preview(own, [0], recorded)
    assert shown.status is PreviewStatus.CHANGED
    assert is_empty(shown)
    assert recorded[:10] in shown.fault
    assert digest(own)[:10] in shown.fault
    assert preview(own, [0]).status is PreviewStatus.SHOWN  # no digest to compare with


def test_a_file_without_a_recorded_digest_is_not_shown(own: Path) -> None:
    shown = preview(own, [0], "")
    assert shown.status is PreviewStatus.CHANGED
    assert is_empty(shown)


def test_a_file_that_is_swapped_while_it_is_read_is_not_shown(
    own: Path, stepped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = digest(own)

    def swapped(path: Path, *_: object) -> object:
        os.replace(shutil.copy(stepped, own.with_suffix(".new")), own)
        return decode(path)

    monkeypatch.setattr(preview_module, "decode", swapped)
    shown = preview(own, [0], recorded)
    assert shown.status is PreviewStatus.CHANGED
    assert is_empty(shown)


@pytest.mark.parametrize(
    "kind", ["nothing", "text", "half", "folder", "fifo", "playlist", "zero byte", "odd name"]
)
def test_an_unreadable_file_has_a_reason_of_one_line(kind: str, own: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)  # nobody writes to it: it must not be waited for
    elif kind == "zero byte":
        path = Path("a\0b.mp4")
    elif kind == "odd name":
        path = tmp_path / "\ud800.mp4"  # no file system takes it
    else:
        content = {"nothing": b"", "text": b"no media at all " * 99, "half": own.read_bytes()[:9000]}
        path.write_bytes(content.get(kind, f"#EXTM3U\nfile://{own}\n".encode()))
    shown = preview(path, [0], digest(path) if path.is_file() else "0" * 64)
    assert shown.status is PreviewStatus.UNREADABLE
    assert shown.fault
    assert "\n" not in shown.fault
    assert is_empty(shown)


def test_a_recording_without_sound_or_picture_has_the_other(
    tmp_path: Path, stepped: Path, render: Render
) -> None:
    silent = render(tmp_path / "silent.mp4", ["-i", str(stepped), "-an", "-c", "copy"])
    blind = render(tmp_path / "blind.m4a", ["-i", str(stepped), "-vn", "-c", "copy"])
    seen, heard = preview(silent, [0, 1]), preview(blind, [0, 1])
    assert len(seen.pictures) == 2
    assert seen.peaks == ()
    assert not heard.pictures
    assert heard.peaks
    assert seen.fault == heard.fault == ""


def test_a_file_is_decoded_once(own: Path, stepped: Path) -> None:
    previews, recorded = Previews(), digest(own)
    first = previews.preview(own, [0], recorded)
    second = previews.preview(own, [1, 2], recorded)
    assert previews.decoded == 1
    assert (list(first.pictures), list(second.pictures)) == ([0], [1, 2])
    assert previews.preview(own, [0], "f" * 64).status is PreviewStatus.CHANGED
    previews.preview(stepped, [0])
    assert previews.decoded == 2


def test_the_cache_is_bounded(own: Path, stepped: Path) -> None:
    previews = Previews(cache_bytes=1)
    for path in (own, stepped, own, own):
        previews.preview(path, [0])
    assert previews.decoded == 3  # the last file is always cached
    assert len(previews._cache) == 1


def test_the_given_ffmpeg_is_used(own: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        Previews(ffmpeg="/nowhere/ffmpeg").preview(own, [0])
