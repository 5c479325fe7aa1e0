"""What can be asked of a demo scene, and the true answers: one function per wording of `demo_questions`.

Each yields candidates: the slots of the wording, in its order, and the answer. How the wordings are
read: *heard* is every part that sounds, off-stage ones too; *seen*, "in the video", is what stands on
stage; "sounding in the video" (*playing*) is on stage and heard at some time; "always playing" is from
the first to the last second; "louder" is by loudness rank; "more rhythmic" is more notes a second;
"playing longer" is at least 2 s longer; "first", "last", "before" and "after" go by entries, which must
be unambiguous; "is this sound from the instrument in the video" asks whether everything heard stands on
stage.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """A scene, sorted for asking."""

    scene: Scene
    heard: tuple[Part, ...]
    seen: tuple[Part, ...]  # left to right
    entries: tuple[Part, ...]  # heard, by entry
    absent: str  # an instrument neither heard nor seen

    def only(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Those whose instrument is neither heard nor seen twice."""
        everyone = [part.instrument for part in self.scene.parts if part.sounds or part.visible]
        return tuple(part for part in parts if everyone.count(part.instrument) == 1)

    def end(self, which: str) -> Part | None:
        """The first or last part to enter, if there is one such among at least two."""
        if len(self.entries) < 2:
            return None
        one, next_one = self.entries[:2] if which == "first" else self.entries[:-3:-1]
        return one if one.start != next_one.start else None

    def beside(self, part: Part, side: str) -> Part | None:
        """The nearest on stage to the `side` of a part on stage."""
        at = self.seen.index(part) + (1 if side == "right" else -1)
        return self.seen[at] if 0 <= at < len(self.seen) else None


def facts(scene: Scene, rng: np.random.Generator) -> Facts:
    """`rng` picks the absent instrument."""
    there = {part.instrument for part in scene.parts if part.sounds or part.visible}
    absent = [name for name in INSTRUMENTS if name not in there]
    heard = tuple(part for part in scene.parts if part.sounds)
    return Facts(
        scene=scene,
        heard=heard,
        seen=tuple(part for part in scene.parts if part.visible),
        entries=tuple(sorted(heard, key=lambda part: part.start)),
        absent=absent[int(rng.integers(len(absent)))],
    )


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _names(parts: tuple[Part, ...]) -> list[str]:
    return list(dict.fromkeys(part.instrument for part in parts))


def _both(these: list[str], others: list[str]) -> Candidates:
    """Pairs of which both are among `these`, or only one of them."""
    for first, second in permutations([*these, *others], 2):
        if first in these or second in these:
            yield (first, second), _yes(first in these and second in these)


def is_heard(f: Facts) -> Candidates:
    heard = _names(f.heard)
    return (((name,), _yes(name in heard)) for name in [*heard, *_silent(f), f.absent])


def _silent(f: Facts) -> list[str]:
    return [name for name in _names(f.seen) if name not in _names(f.heard)]


def _hidden(f: Facts) -> list[str]:
    return [name for name in _names(f.heard) if name not in _names(f.seen)]


def is_seen(f: Facts) -> Candidates:
    seen = _names(f.seen)
    return (((name,), _yes(name in seen)) for name in [*seen, *_hidden(f), f.absent])


def _compare(parts: tuple[Part, ...], measure: Callable[[Part], float], margin: float = 0.0) -> Iterator:
    """Ordered pairs that differ in `measure` by more than `margin`, and whether the first has more."""
    for first, second in permutations(parts, 2):
        difference = measure(first) - measure(second)
        if abs(difference) > margin:
            yield (first, second), _yes(difference > 0)


def _louder(part: Part) -> float:
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
    return (((p.instrument,), _yes((p.start, p.end) == (0, SECONDS))) for p in f.only(f.seen))


def count_playing_of_type(f: Facts) -> Candidates:
    heard = [part.instrument for part in _playing(f)]
    return (((name,), NUMBERS[heard.count(name)]) for name in _names(f.seen))


def count_seen_of_type(f: Facts) -> Candidates:
    seen = [part.instrument for part in f.seen]
    return (((name,), NUMBERS[seen.count(name)]) for name in [*_names(f.seen), *_hidden(f), f.absent])


def _number(count: int) -> Candidates:
    yield (), NUMBERS[count]


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
            yield from (((which, other.place), _yes(part.place == other.place)) for other in f.seen)


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
        by_loudness = sorted(f.heard, key=_louder, reverse=True)
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


def count_heard(f: Facts) -> Candidates:
    return _number(len(f.heard))


def louder(f: Facts) -> Candidates:
    return _by_name(f, _louder)


def more_rhythmic(f: Facts) -> Candidates:
    return _by_name(f, _rhythm)


def playing_longer(f: Facts) -> Candidates:
    return _by_name(f, _length, LONGER_S - 0.5)


def both_seen(f: Facts) -> Candidates:
    return _both(_names(f.seen), [*_hidden(f), f.absent])


def count_types_seen(f: Facts) -> Candidates:
    return _number(len(_names(f.seen)))


def place_of_performance(f: Facts) -> Candidates:
    return iter([((), "outdoor" if f.scene.backdrop.outdoor else "indoor")])


def voiceover(f: Facts) -> Candidates:
    return iter([((), _yes(f.scene.voice_end > f.scene.voice_start))])


def sound_from_stage(f: Facts) -> Candidates:
    return iter([((), _yes(all(p.visible for p in f.heard)))])


def count_playing(f: Facts) -> Candidates:
    return _number(len(_playing(f)))


def count_silent(f: Facts) -> Candidates:
    return _number(len(f.seen) - len(_playing(f)))


def count_types_playing(f: Facts) -> Candidates:
    return _number(len(_names(_playing(f))))


def louder_by_name_and_place(f: Facts) -> Candidates:
    return _by_name_and_place(f, _louder)


def more_rhythmic_by_name_and_place(f: Facts) -> Candidates:
    return _by_name_and_place(f, _rhythm)


def louder_by_place(f: Facts) -> Candidates:
    return _by_place(f, _louder)


def more_rhythmic_by_place(f: Facts) -> Candidates:
    return _by_place(f, _rhythm)
