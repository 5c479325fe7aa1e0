"""Runs ffmpeg over one opened file and collects its output: frames, sound, and what it logged.

ffmpeg's exit status says little (bit rot ends with 0, a missing stream with 234). What counts is the data
that came through the pipes and the totals that ffmpeg logs for each input stream at the end.
"""

import os
import re
import signal
from dataclasses import dataclass, field, replace

import numpy as np

from r2scp.pipelines.decoding.fault_reasons import classify, summarise_log
from r2scp.pipelines.decoding.ffmpeg_command import (
    RATE,
    SIZE,
    DecodePass,
    Program,
    build_command,
    sampling_shift,
)
from r2scp.pipelines.decoding.probe import MediaInfo, Track
from r2scp.pipelines.decoding.sandbox import Limits, RunResult, StopReason, supervise
from r2scp.store.errors import FailureReason, MediaError

FRAME_BYTES = SIZE * SIZE * 3  # uint8 RGB
SAMPLE_BYTES = 4  # float32
NO_BYTES = memoryview(b"")
OVERRUN_S = 1.0  # how far beyond its expected end a file is decoded

#: A line of ffmpeg's log that reports an error, with `-v level+...`.
ERROR_LINE = re.compile(r"^(?:\[[^\]]* @ 0x[0-9a-f]+\] )*\[(?:error|fatal|panic)\] .*$", re.MULTILINE)
#: "Input stream #0:1 (audio): 432 packets read (89016 bytes); 431 frames decoded; 0 decode errors
#: (441000 samples); " on one line.
STREAM_COUNTS_LINE = re.compile(
    r"Input stream #0:(?P<index>\d+) \(\w+\): \d+ packets read \(\d+ bytes\); (?P<frames>\d+) frames decoded"
    r"(?:; (?P<errors>\d+) decode errors)?(?: \((?P<samples>\d+) samples\))?"
)
#: "[Parsed_fps_3 @ 0x...] [verbose] 300 frames in, 102 frames out; 199 frames dropped, 1 frames duplicated."
DUPLICATED_FRAMES = re.compile(r"frames in, \d+ frames out; \d+ frames dropped, (\d+) frames duplicated")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """What decoding one file may cost. The defaults allow 8K video and an hour of 1080p."""

    seconds_per_file: float = 600.0  # wall time, probe included
    memory_bytes: int = 4 << 30  # of the decoding process
    max_pixels: int = 1 << 26  # of one frame as coded: 8192 x 8192
    max_duration_s: float = 3600.0  # an hour of frames takes half a gigabyte
    stderr_bytes: int = 1 << 16  # of the end of ffmpeg's log


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeJob:
    """One file to decode, and with what."""

    fd: int
    program: Program
    limits: DecodeLimits
    deadline: float  # on the clock of time.monotonic()


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """ffmpeg's totals for one input stream."""

    frames: int = 0
    errors: int = 0
    samples: int = 0


@dataclass(slots=True)
class FfmpegOutput:
    """What ffmpeg made of one file."""

    frames: np.ndarray | None = None  # (T, 224, 224, 3) uint8; maybe a few more than expected
    waveform: np.ndarray | None = None  # (S,) float32, from the first sample of the stream
    counts: dict[int, StreamCounts] = field(default_factory=dict)  # by stream index
    duplicates: int = 0  # slots of 1/SLOTS_PER_S s that repeat the frame before
    error_lines: str = ""  # of ffmpeg's log
    failed: bool = False  # ffmpeg ended with an error status


def start_offset(info: MediaInfo, track: Track) -> float:
    """Seconds from the start of the presentation to the start of the track."""
    if track.start_s is None or info.start_s is None:
        return 0.0
    return max(0.0, track.start_s - info.start_s)


def track_end(info: MediaInfo, track: Track | None) -> float | None:
    """When the track should end by its own header, in seconds; None if it does not say."""
    if track is None or track.duration_s is None:
        return None
    return start_offset(info, track) + track.duration_s


def expected_end(info: MediaInfo) -> float | None:
    """When the whole file should end, in seconds; None if nothing in it says."""
    ends = [info.duration_s, track_end(info, info.video), track_end(info, info.audio)]
    return max((end for end in ends if end is not None), default=None)


def run_ffmpeg(job: DecodeJob, info: MediaInfo) -> FfmpegOutput:
    """Decodes the tracks of `info` in one pass, or each alone if that pass fails.

    Raises MediaError for what concerns the whole file: a timeout, too much data, a crash.
    """
    shift = sampling_shift(track_end(info, info.video) or info.duration_s)
    output = _run_pass(job, info, shift)
    if output.failed and info.video and info.audio:
        picture = _run_pass(job, replace(info, audio=None), shift)
        sound = _run_pass(job, replace(info, video=None), 0)
        output = _merge(picture, sound)
    if info.video and output.frames is None and output.counts.get(info.video.index, StreamCounts()).frames:
        # frames were decoded, but none is shown at 0.5 s: the track is shorter than its header says
        output = _merge(_run_pass(job, replace(info, audio=None), sampling_shift(0.0)), output)
    return output


