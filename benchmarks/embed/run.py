"""The towers' speed, compared with the machine's limit and with others: `python -m benchmarks.embed --help`.

At imagebind-huge's size, with random weights, on given tensors. A clip is 10 s: ten frames and ten
windows of sound of 2 s. In turn, round after round:

- *2048^3*: the machine's rate for one square matrix product, `a @ b`; the shares are of its best round, in
  the same dtype, and count the products that the contender really computes (see `benchmarks.embed.flops`).
- *ours*: bf16 as extraction runs it (weights in the CPU's own order) with 1, 8, 16 and 40 frames a forward,
  the same with weights in PyTorch's order, through `torch.compile` (`--compile`: takes minutes), and fp32.
- *transformers*: its CLIP vision encoder at the same size (1280 wide, 32 blocks, 16 heads, patch 14).
- *upstream*: ImageBind's own code, float32 as it ships, and cast to bf16. Its licence is not ours and it is
  on no package index: name a checkout with `--upstream`. Ours then run on its own tensors.

*Encoder* is the whole way of a decoded clip through ours: uint8 frames and a waveform in, numpy out.
The encoder lets the process keep freed memory; all others profit from that, too. On a GPU (if there is one)
times are CUDA's own and the limit is 8192^3.

Other processes on the same cores hit the contenders unevenly and make every share and ratio worthless: how
much of its cores the process got is reported (*cores got*, of 1), and below 0.9 speed is not judged.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import Grade, Report, Row, Sheet, Spread, Work, contest, ratios, run
from benchmarks.embed.flops import audio_flops, clip_flops, vision_flops
from benchmarks.embed.gpu import gpu_sheet
from benchmarks.embed.peers import (
    CONFIG,
    cast,
    cast_upstream,
    compiled,
    peer_vision,
    upstream_embed,
    upstream_model,
    with_weights_of,
)
from r2scp.model.imagebind.imagebind import ImageBind, normalise_frames
from r2scp.model.imagebind.melspec import SAMPLE_RATE, log_mel, windows
from r2scp.pipelines.extraction.embed import ImageBindEncoder
from r2scp.store.errors import UsageError

SECONDS = 10  # of a clip: frames and windows in it
SIDE = 2048  # of the square product
PRODUCTS = {torch.bfloat16: 60, torch.float32: 8}  # at a time: about half a second on two cores
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
BATCHES, SHORT_BATCHES = (1, 8, 16, 40), (1, 16)  # frames to a forward
UNDISTURBED = 0.9  # least share of its cores that a process must get for its figures to mean something
SHARE_GOAL, RATIO_GOAL, COSINE_GOAL = 0.85, 5.0, 0.999
FORWARD = " a forward"  # ends the names of the vision tower as extraction runs it
OURS, ENCODER, UPSTREAM = "ours, bf16", "ours, bf16, encoder", "upstream, fp32, as shipped"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contender in one table. `flops`: of one of its `units` (frames or clips)."""

    sheet: str  # vision | clip
    work: Work
    units: int
    dtype: torch.dtype
    flops: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of one clip, of noise: uint8 (T, 224, 224, 3), float32 (S,), and what the towers eat of them."""

    frames: np.ndarray
    waveform: np.ndarray
    images: Tensor
    mels: Tensor

    @classmethod
    def random(cls) -> "Inputs":
        noise = np.random.default_rng(1)
        frames = noise.integers(0, 256, (SECONDS, 224, 224, 3), dtype=np.uint8)
        waveform = noise.normal(0, 0.1, SECONDS * SAMPLE_RATE).astype(np.float32)
        images = normalise_frames(torch.from_numpy(frames))
        return cls(frames=frames, waveform=waveform, images=images, mels=log_mel(windows(waveform)))

    def batch(self, frames: int) -> Tensor:
        """So many frames, the clip's again and again."""
        return self.images[torch.arange(frames) % SECONDS]


def peak(dtype: torch.dtype) -> Work:
    """Square products, one after another."""
    one, other = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))

    def work() -> None:
        for _ in range(PRODUCTS[dtype]):
            torch.mm(one, other)

    return work


def vision(
    embed: Callable[[Tensor], Tensor], batch: Tensor, dtype: torch.dtype, whole: bool = False
) -> Entry:
    """One forward of a vision tower. `whole`: it computes all tokens of its last block."""
    flops = vision_flops(CONFIG, whole)
    return Entry(sheet="vision", work=lambda: embed(batch), units=len(batch), dtype=dtype, flops=flops)


