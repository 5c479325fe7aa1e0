"""No file can hang, crash or mislead the decoder, or make it read anything else.

Every file ends as a clip with true statuses or as a MediaError with a true reason. The attacks are
real: playlists that point at a loopback server which records its requests, names that mean something
to ffmpeg, paths that are no regular files, damage at known positions, programs that hang or crash.
"""

import contextlib
import csv
import http.server
import math
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from r2scp.pipelines.decoding.decode import Clip, DecodeLimits, decode
from r2scp.pipelines.decoding.ffmpeg_command import find_program
from r2scp.pipelines.decoding.probe import POOL, Prober
from r2scp.store.errors import FailureReason, MediaError
from r2scp.store.schema import ModalityStatus

RATE = 16_000  # Hz
PRESENT, ABSENT = ModalityStatus.PRESENT, ModalityStatus.ABSENT
PARTIAL, CORRUPT = ModalityStatus.PARTIAL, ModalityStatus.CORRUPT
#: Ten seconds: brightness is 16 + 20 per second, the tone 440 Hz for five seconds and then 1000 Hz.
PICTURE = "color=black:s=64x64:r=25:d=10,format=yuv420p,geq=lum='16+20*floor(T)+mod(N,5)':cb=128:cr=128"
SOUND = "aevalsrc='0.5*sin(2*PI*t*if(lt(t,5),440,1000))':s=16000:d=10"
SMALL_GOP = ["-c:v", "libx264", "-g", "25", "-pix_fmt", "yuv420p", "-bf", "0"]

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(make: Make) -> Path:
    """An intact MP4 of ten seconds with its index first."""
    inputs = ["-f", "lavfi", "-i", PICTURE, "-f", "lavfi", "-i", SOUND]
    return make("whole.mp4", *inputs, *SMALL_GOP, "-c:a", "aac", "-movflags", "+faststart")


def reason(path: object, **limits: float) -> FailureReason:
    """The reason for which the file cannot be decoded."""
    with pytest.raises(MediaError) as error:
        decode(path, DecodeLimits(**limits))
    assert len(error.value.detail) <= 500
    assert error.value.detail.isprintable()
    return error.value.reason


def seconds_shown(clip: Clip) -> list[int]:
    """Which second of the original each token shows, read from its brightness."""
    grey = clip.frames.astype(float).mean(axis=(1, 2, 3))
    return [math.floor((g * 219 / 255 + 1) / 20) for g in grey]


def pitch(waveform: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(np.argmax(spectrum) * RATE / len(waveform))


# --- paths that are no regular files, and names with a meaning ----------------------------------------


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    fifo, link, listener = tmp_path / "fifo.mp4", tmp_path / "loop.mp4", tmp_path / "sock.mp4"
    os.mkfifo(fifo)
    link.symlink_to(link)
    started = time.monotonic()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listener))
        missing = tmp_path / "none.mp4"
        paths = [fifo, link, listener, tmp_path, "/dev/zero", missing, "http://x/y.mp4", "a\0b", ""]
        assert {reason(path) for path in paths} == {FailureReason.UNREADABLE}
    assert time.monotonic() - started < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.mp4"
    path.write_bytes(whole.read_bytes())
    path.chmod(0)
    assert reason(path) is FailureReason.UNREADABLE


NAMES = ["-x.mp4", "-i", "%03d.mp4", "a|b:c.mp4", "concat:x.mp4", "a\nb.mp4", "音楽 – Füße & #1.mp4"]
NAMES += ["$(id).mp4", "'\".mp4", "*?[a].mp4", "pipe:0", "data:,x", "\\x.mp4", " .mp4", "x" * 251 + ".mp4"]
NAMES += ["file:x", "m.m3u8", os.fsdecode(b"\xff\xfe.mp4")]


