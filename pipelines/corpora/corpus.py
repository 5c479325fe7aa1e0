"""What a corpus is: clip rows, question rows, and an account of every annotation row.

A `Corpus` makes two passes over the same rows. `clips()` gives each clip once, however many rows name
it; `questions()` gives each question once. Every row ends as one of those or in a counter of `Tally`.

A clip's split is the first of train, val, test that any of its rows is in (MUSIC-AVQA and AVQA split by
question, so one clip may be in several): a clip with a training question belongs to the train bank.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from r2scp.pipelines.corpora.media_tree import Counted, MediaTree, NameIndex
from r2scp.pipelines.corpora.readers import NumberedRows, wrong_file
from r2scp.pipelines.corpora.rows import AnnotationRow
from r2scp.pipelines.corpora.values import WRONG_FILE_REASONS, RejectReason, InvalidRow, excerpt
from r2scp.store.errors import CorpusError

FIRST_REJECTS = 100  # kept word by word; all are counted
WRONG_FILE_ROWS = 100  # a file whose first 100 rows, or all of them if fewer, do not fit is another file
_BANK_ORDER = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRow:
    """One clip that an annotation file or a folder names. `uri`: absolute path, "" if not on the disk."""

    clip_id: str
    corpus: str
    video_id: str
    source_id: str
    split: str
    labels: tuple[str, ...]
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionRow:
    """One question about one clip. A choice that is missing is None; `answer_index` is -1 without choices."""

    question_id: str
    clip_id: str
    corpus: str
    split: str
    question: str
    type: str
    answer: str
    choices: tuple[str | None, ...]
    answer_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """One annotation row that could not be used. `row` counts from 1: a line, or an element of a list."""

    file: str
    row: int
    reason: RejectReason
    detail: str  # safe to print


@dataclass
class Tally:
    """What one pass over a corpus saw. Complete once the pass is."""

    rows: int = 0  # of the annotation files
    clips: int = 0  # given by `clips()`
    questions: int = 0  # given by `questions()`
    repeats: int = 0  # rows with a new question about a clip already named (`clips()`)
    no_question: int = 0  # rows that name a clip and ask nothing (`questions()`)
    duplicates: int = 0  # rows that ask again what was asked, or name a clip again and ask nothing
    deleted: int = 0  # rows that the dataset's makers took back
    unannotated: int = 0  # clips that are on the disk and in no row (`folder`)
    missing_files: int = 0  # clips given with uri ""
    ambiguous_files: int = 0  # clips for which several files stand; the video, or the first path, is taken
    rejects: Counter[RejectReason] = field(default_factory=Counter)
    first_rejects: list[Reject] = field(default_factory=list)

    @property
    def unaccounted(self) -> int:
        """Rows that became nothing and are in no counter: 0 after every complete pass."""
        named = self.clips - self.unannotated
        counted = self.repeats + self.no_question + self.duplicates + self.deleted + self.rejects.total()
        return self.rows - named - self.questions - counted

    def reject(self, reject: Reject) -> None:
        self.rejects[reject.reason] += 1
        if len(self.first_rejects) < FIRST_REJECTS:
            self.first_rejects.append(reject)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one dataset publishes its annotations."""

    expects: str  # in words, for errors
    read: Callable[[Path, str], NumberedRows]
    parse: Callable[[object, str], AnnotationRow]
    source_of: Callable[[str], str]
    name_of: Callable[[str], str]  # the video id that a media file's stem stands for
    split_of: Callable[[Path], str]  # the split a file's name speaks of; "" none
    usual: tuple[tuple[str, ...], ...] = ()  # sets of files looked for unasked; the first that is there
    startless: Callable[[str], bool] | None = None  # ids that name a source, but no start in it


@dataclass(frozen=True, kw_only=True)
class AnnotationFile:
    """One annotation file and the split that rows without one of their own are in."""

    path: Path
    split: str


