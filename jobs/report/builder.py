"""A report on its way: what is wanted, what was found, and the parts that are done.

A part is a section of blocks, plain values that `templates/report.html` draws.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from r2scp.jobs.report.facts.probe import Probe
from r2scp.jobs.report.facts.run_folder import Gap, RunFacts
from r2scp.jobs.report.figures.style import Drawing, page_markup
from r2scp.store.errors import R2SCPError
from r2scp.store.feature_store import FeatureStore

GALLERY = 12  # questions
MOST_ROWS = 1_500  # of a table; a figure's file has all

Block = dict[str, object]
Told = Callable[[str], None]


@dataclass(kw_only=True)
class Section:
    """A part of the page. `name`: its id, ours."""

    name: str
    heading: str
    blocks: list[Block] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.blocks.append({"kind": "text", "text": text})

    def head(self, text: str) -> None:
        """A heading below the section's own."""
        self.blocks.append({"kind": "heading", "text": text})

    def note(self, text: str, kind: str = "note") -> None:
        """`kind`: note, warning or fault."""
        self.blocks.append({"kind": "notice", "text": text, "notice": kind})

    def gap(self, gap: Gap) -> None:
        """What is not here, why, and how to make it."""
        made = ". To make it:" if gap.make else "."
        self.blocks.append({"kind": "gap", "text": f"{gap.what}: {gap.why}{made}", "command": gap.make})

    def command(self, line: str) -> None:
        """A line to copy."""
        self.blocks.append({"kind": "command", "command": line})

    def define(self, pairs: Sequence[tuple[str, object]]) -> None:
        self.blocks.append({"kind": "definitions", "pairs": list(pairs)})

    def table(
        self, caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
    ) -> None:
        """A cell: a value, or {"text", "value", "minor"}, see `templates/parts.html`."""
        self.blocks.append({"kind": "table", **_table(caption, columns, rows, note)})

    def figure(self, drawing: Drawing | None) -> bool:
        """A figure with its numbers; whether there was one."""
        if drawing is None:
            return False
        image = page_markup(drawing)  # first: what cannot be drawn must not stand in the lists
        self.drawings.append(drawing)
        self.blocks.append(
            {
                "kind": "figure",
                "title": drawing.title,
                "image": image,
                "caption": drawing.caption,
                "alt": drawing.alt,
                "table": _table(f"Numbers of “{drawing.title}”", drawing.columns, drawing.rows, ""),
            }
        )
        return True


def _table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str
) -> dict[str, object]:
    if len(rows) > MOST_ROWS:
        note = f"{note} The first {MOST_ROWS:,} of {len(rows):,} rows.".strip()
    heads = [
        {"text": name, "numeric": at > 0 and _numeric([row[at] for row in rows])}
        for at, name in enumerate(columns)
    ]
    return {
        "caption": caption,
        "columns": heads,
        "rows": [list(row) for row in rows[:MOST_ROWS]],
        "note": note,
    }


def _numeric(cells: Sequence[object]) -> bool:
    """Whether a column holds numbers and nothing else but gaps."""
    values = [cell.get("value") if isinstance(cell, dict) else cell for cell in cells]
    there = [value for value in values if value is not None]
    return bool(there) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in there)


def share_cell(share: float) -> dict[str, object]:
    """A share, told in % and sorted by its value."""
    return {"text": f"{100 * share:.1f}", "value": share}


@dataclass(frozen=True, kw_only=True)
class ReportWanted:
    """What to report on. `store` None: the one that the first run was trained on. `studies`: where `study`
    keeps its results. `asked`: the words of the command, for the page."""

    runs: tuple[Path, ...]
    store: str | None = None
    fingerprint: str | None = None
    storage_options: Mapping[str, str] | None = None
    studies: Path | None = None
    out: Path | None = None
    figures: Path | None = None
    gallery: int = GALLERY
    device: str = "cpu"
    weights: str | None = None  # of the encoder that filled the store; by themselves the ones that fit
    asked: tuple[str, ...] = ("report",)


@dataclass(kw_only=True)
class Making:
    """A report on its way."""

    wanted: ReportWanted
    told: Told
    runs: list[RunFacts]
    store: FeatureStore | None = None
    no_store: str = ""  # why there is none
    sections: list[Section] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)  # by run

    @contextmanager
    def part(self, name: str, heading: str) -> Iterator[Section]:
        """A section on its way: what our errors say becomes a gap in it."""
        self.told(heading)
        section, started = Section(name=name, heading=heading), time.monotonic()
        try:
            yield section
        except R2SCPError as error:
            self.lack(section, Gap(section=name, what=heading, why=str(error)))
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.sections.append(section)

    def lack(self, section: Section, gap: Gap) -> None:
        self.gaps.append(gap)
        section.gap(gap)

    def of_runs(self, section: Section, name: str) -> None:
        """What the runs' own folders lack of a section."""
        for gap in (gap for run in self.runs for gap in run.gaps if gap.section == name):
            self.lack(section, gap)

    def opened(self) -> FeatureStore:
        """Raises `R2SCPError` that says why there is no store."""
        if self.store is None:
            raise R2SCPError(f"{self.no_store}; name the store with --store")
        return self.store