def clip(work: Work, dtype: torch.dtype, whole: bool = False) -> Entry:
    """Both towers over one clip."""
    flops = SECONDS * (vision_flops(CONFIG, whole) + audio_flops(CONFIG, whole))
    return Entry(sheet="clip", work=work, units=1, dtype=dtype, flops=flops)


def our_entries(exact: ImageBind, inputs: Inputs, options: argparse.Namespace) -> dict[str, Entry]:
    """Ours in all forms, and how the machine multiplies."""
    half, single = torch.bfloat16, torch.float32
    plain, laid = cast(exact, half), cast(exact, half)
    encoder = ImageBindEncoder(laid)  # packs it

    def both(model: ImageBind) -> Work:
        return lambda: (model.vision(inputs.images), model.audio(inputs.mels))

    def through_encoder() -> None:
        encoder.visual(inputs.frames)
        encoder.audio([inputs.waveform])

    entries = {
        f"ours, bf16, {n}{FORWARD}": vision(laid.vision, inputs.batch(n), half)
        for n in (SHORT_BATCHES if options.short else BATCHES)
    }
    entries["ours, bf16, 16, PyTorch's order"] = vision(plain.vision, inputs.batch(16), half)
    if options.compile:
        entries["ours, bf16, 16, torch.compile"] = vision(compiled(plain.vision), inputs.batch(16), half)
    if not options.short:
        entries["ours, fp32, 8 frames"] = vision(exact.vision, inputs.batch(8), single)
        entries["ours, fp32"] = clip(both(exact), single)
    return entries | {OURS: clip(both(laid), half), ENCODER: clip(through_encoder, half)}


def peer_entries(upstream: torch.nn.Module | None, inputs: Inputs, short: bool) -> dict[str, Entry]:
    """transformers, and upstream if there is a checkout."""
    entries = {}
    for dtype in (torch.bfloat16,) if short else DTYPES:
        name, embed = f"transformers CLIP ViT-H, {DTYPES[dtype]}", None
        try:
            embed = peer_vision(dtype)
        except ImportError as error:
            embed = _unable(error)
        entries[name] = vision(embed, inputs.batch(8), dtype, whole=True)
    models = {} if upstream is None else {UPSTREAM: (upstream, torch.float32)}
    if upstream is not None and not short:
        models["upstream, cast to bf16"] = (cast_upstream(upstream), torch.bfloat16)
    for name, (model, dtype) in models.items():
        sees, hears = (upstream_embed(model, modality, dtype) for modality in ("vision", "audio"))
        entries[name] = clip(
            lambda sees=sees, hears=hears: (sees(inputs.images), hears(inputs.mels)), dtype, whole=True
        )
    return entries


def _unable(error: Exception) -> Callable[[Tensor], Tensor]:
    def embed(_: Tensor) -> Tensor:
        raise error

    return embed


def cosines(exact: ImageBind, laid: ImageBind, inputs: Inputs) -> float:
    """The least, over ten frames and ten windows, between bf16 and fp32 on the same weights."""
    pairs = [
        (exact.vision(inputs.images), laid.vision(inputs.images)),
        (exact.audio(inputs.mels), laid.audio(inputs.mels)),
    ]
    return min(torch.cosine_similarity(one, other).min().item() for one, other in pairs)


def rows(sheet: str, entries: Mapping[str, Entry], seconds: Mapping[str, Sequence[float] | str]) -> list[Row]:
    """One table: seconds of a frame or a clip, the rate, its share of the machine's, times upstream."""
    table = []
    for name, entry in entries.items():
        taken, peaks = seconds[name], seconds[_peak(entry.dtype)]
        if entry.sheet != sheet:
            continue
        if isinstance(taken, str):
            table.append(Row(name=name, unable=taken))
            continue
        rates = [entry.units * entry.flops / second / 1e12 for second in taken]
        assert not isinstance(peaks, str)
        limit = _peak_rate(entry.dtype, min(peaks))
        figures: dict[str, Spread | float | str] = {
            f"s a {'frame' if sheet == 'vision' else 'clip'}": Spread.of([s / entry.units for s in taken]),
            "TFLOP/s": Spread.of(rates),
            f"of {SIDE}^3": Spread.of([rate / limit for rate in rates]),
        }
        shipped = seconds.get(UPSTREAM)
        if sheet == "clip" and shipped is not None and not isinstance(shipped, str):
            figures["x upstream"] = ratios(shipped, taken)
        table.append(Row(name=name, figures=figures))
    if sheet == "clip" and UPSTREAM not in entries:
        table.append(Row(name=UPSTREAM, unable="give a checkout with --upstream"))
    return table


