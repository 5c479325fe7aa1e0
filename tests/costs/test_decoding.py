"""Decoding starts, opens, wakes up and copies no more than it must: counts, not times."""

import os
import select
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r2scp.pipelines.decoding import decode as decode_module
from r2scp.pipelines.decoding import sandbox
from r2scp.pipelines.decoding.decode import decode
from r2scp.pipelines.decoding.fault_reasons import ENDS_BYTES, is_encrypted
from r2scp.pipelines.decoding.ffmpeg_command import (
    RATE,
    SIZE,
    DecodePass,
    find_program,
    planar_filters,
    video_graph,
)
from r2scp.pipelines.decoding.probe import Prober, VideoTrack
from r2scp.pipelines.decoding.sandbox import PIPE_BYTES, Limits, PipeReader, supervise

SECONDS = 8  # of the clip


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cost") / "clip.mp4"
    inputs = ("-f", "lavfi", "-i", f"testsrc2=s=320x240:r=25:d={SECONDS}")
    inputs += ("-f", "lavfi", "-i", f"sine=440:r=44100:d={SECONDS}")
    command = [find_program(None).path, "-v", "error", *inputs, "-c:v", "libx264", "-preset", "ultrafast"]
    subprocess.run([*command, "-c:a", "aac", "-shortest", str(path)], check=True, timeout=60)
    decode(path)  # starts the prober
    return path


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each expensive call was made."""
    calls: Counter = Counter()

    def counting(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    counting(Prober, "__init__")
    counting(subprocess.Popen, "_execute_child")
    counting(decode_module, "open_regular")
    for name in ("readv", "pipe", "open", "pread"):
        counting(os, name)
    return calls


def test_a_clip_takes_one_process_one_opening_and_three_pipes(clip_file: Path, counts: Counter) -> None:
    decode(clip_file)
    assert counts["_execute_child"] == 1
    assert counts["__init__"] == 0, "the running prober is asked again"
    assert counts["open_regular"] == 1
    assert counts["pipe"] == 3 + 1  # two streams and standard error; one of subprocess, for errors of exec


def test_small_writes_of_a_program_are_read_together(counts: Counter) -> None:
    """A thousand lines within a fraction of a second take a few dozen reads."""
    script = "exec >/dev/fd/$1; i=0; while [ $i -lt 1000 ]; do echo $i; i=$((i+1)); done"
    waits = Counter()

    class Counted:
        def __init__(self) -> None:
            self.poll_object = plain()

        def register(self, *args: int) -> None:
            self.poll_object.register(*args)

        def poll(self, milliseconds: int) -> list:
            waits["poll"] += 1
            return self.poll_object.poll(milliseconds)

    plain = select.poll
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.select, "poll", Counted)
        result = supervise(
            lambda pipes: ["/bin/sh", "-c", script, "sh", str(pipes[0])],
            Limits(
                deadline=time.monotonic() + 60, memory_bytes=1 << 30, pipe_bytes=(1 << 20,), stderr_bytes=1000
            ),
        )
    assert bytes(result.pipes[0]).count(b"\n") == 1000
    assert waits["poll"] < 250


def test_decoded_data_is_not_copied(clip_file: Path) -> None:
    clip = decode(clip_file)
    assert clip.frames is not None
    assert clip.waveform is not None
    for array, size in ((clip.frames, SECONDS * SIZE * SIZE * 3), (clip.waveform, len(clip.waveform) * 4)):
        assert array.nbytes == size
        owner = array
        while isinstance(owner, np.ndarray) and not owner.flags.owndata:
            owner = owner.base
        assert not isinstance(owner, bytes | bytearray), "a view of the memory that the pipe was read to"
    assert abs(len(clip.waveform) - SECONDS * RATE) < RATE // 4


@pytest.mark.parametrize("tail", [False, True])
def test_the_buffer_of_a_pipe_grows_only_when_it_is_full(tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    plain = sandbox._reserve

    def reserve(size: int) -> memoryview:
        reserved.append(size)
        return plain(size)

    monkeypatch.setattr(sandbox, "_reserve", reserve)
    monkeypatch.setattr(sandbox, "FIRST_BUFFER_BYTES", 2 * PIPE_BYTES)
    reading, writing = os.pipe()
    try:
        reader = PipeReader(
            reading, writing, max_bytes=8 * PIPE_BYTES if not tail else PIPE_BYTES, tail_only=tail
        )
        sent = b""
        for at in range(80):
            sent += (piece := bytes([at]) * 50_000)
            assert os.write(writing, piece) == len(piece)
            assert reader.read()
        reader.close_write_end()
        assert not reader.read()
    finally:
        os.close(reading)
        reader.close_write_end()
    assert reader.data == (sent[-PIPE_BYTES:] if tail else sent)
    assert reserved == [3 * PIPE_BYTES] + [6 * PIPE_BYTES] * (not tail)


def test_a_pipe_that_could_not_be_enlarged_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read then waits for data and not for the clock: a small pipe would hold the program up."""
    monkeypatch.setattr(sandbox, "F_SETPIPE_SZ", None)
    reading, writing = os.pipe()
    reader = PipeReader(reading, writing, max_bytes=PIPE_BYTES, tail_only=False)
    os.write(writing, b"x" * 4000)
    assert reader.read()
    assert reader.filling_fast
    reader.close_write_end()
    os.close(reading)


