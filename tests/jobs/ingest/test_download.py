"""Proves that a download goes on where it stopped and that nothing but the expected file ever arrives.

A real HTTP server on loopback plays the honest, the limited, the failing and the lying server.
"""

import hashlib
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from r2scp.jobs.ingest import download as download_module
from r2scp.jobs.ingest.download import RemoteFile, RetryPolicy, download
from r2scp.store.errors import EncoderError

CONTENT = random.Random(1).randbytes(300_000)
ONCE = RetryPolicy(timeout_s=5, attempts=1, pause_s=0)
STUBBORN = RetryPolicy(timeout_s=5, attempts=3, pause_s=0)


@dataclass
class Server:
    """What the server does, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    ranges: bool = True  # honours Range
    tag: str = '"one"'
    minds_tag: bool = True  # honours If-Range
    cut_after: list[int] = field(
        default_factory=list
    )  # bytes of each answer in turn before the line goes dead
    statuses: list[int] = field(default_factory=list)  # answers of the first requests
    location: str = ""  # where to redirect
    says_length: bool = True
    shift: int = 0  # how far the part sent is from the part asked for
    stalls: bool = False
    asked: list[str] = field(default_factory=list)  # the Range of each request


class Handler(BaseHTTPRequestHandler):
    server: "LoopbackServer"

    def do_GET(self) -> None:
        plan = self.server.plan
        plan.asked.append(self.headers.get("Range", ""))
        if self.path == "/moved" or plan.statuses:
            self.answer_without_content(302 if self.path == "/moved" else plan.statuses.pop(0))
            return
        start, content = 0, plan.content
        same = not plan.minds_tag or self.headers.get("If-Range", plan.tag) == plan.tag
        if plan.ranges and same and (asked := re.fullmatch(r"bytes=(\d+)-", plan.asked[-1])):
            start = int(asked[1]) + plan.shift
            if start >= len(content):
                self.answer_without_content(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if plan.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", plan.tag)
        self.end_headers()
        end = start + plan.cut_after.pop(0) if plan.cut_after else len(content)
        self.wfile.write(content[start:end])
        if plan.stalls:
            self.wfile.flush()
            self.server.released.wait(20)

    def answer_without_content(self, status: int) -> None:
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.plan.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class LoopbackServer(ThreadingHTTPServer):
    plan: Server
    released: threading.Event

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the play."""


@pytest.fixture
def server() -> Iterator[Server]:
    with LoopbackServer(("127.0.0.1", 0), Handler) as http:
        http.plan, http.released = Server(url=f"http://127.0.0.1:{http.server_port}/file"), threading.Event()
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield http.plan
        http.released.set()
        http.shutdown()
        thread.join()


def remote(server: Server, content: bytes = CONTENT) -> RemoteFile:
    return RemoteFile(url=server.url, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    download(remote(server), tmp_path / "new" / "file", lambda *now: seen.append(now), ONCE)
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert names(tmp_path / "new") == {"file"}
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_a_second_command_asks_for_the_rest_alone(server: Server, tmp_path: Path) -> None:
    server.cut_after = [100_000]
    with pytest.raises(EncoderError, match=r"stopped at 100,000 of 300,000 .* run the same command again"):
        download(remote(server), tmp_path / "file", None, ONCE)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:100_000]
    assert not (tmp_path / "file").exists()
    seen: list[int] = []
    download(remote(server), tmp_path / "file", lambda done, _all: seen.append(done), ONCE)
    assert server.asked == ["", "bytes=100000-"]
    assert seen[0] == 100_000
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert names(tmp_path) == {"file"}


def test_one_command_outlasts_many_cuts_as_long_as_bytes_come(server: Server, tmp_path: Path) -> None:
    server.cut_after = [50_000] * 5
    download(remote(server), tmp_path / "file", None, RetryPolicy(timeout_s=5, attempts=2, pause_s=0))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [""] + [f"bytes={done}-" for done in range(50_000, 300_000, 50_000)]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut_after = False, [100_000]
    download(remote(server), tmp_path / "file", None, STUBBORN)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ["", "bytes=100000-"]


@pytest.mark.parametrize("minds_tag", [True, False])
def test_a_file_changed_between_tries_is_fetched_anew(
    server: Server, tmp_path: Path, minds_tag: bool
) -> None:
    changed = CONTENT[::-1]
    server.cut_after, server.minds_tag = [100_000], minds_tag
    with pytest.raises(EncoderError, match="stopped at 100,000"):
        download(remote(server), tmp_path / "file", None, ONCE)
    server.content, server.tag = changed, '"two"'
    download(remote(server, changed), tmp_path / "file", None, STUBBORN)
    assert (tmp_path / "file").read_bytes() == changed
    assert len(server.asked) == (2 if minds_tag else 3)


