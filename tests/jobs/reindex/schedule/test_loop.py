"""A schedule runs a job at its times, one run at a time, and logs what it missed.

Runs are real processes; the time of day is a file that tests and runs move forward.
"""

import contextlib
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cron_oracle import moment

from r2scp.jobs.reindex.cron import ScheduleSettings
from r2scp.jobs.reindex.schedule.loop import ScheduledJob, run_schedule
from r2scp.store.errors import UsageError

RunHourly = Callable[..., tuple[signal.Signals, str]]


class Wall:
    """A clock in a file. Waiting moves it; at its end it stops the schedule, as a user would."""

    def __init__(self, file: Path, start: str, hours: float) -> None:
        self.file, self.begin = file, moment(start)
        self.end = self.begin + timedelta(hours=hours)
        file.write_text("0\n")

    def now(self) -> datetime:
        """`begin` plus the seconds in the file, one number per line."""
        return self.begin + timedelta(seconds=sum(map(float, self.file.read_text().split())))

    def idle(self, seconds: float) -> None:
        assert 0 < seconds <= 30
        self.move(seconds)
        if self.now() >= self.end:
            os.kill(os.getpid(), signal.SIGTERM)

    def move(self, seconds: float) -> None:
        with self.file.open("a") as file:
            file.write(f"{seconds}\n")


@pytest.fixture
def wall(tmp_path: Path) -> Wall:
    return Wall(tmp_path / "wall", "2027-01-10T00:00", hours=4.5)


