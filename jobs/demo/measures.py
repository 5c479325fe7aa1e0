"""What the demo encoder can and cannot do, measured on worlds it was not trained on.

Legend: N clips, T = 10 seconds of a clip, D width of the embedding space, G instruments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r2scp.model.imagebind.imagebind import ImageBind, normalise_frames
from r2scp.model.imagebind.melspec import log_mel, windows
from r2scp.pipelines.demo.captions import (
    AUDIO_GROUPS,
    SHARED_GROUPS,
    VISION_GROUPS,
    audio_labels,
    vision_labels,
)
from r2scp.pipelines.demo.render import render_frames
from r2scp.pipelines.demo.scene import Scene, make_scene
from r2scp.pipelines.demo.sound import render_audio
from r2scp.pipelines.demo.world import SECONDS

TEST_WORLD = 4001
PROBE_WORLDS, PROBE_CLIPS = range(4100, 4140), 10  # clips of each
MIDDLES_S = np.arange(SECONDS) + 0.5  # the frame of each second


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """Clips of one world, rendered directly and embedded, with their true labels."""

    visual_NTD: Tensor
    audio_NTD: Tensor
    vision_labels_NTG: np.ndarray  # one label per group of VISION_GROUPS
    audio_labels_NTG: np.ndarray
    ensemble_N: np.ndarray


@torch.inference_mode()
def embed_clip(model: ImageBind, frames: np.ndarray, waveform: np.ndarray) -> tuple[Tensor, Tensor]:
    """Frames uint8 (T, 224, 224, 3) and 16 kHz mono float32 (S,) -> two (T, D), unit-norm."""
    visual = model.vision(normalise_frames(torch.from_numpy(frames)))
    return visual, model.audio(log_mel(windows(waveform)))


def embed_scenes(model: ImageBind, scenes: Sequence[Scene]) -> Embedded:
    """Render and embed whole clips."""
    pairs = [embed_clip(model, render_frames(scene, MIDDLES_S), render_audio(scene)) for scene in scenes]
    return Embedded(
        visual_NTD=torch.stack([visual for visual, _ in pairs]),
        audio_NTD=torch.stack([audio for _, audio in pairs]),
        vision_labels_NTG=_labels(scenes, vision_labels),
        audio_labels_NTG=_labels(scenes, audio_labels),
        ensemble_N=np.array([scene.ensemble for scene in scenes]),
    )


def _labels(scenes: Sequence[Scene], label: Callable[[Scene, int], np.ndarray]) -> np.ndarray:
    return np.array([[label(scene, second) for second in range(SECONDS)] for scene in scenes])


def keys(sequence_NTD: Tensor) -> Tensor:
    """Unit-norm mean of a clip's unit-norm tokens: (N, D)."""
    return F.normalize(sequence_NTD.mean(dim=1), dim=-1)


def recall(queries_ND: Tensor, keys_ND: Tensor, n: int) -> float:
    """Share of queries whose own clip is among the `n` nearest keys; chance is n / N."""
    score_NN = queries_ND @ keys_ND.T
    rank_N = (score_NN > score_NN.diagonal()[:, None]).sum(dim=1)
    return float((rank_N < n).float().mean())


def same_ensemble(queries_ND: Tensor, keys_ND: Tensor, ensemble_N: np.ndarray) -> float:
    """Share of queries whose nearest *other* clip is of the same ensemble, if there is any."""
    score_NN = (queries_ND @ keys_ND.T).fill_diagonal_(-2.0)
    nearest_N = score_NN.argmax(dim=1).numpy()
    has_others = (ensemble_N[:, None] == ensemble_N).sum(axis=1) > 1
    return float((ensemble_N[nearest_N] == ensemble_N)[has_others].mean())


def probe(train_XD: Tensor, train_XG: np.ndarray, test_XD: Tensor, test_XG: np.ndarray) -> dict[str, float]:
    """One logistic unit per instrument: F1 over all decisions, and accuracy of whole sets."""
    target_XG = torch.from_numpy(train_XG).float()
    layer = torch.nn.Linear(train_XD.shape[1], target_XG.shape[1])
    torch.nn.init.zeros_(layer.weight)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (
            F.binary_cross_entropy_with_logits(layer(train_XD), target_XG)
            + 1e-5 * layer.weight.square().sum()
        )
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.inference_mode():
        predicted_XG = (layer(test_XD) > 0).numpy()
    hits = (predicted_XG & (test_XG == 1)).sum()
    return {
        "f1": float(2 * hits / (predicted_XG.sum() + test_XG.sum())),
        "exact": float((predicted_XG == test_XG).all(axis=1).mean()),
    }


def figures(model: ImageBind, clips: int) -> dict[str, float]:
    """Everything the card reports, on `clips` clips of a held-out world; probes train on many others."""
    test = embed_scenes(model, [make_scene(TEST_WORLD, index) for index in range(clips)])
    other = embed_scenes(
        model, [make_scene(seed, index) for seed in PROBE_WORLDS for index in range(PROBE_CLIPS)]
    )
    visual, audio = keys(test.visual_NTD), keys(test.audio_NTD)
    visible = _probed(other.visual_NTD, other.vision_labels_NTG, test.visual_NTD, test.vision_labels_NTG)
    audible = _probed(other.audio_NTD, other.audio_labels_NTG, test.audio_NTD, test.audio_labels_NTG)
    ideal_visual, ideal_audio = (_ideal(x) for x in (test.vision_labels_NTG, test.audio_labels_NTG))
    results = {"clips": clips, "chance recall@1": 1 / clips, "chance recall@3": 3 / clips}
    for name, queries, bank in (
        ("visual->audio", visual, audio),
        ("audio->visual", audio, visual),
        ("instruments known, visual->audio", ideal_visual, ideal_audio),
        ("instruments known, audio->visual", ideal_audio, ideal_visual),
    ):
        results |= {f"{name} recall@{n}": recall(queries, bank, n) for n in (1, 3)}
    results |= {f"visible instruments {name}": value for name, value in visible.items()}
    results |= {f"sounding instruments {name}": value for name, value in audible.items()}
    for name, queries, bank in (
        ("visual->visual", visual, visual),
        ("audio->audio", audio, audio),
        ("visual->audio", visual, audio),
        ("audio->visual", audio, visual),
    ):
        results[f"same ensemble {name}"] = same_ensemble(queries, bank, test.ensemble_N)
    return results


def _probed(
    train_NTD: Tensor, train_NTG: np.ndarray, test_NTD: Tensor, test_NTG: np.ndarray
) -> dict[str, float]:
    return probe(_flat(train_NTD), _instruments(train_NTG), _flat(test_NTD), _instruments(test_NTG))


def _ideal(labels_NTG: np.ndarray) -> Tensor:
    """Keys that encode the instruments of every second and nothing else: (N, 12); ties broken at random."""
    known = labels_NTG[..., -len(SHARED_GROUPS) :].mean(axis=1)
    noise = np.random.default_rng(0).normal(0.0, 1e-4, known.shape)
    return F.normalize(torch.from_numpy(known + noise).float(), dim=-1)


def _flat(x_NTD: Tensor) -> Tensor:
    return x_NTD.flatten(0, 1).clone()


def _instruments(labels_NTG: np.ndarray) -> np.ndarray:
    return labels_NTG[..., -len(SHARED_GROUPS) :].reshape(-1, len(SHARED_GROUPS))


assert VISION_GROUPS[-len(SHARED_GROUPS) :] == AUDIO_GROUPS[-len(SHARED_GROUPS) :] == SHARED_GROUPS
