"""What a corpus is: clip rows, question rows, and an account of every annotation row.

The annotation files are read once. `clips()` gives each clip once, however many rows name it;
`questions()` gives each question once. Every row ends as one of those or in a counter of `CorpusTally`.

A clip's split is the first of train, val, test that any of its rows is in (MUSIC-AVQA and AVQA split by
question, so one clip may be in several): a clip with a training question belongs to the training bank.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from r2scp.pipelines.corpora.media_tree import CountedNames, MediaTree, NameIndex
from r2scp.pipelines.corpora.readers import NumberedRows, wrong_file
from r2scp.pipelines.corpora.rows import AnnotationRow
from r2scp.pipelines.corpora.values import WRONG_FILE_REASONS, InvalidRow, RejectReason, excerpt
from r2scp.store.errors import CorpusError

MAX_LISTED_REJECTS = 100  # kept with their details; all are counted
WRONG_FILE_ROWS = 100  # a file whose first 100 rows, or all of them if fewer, do not fit is another file
_SPLIT_ORDER = ("train", "val", "test")


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

    @classmethod
    def of(cls, path: Path, row: int, fault: InvalidRow) -> "Reject":
        return cls(file=str(path), row=row, reason=fault.reason, detail=fault.detail)


@dataclass
class CorpusTally:
    """The counts of one pass over a corpus; complete once the pass is."""

    rows: int = 0  # of the annotation files
    clips: int = 0  # given by `clips()`
    questions: int = 0  # given by `questions()`
    repeats: int = 0  # rows with a new question about a clip already named (`clips()`)
    no_question: int = 0  # rows with a clip and no question (`questions()`)
    duplicates: int = 0  # rows that repeat a question, or name a clip again without one
    deleted: int = 0  # rows withdrawn by the dataset's authors
    unannotated: int = 0  # clips on the disk and in no row (`folder`)
    missing_files: int = 0  # clips given with uri ""
    ambiguous_files: int = 0  # clips with several files; the video, or the first path, is taken
    rejects: Counter[RejectReason] = field(default_factory=Counter)
    first_rejects: list[Reject] = field(default_factory=list)

    @property
    def unaccounted(self) -> int:
        """Rows that are in no counter and became nothing: 0 after every complete pass."""
        named = self.clips - self.unannotated
        counted = self.repeats + self.no_question + self.duplicates + self.deleted + self.rejects.total()
        return self.rows - named - self.questions - counted

    def reject(self, reject: Reject) -> None:
        self.rejects[reject.reason] += 1
        if len(self.first_rejects) < MAX_LISTED_REJECTS:
            self.first_rejects.append(reject)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one dataset publishes its annotations."""

    expects: str  # in words, for errors
    read: Callable[[Path, str], NumberedRows]
    parse: Callable[[object, str], AnnotationRow]
    source_of: Callable[[str], str]
    name_of: Callable[[str], str]  # video id of a media file, from its stem
    split_of: Callable[[Path], str]  # the split in a file's name, "" for none
    default_files: tuple[tuple[str, ...], ...] = ()  # sets of files; the first that exists is used
    has_no_start: Callable[[str], bool] | None = None  # ids that name a source but no start in it


@dataclass(frozen=True, kw_only=True)
class AnnotationFile:
    """The rows of one annotation file, numbered as its reader does."""

    path: Path
    rows: list[tuple[int, AnnotationRow | Reject]]

    @classmethod
    def read(cls, path: Path, layout: Format, split: str) -> "AnnotationFile":
        """Read and parse a whole file. `split`: of rows that have none of their own.

        Raises `CorpusError` for a file of another kind.
        """
        rows: list[tuple[int, AnnotationRow | Reject]] = []
        misfits = 0
        for number, value in layout.read(path, layout.expects):
            row = _parse(value, number, path, layout, split)
            rows.append((number, row))
            misfits += isinstance(row, Reject) and row.reason in WRONG_FILE_REASONS
            if misfits == len(rows) == WRONG_FILE_ROWS:
                break
        if not rows:
            raise wrong_file(path, layout.expects, "a file without a single row")
        if misfits == len(rows) and isinstance(first := rows[0][1], Reject):
            why = f"row {first.row}: {first.reason.value}: {first.detail}"
            raise wrong_file(path, layout.expects, f"{misfits} rows of which none fits; {why}")
        return cls(path=path, rows=rows)


def _parse(value: object, number: int, path: Path, layout: Format, split: str) -> AnnotationRow | Reject:
    try:
        if isinstance(value, InvalidRow):
            raise value
        row = layout.parse(value, split)
    except InvalidRow as fault:
        return Reject.of(path, number, fault)
    if not row.split:
        raise CorpusError(
            f"{excerpt(str(path), 300)}: rows without a split, so its name must say train, val or test; "
            "rename the file"
        )
    return row


