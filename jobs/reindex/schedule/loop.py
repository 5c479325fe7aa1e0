"""Runs a job on its schedule in the foreground, each run as a process of its own.

One loop does one thing at a time, so runs never overlap. Runs missed while the machine sleeps, or while
another run is active, become one run, which is logged. The wait polls the wall clock, so it copes with a
machine that slept or whose clock was set. A run that is killed, leaks or crashes does not affect the
schedule.
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
CLOCK_POLL_S = 30.0  # longest wait between two looks at the wall clock
LATE_AFTER = timedelta(minutes=1)  # a run that starts later than this is logged as late
MAX_CLOCK_STEP_BACK = timedelta(hours=3)  # a larger step restarts the schedule, as in cron
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledJob:
    """A job's file, and how to run it.

    `file` is the YAML, `folder` the working folder (default: the current one), `python` the interpreter that
    has r2scp-pipe. Paths become absolute. Raises `UsageError` for a name that does not match
    ``^[a-z0-9][a-z0-9-]{0,39}$``.
    """

    name: str
    file: Path
    folder: Path = field(default_factory=Path.cwd)
    python: Path = Path(sys.executable)

    def __post_init__(self) -> None:
        if not JOB_NAME.fullmatch(self.name):
            raise UsageError(
                "name must be 1 to 40 of a-z, 0-9 and -, and not start with -, such as nightly; "
                f"got {self.name!r}"
            )
        for key in ("file", "folder", "python"):
            # keep symbolic links: a virtual environment's interpreter is one
            object.__setattr__(self, key, Path(os.path.abspath(getattr(self, key))))

    @property
    def command(self) -> tuple[str, ...]:
        """The command that runs the job once."""
        return (str(self.python), "-m", "r2scp.jobs", "jobs", "run", str(self.file))


class SignalWait:
    """Waits that end at once on a signal: one that asks to stop, or the end of a child.

    Python writes a byte into a pipe for each signal, and the wait reads from it, so a signal just before the
    wait is not lost. Only in the main thread; restores the previous handlers at the end.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "SignalWait":
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                self._previous[number] = signal.signal(number, self._stop)
        self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._read)
        os.close(self._write)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))

    def wait(self, seconds: float) -> None:
        """Wait for a signal, at most `seconds`."""
        if select.select([self._read], [], [], seconds)[0]:
            os.read(self._read, 4096)


def utc_now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


def run_schedule(
    job: ScheduledJob,
    settings: ScheduleSettings,
    now: Callable[[], datetime] = utc_now,
    idle: Callable[[float], None] | None = None,
) -> signal.Signals:
    """Run `job` on its schedule until SIGINT, SIGTERM or SIGHUP comes; returns the signal.

    The signal ends an active run with SIGTERM and waits for it; a second one kills it and its children. `now`
    returns the time and `idle` waits at most some seconds: both are for tests. A job that fails or cannot be
    started is logged in one line and run again at its next time.
    """
    with SignalWait() as signals:
        wait_for = idle or signals.wait
        last = now()
        scheduled = next_run(settings, last)
        upcoming = _describe_next(settings, scheduled, last)
        log(f"{job.name}: cron {settings.cron!r} in {settings.timezone}; {upcoming}")
        while not signals.received:
            current = now()
            if current < last - MAX_CLOCK_STEP_BACK:
                back = _format_time(settings, current)
                log(f"{job.name}: the clock was set back to {back}; rescheduling from there")
                last, scheduled = current, next_run(settings, current)
            if current < scheduled:
                wait_for(min((scheduled - current).total_seconds(), CLOCK_POLL_S))
                continue
            last = _collapse_missed(job, settings, scheduled, current)
            outcome = _run(job, signals)
            scheduled = next_run(settings, last)
            then = "" if signals.received else f"; {_describe_next(settings, scheduled, now())}"
            log(f"{job.name}: run of {_format_time(settings, last)} {outcome}{then}")
        log(f"{job.name}: stopped by {signals.received[0].name}")
        return signals.received[0]


def _collapse_missed(
    job: ScheduledJob, settings: ScheduleSettings, scheduled: datetime, current: datetime
) -> datetime:
    """The last run scheduled by now; logs how many were missed, or by how much this one is late."""
    count, last = 1, scheduled
    for run in runs_after(settings, scheduled):
        if run > current:
            break
        count, last = count + 1, run
    if count > 1:
        log(
            f"{job.name}: {count} runs were scheduled from {_format_time(settings, scheduled)} to "
            f"{_format_time(settings, last)} and did not start in time; running once for all of them"
        )
    elif current - scheduled >= LATE_AFTER:
        late = _duration((current - scheduled).total_seconds())
        log(f"{job.name}: the run of {_format_time(settings, scheduled)} starts late by {late}")
    return last


def _run(job: ScheduledJob, signals: SignalWait) -> str:
    """Run the job once; returns how it ended, in words."""
    started = time.monotonic()
    try:
        # in a session of its own: Ctrl-C reaches it through this process, and its children can be killed
        child = subprocess.Popen(
            job.command, cwd=job.folder, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        return f"could not start: {error}"
    handled = 0
    while child.poll() is None:
        while handled < len(signals.received):
            handled += 1
            _stop_run(job, child, signals.received[handled - 1], force=handled > 1)
        signals.wait(CLOCK_POLL_S)
    duration = _duration(time.monotonic() - started)
    if child.returncode < 0:
        return f"was ended by {_signal_name(-child.returncode)} after {duration}"
    if child.returncode:
        return f"failed with exit code {child.returncode} after {duration}"
    return f"finished with exit code 0 after {duration}"


def _stop_run(
    job: ScheduledJob, child: subprocess.Popen[bytes], stop_signal: signal.Signals, force: bool
) -> None:
    if force:
        log(f"{job.name}: {stop_signal.name} again; killing the run and its children")
        os.killpg(child.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
    else:
        log(f"{job.name}: {stop_signal.name}; stopping the run and waiting for it (again to kill it)")
        child.terminate()


def _signal_name(number: int) -> str:
    names = {number.value: number.name for number in signal.Signals}
    return names.get(number, f"signal {number}")


def _format_time(settings: ScheduleSettings, time: datetime) -> str:
    return f"{time.astimezone(zone_of(settings.timezone)):%Y-%m-%d %H:%M %Z}"


def _describe_next(settings: ScheduleSettings, scheduled: datetime, current: datetime) -> str:
    seconds = (scheduled - current).total_seconds()
    return f"next run {_format_time(settings, scheduled)}, " + (
        f"in {_duration(seconds)}" if seconds > 0 else "now"
    )


def _duration(seconds: float) -> str:
    """A duration in its two largest units."""
    total = round(seconds)
    parts = ((total // 86400, "d"), (total // 3600 % 24, "h"), (total // 60 % 60, "min"), (total % 60, "s"))
    first = next((at for at, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"
