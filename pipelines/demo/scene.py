"""A scene of the demo corpus: one show of an ensemble of `world`, with everything that is true of it."""

from dataclasses import dataclass, replace

import numpy as np

from r2scp.pipelines.demo.world import (
    AT_HOME,
    ENSEMBLES,
    ENTRY_GAP_S,
    FOLLOWERS,
    INSTRUMENTS,
    KEEP_HABIT,
    KEYS,
    OFFSTAGE,
    PLACES,
    SECONDS,
    Backdrop,
    Ensemble,
    Member,
    Room,
    make_world,
)

_TAG = 2  # seeds this module's random numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One instrument in one clip. Intervals are whole seconds [start, end); empty if start == end."""

    instrument: str
    place: str  # PLACES or OFFSTAGE
    start: int
    end: int
    loudness: int  # 0: the loudest, each step 6 dB less; -1: silent
    rate: int
    move_start: int
    move_end: int

    @property
    def sounds(self) -> bool:
        """Whether it is heard at all."""
        return self.end > self.start

    @property
    def visible(self) -> bool:
        """Whether it stands on stage."""
        return self.place != OFFSTAGE

    def sounds_at(self, second: int) -> bool:
        """Whether it is heard in second `second`."""
        return self.start <= second < self.end

    def moves_at(self, second: int) -> bool:
        """Whether it is seen moving in second `second`."""
        return self.visible and self.move_start <= second < self.move_end


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Everything that is true of one clip; picture, sound, questions and captions follow from it."""

    seed: int
    index: int
    ensemble: int
    at_home: bool
    backdrop: Backdrop
    room: Room
    key: int
    costume: int
    parts: tuple[Part, ...]
    voice_start: int
    voice_end: int
    light: float  # brightness of the picture, 0.85-1.15

    @property
    def video_id(self) -> str:
        """Unique across all worlds."""
        return f"demo{self.seed:04d}_{self.index:06d}"


def make_scene(seed: int, index: int) -> Scene:
    """Clip `index` of world `seed`: the same pair always gives the same scene."""
    world = make_world(seed)
    rng = np.random.default_rng([seed, _TAG, index])
    number = min(int(np.searchsorted(world.cumulative, rng.random())), ENSEMBLES - 1)
    ensemble = world.ensembles[number]
    at_home = bool(rng.random() < AT_HOME)
    venue = ensemble if at_home else world.ensembles[_choice(rng, ENSEMBLES)]
    has_voice = ensemble.voiceover == _keeps_habit(rng)
    voice_start = _choice(rng, 5) if has_voice else 0
    voice_end = voice_start + 4 + _choice(rng, 3) if has_voice else 0
    return Scene(
        seed=seed,
        index=index,
        ensemble=number,
        at_home=at_home,
        backdrop=venue.backdrop,
        room=venue.room,
        key=ensemble.key if _keeps_habit(rng) else _choice(rng, KEYS),
        costume=ensemble.costume,
        parts=_draw_parts(rng, ensemble),
        voice_start=voice_start,
        voice_end=min(voice_end, SECONDS),
        light=float(rng.uniform(0.85, 1.15)),
    )


def _choice(rng: np.random.Generator, count: int) -> int:
    return int(rng.integers(count))


def _keeps_habit(rng: np.random.Generator) -> bool:
    return bool(rng.random() < KEEP_HABIT)


def _draw_members(rng: np.random.Generator, ensemble: Ensemble) -> list[Member]:
    """Who takes part in this show, where, and which of them play."""
    members = list(ensemble.members)
    if not _keeps_habit(rng):
        chosen = _choice(rng, len(members))
        if len(members) > 1 and rng.random() < 0.5:
            del members[chosen]
        else:
            members[chosen] = replace(members[chosen], instrument=INSTRUMENTS[_choice(rng, len(INSTRUMENTS))])
    if not _keeps_habit(rng):
        places = rng.permutation(3)
        members = [replace(member, place=PLACES[places[i]]) for i, member in enumerate(members)]
    cast = [member if _keeps_habit(rng) else replace(member, sounds=not member.sounds) for member in members]
    if ensemble.has_guest == _keeps_habit(rng):
        cast.append(ensemble.guest)
    if not any(member.sounds for member in cast):
        chosen = _choice(rng, len(cast))
        cast[chosen] = replace(cast[chosen], sounds=True)
    return cast


def _draw_parts(rng: np.random.Generator, ensemble: Ensemble) -> tuple[Part, ...]:
    """The parts of one show, from left to right, off-stage last."""
    members = _draw_members(rng, ensemble)
    if not _keeps_habit(rng):
        members = [replace(member, loudness_order=float(rng.random())) for member in members]
    if not _keeps_habit(rng):
        members = [replace(member, entry_order=float(rng.random())) for member in members]
    together = ensemble.together == _keeps_habit(rng)
    sounding = [i for i, member in enumerate(members) if member.sounds]
    by_loudness = sorted(sounding, key=lambda i: -members[i].loudness_order)
    by_entry = sorted(sounding, key=lambda i: members[i].entry_order)
    first_entry = _choice(rng, 2)
    parts = []
    for i, member in enumerate(members):
        start = end = 0
        if member.sounds:
            start = first_entry + (0 if together else ENTRY_GAP_S * by_entry.index(i))
            stays = member.stays == _keeps_habit(rng)
            end = SECONDS if stays else min(SECONDS - 1, start + 2 + _choice(rng, 4))
        move_start, move_end = _draw_motion(rng, member, start, end)
        parts.append(
            Part(
                instrument=member.instrument,
                place=member.place,
                start=start,
                end=end,
                loudness=by_loudness.index(i) if member.sounds else -1,
                rate=member.rate if _keeps_habit(rng) else 1 - member.rate,
                move_start=move_start,
                move_end=move_end,
            )
        )
    return tuple(sorted(parts, key=lambda part: (*PLACES, OFFSTAGE).index(part.place)))


def _draw_motion(rng: np.random.Generator, member: Member, start: int, end: int) -> tuple[int, int]:
    first = _choice(rng, 6)
    independent = (first, min(SECONDS, first + 3 + _choice(rng, 5)))
    moves = rng.random() < 0.7
    if member.place == OFFSTAGE:
        return 0, 0
    if member.instrument in FOLLOWERS:
        if end > start:
            return start, end
        return independent if member.mimes else (0, 0)
    return independent if moves else (0, 0)
