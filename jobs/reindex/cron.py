"""The schedule of a job: cron's five fields in a timezone. CronSim finds the times.

CronSim follows Debian's cron, also where clocks change: a job with fixed hours in the hour that is skipped
runs right after it, one in the hour that comes twice runs once, and one with a `*` in its minutes or hours
goes by elapsed time. What different crons read differently (`5/15`, `L`, `MON#2`, seconds) is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from r2scp.jobs.settings import check_types
from r2scp.store.errors import UsageError

FIELDS = ("minute", "hour", "day-of-month", "month", "day-of-week")
WEEKDAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]  # from 0
MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]  # from 1
NUMBERS = {name: str(number) for number, name in (*enumerate(WEEKDAYS), *enumerate(MONTHS, 1))}
UTC_NAMES = ("UTC", "Etc/UTC")
LOCAL_ZONES = re.compile("localtime|Factory|posix.*|right.*")  # in the database, but not the same everywhere
VALUE = "(?:[0-9]+|[A-Z]{3})"
FIELD = re.compile(r"TERM(?:,TERM)*".replace("TERM", rf"(?:(?:\*|{VALUE}-{VALUE})(?:/[0-9]+)?|{VALUE})"))
START = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """The section `schedule` of a job's file.

    `cron` has cron's five fields; `timezone` is a name of the IANA database, such as Europe/Berlin.
    Raises `UsageError`, naming the key, for anything else and for a date that never comes.
    """

    cron: str
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        check_types(self)
        zone_of(self.timezone)
        texts = self.cron.upper().split()
        if len(texts) != len(FIELDS):
            raise UsageError(
                f"cron must be five fields, {' '.join(FIELDS)}, such as '0 3 * * *'; got {self.cron!r}"
            )
        for name, text in zip(FIELDS, texts, strict=True):
            if not FIELD.fullmatch(text):
                raise UsageError(
                    f"cron: {name} must be *, a value, a range a-b, a step */n or a-b/n, or a list of these; "
                    f"got {text!r}"
                )
        try:
            next(self.cronsim())
        except (CronSimError, StopIteration) as error:
            reason = str(error).lower() or "no such date"
            raise UsageError(f"cron must name a date that exists; got {self.cron!r} ({reason})") from error

    @property
    def fields(self) -> tuple[str, ...]:
        """cron's five fields, with numbers for the names of months and weekdays."""
        return tuple(re.sub("[A-Z]+", lambda name: NUMBERS[name[0]], self.cron.upper()).split())

    def cronsim(self, start: datetime = START, reverse: bool = False) -> CronSim:
        """The runs after `start`, or before it, in the timezone of `start`."""
        return CronSim(self.cron, start, reverse)


@cache
def zone_of(name: str) -> tzinfo:
    """The timezone of a name of the IANA database. Raises `UsageError`."""
    if name in UTC_NAMES:
        return UTC
    try:
        if LOCAL_ZONES.fullmatch(name):
            raise ZoneInfoNotFoundError(name)
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UsageError(
            f"timezone must be a name of the IANA database, such as UTC or Europe/Berlin; got {name!r}"
        ) from error


def runs_after(settings: ScheduleSettings, start: datetime) -> Iterator[datetime]:
    """The runs later than `start`, in UTC and in order; ends after 50 years without one."""
    last = start.astimezone(UTC)
    for run in settings.cronsim(last.astimezone(zone_of(settings.timezone))):
        # CronSim compares wall clocks: in an hour that comes twice it can name a time that has passed
        if (time := run.astimezone(UTC)) > last:
            last = time
            yield time


def next_run(settings: ScheduleSettings, start: datetime) -> datetime:
    """The first run later than `start`, in UTC."""
    if run := next(runs_after(settings, start), None):
        return run
    raise UsageError(f"cron must name a date that exists; {settings.cron!r} has none after {start:%Y-%m-%d}")


def last_run(settings: ScheduleSettings, time: datetime) -> datetime:
    """The last run at or before `time`, in UTC."""
    end = time.astimezone(zone_of(settings.timezone)).replace(microsecond=0) + timedelta(seconds=1)
    if run := next(settings.cronsim(end, reverse=True), None):
        return run.astimezone(UTC)
    raise UsageError(f"cron must have run before {time:%Y-%m-%d}; {settings.cron!r} had not")
