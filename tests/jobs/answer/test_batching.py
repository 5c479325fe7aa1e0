"""A file is read once for all its questions, and again where the reason for not reading it may have gone.

What is remembered is bounded, however long recordings are.
"""

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


def test_long_recordings_are_not_all_remembered(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    videos = [tmp_path / f"{name}.mp4" for name in "abc"]
    for video in videos:
        video.write_bytes(b"content")

    def read(ask: Request) -> Recording:
        counts[Path(ask.video).stem] += 1
        read = whole(ask)
        read.tokens[Modality.AUDIO] = np.zeros((2 * CACHE_BYTES // 5 // 4, 1), np.float32)  # two fit
        return read

    def asked() -> Iterator[Request]:
        for at in (0, 0, 1, 0, 1, 2, 2, 1, 0):
            yield Request(video=str(videos[at]), question="?")
            assert answered.acquire(timeout=60), "nobody answered"

    answered = threading.Semaphore(0)
    for lot in in_batches(asked(), read, workers=1, most=1):
        assert len(lot) == 1
        answered.release()
    assert counts == {"a": 2, "b": 1, "c": 1}


def readings(video: Path, asks: int, read: Callable[[Request], Recording]) -> int:
    """How often a file is read for so many questions, each asked once the one before has its turn."""
    counts: Counter[str] = Counter()

    def counted(ask: Request) -> Recording:
        counts[ask.video] += 1
        return read(ask)

    answered = threading.Semaphore(0)

    def one_by_one() -> Iterator[Request]:
        for at in range(asks):
            yield Request(video=str(video), question=f"question {at}")
            assert answered.acquire(timeout=60), "nobody answered"

    done = 0
    for lot in in_batches(one_by_one(), counted, workers=1, most=1):
        done += len(lot)
        answered.release()
    assert done == asks
    return counts[str(video)]


def whole(ask: Request) -> Recording:
    return Recording(
        path=ask.video, content_sha256="", duration_s=1, streams={}, unusable={}, frames=None, waveform=None
    )


def failing(reason: FailureReason) -> Callable[[Request], Recording]:
    def read(ask: Request) -> Recording:
        raise MediaError(reason, "no")

    return read


@pytest.mark.parametrize(
    ("read", "often"),
    [
        (whole, 1),
        (failing(FailureReason.CORRUPT), 1),  # the same content will not do better
        (failing(FailureReason.TIMEOUT), 3),
        (failing(FailureReason.OUT_OF_MEMORY), 3),
    ],
)
def test_only_what_may_have_gone_away_is_tried_again(
    tmp_path: Path, read: Callable[[Request], Recording], often: int
) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(b"content")
    assert readings(video, 3, read) == often