class Corpus:
    """One dataset: annotation files and the media below a root. Both passes can be made again and again.

    `clip_tally` and `question_tally` belong to the latest pass of each kind; both see every row, so they
    hold the same rejects.
    """

    def __init__(self, name: str, layout: Format, files: Sequence[AnnotationFile], tree: MediaTree) -> None:
        self.name = name
        self.files = tuple(files)
        self.tree = tree
        self.clip_tally = CorpusTally()
        self.question_tally = CorpusTally()
        self._format = layout

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.tree, self._format.name_of)

    @cached_property
    def _only_clip(self) -> dict[str, str]:
        """Source -> the name of its clip, of sources with one clip on the disk."""
        return self._index.unique_by_group(self._format.source_of)

    @property
    def ignored(self) -> CountedNames:
        """Entries below the root that are no media, or hidden."""
        return self.tree.ignored

    def clips(self) -> Iterator[ClipRow]:
        """Each clip once, in the order in which the rows first name them."""
        tally = self.clip_tally = CorpusTally()
        for video_id, (split, labels) in self._clips_by_id(tally).items():
            name = self._name_on_disk(video_id)
            tally.ambiguous_files += self._index.is_ambiguous(name)
            yield self._clip(tally, video_id, split, labels, self._index.find(name))

    def questions(self) -> Iterator[QuestionRow]:
        """Each question once, in the order of the rows."""
        tally = self.question_tally = CorpusTally()
        for row, question_id in self._valid_rows(tally):
            question = row.question
            if question is None:
                tally.no_question += 1
                continue
            tally.questions += 1
            yield QuestionRow(
                question_id=f"{self.name}/{question_id}",
                clip_id=f"{self.name}/{row.video_id}",
                corpus=self.name,
                split=row.split,
                question=question.text,
                type=question.type,
                answer=question.answer,
                choices=question.choices,
                answer_index=question.answer_index,
            )

    def _clip(
        self, tally: CorpusTally, video_id: str, split: str, labels: tuple[str, ...], uri: str
    ) -> ClipRow:
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
        startless = self._format.has_no_start
        if startless and startless(video_id) and not self._index.find(video_id):
            return self._only_clip.get(self._format.source_of(video_id), video_id)
        return video_id

    def _clips_by_id(self, tally: CorpusTally) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Video id -> (split, labels) of all its rows together. Equal pairs share one object."""
        named: dict[str, tuple[str, tuple[str, ...]]] = {}
        shared: dict[tuple[str, tuple[str, ...]], tuple[str, tuple[str, ...]]] = {}
        for row, _ in self._valid_rows(tally):
            merged = row.split, row.labels
            if earlier := named.get(row.video_id):
                tally.repeats += row.question is not None
                tally.duplicates += row.question is None
                split = min(earlier[0], row.split, key=_split_rank)
                merged = split, (*earlier[1], *(label for label in row.labels if label not in earlier[1]))
            named[row.video_id] = shared.setdefault(merged, merged)
        return named

    def _valid_rows(self, tally: CorpusTally) -> Iterator[tuple[AnnotationRow, str]]:
        """Rows that can be used, with their question's id ("" without a question)."""
        answers_by_id: dict[str, tuple[str, str]] = {}
        for file in self.files:
            for number, row in file.rows:
                tally.rows += 1
                if isinstance(row, Reject):
                    tally.reject(row)
                    continue
                try:
                    resolved = self._resolve(row)
                    question_id = _question_id(resolved, answers_by_id)
                except InvalidRow as fault:
                    tally.reject(Reject.of(file.path, number, fault))
                    continue
                if resolved.deleted:
                    tally.deleted += 1
                elif question_id is None:
                    tally.duplicates += 1
                else:
                    yield resolved, question_id

    def _resolve(self, row: AnnotationRow) -> AnnotationRow:
        """The row with the `video_id` that it means. Raises `InvalidRow`."""
        return row


def _split_rank(split: str) -> tuple[int, str]:
    return (_SPLIT_ORDER.index(split) if split in _SPLIT_ORDER else len(_SPLIT_ORDER)), split


def _question_id(row: AnnotationRow, answers_by_id: dict[str, tuple[str, str]]) -> str | None:
    """The id of the row's question; "" where it has none, None where it repeats an earlier row.

    Where two different questions share a published id, the second gets a suffix from its content.
    Raises `InvalidRow` where a question is repeated with another answer: one of the two is wrong, and the
    file does not say which (the first is kept).
    """
    question = row.question
    if question is None or row.deleted:
        return ""
    content = json.dumps([row.video_id, question.type, question.text, question.choices]).encode()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    current = (digest, question.answer)
    for question_id in (question.question_id or f"~{digest}", f"{question.question_id}~{digest}"):
        first = answers_by_id.setdefault(question_id, current)
        if first is current:
            return question_id
        if first == current:
            return None
        if first[0] == digest:
            detail = f"question {excerpt(question_id)}: {excerpt(first[1])}, then {excerpt(question.answer)}"
            raise InvalidRow(RejectReason.CONFLICTING_ANSWER, detail)
    detail = f"question {excerpt(question.question_id)} belongs to several"
    raise InvalidRow(RejectReason.CONFLICTING_ANSWER, detail)
