"""Answers with their evidence as a page: what was answered, what was missing, which clips stood in for it.

>>> html = answer_page(answered)
>>> cards = [card_of(each, shown(each, previews)) for each in several]   # for `parts.answer_card`
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from r2scp.jobs.answer.records import Answered, Neighbour, Second, Stream
from r2scp.jobs.html.render import decimal, page
from r2scp.jobs.html.thumbnails import Preview, Previews
from r2scp.store.schema import MODALITY_NAMES, Modality

ANSWERS = 5  # the best ones, named
STILLS = 6  # of the recording, spread over it
SECONDS = 300  # of a time line; a longer recording's rest is counted
LABELS = 12  # of one neighbour
LONGEST = 400  # characters of a text from outside on a page; --json has all
STREAM_COLUMNS = (
    {"text": "stream"},
    {"text": "status"},
    {"text": "decoded", "numeric": True},
    {"text": "expected", "numeric": True},
    {"text": "used"},
)
NEIGHBOUR_COLUMNS = (
    {"text": "clip"},
    {"text": "second", "numeric": True, "hint": "The one most like the recording"},
    {"text": "score", "numeric": True, "hint": "Cosine of the two keys"},
    {"text": "labels"},
    {"text": "split"},
    {"text": "source"},
    {"text": "SHA-256"},
    {"text": "encoder"},
    {"text": "version of clips", "numeric": True},
    {"text": "file"},
)
SPOKEN = ((None, ""), (True, "yes"), (False, "no"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What there is to look at for one answer."""

    recording: Preview
    neighbours: tuple[Preview, ...]  # in the answer's order


def shown(answered: Answered, previews: Previews | None = None) -> Shown:
    """Pictures and sound shapes of the recording and of each neighbour, of the very files that were read.

    Hand the same `previews` to several answers, and a clip that they share is decoded once.
    """
    previews = previews or Previews()
    seconds = stills(answered.visual.decoded)
    return Shown(
        recording=previews.preview(answered.video, seconds, answered.content_sha256),
        neighbours=tuple(
            previews.preview(each.file, (each.second,), each.content_sha256) for each in answered.neighbours
        ),
    )


