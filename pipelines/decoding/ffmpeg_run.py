"""Runs ffmpeg over one opened file and gathers what it gives: frames, sound, and its own account.

ffmpeg's exit status says little (bit rot ends with 0, a missing stream with 234), so what counts is
what came through the pipes and the tally that ffmpeg logs for each input stream at the end.
"""

import os
import re
import signal
from dataclasses import dataclass, field, replace

import numpy as np

from r2scp.pipelines.decoding.fault_reasons import classify, summarise_log
from r2scp.pipelines.decoding.ffmpeg_command import RATE, SIZE, DecodePass, Program, build_command, sampling_shift
from r2scp.pipelines.decoding.probe import MediaInfo, Track
from r2scp.pipelines.decoding.sandbox import Limits, RunResult, StopReason, supervise
from r2scp.store.errors import FailureReason, MediaError

FRAME_BYTES = SIZE * SIZE * 3  # uint8 RGB
SAMPLE_BYTES = 4  # float32
NO_BYTES = memoryview(b"")
OVERRUN_S = 1.0  # how far past the promised end of a file is looked

#: One line of ffmpeg's log that reports a fault, with `-v level+...`.
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
    """What one file may cost. The defaults let through 8K video and an hour of 1080p."""

    seconds_per_file: float = 600.0  # wall time, probe included
    memory_bytes: int = 4 << 30  # of the decoding process
    max_pixels: int = 1 << 26  # of one frame as coded: 8192 x 8192
    max_duration_s: float = 3600.0  # an hour of frames takes half a gigabyte
    stderr_bytes: int = 1 << 16  # of ffmpeg's own words that are looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeJob:
    """One file on its way through ffmpeg."""

    fd: int
    program: Program
    limits: DecodeLimits
    deadline: float  # on the clock of time.monotonic()


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """ffmpeg's final count for one input stream."""

    frames: int = 0
    errors: int = 0
    samples: int = 0


@dataclass(slots=True)
class FfmpegOutput:
    """What ffmpeg brought of one file."""

    frames: np.ndarray | None = None  # (T, 224, 224, 3) uint8; maybe a few more than promised
    waveform: np.ndarray | None = None  # (S,) float32, from the first sample of the stream
    counts: dict[int, StreamCounts] = field(default_factory=dict)  # by stream index
    duplicates: int = 0  # slots of 1/SLOTS s for which there was no new frame
    error_lines: str = ""  # ffmpeg's error lines
    failed: bool = False  # ffmpeg gave up


def start_offset(probed: MediaInfo, track: Track) -> float:
    """Seconds from the start of the presentation to the start of the track."""
    if track.start_s is None or probed.start_s is None:
        return 0.0
    return max(0.0, track.start_s - probed.start_s)


def track_end(probed: MediaInfo, track: Track | None) -> float | None:
    """When the track should end, in seconds; None where it does not say so itself."""
    if track is None or track.duration_s is None:
        return None
    return start_offset(probed, track) + track.duration_s


def expected_end(probed: MediaInfo) -> float | None:
    """When the whole file should end, in seconds."""
    known = [probed.duration_s, track_end(probed, probed.video), track_end(probed, probed.audio)]
    return max((e for e in known if e is not None), default=None)


def run_ffmpeg(job: DecodeJob, probed: MediaInfo) -> FfmpegOutput:
    """Decodes the tracks of `probed`: in one pass, or each alone after that pass has failed.

    Raises MediaError for what concerns the file as a whole: time, flood, a crash.
    """
    shift = sampling_shift(track_end(probed, probed.video) or probed.duration_s)
    harvest = _run_pass(job, probed, shift)
    if harvest.failed and probed.video and probed.audio:
        seen = _run_pass(job, replace(probed, audio=None), shift)
        harvest = _merge(seen, _run_pass(job, replace(probed, video=None), 0))
    if probed.video and harvest.frames is None and harvest.counts.get(probed.video.index, StreamCounts()).frames:
        # there are frames, but none was on show at 0.5 s: shorter than it promised
        harvest = _merge(_run_pass(job, replace(probed, audio=None), sampling_shift(0.0)), harvest)
    return harvest


