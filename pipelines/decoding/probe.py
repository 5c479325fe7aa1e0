"""Reads the header of a media file, in a process of its own.

libav can hang, crash or run out of memory on a hostile file, and a crash in a Ray worker fails the
job. So a child process (`probe_child.py`) opens the files, one after another. There is one per
concurrent thread; it starts in a quarter of a second, then answers within milliseconds, and is
replaced if it hangs or dies. The file is opened once, here, and passed as a descriptor: no tool sees
its name, so a name such as `-x`, `a|b:c` or `%03d.png` has no special meaning.
"""

import atexit
import contextlib
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2scp.pipelines.decoding.sandbox import clean_environment, kill_group, limit_resources
from r2scp.store.errors import FailureReason, MediaError

CHILD = Path(__file__).with_name("probe_child.py")
SECONDS_PER_PROBE = 120.0  # most files take milliseconds; gigabytes that must be scanned, seconds
SECONDS_TO_START = 120.0  # for the child, on an overloaded machine
#: Logged when a demuxer was tried although it did not recognise the file.
MISDETECTED = r"Format \w+ detected only with low score.*\n"
LOG_BYTES = 1 << 16  # of libav's log of one file, at most

#: The demuxers that may open a file: each reads one self-contained recording. Those that fetch
#: other files or URLs (hls, dash, concat, sdp, image2, imf, vobsub, tedcaptions, ...), run scripts
#: (avisynth, lavfi) or draw (svg) are left out on purpose, and so are any that libav adds later.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,live_flv,mpeg,mpegts,mpegvideo,m4v,h264,hevc,vvc,"
    "av1,obu,ivf,ogg,mp3,aac,loas,ac3,eac3,dts,dtshd,truehd,flac,wav,w64,aiff,caf,au,amr,amrnb,amrwb,ape,"
    "wv,tta,tak,opus,gxf,mxf,nut,nsv,rm,dv,dirac,vc1,h263,h261,mjpeg,y4m,yuv4mpegpipe,gif,apng,"
    "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,tiff_pipe,jpegls_pipe,j2k_pipe,jpegxl_pipe,pam_pipe,ppm_pipe,"
    "pgm_pipe,pbm_pipe"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """What video and audio streams have in common. Times in seconds; None if the header does not say."""

    index: int  # in the container, as ffmpeg counts
    start_s: float | None
    duration_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoTrack(Track):
    width: int = 0  # pixels as coded, before rotation; 0: unknown
    height: int = 0
    hdr: bool = False  # PQ or HLG transfer


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioTrack(Track):
    rate: int = 0  # Hz
    channels: int = 0
    layout: str = ""  # such as "stereo", "5.1", "16 channels"


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaInfo:
    """One file as its header describes it. `log` is what libav logged about it."""

    format: str  # the demuxer's name
    start_s: float | None
    duration_s: float | None
    video: VideoTrack | None
    audio: AudioTrack | None
    log: str


class ProbeError(Exception):
    """libav did not open the file; `args` are its log and its error message."""


class ProberLost(Exception):
    """A child that had answered before has died: a new one should be asked."""


