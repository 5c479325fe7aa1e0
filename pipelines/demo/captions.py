"""Phrases that describe what is seen, and what is heard, in one second of a demo scene.

A *group* is a set of phrases of which exactly one is true in any second ("a violin on the left",
"nothing on the left", …). Labels are indices into groups; a caption is some of the true phrases. The
demo encoder is trained against them (`r2scp.jobs.demo.encoder`), and analyses may use them as ground
truth.
"""

from collections.abc import Sequence

import numpy as np

from r2scp.pipelines.demo.scene import Part, Scene
from r2scp.pipelines.demo.world import (
    AIRS_HZ,
    EMBLEMS,
    FLUTTERS_HZ,
    HUES,
    INSTRUMENTS,
    KEYS,
    OFFSTAGE,
    PLACES,
    REVERBS_S,
    TEXTURES,
    WHINES_HZ,
)

Group = tuple[str, ...]

NAMES = tuple(name.replace("_", " ") for name in INSTRUMENTS)
COUNTS = ("no", "one", "two", "three", "four", "five")
_SIDES = ("on the left", "in the middle", "on the right")
_ROOMS = ("in a dry room", "in a small room", "in a hall", "in a cathedral")
_FLUTTERS = ("steady air", "slowly fluttering air", "quickly fluttering air")
_NOTES = ("c", "c sharp", "d", "d sharp", "e", "f", "f sharp", "g", "g sharp", "a", "a sharp", "b")
assert (len(_ROOMS), len(_FLUTTERS), len(_NOTES)) == (len(REVERBS_S), len(FLUTTERS_HZ), KEYS)

#: One group per instrument, in words that fit both picture and sound, and so align the two.
SHARED_GROUPS: tuple[Group, ...] = tuple((f"without {name}", f"with {name}") for name in NAMES)

VISION_GROUPS: tuple[Group, ...] = (
    *(("nothing " + side, *(f"{name} {side}" for name in NAMES)) for side in _SIDES),
    *((f"the player {side} is still", f"the player {side} is moving") for side in _SIDES),
    tuple(f"{count} instruments on stage" for count in COUNTS),
    ("indoor performance", "outdoor performance"),
    tuple(f"{hue} backdrop" for hue in HUES),
    tuple(f"backdrop with {texture}" for texture in TEXTURES),
    tuple(f"{emblem} emblem" for emblem in EMBLEMS),
    tuple(f"{hue} emblem" for hue in HUES),
    tuple(f"emblem {side}" for side in _SIDES),
    tuple(f"{hue} costumes" for hue in HUES),
    *SHARED_GROUPS,
)

AUDIO_GROUPS: tuple[Group, ...] = (
    *(
        (f"no {name} sound", f"loud {name} sound", f"medium {name} sound", f"soft {name} sound")
        for name in NAMES
    ),
    ("silence", *(f"the {name} is the loudest" for name in NAMES)),
    tuple(f"{count} instruments sounding" for count in COUNTS),
    ("no notes", "slow notes", "fast notes"),  # of the loudest
    ("nobody speaks", "a voice speaks"),
    _ROOMS,
    tuple(f"a whine of {hz:.0f} hertz" for hz in WHINES_HZ),
    tuple(f"air at {hz:.0f} hertz" for hz in AIRS_HZ),
    _FLUTTERS,
    tuple(f"in the key of {note}" for note in _NOTES),
    *SHARED_GROUPS,
)


def vision_labels(scene: Scene, second: int) -> np.ndarray:
    """The true phrase of each of VISION_GROUPS in `second`: int64 (len(VISION_GROUPS),)."""
    on_stage = {part.place: part for part in scene.parts if part.place != OFFSTAGE}
    seen = {part.instrument for part in on_stage.values()}
    backdrop = scene.backdrop
    return np.array(
        [
            *(1 + INSTRUMENTS.index(on_stage[p].instrument) if p in on_stage else 0 for p in PLACES),
            *(int(p in on_stage and on_stage[p].moves_at(second)) for p in PLACES),
            len(on_stage),
            int(backdrop.outdoor),
            backdrop.hue,
            TEXTURES.index(backdrop.texture),
            EMBLEMS.index(backdrop.emblem),
            backdrop.emblem_hue,
            PLACES.index(backdrop.emblem_place),
            scene.costume,
            *(int(name in seen) for name in INSTRUMENTS),
        ]
    )


def audio_labels(scene: Scene, second: int) -> np.ndarray:
    """The true phrase of each of AUDIO_GROUPS in `second`: int64 (len(AUDIO_GROUPS),)."""
    sounding = sorted(
        (part for part in scene.parts if part.sounds_at(second)), key=lambda part: part.loudness
    )
    levels = {part.instrument: 1 + min(part.loudness, 2) for part in reversed(sounding)}
    return np.array(
        [
            *(levels.get(name, 0) for name in INSTRUMENTS),
            1 + INSTRUMENTS.index(sounding[0].instrument) if sounding else 0,
            len(sounding),
            1 + sounding[0].rate if sounding else 0,
            int(scene.voice_start <= second < scene.voice_end),
            scene.room.reverb,
            scene.room.whine,
            scene.room.air,
            scene.room.flutter,
            scene.key,
            *(int(name in levels) for name in INSTRUMENTS),
        ]
    )


def visible_audible_state(scene: Scene, second: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts that sound and that move: two seconds of a clip where these agree cannot be distinguished."""
    sounding = tuple(part for part in scene.parts if part.sounds_at(second))
    return sounding, tuple(part for part in scene.parts if part.moves_at(second))


def caption(groups: Sequence[Group], labels: np.ndarray, chosen: Sequence[int]) -> str:
    """The true phrases of the `chosen` groups, in that order."""
    return ", ".join(groups[group][labels[group]] for group in chosen)