def _merge(seen: FfmpegOutput, heard: FfmpegOutput) -> FfmpegOutput:
    """The picture of one run and the sound of another."""
    return FfmpegOutput(
        frames=seen.frames,
        waveform=heard.waveform,
        counts=heard.counts | seen.counts,
        duplicates=seen.duplicates,
        error_lines=seen.error_lines + heard.error_lines,
        failed=seen.failed or heard.failed,
    )


def _run_pass(job: DecodeJob, probed: MediaInfo, shift: int) -> FfmpegOutput:
    """One pass of ffmpeg over the tracks of `probed`."""
    end_s = (expected_end(probed) or job.limits.max_duration_s) + OVERRUN_S
    room = {"video": int(end_s + 2) * FRAME_BYTES, "audio": int((end_s + 2) * RATE) * SAMPLE_BYTES}
    kinds = [kind for kind in room if getattr(probed, kind)]
    if not kinds:
        return FfmpegOutput()
    order = DecodePass(fd=job.fd, probed=probed, shift=shift, end_s=end_s, max_pixels=job.limits.max_pixels)
    os.lseek(job.fd, 0, os.SEEK_SET)  # where /dev/fd duplicates, as on macOS, the position is shared
    finished = supervise(
        lambda pipes: build_command(order, job.program, pipes),
        Limits(
            deadline=job.deadline,
            memory_bytes=job.limits.memory_bytes,
            pipe_bytes=tuple(room[kind] for kind in kinds),
            stderr_bytes=job.limits.stderr_bytes,
        ),
        inherit=(job.fd,),
    )
    faults = "".join(line + "\n" for line in ERROR_LINE.findall(finished.stderr))
    _raise_if_killed(finished, faults, job)
    brought = dict(zip(kinds, finished.pipes, strict=True))
    frames = _to_array(brought.get("video", NO_BYTES), np.uint8, FRAME_BYTES)
    waveform = _to_array(brought.get("audio", NO_BYTES), np.float32, SAMPLE_BYTES)
    repeats = DUPLICATED_FRAMES.findall(finished.stderr)
    return FfmpegOutput(
        frames=frames.reshape(-1, SIZE, SIZE, 3) if len(frames) else None,
        waveform=waveform if len(waveform) else None,
        counts=_stream_counts(finished.stderr, faults),
        duplicates=int(repeats[-1]) if repeats else 0,
        error_lines=faults,
        failed=finished.returncode != 0,
    )


def _to_array(data: memoryview, dtype: type[np.generic], unit: int) -> np.ndarray:
    """The whole units of `data`, without copying."""
    return np.frombuffer(data, dtype, count=len(data) // unit * unit // np.dtype(dtype).itemsize)


def _stream_counts(log: str, faults: str) -> dict[int, StreamCounts]:
    """ffmpeg's final tallies. A version that does not count errors gets the number of error lines."""
    return {
        int(found["index"]): StreamCounts(
            frames=int(found["frames"]),
            errors=int(found["errors"] or faults.count("\n")),
            samples=int(found["samples"] or 0),
        )
        for found in STREAM_COUNTS_LINE.finditer(log)
    }


def _raise_if_killed(finished: RunResult, faults: str, job: DecodeJob) -> None:
    """Raises for a run that was ended by us or by a signal."""
    if finished.stopped is StopReason.TIMEOUT or finished.returncode == -signal.SIGXCPU:
        allowed = job.limits.seconds_per_file
        raise MediaError(FailureReason.TIMEOUT, f"decoding took more than the {allowed:g} s allowed")
    if finished.stopped is StopReason.FLOOD:
        raise MediaError(FailureReason.TOO_LARGE, "decoding brought more than the file's length allows")
    if (
        classify(faults, FailureReason.CORRUPT) is FailureReason.OUT_OF_MEMORY
    ):  # the rest would look like damage
        raise MediaError(FailureReason.OUT_OF_MEMORY, summarise_log(faults))
    if finished.returncode < 0:
        how = f"ffmpeg ended by signal {-finished.returncode}"
        raise MediaError(FailureReason.DECODER_CRASHED, "; ".join(filter(None, [how, summarise_log(faults)])))
