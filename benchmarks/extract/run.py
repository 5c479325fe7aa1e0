"""How fast extraction is, compared with its upper limit and with the alternatives.

All contenders extract the same clips, in turn, round after round, so that noise affects all equally:

- *decode alone*: every clip through `decode`, on a pool of as many threads as there are cores.
- *embed alone*: the decoded clips through the encoder, in batches, on all cores, with threads that do not
  spin while they wait (on a busy machine spinning can cost more than the arithmetic).
- *plain loop*: decode one, embed one, write one, in one process with PyTorch's defaults.
- *Daft*, *Pixeltable*: see `extract/peers.py`; in processes kept between rounds, with the encoder loaded.
- *flow*: the whole of `run_extract` into a fresh store: plan, hash, decode, embed, stage, commit. Its worker
  processes start and load the encoder again each time. They run at the priority of the others; by default
  Ray lowers it.

What each costs before its first clip and after its last is measured by a run on a single clip (the start of
Ray is timed separately); *started* is the rate of the other clips in the remaining time, as in a long corpus.
Ceilings, from decode and embed of the same round: if both compete for the same cores, a clip costs the sum of
its two times (*shared cores*); if a GPU embeds, only the slower counts (*GPU*).
"""

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.contest import Grade, Report, Row, Sheet, Spread, contest, ratios, run
from benchmarks.extract.peers import encoder_of, loop, with_daft
from benchmarks.machine import cores
from r2scp.jobs.ingest.encoders import encoder_spec, pick_device
from r2scp.jobs.ingest.extract import Destination, Source, run_extract
from r2scp.pipelines.corpora.formats import open_corpus
from r2scp.pipelines.decoding.decode import Clip, decode
from r2scp.pipelines.decoding.ffmpeg_command import find_program
from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.errors import MediaError, R2SCPError, UsageError

SEED = 20  # of the generated clips
DISTINCT = 48  # of them; larger corpora are links to these
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait leave the core to others
NICENESS = "RAY_worker_niceness"  # Ray's own is 15: the flow would give way to whatever else runs
DECODE, EMBED = "decode alone", "embed alone"
LOOP, DAFT, PIXELTABLE, FLOW = "plain loop", "Daft", "Pixeltable", "flow"
WHOLE = (LOOP, DAFT, PIXELTABLE, FLOW)
RAY = "start Ray"
SHARED, GPU = "ceiling, shared cores", "ceiling, GPU"
SHARE_GOAL = 0.9  # of the ceiling
FLAT_GOAL = 1.1  # seconds for a clip more in the largest corpus over a small one


@dataclass(frozen=True, kw_only=True)
class Work:
    """The clips that all contenders extract, and the settings."""

    root: Path
    files: tuple[Path, ...]
    decodes: tuple[bool, ...]  # of each file
    spec: EncoderSpec
    resources: Resources
    cores: int
    scratch: Path  # for what they write

    def first(self, clips: int) -> "Work":
        """The same on the first `clips` files."""
        return replace(self, files=self.files[:clips], decodes=self.decodes[:clips])


def decode_alone(work: Work) -> int:
    """Decodes all files, one per core at a time; returns how many could be decoded."""
    with ThreadPoolExecutor(work.cores) as pool:
        return sum(clip is not None for clip in pool.map(_decoded, work.files))


def embed_alone(work: Work) -> float:
    """Seconds for all clips, decoded before, in the flow's batches and on all cores."""
    torch.set_num_threads(work.cores)
    encoder, clips, step = encoder_of(work.spec), _clips(work.files), work.resources.clips_per_batch
    started = time.perf_counter()
    for at in range(0, len(clips), step):
        some = clips[at : at + step]
        frames = [clip.frames for clip in some if clip.frames is not None]
        waveforms = [clip.waveform for clip in some if clip.waveform is not None]
        if frames:
            encoder.visual(np.concatenate(frames))
        if waveforms:
            encoder.audio(waveforms)
    return time.perf_counter() - started


