"""Trains `imagebind-demo`: the ImageBind class at a small size, on generated scenes of other worlds.

    python -m r2scp.jobs.demo.encoder --out model/imagebind/data/imagebind-demo.safetensors \
      --minutes 45 --seed 1

Pairs (the frame at a second's middle, the 2 s window around it) are rendered once into memory-mapped
files under `--scratch`, then four contrastive losses are trained, per second:

* picture with sound (InfoNCE in both directions). Negatives are other seconds of the same clip, other clips
  of the same ensemble and of the same world, and other worlds; seconds of one clip in which the same parts
  sound and move are left out, because they cannot be distinguished;
* picture, and sound, with the phrases of each group of `captions`, of which one is true;
* picture, and sound, with captions made of a few true phrases (every pair for which a caption is true is a
  positive);
* questions in MUSIC-AVQA's wording with short descriptions of what they ask, so that wordings stay
  distinguishable.

For speed, patches are dropped at random during the first part of the training (Li et al. 2023,
FLIP). Worlds: seeds from `TRAIN_WORLD` on are for training; `measures` names the held-out ones; corpora use
smaller seeds.
"""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from r2scp.jobs.demo.contrasts import WEIGHTS, Contrasts, Towers
from r2scp.jobs.demo.measures import MIDDLES_S, figures
from r2scp.model.imagebind.imagebind import PIXEL_MEAN, PIXEL_STD, ImageBind, ImageBindConfig, TowerConfig
from r2scp.model.imagebind.melspec import LOG_MEL_STD, MEL_BINS, MEL_FRAMES, log_mel, windows
from r2scp.pipelines.demo.captions import (
    AUDIO_GROUPS,
    VISION_GROUPS,
    audio_labels,
    visible_audible_state,
    vision_labels,
)
from r2scp.pipelines.demo.render import SIZE, render_frames
from r2scp.pipelines.demo.scene import Scene, make_scene
from r2scp.pipelines.demo.sound import render_audio
from r2scp.pipelines.demo.world import ENSEMBLES, SECONDS, make_world

_TAG = 7  # seeds this module's random numbers
TRAIN_WORLD = 5000  # the first of the training worlds
MEASURED_CLIPS = 200  # of the held-out world
CLIPS_PER_WORLD, RENDERED_SECONDS = 20, 5  # … of each clip, at random
CLIPS_PER_BATCH, SECONDS_PER_CLIP = 32, 2
BATCH = CLIPS_PER_BATCH * SECONDS_PER_CLIP
REPORT_EVERY, SAVE_EVERY = 25, 250  # steps
PEAK_LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 1e-3, 150, 0.02
KEEP_PATCHES = (0.75, 0.4)  # of vision and audio, until …
WHOLE_FROM = 0.85  # … this share of the training
JITTER = 0.03  # standard deviation of the colour gain and shift
JITTER_DB = 2.0  # of the loudness

Save = Callable[[ImageBind, int], None]
PairIndex = tuple[np.ndarray, np.ndarray]  # rows and seconds of pairs

