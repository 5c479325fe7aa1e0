"""A file is read once for all its questions, and again after a transient failure. The cache is bounded."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from r2scp.jobs.answer.batching import CACHE_BYTES, in_batches
from r2scp.jobs.answer.records import Request
from r2scp.pipelines.recordings.recording import Recording
from r2scp.store.errors import FailureReason, MediaError
from r2scp.store.schema import Modality


def test_the_cache_of_recordings_is_bounded(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    videos = [tmp_path / f"{name}.mp4" for name in "abc"]
    for video in videos:
        video.write_bytes(b"content")

    def read(request: Request) -> Recording:
        counts[Path(request.video).stem] += 1
        recording = whole(request)
        recording.tokens[Modality.AUDIO] = np.zeros((2 * CACHE_BYTES // 5 // 4, 1), np.float32)  # two fit
        return recording

    def requests() -> Iterator[Request]:
        for at in (0, 0, 1, 0, 1, 2, 2, 1, 0):
            yield Request(video=str(videos[at]), question="?")
            assert turn.acquire(timeout=60), "no answer"

    turn = threading.Semaphore(0)
    for batch in in_batches(requests(), read, workers=1, batch_size=1):
        assert len(batch) == 1
        turn.release()
    assert counts == {"a": 2, "b": 1, "c": 1}


def count_reads(video: Path, requests: int, read: Callable[[Request], Recording]) -> int:
    """How often a file is read for a number of requests, one after another."""
    counts: Counter[str] = Counter()

    def counted(request: Request) -> Recording:
        counts[request.video] += 1
        return read(request)

    turn = threading.Semaphore(0)

    def one_by_one() -> Iterator[Request]:
        for at in range(requests):
            yield Request(video=str(video), question=f"question {at}")
            assert turn.acquire(timeout=60), "no answer"

    done = 0
    for batch in in_batches(one_by_one(), counted, workers=1, batch_size=1):
        done += len(batch)
        turn.release()
    assert done == requests
    return counts[str(video)]


def whole(request: Request) -> Recording:
    empty = {"streams": {}, "unusable": {}, "frames": None, "waveform": None}
    return Recording(path=request.video, content_sha256="", duration_s=1, **empty)


def failing(reason: FailureReason) -> Callable[[Request], Recording]:
    def read(request: Request) -> Recording:
        raise MediaError(reason, "no")

    return read


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (whole, 1),
        (failing(FailureReason.CORRUPT), 1),  # the same content fails again
        (failing(FailureReason.TIMEOUT), 3),
        (failing(FailureReason.OUT_OF_MEMORY), 3),
    ],
)
def test_only_transient_failures_are_retried(
    tmp_path: Path, read: Callable[[Request], Recording], count: int
) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(b"content")
    assert count_reads(video, 3, read) == count
