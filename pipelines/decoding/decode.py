"""File to frames and sound: one frame for each second and 16 kHz mono, with a true status for both.

**Time grid.** A stream that ends d seconds after the start of the container's presentation has
T = max(1, floor(d + 0.5)) tokens. Token t stands for second t; its frame is the one shown at
t + 0.5 s (at d/2 when d < 0.5). Where the picture starts later than the sound, its first frame is
held back to 0; where the sound starts later, silence precedes it.

**Picture.** Rotation and reflection from the container are applied, pixels made square, the short
side scaled to 224 and the centre cut out. Transparency is dropped. HDR video is mapped to SDR where
the ffmpeg at hand has zscale. Cover art is no picture; a still image is one frame.

**Sound.** The stream a player would choose, all channels folded to one.

**Statuses.** `present`: all that the file promises. `partial`: less, with both numbers kept.
`corrupt`: a stream is there and gave nothing. `absent`: no such stream.

FAQ. *Why does a probe precede ffmpeg?* It gives the numbers that `partial` is measured against,
keeps ffmpeg from being asked for a stream that is not there (it would return nothing at all), and
refuses oversized files early. *Why are colours of untagged HD video read as BT.601?* It is
ffmpeg's default, shared by the tools with which such encoders are trained.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r2scp.pipelines.decoding.fault_reasons import is_encrypted, classify, open_regular, summarise_log
from r2scp.pipelines.decoding.ffmpeg_command import RATE, SIZE, SLOTS_PER_S, TICKS_PER_S, find_program
from r2scp.pipelines.decoding.ffmpeg_run import (
    DecodeLimits,
    FfmpegOutput,
    DecodeJob,
    StreamCounts,
    track_end,
    run_ffmpeg,
    start_offset,
    expected_end,
)
from r2scp.pipelines.decoding.probe import SECONDS_PER_PROBE, MediaInfo, ProbeError, probe
from r2scp.store.errors import FailureReason, MediaError
from r2scp.store.schema import ModalityStatus

__all__ = ["Clip", "DecodeLimits", "StreamReport", "decode", "decode_fingerprint", "token_count"]

GRID_VERSION = 1  # raise it whenever decode() returns something else for the same file and ffmpeg
DEFAULT_LIMITS = DecodeLimits()
SOUND_SLACK_S = 0.25  # missing sound that is no damage: codec delay, rounding in headers
SOUND_SLACK = 0.02  # the same as a share of the recording: clocks that drift
SOUND_SLACK_ERRORS_S = 0.1  # the same, when the decoder reported errors


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What became of one modality: `expected` and `decoded` count frames (tokens) or seconds of sound."""

    status: ModalityStatus
    expected: float
    decoded: float


