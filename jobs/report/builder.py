"""A report under construction: the request, the facts read so far, and the finished sections.

A section is a list of blocks: plain values that `templates/report.html` renders.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from r2scp.jobs.report.facts.probe import Probe
from r2scp.jobs.report.facts.run_folder import MissingPart, RunFacts
from r2scp.jobs.report.figures.style import Figure, figure_markup
from r2scp.store.errors import R2SCPError
from r2scp.store.feature_store import FeatureStore

GALLERY_QUESTIONS = 12
MAX_ROWS = 1_500  # of a table; figures are drawn from all rows

Block = dict[str, object]
OnProgress = Callable[[str], None]


@dataclass(kw_only=True)
class Section:
    """A part of the page. `name`: its id, never text from outside."""

    name: str
    heading: str
    blocks: list[Block] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def add_text(self, text: str) -> None:
        self.blocks.append({"kind": "text", "text": text})

    def add_heading(self, text: str) -> None:
        """A heading one level below the section's own."""
        self.blocks.append({"kind": "heading", "text": text})

    def add_notice(self, text: str, kind: str = "note") -> None:
        """`kind`: note, warning or fault."""
        self.blocks.append({"kind": "notice", "text": text, "notice": kind})

    def add_missing(self, part: MissingPart) -> None:
        """What is not here, why, and the command that makes it."""
        end = ". To make it:" if part.make else "."
        self.blocks.append({"kind": "missing", "text": f"{part.what}: {part.why}{end}", "command": part.make})

    def add_command(self, line: str) -> None:
        """A command line to copy."""
        self.blocks.append({"kind": "command", "command": line})

    def add_definitions(self, pairs: Sequence[tuple[str, object]]) -> None:
        self.blocks.append({"kind": "definitions", "pairs": list(pairs)})

    def add_table(
        self, caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
    ) -> None:
        """A cell is a value, or {"text", "value", "minor"}: see `templates/parts.html`."""
        self.blocks.append({"kind": "table", **_table(caption, columns, rows, note)})

    def add_figure(self, figure: Figure | None) -> bool:
        """A figure with its numbers; returns whether there was one."""
        if figure is None:
            return False
        image = figure_markup(figure)  # before the lists change: drawing may raise
        self.figures.append(figure)
        self.blocks.append(
            {
                "kind": "figure",
                "title": figure.title,
                "image": image,
                "caption": figure.caption,
                "alt": figure.alt,
                "table": _table(f"Numbers of “{figure.title}”", figure.columns, figure.rows, ""),
            }
        )
        return True


def _table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str
) -> dict[str, object]:
    if len(rows) > MAX_ROWS:
        note = f"{note} The first {MAX_ROWS:,} of {len(rows):,} rows.".strip()
    heads = [
        {"text": name, "numeric": at > 0 and _is_numeric([row[at] for row in rows])}
        for at, name in enumerate(columns)
    ]
    return {
        "caption": caption,
        "columns": heads,
        "rows": [list(row) for row in rows[:MAX_ROWS]],
        "note": note,
    }


def _is_numeric(cells: Sequence[object]) -> bool:
    """Whether all cells with a value hold numbers, and there is at least one."""
    cell_values = (cell.get("value") if isinstance(cell, dict) else cell for cell in cells)
    values = [value for value in cell_values if value is not None]
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def share_cell(share: float) -> dict[str, object]:
    """A share, shown in % and sorted by its value."""
    return {"text": f"{100 * share:.1f}", "value": share}


def interval_cell(share: float, low: float, high: float) -> dict[str, object]:
    """A share in % with its interval in brackets."""
    return share_cell(share) | {"minor": f"({100 * low:.0f}–{100 * high:.0f})"}


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """What to report on. `store` None: the one that the first run was trained on. `studies`: the folder with
    the results of `study`. `command_words`: the command line, for the page."""

    runs: tuple[Path, ...]
    store: str | None = None
    fingerprint: str | None = None
    storage_options: Mapping[str, str] | None = None
    studies: Path | None = None
    out: Path | None = None
    figures: Path | None = None
    gallery: int = GALLERY_QUESTIONS
    device: str = "cpu"
    weights: str | None = None  # of the encoder that filled the store; None: found by its fingerprint
    command_words: tuple[str, ...] = ("report",)


@dataclass(kw_only=True)
class ReportBuilder:
    """A report under construction."""

    request: ReportRequest
    on_progress: OnProgress
    runs: list[RunFacts]
    store: FeatureStore | None = None
    store_error: str = ""  # why there is no store
    sections: list[Section] = field(default_factory=list)
    missing: list[MissingPart] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)  # by run

    @contextmanager
    def section(self, name: str, heading: str) -> Iterator[Section]:
        """A new section; an `R2SCPError` raised in its block becomes a missing part of it."""
        self.on_progress(heading)
        section, started = Section(name=name, heading=heading), time.monotonic()
        try:
            yield section
        except R2SCPError as error:
            self.add_missing(section, heading, str(error))
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.sections.append(section)

    def add_missing(self, section: Section, what: str, why: str, make: str = "") -> None:
        """Record what `section` cannot show, there and in the report's list."""
        self._add_missing(section, MissingPart(section=section.name, what=what, why=why, make=make))

    def add_missing_of_runs(self, section: Section, name: str) -> None:
        """What the run folders do not have of a section."""
        for part in (part for run in self.runs for part in run.missing if part.section == name):
            self._add_missing(section, part)

    def require_store(self) -> FeatureStore:
        """Raises `R2SCPError` that says why there is no store."""
        if self.store is None:
            raise R2SCPError(f"{self.store_error}; name the store with --store")
        return self.store

    def _add_missing(self, section: Section, part: MissingPart) -> None:
        self.missing.append(part)
        section.add_missing(part)
