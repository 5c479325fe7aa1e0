"""What a clip costs to decode, beside what ffmpeg costs at the least and what a user would take instead.

All contenders do the same files on one processor core (this process and its children are pinned to it), one
file after another, each with one decoding thread, files in the page cache. All but the limit bring the same:
the frame shown at t + 0.5 s of every second at 224 x 224 (short side scaled, centre cut) and sound as 16 kHz
mono.

- *limit*: `ffmpeg -f null -`, which decodes the same two streams and throws them away.
- *ours*: `decode`: probe, one supervised ffmpeg, statuses.
- *PyAV*, *decord2*, *torchcodec*, *two ffmpeg passes*: see `decode_peers`. They know each file's size and
  length beforehand, for nothing, and do not look whether a file is damaged; ours finds out for itself.

Before it is timed each contender's result is held against ours: as many frames, nearly the same pixels, as
much sound. Generated files have one key frame in 300 and are made by ffmpeg with noise in them; real ones are
used where they lie beside the repository.
"""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.contest import Grade, Report, Row, Sheet, Spread, contest, ratios, run
from benchmarks.decode.peers import PEERS, Brought, Sought, require_same, sought
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
    """A clip of moving shapes, noise and two tones, with one key frame in LONG_GOP; made once."""
    path = folder / f"long-gop-{size}-{seconds}s.mp4"
    if path.exists():
        return path
    picture = f"testsrc2=s={size}:r=30:d={seconds},noise=alls=12:allf=t,format=yuv420p"
    sound = f"sine=440:r=44100:d={seconds},pan=stereo|c0=c0|c1=0.5*c0"
    inputs = [word for source in (picture, sound) for word in ("-f", "lavfi", "-i", source)]
    video = [
        "-c:v",
        "libx264",
        "-preset",
        "veryfast",
        "-crf",
        "28",
        "-g",
        str(LONG_GOP),
        "-sc_threshold",
        "0",
    ]
    half = path.with_suffix(".part.mp4")
    command = [
        find_program(None).path,
        "-v",
        "error",
        "-nostdin",
        "-y",
        *inputs,
        *video,
        "-c:a",
        "aac",
        str(half),
    ]
    subprocess.run(command, check=True)
    return half.replace(path)


def bare(file: Sought) -> None:
    """ffmpeg decodes what we use of the file, into nothing."""
    maps = [
        word for index in (file.video, file.audio) if index is not None for word in ("-map", f"0:{index}")
    ]
    ahead = [find_program(None).path, "-v", "error", "-nostdin", "-threads", "1", "-i", str(file.path)]
    behind = ["-threads", "1", "-filter_threads", "1", "-f", "null", "-"]
    subprocess.run([*ahead, *maps, *behind], check=True, stdin=subprocess.DEVNULL)


def ours(file: Sought) -> Brought:
    clip = decode(file.path)
    return Brought(frames=clip.frames, waveform=clip.waveform)


def all_of(files: Sequence[Sought], work: Callable[[Sought], Brought | None]) -> Callable[[], None]:
    """Does every file; what the first time brings is held against ours."""
    checked: list[bool] = []

    def once() -> None:
        for file in files:
            brought = work(file)
            if not checked and brought is not None:
                require_same(brought, ours(file), file.path.name)
        checked.append(True)

    return once


def measure(files: Sequence[Sought], rounds: int) -> dict[str, list[float] | str]:
    """Seconds of each contender for all files of one class."""
    works: Mapping[str, Callable[[Sought], Brought | None]] = {LIMIT: bare, OURS: ours, **PEERS}
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


def classes(wanted: argparse.Namespace) -> dict[str, list[Path]]:
    """The files of each class; none where they are not to be had."""
    seconds = 5 if wanted.short else 10
    wanted.folder.mkdir(parents=True, exist_ok=True)
    made = {f"generated {name}": [generated(wanted.folder, size, seconds)] for name, size in SIZES.items()}
    small, large = (SMALL[:4], LARGE[:2]) if wanted.short else (SMALL, LARGE)
    real = {"real, small": small, "real, 720p and 1080p": large}
    return {name: [wanted.media / file for file in files] for name, files in real.items()} | made


def benchmark(wanted: argparse.Namespace) -> Report:
    if not wanted.folder.parent.is_dir():
        raise UsageError(f"--folder must lie in a folder that exists; got {wanted.folder}")
    groups = classes(wanted)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sheets, grades, total = [], [], {}
    for name, paths in groups.items():
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            sheets.append(Sheet(title=name, rows=[Row(name=name, unable=f"not here: {missing[0]}, ...")]))
            continue
        files = [sought(path) for path in paths]
        seconds = measure(files, wanted.rounds)
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
    """Of the classes, round by round; of one that failed somewhere, why."""
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


if __name__ == "__main__":
    raise SystemExit(main())