ABSENT = StreamReport(ModalityStatus.ABSENT, 0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """One decoded file. At least one of `frames` and `waveform` is there."""

    frames: np.ndarray | None  # (T, 224, 224, 3) uint8 RGB
    waveform: np.ndarray | None  # (S,) float32 mono at 16 kHz, nominally in [-1, 1]
    visual: StreamReport
    audio: StreamReport
    duration_s: float  # as promised by the file; as decoded where it promises nothing
    errors: str  # the end of ffmpeg's error messages, at most 500 characters


def decode(path: str | Path, limits: DecodeLimits = DEFAULT_LIMITS, ffmpeg: str | None = None) -> Clip:
    """Decodes one file with the ffmpeg of imageio-ffmpeg, or with the program at `ffmpeg`.

    Raises `MediaError` when neither modality can be used or a limit is met, and `UsageError` when
    there is no ffmpeg to run. Safe to call from threads and from spawned processes.
    """
    program = find_program(ffmpeg)
    deadline = time.monotonic() + limits.seconds_per_file
    fd = open_regular(path)
    try:
        job = DecodeJob(fd=fd, program=program, limits=limits, deadline=deadline)
        probed = _probe(job)
        harvest = run_ffmpeg(job, probed)
        if harvest.frames is None and harvest.waveform is None:
            raise _nothing_usable(probed, harvest)
    finally:
        os.close(fd)
    frames, visual = _judge_visual(probed, harvest)
    waveform, audio = _judge_audio(probed, harvest)
    decoded_s = max(0 if frames is None else len(frames), 0 if waveform is None else len(waveform) / RATE)
    return Clip(
        frames=frames,
        waveform=waveform,
        visual=visual,
        audio=audio,
        duration_s=expected_end(probed) or decoded_s,
        errors=summarise_log(harvest.error_lines + _error_counts(harvest)),
    )


def decode_fingerprint(ffmpeg: str | None = None) -> str:
    """A string that changes whenever what `decode` returns may change. Runs ffmpeg once per process."""
    program = find_program(ffmpeg)
    tones = "+zscale" if program.has_zscale else ""
    return f"grid{GRID_VERSION}-{SIZE}px-{RATE}hz-ffmpeg{program.version}{tones}"


def __getattr__(name: str) -> str:
    if name == "DECODE_FINGERPRINT":  # of the default ffmpeg; made on demand, since it starts a program
        return decode_fingerprint()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def token_count(duration_s: float) -> int:
    """How many one-second tokens a stream of this length has."""
    return max(1, math.floor(duration_s + 0.5 + 1 / TICKS_PER_S))


def _probe(job: DecodeJob) -> MediaInfo:
    """The probe's report. Raises MediaError for a file that cannot be decoded or may not be."""
    limits = job.limits
    try:
        probed = probe(
            job.fd,
            longest_s=limits.max_duration_s,
            memory_bytes=limits.memory_bytes,
            seconds=max(0.0, min(SECONDS_PER_PROBE, job.deadline - time.monotonic())),
        )
    except ProbeError as fault:
        log, verdict = fault.args
        words = log + verdict
        recognised = bool(log)  # a demuxer spoke, so one took the file for its own
        default = FailureReason.CORRUPT if recognised else FailureReason.NOT_MEDIA
        reason = FailureReason.ENCRYPTED if recognised and is_encrypted(job.fd) else classify(words, default)
        raise MediaError(reason, summarise_log(words)) from None
    if is_encrypted(job.fd):  # some decoders take scrambled packets for noise and do not complain
        raise MediaError(FailureReason.ENCRYPTED, "protected by common encryption")
    if not (probed.video or probed.audio):
        reason = classify(probed.log, FailureReason.NO_STREAMS)
        raise MediaError(reason, summarise_log(probed.log) or f"a {probed.format} file without picture and sound")
    if probed.video and probed.video.width * probed.video.height > limits.max_pixels:
        size = f"{probed.video.width}x{probed.video.height}"
        raise MediaError(
            FailureReason.TOO_LARGE, f"frames must have at most {limits.max_pixels} pixels; got {size}"
        )
    longest = expected_end(probed) or 0.0
    if longest > limits.max_duration_s:
        most = f"{limits.max_duration_s:.0f} s"
        raise MediaError(FailureReason.TOO_LARGE, f"must last at most {most}; got {longest:.0f} s")
    return probed


def _nothing_usable(probed: MediaInfo, harvest: FfmpegOutput) -> MediaError:
    """The error for a file whose streams gave nothing."""
    words = probed.log + harvest.error_lines
    reason = classify(words, FailureReason.CORRUPT)
    if reason is FailureReason.TRUNCATED:  # the header is whole, so it did tell how to decode
        reason = FailureReason.CORRUPT
    return MediaError(reason, summarise_log(words) or "streams are there, and nothing could be decoded")


def _error_counts(harvest: FfmpegOutput) -> str:
    """ffmpeg's count of what it could not decode, some of which it passes over in silence."""
    return "".join(
        f"stream {index}: {tally.errors} errors in {tally.errors + tally.frames} packets\n"
        for index, tally in harvest.counts.items()
        if tally.errors
    )


def _judge_visual(probed: MediaInfo, harvest: FfmpegOutput) -> tuple[np.ndarray | None, StreamReport]:
    """The frames on the grid, and what they are against what was promised."""
    track = probed.video
    if track is None:
        return None, ABSENT
    tally = harvest.counts.get(track.index, StreamCounts())
    got = 0 if harvest.frames is None else len(harvest.frames)
    ends_at = track_end(probed, track)
    if ends_at is None and (tally.errors or not _is_whole(probed, harvest)):
        ends_at = probed.duration_s
    expected = token_count(ends_at) if ends_at is not None else max(1, got)
    if harvest.frames is None:
        return None, StreamReport(ModalityStatus.CORRUPT, expected, 0)
    frames = harvest.frames[:expected]
    decoded = len(frames) - (_count_lost_frames(tally, harvest.duplicates, len(frames)) if tally.errors else 0)
    status = ModalityStatus.PARTIAL if decoded < expected else ModalityStatus.PRESENT
    return frames, StreamReport(status, expected, decoded)


def _count_lost_frames(tally: StreamCounts, repeats: int, got: int) -> int:
    """How many frames only repeat the one before because damage swallowed their own.

    Of the slots without a new frame, those do not count that so slow a picture leaves empty anyway.
    """
    idle = max(0, got * SLOTS_PER_S - tally.frames - tally.errors)
    return min(got - 1, max(0, round((repeats - idle) / SLOTS_PER_S)))


def _judge_audio(probed: MediaInfo, harvest: FfmpegOutput) -> tuple[np.ndarray | None, StreamReport]:
    """The waveform from time 0 of the grid, and what it is against what was promised."""
    track = probed.audio
    if track is None:
        return None, ABSENT
    tally = harvest.counts.get(track.index, StreamCounts())
    got = 0.0 if harvest.waveform is None else len(harvest.waveform) / RATE
    decoded = min(got, tally.samples / track.rate) if tally.samples and track.rate else got
    expected = track.duration_s
    if expected is None and probed.duration_s and (tally.errors or not _is_whole(probed, harvest)):
        expected = probed.duration_s - start_offset(probed, track)
    expected = expected or got  # gaps filled with silence count as promised
    if harvest.waveform is None:
        return None, StreamReport(ModalityStatus.CORRUPT, expected, 0.0)
    slack = SOUND_SLACK_ERRORS_S if tally.errors else max(SOUND_SLACK_S, SOUND_SLACK * expected)
    status = ModalityStatus.PARTIAL if expected - decoded > slack else ModalityStatus.PRESENT
    silence = np.zeros(round(start_offset(probed, track) * RATE), np.float32)
    waveform = np.concatenate([silence, harvest.waveform]) if len(silence) else harvest.waveform
    return waveform, StreamReport(status, expected, decoded)


def _is_whole(probed: MediaInfo, harvest: FfmpegOutput) -> bool:
    """Whether some stream reaches the end that the container promises, so that the file was not cut short."""
    promised = probed.duration_s or 0.0
    seen = len(harvest.frames) if harvest.frames is not None else 0
    heard = 0.0
    if probed.audio and harvest.waveform is not None:
        heard = start_offset(probed, probed.audio) + len(harvest.waveform) / RATE
    return seen >= token_count(promised) or promised - heard <= max(SOUND_SLACK_S, SOUND_SLACK * promised)
