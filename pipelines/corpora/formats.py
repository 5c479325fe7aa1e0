"""The five corpora: `vggsound`, `music-avqa`, `avqa`, `folder`, `demo`.

::

    corpus = open_corpus("music-avqa", Path("videos"), [Path("json_update/avqa-test.json")])
    for clip in corpus.clips(): ...          # each clip once, whatever number of rows name it
    for question in corpus.questions(): ...
    corpus.clip_tally.missing_files, corpus.question_tally.rejects

`clip_id` is `{corpus}/{video_id}` and `question_id` is `{corpus}/{published id}`; a question without an
id gets one from its content, the same on every run. `source_id` is what the leak guard compares: the
YouTube id for VGGSound and AVQA, whose clips are cut from the same videos; for MUSIC-AVQA and the demo
corpus, which is written in its format, see `music_avqa_source`; for a folder the clip itself.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from r2scp.pipelines.corpora.corpus import AnnotationFile, ClipRow, Corpus, Format, QuestionRow, Reject, Tally
from r2scp.pipelines.corpora.folder import FolderCorpus
from r2scp.pipelines.corpora.media_tree import walk
from r2scp.pipelines.corpora.readers import NumberedRows, csv_lines, csv_records, json_rows
from r2scp.pipelines.corpora.rows import (
    FOLDER_COLUMNS,
    avqa_row,
    folder_row,
    is_startless,
    music_avqa_row,
    music_avqa_source,
    vggsound_name,
    vggsound_row,
    youtube_source,
)
from r2scp.pipelines.corpora.values import RejectReason, InvalidRow, excerpt, split_from_name, parse_split
from r2scp.store.errors import CorpusError, UsageError

__all__ = ["CORPORA", "ClipRow", "Corpus", "QuestionRow", "Reject", "RejectReason", "Tally", "open_corpus"]

SEARCH_DEPTH = 2  # levels of folders below a root in which annotation files are looked for unasked
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})


def _same(name: str) -> str:
    return name


def _no_split(path: Path) -> str:
    return ""


def _avqa_split(path: Path) -> str:
    """AVQA published two files: its `val_qa.json` is what the field reports as test."""
    return "test" if re.match(r"val_qa(?![a-z_])", path.stem) else split_from_name(path)


def _folder_rows(path: Path, expects: str) -> NumberedRows:
    if path.suffix.lower() in JSON_SUFFIXES:
        return json_rows(path, expects)
    return csv_records(path, expects, FOLDER_COLUMNS)


_AVQA_FILES = ("avqa-train.json", "avqa-val.json", "avqa-test.json")
_MUSIC_AVQA = Format(
    expects="a MUSIC-AVQA file: a JSON list of {video_id, type, question_content, templ_values, anser, ...}",
    read=json_rows,
    parse=music_avqa_row,
    source_of=music_avqa_source,
    name_of=_same,
    split_of=split_from_name,
    usual=(
        tuple(f"json_update/{name}" for name in _AVQA_FILES),  # corrected by its makers
        tuple(f"json/{name}" for name in _AVQA_FILES),
        _AVQA_FILES,
    ),
)
_FORMATS = {
    "vggsound": Format(
        expects="a VGGSound file: headerless CSV of `id,start,label,split`, `clip.mp4,label` or clip names",
        read=csv_lines,
        parse=vggsound_row,
        source_of=youtube_source,
        name_of=vggsound_name,
        split_of=split_from_name,
        usual=(
            ("vggsound.csv",),
            ("train.csv", "test.csv"),
            ("vggsound_train.txt", "vggsound_valid.txt", "vggsound_test.txt"),
        ),
    ),
    "music-avqa": _MUSIC_AVQA,
    "avqa": Format(
        expects="an AVQA file: a JSON list of {id, video_name, question_text, multi_choice, answer, ...}",
        read=json_rows,
        parse=avqa_row,
        source_of=youtube_source,
        name_of=vggsound_name,
        split_of=_avqa_split,
        usual=(("train_qa.json", "val_qa.json"),),
        startless=is_startless,
    ),
    "folder": Format(
        expects=f"JSON lines, or CSV with a header, of some of the columns {', '.join(FOLDER_COLUMNS)}",
        read=_folder_rows,
        parse=folder_row,
        source_of=_same,
        name_of=_same,
        split_of=_no_split,
    ),
    "demo": _MUSIC_AVQA,
}
CORPORA = tuple(_FORMATS)


def open_corpus(
    kind: str, root: Path, annotations: Sequence[Path] = (), split: str = "", name: str = ""
) -> Corpus:
    """A corpus of a `kind` with its media below `root`. `name`: what its clips' ids begin with; the kind's
    own where none is given. Two folders in one store need a name each.

    `annotations` are files, or folders in which the dataset's usual files are looked for; without any
    they are looked for below `root` (a folder corpus needs none). `split` is what rows and files that
    name none are in; without it a folder's clips are in train and the file's name decides elsewhere.

    Raises `UsageError` for a name or split that cannot be, `CorpusError` where the root holds no media,
    an annotation file is not there, or its beginning is something else altogether.
    """
    if kind not in _FORMATS:
        raise UsageError(f"corpus must be one of {', '.join(CORPORA)}; got {excerpt(kind)}")
    name = name or kind
    if not NAME.fullmatch(name) or (name != kind and name in _FORMATS):
        raise UsageError(
            f"the name of a corpus must be letters, digits, '.', '_', '-', and no other kind's; got {name!a}"
        )
    if split:
        try:
            split = parse_split(split, strict=False)
        except InvalidRow as fault:
            raise UsageError(f"split {fault.detail}") from fault
    layout = _FORMATS[kind]
    files = []
    for path in _annotation_files(kind, layout, root, annotations):
        next(iter(layout.read(path, layout.expects)), None)  # a wrong file is told before a long walk
        file_split = (split or "train") if kind == "folder" else (split or layout.split_of(path))
        files.append(AnnotationFile(path=path, split=file_split))
    tree = walk(root)
    if kind == "folder":
        return FolderCorpus(name, layout, files, tree, split or "train")
    return Corpus(name, layout, files, tree)


def _annotation_files(name: str, layout: Format, root: Path, given: Sequence[Path]) -> Iterator[Path]:
    """The files named by the user, and those found in the folders named."""
    for path in given or (() if name == "folder" else (root,)):
        if not path.is_dir():
            yield path
        elif not layout.usual:
            raise CorpusError(f"{excerpt(str(path), 300)}: must be {layout.expects}; got a folder")
        else:
            yield from _usual_files(name, layout, path)


def _usual_files(name: str, layout: Format, base: Path) -> list[Path]:
    """The first of the layout's sets of files of which some are in `base` or not far below it."""
    folders = list(_folders(base, SEARCH_DEPTH))
    for names in layout.usual:
        for folder in folders:
            if found := [folder / each for each in names if (folder / each).is_file()]:
                return found
    looked_for = "; ".join(", ".join(names) for names in layout.usual)
    raise CorpusError(
        f"{excerpt(str(base), 300)}: no {name} annotations in it or {SEARCH_DEPTH} levels of folders below; "
        f"looked for {looked_for}; name the files with --annotations"
    )


def _folders(base: Path, depth: int) -> Iterator[Path]:
    """`base` and the folders `depth` levels below it, level by level, each in order of name."""
    yield base
    level = [base]
    for _ in range(depth):
        level = [below for folder in level for below in _subfolders(folder)]
        yield from level


def _subfolders(folder: Path) -> list[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not ours to read
        return []
    return [
        folder / entry.name for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry)
    ]
