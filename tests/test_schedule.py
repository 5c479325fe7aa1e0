"""A schedule runs a job when cron means it to, alone, and says what it missed; its exports say the same.

The times are held against a slow reading of cron's rules, minute by minute, and against systemd's own
calendar. Runs are real processes; the time of day is a file that tests and runs move forward.
"""

import configparser
import contextlib
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import jsonschema
import pytest
import yaml
from ray.dashboard.modules.job.cli import submit as ray_job_submit

from r2scp.jobs.cron_times import ScheduleSettings, next_run, period_of, runs_after, zone_of
from r2scp.jobs.plain_values import built
from r2scp.jobs.schedule import ScheduledJob, run_schedule
from r2scp.jobs.schedule_exports import (
    crontab,
    on_calendar,
    ray_submission,
    ray_submit,
    systemd,
    systemd_units,
)
from r2scp.jobs.schedule_kubernetes import Pods, cronjob, kubernetes_cron, raycronjob, rayjob
from r2scp.store.errors import UsageError

BERLIN = "Europe/Berlin"  # clocks go forward on 2027-03-28 at 01:00 UTC, back on 2027-10-31 at 01:00 UTC
HAVANA = "America/Havana"  # clocks go forward at midnight
LOW_HIGH = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
HOSTILE = 'it\'s 100% $HOME `id` "q" ;#&!*'  # a folder that every format must carry as it is
TEXT = "name: nightly\nschedule:\n  cron: '0 3 * * *'\nnote: \"{{ $(id) }} %n ---\"\n---\nyes: no\n"


def moment(text: str, zone: str = "UTC") -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone_of(zone)).astimezone(UTC)


def runs(cron: str, zone: str, start: str, count: int) -> list[str]:
    """The first runs after `start` (UTC), as the clock of `zone` shows them."""
    found = runs_after(ScheduleSettings(cron, zone), moment(start))
    return [f"{next(found).astimezone(zone_of(zone)):%Y-%m-%d %H:%M %Z}" for _ in range(count)]


# --- what cron means ---


@cache
def values(text: str, low: int, high: int) -> set[int]:
    """One field of numbers, read slowly."""
    found: set[int] = set()
    for term in text.split(","):
        span, _, step = term.partition("/")
        first, _, last = span.partition("-")
        start, end = (low, high) if span == "*" else (int(first), int(last or first))
        found |= set(range(start, end + 1, int(step or 1)))
    return found


def meant(fields: list[str], local: datetime, day_and: bool) -> bool:
    """Whether a minute of the clock on the wall is one that the fields mean."""
    minutes, hours, days, months, weekdays = (
        values(text, *bounds) for text, bounds in zip(fields, LOW_HIGH, strict=True)
    )
    weekday = local.isoweekday()  # Monday 1 to Sunday 7
    on_days = (local.day in days, bool({weekday, weekday % 7} & weekdays))
    day = all(on_days) if day_and else any(on_days)
    return day and local.minute in minutes and local.hour in hours and local.month in months


def slow_runs(cron: str, zone: str, start: datetime, end: datetime) -> list[datetime]:
    """What Debian's cron does in (start, end], minute by minute."""
    fields = cron.split()
    day_and = fields[2].startswith("*") or fields[4].startswith("*")
    tz = zone_of(zone)
    found = set()
    if fields[0].startswith("*") or fields[1].startswith("*"):  # by elapsed time
        at = start
        while (at := at + timedelta(minutes=1)) <= end:
            if meant(fields, at.astimezone(tz), day_and):
                found.add(at)
        return sorted(found)
    local = start.astimezone(tz).replace(tzinfo=None) - timedelta(hours=3)
    while (local := local + timedelta(minutes=1)) <= end.astimezone(tz).replace(tzinfo=None):
        if meant(fields, local, day_and):
            shown = local
            while shown.replace(tzinfo=tz).astimezone(UTC).astimezone(tz).replace(tzinfo=None) != shown:
                shown += timedelta(minutes=1)  # skipped: right after
            found.add(shown.replace(tzinfo=tz).astimezone(UTC))
    return sorted(at for at in found if start < at <= end)


