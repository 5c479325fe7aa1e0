"""What a report is made of: sections of blocks, as plain values that `templates/report.html` draws."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from r2scp.jobs.figure_style import Drawing, page_markup
from r2scp.jobs.report_runs import Gap

MOST_ROWS = 1_500  # of a table; a figure's file has all

Block = dict[str, object]


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
