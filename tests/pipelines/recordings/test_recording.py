"""A recording's digest is that of what was decoded, or it is refused; what cannot be read says why."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from r2scp.pipelines.decoding.decode import DEFAULT_LIMITS, decode
from r2scp.pipelines.media_file import file_digest
from r2scp.pipelines.recordings import recording as module
from r2scp.pipelines.recordings.recording import Recording
from r2scp.store.errors import FailureReason, MediaError


@pytest.fixture
def own(tmp_path: Path, rendered_media: Mapping[str, bytes]) -> Path:
    path = tmp_path / "own.mp4"
    path.write_bytes(rendered_media["both.mp4"])
    return path


def test_the_digest_is_the_files(own: Path) -> None:
    read = Recording.read(str(own), DEFAULT_LIMITS)
    assert read.content_sha256 == hashlib.sha256(own.read_bytes()).hexdigest()


@pytest.mark.parametrize("step", ["decode", "file_digest"])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    own: Path, rendered_media: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    real: Callable = {"decode": decode, "file_digest": file_digest}[step]

    def replace() -> None:
        other = own.with_suffix(".new")
        other.write_bytes(rendered_media["other.mp4"])
        os.replace(other, own)

    def meanwhile(*arguments: object) -> object:
        if when == "before":
            replace()
        result = real(*arguments)
        if when == "behind":
            replace()
        return result

    monkeypatch.setattr(module, step, meanwhile)
    with pytest.raises(MediaError, match="changed while it was read") as caught:
        Recording.read(str(own), DEFAULT_LIMITS)
    assert caught.value.reason is FailureReason.UNREADABLE


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nowhere", "No such file"),
        ("folder", "got a directory"),
        ("fifo", "got a FIFO"),
        ("device", "got a device"),
        ("loop", "symbolic links"),
        ("zero byte", "null"),
        ("long name", "name too long"),
        ("no name of a file", "surrogates"),
    ],
)
def test_what_is_no_file_says_what_it_is(tmp_path: Path, kind: str, says: str) -> None:
    path = tmp_path / "bad.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    odd = {
        "device": "/dev/zero",
        "zero byte": "a\0b.mp4",
        "long name": "a" * 5000,
        "no name of a file": "\ud800.mp4",
    }
    with pytest.raises(MediaError, match=f"(?i){says}") as caught:
        Recording.read(odd.get(kind, str(path)), DEFAULT_LIMITS)
    assert caught.value.reason is FailureReason.UNREADABLE


def test_a_name_that_is_no_text_is_read_all_the_same(own: Path, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    shutil.copy(own, path)
    assert Recording.read(path, DEFAULT_LIMITS).frames is not None
