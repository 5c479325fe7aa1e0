"""Proves that a preview shows the very second of the very file, and shows nothing where it cannot be sure.

Each second of the picture has a grey of its own and the sound gets louder at a known second, so a picture
and a peak tell where they are from. Files are replaced, removed, damaged and swapped while they are read.
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
from r2scp.jobs.html.thumbnails import MOST_PEAKS, PEAK_S, SIDE, Preview, Previews, Sight, preview, preview_of
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
    made = [
        "-f",
        "lavfi",
        "-i",
        level,
        "-f",
        "lavfi",
        "-i",
        sound,
        "-c:v",
        "libx264",
        "-qp",
        "0",
        "-c:a",
        "aac",
    ]
    return render(path, made)


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


def empty(found: Preview) -> bool:
    return not (found.pictures or found.peaks)


def test_pictures_are_of_the_seconds_that_were_asked_for(stepped: Path) -> None:
    found = preview(stepped, [5, 0, 3, 3, 99, -1], digest(stepped))
    assert found.sight is Sight.SHOWN
    assert found.fault == ""
    assert list(found.pictures) == [0, 3, 5]
    for second, content in found.pictures.items():
        assert abs(picture(content).mean() - grey(second)) < 4, second
    assert found.seconds == SECONDS
    assert found.duration_s == pytest.approx(SECONDS, abs=0.1)


def test_peaks_are_the_extremes_of_each_tenth_of_a_second(stepped: Path) -> None:
    found = preview(stepped, [])
    assert found.peak_s == PEAK_S
    assert abs(len(found.peaks) - SECONDS / PEAK_S) <= 2
    low, high = np.array(found.peaks).T
    soft, loud = slice(2, int(LOUD_FROM / PEAK_S) - 2), slice(int(LOUD_FROM / PEAK_S) + 2, len(low) - 3)
    assert high[soft] == pytest.approx(0.1, abs=0.03)
    assert high[loud] == pytest.approx(0.8, abs=0.1)
    assert low[loud] == pytest.approx(-0.8, abs=0.1)


def test_a_recording_that_is_decoded_already_gives_the_same(stepped: Path) -> None:
    assert preview_of(decode(stepped), [1, 2]) == preview(stepped, [1, 2])


def test_long_sound_has_a_bounded_number_of_peaks() -> None:
    rng = np.random.default_rng(1)
    for samples in (1, 1599, 1600, 1601, 16_000 * 61 + 7, 16_000 * 900):
        waveform = rng.uniform(-1, 1, samples).astype(np.float32)
        peak_s, peaks = preview_module._peaks(waveform)
        assert 1 <= len(peaks) <= MOST_PEAKS
        assert max(high for _, high in peaks) == waveform.max()
        assert min(low for low, _ in peaks) == waveform.min()
        assert len(peaks) * peak_s >= samples / 16_000


def test_sound_that_is_no_number_or_beyond_full_scale_stays_inside() -> None:
    waveform = np.array([np.nan, np.inf, -np.inf, 7, -7] * 900, np.float32)
    _, peaks = preview_module._peaks(waveform)
    assert set(peaks) == {(-1.0, 1.0)}


def test_a_file_that_is_gone_is_said_to_be_gone(own: Path) -> None:
    recorded = digest(own)
    own.unlink()
    for path in (own, own / "below", "s3://bucket/clip.mp4"):
        found = preview(path, [0], recorded)
        assert found.sight is Sight.GONE
        assert "gone" in found.fault
        assert empty(found)


def test_a_file_with_another_content_is_not_shown(own: Path) -> None:
    recorded = digest(own)
    content = bytearray(own.read_bytes())
    content[-1] ^= 1  # plays just as well
    own.write_bytes(content)
    found = preview(own, [0], recorded)
    assert found.sight is Sight.CHANGED
    assert empty(found)
    assert recorded[:10] in found.fault
    assert digest(own)[:10] in found.fault
    assert preview(own, [0]).sight is Sight.SHOWN  # where nothing was recorded


def test_a_clip_of_which_no_digest_was_recorded_is_not_evidence(own: Path) -> None:
    found = preview(own, [0], "")
    assert found.sight is Sight.CHANGED
    assert empty(found)


def test_a_file_that_is_swapped_while_it_is_read_is_not_shown(
    own: Path, stepped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = digest(own)

    def swapped(path: Path, *_: object) -> object:
        os.replace(shutil.copy(stepped, own.with_suffix(".new")), own)
        return decode(path)

    monkeypatch.setattr(preview_module, "decode", swapped)
    found = preview(own, [0], recorded)
    assert found.sight is Sight.CHANGED
    assert empty(found)


@pytest.mark.parametrize(
    "kind", ["nothing", "text", "half", "folder", "fifo", "playlist", "zero byte", "odd name"]
)
def test_what_cannot_be_decoded_says_so_in_one_line(kind: str, own: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)  # nobody writes: it must not be waited for
    elif kind == "zero byte":
        path = Path("a\0b.mp4")
    elif kind == "odd name":
        path = tmp_path / "\ud800.mp4"  # no file system takes it
    else:
        content = {"nothing": b"", "text": b"no media at all " * 99, "half": own.read_bytes()[:9000]}
        path.write_bytes(content.get(kind, f"#EXTM3U\nfile://{own}\n".encode()))
    found = preview(path, [0], digest(path) if path.is_file() else "0" * 64)
    assert found.sight is Sight.UNREADABLE
    assert found.fault
    assert "\n" not in found.fault
    assert empty(found)


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


def test_a_file_that_is_asked_for_again_is_decoded_once(own: Path, stepped: Path) -> None:
    previews, recorded = Previews(), digest(own)
    first = previews.preview(own, [0], recorded)
    second = previews.preview(own, [1, 2], recorded)
    assert previews.decoded == 1
    assert (list(first.pictures), list(second.pictures)) == ([0], [1, 2])
    assert previews.preview(own, [0], "f" * 64).sight is Sight.CHANGED  # another record is another question
    previews.preview(stepped, [0])
    assert previews.decoded == 2


def test_what_is_kept_is_bounded(own: Path, stepped: Path) -> None:
    previews = Previews(kept_bytes=1)
    for path in (own, stepped, own, own):
        previews.preview(path, [0])
    assert previews.decoded == 3  # the last one is kept, whatever its size
    assert len(previews._looks) == 1


def test_the_ffmpeg_that_is_named_is_the_one_that_runs(own: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        Previews(ffmpeg="/nowhere/ffmpeg").preview(own, [0])