class Corpus:
    """One dataset: annotation files and the media below a root. Both passes can be made again and again.

    `clip_tally` and `question_tally` belong to the latest pass of each kind; both see every row, so they
    hold the same rejects. Picklable.
    """

    def __init__(self, name: str, layout: Format, files: Sequence[AnnotationFile], tree: MediaTree) -> None:
        self.name = name
        self.files = tuple(files)
        self.tree = tree
        self.clip_tally = Tally()
        self.question_tally = Tally()
        self._format = layout

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.tree, self._format.name_of)

    @cached_property
    def _only_clip(self) -> dict[str, str]:
        """Source -> the name of its clip, of sources with one clip on the disk."""
        return self._index.by_group(self._format.source_of)

    @property
    def ignored(self) -> Counted:
        """Entries below the root that are no media, or hidden."""
        return self.tree.ignored

    def clips(self) -> Iterator[ClipRow]:
        """Each clip once, in the order in which the rows first name them.

        Raises `CorpusError` where an annotation file is something else altogether.
        """
        tally = self.clip_tally = Tally()
        for video_id, (split, labels) in self._named(tally).items():
            name = self._name_on_disk(video_id)
            tally.ambiguous_files += self._index.has_several(name)
            yield self._clip(tally, video_id, split, labels, self._index.find(name))

    def questions(self) -> Iterator[QuestionRow]:
        """Each question once, in the order of the rows. Raises as `clips` does."""
        tally = self.question_tally = Tally()
        for row, question_id in self._accepted(tally):
            if row.asked is None:
                tally.no_question += 1
                continue
            tally.questions += 1
            yield QuestionRow(
                question_id=f"{self.name}/{question_id}",
                clip_id=f"{self.name}/{row.video_id}",
                corpus=self.name,
                split=row.split,
                question=row.asked.question,
                type=row.asked.type,
                answer=row.asked.answer,
                choices=row.asked.choices,
                answer_index=row.asked.answer_index,
            )

    def _clip(self, tally: Tally, video_id: str, split: str, labels: tuple[str, ...], uri: str) -> ClipRow:
        tally.clips += 1
        tally.missing_files += not uri
        return ClipRow(
            clip_id=f"{self.name}/{video_id}",
            corpus=self.name,
            video_id=video_id,
            source_id=self._format.source_of(video_id),
            split=split,
            labels=labels,
            uri=uri,
        )

    def _name_on_disk(self, video_id: str) -> str:
        startless = self._format.startless
        if startless and startless(video_id) and not self._index.find(video_id):
            return self._only_clip.get(self._format.source_of(video_id), video_id)
        return video_id

    def _named(self, tally: Tally) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Video id -> (split, labels) of all its rows together. Equal pairs share one object."""
        named: dict[str, tuple[str, tuple[str, ...]]] = {}
        shared: dict[tuple[str, tuple[str, ...]], tuple[str, tuple[str, ...]]] = {}
        for row, _ in self._accepted(tally):
            said = row.split, row.labels
            if known := named.get(row.video_id):
                tally.repeats += row.asked is not None
                tally.duplicates += row.asked is None
                split = min(known[0], row.split, key=_bank_rank)
                said = split, (*known[1], *(label for label in row.labels if label not in known[1]))
            named[row.video_id] = shared.setdefault(said, said)
        return named

    def _accepted(self, tally: Tally) -> Iterator[tuple[AnnotationRow, str]]:
        """Rows that are sound, with their question's id ("" without a question)."""
        asked_before: dict[str, tuple[str, str]] = {}
        for file in self.files:
            before, misfits, first = tally.rows, 0, None
            for number, value in self._format.read(file.path, self._format.expects):
                tally.rows += 1
                try:
                    row = self._sound(value, file)
                    question_id = _question_id(row, asked_before)
                except InvalidRow as fault:
                    reject = Reject(file=str(file.path), row=number, reason=fault.reason, detail=fault.detail)
                    tally.reject(reject)
                    misfits += fault.reason in WRONG_FILE_REASONS
                    first = first or reject
                    if misfits == tally.rows - before == WRONG_FILE_ROWS:
                        break
                    continue
                if row.deleted:
                    tally.deleted += 1
                elif question_id is None:
                    tally.duplicates += 1
                else:
                    yield row, question_id
            if first and misfits == tally.rows - before:
                why = f"row {first.row}: {first.reason.value}: {first.detail}"
                came = f"{misfits} rows of which none fits; {why}"
                raise wrong_file(file.path, self._format.expects, came)
            if tally.rows == before:
                raise wrong_file(file.path, self._format.expects, "a file without a single row")

    def _sound(self, value: object, file: AnnotationFile) -> AnnotationRow:
        """What one row says. Raises `RowFault`."""
        if isinstance(value, InvalidRow):
            raise value
        row = self._format.parse(value, file.split)
        if not row.split:
            must = "its name must say train, val or test"
            raise CorpusError(
                f"{excerpt(str(file.path), 300)}: rows without a split, so {must}; rename the file"
            )
        return row


def _bank_rank(split: str) -> tuple[int, str]:
    return (_BANK_ORDER.index(split) if split in _BANK_ORDER else len(_BANK_ORDER)), split


def _question_id(row: AnnotationRow, asked_before: dict[str, tuple[str, str]]) -> str | None:
    """The id of the row's question; "" where it asks nothing, None where it was asked before.

    A published id that stands for two different questions is told apart by the second's content. Raises
    `RowFault` where a question comes again with another answer: one of the two is wrong, and which one
    the file does not say (the first is kept).
    """
    if row.asked is None or row.deleted:
        return ""
    asked = row.asked
    content = json.dumps([row.video_id, asked.type, asked.question, asked.choices]).encode()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    said = (digest, asked.answer)
    for question_id in (asked.question_id or f"~{digest}", f"{asked.question_id}~{digest}"):
        known = asked_before.setdefault(question_id, said)
        if known is said:
            return question_id
        if known == said:
            return None
        if known[0] == digest:
            detail = f"question {excerpt(question_id)}: {excerpt(known[1])}, then {excerpt(asked.answer)}"
            raise InvalidRow(RejectReason.CONFLICTING_ANSWER, detail)
    raise InvalidRow(RejectReason.CONFLICTING_ANSWER, f"question {excerpt(asked.question_id)} stands for several")
