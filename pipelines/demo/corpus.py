"""The generated corpus on disk: real H.264/AAC clips and MUSIC-AVQA's own annotation files.

::

    root/demo.json                          what was asked for: version, seed, clips
    root/videos/{video_id}.mp4              10 s, 224 × 224 at 8 frames a second, mono at 16 kHz
    root/json/avqa-{train,val,test}.json    questions, split by video 70 / 10 / 20
    root/truth.jsonl                        one line a clip: everything that is true of it, for analyses

What is generated, with all probabilities, is documented in `demo_world`; the questions in `demo_questions`.
Scenes and questions depend on (seed, index) alone; bytes of the clips also on the version of ffmpeg.
Seeds from 4000 on are the worlds on which the demo encoder was trained and measured: use smaller ones.
"""

import json
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from r2scp.pipelines.demo.questions import questions
from r2scp.pipelines.demo.render import FPS, FRAMES, SIZE, render_frames
from r2scp.pipelines.demo.scene import Scene, scene
from r2scp.pipelines.demo.sound import SAMPLE_RATE, render_audio
from r2scp.store.errors import CorpusError

__all__ = ["VERSION", "GenerateReport", "Scene", "generate", "scene", "split_of"]

VERSION = 1  # raise it when the same seed comes to give other clips or questions
SPLITS = ("train", "val", "test")
ENCODE_LIMIT_S = 120  # for one clip; takes a quarter of a second


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateReport:
    """Clips of the corpus, how many of them had to be written, questions, seconds it took."""

    clips: int
    written: int
    questions: int
    seconds: float


def split_of(index: int) -> str:
    """Of every ten clips seven are for training, one for validation, two for testing."""
    return {3: "val", 5: "test", 8: "test"}.get(index % 10, "train")


def generate(root: Path, *, clips: int, seed: int, workers: int = 2) -> GenerateReport:
    """Make the corpus, or what is missing of it; a second call with the same parameters writes nothing.

    Raises CorpusError if `root` holds anything else, and if ffmpeg cannot write a clip.
    """
    started = time.monotonic()
    if clips < 1 or seed < 0 or workers < 1:
        raise CorpusError(
            f"a demo corpus needs clips ≥ 1, seed ≥ 0 and workers ≥ 1; got clips {clips}, seed {seed},"
            f" workers {workers}"
        )
    _claim(root, {"version": VERSION, "seed": seed, "clips": clips})
    scenes = [scene(seed, index) for index in range(clips)]
    (root / "videos").mkdir(exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:  # the work is in ffmpeg and numpy, which run beside one another
        written = sum(pool.map(partial(_write_clip, root / "videos"), scenes))
    rows = {split: [] for split in SPLITS}
    for one in scenes:
        rows[split_of(one.index)] += questions(one)
    (root / "json").mkdir(exist_ok=True)
    for split in SPLITS:
        _write_text(root / "json" / f"avqa-{split}.json", json.dumps(rows[split], indent=1))
    truth = ({"video_id": one.video_id, "split": split_of(one.index), **asdict(one)} for one in scenes)
    _write_text(root / "truth.jsonl", "".join(json.dumps(line) + "\n" for line in truth))
    return GenerateReport(
        clips=clips,
        written=written,
        questions=sum(len(asked) for asked in rows.values()),
        seconds=time.monotonic() - started,
    )


def _claim(root: Path, wanted: dict[str, int]) -> None:
    """Make `root` the home of the wanted corpus, or find that it is."""
    note = root / "demo.json"
    if note.exists():
        try:
            found = json.loads(note.read_text())
        except ValueError as error:
            raise CorpusError(
                f"{note} is damaged ({error}); remove the folder and generate it anew"
            ) from error
        if found != wanted:
            raise CorpusError(
                f"{root} holds another demo corpus: {found}; wanted {wanted}."
                " Name another folder, or remove this one"
            )
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise CorpusError(
            f"a demo corpus needs a new or empty folder, or one it made before; {root} is neither"
        )
    root.mkdir(parents=True, exist_ok=True)
    _write_text(note, json.dumps(wanted))


def _write_text(path: Path, text: str) -> None:
    """Whole or not at all, and only where something changes."""
    if path.exists() and path.read_text() == text:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def _write_clip(folder: Path, one: Scene) -> bool:
    """Render and encode one clip unless it is there. Returns whether it was written."""
    path = folder / f"{one.video_id}.mp4"
    if path.exists():
        return False
    frames = render_frames(one, np.arange(FRAMES) / FPS)
    sound = (render_audio(one) * 32767).astype("<i2")
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as scratch:
        pcm, part = Path(scratch) / "sound.pcm", Path(scratch) / "clip.mp4"
        pcm.write_bytes(sound.tobytes())
        command = [get_ffmpeg_exe(), *_ENCODE_FROM, "-i", str(pcm), *_ENCODE_TO, str(part)]
        try:
            subprocess.run(
                command, input=frames.tobytes(), capture_output=True, check=True, timeout=ENCODE_LIMIT_S
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            words = (error.stderr or b"").decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
            raise CorpusError(f"ffmpeg could not write {path}: {words[0]}") from error
        part.replace(path)
    return True


_ENCODE_FROM = (
    *("-hide_banner", "-loglevel", "error", "-y", "-threads", "1"),
    *(
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-video_size",
        f"{SIZE}x{SIZE}",
        "-framerate",
        str(FPS),
        "-i",
        "pipe:0",
    ),
    *("-f", "s16le", "-ar", str(SAMPLE_RATE), "-ac", "1"),
)
_ENCODE_TO = (
    *("-c:v", "libx264", "-preset", "veryfast", "-crf", "24", "-pix_fmt", "yuv420p", "-threads", "1"),
    *("-c:a", "aac", "-b:a", "64k", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact"),
)