def test_encryption_is_found_at_either_end_of_a_file(tmp_path: Path) -> None:
    mark = b"schm\0\0\0\0cenc"
    for size in (1000, ENDS_BYTES, ENDS_BYTES + 500, 2 * ENDS_BYTES, 5 * ENDS_BYTES):
        places = {0, size - len(mark), size // 3, *range(65_530, 65_540)}
        places |= {ENDS_BYTES - shift for shift in range(0, 13, 3)}
        for place in sorted(places):
            within = 0 <= place <= size - len(mark)
            at_an_end = place <= ENDS_BYTES - len(mark) or place >= size - ENDS_BYTES
            if not within or not at_an_end:
                continue
            path = tmp_path / "marked"
            with path.open("wb") as file:
                file.truncate(size)
                file.seek(place)
                file.write(mark)
            with path.open("rb") as file:
                assert is_encrypted(file.fileno()), (size, place)


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        *(("16x16", "yuv420p"), ("16x16", "gray"), ("226x222", "gbrp"), ("226x222", "yuv420p")),
        *(("448x448", "yuv444p10le"), ("640x360", "yuv420p"), ("640x360", "rgb565le"), ("34x98", "yuv420p")),
    ],
)
def test_planar_scaling_gives_the_same_values(
    size: str, pixels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, high = map(int, size.split("x"))
    track = VideoTrack(index=0, start_s=0.0, duration_s=1.0, width=wide, height=high)
    order = DecodePass(fd=0, info=None, shift=0, end_s=2.0, max_pixels=1 << 20)  # type: ignore[arg-type]
    program = find_program(None)
    fast = video_graph(track, order, program)
    monkeypatch.setattr("r2scp.pipelines.decoding.ffmpeg_command.MIN_PLANAR_SIDE", 1 << 30)
    plain = video_graph(track, order, program)
    assert fast != plain
    source = f"testsrc2=s={size}:r=4:d=1,noise=alls=60,format={pixels}"
    results = []
    for graph in (fast, plain):
        command = [program.path, "-v", "error", "-f", "lavfi", "-i", source, "-vf", graph]
        command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-"]
        results.append(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert len(results[0]) == SIZE * SIZE * 3
    assert results[0] == results[1]


@pytest.mark.parametrize(("wide", "high"), [(336, 224), (224, 400), (0, 0), (8, 640)])
def test_pictures_that_planes_would_round_differently_are_scaled_directly(wide: int, high: int) -> None:
    assert planar_filters(VideoTrack(index=0, start_s=0.0, duration_s=1.0, width=wide, height=high)) == ()
