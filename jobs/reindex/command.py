"""How `jobs run` shows itself, and the exit code that tells whether what was made serves."""

from pathlib import Path

import typer

from r2scp.jobs.console import progress_bar, print_result, log
from r2scp.jobs.ingest.extract_command import ProgressReporter
from r2scp.jobs.reindex.config import read_config
from r2scp.jobs.reindex.job import ReindexReport, run_reindex

REFUSED = 1  # exit code: the gate did not let it pass


def run_and_tell(file: Path, dry_run: bool, as_json: bool) -> None:
    """`run_reindex`, seen on stderr; exits with 1 where the gate refused."""
    with progress_bar() as bar:
        report = run_reindex(read_config(file), log, dry_run, lambda corpus: ProgressReporter(bar, corpus))
    if as_json:
        print_result(report.to_json(), as_json)
    else:
        _show(report)
    if report.outcome == "refused":
        if not as_json:
            log(f"error: {report.why}")
        raise typer.Exit(REFUSED)


def _show(report: ReindexReport) -> None:
    for line in report.due:
        log(f"due: {line}")
    for check in report.checks:
        mark = "passed" if check["passed"] else "FAILED"
        log(f"gate: {mark}: {check['what']} {check['value']:.4g} (limit {check['limit']:.4g})")
    why = f": {report.why}" if report.why else ""
    run = f", run {report.run_id}" if report.run_id else ""
    log(f"{report.name}: {report.outcome}{why if report.outcome != 'refused' else ''}{run}")