def random_field(chance: random.Random, low: int, high: int) -> str:
    def term() -> str:
        first, last = sorted(chance.sample(range(low, high + 1), 2))
        step = chance.randint(1, last - first)
        wide = chance.randint(1, (high - low) // 2)
        return chance.choice(["*", f"*/{wide}", str(first), f"{first}-{last}", f"{first}-{last}/{step}"])

    return ",".join(term() for _ in range(chance.choice([1, 1, 2])))


def random_cron(chance: random.Random, stars: bool = False) -> str:
    minute, hour, *days = (random_field(chance, low, high) for low, high in LOW_HIGH)
    kept = [text if stars or chance.random() < 0.6 else "*" for text in days]
    return " ".join([minute, hour, kept[0], "*" if chance.random() < 0.7 else kept[1], kept[2]])


def random_settings(count: int, zone: str, seed: int) -> Iterator[ScheduleSettings]:
    chance = random.Random(seed)
    while count:
        cron = random_cron(chance)
        if re.search(r"\b(?:30|31)\S* \S+ \S+$", cron):  # may be a date that never comes
            continue
        yield ScheduleSettings(cron, zone)
        count -= 1


@pytest.mark.parametrize("zone", ["UTC", BERLIN, HAVANA, "Australia/Lord_Howe"])
@pytest.mark.parametrize("start", ["2027-03-13T20:15", "2027-04-03T05:15", "2027-10-30T20:15"])
def test_the_times_are_those_of_a_slow_reading(zone: str, start: str) -> None:
    begin = moment(start)
    end = begin + timedelta(days=2)
    for settings in random_settings(6, zone, seed=len(zone)):
        found = list(takewhile(lambda at: at <= end, runs_after(settings, begin)))
        assert found == slow_runs(settings.cron, zone, begin, end), settings


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        ("0 3 * * *", BERLIN, "2027-01-10T00:00", ["2027-01-10 03:00 CET", "2027-01-11 03:00 CET"]),
        # a day of the month or a weekday: the 1st, and Mondays (2027-02-01 is both, and runs once)
        (
            "0 0 1 * 1",
            "UTC",
            "2027-01-26T00:00",
            ["2027-02-01 00:00 UTC", "2027-02-08 00:00 UTC", "2027-02-15 00:00 UTC"],
        ),
        ("0 0 1 * 1", "UTC", "2027-02-28T00:00", ["2027-03-01 00:00 UTC", "2027-03-08 00:00 UTC"]),
        ("*/15 9-17 * * 1-5", "UTC", "2027-01-08T17:30", ["2027-01-08 17:45 UTC", "2027-01-11 09:00 UTC"]),
        ("0 3 * * 7", "UTC", "2027-01-08T00:00", ["2027-01-10 03:00 UTC", "2027-01-17 03:00 UTC"]),
        ("0 3 * * 0", "UTC", "2027-01-08T00:00", ["2027-01-10 03:00 UTC", "2027-01-17 03:00 UTC"]),
        ("0 3 * * mon", "UTC", "2027-01-08T00:00", ["2027-01-11 03:00 UTC", "2027-01-18 03:00 UTC"]),
        ("0 3 1 JAN *", "UTC", "2027-01-08T00:00", ["2028-01-01 03:00 UTC", "2029-01-01 03:00 UTC"]),
        ("0 0 29 2 *", "UTC", "2027-01-08T00:00", ["2028-02-29 00:00 UTC", "2032-02-29 00:00 UTC"]),
        # a star first, if with a step: both must match
        ("0 0 */2 * 1", "UTC", "2027-01-08T00:00", ["2027-01-11 00:00 UTC", "2027-01-25 00:00 UTC"]),
        # 02:30 is skipped: right after
        ("30 2 * * *", BERLIN, "2027-03-27T12:00", ["2027-03-28 03:00 CEST", "2027-03-29 02:30 CEST"]),
        # 02:30 comes twice: the first
        ("30 2 * * *", BERLIN, "2027-10-30T12:00", ["2027-10-31 02:30 CEST", "2027-11-01 02:30 CET"]),
        # midnight is skipped: an hour with a star in its field is not made up for, a fixed one right after
        ("*/30 0,2 * * *", HAVANA, "2027-03-14T04:45", ["2027-03-14 02:00 CDT", "2027-03-14 02:30 CDT"]),
        ("0 * 14 3 *", HAVANA, "2027-03-13T12:00", ["2027-03-14 01:00 CDT", "2027-03-14 02:00 CDT"]),
        (
            "*/45 1,2 * * 0",
            "Asia/Beirut",
            "2027-03-26T21:00",
            ["2027-03-28 01:00 EEST", "2027-03-28 01:45 EEST"],
        ),
        ("0 0 * * *", HAVANA, "2027-03-13T12:00", ["2027-03-14 01:00 CDT", "2027-03-15 00:00 CDT"]),
        # hourly: an hour of elapsed time, always
        (
            "30 * * * *",
            BERLIN,
            "2027-10-31T00:00",
            ["2027-10-31 02:30 CEST", "2027-10-31 02:30 CET", "2027-10-31 03:30 CET"],
        ),
    ],
)
def test_cron_means_what_it_says(cron: str, zone: str, start: str, expected: list[str]) -> None:
    assert runs(cron, zone, start, len(expected)) == expected


