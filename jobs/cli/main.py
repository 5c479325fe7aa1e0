"""The command line. Each command imports its module when it is called, so that --help is quick."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from r2scp.jobs.cli.ingest import extract, index, weights
from r2scp.jobs.cli.jobs import jobs_app
from r2scp.jobs.cli.options import (
    DEFAULT_STORE,
    FfmpegOption,
    FingerprintOption,
    JsonOption,
    NumWorkersOption,
    SettingsOption,
    StorageOption,
    StoreOption,
    open_store,
    storage_options,
)
from r2scp.jobs.cli.runs import answer, evaluate, report, study, train
from r2scp.jobs.cli.store import store_app
from r2scp.jobs.console import exit_on_error, print_result

app = typer.Typer(
    name="r2scp-pipe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if not requested:
        return
    packages = []
    for name in ("torch", "pylance"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} not installed")
    typer.echo(
        f"r2scp-pipe {version('r2scp-pipe')} (python {platform.python_version()}, {', '.join(packages)})"
    )
    raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Store features of videos, and answer questions about recordings whose sound or picture is missing."""


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the generated corpus and its store.")] = Path(
        "demo"
    ),
    clips: Annotated[int, typer.Option(min=1, help="Number of 10 s clips to generate.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the corpus.")] = 7,
    num_workers: NumWorkersOption = None,
    change: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run everything on generated clips. Extract, index, train, evaluate with a modality missing, report."""
    with exit_on_error():
        from r2scp.jobs.demo.run import DemoRequest, run_demo

        request = DemoRequest(
            folder=folder,
            clips=clips,
            seed=seed,
            num_workers=num_workers,
            settings=tuple(change or ()),
            as_json=as_json,
        )
        print_result(run_demo(request), as_json)


def status(
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in the store. Clips, statuses, questions, failures, versions, snapshots."""
    with exit_on_error():
        print_result(open_store(store, fingerprint, storage_option).status(), as_json)


def failures(
    reason: Annotated[str | None, typer.Option(help="Show only failures with this reason.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most N rows.")] = 100,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which clips could not be stored, and why."""
    with exit_on_error():
        from r2scp.jobs.inspect.failures import show_failures

        show_failures(open_store(store, fingerprint, storage_option), reason, limit, as_json)


def doctor(
    store: StoreOption = DEFAULT_STORE,
    storage_option: StorageOption = None,
    ffmpeg: FfmpegOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check what is installed; exits 1 if anything is missing. Packages, ffmpeg, devices, weights, store."""
    with exit_on_error():
        from r2scp.jobs.cli.doctor import examine

        checks, complete = examine(store, storage_options(storage_option), ffmpeg)
        print_result(checks, as_json)
        raise typer.Exit(0 if complete else 1)


# in the order of `--help`
COMMANDS = (demo, extract, index, train, evaluate, answer, report, study, status, failures, weights, doctor)
for command in COMMANDS:
    app.command()(command)
app.add_typer(jobs_app, name="jobs")
app.add_typer(store_app, name="store")