CONFIG = ImageBindConfig(
    vision=TowerConfig(width=128, depth=3, heads=4),
    audio=TowerConfig(width=128, depth=3, heads=4),
    text=TowerConfig(width=64, depth=2, heads=2),
    dim=128,
    patch=28,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Rendered seconds: N clips of 10."""

    frames: np.ndarray  # uint8 (N, 10, 224, 224, 3), memory-mapped
    melspecs: np.ndarray  # float16 (N, 10, 128, 204), memory-mapped
    vision: np.ndarray  # int16 (N, 10, len(VISION_GROUPS))
    audio: np.ndarray  # int16 (N, 10, len(AUDIO_GROUPS))
    state: np.ndarray  # int32 (N, 10): equal for seconds of a clip that cannot be distinguished
    ensemble: np.ndarray  # int32 (N,)

    @property
    def world(self) -> np.ndarray:
        """World of each clip: (N,)."""
        return np.arange(len(self.ensemble)) // CLIPS_PER_WORLD


def render(folder: Path, worlds: int, workers: int) -> Pairs:
    """Renders `worlds` worlds into `folder`, or maps what an earlier call rendered."""
    clips = worlds * CLIPS_PER_WORLD
    shapes = {
        "frames": (np.uint8, (clips, RENDERED_SECONDS, SIZE, SIZE, 3)),
        "melspecs": (np.float16, (clips, RENDERED_SECONDS, MEL_BINS, MEL_FRAMES)),
        "vision": (np.int16, (clips, RENDERED_SECONDS, len(VISION_GROUPS))),
        "audio": (np.int16, (clips, RENDERED_SECONDS, len(AUDIO_GROUPS))),
        "state": (np.int32, (clips, RENDERED_SECONDS)),
        "ensemble": (np.int32, (clips,)),
    }
    done = folder / f"done-{worlds}"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, (dtype, shape) in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(pool.map(_render_world, [folder] * worlds, range(worlds)))
        done.touch()
    return Pairs(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes})


def _render_world(folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    out = {path.stem: np.load(path, mmap_mode="r+") for path in folder.glob("*.npy")}
    seed = TRAIN_WORLD + number
    rng = np.random.default_rng([seed, _TAG])
    for index in range(CLIPS_PER_WORLD):
        row, scene = number * CLIPS_PER_WORLD + index, _decorrelate(make_scene(seed, index), rng)
        seconds = np.sort(rng.choice(SECONDS, RENDERED_SECONDS, replace=False))
        out["frames"][row] = render_frames(scene, MIDDLES_S[seconds])
        out["melspecs"][row] = log_mel(windows(render_audio(scene))[seconds])[:, 0].numpy()
        out["vision"][row] = [vision_labels(scene, second) for second in seconds]
        out["audio"][row] = [audio_labels(scene, second) for second in seconds]
        states = [visible_audible_state(scene, second) for second in seconds]
        out["state"][row] = [states.index(state) for state in states]
        out["ensemble"][row] = scene.ensemble


def _decorrelate(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with backdrop, room and costumes of three other ensembles, so that none predicts another."""
    picks = [make_world(scene.seed).ensembles[i] for i in rng.integers(ENSEMBLES, size=3)]
    return replace(scene, backdrop=picks[0].backdrop, room=picks[1].room, costume=picks[2].costume)


class Batches:
    """Draws batches of pairs: every two clips are of the same ensemble, or at least of the same world."""

    def __init__(self, pairs: Pairs, seed: int) -> None:
        self.pairs = pairs
        self.rng, self.light, self.gain = (np.random.default_rng([seed, i]) for i in range(3))

    def draw(self) -> PairIndex:
        """Rows and seconds, int64 (BATCH,) each."""
        world, ensemble = self.pairs.world, self.pairs.ensemble
        rows = []
        for first in self.rng.choice(len(ensemble), CLIPS_PER_BATCH // 2, replace=False):
            others = np.flatnonzero(world == world[first])
            others = others[others != first]
            same = others[ensemble[others] == ensemble[first]]
            rows += [first, self.rng.choice(same if len(same) and self.rng.random() < 0.6 else others)]
        seconds = [self.rng.choice(RENDERED_SECONDS, SECONDS_PER_CLIP, replace=False) for _ in rows]
        return np.repeat(rows, SECONDS_PER_CLIP), np.concatenate(seconds)

    def frames(self, index: PairIndex) -> Tensor:
        """Normalised and jittered in colour, as cameras and codecs do: float32 (BATCH, 3, 224, 224)."""
        pixels = torch.from_numpy(self.pairs.frames[index]).permute(0, 3, 1, 2).float()
        std, mean = (torch.tensor(x).view(3, 1, 1) for x in (PIXEL_STD, PIXEL_MEAN))
        gain = torch.from_numpy(self.light.normal(1.0, JITTER, (len(pixels), 3, 1, 1))).float()
        shift = torch.from_numpy(self.light.normal(0.0, JITTER, (len(pixels), 3, 1, 1))).float()
        return pixels.mul_(gain / (255 * std)).add_(shift - mean / std)

    def melspecs(self, index: PairIndex) -> Tensor:
        """With a random gain: float32 (BATCH, 1, 128, 204)."""
        mels = torch.from_numpy(self.pairs.melspecs[index]).float().unsqueeze(1)
        gain_db = torch.from_numpy(self.gain.normal(0.0, JITTER_DB, (len(mels), 1, 1, 1))).float()
        return mels.add_(gain_db * (math.log(10) / 10 / LOG_MEL_STD))

    def identical(self, index: PairIndex) -> Tensor:
        """Which pairs have the same content: bool (BATCH, BATCH)."""
        clip, state = index[0], self.pairs.state[index]
        return torch.from_numpy((clip[:, None] == clip) & (state[:, None] == state))

    def labels(self, index: PairIndex) -> tuple[np.ndarray, np.ndarray]:
        """True phrases of VISION_GROUPS and AUDIO_GROUPS: int64 (BATCH, groups) each."""
        return self.pairs.vision[index].astype(np.int64), self.pairs.audio[index].astype(np.int64)


def optimiser_of(model: ImageBind, contrasts: Contrasts) -> torch.optim.Optimizer:
    """AdamW; matrices decay, embeddings, biases, norms and scales do not."""
    embeddings = ("words", "positions")
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(embeddings)]
    others = [*({*model.parameters()} - {*decayed}), *contrasts.parameters()]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, share: float) -> float:
    """Linear warm-up in steps, then half a cosine over the training time, of which `share` has passed."""
    warm_rate = PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
    return warm_rate * (0.02 + 0.98 * math.cos(math.pi * share / 2) ** 2)


