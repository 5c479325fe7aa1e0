"""The program that opens a media file with libav and tells what is in it.

`probe.py` runs it as a child process and talks to it over a socket: a file that hangs or crashes
libav takes this process down and nothing else. Only this file imports PyAV. It imports nothing of
ours, so that it starts by path, quickly, wherever the package lies.

One request is a line of JSON with an open descriptor attached; one reply is a line of JSON.
"""

import json
import os
import socket
import sys
from typing import Any

import av
import av.logging
from av.error import FFmpegError
from av.stream import Disposition

#: What libav says on standard error when a duration is only file size divided by a bit rate.
GUESSED = b"Estimating duration from bitrate"
#: Streams that are pictures about the recording and not of it.
NOT_A_RECORDING = Disposition.attached_pic | Disposition.timed_thumbnails
HDR_TRANSFERS = (16, 18)  # SMPTE ST 2084 (PQ) and ARIB STD-B67 (HLG), ITU-T H.273 table 3
CUT_S = 0.5  # an AVI that lacks more than this of what its header promises has been cut short
WORDS_BYTES = 1 << 16  # how much of libav's own words is looked at


def choose(container: Any, kind: str) -> Any | None:
    """The stream a player would show first, or None. Cover art is no video."""
    streams = [s for s in container.streams if s.type == kind and not s.disposition & NOT_A_RECORDING]
    best = container.streams.best(kind)
    return best if best in streams else next(iter(streams), None)


def seconds(ticks: int | None, unit: Any) -> float | None:
    return None if ticks is None or unit is None else float(ticks * unit)


def describe(stream: Any) -> dict[str, Any]:
    """One stream as plain values. libav here may lack a decoder that ffmpeg has: then sizes stay unknown."""
    context = stream.codec_context
    facts = {
        "index": stream.index,
        "start_s": seconds(stream.start_time, stream.time_base),
        "duration_s": seconds(stream.duration, stream.time_base) or None,
    }
    if context is None:
        return facts
    if stream.type == "video":
        return facts | {
            "width": context.width,
            "height": context.height,
            "hdr": context.color_trc in HDR_TRANSFERS,
        }
    return facts | {
        "rate": context.sample_rate,
        "channels": context.layout.nb_channels,
        "layout": context.layout.name,
    }


def keep_promise(stream: Any, reply: dict[str, Any]) -> None:
    """Goes by the frame count in an AVI header: without its index, libav only sees what is left."""
    promised = float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    if promised > (reply["duration_s"] or 0.0) + CUT_S:
        reply["duration_s"] = reply["video"]["duration_s"] = promised
        if reply["audio"]:
            reply["audio"]["duration_s"] = None


def scan(container: Any, streams: dict[int, dict[str, Any]]) -> None:
    """Reads every packet, decodes none, and writes down where the streams really begin and end."""
    ends: dict[int, float] = {}
    starts: dict[int, float] = {}
    try:
        for packet in container.demux([container.streams[i] for i in streams]):
            at = packet.pts if packet.pts is not None else packet.dts
            if at is None or packet.size == 0:
                continue
            index = packet.stream.index
            begin = float(at * packet.time_base)
            starts[index] = min(starts.get(index, begin), begin)
            end = begin + float((packet.duration or 0) * packet.time_base)
            ends[index] = max(ends.get(index, end), end)
    except FFmpegError:
        pass  # damaged from here on: what was seen counts
    for index, facts in streams.items():
        if index in ends:
            facts["start_s"] = starts[index] if facts["start_s"] is None else facts["start_s"]
            facts["duration_s"] = ends[index] - facts["start_s"]
        else:
            facts["duration_s"] = None


def words() -> bytes:
    """What libav wrote since the parent emptied the file that is our standard error."""
    return os.pread(2, WORDS_BYTES, 0)


def probe(fd: int, request: dict[str, Any]) -> dict[str, Any]:
    """Everything `probe.Probed` wants to know about the file behind `fd`."""
    os.lseek(fd, 0, os.SEEK_SET)  # where /dev/fd duplicates, as on macOS, the position is shared
    with av.open(
        f"file:/dev/fd/{fd}",
        options={"protocol_whitelist": "file", "format_whitelist": request["formats"]},
        metadata_errors="replace",
        timeout=request["seconds"],
    ) as container:
        picked = {kind: choose(container, kind) for kind in ("video", "audio")}
        found = {kind: describe(s) if s else None for kind, s in picked.items()}
        reply = {
            "format": container.format.name.split(",")[0],
            "start_s": seconds(container.start_time, 1 / av.time_base),
            "duration_s": seconds(container.duration, 1 / av.time_base) or None,
            **found,
        }
        if reply["format"] == "avi" and found["video"]:
            keep_promise(picked["video"], reply)
        tracks = {f["index"]: f for f in found.values() if f}
        guessed = GUESSED in words()
        unknown = reply["duration_s"] is None and any(f["duration_s"] is None for f in tracks.values())
        longest = max([reply["duration_s"] or 0, *(f["duration_s"] or 0 for f in tracks.values())])
        if tracks and (guessed or unknown or longest > request["longest_s"]):
            scan(container, tracks)
            reply["duration_s"] = None
        return reply


def answer(fd: int, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return probe(fd, request)
    except (FFmpegError, OSError, ValueError, MemoryError) as fault:
        return {"fault": type(fault).__name__, "says": getattr(fault, "strerror", None) or str(fault)}


def serve(channel: socket.socket) -> None:
    """Says that it is ready, then answers until the parent hangs up, which it also does by dying."""
    av.logging.set_level(av.logging.WARNING)
    av.logging.restore_default_callback()  # to standard error, in C: PyAV's way can dead-lock with threads
    channel.sendall(b"ready\n")
    while True:
        line, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 1)
        if not line:
            return
        try:
            reply = answer(descriptors[0], json.loads(line))
        finally:
            os.close(descriptors[0])
        channel.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