def test_an_hour_that_comes_twice_gives_no_run_in_the_past() -> None:
    settings = ScheduleSettings("30 2 * * *", BERLIN)
    second_time = moment("2027-10-31T01:10")  # 02:10 for the second time; 02:30 was at 00:30 UTC
    assert next_run(settings, second_time) == moment("2027-11-01T01:30")
    for minute in range(0, 300, 7):
        at = moment("2027-10-30T22:00") + timedelta(minutes=minute)
        assert next_run(settings, at) > at


@pytest.mark.parametrize(
    ("cron", "said"),
    [
        ("", "cron must be five fields"),
        ("* * * *", "cron must be five fields"),
        ("0 * * * * *", "cron must be five fields"),
        ("@daily", "cron must be five fields"),
        ("0 ٣ * * *", "cron must be five fields"),
        ("60 * * * *", "cron: minute must be *, 0 to 59,"),
        ("* 24 * * *", "cron: hour must be *, 0 to 23,"),
        ("* * 0 * *", "cron: day-of-month must be *, 1 to 31,"),
        ("* * * 13 *", "cron: month must be *, 1 to 12 or JAN to DEC,"),
        ("* * * * 8", "cron: day-of-week must be *, 0 to 7 or SUN to SAT,"),
        ("* * * MON *", "cron: month must be"),
        ("JAN * * * *", "cron: minute must be"),
        ("* * L * *", "cron: day-of-month must be"),
        ("* * * * MON#2", "cron: day-of-week must be"),
        ("* * * * 5L", "cron: day-of-week must be"),
        ("? * * * *", "cron: minute must be"),
        ("1, * * * *", "cron: minute must be"),
        ("*-5 * * * *", "cron: minute must be"),
        ("1-2-3 * * * *", "cron: minute must be"),
        ("* * * * FRI-SUN", "cron: a range of day-of-week must rise; got 'FRI-SUN'"),
        ("*/90 * * * *", "cron: a step of minute must be 1 or more and reach a second value"),
        ("*/0 * * * *", "cron: a step of minute must be"),
        ("5/15 * * * *", "write 5-59/15 for every 15 from 5 on, or 5"),
        ("0 0 30 2 *", "'0 0 30 2 *' never does"),
        ("0 0 31 4,6 *", "never does"),
    ],
)
def test_what_cron_does_not_mean_is_refused_in_one_line(cron: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        ScheduleSettings(cron)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "zone", ["", "Mars", "Europe", "../etc/passwd", "/etc/localtime", "localtime", "Europe/Berlin\nX"]
)
def test_a_timezone_must_be_one(zone: str) -> None:
    with pytest.raises(UsageError, match="timezone must be a name of the IANA database"):
        ScheduleSettings("0 3 * * *", zone)