def train(model: ImageBind, pairs: Pairs, minutes: float, seed: int, save: Save) -> None:
    """Trains for `minutes`; `save` gets model and step every SAVE_EVERY steps and at the end."""
    torch.set_num_threads(1)  # a thread for each tower; see Towers
    towers, batches = Towers(model), Batches(pairs, seed)
    contrasts = Contrasts(model, np.random.default_rng(seed + 1))
    optimiser = optimiser_of(model, contrasts)
    started, step, mean = time.monotonic(), 0, dict.fromkeys(WEIGHTS, 0.0)
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, share)
        index = batches.draw()
        keep = KEEP_PATCHES if share < WHOLE_FROM else (1.0, 1.0)
        outputs = towers(partial(batches.frames, index), partial(batches.melspecs, index), keep)
        leaves = outputs[0].detach().requires_grad_(), outputs[1].detach().requires_grad_()
        losses = contrasts.losses(leaves, batches.identical(index), batches.labels(index))
        optimiser.zero_grad()
        torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum().backward()
        towers.backward(outputs, leaves)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        for name, loss in losses.items():
            mean[name] += (float(loss.detach()) - mean[name]) * max(0.02, 1 / step)
        if step % REPORT_EVERY == 0:
            print(f"{share:4.0%} step {step}", *(f"{n} {v:.3f}" for n, v in mean.items()), flush=True)
        if step % SAVE_EVERY == 0:
            save(model, step)
    save(model, step)


def main(
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    minutes: Annotated[float, typer.Option(help="Minutes of training, without rendering.")] = 45.0,
    start: Annotated[Path | None, typer.Option(help="Start from these weights.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of weights and batches.")] = 1,
    worlds: Annotated[
        int, typer.Option(help="Training worlds of 20 clips each (1 MB per clip in scratch).")
    ] = 300,
    scratch: Annotated[Path, typer.Option(help="Folder of the rendered pairs.")] = Path(
        "demo-encoder-scratch"
    ),
    workers: Annotated[int, typer.Option(help="Processes that render.")] = 2,
) -> None:
    """Train the demo encoder: render, train, save, measure."""
    pairs = render(scratch, worlds, workers)
    torch.manual_seed(seed)
    model = ImageBind(CONFIG) if start is None else ImageBind.load(start, dtype=torch.float32).train()
    with sdpa_kernel(SDPBackend.MATH):  # five times as fast as the fused kernel on bfloat16 heads this narrow
        train(model, pairs, minutes, seed, partial(_save, out, f"{worlds} worlds, seed {seed}"))
    print(json.dumps(figures(ImageBind.load(out), MEASURED_CLIPS), indent=1), flush=True)


def _save(out: Path, data: str, model: ImageBind, steps: int) -> None:
    model.save(out, {"trained": f"{steps} steps of {BATCH}, {data}"}, torch.float16)


if __name__ == "__main__":
    typer.run(main)
