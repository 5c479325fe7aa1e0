"""One row of a dataset's own annotation file, dataset by dataset.

Each `*_row` takes one row as the reader gave it and its file's split, and returns an `AnnotationRow` or
raises `InvalidRow`. None of them touches the disk: an id is text until it matches the name of a file that
the walk of the disk listed.
"""

import os
import re
from dataclasses import dataclass

from r2scp.pipelines.corpora.values import (
    InvalidRow,
    RejectReason,
    answer_of,
    cells_of,
    choices_of,
    excerpt,
    file_name,
    json_list,
    key_of,
    match_answer,
    optional_id,
    parse_split,
    record_of,
    relative_path,
    text_of,
    word_of,
)

AVQA_CHOICES = 4

_YOUTUBE_ID = r"([A-Za-z0-9_-]{11})"
_YOUTUBE_NAME = re.compile(_YOUTUBE_ID + r"(?:_|$)")
_BY_SECONDS = re.compile(_YOUTUBE_ID + r"_([0-9]{6})")
_BY_MILLISECONDS = re.compile(_YOUTUBE_ID + r"_([0-9]{1,9})_([0-9]{1,9})")
_NO_START = re.compile(_YOUTUBE_ID + r"_trimmed")
_WHOLE_SECONDS = re.compile(r"([0-9]{1,6})(?:\.0+)?")
_SLOT = re.compile(r"<[^<>]*>")
_FLIPPED = "_flip"
_DERIVED = re.compile(r"e(?:sa|va|vv)([0-9]{8})")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedQuestion:
    """The question of a row. `question_id` is "" where the row has none; `answer_index` -1: no choices."""

    question_id: str
    text: str
    type: str
    answer: str
    choices: tuple[str | None, ...] = ()
    answer_index: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationRow:
    """One row: a clip, and perhaps a question about it. `deleted`: withdrawn by the dataset's authors."""

    video_id: str
    split: str = ""
    labels: tuple[str, ...] = ()
    question: AnnotatedQuestion | None = None
    deleted: bool = False


# --- VGGSound -----------------------------------------------------------------------------------------


def vggsound_row(cells: object, split: str) -> AnnotationRow:
    """`id,start,label,split`; the older `{id}_{start:06d}.mp4,label`; or a bare clip name."""
    cells = cells_of(cells)
    if len(cells) == 4:
        youtube_id, start = word_of(cells[0], "id"), _WHOLE_SECONDS.fullmatch(cells[1].strip())
        if not re.fullmatch(_YOUTUBE_ID, youtube_id):
            detail = f"must be an 11-character YouTube id: {excerpt(youtube_id)}"
            raise InvalidRow(RejectReason.BAD_VIDEO_ID, detail)
        if not start:
            raise InvalidRow(RejectReason.BAD_START, f"must be whole seconds: {excerpt(cells[1])}")
        video_id, split = f"{youtube_id}_{int(start[1]):06d}", parse_split(cells[3])
    elif len(cells) in (1, 2):
        video_id = vggsound_name(os.path.splitext(word_of(cells[0], "clip name"))[0])
        if not (_BY_SECONDS.fullmatch(video_id) or _BY_MILLISECONDS.fullmatch(video_id)):
            detail = f"must be ID_SSSSSS or ID_STARTMS_ENDMS: {excerpt(cells[0])}"
            raise InvalidRow(RejectReason.BAD_VIDEO_ID, detail)
    else:
        raise InvalidRow(RejectReason.WRONG_COLUMNS, f"must have 4, 2 or 1 cells, got {len(cells)}")
    label = text_of(cells[-2 if len(cells) == 4 else -1], "label") if len(cells) > 1 else ""
    return AnnotationRow(video_id=video_id, split=split, labels=(label,) if label else ())


def vggsound_name(stem: str) -> str:
    """One name for a clip under both namings: `{id}_{start:06d}`. Any other stem is returned as it is.

    Ids may contain `_` and `-` and are 11 characters long, so it is the length that separates id and start.
    """
    match = _BY_MILLISECONDS.fullmatch(stem)
    if match and int(match[2]) % 1000 == 0 and int(match[2]) < int(match[3]):
        return f"{match[1]}_{int(match[2]) // 1000:06d}"
    return stem


def youtube_source(name: str) -> str:
    """The YouTube id in a clip's name; "" for a name that has none."""
    match = _YOUTUBE_NAME.match(name)
    return match[1] if match else ""


# --- MUSIC-AVQA ---------------------------------------------------------------------------------------


def music_avqa_row(record: object, split: str) -> AnnotationRow:
    """One question about one video, its template filled in."""
    record = record_of(record)
    video = key_of(record, "video_id")
    if isinstance(video, int) and not isinstance(video, bool):
        video = f"{video:08d}"
    video_id = file_name(video)
    if _deleted(record.get("question_deleted")):
        return AnnotationRow(video_id=video_id, split=split, deleted=True)
    question = AnnotatedQuestion(
        question_id=optional_id(record.get("question_id")),
        text=_fill_template(key_of(record, "question_content"), record.get("templ_values")),
        type=_question_type(key_of(record, "type")),
        answer=answer_of(key_of(record, "anser", "answer")),  # the published files say `anser`
    )
    return AnnotationRow(video_id=video_id, split=split, question=question)


