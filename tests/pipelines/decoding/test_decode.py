"""Decoding puts every frame and every sound at its own second.

The media are generated with ffmpeg. Each video frame shows its own number by its brightness (the left
half the low hexadecimal digit, the right half the high one), so that a token reveals which frame it
shows; sounds are tones of known pitch and time. Colours and corners show the geometry. Real stills are
compared with reference tensors, real clips with an independent probe.
"""

import csv
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from r2scp.pipelines.decoding.decode import Clip, DecodeLimits, decode, decode_fingerprint, token_count
from r2scp.pipelines.decoding.ffmpeg_command import find_program
from r2scp.store.errors import FailureReason, MediaError, UsageError
from r2scp.store.schema import ModalityStatus

RATE = 16_000  # Hz
PRESENT, ABSENT = ModalityStatus.PRESENT, ModalityStatus.ABSENT
LOSSLESS = ["-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuv420p", "-bf", "3"]

Make = Callable[..., Path]


def counted(fps: object, seconds: float, size: str = "64x64") -> list[str]:
    """Input arguments: a video in which frame n carries the number n (below 256)."""
    digits = "16+13*if(lt(X,W/2),mod(N,16),floor(N/16))"
    source = f"color=black:s={size}:r={fps}:d={seconds},format=yuv420p,geq=lum='{digits}':cb=128:cr=128"
    return ["-f", "lavfi", "-i", source]


def tone(hertz: int, seconds: float, rate: int = 44100) -> list[str]:
    return ["-f", "lavfi", "-i", f"sine={hertz}:r={rate}:d={seconds}"]


def numbers(clip: Clip) -> list[int]:
    """The frame numbers that the tokens show."""
    assert clip.frames is not None
    grey = clip.frames[:, 40:180].astype(float).mean(axis=(1, 3))  # (T, 224)
    low, high = grey[:, 20:90].mean(axis=1), grey[:, 134:204].mean(axis=1)
    digit = 13 * 255 / 219  # levels of RGB from one digit to the next
    return [round(h / digit) * 16 + round(lo / digit) for lo, h in zip(low, high, strict=True)]


def shown(pts: list[float], seconds: float) -> list[int]:
    """The oracle: index of the last frame with pts <= t + 0.5 for each second t (the first, if none)."""
    middles = [t + 0.5 for t in range(math.floor(seconds + 0.5))]
    return [max([i for i, at in enumerate(pts) if at <= middle + 1e-9], default=0) for middle in middles]


