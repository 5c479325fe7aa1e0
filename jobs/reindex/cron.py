"""What a schedule in a job's file means: when it runs, by the rules of cron and the clocks of a timezone.

CronSim finds the times. It follows Debian's cron, also where clocks change: a job with fixed hours that
falls into the hour that is skipped runs right after it, one in the hour that comes twice runs once, and
one with a `*` in its minutes or hours goes by elapsed time. Where crons disagree about a text, it is
refused here rather than run at a time that nobody meant.
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

MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")  # cron counts from Sunday = 0
UTC_NAMES = ("UTC", "Etc/UTC")
SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
LOOK_BACK = timedelta(hours=1)  # first step back in search of the last run; each further one is twice as long
LONGEST_GAP = timedelta(days=366 * 50)  # CronSim gives up after 50 years without a run

ZONE = re.compile(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*")
TERM = re.compile(r"(?:\*|(?P<low>\w+)(?:-(?P<high>\w+))?)(?:/(?P<step>[0-9]{1,3}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Field:
    """One of cron's five: its name, its range, and the names that stand for numbers from `low` on."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def number(self, text: str) -> int | None:
        """The value that `text` stands for; None where it stands for none."""
        if text in self.names:
            return self.low + self.names.index(text)
        value = int(text) if re.fullmatch("[0-9]{1,2}", text) else -1
        return value if self.low <= value <= self.high else None

    @property
    def allowed(self) -> str:
        named = f" or {self.names[0]} to {self.names[-1]}" if self.names else ""
        return f"*, {self.low} to {self.high}{named}, a range a-b, a step */n or a-b/n, or a list of these"


FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day-of-month", 1, 31),
    _Field("month", 1, 12, MONTHS),
    _Field("day-of-week", 0, 7, WEEKDAYS),  # 7 is Sunday too
)


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """The section `schedule` of a job's file.

    `cron` has cron's five fields; `timezone` is a name of the IANA database, such as Europe/Berlin.
    Raises `UsageError`, naming the key, for anything else, and for a date that never comes.
    """

    cron: str
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        check_types(self)
        zone_of(self.timezone)
        fields = self.cron.upper().split()
        if len(fields) != len(FIELDS) or not self.cron.isascii():
            names = " ".join(field.name for field in FIELDS)
            raise UsageError(f"cron must be five fields, {names}, such as '0 3 * * *'; got {self.cron!r}")
        for field, text in zip(FIELDS, fields, strict=True):
            for term in text.split(","):
                _check_term(field, term, text)
        try:
            next(iter(self.simulated(datetime(2000, 1, 1, tzinfo=UTC))))
        except (CronSimError, StopIteration) as error:
            raise UsageError(f"cron must name a date that comes; {self.cron!r} never does") from error

    @property
    def fields(self) -> tuple[str, ...]:
        """cron's five fields, with numbers for the names of months and weekdays."""
        return tuple(
            re.sub("[A-Z]+", lambda found, field=field: str(field.number(found[0])), text)
            for field, text in zip(FIELDS, self.cron.upper().split(), strict=True)
        )

    def simulated(self, after: datetime) -> CronSim:
        """The runs after `after`, in the timezone of `after`."""
        return CronSim(self.cron, after)


#: What a step in a field starts anew in.
UNITS = {"minute": "hour", "hour": "day", "day-of-month": "month", "month": "year", "day-of-week": "week"}


def _check_term(field: _Field, term: str, text: str) -> None:
    found = TERM.fullmatch(term)
    if not found:
        raise UsageError(f"cron: {field.name} must be {field.allowed}; got {text!r}")
    low_text, high_text, step = found["low"], found["high"], found["step"]
    low = field.number(low_text) if low_text else field.low
    high = field.number(high_text) if high_text else (low if low_text else field.high)
    if low is None or high is None:
        raise UsageError(f"cron: {field.name} must be {field.allowed}; got {text!r}")
    if low > high:
        raise UsageError(f"cron: a range of {field.name} must rise; got {term!r}")
    if step and low_text and not high_text:
        raise UsageError(
            f"cron: {field.name} {term!r} is read differently by different crons; "
            f"write {low}-{field.high}/{step} for every {step} from {low} on, or {low}"
        )
    if step and not 1 <= int(step) <= high - low:
        raise UsageError(
            f"cron: a step of {field.name} must be 1 or more and reach a second value "
            f"(it starts anew in each {UNITS[field.name]}); got {term!r}"
        )


