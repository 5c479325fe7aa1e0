"""The same clips through what a user would take instead of the flow: a plain loop, Daft.

Each decodes with our `decode`, embeds with our encoder and in the flow's batches, and keeps the features in
what it keeps things in: files of numbers, Parquet; Pixeltable (`extract_pixeltable`) in its own database.
None of them plans, hashes, keeps dead letters or could be interrupted without loss; that is not held against
them. Frames and sound travel as one run of bytes, the cheapest thing for both to carry.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from r2scp.pipelines.decoding.decode import decode
from r2scp.pipelines.decoding.ffmpeg_command import SIZE
from r2scp.pipelines.extraction.embed import Encoder, EncoderSpec
from r2scp.store.errors import MediaError

FRAME = SIZE * SIZE * 3  # bytes
COUNT = np.dtype(np.int64).itemsize  # bytes that say how many frames there are
Extraction = Callable[[Sequence[Path], Path], int]  # files, a folder to write to -> clips kept


@lru_cache(maxsize=1)
def encoder_of(spec: EncoderSpec) -> Encoder:
    """One for each process."""
    return spec.load()


def decoded(file: str | Path) -> bytes:
    """Frames and sound of one file, nothing where it does not decode."""
    try:
        clip = decode(file)
    except MediaError:
        return b""
    frames = b"" if clip.frames is None else clip.frames.tobytes()
    waveform = b"" if clip.waveform is None else clip.waveform.tobytes()
    return np.int64(len(frames) // FRAME).tobytes() + frames + waveform


def embedded(spec: EncoderSpec, clips: Sequence[bytes]) -> list[bytes]:
    """Both sequences of each clip in half precision, from what `decoded` gives; all in one batch."""
    encoder, pictures, sounds = encoder_of(spec), [], []
    for clip in clips:
        count = int(np.frombuffer(clip, np.int64, 1)[0]) if clip else 0
        end = COUNT + count * FRAME
        pictures.append(np.frombuffer(clip[COUNT:end], np.uint8).reshape(-1, SIZE, SIZE, 3))
        sounds.append(np.frombuffer(clip[end:], np.float32).copy())  # torch wants it writable
    seen = encoder.visual(np.concatenate(pictures)) if any(map(len, pictures)) else np.zeros((0, encoder.dim))
    ends = np.cumsum([len(frames) for frames in pictures])[:-1]
    heard = iter(encoder.audio([sound for sound in sounds if len(sound)]) if any(map(len, sounds)) else ())
    return [
        part.astype(np.float16).tobytes() + (next(heard).astype(np.float16).tobytes() if len(sound) else b"")
        for part, sound in zip(np.split(seen, ends), sounds, strict=True)
    ]


def loop(spec: EncoderSpec, files: Sequence[Path], folder: Path) -> int:
    """Decode one, embed one, write one."""
    kept = 0
    for number, file in enumerate(files):
        if clip := decoded(file):
            np.save(folder / f"{number:07}.npy", np.frombuffer(embedded(spec, [clip])[0], np.float16))
            kept += 1
    return kept


def with_daft(spec: EncoderSpec, batch: int) -> Extraction:
    """Decoding in batches of one on all cores, one encoder, Parquet. Raises ImportError without Daft."""
    import daft

    @daft.func(return_dtype=daft.DataType.binary())
    def decode_file(path: str) -> bytes:
        return decoded(path)

    @daft.cls(max_concurrency=1, use_process=False)
    class Embed:
        @daft.method.batch(return_dtype=daft.DataType.binary(), batch_size=batch)
        def features(self, clips: daft.Series) -> list[bytes]:
            return embedded(spec, clips.to_pylist())

    def extract(files: Sequence[Path], folder: Path) -> int:
        paths = daft.from_pydict({"path": [str(file) for file in files]}).into_batches(1)
        clips = paths.with_column("clip", decode_file(daft.col("path"))).where(daft.col("clip").length() > 0)
        features = clips.into_batches(batch).with_column("features", Embed().features(daft.col("clip")))
        features.select("path", "features").write_parquet(str(folder))
        return daft.read_parquet(str(folder)).count_rows()

    return extract
