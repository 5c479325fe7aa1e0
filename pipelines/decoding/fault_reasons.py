"""Finds out why a media file cannot be decoded: from its bytes, and from the logs of libav and ffmpeg."""

import os
import re
import stat
from pathlib import Path

from r2scp.store.errors import FailureReason, MediaError

HEAD_BYTES = 4096  # enough to recognise a playlist
ENDS_BYTES = 1 << 20  # of each end of a file, where an MP4 says that it is encrypted
READ_BYTES = 1 << 16  # per read: small enough for Python's own allocator, without a call to the kernel
ENCRYPTED_BYTES = 12  # length of the match, which may span two reads
DETAIL_CHARS = 500  # of the end of the log, kept with a failed or damaged clip

#: How text files begin that name other files or URLs for a player to open.
PLAYLIST = re.compile(
    rb"\A(?:\xef\xbb\xbf)?\s*(?:"
    rb"\#EXTM3U|ffconcat\ version|\[playlist\]|\[Reference\]|\#\ VobSub\ index\ file|RTSPtext|"
    rb"(?:file|rtsp|rtmp|https?|mmsh?|udp|ftp)://|file\s+['\"/\w]|v=0\r?\no=|"
    rb"<(?:MPD|ASX|smil|SmoothStreamingMedia|PlayList|AssetMap|CompositionPlaylist)\b|"
    rb"<\?(?:xml|wpl)[^>]*>.{0,1024}?<(?:\w+:)?(?:MPD|ASX|smil|SmoothStreamingMedia|playlist|rss|AssetMap|"
    rb"CompositionPlaylist)\b)",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
#: A scheme-type box of ISO base media, ISO/IEC 14496-12 8.12.5, naming a scheme of common encryption.
ENCRYPTED = re.compile(rb"schm\0{4}(?:cenc|cens|cbc1|cbcs|piff|itun)")

#: What libav and ffmpeg log, and the reason it stands for if nothing could be decoded. First match wins.
LOG_PATTERNS = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"exceeds specified max pixel count", FailureReason.TOO_LARGE),
        (
            r"[Cc]annot allocate memory|bad_alloc|Resource temporarily unavailable|encoder_init failed",
            FailureReason.OUT_OF_MEMORY,
        ),
        (
            r"Skipped opening external track|Protocol '[^']*' not on whitelist|"
            r"\[(?:hls|dash|concat|sdp|rtsp|rtp|sap|image2|imf|vobsub|webm_dash_manifest)\b[^\]]*\]"
            r" Format not on whitelist",
            FailureReason.FORBIDDEN_REFERENCE,
        ),
        (r"Format not on whitelist", FailureReason.NOT_MEDIA),
        (r"no decoder found for|Decoder [^:]* not found", FailureReason.UNSUPPORTED_CODEC),
        (r"moov atom not found|truncat|partial file|End of file", FailureReason.TRUNCATED),
    )
)

#: Lines that only repeat an earlier error, or advise a person at a terminal.
NOISE = re.compile(
    r"Task finished with|Terminating thread|Could not open encoder before|Error sending frames|"
    r"Conversion failed|Nothing was written|Could not find codec parameters|Consider increasing the|"
    r"Cannot determine format of input|non monotonically increasing dts to muxer"
)


def open_regular(path: str | Path) -> int:
    """A descriptor of a regular file. Never blocks, not even on a FIFO. Raises MediaError otherwise."""
    try:
        _require_regular(os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise MediaError(FailureReason.UNREADABLE, getattr(error, "strerror", None) or str(error)) from None
    try:
        status = os.fstat(fd)  # again: the path may lead to another file by now
        _require_regular(status)
        if status.st_size == 0:
            raise MediaError(FailureReason.EMPTY_FILE, "zero bytes")
        if PLAYLIST.match(os.pread(fd, HEAD_BYTES, 0)):
            raise MediaError(
                FailureReason.FORBIDDEN_REFERENCE,
                "playlists, which name other files or URLs, are not opened",
            )
    except OSError as error:
        os.close(fd)
        raise MediaError(FailureReason.UNREADABLE, error.strerror or str(error)) from None
    except MediaError:
        os.close(fd)
        raise
    return fd


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
        raise MediaError(FailureReason.UNREADABLE, f"must be a regular file; got a {kind}")


def is_encrypted(fd: int) -> bool:
    """Whether either end of the file has a box of common encryption."""
    size = os.fstat(fd).st_size
    head = range(0, min(size, ENDS_BYTES), READ_BYTES)
    tail = range(max(head.stop - ENCRYPTED_BYTES, size - ENDS_BYTES), size, READ_BYTES)
    return any(
        ENCRYPTED.search(os.pread(fd, READ_BYTES + ENCRYPTED_BYTES, start)) for start in (*head, *tail)
    )


def classify(log: str, default: FailureReason) -> FailureReason:
    """The reason that the log gives for a file of which nothing could be decoded."""
    return next((reason for pattern, reason in LOG_PATTERNS if pattern.search(log)), default)


def summarise_log(log: str) -> str:
    """The end of the log on one line, without repetitions, memory addresses and control characters."""
    log = re.sub(r" @ 0x[0-9a-f]+|(?<=not on whitelist) '.*'|\[(?:error|fatal|panic|warning)\] ", "", log)
    lines = (line for line in log.splitlines() if not NOISE.search(line))
    lines = (re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", line).strip() for line in lines)
    unique = list(dict.fromkeys(line for line in lines if line))
    text = "; ".join(unique)
    return text if len(text) <= DETAIL_CHARS else "…" + text[-DETAIL_CHARS + 1 :]
