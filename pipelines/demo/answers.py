"""The questions that a demo scene allows, and their true answers: one function per wording of `questions`.

Each yields candidates: the slots of the wording, in its order, and the answer. The wordings are read as:

* *heard*: every part that sounds, also off-stage;
* *seen*, "in the video": on stage;
* *playing*, "sounding in the video": on stage and heard at some time;
* "always playing": from the first to the last second;
* "louder": by loudness rank; "more rhythmic": more notes per second; "playing longer": by at least 2 s;
* "first", "last", "before" and "after": by entries, which must be unambiguous;
* "is this sound from the instrument in the video": whether everything heard is on stage.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import numpy as np

from r2scp.pipelines.demo.scene import Part, Scene
from r2scp.pipelines.demo.world import INSTRUMENTS, RATES_HZ, SECONDS

NUMBERS = ("zero", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third")
ENDS = ("first", "last")
LONGER_S = 2  # "playing longer"

Candidates = Iterator[tuple[tuple[str, ...], str]]  # (slots, answer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The parts of a scene, by what questions refer to."""

    scene: Scene
    heard: tuple[Part, ...]
    seen: tuple[Part, ...]  # left to right
    entries: tuple[Part, ...]  # heard, by entry
    absent: str  # an instrument neither heard nor seen

    def only(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Those whose instrument occurs once in the scene."""
        instruments = [part.instrument for part in self.scene.parts if part.sounds or part.visible]
        return tuple(part for part in parts if instruments.count(part.instrument) == 1)

    def end(self, which: str) -> Part | None:
        """The first or last part to enter; None if it is the only one or shares its entry."""
        if len(self.entries) < 2:
            return None
        part, neighbour = self.entries[:2] if which == "first" else self.entries[:-3:-1]
        return part if part.start != neighbour.start else None

    def beside(self, part: Part, side: str) -> Part | None:
        """The nearest part to the `side` (left or right) of a part on stage."""
        i = self.seen.index(part) + (1 if side == "right" else -1)
        return self.seen[i] if 0 <= i < len(self.seen) else None


def make_facts(scene: Scene, rng: np.random.Generator) -> Facts:
    """The facts of a scene; `rng` draws the absent instrument."""
    present = {part.instrument for part in scene.parts if part.sounds or part.visible}
    absent = [name for name in INSTRUMENTS if name not in present]
    heard = tuple(part for part in scene.parts if part.sounds)
    return Facts(
        scene=scene,
        heard=heard,
        seen=tuple(part for part in scene.parts if part.visible),
        entries=tuple(sorted(heard, key=lambda part: part.start)),
        absent=absent[int(rng.integers(len(absent)))],
    )


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _names(parts: tuple[Part, ...]) -> list[str]:
    return list(dict.fromkeys(part.instrument for part in parts))


def _both(present: list[str], others: list[str]) -> Candidates:
    """Pairs of instruments of which at least one is `present`, and whether both are."""
    for first, second in permutations([*present, *others], 2):
        if first in present or second in present:
            yield (first, second), _yes_no(first in present and second in present)


def is_heard(f: Facts) -> Candidates:
    heard = _names(f.heard)
    return (((name,), _yes_no(name in heard)) for name in [*heard, *_silent(f), f.absent])


def _silent(f: Facts) -> list[str]:
    return [name for name in _names(f.seen) if name not in _names(f.heard)]


def _hidden(f: Facts) -> list[str]:
    return [name for name in _names(f.heard) if name not in _names(f.seen)]


def is_seen(f: Facts) -> Candidates:
    seen = _names(f.seen)
    return (((name,), _yes_no(name in seen)) for name in [*seen, *_hidden(f), f.absent])


def _compare(parts: tuple[Part, ...], measure: Callable[[Part], float], margin: float = 0.0) -> Iterator:
    """Ordered pairs that differ in `measure` by more than `margin`, and whether the first has more."""
    for first, second in permutations(parts, 2):
        difference = measure(first) - measure(second)
        if abs(difference) > margin:
            yield (first, second), _yes_no(difference > 0)


def _loudness(part: Part) -> float:
    return -part.loudness


def _rhythm(part: Part) -> float:
    return RATES_HZ[part.rate]


def _length(part: Part) -> float:
    return part.end - part.start


def _by_name(f: Facts, measure: Callable[[Part], float], margin: float = 0.0) -> Candidates:
    for (first, second), answer in _compare(f.only(f.heard), measure, margin):
        yield (first.instrument, second.instrument), answer


def _by_name_and_place(f: Facts, measure: Callable[[Part], float]) -> Candidates:
    for (first, second), answer in _compare(_playing(f), measure):
        yield (first.instrument, first.place, second.instrument, second.place), answer


def _by_place(f: Facts, measure: Callable[[Part], float]) -> Candidates:
    for (first, second), answer in _compare(_playing(f), measure):
        yield (first.place, second.place), answer


def _playing(f: Facts) -> tuple[Part, ...]:
    return tuple(part for part in f.seen if part.sounds)


def always_playing(f: Facts) -> Candidates:
    return (((p.instrument,), _yes_no((p.start, p.end) == (0, SECONDS))) for p in f.only(f.seen))


def count_playing_of_type(f: Facts) -> Candidates:
    heard = [part.instrument for part in _playing(f)]
    return (((name,), NUMBERS[heard.count(name)]) for name in _names(f.seen))


def count_seen_of_type(f: Facts) -> Candidates:
    seen = [part.instrument for part in f.seen]
    return (((name,), NUMBERS[seen.count(name)]) for name in [*_names(f.seen), *_hidden(f), f.absent])


def _single(answer: str) -> Candidates:
    yield (), answer


def beside(f: Facts) -> Candidates:
    for part in f.only(f.seen):
        for side in ("left", "right"):
            if (other := f.beside(part, side)) is not None:
                yield (side, part.instrument), other.instrument


def outermost(f: Facts) -> Candidates:
    if len(f.seen) > 1:
        yield ("leftest",), f.seen[0].instrument
        yield ("rightest",), f.seen[-1].instrument


def solo(f: Facts) -> Candidates:
    if len(f.seen) == 1:
        yield (), f.seen[0].instrument


def from_place(f: Facts) -> Candidates:
    for which in ENDS:
        if (part := f.end(which)) is not None:
            yield from (((which, other.place), _yes_no(part.place == other.place)) for other in f.seen)


def beside_end(f: Facts) -> Candidates:
    for which in ENDS:
        part = f.end(which)
        for side in ("left", "right"):
            if part is not None and part.visible and (other := f.beside(part, side)) is not None:
                yield (side, which), other.instrument


def where_by_entry(f: Facts) -> Candidates:
    for which in ENDS:
        if (part := f.end(which)) is not None and part.visible:
            yield (which,), part.place


def where_by_loudness(f: Facts) -> Candidates:
    if len(f.heard) > 1:
        by_loudness = sorted(f.heard, key=_loudness, reverse=True)
        for which, part in (("loudest", by_loudness[0]), ("lowest", by_loudness[-1])):
            if part.visible:
                yield (which,), part.place


def at_same_time(f: Facts) -> Candidates:
    for part in f.only(f.heard):
        others = {
            p.instrument for p in f.heard if p is not part and p.start < part.end and part.start < p.end
        }
        if len(others) == 1:
            yield (part.instrument,), others.pop()


def comes_in(f: Facts) -> Candidates:
    starts = [part.start for part in f.entries]
    if len(starts) > 1:
        for ordinal, part in zip(ORDINALS, f.entries, strict=False):
            if starts.count(part.start) == 1:
                yield (ordinal,), part.instrument


def which_of_two(f: Facts) -> Candidates:
    for first, second in permutations(_playing(f), 2):
        if first.instrument == second.instrument and first.start <= second.start:
            together = first.start == second.start
            yield (first.instrument, "first"), "simultaneously" if together else first.place
            yield (first.instrument, "last"), "simultaneously" if together else second.place


def before_or_after(f: Facts) -> Candidates:
    starts = [part.start for part in f.entries]
    if len(set(starts)) == len(starts) and f.only(f.entries) == f.entries:
        for earlier, later in zip(f.entries, f.entries[1:], strict=False):
            yield ("before", later.instrument), earlier.instrument
            yield ("after", earlier.instrument), later.instrument


def both_heard(f: Facts) -> Candidates:
    return _both(_names(f.heard), [*_silent(f), f.absent])


def both_seen(f: Facts) -> Candidates:
    return _both(_names(f.seen), [*_hidden(f), f.absent])


def count_heard(f: Facts) -> Candidates:
    return _single(NUMBERS[len(f.heard)])


def count_types_seen(f: Facts) -> Candidates:
    return _single(NUMBERS[len(_names(f.seen))])


def count_playing(f: Facts) -> Candidates:
    return _single(NUMBERS[len(_playing(f))])


def count_silent(f: Facts) -> Candidates:
    return _single(NUMBERS[len(f.seen) - len(_playing(f))])


def count_types_playing(f: Facts) -> Candidates:
    return _single(NUMBERS[len(_names(_playing(f)))])


def place_of_performance(f: Facts) -> Candidates:
    return _single("outdoor" if f.scene.backdrop.outdoor else "indoor")


def voiceover(f: Facts) -> Candidates:
    return _single(_yes_no(f.scene.voice_end > f.scene.voice_start))


def sound_from_stage(f: Facts) -> Candidates:
    return _single(_yes_no(all(part.visible for part in f.heard)))


louder = partial(_by_name, measure=_loudness)
more_rhythmic = partial(_by_name, measure=_rhythm)
playing_longer = partial(_by_name, measure=_length, margin=LONGER_S - 0.5)
louder_by_name_and_place = partial(_by_name_and_place, measure=_loudness)
more_rhythmic_by_name_and_place = partial(_by_name_and_place, measure=_rhythm)
louder_by_place = partial(_by_place, measure=_loudness)
more_rhythmic_by_place = partial(_by_place, measure=_rhythm)
