"""The alternatives for decoding clips: each returns frames on the grid and sound at 16 kHz.

Each is used as its manual says, with one decoding thread and its own scaler, to a given size.
"""

import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from r2scp.pipelines.decoding.decode import token_count
from r2scp.pipelines.decoding.ffmpeg_command import RATE, SIZE, find_program

MAX_PIXEL_DIFFERENCE = 12.0  # levels of 255, mean over a clip: another scaler, another colour matrix
MAX_SOUND_DIFFERENCE_S = 0.3  # codec delay kept or not


@dataclass(frozen=True, kw_only=True)
class MediaFile:
    """A file, and what all contenders but ours know of it beforehand."""

    path: Path
    video: int  # index of its stream
    audio: int | None
    width: int  # pixels, after scaling the short side to SIZE
    height: int
    middles: tuple[float, ...]  # s, at which frames are selected
    start_s: float  # of the container


@dataclass(frozen=True, kw_only=True)
class Decoded:
    frames: np.ndarray | None  # (T, 224, 224, 3) uint8
    waveform: np.ndarray | None  # (S,) float32


def read_media_file(path: Path) -> MediaFile:
    with av.open(str(path)) as container:
        video, audio = container.streams.best("video"), container.streams.best("audio")
        assert video is not None
        start = (container.start_time or 0) / 1e6
        base = video.time_base or Fraction(1, 1_000_000)
        first = float((video.start_time or 0) * base)
        length = float(video.duration * base) if video.duration else (container.duration or 0) / 1e6
        wide, high = video.codec_context.width, video.codec_context.height  # type: ignore[attr-defined]
        aspect = video.codec_context.sample_aspect_ratio  # type: ignore[attr-defined]
        shape = wide / high * float(aspect or 1)
        return MediaFile(
            path=path,
            video=video.index,
            audio=None if audio is None else audio.index,
            width=math.floor(SIZE * shape + 1e-6) if shape >= 1 else SIZE,
            height=SIZE if shape >= 1 else math.floor(SIZE / shape + 1e-6),
            middles=tuple(t + 0.5 for t in range(token_count(max(0.0, first - start) + length))),
            start_s=start,
        )


def require_same(decoded: Decoded, own: Decoded, name: str) -> None:
    """Raises ValueError unless the result is as good as ours."""
    assert own.frames is not None
    if decoded.frames is None or decoded.frames.shape != own.frames.shape:
        got = None if decoded.frames is None else decoded.frames.shape
        raise ValueError(f"{name}: other frames than ours: {got}, not {own.frames.shape}")
    difference = float(np.abs(decoded.frames.astype(np.int16) - own.frames).mean())
    if difference > MAX_PIXEL_DIFFERENCE:
        raise ValueError(f"{name}: frames are {difference:.1f} levels from ours")
    if own.waveform is not None:
        got = 0 if decoded.waveform is None else len(decoded.waveform)
        if abs(got - len(own.waveform)) > MAX_SOUND_DIFFERENCE_S * RATE:
            raise ValueError(f"{name}: {got} samples, not {len(own.waveform)}")


def cut(frame: np.ndarray) -> np.ndarray:
    """The centre of a picture (or of many) whose short side is SIZE."""
    high, wide = frame.shape[-3:-1]
    top, left = (high - SIZE) // 2, (wide - SIZE) // 2
    return frame[..., top : top + SIZE, left : left + SIZE, :]


def with_pyav(file: MediaFile) -> Decoded:
    """One pass of demultiplexing over both streams."""
    frames: list[np.ndarray] = []
    sound: list[np.ndarray] = []
    with av.open(str(file.path)) as container:
        streams = [container.streams[i] for i in (file.video, file.audio) if i is not None]
        for stream in streams:
            stream.codec_context.thread_count = 1  # type: ignore[union-attr]
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        scaler = VideoReformatter()
        shown = None

        def keep(upto: float) -> None:
            while shown is not None and len(frames) < len(file.middles) and file.middles[len(frames)] < upto:
                small = scaler.reformat(shown, file.width, file.height, "rgb24", interpolation="BICUBIC")
                frames.append(cut(small.to_ndarray()))

        for packet in container.demux(streams):
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    at = float((frame.pts or 0) * (frame.time_base or 0)) - file.start_s
                    keep(at)
                    shown = frame
                elif isinstance(frame, av.AudioFrame):
                    sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        keep(math.inf)
        if sound:
            sound += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return Decoded(frames=np.stack(frames), waveform=np.concatenate(sound) if sound else None)


