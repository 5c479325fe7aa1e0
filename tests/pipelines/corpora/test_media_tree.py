"""Proves that one walk finds all media and nothing else, ends in every tree, always picks the same file."""

import os
from pathlib import Path

import pytest

from r2scp.pipelines.corpora.media_tree import NameIndex, walk
from r2scp.store.errors import CorpusError


def tree_of(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_media_of_any_kind_and_case_in_order_and_the_rest_counted(tmp_path):
    tree_of(
        tmp_path,
        "b/2.MP4",
        "b/1.mkv",
        "a.flac",
        "a b/ü #1.webm",
        "s.png",
        ".hidden/x.mp4",
        "b/.y.mp4",
        "notes.txt",
    )
    tree = walk(tmp_path)
    assert tree.files == ["a b/ü #1.webm", "a.flac", "b/1.mkv", "b/2.MP4", "s.png"]
    assert tree.ignored.count == 3
    assert set(tree.ignored.examples) == {".hidden", "b/.y.mp4", "notes.txt"}
    assert all(os.path.isfile(tree.uri(file)) and os.path.isabs(tree.uri(file)) for file in tree.files)


def test_links_are_followed_and_loops_end(tmp_path):
    outside = tree_of(tmp_path / "outside", "o.mp4")
    root = tree_of(tmp_path / "root", "z/deep/clip.mp4")
    (root / "z/deep/up").symlink_to(root, target_is_directory=True)
    (root / "a-link-to-z").symlink_to(root / "z", target_is_directory=True)
    (root / "far").symlink_to(outside, target_is_directory=True)
    (root / "far-again").symlink_to(outside, target_is_directory=True)
    (root / "self.mp4").symlink_to(root / "self.mp4")
    (root / "dangling.mp4").symlink_to(root / "nowhere.mp4")
    tree = walk(root)
    assert tree.files == ["far/o.mp4", "z/deep/clip.mp4"]  # each folder once, under its own name first
    assert set(tree.ignored.examples) == {"self.mp4", "dangling.mp4"}


def test_pipes_are_not_media_and_foul_names_are_kept_apart(tmp_path):
    tree_of(tmp_path, "good.mp4", "new\nline.mp4")
    (tmp_path / os.fsdecode(b"latin-\xe9.mp4")).touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    tree = walk(tmp_path)
    assert tree.files == ["good.mp4"]
    assert tree.ignored.examples == ["pipe.mp4"]
    assert sorted(tree.unusable.examples) == ["latin-\\udce9.mp4", "new\\nline.mp4"]


def test_a_video_stands_before_a_sound_then_the_first_path_and_a_still_for_nothing(tmp_path):
    tree = walk(tree_of(tmp_path, "a/x.wav", "b/x.mp4", "c/x.mp4", "x.jpg", "only.jpg", "y.mp3"))
    index = NameIndex(tree, str)
    assert index.find("x") == str(tmp_path / "b/x.mp4")
    assert index.is_ambiguous("x")
    assert index.find("y") == str(tmp_path / "y.mp3")
    assert not index.is_ambiguous("y")
    assert index.find("only") == index.find("../x") == index.find(str(tmp_path / "y")) == ""


def test_a_root_without_media_is_one_clear_error(tmp_path):
    tree_of(tmp_path, "empty/readme.txt", "file.mp4")
    for root in ("absent", "empty", "file.mp4"):
        with pytest.raises(CorpusError, match="must "):
            walk(tmp_path / root)
