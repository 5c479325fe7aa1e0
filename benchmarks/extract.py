"""How fast extraction is, beside what it could be: `python -m benchmarks.extract --help`.

Four contenders do the same clips, in turn, round after round, so that noise hits all alike:

- *decode alone*: every clip through `decode`, on a pool of as many threads as there are cores.
- *embed alone*: the decoded clips through the encoder, in batches, on all cores, with threads that do not
  spin while they wait (on a busy machine spinning can cost more than the arithmetic).
- *plain loop*: decode one, embed one, in one process with PyTorch's defaults; nothing is stored.
- *flow*: the whole of `run_extract` into a fresh store: plan, hash, decode, embed, stage, commit. Ray is
  started before and timed apart. What a flow costs before its first clip and after its last (worker
  processes, loading the encoder, creating the tables) is timed too, as a flow of a single clip; *flow,
  started* is the rate of all clips but one in the time beyond that. Decoding begins while the encoder
  loads, so that the truth for an endless corpus lies between the two.

Ceilings, from decode and embed of the same round: where both compete for the same cores, a clip costs the
sum of its two times (*shared cores*); where a GPU embeds, only the slower counts (*GPU*).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cores, machine, versions
from r2scp.jobs.extract import Destination, Source, encoder_spec, pick_device, run_extract
from r2scp.pipelines.corpora import open_corpus
from r2scp.pipelines.decode import Clip, decode
from r2scp.pipelines.demo_corpus import generate
from r2scp.pipelines.embed import Encoder, EncoderSpec
from r2scp.pipelines.flows import Resources, ray_session
from r2scp.store.errors import MediaError, R2SCPError, UsageError

SEED = 20  # of the generated clips
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait leave the core to others
DECODE, EMBED, LOOP, FLOW, STARTED = "decode alone", "embed alone", "plain loop", "flow", "flow, started"
SHARED, GPU = "ceiling, shared cores", "ceiling, GPU"
CONTENDERS = (DECODE, EMBED, LOOP, FLOW, STARTED)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all contenders do, and with what."""

    source: Source
    files: tuple[Path, ...]
    spec: EncoderSpec
    resources: Resources
    cores: int
    scratch: Path  # for stores


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Where the contenders beside the flow run: each process keeps its encoder from round to round."""

    usual: ProcessPoolExecutor  # with the environment as it is
    patient: ProcessPoolExecutor  # with `PATIENT`


@dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds of one round, and how many clips each contender did. `flow_one`: a flow of one clip."""

    clips: int
    decode: float
    embed: float
    loop: float
    flow: float
    flow_one: float
    ray: float

    def rates(self) -> dict[str, float]:
        """Clips a second of all contenders and of both ceilings."""
        decoded, embedded = self.clips / self.decode, self.clips / self.embed
        return {
            DECODE: decoded,
            EMBED: embedded,
            LOOP: self.clips / self.loop,
            FLOW: self.clips / self.flow,
            STARTED: (self.clips - 1) / max(self.flow - self.flow_one, 1e-9),
            SHARED: 1 / (1 / decoded + 1 / embedded),
            GPU: min(decoded, embedded),
        }


def decode_alone(work: Work) -> tuple[float, int]:
    """Seconds for all files, one a core at a time; how many could be decoded."""
    started = time.perf_counter()
    with ThreadPoolExecutor(work.cores) as pool:
        count = sum(clip is not None for clip in pool.map(_decoded, work.files))
    return time.perf_counter() - started, count


def embed_alone(work: Work) -> float:
    """Seconds for all clips, decoded before, in the flow's batches and on all cores."""
    torch.set_num_threads(work.cores)
    encoder, clips, step = _encoder(work.spec), _clips(work.files), work.resources.clips_per_batch
    started = time.perf_counter()
    for at in range(0, len(clips), step):
        _embed(encoder, clips[at : at + step])
    return time.perf_counter() - started


def plain_loop(work: Work) -> float:
    """Seconds for what one would write first."""
    encoder = _encoder(work.spec)
    started = time.perf_counter()
    for clip in filter(None, map(_decoded, work.files)):
        _embed(encoder, [clip])
    return time.perf_counter() - started


def _decoded(file: Path) -> Clip | None:
    try:
        return decode(file)
    except MediaError:
        return None


@lru_cache(maxsize=1)
def _clips(files: tuple[Path, ...]) -> tuple[Clip, ...]:
    return tuple(filter(None, map(_decoded, files)))


@lru_cache(maxsize=1)
def _encoder(spec: EncoderSpec) -> Encoder:
    return spec.load()


def _embed(encoder: Encoder, clips: Sequence[Clip]) -> None:
    frames = [clip.frames for clip in clips if clip.frames is not None]
    waveforms = [clip.waveform for clip in clips if clip.waveform is not None]
    if frames:
        encoder.visual(np.concatenate(frames))
    if waveforms:
        encoder.audio(waveforms)


def flow(work: Work, limit: int) -> tuple[float, int]:
    """Seconds for the flow on the first `limit` clips, into a store of its own; how many it stored."""
    source = Source(work.source.corpus, work.source.root, limit=limit)
    with tempfile.TemporaryDirectory(dir=work.scratch) as store:
        destination = Destination(store)
        started = time.perf_counter()
        report = run_extract(source, destination, work.spec, work.resources, lambda report, total: None)
        return time.perf_counter() - started, report.stored


