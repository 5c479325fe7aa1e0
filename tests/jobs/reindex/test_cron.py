"""A schedule runs at the times that cron means, in its timezone, and refuses what cron does not mean."""

import re
from datetime import UTC, timedelta
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest
from cron_oracle import BERLIN, moment, random_settings, slow_runs

from r2scp.jobs.reindex.cron import ScheduleSettings, last_run, next_run, runs_after, zone_of
from r2scp.jobs.settings import from_plain
from r2scp.store.errors import UsageError

HAVANA = "America/Havana"  # clocks go forward at midnight


def test_runs_are_those_of_a_slow_reading() -> None:
    start = moment("2027-04-03T05:15")
    end = start + timedelta(days=3)
    for settings in random_settings(25, "UTC", seed=3):
        runs = list(takewhile(lambda run: run <= end, runs_after(settings, start)))
        assert runs == slow_runs(settings.cron, start, end), settings


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        # a day of the month or a weekday: the 1st, and Mondays (2027-02-01 is both, and runs once)
        ("0 0 1 * 1", "UTC", "2027-01-26T00:00", ["2027-02-01 00:00 UTC", "2027-02-08 00:00 UTC"]),
        # a field that starts with a star, also with a step: both must match
        ("0 0 */2 * 1", "UTC", "2027-01-08T00:00", ["2027-01-11 00:00 UTC", "2027-01-25 00:00 UTC"]),
        ("*/15 9-17 * * 1-5", "UTC", "2027-01-08T17:30", ["2027-01-08 17:45 UTC", "2027-01-11 09:00 UTC"]),
        ("0 3 * * 7", "UTC", "2027-01-08T00:00", ["2027-01-10 03:00 UTC", "2027-01-17 03:00 UTC"]),
        ("0 3 * jan mon", "UTC", "2027-01-22T00:00", ["2027-01-25 03:00 UTC", "2028-01-03 03:00 UTC"]),
        ("0 0 29 2 *", "UTC", "2027-01-08T00:00", ["2028-02-29 00:00 UTC", "2032-02-29 00:00 UTC"]),
        # clocks go forward: a fixed time that is skipped runs right after
        ("30 2 * * *", BERLIN, "2027-03-27T12:00", ["2027-03-28 03:00 CEST", "2027-03-29 02:30 CEST"]),
        ("0 0 * * *", HAVANA, "2027-03-13T12:00", ["2027-03-14 01:00 CDT", "2027-03-15 00:00 CDT"]),
        # clocks go back: a fixed time that comes twice runs once
        ("30 2 * * *", BERLIN, "2027-10-30T12:00", ["2027-10-31 02:30 CEST", "2027-11-01 02:30 CET"]),
        # with a star in its hours: once per hour of elapsed time
        ("30 * * * *", BERLIN, "2027-10-31T00:00", ["2027-10-31 02:30 CEST", "2027-10-31 02:30 CET"]),
        ("30 * * * *", BERLIN, "2027-03-28T00:00", ["2027-03-28 01:30 CET", "2027-03-28 03:30 CEST"]),
    ],
)
def test_runs_as_the_clock_shows_them(cron: str, zone: str, start: str, expected: list[str]) -> None:
    runs = islice(runs_after(ScheduleSettings(cron, zone), moment(start)), len(expected))
    assert [f"{run.astimezone(zone_of(zone)):%Y-%m-%d %H:%M %Z}" for run in runs] == expected


def test_the_next_run_is_never_in_the_past() -> None:
    """Not even in an hour that comes twice."""
    settings = ScheduleSettings("30 2 * * *", BERLIN)
    second_time = moment("2027-10-31T01:10")  # 02:10 for the second time; 02:30 was at 00:30 UTC
    assert next_run(settings, second_time) == moment("2027-11-01T01:30")
    for minute in range(0, 300, 7):
        now = moment("2027-10-30T22:00") + timedelta(minutes=minute)
        assert next_run(settings, now) > now


def test_the_last_run_stays_the_same_until_the_next() -> None:
    yearly = ScheduleSettings("0 0 29 2 *")
    assert last_run(yearly, moment("2027-06-01T00:00")) == moment("2024-02-29T00:00")
    for settings in random_settings(12, BERLIN, seed=5):
        for run, following in pairwise(islice(runs_after(settings, moment("2027-11-02T20:00")), 4)):
            for time in (run, following - timedelta(milliseconds=1)):
                assert last_run(settings, time) == run


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("* * * *", "cron must be five fields"),
        ("0 * * * * *", "cron must be five fields"),
        ("0 ٣ * * *", "cron: hour must be *, a value"),
        ("* * L * *", "cron: day-of-month must be"),
        ("* * * * MON#2", "cron: day-of-week must be"),
        ("1, * * * *", "cron: minute must be"),
        ("5/15 * * * *", "cron: minute must be"),
        ("60 * * * *", "got '60 * * * *' (bad minute)"),
        ("* * * MON *", "(bad month)"),
        ("* * * * FRI-SUN", "(bad day-of-week)"),
        ("*/0 * * * *", "(bad minute)"),
        ("0 0 30 2 *", "cron must name a date that exists; got '0 0 30 2 *'"),
        ("0 0 31 4,6 *", "cron must name a date that exists"),
    ],
)
def test_what_cron_does_not_mean_is_refused_in_one_line(cron: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        ScheduleSettings(cron)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("zone", ["", "Mars", "Europe", "../passwd", "/etc/localtime", "localtime", "UTC\nX"])
def test_a_timezone_must_exist_everywhere(zone: str) -> None:
    with pytest.raises(UsageError, match="timezone must be a name of the IANA database"):
        ScheduleSettings("0 3 * * *", zone)


def test_the_section_of_a_file_is_read_strictly() -> None:
    assert zone_of(from_plain(ScheduleSettings, {"cron": "0 3 * * *"}, "schedule").timezone) is UTC
    assert zone_of(BERLIN) == ZoneInfo(BERLIN)
    for values, message in (
        ({"cron": 3}, "schedule.cron must be a string"),
        ({"cron": "0 3 * * *", "zone": "UTC"}, "schedule has no zone"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            from_plain(ScheduleSettings, values, "schedule")
