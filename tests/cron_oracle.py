"""Cron read slowly, minute by minute, and random schedules: what the schedules of jobs are compared with."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache

from r2scp.jobs.reindex.cron import ScheduleSettings, zone_of
from r2scp.store.errors import UsageError

BERLIN = "Europe/Berlin"  # clocks go forward on 2027-03-28 at 01:00 UTC, back on 2027-10-31 at 01:00 UTC
BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def moment(text: str, zone: str = "UTC") -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone_of(zone)).astimezone(UTC)


@cache
def values(text: str, low: int, high: int) -> set[int]:
    """The values of one numeric field."""
    numbers: set[int] = set()
    for term in text.split(","):
        span, _, step = term.partition("/")
        first, _, last = span.partition("-")
        start, end = (low, high) if span == "*" else (int(first), int(last or first))
        numbers |= set(range(start, end + 1, int(step or 1)))
    return numbers


def matches(fields: list[str], local: datetime, day_and: bool) -> bool:
    """Whether the fields select a minute of the wall clock."""
    minutes, hours, days, months, weekdays = (
        values(text, *bounds) for text, bounds in zip(fields, BOUNDS, strict=True)
    )
    weekday = local.isoweekday()  # Monday 1 to Sunday 7
    on_days = (local.day in days, bool({weekday, weekday % 7} & weekdays))
    day = all(on_days) if day_and else any(on_days)
    return day and local.minute in minutes and local.hour in hours and local.month in months


def slow_runs(cron: str, start: datetime, end: datetime) -> list[datetime]:
    """The runs in (start, end], minute by minute, where clocks do not change."""
    fields = cron.split()
    day_and = fields[2].startswith("*") or fields[4].startswith("*")
    minutes = (
        start + timedelta(minutes=number) for number in range(1, (end - start) // timedelta(minutes=1) + 1)
    )
    return [minute for minute in minutes if matches(fields, minute, day_and)]


def random_field(chance: random.Random, low: int, high: int) -> str:
    def term() -> str:
        first, last = sorted(chance.sample(range(low, high + 1), 2))
        step = chance.randint(1, last - first)
        wide = chance.randint(1, (high - low) // 2)
        return chance.choice(["*", f"*/{wide}", str(first), f"{first}-{last}", f"{first}-{last}/{step}"])

    return ",".join(term() for _ in range(chance.choice([1, 1, 2])))


def random_cron(chance: random.Random, stars: bool = False) -> str:
    minute, hour, *days = (random_field(chance, low, high) for low, high in BOUNDS)
    kept = [text if stars or chance.random() < 0.6 else "*" for text in days]
    return " ".join([minute, hour, kept[0], "*" if chance.random() < 0.7 else kept[1], kept[2]])


def random_settings(count: int, zone: str, seed: int) -> Iterator[ScheduleSettings]:
    chance = random.Random(seed)
    while count:
        try:
            settings = ScheduleSettings(random_cron(chance), zone)
        except UsageError:  # a date that never comes
            continue
        yield settings
        count -= 1
