"""The sound of a scene of the demo corpus: twelve synthetic timbres, a speaking voice, a room.

Every instrument is a sum of sine partials with an attack and decay, a register, vibrato and a band
of noise of its own (`TIMBRES`). No recording is involved.
"""

from dataclasses import dataclass

import numpy as np

from r2scp.pipelines.demo.scene import Part, Scene
from r2scp.pipelines.demo.world import AIRS_HZ, FLUTTERS_HZ, RATES_HZ, REVERBS_S, SECONDS, WHINES_HZ, Room

SAMPLE_RATE = 16_000  # Hz
SAMPLES = SECONDS * SAMPLE_RATE
PART_RMS = 0.09  # of the loudest part, full scale 1
LOUDNESS_STEP_DB = 6.0  # between one loudness rank and the next
VOICE_RMS = 0.04
WHINE_RMS = 0.0025  # 31 dB under the loudest part
AIR_RMS = 0.004
FLOOR_RMS = 0.0005  # white noise of the microphone
SCALE = (0, 2, 4, 7, 9)  # pentatonic, semitones
_TAG_NOTES, _TAG_ROOM = 3, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Timbre:
    """The sound of an instrument."""

    low_hz: float  # its notes lie in [low_hz, 1.5 × low_hz)
    partials: tuple[tuple[float, float], ...]  # (ratio to the fundamental, amplitude)
    attack_s: float
    decay_s: float = 0.0  # time constant; 0: sustained
    vibrato: tuple[float, float] = (0.0, 0.0)  # (Hz, depth as a fraction of the pitch)
    noise: tuple[float, float, float] = (0.0, 0.0, 0.0)  # (from Hz, to Hz, amplitude)


def _series(count: int, slope: float, step: int = 1) -> tuple[tuple[float, float], ...]:
    return tuple((float(k), float(k) ** -slope) for k in range(1, count * step + 1, step))


TIMBRES = {
    "accordion": Timbre(low_hz=262, partials=(*_series(9, 0.7), (1.015, 1.0), (2.03, 0.6)), attack_s=0.05),
    "acoustic_guitar": Timbre(low_hz=175, partials=_series(8, 1.1), attack_s=0.003, decay_s=0.35),
    "bassoon": Timbre(
        low_hz=98,
        partials=((1, 0.3), (2, 0.5), (3, 0.9), (4, 1.0), (5, 0.8), (6, 0.4), (7, 0.2), (8, 0.1)),
        attack_s=0.04,
    ),
    "clarinet": Timbre(low_hz=330, partials=_series(5, 0.6, step=2), attack_s=0.03),
    "congas": Timbre(
        low_hz=215,
        partials=((1, 1.0), (1.5, 0.5), (2.3, 0.3)),
        attack_s=0.002,
        decay_s=0.06,
        noise=(700, 1500, 0.5),
    ),
    "drum": Timbre(
        low_hz=58, partials=((1, 1.0), (1.6, 0.5)), attack_s=0.002, decay_s=0.07, noise=(300, 7500, 0.8)
    ),
    "electric_bass": Timbre(low_hz=52, partials=_series(6, 0.8), attack_s=0.01, decay_s=0.6),
    "flute": Timbre(
        low_hz=1100,
        partials=((1, 1.0), (2, 0.2)),
        attack_s=0.06,
        vibrato=(5.0, 0.012),
        noise=(1500, 3500, 0.06),
    ),
    "piano": Timbre(
        low_hz=370,
        partials=(
            (0.5, 0.8),
            (0.625, 0.6),
            (0.75, 0.6),
            (1, 1.0),
            (1.25, 0.6),
            (1.5, 0.7),
            (2, 0.4),
            (3, 0.2),
        ),
        attack_s=0.003,
        decay_s=0.9,
    ),
    "trumpet": Timbre(
        low_hz=540, partials=((1, 0.5), (2, 1.0), (3, 1.0), (4, 0.7), (5, 0.4), (6, 0.2)), attack_s=0.02
    ),
    "violin": Timbre(low_hz=780, partials=_series(5, 0.9), attack_s=0.1, vibrato=(6.5, 0.03)),
    "xylophone": Timbre(low_hz=1650, partials=((1, 1.0), (2.76, 0.4)), attack_s=0.001, decay_s=0.09),
}


def render_audio(scene: Scene) -> np.ndarray:
    """The clip's sound: float32 (160000,), mono, 16 kHz, within [-1, 1]."""
    dry = np.zeros(SAMPLES)
    for number, part in enumerate(scene.parts):
        if part.sounds:
            start, end = part.start * SAMPLE_RATE, part.end * SAMPLE_RATE
            rng = np.random.default_rng([scene.seed, _TAG_NOTES, scene.index, number])
            dry[start:end] += _melody(rng, part, scene.key)
    rng = np.random.default_rng([scene.seed, _TAG_ROOM, scene.index])
    if scene.voice_end > scene.voice_start:
        dry[scene.voice_start * SAMPLE_RATE : scene.voice_end * SAMPLE_RATE] += _voice(
            rng, scene.voice_end - scene.voice_start
        )
    wet = _reverberate(dry, REVERBS_S[scene.room.reverb]) + _ambience(rng, scene.room)
    return np.clip(wet, -1.0, 1.0).astype(np.float32)