@cache
def zone_of(name: str) -> tzinfo:
    """The timezone of a name of the IANA database. Raises `UsageError`."""
    if name in UTC_NAMES:
        return UTC
    try:
        if (
            name in ("localtime", "Factory")
            or name.startswith(("posix", "right"))
            or not ZONE.fullmatch(name)
        ):
            raise ZoneInfoNotFoundError(name)
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UsageError(
            f"timezone must be a name of the IANA database, such as UTC or Europe/Berlin; got {name!r}"
        ) from error


def runs_after(settings: ScheduleSettings, after: datetime) -> Iterator[datetime]:
    """Every run later than `after`, as moments in UTC, in order, each once; ends after 50 years without one.

    `after` must know its timezone, whichever that is.
    """
    zone, after = zone_of(settings.timezone), after.astimezone(UTC)
    if any(text.startswith("*") for text in settings.fields[:2]):
        return _by_elapsed_time(settings, zone, after)
    return _by_the_clock(settings, zone, after)


def _by_the_clock(settings: ScheduleSettings, zone: tzinfo, last: datetime) -> Iterator[datetime]:
    """Runs at fixed minutes of fixed hours: each once a day, whatever the clock does."""
    for run in settings.simulated(last.astimezone(zone)):
        # in UTC: two times of one timezone compare by what the clock shows, which an hour may show twice
        if (moment := run.astimezone(UTC)) > last:
            last = moment
            yield moment


def _by_elapsed_time(settings: ScheduleSettings, zone: tzinfo, last: datetime) -> Iterator[datetime]:
    """Runs at each time that the clock really shows.

    CronSim is asked for times between two changes of the clock only: across one, it can lose part of an hour
    where a midnight is skipped (as in Beirut) or half an hour is (on Lord Howe Island).
    """
    offset = _offset(zone, last)
    while True:
        for run in settings.simulated((last + offset).replace(tzinfo=None)):
            moment = (run - offset).replace(tzinfo=UTC)
            if change := _change(zone, offset, last, moment):
                last, offset = change - SECOND, _offset(zone, change)
                break
            last = moment
            yield moment
        else:
            return


def _offset(zone: tzinfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta()


def _change(zone: tzinfo, offset: timedelta, after: datetime, until: datetime) -> datetime | None:
    """The first second in (after, until] at which the clock is no longer `offset` from UTC.

    Looks once a day: no place changes its clock and back within one.
    """
    while after < until:
        at = min(after + DAY, until)
        if _offset(zone, at) != offset:
            while at - after > SECOND:
                middle = after + SECOND * ((at - after) // SECOND // 2)
                after, at = (middle, at) if _offset(zone, middle) == offset else (after, middle)
            return at
        after = at
    return None


def next_run(settings: ScheduleSettings, after: datetime) -> datetime:
    """The first run later than `after`, in UTC."""
    if run := next(runs_after(settings, after), None):
        return run
    raise UsageError(f"cron must name a date that comes; {settings.cron!r} has none after {after:%Y-%m-%d}")


def period_of(settings: ScheduleSettings, moment: datetime) -> datetime:
    """The last run at or before `moment`, in UTC: the one that is due, or was done, at `moment`."""
    moment, back = moment.astimezone(UTC), LOOK_BACK
    while back < LONGEST_GAP:
        found = None
        for run in runs_after(settings, moment - back):
            if run > moment:
                break
            found = run
        if found:
            return found
        back *= 2
    raise UsageError(f"cron must have run before {moment:%Y-%m-%d}; {settings.cron!r} had not")
