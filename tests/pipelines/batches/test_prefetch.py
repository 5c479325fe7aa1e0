"""Every question comes once an epoch, in the order that the seed decides; reading ahead changes nothing."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from r2scp.pipelines.batches.prefetch import PREFETCH_DEPTH, sequential_batches, prefetch, shuffled_batches

PATIENCE = 30.0  # s; how long a test waits for what must happen before it fails


@pytest.mark.parametrize(("count", "batch_size"), [(0, 8), (1, 8), (8, 8), (61, 8), (61, 1), (5, 100)])
def test_each_question_comes_once(count: int, batch_size: int) -> None:
    batches = shuffled_batches(count, batch_size, (1, 2))
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert [row for batch in sequential_batches(count, batch_size) for row in batch] == list(range(count))
    for batch in [*batches, *sequential_batches(count, batch_size)]:
        assert batch.dtype == np.int64
        assert 0 < len(batch) <= batch_size


def test_the_seed_decides_the_order() -> None:
    orders = [np.concatenate(shuffled_batches(100, 7, seed)).tolist() for seed in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 16, 17, 61])
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


def test_what_is_made_comes_in_order() -> None:
    made = list(prefetch(lambda item: item * item, range(50)))
    assert made == [item * item for item in range(50)]
    assert list(prefetch(str, [])) == []
    assert list(prefetch(lambda item: None, range(3), ahead=1)) == [None] * 3
    assert reading() == []


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_it_is_made_by_one_other_thread() -> None:
    threads = set(prefetch(lambda item: threading.current_thread(), range(5)))
    assert len(threads) == 1
    assert threads != {threading.current_thread()}


def test_what_goes_wrong_goes_wrong_in_its_place() -> None:
    def make(item: int) -> int:
        if item == 3:
            raise LookupError("no such row")
        return item

    stream = prefetch(make, range(10))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="no such row"):
        next(stream)
    assert list(stream) == []
    assert reading() == []


def test_items_may_go_wrong_too() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    stream = prefetch(str, items())
    assert next(stream) == "1"
    with pytest.raises(LookupError, match="no more"):
        next(stream)


def test_an_exception_can_be_a_result() -> None:
    error = ValueError("made, not raised")
    assert list(prefetch(lambda item: error, range(2))) == [error, error]


@pytest.mark.parametrize("taken", [1, 4])
def test_closing_early_ends_the_thread(taken: int) -> None:
    stream = prefetch(str, iter(int, 1))  # for ever
    for _ in range(taken):
        next(stream)
    [thread] = reading()
    stream.close()
    assert not thread.is_alive()
    assert reading() == []


@pytest.mark.parametrize("ahead", [1, PREFETCH_DEPTH, 5])
def test_it_runs_ahead_and_not_too_far(ahead: int) -> None:
    """While item `at` is worked on, `ahead` wait and one more is in the making."""
    begun, counted = [], threading.Condition()

    def make(item: int) -> int:
        with counted:
            begun.append(item)
            counted.notify_all()
        return item

    stream = prefetch(make, range(40), ahead)
    for at in range(25):
        assert next(stream) == at
        with counted:
            assert counted.wait_for(lambda least=at + ahead + 2: len(begun) >= least, PATIENCE)
            assert len(begun) == at + ahead + 2
    stream.close()
    assert begun == list(range(len(begun)))


def test_nothing_is_made_before_it_is_asked_for() -> None:
    stream = prefetch(lambda item: pytest.fail("made"), range(3))
    assert reading() == []
    stream.close()
