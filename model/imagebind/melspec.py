"""Input of the audio tower: the log-mel spectrogram of Kaldi's `compute-fbank-feats`, as in ImageBind.

All constants follow from the sampling rate; a test compares with reference tensors.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16_000  # Hz
WINDOW = 2 * SAMPLE_RATE  # 2 s: input of the audio tower
FRAME = SAMPLE_RATE * 25 // 1000  # 25 ms = 400 samples
HOP = SAMPLE_RATE * 10 // 1000  # 10 ms = 160 samples
FFT = 1 << (FRAME - 1).bit_length()  # 512: the frame, rounded up to a power of two
MEL_BINS = 128
MEL_FRAMES = 204  # 2 s give 198 frames; the rest is padding
LOW_HZ = 20.0  # Kaldi's default lower edge; the upper is the Nyquist frequency
PRE_EMPHASIS = 0.97
POWER_FLOOR = torch.finfo(torch.float32).eps  # keeps the logarithm finite
LOG_MEL_MEAN = -4.268  # of AudioSet, in nats
LOG_MEL_STD = 9.138
SILENCE = (0.0 - LOG_MEL_MEAN) / LOG_MEL_STD  # padding: a zero, normalised


def windows(waveform_S: Tensor | np.ndarray) -> Tensor:
    """Cut a waveform into one 2 s window per second: (T, 32000) float32, T = max(1, floor(S / 16000 + 1/2)).

    Window t is centred on t + 0.5 s and shifted, if necessary, to stay inside the waveform. A waveform
    shorter than 2 s is used whole: the result is then (T, S), and `log_mel` pads it. Mono at 16 kHz, range
    -1 to 1. Raises ValueError unless there is one axis with at least one sample.
    """
    waveform_S = torch.as_tensor(waveform_S, dtype=torch.float32)
    if waveform_S.ndim != 1 or not len(waveform_S):
        raise ValueError(
            f"waveform must be one axis of at least one sample; got shape {tuple(waveform_S.shape)}"
        )
    tokens = max(1, math.floor(len(waveform_S) / SAMPLE_RATE + 0.5))
    last_start = len(waveform_S) - WINDOW
    if last_start <= 0:
        return waveform_S.expand(tokens, -1)
    centred = (t * SAMPLE_RATE + SAMPLE_RATE // 2 - WINDOW // 2 for t in range(tokens))
    starts = (min(max(start, 0), last_start) for start in centred)
    return torch.stack([waveform_S[start : start + WINDOW] for start in starts])


def log_mel(waveforms_NS: Tensor | np.ndarray) -> Tensor:
    """Normalised log-mel spectrograms of N windows of S samples: (N, 1, 128, 204) float32.

    Mono at 16 kHz, range -1 to 1. Incomplete frames are dropped; fewer than 204 are padded at the end, more
    are cut. Raises ValueError unless there are two axes.
    """
    waveforms_NS = torch.as_tensor(waveforms_NS, dtype=torch.float32)
    if waveforms_NS.ndim != 2:
        raise ValueError(
            f"waveforms must have two axes (windows, samples); got shape {tuple(waveforms_NS.shape)}"
        )
    if waveforms_NS.shape[1] < FRAME:
        return waveforms_NS.new_full((len(waveforms_NS), 1, MEL_BINS, MEL_FRAMES), SILENCE)
    centred_NS = waveforms_NS - waveforms_NS.mean(dim=1, keepdim=True)
    mel_NFM = _log_mel_frames(centred_NS[:, : (MEL_FRAMES - 1) * HOP + FRAME])
    normal_NMF = (mel_NFM.transpose(1, 2) - LOG_MEL_MEAN) / LOG_MEL_STD
    return F.pad(normal_NMF, (0, MEL_FRAMES - normal_NMF.shape[2]), value=SILENCE).unsqueeze(1)


def _log_mel_frames(signal_NS: Tensor) -> Tensor:
    """Natural logarithm of the mel-filtered power spectrum of each frame: (N, F, 128).

    Per frame, in Kaldi's order: remove the mean, pre-emphasise (the first sample against itself), Hann
    window, zero-pad to 512, power spectrum, mel filters, floor, logarithm.
    """
    frames_NFL = signal_NS.unfold(1, FRAME, HOP)
    frames_NFL = frames_NFL - frames_NFL.mean(dim=2, keepdim=True)
    previous_NFL = torch.cat([frames_NFL[..., :1], frames_NFL[..., :-1]], dim=2)
    hann_L, filters_KM = _constants(signal_NS.device)
    spectrum_NFK = torch.fft.rfft((frames_NFL - PRE_EMPHASIS * previous_NFL) * hann_L, n=FFT)
    power_NFK = spectrum_NFK.real.square() + spectrum_NFK.imag.square()
    return (power_NFK @ filters_KM).clamp_min(POWER_FLOOR).log()


@lru_cache(maxsize=4)
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The Hann window (400) and the triangular mel filters (257, 128), computed in float64."""
    hann_L = torch.hann_window(FRAME, periodic=False, dtype=torch.float64)
    nyquist = SAMPLE_RATE / 2
    edges_M = torch.linspace(_mel(LOW_HZ), _mel(nyquist), MEL_BINS + 2, dtype=torch.float64)
    left_M, centre_M, right_M = edges_M[:-2], edges_M[1:-1], edges_M[2:]
    bins_K1 = torch.tensor([_mel(k * SAMPLE_RATE / FFT) for k in range(FFT // 2 + 1)], dtype=torch.float64)[
        :, None
    ]
    rising_KM = (bins_K1 - left_M) / (centre_M - left_M)
    falling_KM = (right_M - bins_K1) / (right_M - centre_M)
    filters_KM = torch.minimum(rising_KM, falling_KM).clamp_min(0)
    return hann_L.to(device, torch.float32), filters_KM.to(device, torch.float32)


def _mel(hertz: float) -> float:
    """HTK's mel scale."""
    return 1127.0 * math.log1p(hertz / 700.0)
