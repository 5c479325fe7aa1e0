"""What the demo encoder can and cannot do, measured on worlds it was not trained on.

Legend: N clips, T = 10 seconds of a clip, D width of the embedding space, G instruments.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from r2scp.model.imagebind import ImageBind, normalise_frames
from r2scp.model.melspec import log_mel, windows
from r2scp.pipelines.demo_captions import (
    AUDIO_GROUPS,
    SHARED_GROUPS,
    VISION_GROUPS,
    audio_labels,
    vision_labels,
)
from r2scp.pipelines.demo_render import render_frames
from r2scp.pipelines.demo_scene import Scene, scene
from r2scp.pipelines.demo_sound import render_audio
from r2scp.pipelines.demo_world import SECONDS
from torch import Tensor

MIDDLES_S = np.arange(SECONDS) + 0.5  # the frame of each second


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """Clips of one world, rendered directly and embedded, beside what is true of them."""

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


def embed_world(model: ImageBind, seed: int, clips: int) -> Embedded:
    """The first `clips` clips of world `seed`."""
    scenes = [scene(seed, index) for index in range(clips)]
    pairs = [embed_clip(model, render_frames(one, MIDDLES_S), render_audio(one)) for one in scenes]
    return Embedded(
        visual_NTD=torch.stack([visual for visual, _ in pairs]),
        audio_NTD=torch.stack([audio for _, audio in pairs]),
        vision_labels_NTG=_labels(scenes, vision_labels),
        audio_labels_NTG=_labels(scenes, audio_labels),
        ensemble_N=np.array([one.ensemble for one in scenes]),
    )


def _labels(scenes: list[Scene], label) -> np.ndarray:
    return np.array([[label(one, second) for second in range(SECONDS)] for one in scenes])


def keys(sequence_NTD: Tensor) -> Tensor:
    """Unit-norm mean of a clip's unit-norm tokens: (N, D)."""
    return F.normalize(sequence_NTD.mean(dim=1), dim=-1)


def recall(queries_ND: Tensor, keys_ND: Tensor, n: int) -> float:
    """Share of queries whose own clip is among the `n` nearest keys; chance is n / N."""
    score_NN = queries_ND @ keys_ND.T
    rank_N = (score_NN > score_NN.diagonal()[:, None]).sum(dim=1)
    return float((rank_N < n).float().mean())


def same_ensemble(queries_ND: Tensor, keys_ND: Tensor, ensemble_N: np.ndarray) -> float:
    """Share of nearest *other* clips that are of the query's ensemble, where it has others."""
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
        said_XG = (layer(test_XD) > 0).numpy()
    hits = (said_XG & (test_XG == 1)).sum()
    return {
        "f1": float(2 * hits / (said_XG.sum() + test_XG.sum())),
        "exact": float((said_XG == test_XG).all(axis=1).mean()),
    }


def group_accuracy(embedding_ND: Tensor, labels_NG: np.ndarray, phrases: list[Tensor]) -> np.ndarray:
    """Zero-shot: how often the nearest phrase of each group is the true one; `phrases`: (P, D) each."""
    found = [(embedding_ND @ phrase_PD.T).argmax(dim=1).numpy() for phrase_PD in phrases]
    return np.array([(labels_NG[:, g] == found[g]).mean() for g in range(len(phrases))])


def figures(model: ImageBind, seeds: tuple[int, int], clips: int) -> dict[str, float]:
    """Everything the card reports, on `clips` clips of each of two worlds (probes learn on the second)."""
    test, other = (embed_world(model, seed, clips) for seed in seeds)
    visual, audio = keys(test.visual_NTD), keys(test.audio_NTD)
    count = len(SHARED_GROUPS)
    seen, heard = (
        probe(
            _flat(getattr(other, f"{name}_NTD")), _last(getattr(other, f"{labels}_NTG"), count),
            _flat(getattr(test, f"{name}_NTD")), _last(getattr(test, f"{labels}_NTG"), count),
        )
        for name, labels in (("visual", "vision_labels"), ("audio", "audio_labels"))
    )  # fmt: skip
    return {
        "clips": clips,
        "chance@1": 1 / clips,
        "visual->audio recall@1": recall(visual, audio, 1),
        "visual->audio recall@3": recall(visual, audio, 3),
        "audio->visual recall@1": recall(audio, visual, 1),
        "audio->visual recall@3": recall(audio, visual, 3),
        "visible instruments F1": seen["f1"],
        "visible instruments exact": seen["exact"],
        "sounding instruments F1": heard["f1"],
        "sounding instruments exact": heard["exact"],
        "same ensemble visual-visual": same_ensemble(visual, visual, test.ensemble_N),
        "same ensemble audio-audio": same_ensemble(audio, audio, test.ensemble_N),
        "same ensemble visual-audio": same_ensemble(visual, audio, test.ensemble_N),
        "same ensemble audio-visual": same_ensemble(audio, visual, test.ensemble_N),
    }


def _flat(x_NTD: Tensor) -> Tensor:
    return x_NTD.flatten(0, 1).clone()


def _last(labels_NTG: np.ndarray, count: int) -> np.ndarray:
    return labels_NTG[..., -count:].reshape(-1, count)


assert VISION_GROUPS[-len(SHARED_GROUPS) :] == AUDIO_GROUPS[-len(SHARED_GROUPS) :] == SHARED_GROUPS
