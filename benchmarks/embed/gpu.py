"""The towers on a GPU: CUDA's own times, and the share of the rate of one large square product (MFU)."""

import argparse
import statistics

import torch

from benchmarks.contest import Grade, Row, Sheet, Spread, Work, reason
from benchmarks.embed.flops import audio_flops, vision_flops
from benchmarks.embed.peers import CONFIG, Embed, compiled
from r2scp.model.imagebind.imagebind import ImageBind

SIDE = 8192  # of the square product
BATCHES = (32, 128, 256)  # frames or windows to a forward
TIMES = 10  # that each is timed in a round
GOAL = 0.5  # of the measured rate
TITLE = "On a GPU"


def gpu_sheet(options: argparse.Namespace) -> tuple[Sheet, list[Grade]]:
    """One table; a single line if there is no GPU."""
    if not torch.cuda.is_available():
        return Sheet(title=TITLE, rows=[Row(name="towers", unable="no GPU")]), []
    rows, best = [], 0.0
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            model = ImageBind.load(f"random:{options.seed}", "cuda", dtype)
            limit = _limit(dtype, options.rounds)
            name = "bf16" if dtype == torch.bfloat16 else "fp32 (tf32)"
            rows.append(Row(name=f"{SIDE}^3, {name}", figures={"TFLOP/s": limit}))
            towers: dict[str, tuple[Embed, tuple[int, ...], int]] = {
                "vision": (model.vision, (3, 224, 224), vision_flops(CONFIG)),
                "audio": (model.audio, (1, 128, 204), audio_flops(CONFIG)),
            }
            if options.compile:
                towers["vision, torch.compile"] = (compiled(model.vision), *towers["vision"][1:])
            for tower, (embed, shape, flops) in towers.items():
                for batch in BATCHES:
                    row, share = _row(
                        embed, torch.randn(batch, *shape, device="cuda"), flops, limit.median, options
                    )
                    rows.append(
                        Row(
                            name=f"{tower}, {name}, {batch} a forward", figures=row.figures, unable=row.unable
                        )
                    )
                    best = max(best, share if tower.startswith("vision") and dtype == torch.bfloat16 else 0.0)
            del model, towers
    return Sheet(title=TITLE, rows=rows), [
        Grade(what=f"vision tower on a GPU, bf16, of the {SIDE}^3 rate", goal=GOAL, reached=best)
    ]


def _row(
    embed: Embed, batch: torch.Tensor, flops: int, limit: float, options: argparse.Namespace
) -> tuple[Row, float]:
    """Rate of one tower at one batch size, and its share of the limit."""
    try:
        seconds = [_seconds(lambda: embed(batch)) for _ in range(options.rounds)]
    except RuntimeError as error:  # out of memory, or a compiler that fails
        return Row(name="", unable=reason(error)), 0.0
    rates = [len(batch) * flops / second / 1e12 for second in seconds]
    share = statistics.median(rates) / limit
    figures = {
        "ms each": Spread.of([1e3 * second / len(batch) for second in seconds]),
        "TFLOP/s": Spread.of(rates),
        f"of {SIDE}^3": share,
    }
    return Row(name="", figures=figures), share


def _limit(dtype: torch.dtype, rounds: int) -> Spread:
    one, other = (torch.randn(SIDE, SIDE, device="cuda", dtype=dtype) for _ in range(2))
    return Spread.of([2 * SIDE**3 / _seconds(lambda: one @ other) / 1e12 for _ in range(rounds)])


def _seconds(work: Work) -> float:
    """Of one call, by CUDA's events, the median of `TIMES` after two untimed ones."""
    taken = []
    for at in range(2 + TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken += [start.elapsed_time(end) / 1e3] if at >= 2 else []
    return statistics.median(taken)