@pytest.fixture(autouse=True)
def signals_as_on_a_terminal() -> Iterator[None]:
    """Tests in the background may run with SIGINT ignored, which a schedule would respect."""
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def job_that(tmp_path: Path, script: str) -> ScheduledJob:
    """A job whose interpreter is a shell script, which also writes its arguments to `ran`."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$(pwd) $*" >> ran\n{script}\n')
    python.chmod(0o755)
    return ScheduledJob(name="nightly", file=tmp_path / "job.yaml", folder=tmp_path, python=python)


def ran(tmp_path: Path) -> list[str]:
    file = tmp_path / "ran"
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def run_hourly(tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]) -> RunHourly:
    """Runs a script every hour until the schedule is stopped; returns the signal and the log."""

    def run(script: str, idle: Callable[[float], None] = wall.idle) -> tuple[signal.Signals, str]:
        stopped = run_schedule(job_that(tmp_path, script), ScheduleSettings("0 * * * *"), wall.now, idle)
        return stopped, capfd.readouterr().err

    return run


def test_each_run_is_a_process_of_its_own(
    tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    job = job_that(tmp_path, "read x; echo to the log")  # standard input is empty
    stopped = run_schedule(job, ScheduleSettings("0 * * * *"), wall.now, wall.idle)
    assert stopped is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert ran(tmp_path) == [f"{tmp_path} -m r2scp.jobs jobs run {tmp_path}/job.yaml"] * 4
    output = capfd.readouterr()
    assert output.out == "to the log\n" * 4
    first, second, *others = output.err.splitlines()
    assert first == "nightly: cron '0 * * * *' in UTC; next run 2027-01-10 01:00 UTC, in 1 h"
    assert second.startswith("nightly: run of 2027-01-10 01:00 UTC finished with exit code 0 after ")
    assert " s; next run 2027-01-10 02:00 UTC" in second
    assert (len(others), others[-1]) == (4, "nightly: stopped by SIGTERM")


def test_a_job_that_fails_or_is_killed_runs_again(tmp_path: Path, run_hourly: RunHourly) -> None:
    script = 'case $(wc -l < ran) in 1) exit 3;; 2) kill -KILL $$;; 3) rm "$0";; esac'
    _, log = run_hourly(script)
    assert len(ran(tmp_path)) == 3
    assert "01:00 UTC failed with exit code 3 after" in log
    assert "02:00 UTC was ended by SIGKILL after" in log
    assert "03:00 UTC finished with exit code 0" in log
    assert "04:00 UTC could not start: " in log


def test_runs_missed_in_sleep_become_one(tmp_path: Path, wall: Wall, run_hourly: RunHourly) -> None:
    slept = []

    def idle(seconds: float) -> None:
        wall.idle(seconds)
        if not slept and wall.now() > wall.begin + timedelta(minutes=30):
            slept.append(1)
            wall.move(2.5 * 3600)  # until after 03:00

    _, log = run_hourly("", idle)
    assert len(ran(tmp_path)) == 2  # one for 01:00 to 03:00, and 04:00
    assert "3 runs were scheduled from 2027-01-10 01:00 UTC to 2027-01-10 03:00 UTC" in log


def test_a_run_that_takes_too_long_makes_the_next_ones_wait(
    tmp_path: Path, wall: Wall, run_hourly: RunHourly
) -> None:
    """The first run takes from 01:00 to 03:10 and logs when it begins and ends."""
    wall.end += timedelta(hours=1)
    _, log = run_hourly("echo begin >> log; [ $(wc -l < ran) -gt 1 ] || echo 7800 >> wall; echo end >> log")
    assert (tmp_path / "log").read_text() == "begin\nend\n" * 4  # 01:00, 02:00 with 03:00, 04:00, 05:00
    assert "next run 2027-01-10 02:00 UTC, now" in log
    assert "2 runs were scheduled from 2027-01-10 02:00 UTC to 2027-01-10 03:00 UTC" in log


def test_a_late_run_is_logged(tmp_path: Path, run_hourly: RunHourly) -> None:
    _, log = run_hourly("[ $(wc -l < ran) -gt 1 ] || echo 4200 >> wall")
    assert "the run of 2027-01-10 02:00 UTC starts late by 10 min" in log
    assert len(ran(tmp_path)) == 4


def test_a_clock_set_back_repeats_nothing_but_is_followed(
    tmp_path: Path, wall: Wall, run_hourly: RunHourly
) -> None:
    wall.end = moment("2027-01-09T03:00")

    def idle(seconds: float) -> None:
        wall.move(seconds)
        if wall.now() >= wall.end and len(ran(tmp_path)) > 2:
            os.kill(os.getpid(), signal.SIGTERM)

    _, log = run_hourly("case $(wc -l < ran) in 1) echo -1800 >> wall;; 2) echo -90000 >> wall;; esac", idle)
    assert re.findall(r"run of (\S+ \S+) UTC finished", log) == [
        "2027-01-10 01:00",  # then half an hour back: not again
        "2027-01-10 02:00",  # then 25 hours back: from there
        "2027-01-09 02:00",
    ]
    assert "the clock was set back to 2027-01-09 01:00 UTC; rescheduling from there" in log


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_and_waits_for_it(
    tmp_path: Path, run_hourly: RunHourly, stop: signal.Signals
) -> None:
    script = f"trap 'echo tidied > tidied; exit 5' TERM\nkill -{stop.name[3:]} $PPID\n"
    received, log = run_hourly(f"{script}while :; do read x < wall; done")
    assert received is stop
    assert (tmp_path / "tidied").exists()
    assert f"{stop.name}; stopping the run and waiting for it" in log
    assert "failed with exit code 5" in log
    assert len(ran(tmp_path)) == 1


def test_a_second_signal_kills_the_run_and_its_children(tmp_path: Path, run_hourly: RunHourly) -> None:
    script = "sleep 600 & echo $! > started\ntrap 'kill -INT $PPID' TERM\n"
    received, log = run_hourly(f"{script}kill -TERM $PPID\nwhile :; do wait; done")
    assert received is signal.SIGTERM
    assert "SIGINT again; killing the run and its children" in log
    assert "was ended by SIGKILL" in log
    started = int((tmp_path / "started").read_text())
    with contextlib.suppress(ProcessLookupError):  # gone, or about to go
        assert select.select([os.pidfd_open(started)], [], [], 10)[0]


def test_a_schedule_waits_by_the_real_clock_until_a_signal_comes(tmp_path: Path) -> None:
    """A signal that comes just before the wait is not lost."""
    calls = []

    def now() -> datetime:
        if calls == [1]:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(1)
        return moment("2027-01-10T00:00")

    job = job_that(tmp_path, "")
    assert run_schedule(job, ScheduleSettings("0 3 * * *"), now) is signal.SIGINT
    assert len(calls) == 2
    assert ran(tmp_path) == []


@pytest.mark.parametrize("name", ["", "-a", "A", "a" * 41, "a\n", "$(id)"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(UsageError, match="name must be 1 to 40"):
        ScheduledJob(name=name, file=Path("job.yaml"))