def _decoded(file: Path) -> Clip | None:
    try:
        return decode(file)
    except MediaError:
        return None


@lru_cache(maxsize=1)
def _clips(files: tuple[Path, ...]) -> tuple[Clip, ...]:
    return tuple(filter(None, map(_decoded, files)))


def peer(name: str, work: Work) -> int:
    """The whole extraction by one of the others; returns how many clips it kept."""
    with tempfile.TemporaryDirectory(dir=work.scratch) as folder:
        return _peer(name, work.spec, work.resources.clips_per_batch)(work.files, Path(folder))


@lru_cache
def _peer(name: str, spec: EncoderSpec, batch: int):
    if name == LOOP:
        return partial(loop, spec)
    if name == DAFT:
        return with_daft(spec, batch)
    from benchmarks.extract.pixeltable_flow import with_pixeltable  # needs a package of the bench group

    return with_pixeltable(spec)


def flow(work: Work) -> tuple[float, int]:
    """Seconds for the flow into a store of its own; how many clips it stored."""
    source = Source("folder", work.root, limit=len(work.files))
    with tempfile.TemporaryDirectory(dir=work.scratch) as store:
        started = time.perf_counter()
        report = run_extract(
            source, Destination(store), work.spec, work.resources, lambda report, total: None
        )
        return time.perf_counter() - started, report.stored


def contenders(work: Work, pools: Mapping[str, ProcessPoolExecutor]) -> dict[str, partial[object]]:
    """All of them by name; those that do the whole, of one clip as well."""
    one = work.first(1)
    result: dict[str, partial[object]] = {
        RAY: partial(_start_ray, work.resources),
        DECODE: partial(_in, pools[LOOP], decode_alone, work),
        EMBED: partial(_in, pools[EMBED], embed_alone, work),
    }
    for name in (LOOP, DAFT, PIXELTABLE):
        result[_of_one(name)] = partial(_kept, pools[name], name, one)
        result[name] = partial(_kept, pools[name], name, work)
    result[_of_one(FLOW)], result[FLOW] = partial(_flow, one), partial(_flow, work)
    return result


def _of_one(name: str) -> str:
    return f"{name}, one clip"


def _in(pool: ProcessPoolExecutor, function, *given: object) -> object:
    return pool.submit(function, *given).result()


def _kept(pool: ProcessPoolExecutor, name: str, work: Work) -> None:
    _same(name, pool.submit(peer, name, work).result(), work)


def _flow(work: Work) -> float:
    with ray_session(work.resources):
        seconds, stored = flow(work)
    _same(FLOW, stored, work)
    return seconds


def _start_ray(resources: Resources) -> float:
    started = time.perf_counter()
    with ray_session(resources):
        return time.perf_counter() - started


def _same(name: str, kept: int, work: Work) -> None:
    """Raises `R2SCPError` unless all clips that decode were kept."""
    decodable = sum(work.decodes)
    if kept != decodable:
        raise R2SCPError(f"{name} must keep the {decodable} clips that decode; it kept {kept}")


@contextmanager
def processes(scratch: Path) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A process for each contender but the flow, kept between rounds."""
    home = scratch / "pixeltable"
    environments = {LOOP: {}, EMBED: PATIENT, DAFT: PATIENT, PIXELTABLE: PATIENT}
    environments[DAFT] = PATIENT | {"DAFT_PROGRESS_BAR": "0"}
    environments[PIXELTABLE] = PATIENT | {"PIXELTABLE_HOME": str(home), "PIXELTABLE_VERBOSITY": "0"}
    with ExitStack() as stack:
        stack.callback(_stop_database, home / "pgdata" / "postmaster.pid")
        yield {name: stack.enter_context(_process(environment)) for name, environment in environments.items()}


def _stop_database(pid_file: Path) -> None:
    """Pixeltable leaves its database running."""
    if pid_file.exists():
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGINT)


@contextmanager
def _process(environment: Mapping[str, str]) -> Iterator[ProcessPoolExecutor]:
    """A process with `environment` added to ours, which ends with the block."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # by then it has started
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        yield pool


