"""Which ffmpeg runs, and the command it runs with.

One process gives both streams of a file, each through a pipe of its own: frames as raw RGB,
one for each second, and sound as 16 kHz mono float32. Frames are picked before they are scaled,
so that the cost beside plain decoding is one scaled frame a second.
"""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ffmpeg
import imageio_ffmpeg
from r2scp.pipelines.probe import FORMATS, AudioTrack, Probed, VideoTrack
from r2scp.store.errors import UsageError

SIZE = 224  # pixels, width and height of a frame: what ImageBind's vision tower eats
RATE = 16_000  # Hz, what its audio tower eats
WIDEST = 16 * SIZE  # pixels; a picture longer than 16:1 is squeezed to this, so that memory stays bounded
SLOTS = 10  # a second is cut into so many slots before one is picked; the end is known to 1/SLOTS s
TICK = 1_000_000  # one second in the filters' time base (AVTB, 1 us)
OLDEST = 5.1  # ffmpeg's first version with -fps_mode
HDR_WHITE = 203  # cd/m2, reference white of HDR video, ITU-R BT.2408

#: Layouts that ffmpeg knows how to fold to mono with the weights of ITU-R BS.775. The channels of
#: any other layout (16 channels, ambisonics, 1 channel without a name) are averaged.
FOLDABLE = frozenset(
    [
        "mono",
        "stereo",
        "2.1",
        "3.0",
        "3.0(back)",
        "4.0",
        "quad",
        "quad(side)",
        "3.1",
        "4.1",
        "5.0",
        "5.0(side)",
        "5.1",
        "5.1(side)",
        "6.0",
        "6.1",
        "7.0",
        "7.1",
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """An ffmpeg that was found to work."""

    path: str
    version: str  # such as "9.0", or a build's own name
    maps_tones: bool  # has the zscale filter, so HDR video can be shown as SDR


@cache
def find_program(path: str | None) -> Program:
    """The ffmpeg at `path`, or the one inside imageio-ffmpeg. Raises UsageError when it cannot serve."""
    try:
        exe = path or imageio_ffmpeg.get_ffmpeg_exe()
        said = subprocess.run(
            [exe, "-version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, RuntimeError, subprocess.SubprocessError) as fault:
        raise UsageError(
            f"no usable ffmpeg at {path or 'its usual places'} ({fault}); "
            "install imageio-ffmpeg, which brings one, or name another"
        ) from fault
    found = re.match(r"ffmpeg version (\S+)", said)
    name = found[1] if found else "unknown"
    number = re.match(r"n?(\d+\.\d+)", name)
    if number and float(number[1]) < OLDEST:
        raise UsageError(
            f"ffmpeg must be {OLDEST} or newer; {exe} is {name}; name a newer one or none at all"
        )
    return Program(path=exe, version=number[1] if number else name, maps_tones="--enable-libzimg" in said)


def sampling_shift(duration_s: float | None) -> int:
    """Ticks that bring the moment to be shown in second 0 to 0.5 s: none, but for clips under half a second."""
    if duration_s is None or duration_s >= 0.5:
        return 0
    return round((0.5 - duration_s / 2) * TICK)


def picture(source: Any, *, track: VideoTrack, shift: int, program: Program) -> Any:
    """One RGB frame a second: the one shown at t + 0.5 s, that is the last whose time is not later.

    `fps` cuts time into slots of 1/SLOTS s and gives slot k the last frame of time <= k/SLOTS:
    times are moved on by one slot less one tick, then rounded down, which is rounding up with
    equality kept. Its end is rounded up, so the last frame is held for less than a slot beyond the
    stream's end, and a second whose middle is the very end still gets its frame. `start_time`
    repeats the first frame back to time 0 where the picture starts later than the sound.

    The picture is scaled as it is shown: rotated (ffmpeg does that by itself), with square pixels,
    the short side to SIZE by bicubic interpolation (a = -0.5, as Pillow's), then the centre cut out.
    """
    wide = f"if(gte(dar,1),min(trunc({SIZE}*dar+1e-6),{WIDEST}),{SIZE})"
    high = f"if(gte(dar,1),{SIZE},min(trunc({SIZE}/dar+1e-6),{WIDEST}))"
    frames = (
        source.filter("settb", "AVTB")
        .filter("setpts", f"PTS+{shift + TICK // SLOTS - 1}")
        .filter("fps", fps=SLOTS, start_time=0, round="down", eof_action="pass")
        .filter("select", f"eq(mod(pts,{SLOTS}),{SLOTS // 2})")
        .filter(
            "scale",
            w=wide,
            h=high,
            flags="bicubic+accurate_rnd+full_chroma_int+full_chroma_inp",
            param0=0,
            param1=0.5,
        )
    )
    if track.hdr and program.maps_tones:
        frames = (
            frames.filter("format", "gbrp16le")
            .filter("zscale", t="linear", npl=HDR_WHITE)
            .filter("format", "gbrpf32le")
            .filter("zscale", p="bt709")
            .filter("tonemap", tonemap="hable", desat=0)
            .filter("zscale", t="bt709")
        )
    return frames.filter("format", "rgb24").filter("crop", SIZE, SIZE)


def sound(source: Any, *, track: AudioTrack) -> Any:
    """16 kHz mono. Gaps in the timestamps become silence, so that what follows keeps its time.

    Channels are weighted so that the sum cannot exceed full scale: stereo is the plain mean.
    """
    if track.layout not in FOLDABLE:
        mean = "+".join(f"{1 / track.channels:.9f}*c{i}" for i in range(track.channels))
        source = source.filter("pan", f"mono|c0={mean}")
    return source.filter("aresample", RATE, **{"async": 1, "rematrix_maxval": 1}).filter(
        "aformat", sample_fmts="flt", channel_layouts="mono"
    )


def compose(
    fd: int,
    probed: Probed,
    program: Program,
    *,
    shift: int,
    end_s: float,
    max_pixels: int,
    pipes: Sequence[int],
) -> list[str]:
    """The argument list that decodes the probed tracks: video, if any, to the first of `pipes`."""
    tracks = [t for t in (probed.video, probed.audio) if t]
    source = ffmpeg.input(
        f"file:/dev/fd/{fd}",
        format=probed.format,
        protocol_whitelist="file",
        format_whitelist=FORMATS,
        threads=1,  # one core per clip: clips run side by side
        **{"max_pixels:v": max_pixels, "reinit_filter:v": 0},
    )
    outputs = []
    for track, pipe in zip(tracks, pipes, strict=True):
        stream = source[str(track.index)]
        if isinstance(track, VideoTrack):
            stream = picture(stream.filter("trim", end=end_s), track=track, shift=shift, program=program)
            outputs.append(stream.output(f"pipe:{pipe}", format="rawvideo", fps_mode="passthrough"))
        else:
            stream = sound(stream.filter("atrim", end=end_s), track=track)
            outputs.append(stream.output(f"pipe:{pipe}", format="f32le"))
    joined = ffmpeg.merge_outputs(*outputs).global_args(
        "-hide_banner", "-nostdin", "-nostats", "-filter_complex_threads", "1", "-v", "level+verbose"
    )
    return joined.compile(cmd=program.path)
