"""What the values of an annotation row may be, and why a row is rejected.

Everything here comes from outside: a value becomes plain text, a list or an id, or raises `InvalidRow`.
"""

import json
import re
from enum import StrEnum
from pathlib import Path

EXCERPT_LENGTH = 80  # characters of foreign text in one message
MAX_TEXT = 4096  # characters of a question, answer or label
MAX_ID = 256  # characters; file systems allow 255 bytes for a name

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and lone surrogates, which no table can hold
_SPLIT_WORDS = {
    "train": r"train(?:ing)?",
    "val": r"val(?:id(?:ation)?)?|dev",
    "test": r"test(?:ing)?|eval(?:uation)?",
}


class RejectReason(StrEnum):
    """Why one annotation row could not be used: a fixed vocabulary."""

    NOT_JSON = "not_json"  # a line that is no JSON value
    NOT_CSV = "not_csv"  # quotes that do not close
    NOT_AN_OBJECT = "not_an_object"  # a JSON value without keys
    WRONG_COLUMNS = "wrong_columns"  # more or fewer cells, or other keys, than the format has
    MISSING_KEY = "missing_key"  # a required key
    BAD_VIDEO_ID = "bad_video_id"  # an id that no file could have, or that points elsewhere
    BAD_START = "bad_start"  # a start that is not a whole number of seconds
    BAD_SPLIT = "bad_split"  # neither train, nor val, nor test
    BAD_TEXT = "bad_text"  # control characters, broken UTF-8, too long, or no text at all
    BAD_TYPE = "bad_type"  # a question type that is not a list of words
    BAD_TEMPLATE = "bad_template"  # template values that are not a list, or too many or few of them
    BAD_CHOICES = "bad_choices"  # choices that are not a list, none of them text, or too many
    BAD_ANSWER = "bad_answer"  # no answer, or one that is not among the choices
    NO_QUESTION = "no_question"  # an answer without a question
    BAD_DELETED_FLAG = "bad_deleted_flag"  # neither kept nor deleted
    CONFLICTING_ANSWER = "conflicting_answer"  # the same question again with another answer
    AMBIGUOUS_VIDEO = "ambiguous_video"  # a bare name that several files have


#: Reasons that a file of another kind gives on its every row.
WRONG_FILE_REASONS = frozenset(
    {
        RejectReason.NOT_JSON,
        RejectReason.NOT_CSV,
        RejectReason.NOT_AN_OBJECT,
        RejectReason.WRONG_COLUMNS,
        RejectReason.MISSING_KEY,
        RejectReason.BAD_VIDEO_ID,
    }
)


