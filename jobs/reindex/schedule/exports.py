"""A job's schedule for other schedulers: a crontab line, systemd units, a `ray job submit` line.

Pure functions of a job and its schedule that return text. Names and paths are quoted; a path or schedule that
a format cannot express is refused in one line.
"""

import re
import shlex
from collections.abc import Collection, Iterator
from datetime import datetime
from pathlib import Path

from r2scp.jobs.reindex.cron import UTC_NAMES, ScheduleSettings, last_run
from r2scp.jobs.reindex.schedule.loop import ScheduledJob
from r2scp.store.errors import UsageError

MAX_CRON_COMMAND = 998  # Vixie's cron reads 1000 with the line end
SYSTEMD_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")  # systemd and ISO count from Monday


def crontab(job: ScheduledJob, settings: ScheduleSettings) -> str:
    """Lines for `crontab -e`: the timezone, for crons that support one, and the job.

    No lock is needed: the store's lease keeps two runs apart. Raises `UsageError` for paths with control
    characters or backslashes, which crons read differently, and for a command that is too long for cron.
    """
    _check_paths(job)
    command = f"cd {shlex.quote(str(job.folder))} && {shlex.join(job.command)}".replace("%", r"\%")
    if len(command) > MAX_CRON_COMMAND:
        raise UsageError(
            f"a command in a crontab must have at most {MAX_CRON_COMMAND} characters; "
            f"got {len(command)}: move the job's file to a shorter path"
        )
    return (
        f"# r2scp-pipe: job {job.name}, in {settings.timezone}\n"
        "# CRON_TZ applies to all lines below it, and only in cronie (Fedora, RHEL, Arch, openSUSE).\n"
        "# Debian's and Ubuntu's cron uses the machine's timezone: there, the line is right only\n"
        f"# if that is {settings.timezone}; otherwise use the systemd timer, which has its timezone.\n"
        f"CRON_TZ={settings.timezone}\n"
        f"{' '.join(settings.fields)} {command}\n"
    )


def systemd_units(job: ScheduledJob, settings: ScheduleSettings) -> dict[str, str]:
    """A service and a timer, by file name.

    Runs missed while the machine was off are made up for once, and a timer does not start a service that is
    still running. Raises `UsageError` for paths with control characters or backslashes, and for an
    interpreter with quotes in its path, which systemd refuses as a program.
    """
    _check_paths(job)
    if set("\"'") & set(str(job.python)):
        raise UsageError(f"the path of python must have no quotes for systemd; got {str(job.python)!r}")
    unit = f"r2scp-{job.name}"
    # with a colon before the program systemd expands no $VARIABLE in its arguments
    command = " ".join(f'"{_escape_quoted(part)}"' for part in job.command)
    service = (
        "[Unit]\n"
        f"Description=Re-indexing job {job.name} of r2scp-pipe\n"
        "Wants=network-online.target\n"
        "After=network-online.target\n"
        "\n[Service]\n"
        "Type=oneshot\n"
        f"WorkingDirectory={_escape_percent(str(job.folder))}\n"
        f"ExecStart=:{command}\n"
    )
    calendar = "".join(f"OnCalendar={line}\n" for line in on_calendar(settings))
    timer = (
        "[Unit]\n"
        f"Description=Schedule of the re-indexing job {job.name} of r2scp-pipe\n"
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
    """systemd's calendar events for a schedule: one, or two if cron accepts either kind of day.

    If neither day-of-month nor day-of-week starts with a star, cron accepts a day that matches either;
    otherwise both must match. In a systemd event both must match, and any of several events counts.
    """
    times = settings.cronsim()
    months = _calendar_list(times.months, range(1, 13))
    hours, minutes = _calendar_list(times.hours, range(24)), _calendar_list(times.minutes, range(60))
    clock = f"{hours}:{minutes}:00 {settings.timezone}"
    days = _calendar_list(times.days, range(1, 32))
    numbers = sorted({(number - 1) % 7 for number in times.weekdays if isinstance(number, int)})
    weekdays = "" if len(numbers) == 7 else ",".join(SYSTEMD_WEEKDAYS[number] for number in numbers) + " "
    if times.day_and:
        return [f"{weekdays}*-{months}-{days} {clock}"]
    return [f"*-{months}-{days} {clock}", f"{weekdays}*-{months}-* {clock}"]


def ray_submission(job: ScheduledJob, settings: ScheduleSettings, time: datetime) -> str:
    """The submission id of the last run scheduled at or before `time`: the job's name and the run's time in
    UTC.

    It is the same on every machine until the next scheduled run, and Ray refuses a known id: of many
    submissions in one period, one runs.
    """
    return f"{job.name}-{last_run(settings, time):%Y%m%dT%H%MZ}"


def ray_submit(
    job: ScheduledJob,
    settings: ScheduleSettings,
    time: datetime,
    address: str | None = None,
    upload: bool = False,
) -> str:
    """A `ray job submit` line for the run named by `ray_submission`.

    `address` is that of Ray's dashboard, such as http://head:8265; by default Ray reads
    RAY_API_SERVER_ADDRESS. The cluster's Python must have r2scp-pipe, and the job's file must be at the same
    path there; with `upload`, the file's whole folder is sent along instead (up to 500 MiB).
    """
    _check_paths(job)
    command = ["ray", "job", "submit", "--submission-id", ray_submission(job, settings, time)]
    command += ["--address", address] if address else []
    command += ["--working-dir", str(job.file.parent)] if upload else []
    file = f"./{job.file.name}" if upload else str(job.file)
    return shlex.join([*command, "--", "python", "-m", "r2scp.jobs", "jobs", "run", file]) + "\n"


def _check_paths(job: ScheduledJob) -> None:
    """Raises `UsageError` for a path that could break out of its line or quotes in one of these formats."""
    for key in ("file", "folder", "python"):
        path: Path = getattr(job, key)
        text = str(path)
        if not text.isprintable() or "\\" in text or text != text.rstrip():
            raise UsageError(
                f"the path of the {key} must have no control characters, no backslashes and no space at "
                f"its end to go into a schedule; got {text!r}"
            )


def _escape_percent(text: str) -> str:
    """Escape systemd's specifiers, which start with %."""
    return text.replace("%", "%%")


def _escape_quoted(text: str) -> str:
    """Escape text for systemd's double quotes."""
    return _escape_percent(re.sub(r'(["\\])', r"\\\1", text))


def _calendar_list(values: Collection[int], full_range: range) -> str:
    """`values` as systemd lists them: a star for the full range, consecutive values as ranges."""
    return "*" if set(full_range) <= set(values) else ",".join(_ranges(sorted(values)))


def _ranges(values: list[int]) -> Iterator[str]:
    """Consecutive values as `first..last`, others alone."""
    start = 0
    for at in range(1, len(values) + 1):
        if at == len(values) or values[at] != values[at - 1] + 1:
            single = at - start == 1
            yield f"{values[start]:02}" if single else f"{values[start]:02}..{values[at - 1]:02}"
            start = at


def _clock_note(settings: ScheduleSettings) -> str:
    if settings.timezone in UTC_NAMES:
        return ""
    return (
        "# Where clocks change, systemd differs from cron: a time in the skipped hour is left out\n"
        "# that day (cron runs it right after), and a repeated hour counts once.\n"
    )
