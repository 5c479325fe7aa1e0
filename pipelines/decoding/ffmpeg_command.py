"""Which ffmpeg runs, and the command it runs with.

One process decodes both streams of a file, each into a pipe of its own: frames as raw RGB, one per
second, and sound as 16 kHz mono float32. Frames are selected before they are scaled, so that the
cost on top of plain decoding is one scaled frame per second.
"""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ffmpeg
import imageio_ffmpeg

from r2scp.pipelines.decoding.probe import FORMATS, AudioTrack, MediaInfo, VideoTrack
from r2scp.store.errors import UsageError

SIZE = 224  # pixels, width and height of a frame: the input of ImageBind's vision tower
RATE = 16_000  # Hz, the input of its audio tower
MAX_LONG_SIDE = 16 * SIZE  # pixels; what is longer than 16:1 is squeezed to this, to bound memory
SLOTS_PER_S = 10  # of which one is kept; the end of a stream is known to 1/SLOTS_PER_S s
TICKS_PER_S = 1_000_000  # the filters' time base (AVTB)
MIN_PLANAR_SIDE = 16  # pixels; below it scaling has fewer taps, and rounds differently, in planes than in RGB
MIN_VERSION = (5, 1)  # the first version of ffmpeg with -fps_mode
HDR_WHITE = 203  # cd/m2, reference white of HDR video, ITU-R BT.2408