class InvalidRow(Exception):
    """One annotation row that cannot be used."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


def excerpt(value: object, limit: int = EXCERPT_LENGTH) -> str:
    """Foreign text made safe to print: one line, no control characters, at most `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    cut = text[:limit] + ("…" if len(text) > limit else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def parse_split(value: object, strict: bool = True) -> str:
    """train, val or test, however it is spelt; any other word as it is unless `strict`."""
    word = word_of(value, "split", RejectReason.BAD_SPLIT).lower()
    for split, spellings in _SPLIT_WORDS.items():
        if re.fullmatch(spellings, word):
            return split
    if strict or not re.fullmatch(r"[\w-]{1,64}", word):
        raise InvalidRow(RejectReason.BAD_SPLIT, f"must be train, val or test: {excerpt(word)}")
    return word


def split_from_name(path: Path) -> str:
    """The split in a file's name (`avqa-train.json`, `AStest.csv`); "" where it has none or several."""
    for stem in (path.stem, path.stem.lower()):
        splits = [s for s, word in _SPLIT_WORDS.items() if re.search(rf"(?<![a-z])(?:{word})(?![a-z])", stem)]
        if splits:
            return splits[0] if len(splits) == 1 else ""
    return ""


def text_of(value: object, what: str) -> str:
    """One line of text, blanks collapsed, a full-width question mark made plain. Numbers become text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:  # not NaN
        return str(value)
    if not isinstance(value, str):
        raise InvalidRow(RejectReason.BAD_TEXT, f"{what} must be text, got {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise InvalidRow(
            RejectReason.BAD_TEXT, f"{what} has more than {MAX_TEXT} characters: {excerpt(value)}"
        )
    text = " ".join(value.replace("\N{FULLWIDTH QUESTION MARK}", "?").split())
    if _CONTROL.search(text):
        detail = f"{what} holds control characters or broken UTF-8: {excerpt(text)}"
        raise InvalidRow(RejectReason.BAD_TEXT, detail)
    return text


def choices_of(value: object) -> tuple[str | None, ...]:
    """Choices in order; null and blank ones, which the datasets hold, as None."""
    if value is None or value == "":
        return ()
    if isinstance(value, str) and not value.lstrip().startswith("["):
        items: list[object] = list(value.split("|"))
    else:
        items = json_list(value, RejectReason.BAD_CHOICES, "choices")
    return tuple(None if item is None else text_of(item, "choice") or None for item in items)


def match_answer(answer: object, choices: tuple[str | None, ...]) -> tuple[str, int]:
    """(answer, its index); `answer` is the index or the text of one of the choices."""
    if not choices:
        return answer_of(answer), -1
    if not any(choices):
        raise InvalidRow(RejectReason.BAD_CHOICES, "none of the choices is text")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        chosen = choices[answer] if 0 <= answer < len(choices) else None
        if chosen is None:
            detail = f"no choice has index {excerpt(answer)} among {len(choices)}"
            raise InvalidRow(RejectReason.BAD_ANSWER, detail)
        return chosen, answer
    text = answer_of(answer)
    if text not in choices:
        raise InvalidRow(RejectReason.BAD_ANSWER, f"not among the choices: {excerpt(text)}")
    return text, choices.index(text)


def file_name(value: object) -> str:
    """An id that can only be the name of one file: no folder, no `..`, no control characters."""
    name = word_of(value, "video id")
    if not name or len(name) > MAX_ID or "/" in name or "\\" in name or name.startswith("."):
        detail = f"must be the name of a file without folders: {excerpt(name)}"
        raise InvalidRow(RejectReason.BAD_VIDEO_ID, detail)
    return name


def relative_path(value: object) -> str:
    """A path below the corpus's root, with `/` between its parts."""
    path = word_of(value, "video").replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or path.startswith("/") or re.match(r"[A-Za-z]:", path):
        raise InvalidRow(RejectReason.BAD_VIDEO_ID, f"must be a path below the root: {excerpt(path)}")
    if len(path) > MAX_TEXT:
        raise InvalidRow(RejectReason.BAD_VIDEO_ID, f"has more than {MAX_TEXT} characters: {excerpt(path)}")
    return "/".join(parts)


def word_of(value: object, what: str, reason: RejectReason = RejectReason.BAD_VIDEO_ID) -> str:
    """Text without control characters, stripped of surrounding blanks."""
    if not isinstance(value, str):
        raise InvalidRow(reason, f"{what} must be text, got {excerpt(value)}")
    if _CONTROL.search(value):
        raise InvalidRow(reason, f"{what} holds control characters or broken UTF-8: {excerpt(value)}")
    return value.strip()


def optional_id(value: object) -> str:
    if value is None or value == "" or value != value:  # NaN: a gap in a table
        return ""
    if isinstance(value, float) and value.is_integer():  # 12.0: a table with gaps
        value = int(value)
    return text_of(value, "question id")


def answer_of(value: object) -> str:
    if isinstance(value, (bool, list, dict)):
        raise InvalidRow(RejectReason.BAD_ANSWER, f"must be text or a number: {excerpt(value)}")
    text = text_of(value, "answer")
    if not text:
        raise InvalidRow(RejectReason.BAD_ANSWER, "the answer is blank")
    return text


def json_list(value: object, reason: RejectReason, what: str) -> list[object]:
    """A list, or the JSON text of one; missing and blank are the empty list."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise InvalidRow(reason, f"{what} must be a JSON list: {excerpt(value)}") from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRow(reason, f"{what} must be a list: {excerpt(value)}")
    return value


def record_of(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InvalidRow(RejectReason.NOT_AN_OBJECT, f"must be an object with keys: {excerpt(value)}")
    return value


def cells_of(value: object) -> list[str]:
    if not isinstance(value, list):
        raise InvalidRow(RejectReason.WRONG_COLUMNS, f"must be cells: {excerpt(value)}")
    return value


def key_of(record: dict[str, object], *names: str) -> object:
    """The value of the first of `names` that the record has."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    detail = f"no {' or '.join(names)} in a row with keys {excerpt(list(record))}"
    raise InvalidRow(RejectReason.MISSING_KEY, detail)
