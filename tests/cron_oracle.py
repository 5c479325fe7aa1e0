"""Cron read slowly, minute by minute, and schedules drawn at random: what the program's own are held to."""

import random
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache

from r2scp.jobs.reindex.cron import ScheduleSettings, zone_of

BERLIN = "Europe/Berlin"  # clocks go forward on 2027-03-28 at 01:00 UTC, back on 2027-10-31 at 01:00 UTC
HAVANA = "America/Havana"  # clocks go forward at midnight
LOW_HIGH = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def moment(text: str, zone: str = "UTC") -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone_of(zone)).astimezone(UTC)


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
