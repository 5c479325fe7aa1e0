"""The command `jobs torture`: progress on stderr, and an exit code that reports broken promises."""

from pathlib import Path

import typer

from r2scp.jobs.console import log, print_result
from r2scp.jobs.faults.report import CrashTestSettings
from r2scp.jobs.faults.run import run_crash_test

EXIT_BROKEN = 1  # exit code: something was lost, duplicated, orphaned or torn


def crash_test_and_report(rounds: int, seed: int, folder: Path | None, as_json: bool) -> None:
    """Run the crash test and print its report; exits with 1 if there are findings."""
    report = run_crash_test(CrashTestSettings(rounds=rounds, seed=seed, folder=folder), log)
    if as_json:
        print_result(report.to_json(), as_json)
    else:
        print_result(
            {"rounds": report.rounds, "seed": seed, "seconds": report.seconds} | report.counts, as_json
        )
        for finding in report.findings:
            log(f"round {finding['round']} ({finding['fault']}), {finding['when']}: {finding['what']}")
    if report.bad:
        raise typer.Exit(EXIT_BROKEN)
