"""How `answer` shows itself: an answer and what it rests on for a person, JSON lines for a program."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from r2scp.jobs.answer.answerer import Answerer, AnswerOptions
from r2scp.jobs.answer.jsonl import read_requests
from r2scp.jobs.answer.page import answer_page
from r2scp.jobs.answer.records import Result, Request, Rejected
from r2scp.jobs.console import absolute, default_workers, printable, log
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
class Wanted:
    """What is to be shown. `top`: so many answers, 0 for all."""

    explain: bool
    as_json: bool
    html: Path | None
    top: int

    def require(self, ask: Request, batch: bool) -> None:
        """Raises `UsageError` for what does not go together."""
        given = ask.video or ask.question or ask.choices or ask.missing != "auto"
        if batch and (given or self.html or self.explain):
            raise UsageError(
                "--batch reads videos, questions, choices and what is missing from standard input, an object "
                "a line, and writes JSON lines; leave out VIDEO, QUESTION, --choice, --missing, --html and "
                "--explain"
            )
        if not batch and not (ask.video and ask.question):
            raise UsageError('give a video and a question: r2scp-pipe answer --run RUN VIDEO "QUESTION"')


class Means(NamedTuple):
    """The command line's options, None where none is given."""

    encoder: str | None
    weights: str | None
    device: str | None
    at: str | None
    num_workers: int | None
    ffmpeg: str | None

    def read(self) -> AnswerOptions:
        """As `AnswerMeans`."""
        return AnswerOptions(
            encoder=self.encoder,
            weights=self.weights,
            device=self.device,
            at=self.at,
            workers=self.num_workers or default_workers(),
            ffmpeg=self.ffmpeg,
        )


def open_answerer(
    run: Path, store: str | None, fingerprint: str | None, storage_options: dict[str, str], means: Means
) -> Answerer:
    """A model with the store that is named, or the one that it was trained on."""
    checkpoint = read_checkpoint(absolute(run))
    uri = store or str(checkpoint.store.get("uri", ""))
    wanted = fingerprint or (None if store else str(checkpoint.store["fingerprint"]))
    return Answerer.open(FeatureStore.open(uri, wanted, storage_options), absolute(run), means.read())


def answer_one(answerer: Answerer, ask: Request, wanted: Wanted) -> None:
    """Answer one question and show it."""
    try:
        answered = answerer.ask(ask)
    except MediaError as error:
        raise MediaError(error.reason, f"{error.detail} ({ask.video})") from error
    if wanted.html:
        replace_file(
            absolute(wanted.html), answer_page(answered, Previews(ffmpeg=answerer.means.ffmpeg)).encode()
        )
        log(printable(f"kept in {absolute(wanted.html)}"))
    if wanted.as_json:
        sys.stdout.write(_line(answered, wanted.top))
    else:
        Console().print(told(answered, wanted), soft_wrap=True)


def answer_batch(answerer: Answerer, top: int) -> None:
    """Answer the JSON lines of standard input with JSON lines, in their order; exit 3 where none could be."""
    if sys.stdin is None or sys.stdout is None:
        raise UsageError("--batch needs standard input and output; one of them is closed")
    counts: Counter[str] = Counter()
    started = time.monotonic()
    for answered in answerer.answers(read_requests(sys.stdin.fileno())):
        counts["" if isinstance(answered, Result) else answered.reason] += 1
        if not _put(_line(answered, top)):
            break
    seconds = time.monotonic() - started
    refused = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason)
    log(f"{counts['']} answered, {refused or 'none'} refused, {seconds:.1f} s")
    if counts and not counts[""]:
        raise typer.Exit(ALL_FAILED)


def _put(line: str) -> bool:
    """Write a line now; False where whoever reads has read enough. Raises `R2SCPError`."""
    try:
        sys.stdout.write(line)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        if isinstance(error, BrokenPipeError):
            return False
        raise R2SCPError(f"cannot write to standard output: {error.strerror}") from error
    return True


def told(answered: Result, wanted: Wanted) -> Group:
    """An answer for a terminal."""
    parts: list[RenderableType] = [
        Text(printable(answered.question), style="bold"),
        _answers(answered, wanted.top),
    ]
    if finding := answered.finding():
        parts.append(Text(printable(finding)))
    if wanted.explain:
        parts += list(_evidence(answered))
    parts += [Text(f"note: {printable(note)}", style="yellow") for note in answered.notes]
    return Group(*parts)


def _line(answered: Result | Rejected, top: int) -> str:
    if isinstance(answered, Result) and top:
        answered = replace(answered, answers=answered.answers[:top])
    return json.dumps(answered.to_json()) + "\n"


def _answers(answered: Result, top: int) -> Grid:
    made = grid("", ("answer", "probability", ""))
    made.title = None
    for one in answered.answers[: top or None]:
        bar = "█" * round(BAR * one.probability)
        made.add_row(
            Text(printable(one.answer)), Text(f"{100 * one.probability:.1f} %"), Text(bar, justify="left")
        )
    return made


def _evidence(answered: Result) -> Iterator[RenderableType]:
    for at, found in enumerate(answered.neighbours, start=1):
        if at == 1:
            yield Text(
                f"\nWhat stood in, best first (version {found.clips_version} of `clips`)", style="table.title"
            )
        yield Text(
            f"{at}  {printable(found.clip_id)}  score {found.score:.4f}, most alike at second {found.second}"
        )
        for said in (found.file, ", ".join(found.labels), f"sha256 {found.content_sha256}"):
            if said:
                yield Text(f"   {printable(said)}")
    if purged := [one for one in answered.recovered if one.purged]:
        other = MODALITY_NAMES[Modality.VISUAL if answered.missing == "audio" else Modality.AUDIO]
        made = grid(
            f"\n{len(purged)} of {len(answered.recovered)} seconds purged",
            ("second", "dissonance δ", f"replaced by the guided {other} of second"),
        )
        for one in sorted(purged, key=lambda one: -(one.dissonance or 0.0)):
            made.add_row(Text(str(one.second)), Text(f"{one.dissonance:.3f}"), Text(str(one.replaced_by)))
        yield made
    made = grid("\nWeights of the router", tuple(answered.router))
    made.add_row(*(Text(f"{weight:.3f}") for weight in answered.router.values()))
    yield made
    model, store = answered.model, answered.store
    yield Text(
        printable(
            f"model {model['run']} (stage {model['stage']}, step {model['step']}, sha256 "
            f"{str(model['sha256'])[:12]}), store {store['uri']} ({store['snapshot'] or 'as it is now'}), "
            f"{store['retrieval']} retrieval among {store['bank_clips']} clips, encoder {store['encoder']}"
        )
    )
