"""The commands of `r2scp-pipe jobs`; like those of `cli`, each imports its module when it is called."""

from pathlib import Path
from typing import Annotated

import typer

from r2scp.jobs.console import (
    DEFAULT_STORE,
    FingerprintOption,
    JsonOption,
    StorageOption,
    StoreOption,
    parse_choice,
    print_result,
    exit_on_error,
    storage_options,
)

JobFile = Annotated[Path, typer.Argument(help="The YAML file of the job.", show_default=False)]

jobs_app = typer.Typer(
    help="Re-indexing jobs: keep a store fresh, on a schedule, and let it serve only when it is fit to.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@jobs_app.command("run")
def jobs_run(
    file: JobFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is due; write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a store up to date with its corpora; let it serve if the gate passes, else exit with 1."""
    with exit_on_error():
        from r2scp.jobs.reindex.command import run_and_tell

        run_and_tell(file, dry_run, as_json)


@jobs_app.command("list")
def jobs_list(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what was done to a store, newest first."""
    with exit_on_error():
        from r2scp.jobs.reindex.history import runs, show_runs
        from r2scp.store.feature_store import FeatureStore

        rows = runs(FeatureStore.open(store, fingerprint, storage_options(storage_option)), limit)
        print_result({"runs": rows}, as_json) if as_json else show_runs(rows)


@jobs_app.command("show")
def jobs_show(
    run: Annotated[str, typer.Argument(help="The run's id, or a part that fits no other.")],
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all that is known of one run: settings, counts, recall, gate, versions."""
    with exit_on_error():
        from r2scp.jobs.reindex.history import run as find
        from r2scp.store.feature_store import FeatureStore

        print_result(find(FeatureStore.open(store, fingerprint, storage_options(storage_option)), run), as_json)


@jobs_app.command("rollback")
def jobs_rollback(
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the snapshot that served before serve again."""
    with exit_on_error():
        from r2scp.jobs.reindex.history import rollback
        from r2scp.store.feature_store import FeatureStore

        print_result(rollback(FeatureStore.open(store, fingerprint, storage_options(storage_option))), as_json)


@jobs_app.command("schedule")
def jobs_schedule(
    file: JobFile,
    printed: Annotated[
        str | None,
        typer.Option(
            "--print", help="Only print: crontab, systemd, ray, rayjob, raycronjob or cronjob (KubeRay)."
        ),
    ] = None,
    image: Annotated[str | None, typer.Option(help="Container image of the pods, for KubeRay.")] = None,
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster that `ray job` submits to.")] = None,
) -> None:
    """Run a job at its times in the foreground, until interrupted; or print what runs it elsewhere."""
    with exit_on_error():
        from r2scp.jobs.reindex.schedule.command import Elsewhere, Printed, schedule

        kind = parse_choice(Printed, printed, "--print") if printed else None
        if text := schedule(file, kind, Elsewhere(address=address, image=image)):
            typer.echo(text, nl=not text.endswith("\n"))


@jobs_app.command("torture")
def jobs_torture(
    rounds: Annotated[int, typer.Option(min=1, help="How many; each is one fault and two runs.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of all choices.")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="Where to work and keep what was found; else all of it goes.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Kill a job in every way we know, on a generated corpus, and account for every clip and file."""
    with exit_on_error():
        from r2scp.jobs.faults.command import torture_and_tell

        torture_and_tell(rounds, seed, folder, as_json)
