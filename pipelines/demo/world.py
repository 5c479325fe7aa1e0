"""The generated world of the demo corpus: ensembles with habits, and scenes that keep or break them.

Twelve instruments (of MUSIC-AVQA's 22) look and sound the same in every world. A world (one seed)
has `ENSEMBLES` ensembles; clip `index` of that world is one show of one of them. All numbers of the
generative process are here:

* **Which ensemble.** Rank r is drawn with weight 1 / (r + 4), r = 1 … 300: a long tail. Of 2,400 clips
  the first ensemble has about 115, the median ensemble 4.
* **Line-up.** A world has 60 line-ups: 1, 2 or 3 instruments on stage (15, 40, 45 %) at left, middle
  or right; the second repeats the first one's instrument in 25 %. Each ensemble draws one, so about
  five ensembles share what is seen in front of the backdrop and nothing else.
* **Venue.** Backdrop (indoor or outdoor, hue, texture, emblem, its hue and spot) and room (reverb, a
  whine, a band of moving air, its flutter), all uniform and independent of each other: neither can be
  computed from the other, but the ensemble determines both.
* **Habits**, drawn once per ensemble: each member really plays (70 %) or only stands there; an
  instrument is heard from off-stage (35 %); a voice speaks over the music (40 %); the order of entries,
  or all together (30 %); the order of loudness; who stays to the end (60 %); slow or fast notes
  (50 %); who mimes while silent (30 %); the key.
* **A show** keeps each habit with probability `KEEP_HABIT` = 0.85 and otherwise breaks it: a part that
  plays is silent or the reverse, the off-stage instrument or the voice is missing (or present,
  against habit), orders are shuffled, one member is replaced or missing, places are dealt again. It is given
  at home with probability `AT_HOME` = 0.92, else at the venue of another ensemble (both backdrop and room).
  At least one instrument always sounds.
* **Motion.** For `FOLLOWERS` it is exactly when they sound, or, silent and miming, at times of their
  own; the other instruments move at times that have nothing to do with their sound (70 %), or not at all.
* **Time.** Entries and exits fall on whole seconds. Successive entries are 2 s apart, a part that
  does not stay plays 2-5 s.

Everything is drawn from `numpy.random.default_rng([seed, tag, …])`: a scene depends on (seed, index) only.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

INSTRUMENTS = (
    "accordion",
    "acoustic_guitar",
    "bassoon",
    "clarinet",
    "congas",
    "drum",
    "electric_bass",
    "flute",
    "piano",
    "trumpet",
    "violin",
    "xylophone",
)
FOLLOWERS = frozenset({"acoustic_guitar", "congas", "drum", "trumpet", "violin", "xylophone"})
PLACES = ("left", "middle", "right")
OFFSTAGE = "offstage"
TEXTURES = ("plain", "rows", "columns", "checks", "dots", "diagonals", "rings", "waves")
EMBLEMS = ("disc", "square", "triangle", "star", "cross", "ring", "diamond", "crescent")
HUES = (
    "red",
    "orange",
    "yellow",
    "lime",
    "green",
    "teal",
    "cyan",
    "azure",
    "blue",
    "violet",
    "magenta",
    "rose",
)
REVERBS_S = (0.0, 0.35, 0.9, 2.0)  # RT60, seconds
WHINES_HZ = (2300.0, 2800.0, 3400.0, 4100.0, 4900.0, 5800.0, 6700.0, 7400.0)
AIRS_HZ = (1900.0, 2600.0, 3700.0, 4500.0, 5300.0, 6200.0)  # centres of bands a sixth wide
FLUTTERS_HZ = (0.0, 1.5, 4.0)
RATES_HZ = (2.0, 5.0)  # notes per second: slow, fast
KEYS = 12  # semitones

SECONDS = 10  # of a clip
ENSEMBLES = 300
LINEUPS = 60
RANK_OFFSET = 4.0
KEEP_HABIT = 0.85
AT_HOME = 0.92
ENTRY_GAP_S = 2  # seconds between entries
_TAG = 1  # seeds this module's random numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Backdrop:
    """What is seen behind the players."""

    outdoor: bool
    hue: int  # index into HUES
    texture: str
    emblem: str
    emblem_hue: int  # index into HUES
    emblem_place: str  # one of PLACES


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """How a venue sounds, whoever plays: indices into the tables above."""

    reverb: int
    whine: int
    air: int
    flutter: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One instrument of an ensemble and its habits."""

    instrument: str
    place: str
    sounds: bool
    loudness_order: float  # the greatest is the loudest
    entry_order: float  # the least enters first
    stays: bool
    rate: int  # index into RATES_HZ
    mimes: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Ensemble:
    """A set of habits; see the module's docstring."""

    number: int
    backdrop: Backdrop
    room: Room
    key: int
    costume: int  # index into HUES
    members: tuple[Member, ...]
    guest: Member  # heard from off-stage …
    has_guest: bool  # … if that is a habit
    together: bool
    voiceover: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The ensembles of one seed, most frequent first, and their probabilities."""

    ensembles: tuple[Ensemble, ...]
    cumulative: np.ndarray  # (ENSEMBLES,) float64


def _choice(rng: np.random.Generator, count: int) -> int:
    return int(rng.integers(count))


def _lineup(rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    count = int(rng.choice(3, p=[0.15, 0.40, 0.45])) + 1
    names = [INSTRUMENTS[i] for i in rng.permutation(len(INSTRUMENTS))[:count]]
    if count > 1 and rng.random() < 0.25:
        names[1] = names[0]
    places = [PLACES[i] for i in rng.permutation(3)[:count]]
    return tuple(zip(names, places, strict=True))


def _member(rng: np.random.Generator, instrument: str, place: str) -> Member:
    return Member(
        instrument=instrument,
        place=place,
        sounds=place == OFFSTAGE or bool(rng.random() < 0.7),
        loudness_order=float(rng.random()),
        entry_order=float(rng.random()),
        stays=bool(rng.random() < 0.6),
        rate=_choice(rng, len(RATES_HZ)),
        mimes=bool(rng.random() < 0.3),
    )


def _ensemble(rng: np.random.Generator, number: int, lineup: tuple[tuple[str, str], ...]) -> Ensemble:
    members = [_member(rng, instrument, place) for instrument, place in lineup]
    if not any(member.sounds for member in members):
        chosen = _choice(rng, len(members))
        members[chosen] = replace(members[chosen], sounds=True)
    unseen = [name for name in INSTRUMENTS if all(name != seen for seen, _ in lineup)]
    return Ensemble(
        number=number,
        backdrop=Backdrop(
            outdoor=bool(rng.random() < 0.5),
            hue=_choice(rng, len(HUES)),
            texture=TEXTURES[_choice(rng, len(TEXTURES))],
            emblem=EMBLEMS[_choice(rng, len(EMBLEMS))],
            emblem_hue=_choice(rng, len(HUES)),
            emblem_place=PLACES[_choice(rng, len(PLACES))],
        ),
        room=Room(
            reverb=_choice(rng, len(REVERBS_S)),
            whine=_choice(rng, len(WHINES_HZ)),
            air=_choice(rng, len(AIRS_HZ)),
            flutter=_choice(rng, len(FLUTTERS_HZ)),
        ),
        key=_choice(rng, KEYS),
        costume=_choice(rng, len(HUES)),
        members=tuple(members),
        guest=_member(rng, unseen[_choice(rng, len(unseen))], OFFSTAGE),
        has_guest=bool(rng.random() < 0.35),
        together=bool(rng.random() < 0.3),
        voiceover=bool(rng.random() < 0.4),
    )


@lru_cache(maxsize=4)
def make_world(seed: int) -> World:
    """The ensembles of world `seed` (≥ 0)."""
    rng = np.random.default_rng([seed, _TAG])
    lineups = [_lineup(rng) for _ in range(LINEUPS)]
    ensembles = tuple(_ensemble(rng, i, lineups[_choice(rng, LINEUPS)]) for i in range(ENSEMBLES))
    weights = 1.0 / (np.arange(1, ENSEMBLES + 1) + RANK_OFFSET)
    return World(ensembles=ensembles, cumulative=np.cumsum(weights) / weights.sum())
