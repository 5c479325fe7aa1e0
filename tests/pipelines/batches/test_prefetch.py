"""Every question comes once per epoch, in the order that the seed decides; prefetching changes nothing."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from r2scp.pipelines.batches.prefetch import PREFETCH_DEPTH, prefetch, sequential_batches, shuffled_batches

TIMEOUT_S = 30.0  # how long a test waits for what must happen before it fails


@pytest.mark.parametrize(("count", "batch_size"), [(0, 8), (8, 8), (61, 8), (5, 100)])
def test_each_question_comes_once(count: int, batch_size: int) -> None:
    batches = shuffled_batches(count, batch_size, (1, 2))
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert [row for batch in sequential_batches(count, batch_size) for row in batch] == list(range(count))
    for batch in [*batches, *sequential_batches(count, batch_size)]:
        assert batch.dtype == np.int64
        assert 0 < len(batch) <= batch_size


def test_the_seed_decides_the_order() -> None:
    seeds = ((1, 0), (1, 0), (1, 1), (2, 0))
    orders = [np.concatenate(shuffled_batches(100, 7, seed)).tolist() for seed in seeds]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 17, 61])
def test_workers_share_each_batch(count: int, world: int) -> None:
    whole = shuffled_batches(count, 8, (3,))
    shares = [shuffled_batches(count, 8, (3,), rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "workers would wait for one another for ever"
    whole = [batch for batch in whole if len(batch) >= world]
    for batch, *parts in zip(whole, *shares, strict=True):
        lengths = [len(part) for part in parts]
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
        assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())
    ordered = [np.concatenate([*sequential_batches(count, 8, rank, world), []]) for rank in range(world)]
    assert sorted(np.concatenate(ordered).tolist()) == list(range(count))
    assert max(map(len, ordered)) - min(map(len, ordered)) <= 1


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_results_come_in_order_from_one_other_thread() -> None:
    assert list(prefetch(lambda item: item * item, range(50))) == [item * item for item in range(50)]
    assert list(prefetch(str, [])) == []
    assert list(prefetch(lambda item: None, range(3), depth=1)) == [None] * 3
    threads = set(prefetch(lambda item: threading.current_thread(), range(5)))
    assert len(threads) == 1
    assert threads != {threading.current_thread()}
    assert prefetch_threads() == []


def test_an_error_is_raised_at_its_item() -> None:
    def fail_at_three(item: int) -> int:
        if item == 3:
            raise LookupError("no such row")
        return item

    stream = prefetch(fail_at_three, range(10))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="no such row"):
        next(stream)
    assert list(stream) == []
    assert prefetch_threads() == []


def test_an_error_of_the_items_is_raised_too() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    stream = prefetch(str, items())
    assert next(stream) == "1"
    with pytest.raises(LookupError, match="no more"):
        next(stream)


def test_an_exception_can_be_a_result() -> None:
    error = ValueError("returned, not raised")
    assert list(prefetch(lambda item: error, range(2))) == [error, error]


@pytest.mark.parametrize("count", [1, 4])
def test_closing_early_ends_the_thread(count: int) -> None:
    stream = prefetch(str, iter(int, 1))  # endless
    for _ in range(count):
        next(stream)
    [thread] = prefetch_threads()
    stream.close()
    assert not thread.is_alive()
    assert prefetch_threads() == []


@pytest.mark.parametrize("depth", [1, PREFETCH_DEPTH, 5])
def test_it_runs_ahead_by_its_depth(depth: int) -> None:
    """While an item is worked on, `depth` are ready and one more is being computed."""
    started, condition = [], threading.Condition()

    def start(item: int) -> int:
        with condition:
            started.append(item)
            condition.notify_all()
        return item

    stream = prefetch(start, range(40), depth)
    for index in range(25):
        assert next(stream) == index
        with condition:
            expected = index + depth + 2
            assert condition.wait_for(lambda expected=expected: len(started) >= expected, TIMEOUT_S)
            assert len(started) == expected
    stream.close()
    assert started == list(range(len(started)))


def test_nothing_is_computed_before_the_first_request() -> None:
    stream = prefetch(lambda item: pytest.fail("computed"), range(3))
    assert prefetch_threads() == []
    stream.close()
