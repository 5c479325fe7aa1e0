"""Proves that `melspec` equals Kaldi's filter bank, hears what is there, and cuts windows on the time grid.

Oracles: the reference log-mels of real sounds; a slow float64 filter bank written from the definition; tones
of known pitch and level; recordings whose samples carry their own index.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from r2scp.model.imagebind import melspec
from r2scp.model.imagebind.melspec import SAMPLE_RATE, SILENCE, WINDOW, log_mel, windows


def by_definition(wave_S: np.ndarray) -> np.ndarray:
    """Log-mel of one window, frame by frame and bin by bin, in float64: (128, frames), not normalised."""
    wave_S = wave_S.astype(np.float64) - wave_S.mean()
    k, n = np.arange(257)[:, None], np.arange(512)[None]
    dft = np.exp(-2j * np.pi * k * n / 512)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    edges = np.linspace(1127 * math.log(1 + 20 / 700), 1127 * math.log(1 + 8000 / 700), 130)
    columns = []
    for start in range(0, len(wave_S) - 399, 160):
        frame = wave_S[start : start + 400] - wave_S[start : start + 400].mean()
        emphasised = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(dft @ np.pad(emphasised * hann, (0, 112))) ** 2
        mels = 1127 * np.log(1 + np.arange(257) * 31.25 / 700)
        banks = [np.interp(mels, edges[m : m + 3], [0, 1, 0], left=0, right=0) @ power for m in range(128)]
        columns.append(np.log(np.maximum(banks, np.finfo(np.float32).eps)))
    return np.array(columns).T


def tone(hertz: float, level: float = 0.1, samples: int = WINDOW) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / SAMPLE_RATE)


@pytest.mark.parity
def test_equals_the_reference_on_real_sounds(shared_dir: Path) -> None:
    tensors = load_file(shared_dir / "parity" / "melspec.safetensors")
    names = sorted(name.removesuffix("_waveform") for name in tensors if name.endswith("_waveform"))
    assert len(names) >= 6
    ours = log_mel(torch.cat([tensors[f"{name}_waveform"] for name in names]))
    for mel_1MF, name in zip(ours, names, strict=True):
        assert (mel_1MF - tensors[f"{name}_melspec"]).abs().max() <= 1e-3, name


def test_equals_the_definition_on_noise() -> None:
    noise_S = np.random.default_rng(5).normal(0.2, 0.1, 4000).astype(np.float32)
    ours = log_mel(noise_S[None])[0, 0] * melspec.LOG_MEL_STD + melspec.LOG_MEL_MEAN
    definition = by_definition(noise_S)
    assert definition.shape == (128, 23)
    assert np.abs(ours[:, :23].numpy() - definition).max() <= 1e-3


@pytest.mark.parametrize("hertz", [250.0, 440.0, 1000.0, 3520.0, 7000.0])
def test_a_tone_is_loudest_at_its_own_pitch(hertz: float) -> None:
    loudest = int(log_mel(tone(hertz)[None])[0, 0, :, 100].argmax())
    low, high = (1127 * math.log(1 + f / 700) for f in (20, 8000))
    expected = (1127 * math.log(1 + hertz / 700) - low) / (high - low) * 129 - 1
    assert abs(loudest - expected) <= 1


def test_twice_the_amplitude_is_four_times_the_power() -> None:
    noise_NS = torch.randn(1, WINDOW, generator=torch.Generator().manual_seed(0))
    quiet, loud = (log_mel(level * noise_NS)[0, 0, :, :198] for level in (0.1, 0.2))
    heard = quiet[:, 0] > -0.9  # the lowest bands are narrower than a bin of the spectrum; some stay empty
    assert heard.sum() >= 120
    rise = (loud - quiet)[heard]
    torch.testing.assert_close(rise, torch.full_like(rise, math.log(4) / 9.138), atol=1e-4, rtol=0)


def test_silence_and_a_constant_offset_are_the_floor() -> None:
    floor = (math.log(np.finfo(np.float32).eps) + 4.268) / 9.138
    for level in (0.0, 0.7):
        mel = log_mel(torch.full((2, WINDOW), level))
        torch.testing.assert_close(mel[..., :198], torch.full((2, 1, 128, 198), floor), atol=1e-5, rtol=0)


def test_what_does_not_fill_204_frames_is_padded_with_zeros_before_normalisation() -> None:
    assert pytest.approx(4.268 / 9.138) == SILENCE
    for samples, frames in ((WINDOW, 198), (8000, 48), (400, 1), (399, 0), (1, 0)):
        mel = log_mel(tone(440, samples=samples)[None])
        assert mel.shape == (1, 1, 128, 204)
        assert mel.dtype == torch.float32
        assert (mel[..., frames:] == SILENCE).all()
        assert not (mel[..., :frames] == SILENCE).all(dim=2).any()


def test_what_goes_past_204_frames_is_cut() -> None:
    long_NS = tone(300, samples=3 * SAMPLE_RATE).float()[None]
    mel = log_mel(long_NS)
    assert mel.shape == (1, 1, 128, 204)
    assert torch.isfinite(mel).all()
    assert (mel[0, 0, :, -1] != SILENCE).all()


def test_a_batch_gives_what_each_window_gives_alone() -> None:
    batch_NS = torch.randn(5, WINDOW, generator=torch.Generator().manual_seed(1))
    together = log_mel(batch_NS)
    for alone, row in zip(batch_NS, together, strict=True):
        torch.testing.assert_close(log_mel(alone[None])[0], row, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("samples", "tokens"),
    [(1, 1), (7999, 1), (23_999, 1), (24_000, 2), (32_000, 2), (39_999, 2), (40_000, 3), (160_000, 10)],
)
def test_one_window_for_each_second(samples: int, tokens: int) -> None:
    cut = windows(np.zeros(samples, np.float32))
    assert cut.shape == (tokens, min(samples, WINDOW))
    assert cut.dtype == torch.float32


def test_windows_are_centred_on_their_second_and_stay_inside() -> None:
    samples = 5 * SAMPLE_RATE + 3000  # 5.2 s; float32 counts this far exactly
    first_T = windows(torch.arange(samples))[:, 0]
    assert first_T.tolist() == [0, 8000, 24_000, 40_000, samples - WINDOW]
    for t, window_S in enumerate(windows(torch.arange(samples))):
        assert window_S.tolist() == list(range(int(first_T[t]), int(first_T[t]) + WINDOW))
        middle = (float(window_S[0]) + WINDOW / 2) / SAMPLE_RATE
        assert abs(middle - (t + 0.5)) <= 0.5


def test_a_recording_under_two_seconds_is_heard_whole() -> None:
    wave_S = torch.arange(27_000) / 27_000
    cut = windows(wave_S)
    assert cut.shape == (2, 27_000)
    assert (cut == wave_S).all()
    assert cut.data_ptr() == wave_S.data_ptr()  # a view: no copy


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros((2, 40_000))], ids=["empty", "stereo"])
def test_windows_refuses_what_is_not_a_mono_recording(wave: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one axis of at least one sample"):
        windows(wave)


def test_log_mel_refuses_a_single_axis() -> None:
    with pytest.raises(ValueError, match=r"two axes \(windows, samples\); got shape \(32000,\)"):
        log_mel(torch.zeros(WINDOW))
