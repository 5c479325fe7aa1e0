"""A job's schedule in the words of other schedulers: a crontab line, systemd units, a line for Ray.

Pure functions of a job and its schedule that return text. Names and paths are inert in all of it; a path
that a format cannot hold, or a schedule that it cannot say, is refused in one line.
"""

import re
import shlex
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path

from r2scp.jobs.reindex.cron import UTC_NAMES, ScheduleSettings, period_of
from r2scp.jobs.reindex.schedule.loop import ScheduledJob
from r2scp.store.errors import UsageError

CRON_LINE_CHARACTERS = 998  # of a command: Vixie's cron reads 1000, with the end of the line
SYSTEMD_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")  # systemd and ISO count from Monday


def crontab(job: ScheduledJob, settings: ScheduleSettings) -> str:
    """Lines for `crontab -e`: the timezone, as far as cron can be told, and the job.

    No lock is taken: the store's own lease keeps two runs apart. Raises `UsageError` for paths with control
    characters or backslashes, which crons read differently, and for a command longer than cron reads.
    """
    _hold_to_lines(job)
    command = f"cd {shlex.quote(str(job.folder))} && {shlex.join(job.command)}".replace("%", r"\%")
    if len(command) > CRON_LINE_CHARACTERS:
        raise UsageError(
            f"a command in a crontab must have at most {CRON_LINE_CHARACTERS} characters; "
            f"got {len(command)}: move the job's file to a shorter path"
        )
    return (
        f"# r2scp-pipe: job {job.name}, in {settings.timezone}\n"
        "# CRON_TZ holds for all lines below it, and only in cronie (Fedora, RHEL, Arch, openSUSE).\n"
        "# Debian's and Ubuntu's cron goes by the machine's own timezone: there, the line is right only\n"
        f"# if that is {settings.timezone}; else take the systemd timer, which carries its timezone.\n"
        f"CRON_TZ={settings.timezone}\n"
        f"{' '.join(settings.fields)} {command}\n"
    )


def systemd_units(job: ScheduledJob, settings: ScheduleSettings) -> dict[str, str]:
    """A service and a timer, by the names of their files.

    A run that was missed while the machine was off is made up for once, and a timer does not start a service
    that still runs. Raises `UsageError` for paths with control characters or backslashes, and for an
    interpreter with quotes in its path, which systemd refuses as a program.
    """
    _hold_to_lines(job)
    if set("\"'") & set(str(job.python)):
        raise UsageError(f"the path of python must have no quotes for systemd; got {str(job.python)!r}")
    unit = f"r2scp-{job.name}"
    # a colon before the program: systemd then reads no $VARIABLE in its arguments
    command = " ".join(f'"{_escaped(part)}"' for part in job.command)
    service = (
        "[Unit]\n"
        f"Description=Re-indexing job {job.name} of r2scp-pipe\n"
        "Wants=network-online.target\n"
        "After=network-online.target\n"
        "\n[Service]\n"
        "Type=oneshot\n"
        f"WorkingDirectory={_percent(str(job.folder))}\n"
        f"ExecStart=:{command}\n"
    )
    calendar = "".join(f"OnCalendar={line}\n" for line in on_calendar(settings))
    timer = (
        "[Unit]\n"
        f"Description=Times of the re-indexing job {job.name} of r2scp-pipe\n"
        "\n[Timer]\n"
        f"{_clock_note(settings)}{calendar}"
        "AccuracySec=1s\n"
        "Persistent=true\n"
        "\n[Install]\n"
        "WantedBy=timers.target\n"
    )
    return {f"{unit}.service": service, f"{unit}.timer": timer}


def systemd(job: ScheduledJob, settings: ScheduleSettings) -> str:
    """`systemd_units` as one text, each below a comment that names its file."""
    units = systemd_units(job, settings)
    parts = [f"# ~/.config/systemd/user/{name}\n{text}" for name, text in units.items()]
    start = f"# systemctl --user daemon-reload && systemctl --user enable --now r2scp-{job.name}.timer\n"
    return "\n".join([*parts, start])