#: Layouts that ffmpeg mixes down to mono with the weights of ITU-R BS.775. The channels of any other
#: layout (16 channels, ambisonics, one channel without a name) are averaged.
DOWNMIX_LAYOUTS = {
    *("mono", "stereo", "2.1", "3.0", "3.0(back)", "4.0", "quad", "quad(side)", "3.1", "4.1"),
    *("5.0", "5.0(side)", "5.1", "5.1(side)", "6.0", "6.1", "7.0", "7.1"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """An ffmpeg that runs."""

    path: str
    version: str  # such as "9.0", or the name of a build
    has_zscale: bool  # without this filter HDR video cannot be tone-mapped to SDR


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePass:
    """What one run of ffmpeg decodes."""

    fd: int  # of the open file
    info: MediaInfo  # each of its tracks that is not None is decoded
    shift: int  # see `sampling_shift`
    end_s: float  # decoding stops here
    max_pixels: int  # of one frame


@cache
def find_program(path: str | None) -> Program:
    """The ffmpeg at `path`, or the one inside imageio-ffmpeg. Raises UsageError if it is unusable."""
    try:
        exe = path or imageio_ffmpeg.get_ffmpeg_exe()
        command = [exe, "-version"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise UsageError(
            f"no usable ffmpeg at {path or 'its usual places'} ({error}); "
            "install imageio-ffmpeg, which bundles one, or give the path to another"
        ) from error
    match = re.match(r"ffmpeg version (\S+)", text)
    if not match:
        raise UsageError(
            f"{exe} must be ffmpeg; `-version` prints {text[:60]!r}; give the path to another, or none"
        )
    number = re.match(r"n?(\d+)\.(\d+)", match[1])
    version = f"{number[1]}.{number[2]}" if number else match[1]
    if number and (int(number[1]), int(number[2])) < MIN_VERSION:
        minimum = ".".join(map(str, MIN_VERSION))
        raise UsageError(
            f"ffmpeg must be {minimum} or newer; {exe} is {version}; give the path to a newer one, or none"
        )
    return Program(path=exe, version=version, has_zscale="--enable-libzimg" in text)


def sampling_shift(duration_s: float | None) -> int:
    """Ticks to add so that the frame for second 0 is at 0.5 s: 0 unless the clip is shorter than that."""
    if duration_s is None or duration_s >= 0.5:
        return 0
    return round((0.5 - duration_s / 2) * TICKS_PER_S)


def filter_graph(*filters: tuple[str, Any]) -> str:
    """A linear filter graph in ffmpeg's syntax: each filter with its one value or its options."""
    links = []
    for name, value in filters:
        options = value.items() if isinstance(value, dict) else [(None, value)]
        links.append(f"{name}=" + ":".join(f"{k}='{v}'" if k else f"'{v}'" for k, v in options))
    return ",".join(links)


def video_graph(track: VideoTrack, decode_pass: DecodePass, program: Program) -> str:
    """The graph from a video stream to one RGB frame per second: the one shown at t + 0.5 s.

    That is the last frame whose time is not later. `fps` cuts time into slots of 1/SLOTS_PER_S s and gives
    slot k the last frame of time <= k/SLOTS_PER_S: times are moved on by one slot less one tick, then
    rounded down, which is rounding up with equality kept. Its end is rounded up, so the last frame
    is repeated for less than a slot beyond the end of the stream, and a second whose middle is that
    very end still gets its frame. `start_time` repeats the first frame back to time 0.

    The picture is scaled as it is shown: rotated (ffmpeg does that by itself), with square pixels,
    the short side to SIZE by bicubic interpolation (a = -0.5, as Pillow's), then the centre is cropped.
    """
    scaling = {
        "w": f"if(gte(dar,1),min(trunc({SIZE}*dar+1e-6),{MAX_LONG_SIDE}),{SIZE})",
        "h": f"if(gte(dar,1),{SIZE},min(trunc({SIZE}/dar+1e-6),{MAX_LONG_SIDE}))",
        "flags": "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp",
        "param0": 0,
        "param1": 0.5,
    }
    to_sdr = [
        ("format", "gbrp16le"),
        ("zscale", {"t": "linear", "npl": HDR_WHITE}),
        ("format", "gbrpf32le"),
        ("zscale", {"p": "bt709"}),
        ("tonemap", {"tonemap": "mobius", "desat": 0}),
        ("zscale", {"t": "bt709"}),
    ]
    return filter_graph(
        ("trim", {"end": decode_pass.end_s}),
        ("settb", "AVTB"),
        ("setpts", f"PTS+{decode_pass.shift + TICKS_PER_S // SLOTS_PER_S - 1}"),
        ("fps", {"fps": SLOTS_PER_S, "start_time": 0, "round": "down", "eof_action": "pass"}),
        ("select", f"eq(mod(pts,{SLOTS_PER_S}),{SLOTS_PER_S // 2})"),
        ("scale", scaling),
        *(to_sdr if track.hdr and program.has_zscale else planar_filters(track)),
        ("format", "rgb24"),
        ("crop", {"w": SIZE, "h": SIZE}),
    )


def planar_filters(track: VideoTrack) -> tuple[tuple[str, Any], ...]:
    """Filters that scale the picture into three planes and crop it before these are interleaved.

    The values are those of scaling straight to RGB, in half the time: swscale vectorises planes but not
    pixels of three bytes. Where it would round differently, in pictures that are very small or need no
    scaling in one direction, there are none.
    """
    if min(track.width, track.height) < MIN_PLANAR_SIDE or SIZE in (track.width, track.height):
        return ()
    return ("format", "gbrp"), ("crop", {"w": SIZE, "h": SIZE})


def audio_graph(track: AudioTrack, decode_pass: DecodePass) -> str:
    """The graph from an audio stream to 16 kHz mono.

    Gaps in the timestamps become silence, so that what follows keeps its time. Channel weights sum to
    at most 1, so that nothing clips: stereo is the plain mean.
    """
    channels = "+".join(f"c{i}" for i in range(track.channels))
    average = ("pan", f"mono|c0<{channels}")  # "<": weights that sum to 1
    return filter_graph(
        ("atrim", {"end": decode_pass.end_s}),
        *([average] if track.channels and track.layout not in DOWNMIX_LAYOUTS else ()),
        ("aresample", {"osr": RATE, "async": 1, "rematrix_maxval": 1}),
        ("aformat", {"sample_fmts": "flt", "channel_layouts": "mono"}),
    )


def build_command(decode_pass: DecodePass, program: Program, pipes: Sequence[int]) -> list[str]:
    """The command of one run; frames go to the first of `pipes`, sound to the next.

    Each stream has a graph of its own: a change of the audio format in mid-file rebuilds the graph,
    which must not restart the count of frames. `scale` handles a change of picture size.
    """
    source = ffmpeg.input(
        f"file:/dev/fd/{decode_pass.fd}",
        format=decode_pass.info.format,
        protocol_whitelist="file",
        format_whitelist=FORMATS,
        threads=1,  # one core per clip: clips are decoded in parallel
        **{"max_pixels:v": decode_pass.max_pixels, "reinit_filter:v": 0},
    )
    outputs = []
    tracks = [track for track in (decode_pass.info.video, decode_pass.info.audio) if track]
    for track, pipe in zip(tracks, pipes, strict=True):
        if isinstance(track, VideoTrack):
            options = {
                "format": "rawvideo",
                "fps_mode": "passthrough",
                "vf": video_graph(track, decode_pass, program),
            }
        else:
            options = {"format": "f32le", "af": audio_graph(track, decode_pass)}
        options |= {"threads": 1, "filter_threads": 1}
        options |= {"flush_packets": 0}  # writes sound in blocks, not in packets of 23 ms
        outputs.append(source[str(track.index)].output(f"pipe:{pipe}", **options))
    log_options = ["-hide_banner", "-nostdin", "-nostats", "-v", "level+verbose"]
    return ffmpeg.merge_outputs(*outputs).global_args(*log_options).compile(cmd=program.path)
