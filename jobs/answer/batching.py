"""Questions as they come, each with its recording decoded ahead, given on in what lots are ready.

A lot never waits for a question that is still to come or to be decoded, only for its own first one: so a
caller who asks one at a time is answered one at a time, and one who asks quickly is answered at full speed.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from r2scp.jobs.answer.records import Ask, Refused
from r2scp.pipelines.recordings.recording import Recording, file_identity
from r2scp.store.errors import TRANSIENT_REASONS, MediaError

AHEAD = 2  # recordings decoded, or being decoded, ahead of the lot at work, for each worker
REMEMBERED = 256  # recordings whose tokens are kept for further questions: 126 MB of 60 s each at D = 1024
REMEMBERED_BYTES = 256 << 20  # of them at most: an hour takes 29 MB
LOOK_UP_S = 0.1  # how often a full queue looks whether it is still wanted

Key = tuple[object, ...]


class InFlight(NamedTuple):
    """A question and its recording, to come; a question that was refused has none."""

    ask: Ask | Refused
    recording: Future[Recording] | None

    @property
    def ready(self) -> bool:
        return self.recording is None or self.recording.done()


def in_lots(
    asked: Iterable[Ask | Refused], read: Callable[[Ask], Recording], workers: int, most: int
) -> Iterator[list[InFlight]]:
    """All that is asked, in order, at most `most` at a time; the first of a lot is always ready.

    What `asked` raises is raised here, behind what came before. `asked` is read by a thread of its own.
    """
    waiting: queue.Queue[InFlight | BaseException | None] = queue.Queue(maxsize=max(1, AHEAD * workers))
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    feeder = _Feeder(waiting, stop, pool, read)
    threading.Thread(target=feeder.feed, args=(asked,), name="asked", daemon=True).start()
    try:
        yield from _lots(waiting, most)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _lots(waiting: "queue.Queue[InFlight | BaseException | None]", most: int) -> Iterator[list[InFlight]]:
    held = waiting.get()
    while isinstance(held, InFlight):
        lot, held_back = [held], False
        if held.recording is not None:
            held.recording.exception()  # waits until it is done
        while len(lot) < most and not held_back:
            try:
                held = waiting.get_nowait()
            except queue.Empty:
                break
            held_back = not isinstance(held, InFlight) or not held.ready
            if isinstance(held, InFlight) and held.ready:
                lot.append(held)
        yield lot
        if not held_back:
            held = waiting.get()
    if isinstance(held, BaseException):
        raise held


class _Feeder:
    """Starts decoding what is asked about, unless it is known."""

    def __init__(
        self,
        waiting: "queue.Queue[InFlight | BaseException | None]",
        stop: threading.Event,
        pool: ThreadPoolExecutor,
        read: Callable[[Ask], Recording],
    ) -> None:
        self._waiting, self._stop, self._pool, self._read = waiting, stop, pool, read
        self._known: OrderedDict[Key, Future[Recording]] = OrderedDict()

    def feed(self, asked: Iterable[Ask | Refused]) -> None:
        """Until the end of what is asked, or until nobody wants it any more."""
        try:
            for ask in asked:
                if self._stop.is_set():
                    return
                self._offer(InFlight(ask, None if isinstance(ask, Refused) else self._start(ask)))
        except BaseException as error:
            self._offer(error)
        else:
            self._offer(None)

    def _start(self, ask: Ask) -> Future[Recording]:
        key = _identity(ask)
        found = self._known.get(key) if key else None
        if found is None or _passing(found):
            found = self._pool.submit(self._read, ask)
        if key:
            self._known[key] = found
            self._known.move_to_end(key)
            while len(self._known) > 1 and (
                len(self._known) > REMEMBERED or sum(map(_bytes, self._known.values())) > REMEMBERED_BYTES
            ):
                self._known.popitem(last=False)
        return found

    def _offer(self, one: InFlight | BaseException | None) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._waiting.put(one, timeout=LOOK_UP_S)
                return


def _bytes(recording: Future[Recording]) -> int:
    """What is held of a recording; 0 while it is decoded."""
    done = recording.done() and not recording.cancelled() and recording.exception() is None
    return recording.result().bytes if done else 0


def _passing(recording: Future[Recording]) -> bool:
    """Whether it failed for a reason that may have gone away by now."""
    error = recording.exception() if recording.done() and not recording.cancelled() else None
    return error is not None and (not isinstance(error, MediaError) or error.reason in TRANSIENT_REASONS)


def _identity(ask: Ask) -> Key | None:
    """What tells one recording, as it is asked about, from another; None where the file cannot be seen."""
    found = file_identity(ask.video)
    return None if found is None else (*found, ask.missing)
