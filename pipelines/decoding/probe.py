"""Says what is in a media file, without letting the file near this process.

libav can hang, crash or run out of memory on a hostile file, and a crash in a Ray worker fails the
job. So a child (`probe_child.py`) opens the files, one after another. It starts once per thread
that probes at the same time (a quarter of a second) and then answers within milliseconds; if it
falls silent or dies, it is replaced. The file is opened once, here, and handed over as a
descriptor: no tool sees its name, so a name such as `-x`, `a|b:c` or `%03d.png` has no meaning.
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

from r2scp.pipelines.decoding.sandbox import clean_environment, limit_resources, kill_group
from r2scp.store.errors import FailureReason, MediaError

CHILD = Path(__file__).with_name("probe_child.py")
SECONDS_PER_PROBE = 120.0  # a healthy file takes milliseconds; one of gigabytes to be scanned, seconds
SECONDS_TO_START = 120.0  # for the child, on a machine that is short of everything
#: A demuxer that was tried for want of a better one has not recognised anything.
MISDETECTED = r"Format \w+ detected only with low score.*\n"
LOG_BYTES = 1 << 16  # most that libav may say about one file

#: The demuxers that may open a file: each reads one self-contained recording. Those that fetch
#: other files or URLs (hls, dash, concat, sdp, image2, imf, vobsub, tedcaptions, ...), run scripts
#: (avisynth, lavfi) or draw (svg) are left out on purpose, and so is whatever comes new.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,live_flv,mpeg,mpegts,mpegvideo,m4v,h264,hevc,vvc,"
    "av1,obu,ivf,ogg,mp3,aac,loas,ac3,eac3,dts,dtshd,truehd,flac,wav,w64,aiff,caf,au,amr,amrnb,amrwb,ape,"
    "wv,tta,tak,opus,gxf,mxf,nut,nsv,rm,dv,dirac,vc1,h263,h261,mjpeg,y4m,yuv4mpegpipe,gif,apng,"
    "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,tiff_pipe,jpegls_pipe,j2k_pipe,jpegxl_pipe,pam_pipe,ppm_pipe,"
    "pgm_pipe,pbm_pipe"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """What picture and sound streams have in common. Times in seconds; None: the file does not say."""

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
    """One file as its header describes it. `log` is what libav said about it."""

    format: str  # the demuxer's name
    start_s: float | None
    duration_s: float | None
    video: VideoTrack | None
    audio: AudioTrack | None
    log: str


class ProbeError(Exception):
    """libav would not open the file; `args` are what it logged and its verdict."""


class ProberLost(Exception):
    """A child that had answered before was found dead or died; a fresh one should be asked."""


class Prober:
    """One child and the line to it. Used by one thread at a time."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.log_file = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115  lives as long as the child
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.log_file,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=clean_environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.used = False
        try:
            self._receive(SECONDS_TO_START)
        except (TimeoutError, EOFError) as fault:
            log = self.log()
            self.stop()
            raise RuntimeError(f"{CHILD.name} did not start under {sys.executable}: {log}") from fault

    def ask(self, fd: int, request: dict[str, object], *, memory_bytes: int) -> dict[str, Any]:
        """The child's reply. Raises TimeoutError, or EOFError if the child died of the question."""
        self.log_file.truncate(0)
        limit_resources(self.process.pid, memory_bytes=memory_bytes, file_bytes=LOG_BYTES)
        try:
            socket.send_fds(self.channel, [json.dumps(request).encode()], [fd])
        except ConnectionError as gone:
            raise EOFError from gone
        reply = self._receive(float(str(request["seconds"])))
        self.used = True
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
                except ConnectionError as gone:
                    raise EOFError from gone
                if not chunk:
                    raise EOFError
                line += chunk
        return bytes(line)

    def log(self) -> str:
        return os.pread(self.log_file.fileno(), LOG_BYTES, 0).decode("utf-8", "replace")

    def stop(self) -> int:
        """Ends the child; returns how it ended, as in subprocess."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.0)
        kill_group(self.process)
        self.log_file.close()
        return self.process.returncode


class ProberPool:
    """Idle children, ready for the next thread. At most as many as threads ever probed at once."""

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
        """Ends the idle children."""
        with self._lock:
            idle, self._idle = self._idle, []
        for prober in idle:
            prober.stop()

    def forget(self) -> None:
        """For a forked child of this process, which must not talk to its parent's children."""
        self._idle, self._lock = [], threading.Lock()


POOL = ProberPool()
os.register_at_fork(after_in_child=POOL.forget)
atexit.register(POOL.close)


def probe(fd: int, *, longest_s: float, memory_bytes: int, seconds: float = SECONDS_PER_PROBE) -> MediaInfo:
    """What the file behind the descriptor `fd` contains.

    Where the header gives no durations, only a guess from the bit rate, or ones beyond `longest_s`
    seconds, all packets are read (none decoded) to see where the streams really end. Raises
    `ProbeFault` when libav refuses the file and `MediaError` when it hangs, crashes or runs out of memory.
    """
    request = {"formats": FORMATS, "seconds": seconds, "longest_s": longest_s}
    try:
        reply, log = ask_once(POOL.take(), fd, request, memory_bytes)
    except ProberLost:  # killed while it waited, or worn out by earlier files: not this one's fault
        reply, log = ask_once(Prober(), fd, request, memory_bytes)
    if "fault" in reply:
        if reply["fault"] == "MemoryError":
            raise MediaError(FailureReason.OUT_OF_MEMORY, f"reading the header: {reply['says']}")
        raise ProbeError(re.sub(MISDETECTED, "", log), reply["says"])
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
    """A child's reply and log; the child goes back to the pool. One that hangs or dies is ended."""
    try:
        reply = prober.ask(fd, request, memory_bytes=memory_bytes)
        log = prober.log()
    except TimeoutError as fault:
        prober.stop()
        raise MediaError(FailureReason.TIMEOUT, f"reading the header: {fault}") from None
    except EOFError:
        log, code = prober.log(), prober.stop()
        if prober.used:
            raise ProberLost from None
        memory = re.search(r"MemoryError|[Cc]annot allocate memory", log)
        reason = FailureReason.OUT_OF_MEMORY if memory else FailureReason.DECODER_CRASHED
        raise MediaError(reason, f"reading the header ended libav with status {code}") from None
    except BaseException:
        prober.stop()
        raise
    POOL.put_back(prober)
    return reply, log
