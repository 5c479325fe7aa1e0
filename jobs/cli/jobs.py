"""The commands of `r2scp-pipe jobs`. Each imports its module when it is called, so that --help is quick."""

from pathlib import Path
from typing import Annotated

import typer

from r2scp.jobs.cli.options import (
    DEFAULT_STORE,
    FingerprintOption,
    JsonOption,
    SeedOption,
    StorageOption,
    StoreOption,
    open_store,
)
from r2scp.jobs.console import exit_on_error, parse_choice, print_result

JobFile = Annotated[Path, typer.Argument(help="YAML file of the job.", show_default=False)]

jobs_app = typer.Typer(
    help="Keep a store up to date. Re-indexes on a schedule and publishes only what passes the gate.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@jobs_app.command("run")
def jobs_run(
    file: JobFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a store up to date and publish it. Exits 1 if the gate refuses it."""
    with exit_on_error():
        from r2scp.jobs.reindex.command import run_and_report

        run_and_report(file, dry_run, as_json)


@jobs_app.command("list")
def jobs_list(
    limit: Annotated[int, typer.Option(min=1, help="Show at most N runs.")] = 20,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs that wrote to a store, newest first."""
    with exit_on_error():
        from r2scp.jobs.reindex.history import list_runs, print_runs

        rows = list_runs(open_store(store, fingerprint, storage_option), limit)
        print_result({"runs": rows}, as_json) if as_json else print_runs(rows)


@jobs_app.command("show")
def jobs_show(
    run: Annotated[str, typer.Argument(help="The run id, or a unique part of it.")],
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one run. Settings, counts, recall, gate, versions."""
    with exit_on_error():
        from r2scp.jobs.reindex.history import run_details

        print_result(run_details(open_store(store, fingerprint, storage_option), run), as_json)


@jobs_app.command("rollback")
def jobs_rollback(
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Roll back to the previous published snapshot."""
    with exit_on_error():
        from r2scp.jobs.reindex.history import rollback

        print_result(rollback(open_store(store, fingerprint, storage_option)), as_json)


@jobs_app.command("schedule")
def jobs_schedule(
    file: JobFile,
    printed: Annotated[
        str | None,
        typer.Option(
            "--print",
            help="Print instead: crontab, systemd, ray, rayjob, raycronjob or cronjob (KubeRay).",
        ),
    ] = None,
    image: Annotated[str | None, typer.Option(help="Container image for KubeRay's pods.")] = None,
    address: Annotated[str | None, typer.Option(help="Dashboard address of the Ray cluster.")] = None,
) -> None:
    """Run a job on its schedule, or print it for another scheduler."""
    with exit_on_error():
        from r2scp.jobs.reindex.schedule.command import ScheduleFormat, run_or_print

        output = parse_choice(ScheduleFormat, printed, "--print") if printed else None
        if text := run_or_print(file, output, address, image):
            typer.echo(text, nl=not text.endswith("\n"))


@jobs_app.command("torture")
def jobs_torture(
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds: one fault and two runs each.")] = 30,
    seed: SeedOption = 1,
    folder: Annotated[
        Path | None, typer.Option(help="Folder to work in and keep (default: a temporary one).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Crash test: kill jobs at random points and check that nothing is lost."""
    with exit_on_error():
        from r2scp.jobs.faults.command import crash_test_and_report

        crash_test_and_report(rounds, seed, folder, as_json)