def one_round(work: Work, at: Processes) -> Round:
    """All contenders, one after another."""
    decode_s, clips = at.usual.submit(decode_alone, work).result()
    embed_s = at.patient.submit(embed_alone, work).result()
    loop_s = at.usual.submit(plain_loop, work).result()
    started = time.perf_counter()
    with ray_session(work.resources):
        ray_s = time.perf_counter() - started
        one_s, _ = flow(work, 1)
        flow_s, stored = flow(work, len(work.files))
    if stored != clips:
        raise R2SCPError(f"the flow must store the {clips} clips that decode; it stored {stored}")
    return Round(
        clips=clips, decode=decode_s, embed=embed_s, loop=loop_s, flow=flow_s, flow_one=one_s, ray=ray_s
    )


@contextmanager
def _process(environment: dict[str, str]) -> Iterator[ProcessPoolExecutor]:
    """A process that starts with `environment` beside ours, and ends with the block."""
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


def summary(rounds: list[Round], gpu: bool) -> dict[str, object]:
    """Median, least and most of every rate (clips/s) and of its ratio to both ceilings, over the rounds."""
    rates = [one.rates() for one in rounds]
    ceiling = GPU if gpu else SHARED
    return {
        "clips": rounds[0].clips,
        "rounds": len(rounds),
        "applies": ceiling,
        "clips_per_second": {name: _spread([rate[name] for rate in rates]) for name in rates[0]},
        "of_ceiling": {
            bound: {name: _spread([rate[name] / rate[bound] for rate in rates]) for name in CONTENDERS}
            for bound in (SHARED, GPU)
        },
        "flow_over_loop": _spread([rate[FLOW] / rate[LOOP] for rate in rates]),
        "seconds": {
            "start Ray": _spread([one.ray for one in rounds]),
            "flow of one clip": _spread([one.flow_one for one in rounds]),
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in figures.items()}


def show(result: dict, out: Console) -> None:
    """The result as a person reads it."""
    found = result["summary"]
    table = Table(title=f"extraction, {found['clips']} clips, median (min – max) of {found['rounds']} rounds")
    for heading in ("", "clips/s", f"of {SHARED}", f"of {GPU}"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, rate in found["clips_per_second"].items():
        shares = [_text(found["of_ceiling"][bound].get(name), 2) for bound in (SHARED, GPU)]
        table.add_row(name, _text(rate, 2), *shares)
    out.print(table)
    out.print(f"the ceiling that applies here: {found['applies'].partition(', ')[2]}")
    out.print(f"flow over plain loop: {_text(found['flow_over_loop'], 2)}")
    for name, spread in found["seconds"].items():
        out.print(f"{name}: {_text(spread, 1)} s")
    for part in ("machine", "versions", "settings"):
        out.print(f"{part}: " + ", ".join(f"{name} {value}" for name, value in result[part].items()))


def _text(spread: dict[str, float] | None, digits: int) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f} – {spread['max']:.{digits}f})"


def benchmark(options: argparse.Namespace, scratch: Path, out: Console) -> dict[str, object]:
    """Everything: make or find the clips, warm up, run the rounds."""
    about = {"machine": machine(), "versions": versions()}
    work = _work(options, scratch)
    with _process({}) as usual, _process(PATIENT) as patient:
        at = Processes(usual=usual, patient=patient)
        warm = replace(work, files=work.files[:1])  # programs and weights into memory
        usual.submit(decode_alone, warm).result()
        for pool, contender in ((usual, plain_loop), (patient, embed_alone)):
            pool.submit(contender, warm).result()
        threads = usual.submit(torch.get_num_threads).result()
        rounds = []
        for number in range(1, options.rounds + 1):
            out.print(f"round {number} of {options.rounds}")
            rounds.append(one_round(work, at))
    settings = {
        "encoder": work.spec.fingerprint,
        "dtype": work.spec.dtype,
        "device": work.spec.device,
        "cores used": work.cores,
        "threads of the plain loop": threads,
        "clips a batch": work.resources.clips_per_batch,
        "root": str(options.root or f"generated, seed {SEED}"),
    }
    found = summary(rounds, work.spec.device == "cuda")
    return about | {"settings": settings, "summary": found, "round_seconds": [asdict(one) for one in rounds]}


def _work(options: argparse.Namespace, scratch: Path) -> Work:
    workers = options.num_workers or cores()
    if options.clips < 2 or options.rounds < 1 or workers < 1:
        raise UsageError(
            "the benchmark needs --clips of at least 2, --rounds and --num-workers of at least 1"
        )
    spec = encoder_spec(options.encoder, options.weights, pick_device(None))
    root = options.root.resolve() if options.root else scratch / "corpus"
    if not options.root:
        generate(root, clips=options.clips, seed=SEED, workers=workers)
    clips = (Path(clip.uri) for clip in open_corpus("folder", root).clips() if clip.uri)
    files = tuple(islice(clips, options.clips))
    if len(files) < 2:
        raise UsageError(f"--root must hold at least 2 media files; {root} holds {len(files)}")
    return Work(
        source=Source("folder", root),
        files=files,
        spec=spec,
        resources=Resources(num_workers=workers),
        cores=workers,
        scratch=scratch,
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.extract",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = partial(parser.add_argument, metavar="")
    add("--root", type=Path, help="folder of media; generated demo clips by default")
    add("--clips", type=int, default=48, help="at most so many (default: 48)")
    add("--rounds", type=int, default=3, help="default: 3")
    add("--encoder", default="imagebind-demo", help="imagebind-demo (default) or imagebind-huge")
    add("--weights", help="a .pth or .safetensors file, or random:SEED with --encoder imagebind-huge")
    add("--num-workers", type=int, help="cores for every contender but the plain loop; all by default")
    add("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write. 1 or 2, with one line on stderr, where that cannot be."""
    options, out = _options(arguments), Console(markup=False, highlight=False, emoji=False)
    try:
        with tempfile.TemporaryDirectory(prefix="r2scp-bench-") as scratch:
            result = benchmark(options, Path(scratch), out)
    except R2SCPError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, UsageError) else 1
    show(result, out)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