def test_the_section_of_a_file_is_held_to_its_keys() -> None:
    assert built(ScheduleSettings, {"cron": "0 3 * * *"}, "schedule").timezone == "UTC"
    for values_, said in (
        ({"cron": 3}, "schedule.cron must be a string"),
        ({"cron": "0 3 * * *", "zone": "UTC"}, "schedule has no zone"),
        ({}, "schedule must say cron"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            built(ScheduleSettings, values_, "schedule")


def test_a_period_lasts_from_one_run_to_the_next() -> None:
    yearly = ScheduleSettings("0 0 29 2 *")
    assert period_of(yearly, moment("2027-06-01T00:00")) == moment("2024-02-29T00:00")
    for settings in random_settings(12, BERLIN, seed=5):
        times = [
            at for at, _ in zip(runs_after(settings, moment("2027-10-30T20:00")), range(4), strict=False)
        ]
        for this, after in pairwise(times):
            assert period_of(settings, this) == this
            assert period_of(settings, after - timedelta(seconds=1)) == this


# --- in the foreground ---


class Wall:
    """A clock in a file. To wait moves it; at its end it rings, as a user who stops the schedule would."""

    def __init__(self, file: Path, start: str, hours: float) -> None:
        self.file, self.begin = file, moment(start)
        self.end = self.begin + timedelta(hours=hours)
        file.write_text("0\n")

    def now(self) -> datetime:
        """`begin` and all the seconds that the file holds, one number a line."""
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
    """Who starts tests in the background may have SIGINT ignored, which a schedule would respect."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def job_that(tmp_path: Path, script: str) -> ScheduledJob:
    """A job whose interpreter is a shell script. It notes its arguments in `ran`."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$(pwd) $*" >> {shlex.quote(str(tmp_path))}/ran\n{script}\n')
    python.chmod(0o755)
    return ScheduledJob(name="nightly", file=tmp_path / "job.yaml", folder=tmp_path, python=python)


def ran(tmp_path: Path) -> list[str]:
    file = tmp_path / "ran"
    return file.read_text().splitlines() if file.exists() else []


def test_each_run_is_a_program_of_its_own(
    tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    job = job_that(tmp_path, "read x; echo to the log")  # nothing to read: it goes on
    stopped = run_schedule(job, ScheduleSettings("0 * * * *"), wall.now, wall.idle)
    assert stopped is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert ran(tmp_path) == [f"{tmp_path} -m r2scp.jobs jobs run {tmp_path}/job.yaml"] * 4
    said = capfd.readouterr()
    assert said.out == "to the log\n" * 4
    lines = said.err.splitlines()
    assert lines[0] == "nightly: cron '0 * * * *' in UTC; next run 2027-01-10 01:00 UTC, in 1 h"
    told = (
        r"nightly: run of 2027-01-10 01:00 UTC finished with exit code 0 after \d s; next run .* 02:00 UTC.*"
    )
    assert re.fullmatch(told, lines[1])
    assert lines[-1] == "nightly: stopped by SIGTERM"
    assert len(lines) == 6


def test_a_job_that_fails_or_is_killed_runs_again(
    tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = f'case $(wc -l < {tmp_path}/ran) in 1) exit 3;; 2) kill -KILL $$;; 3) rm "$0";; esac'
    run_schedule(job_that(tmp_path, fails), ScheduleSettings("0 * * * *"), wall.now, wall.idle)
    said = capfd.readouterr().err
    assert len(ran(tmp_path)) == 3
    assert "01:00 UTC failed with exit code 3 after" in said
    assert "02:00 UTC was ended by SIGKILL after" in said
    assert "03:00 UTC finished with exit code 0" in said
    assert "04:00 UTC could not start: " in said


def test_runs_missed_in_sleep_become_one(
    tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]
) -> None:
    slept = []

    def idle(seconds: float) -> None:
        wall.idle(seconds)
        if not slept and wall.now() > wall.begin + timedelta(minutes=30):
            slept.append(1)
            wall.move(2.5 * 3600)  # until after 03:00

    run_schedule(job_that(tmp_path, ""), ScheduleSettings("0 * * * *"), wall.now, idle)
    said = capfd.readouterr().err
    assert len(ran(tmp_path)) == 2  # one for 01:00 to 03:00, and 04:00
    assert (
        "3 runs fell due from 2027-01-10 01:00 UTC to 2027-01-10 03:00 UTC and did not start in time" in said
    )


def test_a_run_that_takes_too_long_makes_the_next_ones_wait(
    tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first run takes from 01:00 to 03:10, and tells when it begins and ends."""
    wall.end += timedelta(hours=1)
    here = shlex.quote(str(tmp_path))
    slow = f"echo begin >> {here}/log\n[ $(wc -l < {here}/ran) -gt 1 ] || echo 7800 >> {here}/wall\n"
    job = job_that(tmp_path, f"{slow}echo end >> {here}/log")
    run_schedule(job, ScheduleSettings("0 * * * *"), wall.now, wall.idle)
    said = capfd.readouterr().err
    assert (tmp_path / "log").read_text() == "begin\nend\n" * 4  # 01:00, 02:00 with 03:00, 04:00, 05:00
    assert "next run 2027-01-10 02:00 UTC, now" in said
    assert "2 runs fell due from 2027-01-10 02:00 UTC to 2027-01-10 03:00 UTC" in said


def test_a_single_late_run_is_told(tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]) -> None:
    here = shlex.quote(str(tmp_path))
    job = job_that(tmp_path, f"[ $(wc -l < {here}/ran) -gt 1 ] || echo 4200 >> {here}/wall")
    run_schedule(job, ScheduleSettings("0 * * * *"), wall.now, wall.idle)
    assert "the run of 2027-01-10 02:00 UTC starts late by 10 min" in capfd.readouterr().err
    assert len(ran(tmp_path)) == 4


def test_a_clock_set_back_repeats_nothing_but_is_followed(
    tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]
) -> None:
    here = shlex.quote(str(tmp_path))
    back = (
        f"case $(wc -l < {here}/ran) in 1) echo -1800 >> {here}/wall;; 2) echo -90000 >> {here}/wall;; esac"
    )
    wall.end = moment("2027-01-09T03:00")
    job = job_that(tmp_path, back)

    def idle(seconds: float) -> None:
        wall.move(seconds)
        if wall.now() >= wall.end and len(ran(tmp_path)) > 2:
            os.kill(os.getpid(), signal.SIGTERM)

    run_schedule(job, ScheduleSettings("0 * * * *"), wall.now, idle)
    said = capfd.readouterr().err
    assert re.findall(r"run of (\S+ \S+) UTC finished", said) == [
        "2027-01-10 01:00",  # then half an hour back: not again
        "2027-01-10 02:00",  # then 25 hours back: from there
        "2027-01-09 02:00",
    ]
    assert "the clock was set back to 2027-01-09 01:00 UTC; counting from there" in said


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_and_waits_for_it(
    tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str], asked: signal.Signals
) -> None:
    here = shlex.quote(str(tmp_path))
    script = f"trap 'echo tidied > {here}/tidied; exit 5' TERM\nkill -{asked.name[3:]} $PPID\n"
    job = job_that(tmp_path, f"{script}while :; do read x < {here}/wall; done")
    assert run_schedule(job, ScheduleSettings("0 * * * *"), wall.now, wall.idle) is asked
    assert (tmp_path / "tidied").exists()
    said = capfd.readouterr().err
    assert f"{asked.name}; ending the run and waiting for it" in said
    assert "failed with exit code 5" in said
    assert len(ran(tmp_path)) == 1


def test_a_second_signal_kills_the_run_and_what_it_started(
    tmp_path: Path, wall: Wall, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"sleep 600 & echo $! > {shlex.quote(str(tmp_path))}/started\ntrap 'kill -INT $PPID' TERM\n"
    job = job_that(tmp_path, f"{script}kill -TERM $PPID\nwhile :; do wait; done")
    assert run_schedule(job, ScheduleSettings("0 * * * *"), wall.now, wall.idle) is signal.SIGTERM
    said = capfd.readouterr().err
    assert "SIGINT again; killing the run and all it started" in said
    assert "was ended by SIGKILL" in said
    started = int((tmp_path / "started").read_text())
    with contextlib.suppress(ProcessLookupError):  # gone, or about to go
        assert select.select([os.pidfd_open(started)], [], [], 10)[0]


def test_a_schedule_waits_by_the_real_clock_until_a_signal_comes(tmp_path: Path) -> None:
    """The wait that users get: the signal is there before it begins, and is not lost."""
    asked = []

    def now() -> datetime:
        if asked == [1]:
            os.kill(os.getpid(), signal.SIGINT)
        asked.append(1)
        return moment("2027-01-10T00:00")

    job = job_that(tmp_path, "")
    assert run_schedule(job, ScheduleSettings("0 3 * * *"), now) is signal.SIGINT
    assert len(asked) == 2
    assert ran(tmp_path) == []


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a" * 41, "a\n", "a/b", "$(id)"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(UsageError, match="name must be 1 to 40"):
        ScheduledJob(name=name, file=Path("job.yaml"))


# --- exports ---


@pytest.fixture
def hostile(tmp_path: Path) -> ScheduledJob:
    """A job whose paths are named to break out of any quotes; its interpreter notes where it ran, and how."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    python = tmp_path / "100% $HOME `id` ;#&" / "python"  # no quotes: systemd takes no such program
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n{ pwd; printf "%s\\n" "$@"; } > ran\n')
    python.chmod(0o755)
    return ScheduledJob(name="nightly", file=folder / "job.yaml", folder=folder, python=python)


def test_the_crontab_line_runs_the_job_where_and_as_it_says(hostile: ScheduledJob) -> None:
    settings = ScheduleSettings("*/15 9-17 * JAN,jun MON-FRI,7", BERLIN)
    *comments, zone, line, rest = crontab(hostile, settings).split("\n")
    assert rest == ""
    assert all(comment.startswith("# ") for comment in comments)
    assert zone == f"CRON_TZ={BERLIN}"
    *fields, command = line.split(" ", 5)
    assert " ".join(fields) == "*/15 9-17 * 1,6 1-5,7"
    start = moment("2027-01-01T00:00")
    again = runs_after(ScheduleSettings(" ".join(fields), BERLIN), start)
    assert [at for at, _ in zip(again, range(50), strict=False)] == [
        at for at, _ in zip(runs_after(settings, start), range(50), strict=False)
    ]
    assert not re.search(r"(?<!\\)%", command)  # cron would end the command there
    subprocess.run(["/bin/sh", "-c", command.replace("\\%", "%")], check=True, env={}, cwd="/")
    noted = (hostile.folder / "ran").read_text().splitlines()
    assert noted == [str(hostile.folder), "-m", "r2scp.jobs", "jobs", "run", str(hostile.file)]


@pytest.mark.parametrize("broken", ["a\nb", "a\\b", "a\x1b[2J", "a\u202eb", "a "])
def test_a_path_that_a_line_cannot_hold_is_refused(broken: str) -> None:
    job = ScheduledJob(name="nightly", file=Path("/srv") / broken)
    settings = ScheduleSettings("0 3 * * *")
    for export in (crontab, systemd, lambda *both: ray_submit(*both, moment("2027-01-01T00:00"))):
        with pytest.raises(UsageError, match="the path of the file must have no control characters"):
            export(job, settings)
    long = ScheduledJob(
        name="nightly", file=Path("/srv") / ("x" * 250) / ("y" * 250), folder=Path("/" + 500 * "z")
    )
    with pytest.raises(UsageError, match="must have at most 998 characters; got 1"):
        crontab(long, settings)


def test_systemd_units_read_as_units(hostile: ScheduledJob) -> None:
    units = systemd_units(hostile, ScheduleSettings("0 0 1 * 1", BERLIN))
    assert list(units) == ["r2scp-nightly.service", "r2scp-nightly.timer"]
    read = {}
    for name, text in units.items():
        read[name] = configparser.ConfigParser(interpolation=None, strict=False, comment_prefixes=("#",))
        read[name].optionxform = str
        read[name].read_string(text)
        assert f"# ~/.config/systemd/user/{name}\n{text}" in systemd(
            hostile, ScheduleSettings("0 0 1 * 1", BERLIN)
        )
    service, timer = read["r2scp-nightly.service"]["Service"], read["r2scp-nightly.timer"]["Timer"]
    assert service["Type"] == "oneshot"
    assert service["WorkingDirectory"].replace("%%", "%") == str(hostile.folder)
    assert service["ExecStart"].startswith(":")
    assert not re.search("%", service["ExecStart"].replace("%%", ""))
    words = [word.replace("%%", "%") for word in re.findall(r'"((?:[^"\\]|\\.)*)"', service["ExecStart"])]
    assert [re.sub(r"\\(.)", r"\1", word) for word in words] == list(hostile.command)
    assert timer["Persistent"] == "true"
    assert units["r2scp-nightly.timer"].count("OnCalendar=") == 2


def systemd_analyze() -> str:
    program = shutil.which("systemd-analyze")
    if not program:
        pytest.skip("no systemd-analyze on this machine")
    return program


def test_systemd_itself_takes_the_units(hostile: ScheduledJob, tmp_path: Path) -> None:
    files = []
    for name, text in systemd_units(hostile, ScheduleSettings("*/7 3 1 * mon", BERLIN)).items():
        (tmp_path / name).write_text(text)
        files.append(str(tmp_path / name))
    done = subprocess.run([systemd_analyze(), "verify", *files], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("zone", ["UTC", BERLIN])
def test_systemd_counts_the_same_times(zone: str) -> None:
    """Away from the nights when clocks change, where systemd goes its own way and the timer says so."""
    program, start = systemd_analyze(), moment("2027-11-02T00:00")
    before_spring = moment("2028-03-20T00:00")
    settings = [ScheduleSettings("0 0 1 * 1", zone), ScheduleSettings("0 3 * * 7", zone)]
    for one in [*settings, *random_settings(16, zone, seed=9)]:
        found = set()
        for event in on_calendar(one):
            words = [
                program,
                "calendar",
                f"--base-time={start:%Y-%m-%d %H:%M:%S} UTC",
                "--iterations=12",
                event,
            ]
            shown = subprocess.run(
                words, capture_output=True, text=True, check=True, env={"TZ": "UTC", "LC_ALL": "C"}
            )
            stamps = re.findall(r"(?:Next elapse|Iter\. #\d+): \w+ (\S+ \S+) UTC", shown.stdout)
            found |= {moment(stamp) for stamp in stamps}
        expected = [at for at, _ in zip(runs_after(one, start), range(12), strict=False)]
        both = [
            (left, right)
            for left, right in zip(sorted(found), expected, strict=False)
            if right < before_spring
        ]
        assert both or expected[0] >= before_spring
        assert all(left == right for left, right in both), one


def test_a_program_that_systemd_cannot_name_is_refused() -> None:
    job = ScheduledJob(name="nightly", file=Path("job.yaml"), python=Path("/it's/python"))
    with pytest.raises(UsageError, match="the path of python must have no quotes for systemd"):
        systemd_units(job, ScheduleSettings("0 3 * * *"))


def test_the_timer_says_where_clocks_make_a_difference() -> None:
    job = ScheduledJob(name="nightly", file=Path("/srv/job.yaml"))
    note = "Where clocks change, systemd is not cron"
    assert note in systemd(job, ScheduleSettings("30 2 * * *", BERLIN))
    assert note not in systemd(job, ScheduleSettings("30 2 * * *"))


def test_rays_own_parser_takes_the_line(hostile: ScheduledJob) -> None:
    settings, at = ScheduleSettings("0 3 * * *", BERLIN), moment("2027-01-10T12:00")
    line = ray_submit(hostile, settings, at, "http://head:8265", upload=True)
    assert line.count("\n") == 1
    words = shlex.split(line)
    assert words[:3] == ["ray", "job", "submit"]
    given = ray_job_submit.make_context("submit", words[3:]).params
    assert given["submission_id"] == "nightly-20270110T0200Z"
    assert given["address"] == "http://head:8265"
    assert given["working_dir"] == str(hostile.folder)
    assert given["entrypoint"] == ("python", "-m", "r2scp.jobs", "jobs", "run", "./job.yaml")
    plain = shlex.split(ray_submit(hostile, settings, at))
    given = ray_job_submit.make_context("submit", plain[3:]).params
    assert given["address"] is given["working_dir"] is None
    assert given["entrypoint"][-1] == str(hostile.file)


def test_a_submission_has_one_name_from_one_run_to_the_next() -> None:
    settings = ScheduleSettings("0 3 * * *", BERLIN)
    job, other = (ScheduledJob(name=name, file=Path("job.yaml")) for name in ("nightly", "weekly"))
    tonight = [
        ray_submission(job, settings, moment(at, BERLIN)) for at in ("2027-01-10T03:00", "2027-01-11T02:59")
    ]
    assert tonight == ["nightly-20270110T0200Z"] * 2
    assert ray_submission(job, settings, moment("2027-01-11T03:00", BERLIN)) not in tonight
    assert ray_submission(other, settings, moment("2027-01-10T03:00", BERLIN)) not in tonight


# --- Kubernetes ---


def thing(needed: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """A schema of an object that has `needed`, may have `more`, and nothing else."""
    known = {**needed, **(more or {})}
    return {"type": "object", "properties": known, "required": list(needed), "additionalProperties": False}


def some(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


STRING = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 52}
METADATA = thing({"name": LABEL}, {"labels": {"type": "object"}})
CONTAINER = thing(
    {"name": LABEL, "image": STRING},
    {
        "command": some(STRING),
        "env": some(thing({"name": STRING, "valueFrom": {"type": "object"}})),
        "resources": thing({"requests": {"type": "object"}, "limits": {"type": "object"}}),
        "volumeMounts": some(
            thing({"name": LABEL, "mountPath": STRING}, {"subPath": STRING, "readOnly": {}})
        ),
    },
)
VOLUME = thing({"name": LABEL, "configMap": thing({"name": LABEL})})
POD = thing(
    {"spec": thing({"containers": some(CONTAINER)}, {"volumes": some(VOLUME), "restartPolicy": STRING})}
)
GROUP = thing(
    {"groupName": LABEL, "minReplicas": COUNT, "maxReplicas": COUNT, "template": POD},
    {"replicas": COUNT, "rayStartParams": {"type": "object"}},
)
RAY_CLUSTER = thing(
    {"headGroupSpec": thing({"template": POD}, {"rayStartParams": {"type": "object"}})},
    {"rayVersion": STRING, "workerGroupSpecs": {"type": "array", "items": GROUP}},
)
RAY_JOB = thing(
    {"entrypoint": STRING, "rayClusterSpec": RAY_CLUSTER},
    {"shutdownAfterJobFinishes": {"const": True}, "ttlSecondsAfterFinished": COUNT, "backoffLimit": COUNT},
)
RAY_CRON_JOB = thing({"schedule": STRING, "timeZone": STRING, "jobTemplate": RAY_JOB})
CRON_JOB = thing(
    {
        "schedule": STRING,
        "timeZone": STRING,
        "concurrencyPolicy": {"const": "Forbid"},
        "jobTemplate": thing({"spec": thing({"template": POD}, {"backoffLimit": COUNT})}),
    },
    {"startingDeadlineSeconds": COUNT},
)


def manifest(text: str, version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The object beside the ConfigMap, both checked."""
    config, found = yaml.safe_load_all(text)
    parts = {"apiVersion": {"const": "v1"}, "kind": {"const": "ConfigMap"}, "metadata": METADATA}
    jsonschema.validate(config, thing({**parts, "data": thing({"job.yaml": STRING})}))
    assert config["data"]["job.yaml"] == TEXT
    parts = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec}
    jsonschema.validate(found, thing(parts))
    volumes = re.findall(r"configMap:\s+name: (\S+)", text)
    assert set(volumes) == {config["metadata"]["name"]}
    return found["spec"]


NIGHTLY = ScheduledJob(name="nightly", file=Path("job.yaml"))
PODS = Pods(image="registry:5000/r2scp-pipe:0.1.0", workers=2, gpus=1)


def test_the_ray_job_is_what_kuberay_takes() -> None:
    spec = manifest(rayjob(NIGHTLY, TEXT, PODS), "ray.io/v1", "RayJob", RAY_JOB)
    cluster = spec["rayClusterSpec"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert spec["entrypoint"].split()[-1] == head["volumeMounts"][0]["mountPath"]
    assert cluster["workerGroupSpecs"][0]["replicas"] == 2
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": 1}
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_the_ray_cron_job_is_what_kuberay_takes() -> None:
    settings = ScheduleSettings("0 3 * * 7", BERLIN)
    text = raycronjob(NIGHTLY, settings, TEXT, PODS)
    spec = manifest(text, "ray.io/v1", "RayCronJob", RAY_CRON_JOB)
    assert (spec["schedule"], spec["timeZone"]) == ("0 3 * * 0", BERLIN)
    once = manifest(rayjob(NIGHTLY, TEXT, PODS), "ray.io/v1", "RayJob", RAY_JOB)
    assert spec["jobTemplate"] == once


def test_the_cron_job_forbids_overlap_and_names_each_period_once() -> None:
    text = cronjob(NIGHTLY, ScheduleSettings("0 3 * * *", BERLIN), TEXT, PODS.image, "http://head:8265")
    spec = manifest(text, "batch/v1", "CronJob", CRON_JOB)
    job = spec["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    given = ray_job_submit.make_context("submit", container["command"][3:]).params
    assert given["submission_id"] == "$(RUN)"  # filled in by Kubernetes with the name of the period's Job
    assert container["env"][0]["name"] == "RUN"
    assert container["volumeMounts"][0]["mountPath"] == f"{given['working_dir']}/{given['entrypoint'][-1]}"
    assert not given["no_wait"]  # the pod lives as long as the job, or Forbid would forbid nothing


def kubernetes_meant(cron: str, day: datetime) -> bool:
    """How Kubernetes' reader takes the days of a schedule: a star counts unless it has a step."""
    fields = cron.split()
    stars = any(term in ("*", "*/1") for text in (fields[2], fields[4]) for term in text.split(","))
    assert all(number < 7 for number in values(fields[4], 0, 6))
    return meant(["*", "*", *fields[2:]], day, day_and=stars)


def test_kubernetes_reads_the_same_days_or_is_not_asked() -> None:
    chance, refused, kept = random.Random(3), 0, 0
    for _ in range(150):
        try:
            settings = ScheduleSettings("0 0 " + random_cron(chance, stars=True).split(" ", 2)[2])
            told = kubernetes_cron(settings)
        except UsageError as error:
            refused += "in Kubernetes" in str(error)
            continue
        kept += 1
        days = [moment("2027-01-01T00:00") + timedelta(days=at) for at in range(70)]
        expected = list(
            takewhile(lambda at, last=days[-1]: at <= last, runs_after(settings, moment("2026-12-31T23:59")))
        )
        assert [day for day in days if kubernetes_meant(told, day)] == expected, (settings.cron, told)
    assert refused > 5
    assert kept > 50


def test_names_that_kubernetes_cannot_take_are_refused() -> None:
    settings = ScheduleSettings("0 3 * * *")
    long = ScheduledJob(name="a" * 31, file=Path("job.yaml"))
    rayjob(long, TEXT, PODS)
    with pytest.raises(UsageError, match="at most 30 characters and not end with - for a RayCronJob"):
        raycronjob(long, settings, TEXT, PODS)
    with pytest.raises(UsageError, match="not end with -"):
        rayjob(ScheduledJob(name="a-", file=Path("job.yaml")), TEXT, PODS)
    with pytest.raises(UsageError, match="image must be"):
        Pods(image="a b")
    with pytest.raises(UsageError, match="memory must be a quantity"):
        Pods(image="a", memory="16 GB")
    with pytest.raises(UsageError, match="address must be"):
        cronjob(NIGHTLY, settings, TEXT, "a", "http://x/$(id)")
    with pytest.raises(UsageError, match="at most 1048576 bytes"):
        rayjob(NIGHTLY, "x" * (1 << 20) + "x", PODS)


def test_a_timezone_is_data_everywhere() -> None:
    assert zone_of(BERLIN) == ZoneInfo(BERLIN)
    assert zone_of("UTC") is UTC