def test_names_have_no_meaning(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        os.symlink(whole, name)  # symbolic links are followed
        assert seconds_shown(decode(name)) == list(range(10)), name


def test_numbered_images_are_no_sequence(make: Make, tmp_path: Path) -> None:
    red = make("red.png", "-f", "lavfi", "-i", "color=red:s=64x64", "-frames:v", "1").read_bytes()
    blue = make("blue.png", "-f", "lavfi", "-i", "color=blue:s=64x64", "-frames:v", "1").read_bytes()
    for name, data in (("%03d.png", blue), ("001.png", red), ("002.png", red)):
        (tmp_path / name).write_bytes(data)
    frames = decode(tmp_path / "%03d.png").frames
    assert len(frames) == 1
    assert frames[0, 112, 112].argmax() == 2


# --- files that refer to others ---------------------------------------------------------------------


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """The address of a loopback server, and the paths that were requested from it."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", paths
        server.shutdown()
        thread.join()


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
    "hls-after-blank": "\ufeff\n  #EXTM3U\n#EXTINF:10,\n{target}\n",
    "hls-key": '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:10,\n{target}\n',
    "concat": "ffconcat version 1.0\nfile '{target}'\n",
    "concat-bare": "file '{target}'\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet>'
    "<Representation><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=audio 9 RTP/AVP 0\r\n",
    "pls": "[playlist]\nFile1={target}\n",
    "asx": '<ASX version="3.0"><Entry><Ref href="{target}"/></Entry></ASX>',
    "smil": "<smil><body><video src='{target}'/></body></smil>",
    "imf": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>',
    "url": "{target}\n",
    "vobsub": "# VobSub index file, v7\n{target}\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_not_followed(
    kind: str, whole: Path, tmp_path: Path, requests: tuple[str, list[str]]
) -> None:
    address, requested = requests
    for extension in ("mp4", "m3u8"):
        path = tmp_path / f"x.{extension}"
        for target in (f"{address}/hit.ts", f"file://{whole}"):
            path.write_text(PLAYLISTS[kind].format(target=target))
            assert reason(path) is FailureReason.FORBIDDEN_REFERENCE
        # in disguise: only the list of formats stops it; SDP is recognised by any of its lines
        path.write_text("\x01\n# a remark\n" + PLAYLISTS[kind].format(target=f"{address}/hit.ts"))
        expected = FailureReason.FORBIDDEN_REFERENCE if kind == "sdp" else FailureReason.NOT_MEDIA
        assert reason(path) is expected
    assert requested == []


def with_alias(movie: bytes, target: str) -> bytes:
    """A QuickTime movie (index last) that refers to another file for its media data."""
    name = Path(target).name.encode()
    path = target.encode()
    record = bytes(10) + bytes([1]) + b"/".ljust(27, b"\0") + bytes(12)
    record += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    record += struct.pack(">HH", 2, len(path)) + path + b"\0" * (len(path) % 2) + struct.pack(">hh", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    body = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry

    def rewrite(data: bytes) -> bytes:
        out, at = b"", 0
        while at < len(data):
            size, kind = struct.unpack_from(">I4s", data, at)
            inner = data[at + 8 : at + size]
            if kind == b"dref":
                out += body
            elif kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
                inner = rewrite(inner)
                out += struct.pack(">I4s", 8 + len(inner), kind) + inner
            else:
                out += data[at : at + size]
            at += size
        return out

    return rewrite(movie)


def test_a_movie_that_refers_to_another_file_is_not_followed(make: Make, tmp_path: Path) -> None:
    movie = make("plain.mov", "-f", "lavfi", "-i", SOUND, "-c:a", "pcm_s16le")
    assert decode(movie).audio.status is PRESENT
    path = tmp_path / "alias.mov"
    path.write_bytes(with_alias(movie.read_bytes(), str(movie)))
    follow = ["-v", "error", "-enable_drefs", "1", "-use_absolute_path", "1", "-i", path, "-f", "null", "-"]
    followed = subprocess.run([find_program(None).path, *follow], capture_output=True, text=True)
    assert followed.returncode == 0, followed.stderr  # the alias is valid: ffmpeg follows it if told to
    assert reason(path) is FailureReason.FORBIDDEN_REFERENCE


# --- damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extension", "share"),
    [("mp4", 0.35), ("mp4", 0.85), ("mkv", 0.35), ("mov", 0.6), ("avi", 0.6), ("avi", 0.85)],
)
def test_a_file_cut_short_is_partial(make: Make, whole: Path, share: float, extension: str) -> None:
    index_first = ["-c", "copy", "-movflags", "+faststart"]
    copied = {"mp4": index_first, "mov": index_first, "mkv": ["-c", "copy"]}
    encoding = copied.get(extension, ["-c:v", "mjpeg", "-c:a", "pcm_s16le"])
    data = make(f"cut.{extension}", "-i", whole, *encoding).read_bytes()
    path = whole.with_name(f"short{share}.{extension}")
    path.write_bytes(data[: int(len(data) * share)])
    clip = decode(path)
    assert (clip.visual.status, clip.audio.status) == (PARTIAL, PARTIAL)
    assert clip.visual.expected == 10
    assert clip.audio.expected == pytest.approx(10, abs=0.1)
    assert 0.5 < clip.visual.decoded / 10 / share < 1.5
    assert clip.visual.decoded == len(clip.frames)
    assert seconds_shown(clip) == list(range(len(clip.frames)))
    assert clip.audio.decoded == pytest.approx(len(clip.waveform) / RATE, abs=0.1)


@pytest.mark.parametrize(("start", "end"), [(0.3, 0.45), (0.55, 0.7)])
def test_damaged_sound_is_partial_and_keeps_its_time(make: Make, start: float, end: float) -> None:
    path = make("sound.mp4", "-f", "lavfi", "-i", SOUND, "-c:a", "aac")
    data = bytearray(path.read_bytes())
    first, size = data.index(b"mdat") + 4, struct.unpack_from(">I", data, data.index(b"mdat") - 4)[0] - 8
    noise = random.Random(1).randbytes(int(size * (end - start)))
    data[first + int(size * start) : first + int(size * start) + len(noise)] = noise
    path.write_bytes(data)
    clip = decode(path)
    assert clip.audio.status is PARTIAL
    assert clip.audio.expected == pytest.approx(10, abs=0.1)
    assert clip.audio.decoded < 9.9
    assert len(clip.waveform) == pytest.approx(10 * RATE, abs=RATE // 8)
    assert pitch(clip.waveform[RATE // 2 : 2 * RATE]) == pytest.approx(440, abs=2)
    assert pitch(clip.waveform[8 * RATE : 9 * RATE]) == pytest.approx(1000, abs=2)
    assert clip.errors


def test_lost_frames_make_a_picture_partial_and_shift_nothing(make: Make) -> None:
    """Seconds 3 to 5 are overwritten: their tokens repeat older frames, those after them are right."""
    source = make("video.mkv", "-f", "lavfi", "-i", PICTURE, *SMALL_GOP)
    mkv = bytearray(source.read_bytes())
    for offset, size in packet_offsets(source)[75:150]:
        mkv[offset : offset + size] = b"\xff" * size
    path = source.with_name("lost.mkv")
    path.write_bytes(mkv)
    clip = decode(path)
    assert clip.visual.status is PARTIAL
    assert clip.visual.expected == 10
    assert clip.visual.decoded in (7, 8)  # the decoder may conceal a loss with a picture of its own
    shown = seconds_shown(clip)
    assert len(shown) == 10
    assert shown[:3] == [0, 1, 2]
    assert shown[6:] == [6, 7, 8, 9]


def packet_offsets(path: Path) -> list[tuple[int, int]]:
    """Offset and size of each packet of the only stream of a Matroska file, found by its bytes."""
    copy = ["-map", "0", "-c", "copy", "-f", "data", "-"]
    command = [find_program(None).path, "-v", "error", "-i", path, *copy]
    packets = subprocess.run(command, check=True, capture_output=True).stdout
    data, at, offsets = path.read_bytes(), 0, []
    while at < len(packets):
        size = 4 + struct.unpack_from(">I", packets, at)[0]
        offsets.append((data.index(packets[at : at + size]), size))
        at += size
    return offsets


def test_a_header_without_its_data(whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    first = data.index(b"mdat") + 4
    data[first:] = bytes(len(data) - first)
    path = whole.with_name("hollow.mp4")
    path.write_bytes(data)
    assert reason(path) is FailureReason.CORRUPT
    headless = whole.with_name("headless.mp4")
    headless.write_bytes(whole.read_bytes()[:600])
    assert reason(headless) is FailureReason.TRUNCATED


def test_a_corrupt_stream_leaves_the_other_intact(make: Make, whole: Path) -> None:
    data = whole.read_bytes()
    at = data.index(b"avc1", data.index(b"stsd"))
    path = whole.with_name("half.mp4")
    path.write_bytes(data[:at] + b"zzzz" + data[at + 4 :])
    clip = decode(path)
    assert (clip.visual.status, clip.audio.status) == (CORRUPT, PRESENT)
    assert clip.frames is None
    assert (clip.visual.expected, clip.visual.decoded) == (10, 0)
    assert len(clip.waveform) == 10 * RATE


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", FailureReason.EMPTY_FILE),
        (b"not a video at all\n" * 50, FailureReason.NOT_MEDIA),
        (bytes(range(256)) * 8, FailureReason.NOT_MEDIA),
        (bytes(5000), FailureReason.NOT_MEDIA),
        (b"1\n00:00:00,000 --> 00:00:02,000\nsubtitle\n\n", FailureReason.NOT_MEDIA),
        (struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0), FailureReason.TRUNCATED),
    ],
)
def test_files_that_are_no_media(tmp_path: Path, data: bytes, expected: FailureReason) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    assert reason(path) is expected


def test_encrypted_media_is_recognised(make: Make) -> None:
    key = ["-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "0" * 31 + "1"]
    key += ["-encryption_kid", "0" * 32]
    path = make("locked.mp4", "-f", "lavfi", "-i", SOUND, "-c:a", "aac", *key)
    assert reason(path) is FailureReason.ENCRYPTED


def test_random_damage_gives_a_clip_or_a_reason(make: Make, whole: Path) -> None:
    """Bytes flipped, cut out and doubled in seven formats, within a time limit."""
    rng = random.Random(7)
    short = ["-t", "2", "-i", whole]
    encodings = {extension: ["-c", "copy"] for extension in ("mp4", "mkv", "ts", "avi")}
    encodings |= {"ogg": ["-vn", "-c:a", "libvorbis"], "gif": ["-an"], "png": ["-frames:v", "1"]}
    started = time.monotonic()
    for extension, encoding in encodings.items():
        source = make(f"fuzz.{extension}", *short, *encoding).read_bytes()
        for i in range(6):
            data = bytearray(source)
            for _ in range(10 ** (i % 3)):
                at = rng.randrange(len(data))
                data[at] = rng.randrange(256)
            if i >= 3:
                a, b = sorted(rng.randrange(len(data)) for _ in range(2))
                data = data[:a] + (data[b:] if i % 2 else data[a // 2 :])
            path = whole.with_name(f"fuzzed{i}.{extension}")
            path.write_bytes(data)
            with contextlib.suppress(MediaError):
                clip = decode(path, DecodeLimits(seconds_per_file=20))
                assert clip.frames is not None or clip.waveform is not None
                assert {clip.visual.status, clip.audio.status} & {PRESENT, PARTIAL}
    assert time.monotonic() - started < 60


# --- programs that misbehave, and limits ------------------------------------------------------------


def fake_ffmpeg(folder: Path, script: str) -> str:
    """A program that passes for ffmpeg and then runs the script."""
    path = folder / "ffmpeg"
    path.write_text(f'#!/bin/sh\n[ "$1" = -version ] && echo "ffmpeg version 9.9" && exit\n{script}\n')
    path.chmod(0o755)
    return str(path)


def test_a_hang_is_a_timeout_and_the_program_is_killed(whole: Path, tmp_path: Path) -> None:
    program = fake_ffmpeg(tmp_path, f"sleep 600 & echo $$ $! > {tmp_path}/pids; exec sleep 600")
    started = time.monotonic()
    with pytest.raises(MediaError, match=r"more than the 0\.7 s allowed") as error:
        decode(whole, DecodeLimits(seconds_per_file=0.7), ffmpeg=program)
    assert error.value.reason is FailureReason.TIMEOUT
    assert time.monotonic() - started < 10
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            _, alive = psutil.wait_procs([psutil.Process(pid)], timeout=10)
            assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_a_crash_is_reported(whole: Path, tmp_path: Path) -> None:
    program = fake_ffmpeg(tmp_path, 'echo "[h264 @ 0xabc] [error] about to die" >&2; kill -SEGV $$')
    with pytest.raises(MediaError, match=r"signal 11; \[h264\] about to die") as error:
        decode(whole, ffmpeg=program)
    assert error.value.reason is FailureReason.DECODER_CRASHED


def test_more_data_than_the_file_can_contain_is_stopped(whole: Path, tmp_path: Path) -> None:
    program = fake_ffmpeg(
        tmp_path, 'for a in "$@"; do case $a in pipe:*) exec cat /dev/zero >/dev/fd/${a#pipe:};; esac; done'
    )
    with pytest.raises(MediaError) as error:
        decode(whole, ffmpeg=program)
    assert error.value.reason is FailureReason.TOO_LARGE


def test_memory_is_limited(make: Make) -> None:
    source = ["-f", "lavfi", "-i", "testsrc2=s=3840x2160:r=5:d=1"]
    path = make("4k.mkv", *source, "-c:v", "libx264", "-preset", "ultrafast")
    assert reason(path, memory_bytes=90 << 20) is FailureReason.OUT_OF_MEMORY
    assert decode(path, DecodeLimits(memory_bytes=1 << 30)).visual.status is PRESENT


def test_a_prober_killed_while_idle_is_replaced(whole: Path) -> None:
    decode(whole)
    for prober in POOL._idle:
        prober.process.send_signal(signal.SIGKILL)
    assert decode(whole).visual.status is PRESENT


def test_a_file_that_hangs_the_prober_is_a_timeout(whole: Path) -> None:
    decode(whole)
    stopped: list[Prober] = list(POOL._idle)
    for prober in stopped:
        prober.process.send_signal(signal.SIGSTOP)
    assert reason(whole, seconds_per_file=0.5) is FailureReason.TIMEOUT
    POOL.close()
    assert not any(psutil.pid_exists(prober.process.pid) for prober in stopped)
    assert decode(whole).visual.status is PRESENT


def test_children_end_with_a_parent_that_is_killed(whole: Path) -> None:
    script = (
        "import sys, time; from r2scp.pipelines.decoding import decode, probe; decode.decode(sys.argv[1]);"
        "print(probe.POOL._idle[0].process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(whole)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_no_descriptor_and_no_process_is_left(whole: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(whole.read_bytes()[:3000])
    others = {child.pid for child in psutil.Process().children()}  # of other tests, such as a Ray
    decode(whole)
    before = len(os.listdir("/proc/self/fd"))
    for path in [whole, bad, tmp_path, tmp_path / "none"] * 3:
        with contextlib.suppress(MediaError):
            decode(path)
    assert len(os.listdir("/proc/self/fd")) == before
    started = {child.pid for child in psutil.Process().children()} - others
    assert started <= {prober.process.pid for prober in POOL._idle}


# --- real hostile media -----------------------------------------------------------------------------

R, P = FailureReason, PRESENT
#: Files of the hostile collection that differ from what the independent probe found: the reason for
#: which they cannot be stored, or the (visual, audio) statuses with which they are stored.
OUTCOMES: dict[str, FailureReason | tuple[ModalityStatus, ModalityStatus]] = {
    "not_media/1024_incrementing_bytes.mp3": R.NOT_MEDIA,
    "not_media/gitlfs_pointer.mp4": R.NOT_MEDIA,
    "not_media/bad_audio.mp3": R.NOT_MEDIA,
    "zero_byte/emptyfile.mp3": R.EMPTY_FILE,
    "truncated_corrupt/truncated-64bit.mp4": R.CORRUPT,  # an index of data that was cut off
    "truncated_corrupt/64bit.mp4": R.NO_STREAMS,
    "truncated_corrupt/truncated60pct_7tMPoaU2oL4_0_10000.mp4": R.TRUNCATED,  # index was at the end
    "truncated_corrupt/invalid_userdata.mp4": R.CORRUPT,  # its header says 231 s, it has none
    "truncated_corrupt/too-short.mp3": R.CORRUPT,
    "truncated_corrupt/sample_malformed_free_box.mp4": R.TRUNCATED,  # index out of reach
    "truncated_corrupt/test_case_1185230.mp4": R.CORRUPT,
    "truncated_corrupt/sample_missing_stsd.mp4": (P, CORRUPT),
    "unsupported_or_encrypted/short-cenc.mp4": R.ENCRYPTED,
    "unsupported_or_encrypted/sample_fragmented_clearkey.mp4": R.ENCRYPTED,
    "zero_or_no_duration/segment_init.mp4": R.CORRUPT,  # a header without media
    "container_oddities/sample_edit_list_no_sync_frame_before_edit.mp4": (PARTIAL, P),  # 2.0 of 2.8 s decode
}


def hostile() -> list[Any]:
    """The names in the hostile collection. The six-minute clip is slow."""
    root = Path(__file__).resolve().parents[3].parent / "shared" / "media" / "hostile"
    if not root.is_dir():
        return [pytest.param("none", marks=pytest.mark.skip("no real media beside the repository"))]
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("long_gop")) for n in names]


@pytest.mark.realmedia
@pytest.mark.parametrize("name", hostile())
def test_real_hostile_files(shared_dir: Path, name: str, probed_streams: dict) -> None:
    expected = OUTCOMES.get(name, probed_streams[name])
    path = shared_dir / "media" / "hostile" / name
    if isinstance(expected, FailureReason):
        assert reason(path) is expected
        return
    clip = decode(path)
    assert (clip.visual.status, clip.audio.status) == expected
    assert (clip.frames is None) == (expected[0] in (ABSENT, CORRUPT))
    assert (clip.waveform is None) == (expected[1] in (ABSENT, CORRUPT))


@pytest.fixture(scope="session")
def probed_streams(shared_dir: Path) -> dict[str, tuple[ModalityStatus, ModalityStatus]]:
    """Statuses by the independent probe: every stream that exists is present."""
    with (shared_dir / "media" / "MANIFEST.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["path"].startswith("hostile/")]
    flag = {"True": PRESENT, "False": ABSENT, "": ABSENT}
    return {
        row["path"].removeprefix("hostile/"): (flag[row["has_video"]], flag[row["has_audio"]]) for row in rows
    }