def speeds(seconds: Mapping[str, list[float] | str], clips: int) -> tuple[Sheet, list[Grade]]:
    """Clips a second and shares of the ceiling, and whether the goals were met."""
    able = {name: taken for name, taken in seconds.items() if not isinstance(taken, str)}
    decoding, embedding, started = able[DECODE], able[EMBED], {}
    bound = GPU if torch.cuda.is_available() else SHARED
    both = max if bound == GPU else lambda pair: pair[0] + pair[1]
    ceiling = [clips / both(pair) for pair in zip(decoding, embedding, strict=True)]
    rows = [Row(name=name, figures=_rates([clips / s for s in able[name]])) for name in (DECODE, EMBED)]
    rows.append(Row(name=bound, figures=_rates(ceiling)))
    for name in WHOLE:
        taken, once = seconds[name], seconds[_of_one(name)]
        if isinstance(taken, str) or isinstance(once, str):
            rows.append(Row(name=name, unable=taken if isinstance(taken, str) else str(once)))
            continue
        started[name] = [(clips - 1) / max(a - b, 1e-9) for a, b in zip(taken, once, strict=True)]
        figures = _rates([clips / s for s in taken]) | {
            "started": Spread.of(started[name]),
            "started, of the ceiling": ratios(started[name], ceiling),
            "one clip, s": Spread.of(once),
        }
        rows.append(Row(name=name, figures=figures))
    rows.append(Row(name=RAY, figures={"one clip, s": Spread.of(able[RAY])}))
    grades = [
        Grade(
            what="flow, started, of the ceiling",
            goal=SHARE_GOAL,
            reached=ratios(started[FLOW], ceiling).median,
        )
    ]
    grades += [
        Grade(what=f"flow over {name}, started", goal=1.0, reached=ratios(started[FLOW], theirs).median)
        for name, theirs in started.items()
        if name != FLOW
    ]
    return Sheet(title=f"Extraction of {clips} clips, clips a second", rows=rows), grades


def _rates(values: Sequence[float]) -> dict[str, Spread | float | str]:
    return {"all": Spread.of(values)}


def growth(work: Work, sizes: Sequence[int]) -> tuple[Sheet, list[Grade]]:
    """The cost of one more clip, from one size of corpus to the next, each run once.

    The clips are cut to one second, so that all but decoding and embedding weighs more than in practice.
    Decoding begins while the encoder loads: the step to the first size is not comparable with the others.
    """
    rows, costs = [], []
    work = _cut(work)
    with ray_session(work.resources):
        before, clips_before = flow(work.first(1))
        for clips in sizes:
            seconds, stored = flow(_linked(work, clips))
            if stored != clips:
                raise R2SCPError(f"the flow must store {clips} clips; it stored {stored}")
            costs.append((seconds - before) / (clips - clips_before))
            rows.append(
                Row(name=f"{clips:,} clips", figures={"s": seconds, "ms a clip more": 1e3 * costs[-1]})
            )
            before, clips_before = seconds, clips
    what = f"cost of a clip more up to {sizes[-1]:,}, over that up to {sizes[1]:,}"
    grade = Grade(what=what, goal=FLAT_GOAL, reached=costs[-1] / costs[1], at_most=True)
    return Sheet(title="Cost by the size of the corpus", rows=rows), [grade]


def _cut(work: Work) -> Work:
    """The first second of each file."""
    folder = work.scratch / "cut"
    folder.mkdir()
    work = work.first(DISTINCT)
    files = tuple(folder / f"{number:03}.mp4" for number in range(len(work.files)))
    for whole, file in zip(work.files, files, strict=True):
        words = [find_program(None).path, "-v", "error", "-i", whole, "-t", "1", "-c", "copy", file]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    return replace(work, root=folder, files=files)


