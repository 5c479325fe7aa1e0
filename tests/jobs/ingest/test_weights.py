"""Proves that weights are found, fetched only with the licence accepted, and refused in one clear line.

The checkpoint that is fetched here is a small file of our own, from a real HTTP server on loopback.
"""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r2scp.jobs.ingest import weights
from r2scp.jobs.ingest.download import RemoteFile, RetryPolicy
from r2scp.jobs.ingest.weights import (
    default_weights_path,
    describe_encoder,
    fetch_weights,
    resolve_encoder,
)
from r2scp.model.imagebind.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.store.errors import EncoderError

SMALL = TowerConfig(width=8, depth=1, heads=2)
COMMAND = "r2scp-pipe weights imagebind-huge --accept-license"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("R2SCP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    path = tmp_path / "served" / "small.safetensors"
    path.parent.mkdir()
    ImageBind(ImageBindConfig(vision=SMALL, audio=SMALL, text=SMALL, dim=4, patch=56, vocabulary=9)).save(
        path
    )
    return path


@pytest.fixture
def served(small_file: Path) -> Iterator[RemoteFile]:
    handler = partial(QuietHandler, directory=str(small_file.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield RemoteFile(
            url=f"http://127.0.0.1:{http.server_port}/{small_file.name}",
            size=small_file.stat().st_size,
            sha256=hashlib.sha256(small_file.read_bytes()).hexdigest(),
        )
        http.shutdown()
        thread.join()


def test_nothing_is_fetched_before_the_licence_is_accepted(served: RemoteFile, home: Path) -> None:
    with pytest.raises(EncoderError) as caught:
        fetch_weights(accept_license=False, remote=served)
    for fact in ("CC BY-NC-SA 4.0", "4.8 GB", COMMAND):
        assert fact in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not home.exists()


def test_accepted_weights_arrive_at_the_default_place_and_load(served: RemoteFile, home: Path) -> None:
    path = fetch_weights(accept_license=True, remote=served)
    assert path == default_weights_path() == home / "imagebind_huge.pth"
    as_named = path.rename(path.with_suffix(".safetensors"))
    model = ImageBind.load(str(as_named), dtype=torch.float32)
    assert model.fingerprint == f"imagebind-4-{served.sha256[:12]}-r1"


def test_weights_that_are_there_are_not_fetched_again(served: RemoteFile, tmp_path: Path) -> None:
    path = fetch_weights(tmp_path / "w.pth", accept_license=True, remote=served)
    nowhere = RemoteFile(url="http://127.0.0.1:9/w", size=served.size, sha256=served.sha256)
    assert fetch_weights(path, accept_license=False, remote=nowhere) == path
    path.write_bytes(b"other")
    with pytest.raises(EncoderError, match="already exists and is not this file"):
        fetch_weights(path, accept_license=True, remote=served)
    assert path.read_bytes() == b"other"


def test_a_failed_download_says_how_to_resume(tmp_path: Path) -> None:
    nowhere = RemoteFile(url="http://127.0.0.1:9/w", size=5, sha256="0" * 64)
    with pytest.raises(EncoderError, match="run the same command again to resume"):
        fetch_weights(
            tmp_path / "w.pth",
            accept_license=True,
            remote=nowhere,
            retries=RetryPolicy(attempts=1, pause_s=0),
        )


def test_the_published_checkpoint_is_named_exactly() -> None:
    assert weights.PUBLISHED.size == 4_803_584_173
    assert weights.PUBLISHED.sha256 == "d6f6c22bedcc90708448d5d2fbb7b2db9c73f505dc89bd0b2e09b23af1b62157"
    assert weights.PUBLISHED.url == "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth"


def test_the_default_place_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R2SCP_HOME")
    assert default_weights_path() == Path.home() / ".cache" / "r2scp" / "imagebind_huge.pth"


def test_an_encoder_without_weights_is_one_clear_line() -> None:
    with pytest.raises(EncoderError) as caught:
        resolve_encoder("imagebind-huge")
    for fact in ("CC BY-NC-SA 4.0", "4.8 GB", COMMAND, "--weights FILE", str(default_weights_path())):
        assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_source_of_each_encoder(small_file: Path, home: Path) -> None:
    assert resolve_encoder("imagebind-huge", str(small_file)) == str(small_file)
    assert resolve_encoder("imagebind-huge", "random:3") == "random:3"
    home.mkdir()
    default_weights_path().write_bytes(b"")
    assert resolve_encoder("imagebind-huge") == str(default_weights_path())


def test_the_demo_encoder_comes_with_the_package() -> None:
    source = Path(resolve_encoder("imagebind-demo"))
    assert source.name == "imagebind-demo.safetensors"
    assert source.stat().st_size <= 12 * 10**6
    assert describe_encoder(str(source)).dim == ImageBind.load(str(source)).dim


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("imagebind", None, "must be one of imagebind-huge, imagebind-demo; got 'imagebind'"),
        ("imagebind-huge", "/nowhere/w.pth", "/nowhere/w.pth does not exist"),
        ("imagebind-demo", "random:1", "size of imagebind-huge"),
    ],
)
def test_what_cannot_be_is_refused(name: str, given: str | None, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        resolve_encoder(name, given)


def test_foreign_files_become_encoder_errors(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"not weights")
    with pytest.raises(EncoderError, match="cannot be read as a checkpoint"):
        describe_encoder(str(tmp_path / "w.pth"))
    with pytest.raises(EncoderError, match="random:SEED"):
        describe_encoder("random:x")


def test_another_file_in_the_default_place_is_refused(home: Path) -> None:
    vision, audio, text = (TowerConfig(width=48, depth=1, heads=heads) for heads in (16, 12, 16))
    model = ImageBind(ImageBindConfig(vision=vision, audio=audio, text=text, dim=4, patch=56, vocabulary=9))
    home.mkdir()
    model.save(home / "m.safetensors")
    torch.save(load_file(home / "m.safetensors"), default_weights_path())
    with pytest.raises(EncoderError, match="must be the published checkpoint"):
        describe_encoder(str(default_weights_path()))
