"""File to frames and sound: one frame for each second and 16 kHz mono, with a true status for both.

**Time grid.** A stream that ends d seconds after the start of the container's presentation has
T = max(1, floor(d + 0.5)) tokens. Token t stands for second t; its frame is the one shown at
t + 0.5 s (at d/2 when d < 0.5). If the picture starts later than the sound, its first frame is
repeated back to 0; if the sound starts later, it is preceded by silence.

**Picture.** Rotation and reflection from the container are applied, pixels made square, the short
side scaled to 224 and the centre cropped. Transparency is dropped. HDR video is tone-mapped to SDR if
the ffmpeg in use has zscale. Cover art does not count as a picture; a still image is one frame.

**Sound.** The stream a player would choose, all channels mixed down to one.

**Statuses.** `present`: all that the header announces. `partial`: less, with both numbers kept.
`corrupt`: there is a stream, and nothing of it could be decoded. `absent`: no such stream.

FAQ. *Why does a probe precede ffmpeg?* It gives the numbers that `partial` is measured against,
keeps ffmpeg from being asked for a stream that does not exist (it would return nothing at all), and
rejects oversized files early. *Why are colours of untagged HD video read as BT.601?* It is
ffmpeg's default, shared by the tools with which such encoders are trained.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r2scp.pipelines.decoding.fault_reasons import classify, is_encrypted, open_regular, summarise_log
from r2scp.pipelines.decoding.ffmpeg_command import RATE, SIZE, SLOTS_PER_S, TICKS_PER_S, find_program
from r2scp.pipelines.decoding.ffmpeg_run import (
    DecodeJob,
    DecodeLimits,
    FfmpegOutput,
    StreamCounts,
    expected_end,
    run_ffmpeg,
    start_offset,
    track_end,
)
from r2scp.pipelines.decoding.probe import SECONDS_PER_PROBE, MediaInfo, ProbeError, probe
from r2scp.store.errors import FailureReason, MediaError
from r2scp.store.schema import ModalityStatus

__all__ = ["Clip", "DecodeLimits", "StreamReport", "decode", "decode_fingerprint", "token_count"]

GRID_VERSION = 1  # increase it whenever decode() returns something else for the same file and ffmpeg
DEFAULT_LIMITS = DecodeLimits()
# How much sound may be missing before it counts as damage:
SOUND_SLACK_S = 0.25  # codec delay, rounding in headers
SOUND_SLACK_SHARE = 0.02  # of the recording: clocks that drift
SOUND_SLACK_ERRORS_S = 0.1  # instead of both, when the decoder reported errors


@dataclass(frozen=True, slots=True)
class StreamReport:
    """How one modality was decoded: `expected` and `decoded` count frames (tokens) or seconds of sound."""

    status: ModalityStatus
    expected: float
    decoded: float


ABSENT = StreamReport(ModalityStatus.ABSENT, 0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """One decoded file, with at least one of `frames` and `waveform`."""

    frames: np.ndarray | None  # (T, 224, 224, 3) uint8 RGB
    waveform: np.ndarray | None  # (S,) float32 mono at 16 kHz, nominally in [-1, 1]
    visual: StreamReport
    audio: StreamReport
    duration_s: float  # by the header; as decoded if the header does not say
    errors: str  # the end of ffmpeg's error messages, at most 500 characters


def decode(path: str | Path, limits: DecodeLimits = DEFAULT_LIMITS, ffmpeg: str | None = None) -> Clip:
    """Decodes one file with the ffmpeg of imageio-ffmpeg, or with the program at `ffmpeg`.

    Raises `MediaError` if neither modality can be used or a limit is exceeded, and `UsageError` if
    there is no ffmpeg to run. Safe to call from threads and from spawned processes.
    """
    program = find_program(ffmpeg)
    deadline = time.monotonic() + limits.seconds_per_file
    fd = open_regular(path)
    try:
        job = DecodeJob(fd=fd, program=program, limits=limits, deadline=deadline)
        info = _probe(job)
        output = run_ffmpeg(job, info)
        if output.frames is None and output.waveform is None:
            raise _undecodable(info, output)
    finally:
        os.close(fd)
    frames, visual = _assess_visual(info, output)
    waveform, audio = _assess_audio(info, output)
    decoded_s = max(0 if frames is None else len(frames), 0 if waveform is None else len(waveform) / RATE)
    return Clip(
        frames=frames,
        waveform=waveform,
        visual=visual,
        audio=audio,
        duration_s=expected_end(info) or decoded_s,
        errors=summarise_log(output.error_lines + _error_counts(output)),
    )


def decode_fingerprint(ffmpeg: str | None = None) -> str:
    """A string that differs whenever the results of `decode` may differ. Runs ffmpeg once per process."""
    program = find_program(ffmpeg)
    suffix = "+zscale" if program.has_zscale else ""
    return f"grid{GRID_VERSION}-{SIZE}px-{RATE}hz-ffmpeg{program.version}{suffix}"


def token_count(duration_s: float) -> int:
    """Number of one-second tokens of a stream of this length."""
    return max(1, math.floor(duration_s + 0.5 + 1 / TICKS_PER_S))


def _probe(job: DecodeJob) -> MediaInfo:
    """What the file contains. Raises MediaError if it cannot or must not be decoded."""
    limits = job.limits
    try:
        info = probe(
            job.fd,
            longest_s=limits.max_duration_s,
            memory_bytes=limits.memory_bytes,
            seconds=max(0.0, min(SECONDS_PER_PROBE, job.deadline - time.monotonic())),
        )
    except ProbeError as error:
        libav_log, verdict = error.args
        recognised = bool(libav_log)  # a demuxer logged something, so it accepted the file as its own format
        default = FailureReason.CORRUPT if recognised else FailureReason.NOT_MEDIA
        log = libav_log + verdict
        reason = FailureReason.ENCRYPTED if recognised and is_encrypted(job.fd) else classify(log, default)
        raise MediaError(reason, summarise_log(log)) from None
    if is_encrypted(job.fd):  # some decoders take encrypted packets for noise and report no error
        raise MediaError(FailureReason.ENCRYPTED, "protected by common encryption")
    if not (info.video or info.audio):
        reason = classify(info.log, FailureReason.NO_STREAMS)
        raise MediaError(reason, summarise_log(info.log) or f"a {info.format} file without picture or sound")
    if info.video and info.video.width * info.video.height > limits.max_pixels:
        size = f"{info.video.width}x{info.video.height}"
        raise MediaError(
            FailureReason.TOO_LARGE, f"frames must have at most {limits.max_pixels} pixels; got {size}"
        )
    duration_s = expected_end(info) or 0.0
    if duration_s > limits.max_duration_s:
        detail = f"must last at most {limits.max_duration_s:.0f} s; got {duration_s:.0f} s"
        raise MediaError(FailureReason.TOO_LARGE, detail)
    return info


def _undecodable(info: MediaInfo, output: FfmpegOutput) -> MediaError:
    """The error for a file of whose streams nothing could be decoded."""
    log = info.log + output.error_lines
    reason = classify(log, FailureReason.CORRUPT)
    if reason is FailureReason.TRUNCATED:  # the header is intact, so what is missing is not the index
        reason = FailureReason.CORRUPT
    return MediaError(reason, summarise_log(log) or "there are streams, but nothing could be decoded")


def _error_counts(output: FfmpegOutput) -> str:
    """Decode errors per stream as ffmpeg counted them: it does not log them all."""
    return "".join(
        f"stream {index}: {counts.errors} errors in {counts.errors + counts.frames} packets\n"
        for index, counts in output.counts.items()
        if counts.errors
    )


def _assess_visual(info: MediaInfo, output: FfmpegOutput) -> tuple[np.ndarray | None, StreamReport]:
    """The frames on the grid, and how they compare with what the header announces."""
    track = info.video
    if track is None:
        return None, ABSENT
    counts = output.counts.get(track.index, StreamCounts())
    decoded = 0 if output.frames is None else len(output.frames)
    end_s = track_end(info, track)
    if end_s is None and (counts.errors or not _is_whole(info, output)):
        end_s = info.duration_s
    expected = token_count(end_s) if end_s is not None else max(1, decoded)
    if output.frames is None:
        return None, StreamReport(ModalityStatus.CORRUPT, expected, 0)
    frames = output.frames[:expected]
    decoded = len(frames) - (
        _count_lost_frames(counts, output.duplicates, len(frames)) if counts.errors else 0
    )
    status = ModalityStatus.PARTIAL if decoded < expected else ModalityStatus.PRESENT
    return frames, StreamReport(status, expected, decoded)


def _count_lost_frames(counts: StreamCounts, duplicates: int, frames: int) -> int:
    """Number of frames that repeat the one before because their own was damaged.

    Slots that would have no new frame anyway, at the frame rate of this video, do not count.
    """
    idle = max(0, frames * SLOTS_PER_S - counts.frames - counts.errors)
    return min(frames - 1, max(0, round((duplicates - idle) / SLOTS_PER_S)))


def _assess_audio(info: MediaInfo, output: FfmpegOutput) -> tuple[np.ndarray | None, StreamReport]:
    """The waveform from time 0 of the grid, and how it compares with what the header announces."""
    track = info.audio
    if track is None:
        return None, ABSENT
    counts = output.counts.get(track.index, StreamCounts())
    length_s = 0.0 if output.waveform is None else len(output.waveform) / RATE
    decoded = min(length_s, counts.samples / track.rate) if counts.samples and track.rate else length_s
    expected = track.duration_s
    if expected is None and info.duration_s and (counts.errors or not _is_whole(info, output)):
        expected = info.duration_s - start_offset(info, track)
    expected = expected or length_s  # includes gaps filled with silence, so that these count as missing
    if output.waveform is None:
        return None, StreamReport(ModalityStatus.CORRUPT, expected, 0.0)
    slack = SOUND_SLACK_ERRORS_S if counts.errors else max(SOUND_SLACK_S, SOUND_SLACK_SHARE * expected)
    status = ModalityStatus.PARTIAL if expected - decoded > slack else ModalityStatus.PRESENT
    silence = np.zeros(round(start_offset(info, track) * RATE), np.float32)
    waveform = np.concatenate([silence, output.waveform]) if len(silence) else output.waveform
    return waveform, StreamReport(status, expected, decoded)


def _is_whole(info: MediaInfo, output: FfmpegOutput) -> bool:
    """Whether a stream reaches the end of the container's duration, so that the file was not cut short."""
    duration_s = info.duration_s or 0.0
    frames = len(output.frames) if output.frames is not None else 0
    sound_end_s = 0.0
    if info.audio and output.waveform is not None:
        sound_end_s = start_offset(info, info.audio) + len(output.waveform) / RATE
    slack = max(SOUND_SLACK_S, SOUND_SLACK_SHARE * duration_s)
    return frames >= token_count(duration_s) or duration_s - sound_end_s <= slack
