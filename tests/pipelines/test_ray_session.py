"""Tasks side by side on real Ray: results with their numbers, and each way to fail comes out as it should."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import ray.exceptions

from r2scp.pipelines.ray_session import MAX_RETRIES, fan_out
from r2scp.store.errors import CheckpointError, R2SCPError

pytestmark = pytest.mark.usefixtures("local_ray")
PATIENCE_S = 240  # for anything waited for; far beyond what a busy machine needs


def test_results_come_with_their_numbers() -> None:
    items = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert sorted(fan_out(lambda item: 2 * item, items)) == list(enumerate(2 * item for item in items))
    assert list(fan_out(lambda item: item, [])) == []


def test_they_run_side_by_side(tmp_path: Path) -> None:
    """Each of two waits for the other, so neither could end alone."""

    def meet(name: str) -> bool:
        (tmp_path / name).touch()
        until = time.monotonic() + 240
        while not ((tmp_path / "one").exists() and (tmp_path / "two").exists()):
            assert time.monotonic() < until
        return True

    assert [met for _, met in fan_out(meet, ["one", "two"])] == [True, True]


def test_our_errors_come_out_as_they_are() -> None:
    def refuse(item: int) -> int:
        raise CheckpointError(f"number {item} is damaged")

    with pytest.raises(CheckpointError) as refused:
        list(fan_out(refuse, [7]))
    assert type(refused.value) is CheckpointError
    assert str(refused.value) == "number 7 is damaged"


def test_others_come_with_their_traceback() -> None:
    def place_of_the_fault(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError, match="place_of_the_fault") as raised:
        list(fan_out(place_of_the_fault, [0]))
    assert isinstance(raised.value, ray.exceptions.RayTaskError)


def test_what_is_left_is_cancelled(tmp_path: Path) -> None:
    """One fails while another waits for ever and many wait for a core."""

    def work(item: int) -> None:
        begun = tmp_path / f"{item}.begun"
        begun.with_suffix(".part").write_text(str(os.getpid()))
        begun.with_suffix(".part").rename(begun)
        if item:
            signal.pause()
        until = time.monotonic() + 240
        while len(list(tmp_path.glob("*.begun"))) < 2:
            assert time.monotonic() < until
        raise CheckpointError("over")

    with pytest.raises(CheckpointError, match="over"):
        list(fan_out(work, list(range(12))))
    begun = {int(path.read_text()) for path in tmp_path.glob("*.begun") if path.stem != "0"}
    until = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}").exists() for pid in begun):
        assert time.monotonic() < until, "it waits on"
    # what comes later finds the cores free
    assert sorted(fan_out(lambda item: item, [1, 2])) == [(0, 1), (1, 2)]
    assert len(list(tmp_path.glob("*.begun"))) <= 3


def test_a_task_whose_process_dies_is_run_again(tmp_path: Path) -> None:
    def work(item: int) -> int:
        diary = tmp_path / str(item)
        with diary.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if item == 1 and len(diary.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * item

    assert sorted(fan_out(work, [0, 1, 2])) == [(0, 0), (1, 10), (2, 20)]
    assert len(set((tmp_path / "1").read_text().splitlines())) == 2
    assert len((tmp_path / "0").read_text().splitlines()) == 1


def test_one_that_always_dies_is_one_line(tmp_path: Path) -> None:
    def work(item: int) -> None:
        with (tmp_path / "diary").open("a") as file:
            file.write("again\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(R2SCPError, match=r"died 4 times, .* fewer --num-workers") as died:
        list(fan_out(work, [0]))
    assert "\n" not in str(died.value)
    assert (tmp_path / "diary").read_text().count("again") == 1 + MAX_RETRIES
    assert not re.search("[\x00-\x1f]", str(died.value))