def with_decord(file: MediaFile) -> Decoded:
    """Its own seeking and scaling; the sound by its AudioReader."""
    import decord

    reader = decord.VideoReader(
        str(file.path), ctx=decord.cpu(0), width=file.width, height=file.height, num_threads=1
    )
    starts = reader.get_frame_timestamp(range(len(reader)))[:, 0] - file.start_s
    chosen = np.maximum(np.searchsorted(starts, file.middles, side="right") - 1, 0)
    frames = cut(reader.get_batch(chosen.tolist()).asnumpy())
    if file.audio is None:
        return Decoded(frames=frames, waveform=None)
    sound = decord.AudioReader(str(file.path), ctx=decord.cpu(0), sample_rate=RATE, mono=True)
    return Decoded(frames=frames, waveform=sound[:].asnumpy()[0])


def with_torchcodec(file: MediaFile) -> Decoded:
    """Frames by the time they are shown at, scaled by its own transform; sound by its AudioDecoder."""
    from torchcodec.decoders import AudioDecoder, VideoDecoder
    from torchcodec.transforms import CenterCrop, Resize

    small = [Resize((file.height, file.width)), CenterCrop((SIZE, SIZE))]
    reader = VideoDecoder(
        str(file.path),
        num_ffmpeg_threads=1,
        dimension_order="NHWC",
        seek_mode="approximate",
        transforms=small,
    )
    end = reader.metadata.end_stream_seconds or math.inf
    begin = reader.metadata.begin_stream_seconds or 0.0
    moments = [min(max(at + file.start_s, begin), end - 1e-3) for at in file.middles]
    frames = reader.get_frames_played_at(moments).data.numpy()
    if file.audio is None:
        return Decoded(frames=frames, waveform=None)
    sound = AudioDecoder(str(file.path), sample_rate=RATE, num_channels=1).get_all_samples()
    return Decoded(frames=frames, waveform=sound.data.numpy()[0])


def with_two_passes(file: MediaFile) -> Decoded:
    """One ffmpeg for the frames, another for the sound, their output through standard output."""
    ahead = [find_program(None).path, "-v", "error", "-nostdin", "-threads", "1", "-i", str(file.path)]
    picked = (
        "settb=AVTB,setpts=PTS+99999,fps=10:start_time=0:round=down:eof_action=pass,select='eq(mod(n,10),5)'"
    )
    scaled = f"{picked},scale={file.width}:{file.height}:flags=bicubic,crop={SIZE}:{SIZE}"
    video = ["-map", f"0:{file.video}", "-vf", scaled, "-fps_mode", "passthrough", "-pix_fmt", "rgb24"]
    seen = subprocess.run(
        [*ahead, *video, "-threads", "1", "-filter_threads", "1", "-f", "rawvideo", "-"],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    ).stdout
    frames = np.frombuffer(seen, np.uint8).reshape(-1, SIZE, SIZE, 3)[: len(file.middles)]
    if file.audio is None:
        return Decoded(frames=frames, waveform=None)
    audio = ["-map", f"0:{file.audio}", "-ac", "1", "-ar", str(RATE)]
    heard = subprocess.run(
        [*ahead, *audio, "-threads", "1", "-f", "f32le", "-"],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    ).stdout
    return Decoded(frames=frames, waveform=np.frombuffer(heard, np.float32))


PEERS: dict[str, Callable[[MediaFile], Decoded | None]] = {
    "PyAV": with_pyav,
    "decord2": with_decord,
    "torchcodec": with_torchcodec,
    "two ffmpeg passes": with_two_passes,
}
