"""How `jobs torture` shows itself, and the exit code that tells whether a promise was broken."""

from pathlib import Path

import typer

from r2scp.jobs.console import print_result, log
from r2scp.jobs.faults.report import TortureWanted
from r2scp.jobs.faults.run import run_torture

BROKEN = 1  # exit code: something was lost, twice, left over or torn


def torture_and_tell(rounds: int, seed: int, folder: Path | None, as_json: bool) -> None:
    """`run_torture`, seen on stderr."""
    report = run_torture(TortureWanted(rounds=rounds, seed=seed, folder=folder), log)
    if as_json:
        print_result(report.to_json(), as_json)
    else:
        print_result({"rounds": report.rounds, "seed": seed, "seconds": report.seconds} | report.counts, as_json)
        for finding in report.findings:
            log(f"round {finding['round']} ({finding['fault']}), {finding['when']}: {finding['what']}")
    if report.bad:
        raise typer.Exit(BROKEN)
