"""What a clip costs to decode, compared with the lower limit of ffmpeg and with the alternatives.

All contenders decode the same files on one core (this process and its children are pinned to it), one file
after another, each with one decoding thread, files in the page cache. All but the limit return the same: the
frame shown at t + 0.5 s of every second at 224 x 224 (short side scaled, centre cropped), and sound as 16 kHz
mono.

- *limit*: `ffmpeg -f null -`, which decodes the same two streams and discards them.
- *ours*: `decode`: probe, one supervised ffmpeg, statuses.
- *PyAV*, *decord2*, *torchcodec*, *two ffmpeg passes*: see `decode/peers.py`. They are given the size and
  length of each file and do not check it for damage; ours finds out for itself.

Before the timing, the result of each contender is compared with ours: as many frames, nearly the same pixels,
as much sound. Generated files have noise and one key frame in 300; real ones are used if they lie beside the
repository.
"""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.contest import Grade, Report, Row, Sheet, Spread, contest, ratios, run
from benchmarks.decode.peers import PEERS, Decoded, MediaFile, read_media_file, require_same
from r2scp.pipelines.decoding.decode import decode
from r2scp.pipelines.decoding.ffmpeg_command import find_program
from r2scp.store.errors import UsageError

MEDIA = Path(__file__).resolve().parents[2].parent / "shared" / "media" / "videos"
LIMIT, OURS = "limit: ffmpeg -f null", "ours"
SHARE_GOAL = 0.9  # of the limit's speed
AHEAD_GOAL = 1.0  # a peer's seconds over ours
LONG_GOP = 300  # frames

SMALL = (
    "vas/drum_video_02542.mp4",
    "misc/sample_video.mp4",
    "crab/6aV6c8mY0lg.mp4",
    "vggsound/7tMPoaU2oL4_0_10000.mp4",
    "vas/baby_video_01951.mp4",
    "vas/dog_video_02677.mp4",
    "crab/-en7GAdXAQk.mp4",
    "foleycrafter/avsync_1.mp4",
    "mmaction2/test.avi",
    "misc/flipping_a_pancake.mkv",
)
LARGE = (
    "vggsound/3HgbEKrbA9s_54000_64000.mp4",
    "moviepy/smpte-2997.mp4",
    "vggsound/F8Zt3mYlOqU_000094.mp4",
    "foleycrafter/vggsound_2.mp4",
)
SIZES = {"360p": "640x360", "1080p": "1920x1080"}


def generated(folder: Path, size: str, seconds: int) -> Path:
    """A clip of moving shapes, noise and two tones, with one key frame in LONG_GOP; generated once."""
    path = folder / f"long-gop-{size}-{seconds}s.mp4"
    if path.exists():
        return path
    picture = f"testsrc2=s={size}:r=30:d={seconds},noise=alls=12:allf=t,format=yuv420p"
    sound = f"sine=440:r=44100:d={seconds},pan=stereo|c0=c0|c1=0.5*c0"
    inputs = [word for source in (picture, sound) for word in ("-f", "lavfi", "-i", source)]
    video = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "28", "-g", str(LONG_GOP)]
    video += ["-sc_threshold", "0"]
    part = path.with_suffix(".part.mp4")
    command = [find_program(None).path, "-v", "error", "-nostdin", "-y", *inputs, *video, "-c:a", "aac"]
    subprocess.run([*command, str(part)], check=True)
    return part.replace(path)


def bare(file: MediaFile) -> None:
    """ffmpeg decodes the streams that we use, and discards them."""
    maps = [
        word for index in (file.video, file.audio) if index is not None for word in ("-map", f"0:{index}")
    ]
    ahead = [find_program(None).path, "-v", "error", "-nostdin", "-threads", "1", "-i", str(file.path)]
    behind = ["-threads", "1", "-filter_threads", "1", "-f", "null", "-"]
    subprocess.run([*ahead, *maps, *behind], check=True, stdin=subprocess.DEVNULL)


def ours(file: MediaFile) -> Decoded:
    clip = decode(file.path)
    return Decoded(frames=clip.frames, waveform=clip.waveform)


