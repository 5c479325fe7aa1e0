"""`jobs schedule`: run a job at its times, or print what another scheduler needs to do so."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from r2scp.jobs.console import log
from r2scp.jobs.reindex.config import ReindexConfig, read_config
from r2scp.jobs.reindex.schedule.exports import crontab, ray_submit, systemd
from r2scp.jobs.reindex.schedule.kubernetes import Pods, cronjob, raycronjob, rayjob
from r2scp.jobs.reindex.schedule.loop import ScheduledJob, run_schedule, wall_clock
from r2scp.store.errors import UsageError


class Printed(StrEnum):
    """What can be printed."""

    CRONTAB = "crontab"
    SYSTEMD = "systemd"
    RAY = "ray"
    RAYJOB = "rayjob"
    RAYCRONJOB = "raycronjob"
    CRONJOB = "cronjob"


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Where it is to run: `address` of a Ray cluster, container `image` of its pods."""

    address: str | None = None
    image: str | None = None


def schedule(file: Path, printed: Printed | None, elsewhere: Elsewhere) -> str:
    """Run the job until a signal comes, and give ""; or give the text that was asked for."""
    config = read_config(file)
    if config.schedule is None:
        raise UsageError(f"{file} has no schedule; give one such as `schedule: {{cron: '0 3 * * *'}}`")
    job = ScheduledJob(name=config.name, file=file.absolute())
    if printed is None:
        run_schedule(job, config.schedule)
        return ""
    if printed in (Printed.RAYJOB, Printed.RAYCRONJOB, Printed.CRONJOB):
        _warn_of_relative_paths(file, config)
    return _text(job, config, printed, elsewhere)


def _text(job: ScheduledJob, config: ReindexConfig, printed: Printed, elsewhere: Elsewhere) -> str:
    times, content = config.schedule, job.file.read_text(encoding="utf-8")
    assert times is not None
    match printed:
        case Printed.CRONTAB:
            return crontab(job, times)
        case Printed.SYSTEMD:
            return systemd(job, times)
        case Printed.RAY:
            return ray_submit(job, times, wall_clock(), elsewhere.address)
        case Printed.RAYJOB:
            return rayjob(job, content, Pods(image=_needed(elsewhere.image, "--image")))
        case Printed.RAYCRONJOB:
            return raycronjob(job, times, content, Pods(image=_needed(elsewhere.image, "--image")))
        case Printed.CRONJOB:
            image, address = _needed(elsewhere.image, "--image"), _needed(elsewhere.address, "--address")
            return cronjob(job, times, content, image, address)


def _needed(value: str | None, option: str) -> str:
    if not value:
        raise UsageError(f"{option} must be given to print this")
    return value


def _warn_of_relative_paths(file: Path, config: ReindexConfig) -> None:
    """In a pod the file lies elsewhere, and so would what it names from its own folder."""
    here = str(file.absolute().parent)
    places = [config.store, *(corpus.root for corpus in config.corpora)]
    if relative := [place for place in places if place.startswith(here)]:
        log(f"note: {relative[0]} lies beside this file; a pod needs paths or addresses that it can see")
