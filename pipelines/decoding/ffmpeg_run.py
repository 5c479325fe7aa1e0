"""Runs ffmpeg over one opened file and gathers what it gives: frames, sound, and its own account.

ffmpeg's exit status says little (bit rot ends with 0, a missing stream with 234), so what counts is
what came through the pipes and the tally that ffmpeg logs for each input stream at the end.
"""

import os
import re
import signal
from dataclasses import dataclass, field, replace

import numpy as np

from r2scp.pipelines.decoding.fault_reasons import meaning, tidy
from r2scp.pipelines.decoding.ffmpeg_command import RATE, SIZE, Order, Program, compose, sampling_shift
from r2scp.pipelines.decoding.probe import Probed, Track
from r2scp.pipelines.decoding.sandbox import Bounds, Finished, Stop, supervise
from r2scp.store.errors import FailureReason, MediaError

FRAME_BYTES = SIZE * SIZE * 3  # uint8 RGB
SAMPLE_BYTES = 4  # float32
NOTHING = memoryview(b"")
BEYOND_S = 1.0  # how far past the promised end of a file is looked

#: One line of ffmpeg's log that reports a fault, with `-v level+...`.
FAULT = re.compile(r"^(?:\[[^\]]* @ 0x[0-9a-f]+\] )*\[(?:error|fatal|panic)\] .*$", re.MULTILINE)
#: "Input stream #0:1 (audio): 432 packets read (89016 bytes); 431 frames decoded; 0 decode errors
#: (441000 samples); " on one line.
TALLY = re.compile(
    r"Input stream #0:(?P<index>\d+) \(\w+\): \d+ packets read \(\d+ bytes\); (?P<frames>\d+) frames decoded"
    r"(?:; (?P<errors>\d+) decode errors)?(?: \((?P<samples>\d+) samples\))?"
)
#: "[Parsed_fps_3 @ 0x...] [verbose] 300 frames in, 102 frames out; 199 frames dropped, 1 frames duplicated."
REPEATS = re.compile(r"frames in, \d+ frames out; \d+ frames dropped, (\d+) frames duplicated")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """What one file may cost. The defaults let through 8K video and an hour of 1080p."""

    seconds_per_file: float = 600.0  # wall time, probe included
    memory_bytes: int = 4 << 30  # of the decoding process
    max_pixels: int = 1 << 26  # of one frame as coded: 8192 x 8192
    max_duration_s: float = 3600.0  # an hour of frames takes half a gigabyte
    stderr_bytes: int = 1 << 16  # of ffmpeg's own words that are looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One file on its way through ffmpeg."""

    fd: int
    program: Program
    limits: DecodeLimits
    deadline: float  # on the clock of time.monotonic()


@dataclass(frozen=True, slots=True)
class Tally:
    """ffmpeg's final count for one input stream."""

    frames: int = 0
    errors: int = 0
    samples: int = 0


@dataclass(slots=True)
class Harvest:
    """What ffmpeg brought of one file."""

    frames: np.ndarray | None = None  # (T, 224, 224, 3) uint8; maybe a few more than promised
    waveform: np.ndarray | None = None  # (S,) float32, from the first sample of the stream
    tallies: dict[int, Tally] = field(default_factory=dict)  # by stream index
    repeats: int = 0  # slots of 1/SLOTS s for which there was no new frame
    faults: str = ""  # ffmpeg's error lines
    failed: bool = False  # ffmpeg gave up


def lead(probed: Probed, track: Track) -> float:
    """Seconds from the start of the presentation to the start of the track."""
    if track.start_s is None or probed.start_s is None:
        return 0.0
    return max(0.0, track.start_s - probed.start_s)


def end(probed: Probed, track: Track | None) -> float | None:
    """When the track should end, in seconds; None where it does not say so itself."""
    if track is None or track.duration_s is None:
        return None
    return lead(probed, track) + track.duration_s


def promised_end(probed: Probed) -> float | None:
    """When the whole file should end, in seconds."""
    known = [probed.duration_s, end(probed, probed.video), end(probed, probed.audio)]
    return max((e for e in known if e is not None), default=None)


