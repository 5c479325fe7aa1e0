"""The command `jobs run`: progress on stderr, and an exit code that tells whether the result is published."""

from pathlib import Path

import typer

from r2scp.jobs.console import log, print_result, progress_bar
from r2scp.jobs.ingest.extract_command import ProgressReporter
from r2scp.jobs.reindex.config import read_job_file
from r2scp.jobs.reindex.job import ReindexReport, run_reindex

EXIT_REFUSED = 1  # exit code: the gate failed


def run_and_report(file: Path, dry_run: bool, as_json: bool) -> None:
    """Run a job and print its report; exits with 1 if the gate failed."""
    with progress_bar() as bar:
        report = run_reindex(read_job_file(file), log, dry_run, lambda corpus: ProgressReporter(bar, corpus))
    if as_json:
        print_result(report.to_json(), as_json)
    else:
        _print_report(report)
    if report.outcome == "refused":
        if not as_json:
            log(f"error: {report.why}")
        raise typer.Exit(EXIT_REFUSED)


def _print_report(report: ReindexReport) -> None:
    for line in report.due:
        log(f"to do: {line}")
    for check in report.checks:
        mark = "passed" if check["passed"] else "FAILED"
        log(f"gate: {mark}: {check['what']} {check['value']:.4g} (limit {check['limit']:.4g})")
    why = f": {report.why}" if report.why else ""
    run = f", run {report.run_id}" if report.run_id else ""
    log(f"{report.name}: {report.outcome}{why if report.outcome != 'refused' else ''}{run}")
