"""The order in which questions come, and the thread that prepares the next batches meanwhile."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import TypeVar

import numpy as np

PREFETCH_DEPTH = 2  # batches prepared while one is worked on

Item = TypeVar("Item")
Made = TypeVar("Made")


def shuffled_batches(
    count: int, batch_size: int, seed: tuple[int, ...], rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """This worker's share of each batch of one pass over `count` questions, in an order that `seed` decides.

    A batch has `batch_size` questions over all `world` workers. The last one is smaller, and left out where
    some worker would get nothing of it.
    """
    order = np.random.default_rng(seed).permutation(count)
    batches = [order[at : at + batch_size] for at in range(0, count, batch_size)]
    return [batch[rank::world] for batch in batches if len(batch) >= world]


def sequential_batches(count: int, batch_size: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """This worker's share of all questions, each once, in their order."""
    mine = np.arange(rank, count, world)
    return [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]


def prefetch(
    make: Callable[[Item], Made], items: Iterable[Item], ahead: int = PREFETCH_DEPTH
) -> Generator[Made, None, None]:
    """`make(item)` for each item, in order, made by a thread up to `ahead` items early.

    What `make` raises is raised here. Closing the iterator early stops the thread.
    """
    # (result,), or what was raised, or None behind the last
    made: queue.Queue[tuple[Made] | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def offer(one: tuple[Made] | BaseException | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                made.put(one, timeout=0.1)  # s; looks up as often to see whether it is still wanted
                return

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                offer((make(item),))
        except BaseException as error:
            offer(error)
        else:
            offer(None)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (one := made.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one[0]
    finally:
        stop.set()
        thread.join()