def _peak(dtype: torch.dtype) -> str:
    return f"{SIDE}^3, {DTYPES[dtype]}"


def _taken(seconds: Mapping[str, list[float] | str], dtype: torch.dtype) -> list[float]:
    """Of the product itself, which every torch can do."""
    taken = seconds[_peak(dtype)]
    assert not isinstance(taken, str), taken
    return taken


def _peak_rate(dtype: torch.dtype, second: float) -> float:
    return PRODUCTS[dtype] * 2 * SIDE**3 / second / 1e12


@torch.inference_mode()
def on_cpu(options: argparse.Namespace) -> tuple[list[Sheet], list[Grade], float]:
    """All contenders in turn; how much of its cores the process got."""
    inputs = Inputs.random()
    upstream = upstream_model(options.upstream) if options.upstream else None
    exact = (
        with_weights_of(upstream)
        if upstream
        else ImageBind.load(f"random:{options.seed}", "cpu", torch.float32)
    )
    entries = our_entries(exact, inputs, options) | peer_entries(upstream, inputs, options.short)
    laid = cast(exact, torch.bfloat16).pack()
    cosine = cosines(exact, laid, inputs)
    del laid
    works = {_peak(dtype): peak(dtype) for dtype in DTYPES} | {name: e.work for name, e in entries.items()}
    wall, busy = time.perf_counter(), time.process_time()
    seconds = contest(works, options.rounds)
    got = (time.process_time() - busy) / (time.perf_counter() - wall) / options.threads
    machine_rows = [
        Row(
            name=_peak(dtype),
            figures={"TFLOP/s": Spread.of([_peak_rate(dtype, s) for s in _taken(seconds, dtype)])},
        )
        for dtype in DTYPES
    ]
    tables = {sheet: rows(sheet, entries, seconds) for sheet in ("vision", "clip")}
    grades = [Grade(what="cosine of bf16 to fp32, the least", goal=COSINE_GOAL, reached=cosine)]
    grades += _speed_grades(tables) if got >= UNDISTURBED else []
    sheets = [
        Sheet(title="The machine", rows=machine_rows),
        Sheet(title="Vision tower, imagebind-huge", rows=tables["vision"]),
        Sheet(title=f"Whole clip: {SECONDS} frames and {SECONDS} windows of sound", rows=tables["clip"]),
    ]
    return sheets, grades, got


def _speed_grades(tables: Mapping[str, Sequence[Row]]) -> list[Grade]:
    """The vision tower at its best batch size, and a clip compared with upstream if there is a checkout."""
    shares = [
        figure.median
        for row in tables["vision"]
        if row.name.endswith(FORWARD) and isinstance(figure := row.figures.get(f"of {SIDE}^3"), Spread)
    ]
    grades = [Grade(what=f"vision tower, bf16, of the {SIDE}^3 rate", goal=SHARE_GOAL, reached=max(shares))]
    ours = next(row for row in tables["clip"] if row.name == OURS)
    if isinstance(times := ours.figures.get("x upstream"), Spread):
        what = "whole clip, times upstream as shipped"
        grades.append(Grade(what=what, goal=RATIO_GOAL, reached=times.median))
    return grades


def benchmark(options: argparse.Namespace) -> Report:
    """On the CPU, then on the GPU."""
    if options.threads < 1:
        raise UsageError(f"--threads must be at least 1; got {options.threads}")
    torch.set_num_threads(options.threads)
    sheets, grades, got = on_cpu(options)
    sheet, more = gpu_sheet(options)
    settings = {
        "threads": options.threads,
        "cores got": round(got, 3),
        "gigaflop a frame": round(vision_flops(CONFIG) / 1e9, 1),
        "a window": round(audio_flops(CONFIG) / 1e9, 1),
        "a clip": round(clip_flops(CONFIG, SECONDS) / 1e9, 1),
    }
    return Report(sheets=[*sheets, sheet], grades=[*grades, *more], settings=settings)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--upstream", type=Path, metavar="FOLDER", help="a checkout of facebookresearch/ImageBind"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile as well; takes minutes to compile"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights, without --upstream")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch, on the CPU")


def main(arguments: Sequence[str] | None = None) -> int:
    return run("embed", __doc__ or "", _options, benchmark, arguments)