def tone(instrument: str, hz: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """One note at fundamental `hz`, float64 (seconds × 16000,), root mean square 1."""
    count = round(seconds * SAMPLE_RATE)
    return _unit(_notes(TIMBRES[instrument], np.array([hz]), count, rng))


def _melody(rng: np.random.Generator, part: Part, key: int) -> np.ndarray:
    """The notes of a part over its interval, at its loudness."""
    timbre = TIMBRES[part.instrument]
    rate = RATES_HZ[part.rate]
    count = (part.end - part.start) * SAMPLE_RATE
    pitches = [(key + degree) % 12 for degree in SCALE]
    octave = [p / 12 * 0.585 for p in pitches]  # 1.5 = 2 ** 0.585: the register is a fifth wide
    hz = timbre.low_hz * 2.0 ** rng.choice(octave, size=int((part.end - part.start) * rate))
    gain = PART_RMS * 10 ** (-LOUDNESS_STEP_DB * part.loudness / 20)
    return _unit(_notes(timbre, hz, count, rng)) * gain


def _notes(timbre: Timbre, hz: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Equally long notes of pitches `hz` (N,), together `count` samples, unnormalised."""
    length = count / len(hz)
    at = np.arange(count, dtype=np.float64)
    note = np.minimum((at / length).astype(np.int64), len(hz) - 1)
    since_s = (at - note * length) / SAMPLE_RATE
    pitch = hz[note]
    if timbre.vibrato[1]:
        pitch = pitch * (1 + timbre.vibrato[1] * np.sin(2 * np.pi * timbre.vibrato[0] * at / SAMPLE_RATE))
    phase = (np.cumsum(pitch) * (2 * np.pi / SAMPLE_RATE)).astype(np.float32)
    wave = np.zeros(count, np.float32)
    for ratio, amplitude in timbre.partials:
        wave += np.float32(amplitude) * np.sin(np.float32(ratio) * phase)
    low, high, level = timbre.noise
    if level:
        wave += _band(rng, count, low, high) * np.float32(level)
    envelope = np.minimum(since_s / timbre.attack_s, 1.0)
    if timbre.decay_s:
        envelope = envelope * np.exp(-since_s / timbre.decay_s)
    else:
        left_s = length / SAMPLE_RATE - since_s
        envelope = envelope * np.minimum(left_s / 0.03, 1.0)
    return wave * envelope


def _unit(wave: np.ndarray) -> np.ndarray:
    return wave / np.sqrt(np.mean(np.square(wave)) + 1e-12)


def _band(rng: np.random.Generator, count: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Noise of root mean square 1 between two frequencies, float32 (count,)."""
    bins = np.zeros(count // 2 + 1, np.complex64)
    first, last = (round(hz * count / SAMPLE_RATE) for hz in (low_hz, high_hz))
    bins[first:last] = np.exp(2j * np.pi * rng.random(last - first))
    return _unit(np.fft.irfft(bins, count)).astype(np.float32)


def _voice(rng: np.random.Generator, seconds: int) -> np.ndarray:
    """A speech-like sound: a buzz at 110-150 Hz with two wandering formants, four syllables per second."""
    count = seconds * SAMPLE_RATE
    time_s = np.arange(count) / SAMPLE_RATE
    syllable = (time_s * 4).astype(np.int64)
    pitch = rng.uniform(110, 150, size=syllable[-1] + 1)[syllable]
    formants = rng.uniform((350, 1000), (800, 2200), size=(syllable[-1] + 1, 2))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    wave = np.zeros(count)
    for k in range(2, 20):
        gain = np.exp(-np.square((k * 130 - formants) / 140)).sum(axis=1)
        wave += gain[syllable] * np.sin(k * phase)
    return _unit(wave * np.sin(np.pi * (time_s * 4 % 1)) ** 2) * VOICE_RMS


def _reverberate(dry: np.ndarray, rt60_s: float) -> np.ndarray:
    """Adds an exponentially decaying tail of noise, with half the power of the direct sound."""
    if rt60_s == 0:
        return dry
    tail = np.random.default_rng(0).standard_normal(round(rt60_s * SAMPLE_RATE))
    tail *= 10 ** (-3 * np.arange(len(tail)) / len(tail))
    tail *= np.sqrt(0.5 / np.square(tail).sum())
    tail[: SAMPLE_RATE // 100] = 0  # 10 ms before the first reflection
    size = 1 << (SAMPLES + len(tail)).bit_length()
    echo = np.fft.irfft(np.fft.rfft(dry, size) * np.fft.rfft(tail, size), size)
    return dry + echo[:SAMPLES]


def _ambience(rng: np.random.Generator, room: Room) -> np.ndarray:
    time_s = np.arange(SAMPLES) / SAMPLE_RATE
    whine = np.sin(2 * np.pi * WHINES_HZ[room.whine] * time_s + rng.uniform(0, 2 * np.pi))
    centre = AIRS_HZ[room.air]
    air = _band(rng, SAMPLES, centre * 0.92, centre * 1.08)
    flutter = 1 + np.cos(2 * np.pi * FLUTTERS_HZ[room.flutter] * time_s) if room.flutter else 1.0
    floor = rng.standard_normal(SAMPLES, np.float32) * FLOOR_RMS
    return whine * (WHINE_RMS * np.sqrt(2)) + air * flutter * AIR_RMS + floor