def music_avqa_source(video_id: str) -> str:
    """The recording behind a MUSIC-AVQA video.

    A `_flip` video is the mirrored one. The synthetic videos esa, eva and evv carry the number of the
    real video they were made from: all 654 of those numbers are real videos (569 of the 831 other
    numbers in their range are), and a pair shares 0.55 to 0.69 of the instruments its questions name
    against 0.10 for a random pair. The numbers of sa, va and vv refer to no other video.
    """
    while video_id.endswith(_FLIPPED):
        video_id = video_id.removesuffix(_FLIPPED)
    derived = _DERIVED.fullmatch(video_id)
    return derived[1] if derived else video_id


def _fill_template(template: object, values: object) -> str:
    """The template with its slots filled in order."""
    template = text_of(template, "question")
    if not template:
        raise InvalidRow(RejectReason.NO_QUESTION, "the question is blank")
    fillers = [answer_of(value) for value in json_list(values, RejectReason.BAD_TEMPLATE, "templ_values")]
    start, *rest = _SLOT.split(template)
    if len(rest) != len(fillers):
        detail = f"{len(rest)} slots, {len(fillers)} values: {excerpt(template)}"
        raise InvalidRow(RejectReason.BAD_TEMPLATE, detail)
    return start + "".join(filler + text for filler, text in zip(fillers, rest, strict=True))


def _question_type(value: object) -> str:
    """`["Audio-Visual", "Counting"]`, a list or the JSON text of one, as `Audio-Visual/Counting`."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        words = [value]
    else:
        words = json_list(value, RejectReason.BAD_TYPE, "type")
    parts = [text_of(word, "type") for word in words]
    if not parts or not all(parts):
        raise InvalidRow(RejectReason.BAD_TYPE, f"must be a list of words: {excerpt(value)}")
    return "/".join(parts)


def _deleted(flag: object) -> bool:
    text = str(flag).strip().lower()
    if text in {"none", "nan", "", "0", "0.0", "false"}:
        return False
    if text in {"1", "1.0", "true"}:
        return True
    raise InvalidRow(RejectReason.BAD_DELETED_FLAG, f"question_deleted must be 0 or 1: {excerpt(flag)}")


# --- AVQA ---------------------------------------------------------------------------------------------


def avqa_row(record: object, split: str) -> AnnotationRow:
    """One question with up to four choices about one VGGSound clip.

    `answer` is an index into `multi_choice`; re-splits of the dataset write the answer out, and omit the
    choices where the question is open.
    """
    record = record_of(record)
    video_id = vggsound_name(os.path.splitext(file_name(key_of(record, "video_name")))[0])
    if not (_BY_SECONDS.fullmatch(video_id) or _NO_START.fullmatch(video_id)):
        raise InvalidRow(RejectReason.BAD_VIDEO_ID, f"must be ID_SSSSSS: {excerpt(record['video_name'])}")
    question = text_of(record.get("question_text") or "", "question")
    if not question:
        raise InvalidRow(RejectReason.NO_QUESTION, "question_text is missing or blank")
    choices = choices_of(record.get("multi_choice"))
    if len(choices) > AVQA_CHOICES:
        raise InvalidRow(RejectReason.BAD_CHOICES, f"must be at most {AVQA_CHOICES}, got {len(choices)}")
    answer, index = match_answer(key_of(record, "answer"), choices)
    annotated = AnnotatedQuestion(
        question_id=optional_id(record.get("id")),
        text=question,
        type=text_of(record.get("question_type") or "", "type"),
        answer=answer,
        choices=choices,
        answer_index=index,
    )
    label = text_of(record.get("label") or "", "label")
    return AnnotationRow(video_id=video_id, split=split, labels=(label,) if label else (), question=annotated)


def has_no_start(video_id: str) -> bool:
    """Whether an AVQA name gives only the source of its clip (`{id}_trimmed`)."""
    return _NO_START.fullmatch(video_id) is not None


# --- a user's own questions about a folder ------------------------------------------------------------

FOLDER_COLUMNS = ("video", "question", "answer", "split", "type", "choices", "question_id", "labels")


def folder_row(record: object, split: str) -> AnnotationRow:
    """A row with `FOLDER_COLUMNS`. Only `video` is required.

    `choices` and `labels` are a JSON list, or text with `|` between the items. `answer` is text, one of
    the choices where there are any, or (JSON only) the index of one. A row without question, answer and
    choices only gives its video a split or labels.
    """
    record = record_of(record)
    if unknown := [key for key in record if key not in FOLDER_COLUMNS]:
        detail = f"unknown key {excerpt(unknown[0])}; known: {', '.join(FOLDER_COLUMNS)}"
        raise InvalidRow(RejectReason.WRONG_COLUMNS, detail)
    row_split = record.get("split")
    labels = tuple(label for label in choices_of(record.get("labels")) if label)
    question = text_of(record.get("question") or "", "question")
    answer, choices = record.get("answer"), choices_of(record.get("choices"))
    blank = answer is None or answer == ""
    annotated = None
    if question:
        answer_text, index = ("", -1) if blank else match_answer(answer, choices)
        annotated = AnnotatedQuestion(
            question_id=optional_id(record.get("question_id")),
            text=question,
            type=text_of(record.get("type") or "", "type"),
            answer=answer_text,
            choices=choices,
            answer_index=index,
        )
    elif not blank or choices:
        raise InvalidRow(RejectReason.NO_QUESTION, "an answer or choices, but no question")
    return AnnotationRow(
        video_id=relative_path(key_of(record, "video")),
        split=(parse_split(row_split, strict=False) if row_split else "") or split,
        labels=labels,
        question=annotated,
    )
