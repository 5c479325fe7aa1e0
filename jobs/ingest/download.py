"""One large file over HTTPS: resumes where it stopped, is checked, and appears whole or not at all.

Size and sha256 are known beforehand, so a wrong page, another file or a damaged transfer is noticed.
"""

import ipaddress
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3.exceptions

from r2scp.pipelines.media_file import file_digest
from r2scp.store.errors import EncoderError

CHUNK_BYTES = 1 << 20  # read at a time
TEMPORARY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
HEADERS = {"User-Agent": "r2scp-pipe", "Accept-Encoding": "identity"}

OnProgress = Callable[[int, int], None]  # bytes so far, bytes in all


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """What to download, and where from."""

    url: str
    size: int  # bytes
    sha256: str  # hex digest


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """When to give up. `attempts` counts attempts in a row that brought no new bytes."""

    timeout_s: float = 30.0  # without a byte
    attempts: int = 4
    pause_s: float = 1.0  # before the second attempt; doubled each time


class _Interrupted(Exception):
    """The transfer ended early for a reason that may be temporary."""


def download(
    remote: RemoteFile,
    dest: Path,
    on_progress: OnProgress | None = None,
    retries: RetryPolicy = RetryPolicy(),
) -> None:
    """Download `remote` to `dest`; an interrupted download is kept in `dest` + `.part` and resumed.

    A file already at `dest` is never overwritten. Raises `EncoderError`: no network, another file than
    expected, no space on the disk, or a redirect to anything but https.
    """
    _require_https(remote.url, "the address")
    part = _open_part(remote, dest)
    on_progress = on_progress or (lambda done, total: None)
    on_progress(_size(part), remote.size)
    failures = 0
    while (before := _size(part)) < remote.size:
        try:
            _fetch(remote, part, on_progress, retries.timeout_s)
        except _Interrupted as reason:
            failures = failures + 1 if _size(part) <= before else 1
            if failures >= retries.attempts:
                raise EncoderError(
                    f"the download stopped at {_size(part):,} of {remote.size:,} bytes ({reason}); they are "
                    f"kept in {part}: run the same command again to resume"
                ) from reason
            time.sleep(retries.pause_s * 2 ** (failures - 1))
    _tag_path(part).unlink(missing_ok=True)
    sha256 = file_digest(part).sha256
    if sha256 != remote.sha256:
        part.unlink()
        raise EncoderError(
            f"{remote.url} must have sha256 {remote.sha256}; the download has {sha256} and was removed: run "
            "the same command again, or get the file from a source that you trust"
        )
    part.replace(dest)


def _open_part(remote: RemoteFile, dest: Path) -> Path:
    """The `.part` file, created if need be, with enough free space for the rest."""
    if dest.exists():
        raise EncoderError(f"{dest} already exists and is not this file: move it away or name another place")
    part = dest.with_name(dest.name + ".part")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise EncoderError(f"{dest.parent} must be a writable folder: {error.strerror}") from error
    if _size(part) > remote.size:
        part.write_bytes(b"")
    free, needed = shutil.disk_usage(part.parent).free, remote.size - _size(part)
    if free < needed:
        raise EncoderError(f"{part.parent} must have {needed:,} bytes free; it has {free:,}")
    return part


def _fetch(remote: RemoteFile, part: Path, on_progress: OnProgress, timeout_s: float) -> None:
    """One request: append to `part` what the server sends. Raises `_Interrupted` where a retry may help."""
    size, headers = _size(part), dict(HEADERS)
    if size:
        headers["Range"] = f"bytes={size}-"
        headers |= {"If-Range": tag} if (tag := _read_tag(part)) else {}
    try:
        with requests.Session() as session:
            session.trust_env = not _is_loopback(remote.url)  # no proxy on the way to this machine
            session.hooks["response"] = [_check_redirect]
            with session.get(remote.url, headers=headers, timeout=timeout_s, stream=True) as response:
                if response.status_code != 416 or not size:
                    _check_response(response, remote, part)
                    _append(response, remote, part, on_progress)
                    return
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _Interrupted(_root_cause(error)) from error
    _restart(part)  # status 416: the server's file is shorter than the part
    _fetch(remote, part, on_progress, timeout_s)


def _check_response(response: requests.Response, remote: RemoteFile, part: Path) -> None:
    """Check that the response is of the expected file, and cut `part` to where the response begins."""
    if not response.ok:
        answer = f"the server answered {response.status_code} {response.reason}"
        if response.status_code in TEMPORARY_STATUSES:
            raise _Interrupted(answer)
        raise EncoderError(f"{remote.url} cannot be downloaded: {answer}")
    start, total = 0, response.headers.get("Content-Length", "")
    if response.status_code == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        start, total = (int(span[1]), span[2]) if span else (-1, "")
    if total.isdecimal() and int(total) != remote.size:
        _restart(part)
        raise EncoderError(f"{remote.url} must have {remote.size:,} bytes; the server offers {int(total):,}")
    tag = response.headers.get("ETag", "")
    tag = "" if tag.startswith("W/") else tag  # a weak tag does not stand for the same bytes
    if start == 0:
        _restart(part, tag)
    elif start != _size(part) or (tag and _read_tag(part) not in ("", tag)):
        _restart(part)
        raise _Interrupted("the server sent another range than requested, or of another file")


def _append(response: requests.Response, remote: RemoteFile, part: Path, on_progress: OnProgress) -> None:
    size = _size(part)
    with part.open("ab") as file:
        # `read1` returns what has arrived; `iter_content` would lose an incomplete chunk.
        while chunk := response.raw.read1(CHUNK_BYTES):
            size += len(chunk)
            if size > remote.size:
                _restart(part)
                raise EncoderError(f"{remote.url} must have {remote.size:,} bytes; the server sends more")
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise EncoderError(f"{part} cannot be written: {error.strerror}") from error
            on_progress(size, remote.size)
    if size < remote.size:
        raise _Interrupted("the server closed the connection")


def _size(part: Path) -> int:
    return part.stat().st_size


def _tag_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _read_tag(part: Path) -> str:
    """The server's tag of the file that `part` is the beginning of."""
    return _tag_path(part).read_text() if _tag_path(part).exists() else ""


def _restart(part: Path, tag: str = "") -> None:
    part.write_bytes(b"")
    _tag_path(part).write_text(tag)


def _root_cause(error: BaseException) -> str:
    """requests and urllib3 wrap an error several times; its root says it in few words."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _check_redirect(response: requests.Response, **_: object) -> None:
    """Redirects must go to https, or from this machine to this machine."""
    if response.is_redirect:
        target = urljoin(response.url, response.headers["Location"])
        if not (_is_loopback(target) and _is_loopback(response.url)):
            _require_https(target, "a redirect", loopback=False)


def _require_https(url: str, what: str, loopback: bool = True) -> None:
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