def on_calendar(settings: ScheduleSettings) -> list[str]:
    """systemd's calendar events for a schedule: one, or two where cron means a day of either kind.

    cron takes a day that matches day-of-month or day-of-week, if neither begins with a star, and else one
    that matches both. systemd's event always means both, and of several events any.
    """
    times = settings.simulated(datetime(2000, 1, 1, tzinfo=UTC))
    months = _listed(times.months, range(1, 13))
    clock = f"{_listed(times.hours, range(24))}:{_listed(times.minutes, range(60))}:00 {settings.timezone}"
    days = _listed(times.days, range(1, 32))
    numbers = sorted({(number - 1) % 7 for number in times.weekdays if isinstance(number, int)})
    weekdays = "" if len(numbers) == 7 else ",".join(SYSTEMD_WEEKDAYS[number] for number in numbers) + " "
    if times.day_and:
        return [f"{weekdays}*-{months}-{days} {clock}"]
    return [f"*-{months}-{days} {clock}", f"{weekdays}*-{months}-* {clock}"]


def ray_submission(job: ScheduledJob, settings: ScheduleSettings, moment: datetime) -> str:
    """The submission id of the run that is due at `moment`: the job's name and the time of that run in UTC.

    It is the same on every machine until the next run falls due, and Ray refuses an id that it knows: of
    many submissions in one period, one runs.
    """
    return f"{job.name}-{period_of(settings, moment):%Y%m%dT%H%MZ}"


def ray_submit(
    job: ScheduledJob,
    settings: ScheduleSettings,
    moment: datetime,
    address: str | None = None,
    upload: bool = False,
) -> str:
    """A `ray job submit` line for the run that is due at `moment`, as `ray_submission` names it.

    `address` is that of Ray's dashboard, such as http://head:8265; without, Ray takes RAY_API_SERVER_ADDRESS.
    The cluster's own Python must have r2scp-pipe, and the job's file must lie at the same path there; with
    `upload`, the folder of the file is sent along instead (all of it: Ray takes up to 500 MiB).
    """
    _hold_to_lines(job)
    words = ["ray", "job", "submit", "--submission-id", ray_submission(job, settings, moment)]
    words += ["--address", address] if address else []
    words += ["--working-dir", str(job.file.parent)] if upload else []
    file = f"./{job.file.name}" if upload else str(job.file)
    return shlex.join([*words, "--", "python", "-m", "r2scp.jobs", "jobs", "run", file]) + "\n"


def _hold_to_lines(job: ScheduledJob) -> None:
    """Raises `UsageError` for a path that could leave its line, or its quotes, in one of these formats."""
    for key in ("file", "folder", "python"):
        path: Path = getattr(job, key)
        text = str(path)
        if not text.isprintable() or "\\" in text or text != text.rstrip():
            raise UsageError(
                f"the path of the {key} must have no control characters, no backslashes and no space at "
                f"its end to go into a schedule; got {text!r}"
            )


def _percent(text: str) -> str:
    """`text` without specifiers of systemd, which begin with %."""
    return text.replace("%", "%%")


def _escaped(text: str) -> str:
    """`text` for systemd's double quotes."""
    return _percent(re.sub(r'(["\\])', r"\\\1", text))


def _listed(values: Collection[int], every: range) -> str:
    """`values` as systemd lists them: a star for `every`, ranges for neighbours."""
    return "*" if set(every) <= set(values) else ",".join(_spans(sorted(values)))


def _spans(values: list[int]) -> Iterator[str]:
    """Two and more neighbours as `first..last`, others alone."""
    start = 0
    for at in range(1, len(values) + 1):
        if at == len(values) or values[at] != values[at - 1] + 1:
            alone = at - start == 1
            yield f"{values[start]:02}" if alone else f"{values[start]:02}..{values[at - 1]:02}"
            start = at


def _clock_note(settings: ScheduleSettings) -> str:
    if settings.timezone in UTC_NAMES:
        return ""
    return (
        "# Where clocks change, systemd is not cron: a time in the hour that is skipped is left out\n"
        "# that day (cron runs it right after), and an hour that comes twice counts once.\n"
    )
