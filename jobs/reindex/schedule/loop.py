"""Runs a job by its schedule, in the foreground, each run as a program of its own.

One loop does one thing at a time, so no two runs overlap. What falls due while the machine sleeps, or while
a run still works, becomes one run, and is told. The wait looks at the clock on the wall again and again: a
machine that slept or whose clock was set does not throw it off. A run is another process, so that one that
is killed, leaks or crashes leaves the schedule as it was.
"""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType, TracebackType

from r2scp.jobs.console import log
from r2scp.jobs.reindex.cron import ScheduleSettings, next_run, runs_after, zone_of
from r2scp.store.errors import UsageError

JOB_NAME = re.compile("[a-z0-9][a-z0-9-]{0,39}")
WALL_CHECK_S = 30.0  # the clock on the wall is looked at at least so often
LATE = timedelta(minutes=1)  # a run that starts later than this after its time is told as late
CLOCK_BACK = timedelta(hours=3)  # a clock set back by more than this starts the schedule anew, as in cron
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledJob:
    """A job's file, and how to run it.

    `name` is the job's own, `file` the YAML, `folder` where the job runs (paths in the file are seen from
    there; the present folder by default), `python` the interpreter that has r2scp-pipe. Paths become
    absolute. Raises `UsageError` for a name that does not match ``^[a-z0-9][a-z0-9-]{0,39}$``.
    """

    name: str
    file: Path
    folder: Path = field(default_factory=Path.cwd)
    python: Path = Path(sys.executable)

    def __post_init__(self) -> None:
        if not JOB_NAME.fullmatch(self.name):
            raise UsageError(
                "name must be 1 to 40 of a-z, 0-9 and -, and not begin with -, such as nightly; "
                f"got {self.name!r}"
            )
        for key in ("file", "folder", "python"):
            # links stay as they are: that of a virtual environment's interpreter is what makes it one
            object.__setattr__(self, key, Path(os.path.abspath(getattr(self, key))))

    @property
    def command(self) -> tuple[str, ...]:
        """The program and its arguments that run the job once."""
        return (str(self.python), "-m", "r2scp.jobs", "jobs", "run", str(self.file))


class Doorbell:
    """Waits that end at once when a signal comes: one that asks to stop, or the end of a child.

    Python writes a byte into a pipe for each signal, and the wait reads from it. A signal that comes just
    before the wait is thus not lost. Only in the main thread; what was set before is set again at the end.
    """

    def __init__(self) -> None:
        self.stops: list[signal.Signals] = []
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Doorbell":
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                self._before[number] = signal.signal(number, self._stop)
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._read)
        os.close(self._write)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stops.append(signal.Signals(number))

    def wait(self, seconds: float) -> None:
        """Until a signal comes, at most `seconds`."""
        if select.select([self._read], [], [], seconds)[0]:
            os.read(self._read, 4096)


def wall_clock() -> datetime:
    """The present moment, in UTC."""
    return datetime.now(UTC)


def run_schedule(
    job: ScheduledJob,
    settings: ScheduleSettings,
    now: Callable[[], datetime] = wall_clock,
    idle: Callable[[float], None] | None = None,
) -> signal.Signals:
    """Run `job` at its times until SIGINT, SIGTERM or SIGHUP comes; returns which.

    The signal ends a run at work with SIGTERM and waits for it; a second one kills it and all it started.
    `now` gives the time and `idle` waits for some seconds, or less: both are for tests. A job that fails, or
    cannot be started, is told in one line and run again at its next time.
    """
    with Doorbell() as bell:
        pause = idle or bell.wait
        last = now()
        due = next_run(settings, last)
        log(f"{job.name}: cron {settings.cron!r} in {settings.timezone}; {_next(settings, due, last)}")
        while not bell.stops:
            present = now()
            if present < last - CLOCK_BACK:
                log(f"{job.name}: the clock was set back to {_show(settings, present)}; counting from there")
                last, due = present, next_run(settings, present)
            if present < due:
                pause(min((due - present).total_seconds(), WALL_CHECK_S))
                continue
            last = _fall_due(job, settings, due, present)
            outcome = _run(job, bell)
            due = next_run(settings, last)
            then = "" if bell.stops else f"; {_next(settings, due, now())}"
            log(f"{job.name}: run of {_show(settings, last)} {outcome}{then}")
        log(f"{job.name}: stopped by {bell.stops[0].name}")
        return bell.stops[0]


def _fall_due(job: ScheduledJob, settings: ScheduleSettings, due: datetime, present: datetime) -> datetime:
    """The last run that is due; says which of them were missed, and by how much this one is late."""
    count, last = 1, due
    for run in runs_after(settings, due):
        if run > present:
            break
        count, last = count + 1, run
    if count > 1:
        log(
            f"{job.name}: {count} runs fell due from {_show(settings, due)} to {_show(settings, last)} "
            "and did not start in time; one run now stands for all of them"
        )
    elif present - due >= LATE:
        late = _spell((present - due).total_seconds())
        log(f"{job.name}: the run of {_show(settings, due)} starts late by {late}")
    return last


def _run(job: ScheduledJob, bell: Doorbell) -> str:
    """Run the job once, to its end; returns how it ended, in words."""
    began = time.monotonic()
    try:
        # a session of its own: the terminal's Ctrl-C reaches it through us, and what it starts can be killed
        child = subprocess.Popen(
            job.command, cwd=job.folder, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        return f"could not start: {error}"
    heard = 0
    while child.poll() is None:
        while heard < len(bell.stops):
            heard += 1
            _end(job, child, bell.stops[heard - 1], by_force=heard > 1)
        bell.wait(WALL_CHECK_S)
    took = _spell(time.monotonic() - began)
    if child.returncode < 0:
        return f"was ended by {_signal_name(-child.returncode)} after {took}"
    if child.returncode:
        return f"failed with exit code {child.returncode} after {took}"
    return f"finished with exit code 0 after {took}"


def _end(job: ScheduledJob, child: subprocess.Popen[bytes], asked: signal.Signals, by_force: bool) -> None:
    if by_force:
        log(f"{job.name}: {asked.name} again; killing the run and all it started")
        os.killpg(child.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    else:
        log(f"{job.name}: {asked.name}; ending the run and waiting for it (once more kills it)")
        child.terminate()


def _signal_name(number: int) -> str:
    known = {one.value: one.name for one in signal.Signals}
    return known.get(number, f"signal {number}")


def _show(settings: ScheduleSettings, moment: datetime) -> str:
    return f"{moment.astimezone(zone_of(settings.timezone)):%Y-%m-%d %H:%M %Z}"


def _next(settings: ScheduleSettings, due: datetime, present: datetime) -> str:
    away = (due - present).total_seconds()
    return f"next run {_show(settings, due)}, " + (f"in {_spell(away)}" if away > 0 else "now")


def _spell(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = round(seconds)
    parts = ((whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s"))
    first = next((at for at, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"