def gather(job: Job, probed: Probed) -> Harvest:
    """Decodes the tracks of `probed`: in one pass, or each alone after that pass has failed.

    Raises MediaError for what concerns the file as a whole: time, flood, a crash.
    """
    shift = sampling_shift(end(probed, probed.video) or probed.duration_s)
    harvest = _run(job, probed, shift)
    if harvest.failed and probed.video and probed.audio:
        seen = _run(job, replace(probed, audio=None), shift)
        harvest = _merge(seen, _run(job, replace(probed, video=None), 0))
    if probed.video and harvest.frames is None and harvest.tallies.get(probed.video.index, Tally()).frames:
        # there are frames, but none was on show at 0.5 s: shorter than it promised
        harvest = _merge(_run(job, replace(probed, audio=None), sampling_shift(0.0)), harvest)
    return harvest


def _merge(seen: Harvest, heard: Harvest) -> Harvest:
    """The picture of one run and the sound of another."""
    return Harvest(
        frames=seen.frames,
        waveform=heard.waveform,
        tallies=heard.tallies | seen.tallies,
        repeats=seen.repeats,
        faults=seen.faults + heard.faults,
        failed=seen.failed or heard.failed,
    )


def _run(job: Job, probed: Probed, shift: int) -> Harvest:
    """One pass of ffmpeg over the tracks of `probed`."""
    end_s = (promised_end(probed) or job.limits.max_duration_s) + BEYOND_S
    room = {"video": int(end_s + 2) * FRAME_BYTES, "audio": int((end_s + 2) * RATE) * SAMPLE_BYTES}
    kinds = [kind for kind in room if getattr(probed, kind)]
    if not kinds:
        return Harvest()
    order = Order(fd=job.fd, probed=probed, shift=shift, end_s=end_s, max_pixels=job.limits.max_pixels)
    os.lseek(job.fd, 0, os.SEEK_SET)  # where /dev/fd duplicates, as on macOS, the position is shared
    finished = supervise(
        lambda pipes: compose(order, job.program, pipes),
        Bounds(
            deadline=job.deadline,
            memory_bytes=job.limits.memory_bytes,
            pipe_bytes=tuple(room[kind] for kind in kinds),
            stderr_bytes=job.limits.stderr_bytes,
        ),
        inherit=(job.fd,),
    )
    faults = "".join(line + "\n" for line in FAULT.findall(finished.stderr))
    _require_alive(finished, faults, job)
    brought = dict(zip(kinds, finished.pipes, strict=True))
    frames = _array(brought.get("video", NOTHING), np.uint8, FRAME_BYTES)
    waveform = _array(brought.get("audio", NOTHING), np.float32, SAMPLE_BYTES)
    repeats = REPEATS.findall(finished.stderr)
    return Harvest(
        frames=frames.reshape(-1, SIZE, SIZE, 3) if len(frames) else None,
        waveform=waveform if len(waveform) else None,
        tallies=_tallies(finished.stderr, faults),
        repeats=int(repeats[-1]) if repeats else 0,
        faults=faults,
        failed=finished.returncode != 0,
    )


def _array(data: memoryview, dtype: type[np.generic], unit: int) -> np.ndarray:
    """The whole units of `data`, without copying."""
    return np.frombuffer(data, dtype, count=len(data) // unit * unit // np.dtype(dtype).itemsize)


def _tallies(log: str, faults: str) -> dict[int, Tally]:
    """ffmpeg's final tallies. A version that does not count errors gets the number of error lines."""
    return {
        int(found["index"]): Tally(
            frames=int(found["frames"]),
            errors=int(found["errors"] or faults.count("\n")),
            samples=int(found["samples"] or 0),
        )
        for found in TALLY.finditer(log)
    }


def _require_alive(finished: Finished, faults: str, job: Job) -> None:
    """Raises for a run that was ended by us or by a signal."""
    if finished.stopped is Stop.TIMEOUT or finished.returncode == -signal.SIGXCPU:
        allowed = job.limits.seconds_per_file
        raise MediaError(FailureReason.TIMEOUT, f"decoding took more than the {allowed:g} s allowed")
    if finished.stopped is Stop.FLOOD:
        raise MediaError(FailureReason.TOO_LARGE, "decoding brought more than the file's length allows")
    if (
        meaning(faults, FailureReason.CORRUPT) is FailureReason.OUT_OF_MEMORY
    ):  # the rest would look like damage
        raise MediaError(FailureReason.OUT_OF_MEMORY, tidy(faults))
    if finished.returncode < 0:
        how = f"ffmpeg ended by signal {-finished.returncode}"
        raise MediaError(FailureReason.DECODER_CRASHED, "; ".join(filter(None, [how, tidy(faults)])))
