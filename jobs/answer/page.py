"""Answers with their evidence as an HTML page: the answer, what was missing, and the retrieved clips.

>>> html = answer_page(result)
>>> card = answer_card(result, load_media(result))  # for `parts.answer_card`
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from r2scp.jobs.answer.records import Neighbour, Result, Stream
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
        "finding": _shorten_text(result.finding()) or "Sound and picture are both available.",
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


def _neighbour(clip: Neighbour) -> list[object]:
    """One row of the table of retrieved clips."""
    score = {"text": decimal(clip.score, 3), "value": clip.score}
    origin = map(_shorten_text, (clip.split, clip.source_id, clip.content_sha256, clip.encoder))
    labels = _shorten_text(", ".join(_first_labels(clip.labels)))
    name, file = _shorten_text(clip.clip_id), _shorten_text(clip.file)
    return [name, clip.second, score, labels, *origin, clip.clips_version, file]


def _heading(result: Result) -> str:
    used = (
        f"their {MODALITY_NAMES[Modality(result.missing)]} was" if result.missing else "their features were"
    )
    return f"Retrieved clips ({used} used)"


def _unused_streams(result: Result, preview: Preview) -> list[str]:
    """Why a stream of the recording cannot be shown or was not used."""
    lines = []
    for modality, stream in _streams(result):
        media = preview.peaks if modality is Modality.AUDIO else preview.pictures
        name = MODALITY_NAMES[modality]
        if not media and not preview.fault:
            lines.append(_shorten_text(f"No {name}: {stream.status}."))
        elif not stream.used:
            why = f": {stream.why.rstrip('.')}" if stream.why else ""
            lines.append(_shorten_text(f"The {name} was not used{why}."))
    return lines


def _streams(result: Result) -> tuple[tuple[Modality, Stream], ...]:
    return (Modality.AUDIO, result.audio), (Modality.VISUAL, result.visual)


def _stream(modality: Modality, stream: Stream) -> list[object]:
    """One row of the table of streams."""
    unit, places = ("s", 1) if modality is Modality.AUDIO else ("frames", 0)
    return [
        MODALITY_NAMES[modality],
        _shorten_text(stream.status),
        f"{decimal(stream.decoded, places)} {unit}",
        f"{decimal(stream.expected, places)} {unit}",
        {"text": "yes" if stream.used else "no", "minor": _shorten_text(stream.why) or None},
    ]


def _timeline(result: Result) -> list[dict[str, object]]:
    """The bars of the recovered seconds; the highest dissonance has height 1."""
    highest = max((each.dissonance or 0.0 for each in result.recovered), default=0.0) or 1.0
    _, available = _recovery_names(result)
    bars: list[dict[str, object]] = []
    for each in result.recovered[:MAX_SECONDS]:
        delta = decimal(each.dissonance, 2)
        words = "not purified" if each.dissonance is None else f"dissonance {delta}"
        if each.purged:
            words += ", purged"
        if each.replaced_by is not None:
            at = f"{each.replaced_by // 60}:{each.replaced_by % 60:02d}"
            words += f", replaced with the representation guided by the {available} at {at}"
        bars.append(
            {
                "second": each.second,
                "delta": delta,
                "height": (each.dissonance or 0.0) / highest,
                "purged": each.purged,
                "replaced_by": each.replaced_by,
                "words": words,
            }
        )
    return bars


def _timeline_caption(result: Result) -> str:
    missing, available = _recovery_names(result)
    count = len(result.recovered)
    if all(each.dissonance is None for each in result.recovered):
        return f"{count} seconds of {missing} were recovered; nothing was purified."
    purged = sum(each.purged for each in result.recovered)
    return (
        f"Height: dissonance δ between the recovered {missing} and the {available}, 0 to 2. "
        f"{purged} of {count} seconds were purged (dashed, ×); ← is the second of the {available} that "
        "guided the replacement."
    )


def _recovery_names(result: Result) -> tuple[str, str]:
    """Names of the missing and the available modality."""
    if result.missing is None:
        return "stream", "other stream"
    missing = Modality(result.missing)
    return MODALITY_NAMES[missing], MODALITY_NAMES[missing.other]


def _request_facts(result: Result) -> Iterator[tuple[str, object]]:
    yield "recording's SHA-256", _shorten_text(result.content_sha256)
    if result.id:
        yield "request id", _shorten_text(result.id)


def _flat(name: str, values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """(name, value on one line) of each; None for empty values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{inner} {part}" for inner, part in value.items())
        elif isinstance(value, list | tuple):
            text = ", ".join(map(str, value))
        else:
            text = next((word for constant, word in BOOLEAN_WORDS if value is constant), str(value))
        yield _shorten_text(f"{name}: {key.replace('_', ' ')}"), _shorten_text(text) or None


def _first_labels(labels: Sequence[str]) -> list[str]:
    rest = len(labels) - MAX_LABELS
    return [*labels[:MAX_LABELS], *([f"and {rest} more"] if rest > 0 else [])]


def _shorten(value: object) -> object:
    """The same values with texts shortened to MAX_TEXT."""
    if isinstance(value, str):
        return _shorten_text(value)
    if isinstance(value, Mapping):
        return {_shorten_text(str(key)): _shorten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten(item) for item in value]
    return value


def _shorten_text(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
