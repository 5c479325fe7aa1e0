"""The order of questions, and a thread that prepares the next batches while one is worked on."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import TypeVar

import numpy as np

PREFETCH_DEPTH = 2  # batches prepared while one is worked on
CLOSE_POLL_S = 0.1  # a full queue looks this often whether the consumer has closed the iterator

Item = TypeVar("Item")
Result = TypeVar("Result")


def shuffled_batches(
    count: int, batch_size: int, seed: tuple[int, ...], rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """This worker's share of each batch of one pass over `count` questions, in an order that `seed` decides.

    A batch has `batch_size` questions over all `world` workers. The last one is smaller, and left out where
    some worker would get none of its questions.
    """
    order = np.random.default_rng(seed).permutation(count)
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return [batch[rank::world] for batch in batches if len(batch) >= world]


def sequential_batches(count: int, batch_size: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """This worker's share of all questions, each once, in order."""
    share = np.arange(rank, count, world)
    return [share[start : start + batch_size] for start in range(0, len(share), batch_size)]


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], depth: int = PREFETCH_DEPTH
) -> Generator[Result, None, None]:
    """`function(item)` for each item, in order, computed by a thread up to `depth` items early.

    What `function` raises is raised here. Closing the iterator early stops the thread.
    """
    # (result,), an exception, or None after the last
    results: queue.Queue[tuple[Result] | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(result: tuple[Result] | BaseException | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                results.put(result, timeout=CLOSE_POLL_S)
                return

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put((function(item),))
        except BaseException as error:
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (result := results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result[0]
    finally:
        stop.set()
        thread.join()