class Prober:
    """A child process and the socket to it. Used by one thread at a time."""

    def __init__(self) -> None:
        self.channel, child_end = socket.socketpair()
        self.log_file = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115  open as long as the child runs
        with child_end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), str(child_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.log_file,
                pass_fds=(child_end.fileno(),),
                start_new_session=True,
                env=clean_environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.has_answered = False
        try:
            self._receive(SECONDS_TO_START)
        except (TimeoutError, EOFError) as error:
            log = self.log()
            self.stop()
            raise RuntimeError(f"{CHILD.name} did not start under {sys.executable}: {log}") from error

    def ask(self, fd: int, request: dict[str, object], *, memory_bytes: int) -> dict[str, Any]:
        """The child's reply. Raises TimeoutError, or EOFError if the child died of the request."""
        self.log_file.truncate(0)
        limit_resources(self.process.pid, memory_bytes=memory_bytes, file_bytes=LOG_BYTES)
        try:
            socket.send_fds(self.channel, [json.dumps(request).encode()], [fd])
        except ConnectionError as error:
            raise EOFError from error
        reply = self._receive(float(str(request["seconds"])))
        self.has_answered = True
        return json.loads(reply)

    def _receive(self, timeout_s: float) -> bytes:
        """The next line from the child."""
        deadline = time.monotonic() + timeout_s
        line = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self.channel, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no answer after {timeout_s:g} s")
                try:
                    chunk = self.channel.recv(1 << 16)
                except ConnectionError as error:
                    raise EOFError from error
                if not chunk:
                    raise EOFError
                line += chunk
        return bytes(line)

    def log(self) -> str:
        return os.pread(self.log_file.fileno(), LOG_BYTES, 0).decode("utf-8", "replace")

    def stop(self) -> int:
        """Ends the child; returns its exit status, as in subprocess."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.0)
        kill_group(self.process)
        self.log_file.close()
        return self.process.returncode


class ProberPool:
    """Idle probers, at most as many as there were ever threads that probed at the same time."""

    def __init__(self) -> None:
        self._idle: list[Prober] = []
        self._lock = threading.Lock()

    def take(self) -> Prober:
        with self._lock:
            return self._idle.pop() if self._idle else Prober()

    def put_back(self, prober: Prober) -> None:
        with self._lock:
            self._idle.append(prober)

    def close(self) -> None:
        """Ends the idle probers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for prober in idle:
            prober.stop()

    def forget(self) -> None:
        """For a fork of this process, which must not use its parent's probers."""
        self._idle, self._lock = [], threading.Lock()


POOL = ProberPool()
os.register_at_fork(after_in_child=POOL.forget)
atexit.register(POOL.close)


def probe(fd: int, *, longest_s: float, memory_bytes: int, seconds: float = SECONDS_PER_PROBE) -> MediaInfo:
    """What the file behind the descriptor `fd` contains.

    If the header has no durations, only an estimate from the bit rate, or some above `longest_s`
    seconds, all packets are read (none decoded) to find the real ends of the streams. Raises
    `ProbeFault` if libav rejects the file and `MediaError` if it hangs, crashes or runs out of memory.
    """
    request = {"formats": FORMATS, "seconds": seconds, "longest_s": longest_s}
    try:
        reply, log = ask_once(POOL.take(), fd, request, memory_bytes)
    except ProberLost:  # killed while idle, or harmed by earlier files: not the fault of this one
        reply, log = ask_once(Prober(), fd, request, memory_bytes)
    if "error" in reply:
        if reply["error"] == "MemoryError":
            raise MediaError(FailureReason.OUT_OF_MEMORY, f"reading the header: {reply['message']}")
        raise ProbeError(re.sub(MISDETECTED, "", log), reply["message"])
    video, audio = reply.pop("video"), reply.pop("audio")
    return MediaInfo(
        video=VideoTrack(**video) if video else None,
        audio=AudioTrack(**audio) if audio else None,
        log=log,
        **reply,
    )


def ask_once(
    prober: Prober, fd: int, request: dict[str, object], memory_bytes: int
) -> tuple[dict[str, Any], str]:
    """The prober's reply and log; it goes back to the pool, or is ended if it hangs or dies."""
    try:
        reply = prober.ask(fd, request, memory_bytes=memory_bytes)
        log = prober.log()
    except TimeoutError as error:
        prober.stop()
        raise MediaError(FailureReason.TIMEOUT, f"reading the header: {error}") from None
    except EOFError:
        log, status = prober.log(), prober.stop()
        if prober.has_answered:
            raise ProberLost from None
        out_of_memory = re.search(r"MemoryError|[Cc]annot allocate memory", log)
        reason = FailureReason.OUT_OF_MEMORY if out_of_memory else FailureReason.DECODER_CRASHED
        raise MediaError(reason, f"reading the header ended libav with status {status}") from None
    except BaseException:
        prober.stop()
        raise
    POOL.put_back(prober)
    return reply, log