def test_a_beginning_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    download(remote(server), tmp_path / "file", None, ONCE)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_status_416_starts_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:200_000])
    server.statuses = [416]
    download(remote(server), tmp_path / "file", None, ONCE)
    assert server.asked == ["bytes=200000-", ""]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_whole_beginning_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    nowhere = RemoteFile(
        url="http://127.0.0.1:9/file", size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest()
    )
    download(nowhere, tmp_path / "file", None, ONCE)
    assert names(tmp_path) == {"file"}


def test_a_part_from_another_place_is_not_believed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    server.shift = 10
    with pytest.raises(EncoderError, match="another range than requested"):
        download(remote(server), tmp_path / "file", None, ONCE)
    server.shift = 0
    download(remote(server), tmp_path / "file", None, ONCE)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_damaged_transfer_is_removed_and_named(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:150_000] + b"!" + CONTENT[150_001:]
    with pytest.raises(EncoderError, match=r"must have sha256 .* the download has .* was removed"):
        download(remote(server), tmp_path / "file", None, ONCE)
    assert names(tmp_path) == set()


def test_a_file_of_another_length_is_refused_at_once(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>log in first</html>"
    with pytest.raises(EncoderError, match="must have 300,000 bytes; the server offers 25"):
        download(remote(server), tmp_path / "file", None, STUBBORN)
    server.content, server.says_length = CONTENT * 20, False
    with pytest.raises(EncoderError, match="must have 300,000 bytes; the server sends more"):
        download(remote(server), tmp_path / "file", None, STUBBORN)
    assert len(server.asked) == 2
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (503, 3), (429, 3)])
def test_only_passing_refusals_are_tried_again(
    server: Server, tmp_path: Path, status: int, tries: int
) -> None:
    server.statuses = [status] * 9
    with pytest.raises(EncoderError, match=f"the server answered {status}"):
        download(remote(server), tmp_path / "file", None, STUBBORN)
    assert len(server.asked) == tries


def test_a_silent_server_is_given_up(server: Server, tmp_path: Path) -> None:
    server.cut_after, server.stalls = [1000], True
    with pytest.raises(EncoderError, match=r"stopped at 1,000 .*\(timed out\)"):
        download(remote(server), tmp_path / "file", None, RetryPolicy(timeout_s=0.2, attempts=1, pause_s=0))


def test_no_server_is_one_clear_line(tmp_path: Path) -> None:
    nobody = RemoteFile(url="http://127.0.0.1:9/file", size=10, sha256="0" * 64)
    with pytest.raises(EncoderError, match=r"stopped at 0 of 10 bytes \(.*refused.*\)") as caught:
        download(nobody, tmp_path / "file", None, ONCE)
    assert "\n" not in str(caught.value)


def test_redirects_are_followed_on_this_machine(server: Server, tmp_path: Path) -> None:
    server.location, server.url = server.url, server.url.replace("/file", "/moved")
    download(remote(server), tmp_path / "file", None, ONCE)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["http://example.org/file", "file:///etc/passwd", "ftp://example.org/file"])
def test_redirects_to_anything_but_https_are_refused(server: Server, tmp_path: Path, place: str) -> None:
    server.location, server.url = place, server.url.replace("/file", "/moved")
    with pytest.raises(EncoderError, match=r"a redirect must be https|Redirection .* is not allowed"):
        download(remote(server), tmp_path / "file", None, STUBBORN)
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["http://example.org/file", "file:///etc/passwd", "/etc/passwd"])
def test_addresses_other_than_https_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(EncoderError, match="the address must be https"):
        download(RemoteFile(url=url, size=1, sha256=""), tmp_path / "file")
    assert names(tmp_path) == set()


def test_what_is_there_is_never_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EncoderError, match="already exists"):
        download(remote(server), tmp_path / "file", None, ONCE)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(EncoderError, match="must be a writable folder"):
        download(remote(server), tmp_path / "file" / "below", None, ONCE)


def test_a_full_disk_is_told_before_the_download(tmp_path: Path) -> None:
    endless = RemoteFile(url="http://127.0.0.1:9/file", size=1 << 60, sha256="")
    with pytest.raises(EncoderError, match="bytes free; it has"):
        download(endless, tmp_path / "file", None, ONCE)


def test_small_chunks_make_the_same_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "CHUNK_BYTES", 777)
    server.cut_after = [123_457]
    download(remote(server), tmp_path / "file", None, STUBBORN)
    assert (tmp_path / "file").read_bytes() == CONTENT