def pitch(waveform: np.ndarray) -> float:
    """Frequency of the strongest line, Hz."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(np.argmax(spectrum) * RATE / len(waveform))


def loudness(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(waveform.astype(float) ** 2)))


# --- which frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "extension"),
    [("25", "mp4"), ("30000/1001", "mp4"), ("24", "mkv"), ("25/2", "mkv"), ("10", "mp4"), ("1", "mkv")],
)
def test_each_token_shows_the_frame_at_its_middle(make: Make, fps: str, extension: str) -> None:
    path = make(f"cfr{fps.replace('/', '_')}.{extension}", *counted(fps, 6), *LOSSLESS)
    rate = Fraction(fps)
    count = math.ceil(6 * rate)
    unit = Fraction(1, 1000) if extension == "mkv" else Fraction(1, 10**9)  # Matroska rounds to ms
    pts = [float(math.floor(n / rate / unit + Fraction(1, 2)) * unit) for n in range(count)]
    clip = decode(path)
    assert numbers(clip) == shown(pts, 6.0)
    assert clip.visual.status is PRESENT
    assert (clip.visual.expected, clip.visual.decoded) == (6, 6)
    assert clip.audio.status is ABSENT
    assert clip.waveform is None


def test_variable_frame_rate(make: Make) -> None:
    keep = "not(between(n,20,70))*not(between(n,90,93))"
    path = make("vfr.mkv", *counted(25, 6), "-vf", f"select='{keep}'", "-fps_mode", "passthrough", *LOSSLESS)
    kept = [n for n in range(150) if not 20 <= n <= 70 and not 90 <= n <= 93]
    clip = decode(path)
    assert numbers(clip) == [kept[i] for i in shown([n / 25 for n in kept], 6.0)]
    assert clip.visual.status is PRESENT  # a frame that is shown for long is no damage


@pytest.mark.parametrize("extension", ["ts", "mkv", "mp4"])
def test_a_non_zero_start(make: Make, extension: str) -> None:
    args = ["-output_ts_offset", "3.72", *LOSSLESS]
    clip = decode(make(f"late.{extension}", *counted(25, 4), *args))
    assert numbers(clip) == shown([n / 25 for n in range(100)], 4.0)


def test_edit_list_hides_the_beginning(make: Make) -> None:
    whole = make("whole.mp4", *counted(25, 6), *tone(440, 6), *LOSSLESS, "-g", "250", "-c:a", "aac")
    cut = make("cut.mp4", "-ss", "2.2", "-i", whole, "-c", "copy")
    clip = decode(cut)
    assert numbers(clip) == [math.floor((2.2 + t + 0.5) * 25 + 1e-9) for t in range(4)]
    assert clip.visual.status is PRESENT
    assert clip.audio.status is PRESENT
    assert clip.duration_s == pytest.approx(3.8, abs=0.06)


def test_a_picture_later_than_the_sound_is_repeated_back_to_the_start(make: Make) -> None:
    path = make("vlate.mkv", "-itsoffset", "2", *counted(25, 4), *tone(440, 6), *LOSSLESS, "-c:a", "flac")
    clip = decode(path)
    assert numbers(clip) == [0, 0, 12, 37, 62, 87]
    assert len(clip.waveform) == pytest.approx(6 * RATE, abs=RATE // 50)


def test_sound_later_than_the_picture_is_preceded_by_silence(make: Make) -> None:
    path = make("alate.mkv", *counted(25, 4), "-itsoffset", "1.5", *tone(440, 2), *LOSSLESS, "-c:a", "flac")
    clip = decode(path)
    start = int(1.5 * RATE)
    assert loudness(clip.waveform[: start - 200]) == 0.0
    level = loudness(clip.waveform[start + 200 : start + 4000])
    assert level == pytest.approx(0.125 / math.sqrt(2), rel=0.05)
    assert clip.audio.status is PRESENT
    assert clip.audio.decoded == pytest.approx(2.0, abs=0.01)


def test_picture_and_sound_keep_their_own_lengths(make: Make) -> None:
    path = make("lengths.mp4", *counted(25, 2), *tone(440, 5), *LOSSLESS, "-c:a", "aac")
    clip = decode(path)
    assert len(clip.frames) == 2
    assert len(clip.waveform) == pytest.approx(5 * RATE, abs=400)
    assert (clip.visual.status, clip.audio.status) == (PRESENT, PRESENT)
    assert clip.duration_s == pytest.approx(5, abs=0.05)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, [0]), (0.2, [2]), (0.48, [6]), (0.6, [12]), (1.0, [12]), (1.4, [12]), (2.48, [12, 37])],
)
def test_short_clips(make: Make, seconds: float, expected: list[int]) -> None:
    clip = decode(make(f"short{seconds}.mp4", *counted(25, seconds), *LOSSLESS))
    assert numbers(clip) == expected
    assert clip.visual.status is PRESENT


def test_a_second_whose_middle_is_the_end_still_has_its_frame(make: Make) -> None:
    clip = decode(make("half.mp4", *counted(30, 2.5), *LOSSLESS))
    assert numbers(clip) == [15, 45, 74]
    assert clip.visual.decoded == token_count(2.5) == 3


def test_token_count() -> None:
    counts = {0.0: 1, 0.3: 1, 1.49: 1, 1.5: 2, 2.5: 3, 9.999999999: 10, 10.0: 10, 10.5: 11, 362.767: 363}
    assert {duration_s: token_count(duration_s) for duration_s in counts} == counts


def test_no_duration_in_the_header(make: Make) -> None:
    video, sound = ["-c:v", "libvpx", "-b:v", "1M"], ["-c:a", "libopus"]
    path = make("live.webm", *counted(25, 5), *tone(440, 5), *video, *sound, "-live", "1")
    clip = decode(path)
    assert [abs(a - b) <= 1 for a, b in zip(numbers(clip), [12, 37, 62, 87, 112], strict=True)]
    assert (clip.visual.status, clip.audio.status) == (PRESENT, PRESENT)
    assert clip.duration_s == pytest.approx(5, abs=0.05)


def test_a_bit_rate_is_no_duration(make: Make) -> None:
    """The bit rate of a VBR MP3 without a header gives a wrong length."""
    quiet_then_loud = "aevalsrc='if(lt(t,2),0,random(0)-0.5)':s=44100:d=8"
    encoding = ["-c:a", "libmp3lame", "-q:a", "2", "-write_xing", "0"]
    clip = decode(make("vbr.mp3", "-f", "lavfi", "-i", quiet_then_loud, *encoding))
    assert clip.audio.status is PRESENT
    assert clip.duration_s == pytest.approx(8, abs=0.1)


def test_size_and_sample_rate_change_in_mid_stream(make: Make) -> None:
    encoding = [*LOSSLESS, "-c:a", "mp2"]
    first = make("first.ts", *counted(25, 3), *tone(440, 3), *encoding)
    more = ["-vf", "scale=96:96:flags=neighbor", "-ar", "48000", "-ac", "2", "-output_ts_offset", "3"]
    second = make("second.ts", *counted(25, 3), *tone(440, 3), *more, *encoding)
    joined = first.with_name("joined.ts")
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    clip = decode(joined)
    assert numbers(clip)[:3] == [12, 37, 62]
    assert len(clip.frames) == 6
    assert set(numbers(clip)[3:]) <= {11, 12, 13, 36, 37, 38, 61, 62, 63}
    assert len(clip.waveform) == pytest.approx(6 * RATE, abs=RATE // 4)
    assert pitch(clip.waveform[-RATE:]) == pytest.approx(440, abs=2)


# --- picture ----------------------------------------------------------------------------------------

LEFT_RED = "color=blue:s=128x64:r=5:d=1,format=yuv420p,drawbox=c=red:w=64:h=64:t=fill"


def colour(frame: np.ndarray, row: int, column: int) -> str:
    """The name of the primary at one pixel."""
    return ("red", "green", "blue")[int(np.argmax(frame[row, column].astype(int)))]


@pytest.mark.parametrize(
    ("option", "top_bottom_left_right"),
    [
        (["-display_rotation", "0"], "- - red blue"),
        (["-display_rotation", "90"], "blue red - -"),  # counter-clockwise: the left side goes down
        (["-display_rotation", "180"], "- - blue red"),
        (["-display_rotation", "270"], "red blue - -"),
        (["-display_hflip"], "- - blue red"),
    ],
)
def test_rotation_and_reflection(make: Make, option: list[str], top_bottom_left_right: str) -> None:
    plain = make("plain.mp4", "-f", "lavfi", "-i", LEFT_RED, "-c:v", "libx264")
    name = "-".join(option).strip("-") + ".mp4"
    frame = decode(make(name, *option, "-i", plain, "-c", "copy")).frames[0]
    places = [(40, 112), (184, 112), (112, 40), (112, 184)]
    for (row, column), expected in zip(places, top_bottom_left_right.split(), strict=True):
        assert expected in ("-", colour(frame, row, column))


def test_pixels_are_made_square(make: Make) -> None:
    """Coded 64x64, shown 128x64: the centre cut holds just the coded columns 16 to 47."""
    bars = "color=green:s=64x64:r=5:d=1,drawbox=c=red:w=15:t=fill,drawbox=c=blue:x=49:w=15:t=fill,setsar=2"
    frame = decode(make("sar.mp4", "-f", "lavfi", "-i", bars, "-c:v", "libx264")).frames[0]
    assert {colour(frame, 112, column) for column in range(8, 216)} == {"green"}


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        *(("64x64", "yuv420p"), ("321x241", "yuv444p10le"), ("33x99", "gbrp"), ("2x2", "yuv420p")),
        *(("1x1", "gbrp"), ("640x8", "yuv420p"), ("8x640", "yuv444p10le"), ("2000x16", "gbrp")),
    ],
)
def test_any_size_and_depth_comes_out_at_224(make: Make, size: str, pixels: str) -> None:
    source = f"color=0x4080C0:s={size}:r=5:d=1"
    args = ["-f", "lavfi", "-i", source, "-pix_fmt", pixels, "-c:v", "ffv1"]
    clip = decode(make(f"{size}{pixels}.mkv", *args))
    assert clip.frames.shape == (1, 224, 224, 3)
    assert clip.frames.dtype == np.uint8
    assert np.abs(clip.frames.astype(int) - [0x40, 0x80, 0xC0]).max() <= 4


def test_hdr_is_shown_as_sdr(make: Make) -> None:
    """A PQ signal of reference white (203 cd/m2, code 0.58) is bright grey, not the 0.58 of SDR."""
    if not find_program(None).has_zscale:
        pytest.skip("this ffmpeg has no zscale")
    white = "color=black:s=64x64:r=5:d=1,format=yuv420p10le,geq=lum=572:cb=512:cr=512"
    tags = ["-color_trc", "smpte2084", "-color_primaries", "bt2020", "-colorspace", "bt2020nc"]
    params = ["-x265-params", "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"]
    path = make("hdr.mp4", "-f", "lavfi", "-i", white, "-c:v", "libx265", *params, *tags)
    grey = decode(path).frames.astype(int)
    assert np.ptp(grey) <= 3
    assert 180 <= grey.mean() <= 240


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_a_still_is_one_frame(make: Make, kind: str) -> None:
    path = make(f"still.{kind}", "-f", "lavfi", "-i", "color=0xC08040:s=320x200", "-frames:v", "1")
    clip = decode(path)
    assert clip.frames.shape[0] == 1
    assert np.abs(clip.frames[0].mean(axis=(0, 1)) - [0xC0, 0x80, 0x40]).max() <= 6
    assert (clip.visual.status, clip.audio.status) == (PRESENT, ABSENT)


def test_transparent_parts_keep_their_own_colour(make: Make) -> None:
    path = make("alpha.png", "-f", "lavfi", "-i", "color=0xC08040@0.0:s=64x64,format=rgba", "-frames:v", "1")
    assert np.abs(decode(path).frames[0].astype(int) - [0xC0, 0x80, 0x40]).max() <= 2


def test_animated_gif(make: Make) -> None:
    args = ["-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"]
    assert numbers(decode(make("count.gif", *counted(10, 4), *args))) == [5, 15, 25, 35]


def test_cover_art_is_no_video(make: Make) -> None:
    cover = make("cover.jpg", "-f", "lavfi", "-i", "color=red:s=64x64", "-frames:v", "1")
    mapping = ["-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v", "attached_pic"]
    clip = decode(make("song.mp3", *tone(440, 2), "-i", cover, *mapping, "-id3v2_version", "3"))
    assert clip.visual.status is ABSENT
    assert clip.frames is None
    assert clip.audio.status is PRESENT


# --- sound ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "channels"), [(8000, 1), (11025, 2), (16000, 1), (44100, 2), (48000, 1), (192000, 2)]
)
def test_tones_keep_pitch_length_and_level(make: Make, rate: int, channels: int) -> None:
    source = f"sine=1000:r={rate}:d=3,volume=4"  # ffmpeg's sine has amplitude 1/8
    path = make(f"tone{rate}-{channels}.wav", "-f", "lavfi", "-i", source, "-ac", channels)
    clip = decode(path)
    assert clip.waveform.dtype == np.float32
    assert len(clip.waveform) == pytest.approx(3 * RATE, abs=32)
    assert pitch(clip.waveform) == pytest.approx(1000, abs=0.5)
    level = 0.5 if channels == 1 else 0.5 * math.sqrt(0.5)  # ffmpeg's -ac 2 keeps the power
    assert np.abs(clip.waveform[800:-800]).max() == pytest.approx(level, rel=0.03)


def test_frequencies_above_8_khz_are_removed(make: Make) -> None:
    clip = decode(make("high.wav", *tone(11_000, 2), "-af", "volume=4"))
    assert loudness(clip.waveform[800:-800]) < 0.35 * 10 ** (-60 / 20)


@pytest.mark.parametrize(
    ("left", "right", "mono", "extension"),
    [
        *((0.5, 0.5, 0.5, "flac"), (0.5, -0.5, 0.0, "flac"), (0.5, 0.0, 0.25, "flac")),
        (0.5, 0.0, 0.25, "wav"),  # a WAV of two channels does not name them left and right
    ],
)
def test_stereo_becomes_its_mean(make: Make, left: float, right: float, mono: float, extension: str) -> None:
    source = f"aevalsrc='{left}*sin(2*PI*440*t)|{right}*sin(2*PI*440*t)':s=16000:d=1:c=stereo"
    clip = decode(make(f"stereo{left}{right}.{extension}", "-f", "lavfi", "-i", source))
    assert np.abs(clip.waveform[800:-800]).max() == pytest.approx(mono, abs=0.01)


@pytest.mark.parametrize(
    ("layout", "channels"), [("5.1", 6), ("7.1", 8), ("quad", 4), ("octagonal", 8), ("16 channels", 16)]
)
def test_every_channel_is_mixed_in_and_none_clips(make: Make, layout: str, channels: int) -> None:
    def render(name: str, live: set[int]) -> float:
        lines = "|".join("0.9*sin(2*PI*440*t)" if i in live else "0" for i in range(channels))
        named = "" if " " in layout else f":c={layout}"
        source = f"aevalsrc='{lines}':s=16000:d=1{named}"
        clip = decode(make(f"{name}.mkv", "-f", "lavfi", "-i", source, "-c:a", "pcm_f32le"))
        return float(np.abs(clip.waveform[800:-800]).max())

    assert 0.85 < render("all", set(range(channels))) <= 1.0 or layout == "5.1"
    silent = [i for i in range(channels) if render(f"only{i}", {i}) < 0.9 / channels / 2]
    assert silent in ([], [3])  # the mono mix leaves out the subwoofer of 5.1 and 7.1


def test_the_default_sound_track_is_chosen(make: Make) -> None:
    tracks = ["-map", "0", "-map", "1", "-map", "2", "-c:a", "aac", *LOSSLESS]
    flags = ["-disposition:a:0", "0", "-disposition:a:1", "default"]
    path = make("tracks.mkv", *counted(25, 2), *tone(440, 2), *tone(1000, 2), *tracks, *flags)
    assert pitch(decode(path).waveform) == pytest.approx(1000, abs=2)


def test_a_gap_in_the_sound_keeps_the_time_of_what_follows(make: Make) -> None:
    """Two seconds of packets are dropped; the tone after them must stay where it was."""
    source = "aevalsrc='if(lt(t,5),0.5*sin(2*PI*440*t),0.5*sin(2*PI*1000*t))':s=16000:d=8"
    whole = make("two.mkv", "-f", "lavfi", "-i", source, "-c:a", "flac", "-frame_size", "1600")
    path = make("gap.mkv", "-i", whole, "-c", "copy", "-bsf:a", "noise=drop='between(pts*tb,2,3.99)'")
    clip = decode(path)
    assert len(clip.waveform) == pytest.approx(8 * RATE, abs=3200)
    assert pitch(clip.waveform[int(5.2 * RATE) : 7 * RATE]) == pytest.approx(1000, abs=2)
    assert loudness(clip.waveform[int(2.3 * RATE) : int(3.7 * RATE)]) == 0.0
    assert clip.audio.status is ModalityStatus.PARTIAL
    assert clip.audio.decoded == pytest.approx(6.0, abs=0.25)
    assert clip.audio.expected == pytest.approx(8.0, abs=0.25)


# --- the interface ----------------------------------------------------------------------------------


def test_threads_give_the_same_clip_and_it_can_be_pickled(make: Make) -> None:
    path = make("same.mp4", *counted(25, 3), *tone(440, 3), *LOSSLESS, "-c:a", "aac")
    clip = decode(path)
    with ThreadPoolExecutor(4) as threads:
        others = list(threads.map(decode, [path] * 8))
    for other in [*others, pickle.loads(pickle.dumps(clip))]:  # noqa: S301  our own bytes
        assert np.array_equal(clip.frames, other.frames)
        assert np.array_equal(clip.waveform, other.waveform)
        assert (clip.visual, clip.audio, clip.duration_s) == (other.visual, other.audio, other.duration_s)


def test_limits_are_checked_before_decoding(make: Make) -> None:
    path = make("limits.mp4", *counted(25, 4, size="128x64"), *LOSSLESS)
    with pytest.raises(MediaError, match="at most 8000 pixels; got 128x64") as error:
        decode(path, DecodeLimits(max_pixels=8000))
    assert error.value.reason is FailureReason.TOO_LARGE
    with pytest.raises(MediaError, match="at most 3 s; got 4 s") as error:
        decode(path, DecodeLimits(max_duration_s=3))
    assert error.value.reason is FailureReason.TOO_LARGE


def test_fingerprint_names_grid_sizes_and_program() -> None:
    fingerprint = decode_fingerprint()
    assert fingerprint == decode_fingerprint(find_program(None).path)
    for part in (find_program(None).version, "224px", "16000hz"):
        assert part in fingerprint


def test_a_program_that_is_no_usable_ffmpeg_is_rejected(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho ffmpeg version 4.4.2-0ubuntu\n")
    old.chmod(0o755)
    for path, message in [
        (str(old), r"5\.1 or newer"),
        (str(tmp_path / "none"), "no usable ffmpeg"),
        ("/bin/true", "must be ffmpeg"),
    ]:
        with pytest.raises(UsageError, match=message):
            decode("whatever.mp4", ffmpeg=path)


# --- real media -------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("name", ["bird_image", "car_image", "dog_image"])
def test_stills_match_the_reference_pixels(shared_dir: Path, name: str) -> None:
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    reference = load_file(shared_dir / "parity" / "images.safetensors")[name].transpose(1, 2, 0)
    pixels = (reference * std + mean) * 255
    frame = decode(shared_dir / "media" / "audio" / f"{name}.jpg").frames[0]
    assert np.abs(frame - pixels).mean() < 1.0  # of 255; 2 are allowed


def manifest(folder: str) -> list[Any]:
    """Rows of the independent probe for one folder of real media."""
    path = Path(__file__).resolve().parents[3].parent / "shared" / "media" / "MANIFEST.csv"
    if not path.is_file():
        return [pytest.param({"path": "none"}, marks=pytest.mark.skip("no real media beside the repository"))]
    with path.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["path"].startswith(folder)]


@pytest.mark.realmedia
@pytest.mark.parametrize("row", manifest("videos/"), ids=lambda row: row["path"])
def test_real_videos_agree_with_the_independent_probe(shared_dir: Path, row: dict[str, str]) -> None:
    clip = decode(shared_dir / "media" / row["path"])
    assert clip.visual.status is (PRESENT if row["has_video"] == "True" else ABSENT)
    assert clip.audio.status is (PRESENT if row["has_audio"] == "True" else ABSENT)
    assert clip.duration_s == pytest.approx(float(row["duration_s"]), abs=0.02)
    assert clip.errors == ""
    length = float(row["video_stream_duration_s"] or row["duration_s"])
    slack = 0.001 if row["video_stream_duration_s"] else 0.1  # the probe's own rounding
    assert token_count(length - slack) <= len(clip.frames) <= token_count(length + slack)
    assert clip.visual.decoded == len(clip.frames)
    if row["has_audio"] == "True":
        assert clip.audio.decoded == pytest.approx(float(row["audio_decoded_s"]), abs=0.08)
        assert np.isfinite(clip.waveform).all()
