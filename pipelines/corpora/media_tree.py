"""The media files below a root: one walk, and an index of their names.

Whether a clip is on the disk is decided by the files that the walk listed; no id from an annotation file
ever becomes part of a path.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from r2scp.pipelines.corpora.values import excerpt
from r2scp.store.errors import CorpusError

MAX_LISTED_NAMES = 20  # of entries that are only counted

# fmt: off
VIDEO = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".mxf", ".ogm", ".ogv", ".qt", ".rm", ".ts", ".vob", ".webm", ".wmv",
    ".y4m",
})
AUDIO = frozenset({
    ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".alac", ".amr", ".ape", ".au", ".caf", ".dts",
    ".eac3", ".flac", ".m4a", ".m4b", ".mka", ".mp2", ".mp3", ".oga", ".ogg", ".opus", ".ra",
    ".wav", ".wma", ".wv",
})
STILL = frozenset({
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff",
    ".webp",
})
# fmt: on

_UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, names that are not UTF-8


@dataclass
class CountedNames:
    """A count, and the first few names, safe to print."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.examples) < MAX_LISTED_NAMES:
            self.examples.append(excerpt(name, 300))


@dataclass(frozen=True, kw_only=True)
class MediaTree:
    """The result of one walk. `files`: paths relative to `root`, `/` between parts, sorted."""

    root: str
    files: list[str] = field(default_factory=list)
    #: Hidden entries, other extensions, pipes, dangling links.
    ignored: CountedNames = field(default_factory=CountedNames)
    #: Folders that may not be read.
    unreadable: CountedNames = field(default_factory=CountedNames)
    #: Media whose names hold control characters or are not UTF-8.
    unusable: CountedNames = field(default_factory=CountedNames)

    def uri(self, file: str) -> str:
        """The absolute path of one of `files`."""
        return os.path.join(self.root, file)


def walk(root: Path) -> MediaTree:
    """All media below `root`. Links are followed; each folder is entered once, so loops end.

    Raises `CorpusError` where `root` is not a folder or holds no media at all.
    """
    top = os.path.abspath(root)
    if not os.path.isdir(top):
        got = "a file" if os.path.exists(top) else "nothing"
        raise CorpusError(
            f"{excerpt(str(root), 300)}: must be a folder that holds the media files; got {got}"
        )
    tree = MediaTree(root=top)
    visited: set[tuple[int, int]] = set()
    real, linked = [""], []
    while real or linked:
        # Links come last, so a folder of the tree is listed under its own name and not under a link's.
        folder = real.pop() if real else linked.pop(0)
        try:
            status = os.stat(os.path.join(top, folder))
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(os.path.join(top, folder)), key=lambda entry: entry.name)
        except OSError:
            tree.unreadable.add(folder)
            continue
        for name, is_link in _classify(entries, folder, tree):
            (linked if is_link else real).append(name)
    tree.files.sort()
    if not tree.files:
        ignored = tree.ignored
        got = f"{ignored.count} other entries, such as {ignored.examples[0]}" if ignored.count else "none"
        raise CorpusError(
            f"{excerpt(str(root), 300)}: must hold video or audio files (.mp4, .wav, ...); got {got}"
        )
    return tree


def _classify(entries: list["os.DirEntry[str]"], folder: str, tree: MediaTree) -> Iterator[tuple[str, bool]]:
    """Add one folder's files to `tree`; yields its folders, with whether they are links."""
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if entry.name.startswith(".") or not (is_folder or is_file):
            tree.ignored.add(name)
        elif is_folder:
            yield name, entry.is_symlink()
        elif _extension(name) not in VIDEO | AUDIO | STILL:
            tree.ignored.add(name)
        elif _UNUSABLE.search(name):
            tree.unusable.add(name)
        else:
            tree.files.append(name)


class NameIndex:
    """Which file belongs to a clip's name: a video before a sound file, then the first by path.

    Stills belong to no clip: thumbnails and extracted frames often have a clip's name.
    """

    def __init__(self, tree: MediaTree, name_of: Callable[[str], str]) -> None:
        self._tree = tree
        self._file: dict[str, str] = {}
        self._several: set[str] = set()
        for kind in (VIDEO, AUDIO):
            for file in tree.files:
                if _extension(file) in kind:
                    name = name_of(stem(file))
                    if self._file.setdefault(name, file) is not file:
                        self._several.add(name)

    def find(self, name: str) -> str:
        """The absolute path of the file for `name`; "" where there is none."""
        file = self._file.get(name)
        return self._tree.uri(file) if file else ""

    def is_ambiguous(self, name: str) -> bool:
        return name in self._several

    def unique_by_group(self, group_of: Callable[[str], str]) -> dict[str, str]:
        """Group -> its name, for groups with a single name. Names of group "" are left out."""
        groups: dict[str, str] = {}
        for name in self._file:
            group = group_of(name)
            groups[group] = name if group not in groups else ""
        return {group: name for group, name in groups.items() if group and name}


def stem(file: str) -> str:
    """The name of a file without folders and extension."""
    return os.path.splitext(file.rsplit("/", 1)[-1])[0]


def _extension(file: str) -> str:
    return os.path.splitext(file)[1].lower()