def _linked(work: Work, clips: int) -> Work:
    """A corpus of that size, of links to the files."""
    root = work.scratch / f"linked-{clips}"
    root.mkdir(exist_ok=True)
    files = tuple(root / f"{number:07}{work.files[0].suffix}" for number in range(clips))
    for number, file in enumerate(files):
        if not file.exists():
            os.link(work.files[number % len(work.files)], file)
    decodes = tuple(work.decodes[number % len(work.files)] for number in range(clips))
    return replace(work, root=root, files=files, decodes=decodes)


def benchmark(options: argparse.Namespace) -> Report:
    """Generates or finds the clips and runs the rounds."""
    with tempfile.TemporaryDirectory(prefix="r2scp-bench-") as folder:
        scratch = Path(folder)
        if options.cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        os.environ.setdefault(NICENESS, "0")  # the peers'
        work = _work(options, scratch)
        with processes(scratch) as pools:
            seconds = contest(contenders(work, pools), options.rounds)
        for name in (RAY, DECODE, EMBED, FLOW):
            if isinstance(seconds[name], str):
                raise R2SCPError(f"{name}: {seconds[name]}")
        sheet, grades = speeds(seconds, len(work.files))
        sheets = [sheet]
        if options.scale:  # the first is a start, the second a measure, the last compared with it
            grown, flat = growth(work, sorted(options.scale))
            sheets, grades = [*sheets, grown], [*grades, *flat]
    settings = {
        "encoder": work.spec.fingerprint,
        "dtype": work.spec.dtype,
        "device": work.spec.device,
        "cores used": work.cores,
        "clips a batch": work.resources.clips_per_batch,
        "niceness of Ray's workers": os.environ[NICENESS],
        "root": str(options.root or f"generated, seed {SEED}"),
    }
    return Report(sheets=sheets, grades=grades, settings=settings)


def _work(options: argparse.Namespace, scratch: Path) -> Work:
    clips = options.clips or (DISTINCT if options.short else 4 * DISTINCT)
    if options.scale and (len(options.scale) < 3 or min(options.scale) < 2):
        raise UsageError(f"--scale takes three sizes or more, of at least 2 clips; got {options.scale}")
    if clips < 2:
        raise UsageError(f"--clips must be at least 2; got {clips}")
    spec = encoder_spec(options.encoder, options.weights, pick_device(None))
    root = options.root.resolve() if options.root else scratch / "corpus" / "videos"
    if not options.root:
        generate(root.parent, clips=min(clips, DISTINCT), seed=SEED, workers=cores())
    files = tuple(Path(clip.uri) for clip in open_corpus("folder", root).clips() if clip.uri)[:clips]
    if len(files) < 2:
        raise UsageError(f"--root must hold at least 2 media files; {root} holds {len(files)}")
    resources = Resources(num_workers=cores())
    decodes = tuple(_decoded(file) is not None for file in files)
    work = Work(
        root=root,
        files=files,
        decodes=decodes,
        spec=spec,
        resources=resources,
        cores=cores(),
        scratch=scratch,
    )
    return work if options.root or clips <= len(files) else _linked(work, clips)


def _options(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, metavar="")
    add("--root", type=Path, help="folder of media; generated demo clips by default")
    add("--clips", type=int, help=f"at most so many (default: {4 * DISTINCT}; short: {DISTINCT})")
    add("--encoder", default="imagebind-demo", help="imagebind-demo (default) or imagebind-huge")
    add("--weights", help="a .pth or .safetensors file, or random:SEED with --encoder imagebind-huge")
    add("--cores", type=int, help="bind everything to so many; all by default")
    parser.add_argument(
        "--scale", type=int, nargs="+", help="sizes of corpus, three or more, ascending, each run once"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return run("extract", __doc__ or "", _options, benchmark, arguments)
