"""How commands print: results on stdout, everything else on stderr, errors as one line."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from r2scp.store.errors import R2SCPError, UsageError

#: stderr; text from outside is never taken for markup
console = Console(stderr=True, markup=False, highlight=False, emoji=False)


def log(text: str) -> None:
    """Print one line on stderr, without wrapping it."""
    console.print(text, soft_wrap=True)


class EncoderName(StrEnum):
    """The named encoders; others are given as --weights."""

    HUGE = "imagebind-huge"
    DEMO = "imagebind-demo"


Choice = TypeVar("Choice", bound=StrEnum)


def parse_choice(options: type[Choice], value: str, name: str) -> Choice:
    """The member that the value of the option `name` names. Raises `UsageError`."""
    try:
        return options(value)
    except ValueError as error:
        raise UsageError(f"{name} must be one of {', '.join(options)}; got {value!r}") from error


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


RESUME_HINT = "committed work is kept; run the same command again to resume"


@contextmanager
def exit_on_error(interrupted: str = RESUME_HINT) -> Iterator[None]:
    """Turn our errors into one line and exit code 1 (2 for wrong usage), Ctrl-C and SIGTERM into 130.

    `interrupted`: message after an interruption.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        with _errors_to_exit_codes(interrupted):
            yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


@contextmanager
def _errors_to_exit_codes(interrupted: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        log(f"error: {printable(str(error))}")
        raise typer.Exit(2) from error
    except R2SCPError as error:
        log(f"error: {printable(str(error))}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        log(f"interrupted: {interrupted}")
        raise typer.Exit(130) from error


def print_result(result: Mapping[str, object], as_json: bool) -> None:
    """Print a result on stdout: one JSON object, or aligned lines for a person."""
    if as_json:
        sys.stdout.write(json.dumps(result, default=str) + "\n")
        return
    out = Console(markup=False, highlight=False, emoji=False)
    _print_lines(out, result, "")


def _print_lines(out: Console, result: Mapping[str, object], indent: str) -> None:
    width = max((len(name) for name in result), default=0)
    for name, value in result.items():
        if isinstance(value, Mapping):
            out.print(f"{indent}{name.replace('_', ' ')}")
            _print_lines(out, value, indent + "  ")
        elif value not in ([], ""):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            out.print(f"{indent}{name.replace('_', ' '):<{width}}  {printable(text)}", soft_wrap=True)


def printable(text: str) -> str:
    """`text` with control and direction characters escaped, so that it cannot steer a terminal."""
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr, drawn on a terminal only (elsewhere commands log plain lines)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        yield bar


def default_workers() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def absolute(path: Path) -> Path:
    """An absolute path: workers run in other folders."""
    return path.expanduser().resolve()
