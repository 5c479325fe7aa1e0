"""One large file over HTTP: goes on where it stopped, checks what came, appears whole or not at all.

The size and sha256 are known beforehand: a wrong page, a changed file and a damaged transfer are noticed.
"""

import hashlib
import http.client
import ipaddress
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import urlsplit

from r2scp.store.errors import EncoderError

CHUNK = 1 << 20  # bytes read at a time: 1 MiB
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may pass

Progress = Callable[[int, int], None]  # bytes so far, bytes in all


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """What is to be had, and where."""

    url: str
    size: int  # bytes
    sha256: str  # hex digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to wait for a network. `attempts` counts tries in a row that brought nothing new."""

    timeout_s: float = 30.0  # without a byte
    attempts: int = 4
    pause_s: float = 1.0  # before the second try; doubled each time


class _Cut(Exception):
    """The transfer ended early for a reason that may pass."""


def download(
    remote: RemoteFile, dest: Path, progress: Progress | None = None, patience: Patience = Patience()
) -> None:
    """Fetch `remote` to `dest`; what came of an earlier try (`dest` + `.part`) is kept and added to.

    `progress` is told bytes so far and bytes in all. A file already at `dest` is never overwritten.
    Raises EncoderError: no network (what came is kept), another file than expected, no room on the disk, a
    redirect to anything but https.
    """
    _check_address(remote.url, "the address")
    with _opened(dest) as partial:
        if partial.size > remote.size:
            partial.restart()
        _check_room(remote, partial)
        if progress:
            progress(partial.size, remote.size)
        failures = 0
        while partial.size < remote.size:
            before = partial.size
            try:
                _fetch(remote, partial, progress, patience.timeout_s)
            except _Cut as cut:
                failures = failures + 1 if partial.size <= before else 1
                if failures >= patience.attempts:
                    raise EncoderError(
                        f"the download stopped at {partial.size:,} of {remote.size:,} bytes ({cut}); what "
                        f"came is kept in {partial.path}: give the same command again to go on"
                    ) from cut
                time.sleep(patience.pause_s * 2 ** (failures - 1))
        partial.settle(remote, dest)


class _Partial:
    """The bytes that came so far, their digest, and the tag of the file on the server they belong to."""

    def __init__(self, path: Path) -> None:
        self.path, self._tag_path = path, path.with_name(path.name + ".etag")
        self.size, self._digest = 0, hashlib.sha256()
        self._file: IO[bytes] = path.open("a+b")
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            self._count(chunk)

    def __enter__(self) -> "_Partial":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def tag(self) -> str:
        return self._tag_path.read_text() if self._tag_path.exists() else ""

    def restart(self, tag: str = "") -> None:
        self._file.truncate(0)
        self.size, self._digest = 0, hashlib.sha256()
        self._tag_path.write_text(tag)

    def write(self, chunk: bytes) -> None:
        try:
            self._file.write(chunk)
            self._file.flush()
        except OSError as error:
            raise EncoderError(f"{self.path} cannot be written: {error.strerror}") from error
        self._count(chunk)

    def settle(self, remote: RemoteFile, dest: Path) -> None:
        """Move the whole file to its place if it is what it should be; else remove it."""
        self._file.close()
        self._tag_path.unlink(missing_ok=True)
        if self._digest.hexdigest() != remote.sha256:
            self.path.unlink()
            raise EncoderError(
                f"{remote.url} must have sha256 {remote.sha256}; what came has {self._digest.hexdigest()} "
                "and was removed: give the same command again, or fetch the file from a place you trust"
            )
        self.path.replace(dest)

    def _count(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self.size += len(chunk)


def _opened(dest: Path) -> _Partial:
    if dest.exists():
        raise EncoderError(
            f"{dest} is there already and is not this file: move it away or name another place"
        )
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        return _Partial(dest.with_name(dest.name + ".part"))
    except OSError as error:
        raise EncoderError(f"{dest.parent} must be a folder one can write to: {error.strerror}") from error


def _check_room(remote: RemoteFile, partial: _Partial) -> None:
    free, wanted = shutil.disk_usage(partial.path.parent).free, remote.size - partial.size
    if free < wanted:
        raise EncoderError(f"{partial.path.parent} must have {wanted:,} bytes free; it has {free:,}")


def _fetch(remote: RemoteFile, partial: _Partial, progress: Progress | None, timeout_s: float) -> None:
    """One request: add to `partial` what the server sends. Raises _Cut where another try may help."""
    with _ask(remote, partial, timeout_s) as response:
        _line_up(response, remote, partial)
        try:
            while chunk := response.read1(CHUNK):
                if partial.size + len(chunk) > remote.size:
                    partial.restart()
                    raise EncoderError(f"{remote.url} must have {remote.size:,} bytes; the server sends more")
                partial.write(chunk)
                if progress:
                    progress(partial.size, remote.size)
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(str(error) or type(error).__name__) from error
    if partial.size < remote.size:
        raise _Cut("the server closed the connection")


def _ask(remote: RemoteFile, partial: _Partial, timeout_s: float) -> http.client.HTTPResponse:
    """Send the request, for the missing part alone if there is a beginning of the same file."""
    headers = {"User-Agent": "r2scp-pipe", "Accept-Encoding": "identity"}
    if partial.size:
        headers["Range"] = f"bytes={partial.size}-"
        if partial.tag:
            headers["If-Range"] = partial.tag
    try:
        return _opener(remote.url).open(
            urllib.request.Request(remote.url, headers=headers), timeout=timeout_s
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and partial.size:  # the file there is shorter than what we have
            partial.restart()
            return _ask(remote, partial, timeout_s)
        answer = f"the server answered {error.code} {error.reason}"
        if error.code in TRY_AGAIN:
            raise _Cut(answer) from error
        raise EncoderError(f"{remote.url} cannot be had: {answer}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(getattr(error, "reason", "")) or str(error) or type(error).__name__) from error


def _line_up(response: http.client.HTTPResponse, remote: RemoteFile, partial: _Partial) -> None:
    """Make `partial` end where the body of the response begins, and see that the file is the expected one."""
    begins, total = 0, response.headers.get("Content-Length", "")
    if response.status == 206:
        unit, _, span = response.headers.get("Content-Range", "").partition(" ")
        first, total = span.partition("-")[0], span.rpartition("/")[2]
        begins = int(first) if unit == "bytes" and first.isdecimal() else -1
    if total.isdecimal() and int(total) != remote.size:
        partial.restart()
        raise EncoderError(f"{remote.url} must have {remote.size:,} bytes; the server offers {int(total):,}")
    tag = response.headers.get("ETag", "")
    strong_tag = "" if tag.startswith("W/") else tag
    if begins == 0:
        partial.restart(strong_tag)
    elif begins != partial.size or (strong_tag and partial.tag and strong_tag != partial.tag):
        partial.restart()
        raise _Cut("the server sent another part than was asked for")


def _opener(url: str) -> urllib.request.OpenerDirector:
    direct = [urllib.request.ProxyHandler({})] if _is_loopback(url) else []
    return urllib.request.build_opener(_CarefulRedirects, *direct)


class _CarefulRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to https; to plain http only from this machine to this machine."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not (_is_loopback(newurl) and _is_loopback(req.full_url)):
            _check_address(newurl, "a redirect", loopback=False)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str, what: str, loopback: bool = True) -> None:
    if urlsplit(url).scheme != "https" and not (loopback and _is_loopback(url)):
        raise EncoderError(f"{what} must be https; got {url!r}")


def _is_loopback(url: str) -> bool:
    """Whether an http(s) address names this machine."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return False
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"
