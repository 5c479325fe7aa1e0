"""Requests in batches, with their recordings decoded ahead.

A batch waits only for its first request, never for one that has not arrived or is not decoded yet. So a
caller who sends one request at a time gets one answer at a time, and one who sends many gets full speed.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from r2scp.jobs.answer.records import Rejected, Request
from r2scp.pipelines.media_file import file_identity
from r2scp.pipelines.recordings.recording import Recording
from r2scp.store.errors import TRANSIENT_REASONS, MediaError

PREFETCH = 2  # recordings decoded ahead, per worker
CACHED_RECORDINGS = 256  # kept for further questions: 126 MB of 60 s each at D = 1024
CACHE_BYTES = 256 << 20  # an hour takes 29 MB
POLL_S = 0.1  # between checks whether the reader of a full queue has gone

Key = tuple[object, ...]


class PendingRequest(NamedTuple):
    """A request and its recording, to be decoded; None for a rejected request."""

    request: Request | Rejected
    recording: Future[Recording] | None

    @property
    def ready(self) -> bool:
        return self.recording is None or self.recording.done()


def in_batches(
    requests: Iterable[Request | Rejected],
    read: Callable[[Request], Recording],
    workers: int,
    batch_size: int,
) -> Iterator[list[PendingRequest]]:
    """All requests, in order, at most `batch_size` at a time; the first of a batch is always ready.

    `requests` is read by a thread of its own. What it raises is raised here, after the requests before it.
    """
    pending: queue.Queue[PendingRequest | BaseException | None] = queue.Queue(
        maxsize=max(1, PREFETCH * workers)
    )
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    feeder = _Feeder(pending, stop, pool, read)
    threading.Thread(target=feeder.feed, args=(requests,), name="requests", daemon=True).start()
    try:
        yield from _batches(pending, batch_size)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(
    pending: "queue.Queue[PendingRequest | BaseException | None]", batch_size: int
) -> Iterator[list[PendingRequest]]:
    item = pending.get()
    while isinstance(item, PendingRequest):
        batch, carried = [item], False  # `carried`: `item` belongs to the next batch
        if item.recording is not None:
            item.recording.exception()  # waits until it is done
        while len(batch) < batch_size and not carried:
            try:
                item = pending.get_nowait()
            except queue.Empty:
                break
            carried = not isinstance(item, PendingRequest) or not item.ready
            if isinstance(item, PendingRequest) and item.ready:
                batch.append(item)
        yield batch
        if not carried:
            item = pending.get()
    if isinstance(item, BaseException):
        raise item


class _Feeder:
    """Starts decoding the recordings of requests, unless they are cached."""

    def __init__(
        self,
        pending: "queue.Queue[PendingRequest | BaseException | None]",
        stop: threading.Event,
        pool: ThreadPoolExecutor,
        read: Callable[[Request], Recording],
    ) -> None:
        self._pending, self._stop, self._pool, self._read = pending, stop, pool, read
        self._cache: OrderedDict[Key, Future[Recording]] = OrderedDict()

    def feed(self, requests: Iterable[Request | Rejected]) -> None:
        """Until the requests end or the reader has gone."""
        try:
            for request in requests:
                if self._stop.is_set():
                    return
                self._offer(
                    PendingRequest(request, None if isinstance(request, Rejected) else self._decode(request))
                )
        except BaseException as error:
            self._offer(error)
        else:
            self._offer(None)

    def _decode(self, request: Request) -> Future[Recording]:
        key = _identity(request)
        recording = self._cache.get(key) if key else None
        if recording is None or _failed_transiently(recording):
            recording = self._pool.submit(self._read, request)
        if key:
            self._cache[key] = recording
            self._cache.move_to_end(key)
            while len(self._cache) > 1 and (
                len(self._cache) > CACHED_RECORDINGS or sum(map(_bytes, self._cache.values())) > CACHE_BYTES
            ):
                self._cache.popitem(last=False)
        return recording

    def _offer(self, item: PendingRequest | BaseException | None) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._pending.put(item, timeout=POLL_S)
                return


def _bytes(recording: Future[Recording]) -> int:
    """Size of a decoded recording; 0 while it is being decoded."""
    done = recording.done() and not recording.cancelled() and recording.exception() is None
    return recording.result().bytes if done else 0


def _failed_transiently(recording: Future[Recording]) -> bool:
    """Whether decoding failed for a reason that may not apply to another try."""
    error = recording.exception() if recording.done() and not recording.cancelled() else None
    return error is not None and (not isinstance(error, MediaError) or error.reason in TRANSIENT_REASONS)


def _identity(request: Request) -> Key | None:
    """Cache key of a recording; None if the file cannot be accessed."""
    identity = file_identity(request.video)
    return None if identity is None else (*identity, request.missing)