def stills(frames: float) -> list[int]:
    """At most STILLS seconds in the middle of as many equal parts."""
    there = int(frames)
    return (
        [(2 * at + 1) * there // (2 * STILLS) for at in range(STILLS)] if there > STILLS else [*range(there)]
    )


def answer_page(answered: Answered | Sequence[Answered], previews: Previews | None = None) -> str:
    """One HTML file of one answer or several."""
    several = [answered] if isinstance(answered, Answered) else list(answered)
    previews = previews or Previews()
    cards = [card_of(each, shown(each, previews)) for each in several]
    alone = len(several) == 1
    title = several[0].question if alone else "Answers and what they rest on"
    lede = f"{len(several)} questions."
    if alone:
        lede = f"{_cut(several[0].video)} · {decimal(several[0].duration_s, 1)} s"
    return page("answer.html", {"title": _cut(title) or "A question", "lede": lede, "cards": cards})


def card_of(answered: Answered, seen: Shown) -> dict[str, object]:
    """What `parts.answer_card` draws."""
    rest = answered.answers[ANSWERS:]
    stills_ = sorted(seen.recording.pictures)
    return {
        "answered": _brief(answered.to_json()),
        "preview": seen.recording,
        "stills": stills_,
        "absences": _absences(answered, seen.recording),
        "shown_answers": ANSWERS,
        "other_answers": len(rest),
        "other_share": sum(each.probability for each in rest),
        "finding": _cut(answered.finding()) or "Sound and picture are both there; nothing had to stand in.",
        "neighbours": [
            (_brief(asdict(each) | {"labels": _few(each.labels)}), preview)
            for each, preview in zip(answered.neighbours, seen.neighbours, strict=True)
        ],
        "neighbours_heading": _heading(answered),
        "neighbour_columns": NEIGHBOUR_COLUMNS,
        "neighbour_rows": [_neighbour(each) for each in answered.neighbours],
        "timeline": [_second(each, _highest(answered.recovered)) for each in answered.recovered[:SECONDS]],
        "timeline_rest": max(0, len(answered.recovered) - SECONDS),
        "timeline_words": _timeline_words(answered),
        "stream_columns": STREAM_COLUMNS,
        "streams": [_stream(name, stream) for name, stream in _streams(answered)],
        "provenance": [*_flat("model", answered.model), *_flat("store", answered.store), *_asked(answered)],
    }


def _neighbour(each: Neighbour) -> list[object]:
    score = {"text": decimal(each.score, 3), "value": each.score}
    origin = map(_cut, (each.split, each.source_id, each.content_sha256, each.encoder))
    labels = _cut(", ".join(_few(each.labels)))
    return [_cut(each.clip_id), each.second, score, labels, *origin, each.clips_version, _cut(each.file)]


def _heading(answered: Answered) -> str:
    gone = MODALITY_NAMES[Modality(answered.missing)] if answered.missing else "features"
    return f"Clips whose {gone} stood in"


def _absences(answered: Answered, seen: Preview) -> list[str]:
    """Why a stream of the recording is not to be seen or heard below its heading, or was not used."""
    lines = []
    for name, stream in _streams(answered):
        there = seen.peaks if name is Modality.AUDIO else seen.pictures
        word = MODALITY_NAMES[name]
        if not there and not seen.fault:
            lines.append(_cut(f"No {word}: {stream.status}."))
        elif not stream.used:
            why = f": {stream.why.rstrip('.')}" if stream.why else ""
            lines.append(_cut(f"Its {word} was not used{why}."))
    return lines


def _streams(answered: Answered) -> tuple[tuple[Modality, Stream], ...]:
    return (Modality.AUDIO, answered.audio), (Modality.VISUAL, answered.visual)


def _stream_of(answered: Answered, modality: str) -> Stream:
    return answered.audio if modality == Modality.AUDIO else answered.visual


def _stream(name: Modality, stream: Stream) -> list[object]:
    unit = "s" if name is Modality.AUDIO else "frames"
    places = 1 if name is Modality.AUDIO else 0
    return [
        MODALITY_NAMES[name],
        _cut(stream.status),
        f"{decimal(stream.decoded, places)} {unit}",
        f"{decimal(stream.expected, places)} {unit}",
        {"text": "yes" if stream.used else "no", "minor": _cut(stream.why) or None},
    ]


def _highest(recovered: Sequence[Second]) -> float:
    return max((each.dissonance for each in recovered if each.dissonance is not None), default=0.0) or 1.0


def _second(each: Second, highest: float) -> dict[str, object]:
    delta = decimal(each.dissonance, 2)
    words = "not purified" if each.dissonance is None else f"dissonance {delta}"
    if each.purged:
        words += ", purged"
    if each.replaced_by is not None:
        words += f", replaced by the guided token of second {each.replaced_by}"
    return {
        "second": each.second,
        "delta": delta,
        "height": (each.dissonance or 0.0) / highest,
        "purged": each.purged,
        "replaced_by": each.replaced_by,
        "words": words,
    }


def _timeline_words(answered: Answered) -> str:
    gone = MODALITY_NAMES[Modality(answered.missing)] if answered.missing else "stream"
    there = {"sound": "picture", "picture": "sound"}.get(gone, "other stream")
    if all(each.dissonance is None for each in answered.recovered):
        return f"The {gone} was recovered in {len(answered.recovered)} seconds; nothing was purified."
    purged = sum(each.purged for each in answered.recovered)
    return (
        f"Height: dissonance δ between the recovered {gone} and the {there}, 0 to 2. "
        f"{purged} of {len(answered.recovered)} seconds were purged (dashed, ×); ← names the second of the "
        f"{there} whose guided token took the place."
    )


def _asked(answered: Answered) -> Iterator[tuple[str, object]]:
    yield "recording's SHA-256", _cut(answered.content_sha256)
    if answered.id:
        yield "asked as", _cut(answered.id)


def _flat(name: str, values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """(name, value) of each, on one line; None where there is nothing."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{inner} {one}" for inner, one in value.items())
        elif isinstance(value, list | tuple):
            text = ", ".join(map(str, value))
        else:
            text = next((word for known, word in SPOKEN if value is known), str(value))
        yield _cut(f"{name}: {key.replace('_', ' ')}"), _cut(text) or None


def _few(labels: Sequence[str]) -> list[str]:
    return [*labels[:LABELS], *([f"and {len(labels) - LABELS} more"] if len(labels) > LABELS else [])]


def _brief(value: object) -> object:
    """The same values, texts cut to LONGEST."""
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, Mapping):
        return {_cut(str(key)): _brief(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_brief(one) for one in value]
    return value


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
