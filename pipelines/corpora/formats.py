"""The five corpora: `vggsound`, `music-avqa`, `avqa`, `folder`, `demo`.

::

    corpus = open_corpus("music-avqa", Path("videos"), [Path("json_update/avqa-test.json")])
    for clip in corpus.clips(): ...          # each clip once, whatever number of rows name it
    for question in corpus.questions(): ...
    corpus.clip_tally.missing_files, corpus.question_tally.rejects

`clip_id` is `{corpus}/{video_id}` and `question_id` is `{corpus}/{published id}`; a question without an
id gets one from its content, the same on every run. `source_id` is what the leak guard compares: the
YouTube id for VGGSound and AVQA, whose clips are cut from the same videos; see `music_avqa_source` for
MUSIC-AVQA and the demo corpus, which is written in its format; for a folder the clip itself.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from r2scp.pipelines.corpora.corpus import (
    AnnotationFile,
    Corpus,
    Format,
)
from r2scp.pipelines.corpora.folder import FolderCorpus
from r2scp.pipelines.corpora.media_tree import walk
from r2scp.pipelines.corpora.readers import NumberedRows, csv_lines, csv_records, json_rows
from r2scp.pipelines.corpora.rows import (
    FOLDER_COLUMNS,
    avqa_row,
    folder_row,
    has_no_start,
    music_avqa_row,
    music_avqa_source,
    vggsound_name,
    vggsound_row,
    youtube_source,
)
from r2scp.pipelines.corpora.values import InvalidRow, RejectReason, excerpt, parse_split, split_from_name
from r2scp.store.errors import CorpusError, UsageError

__all__ = ["CORPORA", "Corpus", "RejectReason", "open_corpus"]

SEARCH_DEPTH = 2  # levels of folders below a root that are searched for annotation files
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})


def _unchanged(name: str) -> str:
    return name


def _no_split(path: Path) -> str:
    return ""


def _avqa_split(path: Path) -> str:
    """AVQA published two files; papers report its `val_qa.json` as test."""
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
    name_of=_unchanged,
    split_of=split_from_name,
    default_files=(
        tuple(f"json_update/{name}" for name in _AVQA_FILES),  # corrected by the authors
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
        default_files=(
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
        default_files=(("train_qa.json", "val_qa.json"),),
        has_no_start=has_no_start,
    ),
    "folder": Format(
        expects=f"JSON lines, or CSV with a header, of some of the columns {', '.join(FOLDER_COLUMNS)}",
        read=_folder_rows,
        parse=folder_row,
        source_of=_unchanged,
        name_of=_unchanged,
        split_of=_no_split,
    ),
    "demo": _MUSIC_AVQA,
}
CORPORA = tuple(_FORMATS)


def open_corpus(
    kind: str, root: Path, annotations: Sequence[Path] = (), split: str = "", name: str = ""
) -> Corpus:
    """A corpus of a `kind` with its media below `root`. `name`: prefix of its clip ids, by default the kind.
    Two folders in one store need different names.

    `annotations` are files, or folders to search for the dataset's usual files; without any, `root` is
    searched (a folder corpus needs none). `split` applies to rows and files that have none; without it a
    folder's clips are in train, and elsewhere the file's name decides.

    Raises `UsageError` for an invalid name or split, `CorpusError` where the root holds no media or an
    annotation file is missing or of another kind.
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
    # Before the walk, which can take minutes: a wrong file should be reported at once.
    for path in _annotation_files(kind, layout, root, annotations):
        file_split = (split or "train") if kind == "folder" else (split or layout.split_of(path))
        files.append(AnnotationFile.read(path, layout, file_split))
    tree = walk(root)
    if kind == "folder":
        return FolderCorpus(name, layout, files, tree, split or "train")
    return Corpus(name, layout, files, tree)


def _annotation_files(kind: str, layout: Format, root: Path, named: Sequence[Path]) -> Iterator[Path]:
    """The files that the user named, and the usual files in the folders that the user named."""
    for path in named or (() if kind == "folder" else (root,)):
        if not path.is_dir():
            yield path
        elif not layout.default_files:
            raise CorpusError(f"{excerpt(str(path), 300)}: must be {layout.expects}; got a folder")
        else:
            yield from _default_files(kind, layout, path)


def _default_files(kind: str, layout: Format, base: Path) -> list[Path]:
    """The first of the layout's sets of files that is in `base` or not far below it, even in part."""
    folders = list(_folders(base, SEARCH_DEPTH))
    for names in layout.default_files:
        for folder in folders:
            if files := [folder / name for name in names if (folder / name).is_file()]:
                return files
    expected = "; ".join(", ".join(names) for names in layout.default_files)
    raise CorpusError(
        f"{excerpt(str(base), 300)}: no {kind} annotations in it or {SEARCH_DEPTH} levels of folders below; "
        f"expected {expected}; name the files with --annotations"
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
    except OSError:  # no permission to read it
        return []
    return [
        folder / entry.name for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry)
    ]