def _merge(picture: FfmpegOutput, sound: FfmpegOutput) -> FfmpegOutput:
    """The frames of one pass and the waveform of another."""
    return FfmpegOutput(
        frames=picture.frames,
        waveform=sound.waveform,
        counts=sound.counts | picture.counts,
        duplicates=picture.duplicates,
        error_lines=picture.error_lines + sound.error_lines,
        failed=picture.failed or sound.failed,
    )


def _run_pass(job: DecodeJob, info: MediaInfo, shift: int) -> FfmpegOutput:
    """One pass of ffmpeg over the tracks of `info`."""
    end_s = (expected_end(info) or job.limits.max_duration_s) + OVERRUN_S
    max_bytes = {"video": int(end_s + 2) * FRAME_BYTES, "audio": int((end_s + 2) * RATE) * SAMPLE_BYTES}
    kinds = [kind for kind in max_bytes if getattr(info, kind)]
    if not kinds:
        return FfmpegOutput()
    decode_pass = DecodePass(fd=job.fd, info=info, shift=shift, end_s=end_s, max_pixels=job.limits.max_pixels)
    os.lseek(job.fd, 0, os.SEEK_SET)  # where /dev/fd duplicates, as on macOS, the position is shared
    result = supervise(
        lambda pipes: build_command(decode_pass, job.program, pipes),
        Limits(
            deadline=job.deadline,
            memory_bytes=job.limits.memory_bytes,
            pipe_bytes=tuple(max_bytes[kind] for kind in kinds),
            stderr_bytes=job.limits.stderr_bytes,
        ),
        inherit=(job.fd,),
    )
    error_lines = "".join(line + "\n" for line in ERROR_LINE.findall(result.stderr))
    _raise_if_killed(result, error_lines, job)
    data = dict(zip(kinds, result.pipes, strict=True))
    frames = _to_array(data.get("video", NO_BYTES), np.uint8, FRAME_BYTES)
    waveform = _to_array(data.get("audio", NO_BYTES), np.float32, SAMPLE_BYTES)
    duplicates = DUPLICATED_FRAMES.findall(result.stderr)
    return FfmpegOutput(
        frames=frames.reshape(-1, SIZE, SIZE, 3) if len(frames) else None,
        waveform=waveform if len(waveform) else None,
        counts=_stream_counts(result.stderr, error_lines),
        duplicates=int(duplicates[-1]) if duplicates else 0,
        error_lines=error_lines,
        failed=result.returncode != 0,
    )


def _to_array(data: memoryview, dtype: type[np.generic], unit: int) -> np.ndarray:
    """The whole units of `data`, without copying."""
    return np.frombuffer(data, dtype, count=len(data) // unit * unit // np.dtype(dtype).itemsize)


def _stream_counts(log: str, error_lines: str) -> dict[int, StreamCounts]:
    """ffmpeg's totals by stream index; error lines are counted if this version does not count errors."""
    return {
        int(match["index"]): StreamCounts(
            frames=int(match["frames"]),
            errors=int(match["errors"] or error_lines.count("\n")),
            samples=int(match["samples"] or 0),
        )
        for match in STREAM_COUNTS_LINE.finditer(log)
    }


def _raise_if_killed(result: RunResult, error_lines: str, job: DecodeJob) -> None:
    """Raises MediaError for a run that was ended by us or by a signal."""
    if result.stopped is StopReason.TIMEOUT or result.returncode == -signal.SIGXCPU:
        limit_s = job.limits.seconds_per_file
        raise MediaError(FailureReason.TIMEOUT, f"decoding took more than the {limit_s:g} s allowed")
    if result.stopped is StopReason.FLOOD:
        raise MediaError(
            FailureReason.TOO_LARGE, "decoding produced more data than the length of the file allows"
        )
    if classify(error_lines, FailureReason.CORRUPT) is FailureReason.OUT_OF_MEMORY:
        # otherwise the frames it lost would pass for damage of the file
        raise MediaError(FailureReason.OUT_OF_MEMORY, summarise_log(error_lines))
    if result.returncode < 0:
        cause = f"ffmpeg ended by signal {-result.returncode}"
        raise MediaError(
            FailureReason.DECODER_CRASHED, "; ".join(filter(None, [cause, summarise_log(error_lines)]))
        )
