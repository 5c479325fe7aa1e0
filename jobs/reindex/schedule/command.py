"""`jobs schedule`: run a job on its schedule, or print the schedule for another scheduler."""

from enum import StrEnum
from pathlib import Path

from r2scp.jobs.console import log
from r2scp.jobs.reindex.config import ReindexConfig, read_job_file
from r2scp.jobs.reindex.cron import ScheduleSettings
from r2scp.jobs.reindex.schedule.exports import crontab, ray_submit, systemd
from r2scp.jobs.reindex.schedule.kubernetes import Pods, cronjob, raycronjob, rayjob
from r2scp.jobs.reindex.schedule.loop import ScheduledJob, run_schedule, utc_now
from r2scp.store.errors import UsageError


class ScheduleFormat(StrEnum):
    """Formats that can be printed."""

    CRONTAB = "crontab"
    SYSTEMD = "systemd"
    RAY = "ray"
    RAYJOB = "rayjob"
    RAYCRONJOB = "raycronjob"
    CRONJOB = "cronjob"


def run_or_print(
    file: Path, output: ScheduleFormat | None, address: str | None = None, image: str | None = None
) -> str:
    """Run the job on its schedule until a signal comes and return "", or return the schedule as text.

    `address`: dashboard of the Ray cluster to submit to; `image`: container image of the pods.
    """
    config = read_job_file(file)
    if config.schedule is None:
        raise UsageError(f"{file} has no schedule; give one such as `schedule: {{cron: '0 3 * * *'}}`")
    job = ScheduledJob(name=config.name, file=file.absolute())
    if output is None:
        run_schedule(job, config.schedule)
        return ""
    if output in (ScheduleFormat.RAYJOB, ScheduleFormat.RAYCRONJOB, ScheduleFormat.CRONJOB):
        _warn_of_relative_paths(file, config)
    return _render(job, config.schedule, output, address, image)


def _render(
    job: ScheduledJob,
    settings: ScheduleSettings,
    output: ScheduleFormat,
    address: str | None,
    image: str | None,
) -> str:
    content = job.file.read_text(encoding="utf-8")
    match output:
        case ScheduleFormat.CRONTAB:
            return crontab(job, settings)
        case ScheduleFormat.SYSTEMD:
            return systemd(job, settings)
        case ScheduleFormat.RAY:
            return ray_submit(job, settings, utc_now(), address)
        case ScheduleFormat.RAYJOB:
            return rayjob(job, content, Pods(image=_required(image, "--image")))
        case ScheduleFormat.RAYCRONJOB:
            return raycronjob(job, settings, content, Pods(image=_required(image, "--image")))
        case ScheduleFormat.CRONJOB:
            image, address = _required(image, "--image"), _required(address, "--address")
            return cronjob(job, settings, content, image, address)


def _required(value: str | None, option: str) -> str:
    if not value:
        raise UsageError(f"{option} must be given for this format")
    return value


def _warn_of_relative_paths(file: Path, config: ReindexConfig) -> None:
    """In a pod the file is elsewhere, and so are paths relative to it."""
    folder = str(file.absolute().parent)
    paths = [config.store, *(corpus.root for corpus in config.corpora)]
    if relative := [path for path in paths if path.startswith(folder)]:
        log(f"note: {relative[0]} is relative to this file; a pod needs paths or addresses that it can reach")
