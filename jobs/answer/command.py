"""The `answer` command: an answer with its evidence for a person, JSON lines for a program."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.answer.answerer import Answerer, AnswerOptions
from r2scp.jobs.answer.jsonl import read_requests
from r2scp.jobs.answer.page import answer_page
from r2scp.jobs.answer.records import Rejected, Request, Result
from r2scp.jobs.console import absolute, log, printable
from r2scp.jobs.html.thumbnails import Previews
from r2scp.jobs.ingest.extract_command import ALL_FAILED
from r2scp.jobs.training.checkpoints import read_checkpoint
from r2scp.jobs.training.evaluation_table import grid
from r2scp.store.atomic_file import replace_file
from r2scp.store.errors import MediaError, R2SCPError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import MODALITY_NAMES, Modality

BAR = 24  # characters of a probability of 1


@dataclass(frozen=True, kw_only=True)
class Output:
    """What to print. `top`: number of answers, 0 for all."""

    explain: bool
    as_json: bool
    html: Path | None
    top: int

    def check(self, request: Request, batch: bool) -> None:
        """Raises `UsageError` for options that exclude each other."""
        given = request.video or request.question or request.choices or request.missing != "auto"
        if batch and (given or self.html or self.explain):
            raise UsageError(
                "--batch reads requests from standard input, one JSON object per line, and writes JSON "
                "lines; leave out VIDEO, QUESTION, --choice, --missing, --html and --explain"
            )
        if not batch and not (request.video and request.question):
            raise UsageError('give a video and a question: r2scp-pipe answer --run RUN VIDEO "QUESTION"')


def open_answerer(
    run: Path,
    store: str | None,
    fingerprint: str | None,
    storage_options: dict[str, str],
    options: AnswerOptions,
) -> Answerer:
    """A model with the given store, or the one that it was trained on."""
    checkpoint = read_checkpoint(absolute(run))
    uri = store or str(checkpoint.store.get("uri", ""))
    encoder = fingerprint or (None if store else str(checkpoint.store["fingerprint"]))
    return Answerer.open(FeatureStore.open(uri, encoder, storage_options), absolute(run), options)


def answer_one(answerer: Answerer, request: Request, output: Output) -> None:
    """Answer one request and print the result."""
    try:
        result = answerer.answer_request(request)
    except MediaError as error:
        raise MediaError(error.reason, f"{error.detail} ({request.video})") from error
    if output.html:
        path = absolute(output.html)
        replace_file(path, answer_page(result, Previews(ffmpeg=answerer.options.ffmpeg)).encode())
        log(printable(f"Saved to {path}"))
    if output.as_json:
        sys.stdout.write(_json_line(result, output.top))
    else:
        Console().print(render(result, output), soft_wrap=True)


def answer_batch(answerer: Answerer, top: int) -> None:
    """Answer requests on standard input, one JSON line each, in order; exit 3 if none could be answered."""
    if sys.stdin is None or sys.stdout is None:
        raise UsageError("--batch needs standard input and output; one of them is closed")
    counts: Counter[str] = Counter()
    started = time.monotonic()
    for result in answerer.answer_all(read_requests(sys.stdin.fileno())):
        counts["" if isinstance(result, Result) else result.reason] += 1
        if not _write_line(_json_line(result, top)):
            break
    seconds = time.monotonic() - started
    rejected = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason)
    log(f"{counts['']} answered, {rejected or 'none'} rejected, {seconds:.1f} s")
    if counts and not counts[""]:
        raise typer.Exit(ALL_FAILED)


def _write_line(line: str) -> bool:
    """Write and flush a line; False if the reader has closed the pipe. Raises `R2SCPError`."""
    try:
        sys.stdout.write(line)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if isinstance(error, BrokenPipeError):
            return False
        raise R2SCPError(f"cannot write to standard output: {error.strerror}") from error
    return True


def render(result: Result, output: Output) -> Group:
    """A result for a terminal."""
    parts: list[RenderableType] = [
        Text(printable(result.question), style="bold"),
        _answers(result, output.top),
    ]
    if finding := result.finding():
        parts.append(Text(printable(finding)))
    if output.explain:
        parts += _evidence(result)
    parts += [Text(f"note: {printable(note)}", style="yellow") for note in result.notes]
    return Group(*parts)


def _json_line(result: Result | Rejected, top: int) -> str:
    if isinstance(result, Result) and top:
        result = replace(result, answers=result.answers[:top])
    return json.dumps(result.to_json()) + "\n"


def _answers(result: Result, top: int) -> Grid:
    table = grid("", ("answer", "probability", ""))
    table.title = None
    for candidate in result.answers[: top or None]:
        bar = "█" * round(BAR * candidate.probability)
        percent = f"{100 * candidate.probability:.1f} %"
        table.add_row(Text(printable(candidate.answer)), Text(percent), Text(bar, justify="left"))
    return table


def _evidence(result: Result) -> Iterator[RenderableType]:
    for at, clip in enumerate(result.neighbours, start=1):
        if at == 1:
            title = f"\nRetrieved clips, best first (version {clip.clips_version} of `clips`)"
            yield Text(title, style="table.title")
        yield Text(
            f"{at}  {printable(clip.clip_id)}  score {clip.score:.4f}, most similar at second {clip.second}"
        )
        for line in (clip.file, ", ".join(clip.labels), f"sha256 {clip.content_sha256}"):
            if line:
                yield Text(f"   {printable(line)}")
    if purged := [each for each in result.recovered if each.purged]:
        available = MODALITY_NAMES[Modality.VISUAL if result.missing == "audio" else Modality.AUDIO]
        table = grid(
            f"\n{len(purged)} of {len(result.recovered)} seconds purged",
            ("second", "dissonance δ", f"replaced with guidance of the {available} at second"),
        )
        for each in sorted(purged, key=lambda each: -(each.dissonance or 0.0)):
            table.add_row(Text(str(each.second)), Text(f"{each.dissonance:.3f}"), Text(str(each.replaced_by)))
        yield table
    table = grid("\nRouter weights", tuple(result.router))
    table.add_row(*(Text(f"{weight:.3f}") for weight in result.router.values()))
    yield table
    model, store = result.model, result.store
    yield Text(
        printable(
            f"model {model['run']} (stage {model['stage']}, step {model['step']}, sha256 "
            f"{str(model['sha256'])[:12]}), store {store['uri']} ({store['snapshot'] or 'latest versions'}), "
            f"{store['retrieval']} retrieval among {store['bank_clips']} clips, encoder {store['encoder']}"
        )
    )