def all_of(files: Sequence[MediaFile], work: Callable[[MediaFile], Decoded | None]) -> Callable[[], None]:
    """Decodes every file; the first time the results are compared with ours."""
    checked: list[bool] = []

    def once() -> None:
        for file in files:
            decoded = work(file)
            if not checked and decoded is not None:
                require_same(decoded, ours(file), file.path.name)
        checked.append(True)

    return once


def measure(files: Sequence[MediaFile], rounds: int) -> dict[str, list[float] | str]:
    """Seconds of each contender for all files of one class."""
    works: Mapping[str, Callable[[MediaFile], Decoded | None]] = {LIMIT: bare, OURS: ours, **PEERS}
    return contest({name: all_of(files, work) for name, work in works.items()}, rounds)


def sheet(title: str, seconds: Mapping[str, list[float] | str], files: int) -> Sheet:
    rows = []
    limit, own = seconds[LIMIT], seconds[OURS]
    assert isinstance(limit, list)
    assert isinstance(own, list)
    for name, taken in seconds.items():
        if isinstance(taken, str):
            rows.append(Row(name=name, unable=taken))
            continue
        figures: dict[str, Spread | float | str] = {
            "seconds": Spread.of(taken),
            "clips/s per core": files / Spread.of(taken).median,
            "share of the limit": ratios(limit, taken),
            "its time over ours": ratios(taken, own),
        }
        rows.append(Row(name=name, figures=figures))
    return Sheet(title=f"{title}: {files} files", rows=rows)


def classes(options: argparse.Namespace) -> dict[str, list[Path]]:
    """The files of each class, whether they exist or not."""
    seconds = 5 if options.short else 10
    options.folder.mkdir(parents=True, exist_ok=True)
    synthetic = {
        f"generated {name}": [generated(options.folder, size, seconds)] for name, size in SIZES.items()
    }
    small, large = (SMALL[:4], LARGE[:2]) if options.short else (SMALL, LARGE)
    real = {"real, small": small, "real, 720p and 1080p": large}
    return {name: [options.media / file for file in files] for name, files in real.items()} | synthetic


def benchmark(options: argparse.Namespace) -> Report:
    if not options.folder.parent.is_dir():
        raise UsageError(f"--folder must lie in a folder that exists; got {options.folder}")
    groups = classes(options)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sheets, grades, total = [], [], {}
    for name, paths in groups.items():
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            sheets.append(Sheet(title=name, rows=[Row(name=name, unable=f"not here: {missing[0]}, ...")]))
            continue
        files = [read_media_file(path) for path in paths]
        seconds = measure(files, options.rounds)
        sheets.append(sheet(name, seconds, len(files)))
        limit, own = seconds[LIMIT], seconds[OURS]
        assert isinstance(limit, list)
        assert isinstance(own, list)
        grades.append(
            Grade(what=f"share of the limit, {name}", goal=SHARE_GOAL, reached=ratios(limit, own).median)
        )
        for contender, taken in seconds.items():
            total.setdefault(contender, []).append((taken, len(files)))
    sums = {contender: _sum(parts) for contender, parts in total.items()}
    sheets.append(sheet("sum of all classes", sums, sum(count for _, count in total[OURS])))
    own = sums[OURS]
    assert isinstance(own, list)
    grades += [
        Grade(what=f"time over ours, sum, {name}", goal=AHEAD_GOAL, reached=ratios(taken, own).median)
        for name, taken in sums.items()
        if name not in (LIMIT, OURS) and isinstance(taken, list)
    ]
    return Report(sheets=sheets, grades=grades, settings={"core": "one", "threads": 1})


def _sum(parts: Sequence[tuple[list[float] | str, int]]) -> list[float] | str:
    """Sums over the classes, round by round; the reason, if the contender failed in one of them."""
    for taken, _ in parts:
        if isinstance(taken, str):
            return taken
    return [sum(one) for one in zip(*(taken for taken, _ in parts if isinstance(taken, list)), strict=True)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--media", type=Path, default=MEDIA, help="real clips")
    cache = Path(tempfile.gettempdir()) / "r2scp-benchmark-clips"
    parser.add_argument("--folder", type=Path, default=cache, help="where generated clips are kept")


def main(arguments: Sequence[str] | None = None) -> int:
    return run("decode", __doc__ or "", add_options, benchmark, arguments)
