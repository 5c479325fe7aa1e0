"""Answers with their evidence as an HTML page: the answer, what was missing, and the retrieved clips.

>>> html = answer_page(result)
>>> cards = [answer_card(result, load_media(result, previews)) for result in results]  # for `parts.answer_card`
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from r2scp.jobs.answer.records import Result, Neighbour, RecoveredSecond, Stream
from r2scp.jobs.html.render import decimal, page
from r2scp.jobs.html.thumbnails import Preview, Previews
from r2scp.store.schema import MODALITY_NAMES, Modality

SHOWN_ANSWERS = 5
MAX_STILLS = 6  # spread over the recording
MAX_SECONDS = 300  # of a timeline; the rest is counted
MAX_LABELS = 12  # per retrieved clip
MAX_TEXT = 400  # characters of outside text on a page; --json has all
STREAM_COLUMNS = (
    {"text": "stream"},
    {"text": "status"},
    {"text": "decoded", "numeric": True},
    {"text": "expected", "numeric": True},
    {"text": "used"},
)
NEIGHBOUR_COLUMNS = (
    {"text": "clip"},
    {"text": "second", "numeric": True, "hint": "The most similar to the recording"},
    {"text": "score", "numeric": True, "hint": "Cosine of the two keys"},
    {"text": "labels"},
    {"text": "split"},
    {"text": "source"},
    {"text": "SHA-256"},
    {"text": "encoder"},
    {"text": "version of clips", "numeric": True},
    {"text": "file"},
)
BOOLEAN_WORDS = ((None, ""), (True, "yes"), (False, "no"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """Pictures and waveforms of one result."""

    recording: Preview
    neighbours: tuple[Preview, ...]  # in the result's order


def load_media(result: Result, previews: Previews | None = None) -> Media:
    """Pictures and waveforms of the recording and the retrieved clips, if their files are unchanged.

    With the same `previews` for several results, a clip that they share is decoded once.
    """
    previews = previews or Previews()
    seconds = stills(result.visual.decoded)
    return Media(
        recording=previews.preview(result.video, seconds, result.content_sha256),
        neighbours=tuple(
            previews.preview(clip.file, (clip.second,), clip.content_sha256) for clip in result.neighbours
        ),
    )


def stills(frames: float) -> list[int]:
    """Up to MAX_STILLS seconds, the middles of equal parts."""
    count = int(frames)
    if count <= MAX_STILLS:
        return [*range(count)]
    return [(2 * at + 1) * count // (2 * MAX_STILLS) for at in range(MAX_STILLS)]


def answer_page(result: Result | Sequence[Result], previews: Previews | None = None) -> str:
    """One HTML file with one or more results."""
    results = [result] if isinstance(result, Result) else list(result)
    previews = previews or Previews()
    cards = [answer_card(each, load_media(each, previews)) for each in results]
    title, lede = "Answers and their evidence", f"{len(results)} questions."
    if len(results) == 1:
        title = results[0].question
        lede = f"{_shorten_text(results[0].video)} · {decimal(results[0].duration_s, 1)} s"
    return page("answer.html", {"title": _shorten_text(title) or "A question", "lede": lede, "cards": cards})


def answer_card(result: Result, media: Media) -> dict[str, object]:
    """The values of `parts.answer_card`."""
    rest = result.answers[SHOWN_ANSWERS:]
    return {
        "answered": _shorten(result.to_json()),
        "preview": media.recording,
        "stills": sorted(media.recording.pictures),
        "absences": _unused_streams(result, media.recording),
        "shown_answers": SHOWN_ANSWERS,
        "other_answers": len(rest),
        "other_share": sum(candidate.probability for candidate in rest),
        "finding": _shorten_text(answered.finding())
        or "Sound and picture are both there; nothing had to stand in.",
        "neighbours": [
            (_shorten(asdict(clip) | {"labels": _first_labels(clip.labels)}), preview)
            for clip, preview in zip(result.neighbours, media.neighbours, strict=True)
        ],
        "neighbours_heading": _heading(result),
        "neighbour_columns": NEIGHBOUR_COLUMNS,
        "neighbour_rows": [_neighbour(clip) for clip in result.neighbours],
        "timeline": _timeline(result),
        "timeline_rest": max(0, len(result.recovered) - MAX_SECONDS),
        "timeline_words": _timeline_caption(result),
        "stream_columns": STREAM_COLUMNS,
        "streams": [_stream(name, stream) for name, stream in _streams(result)],
        "provenance": [*_flat("model", result.model), *_flat("store", result.store), *_request_facts(result)],
    }


def _neighbour(each: Neighbour) -> list[object]:
    score = {"text": decimal(each.score, 3), "value": each.score}
    origin = map(_shorten_text, (each.split, each.source_id, each.content_sha256, each.encoder))
    labels = _shorten_text(", ".join(_first_labels(each.labels)))
    return [
        _shorten_text(each.clip_id),
        each.second,
        score,
        labels,
        *origin,
        each.clips_version,
        _shorten_text(each.file),
    ]


def _heading(answered: Result) -> str:
    gone = MODALITY_NAMES[Modality(answered.missing)] if answered.missing else "features"
    return f"Clips whose {gone} stood in"


def _unused_streams(answered: Result, seen: Preview) -> list[str]:
    """Why a stream of the recording is not to be seen or heard below its heading, or was not used."""
    lines = []
    for name, stream in _streams(answered):
        there = seen.peaks if name is Modality.AUDIO else seen.pictures
        word = MODALITY_NAMES[name]
        if not there and not seen.fault:
            lines.append(_shorten_text(f"No {word}: {stream.status}."))
        elif not stream.used:
            why = f": {stream.why.rstrip('.')}" if stream.why else ""
            lines.append(_shorten_text(f"Its {word} was not used{why}."))
    return lines


def _streams(answered: Result) -> tuple[tuple[Modality, Stream], ...]:
    return (Modality.AUDIO, answered.audio), (Modality.VISUAL, answered.visual)


def _stream(name: Modality, stream: Stream) -> list[object]:
    unit = "s" if name is Modality.AUDIO else "frames"
    places = 1 if name is Modality.AUDIO else 0
    return [
        MODALITY_NAMES[name],
        _shorten_text(stream.status),
        f"{decimal(stream.decoded, places)} {unit}",
        f"{decimal(stream.expected, places)} {unit}",
        {"text": "yes" if stream.used else "no", "minor": _shorten_text(stream.why) or None},
    ]


def _highest(recovered: Sequence[RecoveredSecond]) -> float:
    return max((each.dissonance for each in recovered if each.dissonance is not None), default=0.0) or 1.0


def _second(each: RecoveredSecond, highest: float) -> dict[str, object]:
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


def _timeline_words(answered: Result) -> str:
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


def _asked(answered: Result) -> Iterator[tuple[str, object]]:
    yield "recording's SHA-256", _shorten_text(answered.content_sha256)
    if answered.id:
        yield "asked as", _shorten_text(answered.id)


def _flat(name: str, values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """(name, value) of each, on one line; None where there is nothing."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{inner} {one}" for inner, one in value.items())
        elif isinstance(value, list | tuple):
            text = ", ".join(map(str, value))
        else:
            text = next((word for known, word in BOOLEAN_WORDS if value is known), str(value))
        yield _shorten_text(f"{name}: {key.replace('_', ' ')}"), _shorten_text(text) or None


def _first_labels(labels: Sequence[str]) -> list[str]:
    return [*labels[:LABELS], *([f"and {len(labels) - LABELS} more"] if len(labels) > LABELS else [])]


def _shorten(value: object) -> object:
    """The same values, texts cut to LONGEST."""
    if isinstance(value, str):
        return _shorten_text(value)
    if isinstance(value, Mapping):
        return {_shorten_text(str(key)): _shorten(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten(one) for one in value]
    return value


def _shorten_text(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
