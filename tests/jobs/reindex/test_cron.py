"""The times of a schedule are those of a slow reading of cron's rules, also where clocks change."""

import re
from datetime import UTC, timedelta
from itertools import pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest
from cron_oracle import BERLIN, HAVANA, moment, random_settings, slow_runs

from r2scp.jobs.reindex.cron import ScheduleSettings, next_run, period_of, runs_after, zone_of
from r2scp.jobs.settings import from_plain
from r2scp.store.errors import UsageError


def runs(cron: str, zone: str, start: str, count: int) -> list[str]:
    """The first runs after `start` (UTC), as the clock of `zone` shows them."""
    found = runs_after(ScheduleSettings(cron, zone), moment(start))
    return [f"{next(found).astimezone(zone_of(zone)):%Y-%m-%d %H:%M %Z}" for _ in range(count)]


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
    assert from_plain(ScheduleSettings, {"cron": "0 3 * * *"}, "schedule").timezone == "UTC"
    for values_, said in (
        ({"cron": 3}, "schedule.cron must be a string"),
        ({"cron": "0 3 * * *", "zone": "UTC"}, "schedule has no zone"),
        ({}, "schedule must have cron"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            from_plain(ScheduleSettings, values_, "schedule")


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


def test_a_timezone_is_data_everywhere() -> None:
    assert zone_of(BERLIN) == ZoneInfo(BERLIN)
    assert zone_of("UTC") is UTC
