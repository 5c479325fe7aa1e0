"""The generated corpus on disk: real H.264/AAC clips and MUSIC-AVQA's own annotation files.

::

    root/demo.json                          the parameters: version, seed, clips
    root/videos/{video_id}.mp4              10 s, 224 × 224 at 8 frames per second, mono at 16 kHz
    root/json/avqa-{train,val,test}.json    questions, split by video 70 / 10 / 20
    root/truth.jsonl                        one line per clip: everything that is true of it

`world` documents what is generated, with all probabilities, and `questions` the questions. Scenes and
questions depend on (seed, index) alone; the bytes of the clips also on the version of ffmpeg. The demo
encoder was trained and measured on worlds with seeds from 4000 on: use smaller ones.
"""

import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from r2scp.pipelines.demo.questions import make_questions
from r2scp.pipelines.demo.render import FPS, FRAMES, SIZE, render_frames
from r2scp.pipelines.demo.scene import Scene, make_scene
from r2scp.pipelines.demo.sound import SAMPLE_RATE, render_audio
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import CorpusError

__all__ = ["VERSION", "GenerateReport", "Scene", "generate", "make_scene", "split_of"]

VERSION = 1  # increase it when the same seed gives other clips or questions
SPLITS = ("train", "val", "test")
ENCODE_TIMEOUT_S = 120  # for one clip; takes a quarter of a second


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateReport:
    """Clips of the corpus, how many of them were missing and written, questions, seconds it took."""

    clips: int
    written: int
    questions: int
    seconds: float


def split_of(index: int) -> str:
    """Of every ten clips seven are for training, one for validation and two for testing."""
    return {3: "val", 5: "test", 8: "test"}.get(index % 10, "train")


def generate(root: Path, *, clips: int, seed: int, workers: int = 2) -> GenerateReport:
    """Generates the corpus, or what is missing of it: repeated with the same parameters it writes nothing.

    Raises CorpusError if `root` contains anything else, or if ffmpeg cannot encode a clip.
    """
    started = time.monotonic()
    if clips < 1 or seed < 0 or workers < 1:
        raise CorpusError(
            f"a demo corpus needs clips ≥ 1, seed ≥ 0 and workers ≥ 1; got clips {clips}, seed {seed},"
            f" workers {workers}"
        )
    _claim_folder(root, {"version": VERSION, "seed": seed, "clips": clips})
    scenes = [make_scene(seed, index) for index in range(clips)]
    (root / "videos").mkdir(exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:  # ffmpeg and numpy do most of the work, without the GIL
        written = sum(pool.map(partial(_write_clip, root / "videos"), scenes))
    rows = {split: [] for split in SPLITS}
    for scene in scenes:
        rows[split_of(scene.index)] += make_questions(scene)
    for split in SPLITS:
        _write_if_changed(root / "json" / f"avqa-{split}.json", json.dumps(rows[split], indent=1))
    truth = (
        {"video_id": scene.video_id, "split": split_of(scene.index), **asdict(scene)} for scene in scenes
    )
    _write_if_changed(root / "truth.jsonl", "".join(json.dumps(line) + "\n" for line in truth))
    return GenerateReport(
        clips=clips,
        written=written,
        questions=sum(map(len, rows.values())),
        seconds=time.monotonic() - started,
    )


def _claim_folder(root: Path, parameters: dict[str, int]) -> None:
    """Reserves `root` for the corpus of these parameters, or checks that it is reserved for it."""
    note = root / "demo.json"
    if note.exists():
        try:
            existing = json.loads(note.read_text())
        except ValueError as error:
            raise CorpusError(
                f"{note} is damaged ({error}); remove the folder and generate the corpus again"
            ) from error
        if existing != parameters:
            raise CorpusError(
                f"{root} contains another demo corpus: {existing}; requested {parameters}."
                " Choose another folder, or remove this one"
            )
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise CorpusError(
            f"a demo corpus needs a new or empty folder, or one with the same corpus; {root} is neither"
        )
    root.mkdir(parents=True, exist_ok=True)
    _write_if_changed(note, json.dumps(parameters))


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        replace_file(path, text.encode())


def _write_clip(folder: Path, scene: Scene) -> bool:
    """Renders and encodes one clip unless it exists. Returns whether it was written."""
    path = folder / f"{scene.video_id}.mp4"
    if path.exists():
        return False
    frames = render_frames(scene, np.arange(FRAMES) / FPS)
    sound = (render_audio(scene) * 32767).astype("<i2")
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as scratch:
        pcm, part = Path(scratch) / "sound.pcm", Path(scratch) / "clip.mp4"
        pcm.write_bytes(sound.tobytes())
        command = [get_ffmpeg_exe(), *_ENCODE_FROM, "-i", str(pcm), *_ENCODE_TO, str(part)]
        try:
            subprocess.run(
                command, input=frames.tobytes(), capture_output=True, check=True, timeout=ENCODE_TIMEOUT_S
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            log = (error.stderr or b"").decode(errors="replace").strip().splitlines()
            raise CorpusError(f"ffmpeg could not write {path}: {log[-1] if log else error}") from error
        part.replace(path)
    return True


_ENCODE_FROM = (
    *("-hide_banner", "-loglevel", "error", "-y", "-threads", "1"),
    *("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{SIZE}x{SIZE}"),
    *("-framerate", str(FPS), "-i", "pipe:0"),
    *("-f", "s16le", "-ar", str(SAMPLE_RATE), "-ac", "1"),
)
_ENCODE_TO = (
    *("-c:v", "libx264", "-preset", "veryfast", "-crf", "24", "-pix_fmt", "yuv420p", "-threads", "1"),
    *("-c:a", "aac", "-b:a", "64k", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact"),
)
