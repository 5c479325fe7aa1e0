"""The program that opens a media file with libav and describes its streams.

`probe.py` runs it as a child process: a file that hangs or crashes libav takes down this process
and nothing else. Only this file imports PyAV. It imports nothing of ours, so that it starts
quickly, by path, wherever the package is installed.

A request is a line of JSON on a socket, with an open descriptor attached; a reply is a line of JSON.
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

#: libav logs this when a duration is only the file size divided by a bit rate.
ESTIMATED = b"Estimating duration from bitrate"
#: Pictures that come with the recording but are not part of it.
STILLS = Disposition.attached_pic | Disposition.timed_thumbnails
HDR_TRANSFERS = (16, 18)  # SMPTE ST 2084 (PQ) and ARIB STD-B67 (HLG), ITU-T H.273 table 3
TRUNCATED_S = 0.5  # an AVI shorter than its header says by more than this has been cut short
LOG_BYTES = 1 << 16  # of libav's log that is searched


def best_stream(container: Any, kind: str) -> Any | None:
    """The stream a player would choose, or None. Cover art does not count as video."""
    streams = [s for s in container.streams if s.type == kind and not s.disposition & STILLS]
    best = container.streams.best(kind)
    return best if best in streams else next(iter(streams), None)


def seconds(ticks: int | None, unit: Any) -> float | None:
    return None if ticks is None or unit is None else float(ticks * unit)


def stream_info(stream: Any) -> dict[str, Any]:
    """One stream as plain values. Sizes are unknown where PyAV has no decoder, although ffmpeg may."""
    context = stream.codec_context
    info = {
        "index": stream.index,
        "start_s": seconds(stream.start_time, stream.time_base),
        "duration_s": seconds(stream.duration, stream.time_base) or None,
    }
    if context is None:
        return info
    if stream.type == "video":
        return info | {
            "width": context.width,
            "height": context.height,
            "hdr": context.color_trc in HDR_TRANSFERS,
        }
    return info | {
        "rate": context.sample_rate,
        "channels": context.layout.nb_channels,
        "layout": context.layout.name,
    }


def apply_frame_count(stream: Any, reply: dict[str, Any]) -> None:
    """Takes the duration of an AVI from the frame count in its header: libav sees only what is left."""
    duration_s = float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    if duration_s > (reply["duration_s"] or 0.0) + TRUNCATED_S:
        reply["duration_s"] = reply["video"]["duration_s"] = duration_s
        if reply["audio"]:
            reply["audio"]["duration_s"] = None


def scan(container: Any, streams: dict[int, dict[str, Any]]) -> None:
    """Reads every packet, decodes none, and corrects where the streams begin and end."""
    ends: dict[int, float] = {}
    starts: dict[int, float] = {}
    try:
        for packet in container.demux([container.streams[i] for i in streams]):
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is None or packet.size == 0:
                continue
            index = packet.stream.index
            start = float(pts * packet.time_base)
            starts[index] = min(starts.get(index, start), start)
            end = start + float((packet.duration or 0) * packet.time_base)
            ends[index] = max(ends.get(index, end), end)
    except FFmpegError:
        pass  # damaged from here on: what has been read counts
    for index, info in streams.items():
        if index in ends:
            info["start_s"] = starts[index] if info["start_s"] is None else info["start_s"]
            info["duration_s"] = ends[index] - info["start_s"]
        else:
            info["duration_s"] = None


def libav_log() -> bytes:
    """libav's log of this file: the parent empties the file behind standard error for each."""
    return os.pread(2, LOG_BYTES, 0)


def probe(fd: int, request: dict[str, Any]) -> dict[str, Any]:
    """The fields of `probe.MediaInfo` for the file behind `fd`."""
    os.lseek(fd, 0, os.SEEK_SET)  # where /dev/fd duplicates, as on macOS, the position is shared
    with av.open(
        f"file:/dev/fd/{fd}",
        options={"protocol_whitelist": "file", "format_whitelist": request["formats"]},
        metadata_errors="replace",
        timeout=request["seconds"],
    ) as container:
        streams = {kind: best_stream(container, kind) for kind in ("video", "audio")}
        infos = {kind: stream_info(s) if s else None for kind, s in streams.items()}
        reply = {
            "format": container.format.name.split(",")[0],
            "start_s": seconds(container.start_time, 1 / av.time_base),
            "duration_s": seconds(container.duration, 1 / av.time_base) or None,
            **infos,
        }
        if reply["format"] == "avi" and infos["video"]:
            apply_frame_count(streams["video"], reply)
        tracks = {info["index"]: info for info in infos.values() if info}
        estimated = ESTIMATED in libav_log()
        unknown = reply["duration_s"] is None and any(info["duration_s"] is None for info in tracks.values())
        longest = max([reply["duration_s"] or 0, *(info["duration_s"] or 0 for info in tracks.values())])
        if tracks and (estimated or unknown or longest > request["longest_s"]):
            scan(container, tracks)
            reply["duration_s"] = None
        return reply


def answer(fd: int, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return probe(fd, request)
    except (FFmpegError, OSError, ValueError, MemoryError) as error:
        return {"error": type(error).__name__, "message": getattr(error, "strerror", None) or str(error)}


def serve(channel: socket.socket) -> None:
    """Reports that it is ready, then answers until the parent closes the socket or ends."""
    av.logging.set_level(av.logging.WARNING)
    av.logging.restore_default_callback()  # logs in C: PyAV's callback can deadlock with threads
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
