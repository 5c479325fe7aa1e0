"""The style of all figures: in a page, where colours follow its light or dark theme, and as files on white.

A figure is a row of panels. In a page each panel is an SVG of its own, so that panels wrap on narrow screens;
text in them stays text. pyplot is not used.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as MplFigure
from matplotlib.font_manager import fontManager

from r2scp.jobs.console import printable
from r2scp.jobs.html.render import inline_svg
from r2scp.jobs.training.config import NO_RECOVERY_DROPOUT
from r2scp.jobs.training.evaluation_table import TITLES
from r2scp.store.atomic_file import replace_file

INK, QUIET, RULE, PAPER = "#1b1d22", "#5c6069", "#d3d6dc", "#fffffe"
#: Okabe and Ito's colour-blind safe palette, without its yellow, which is too faint on white.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, STONE = COLOURS = (
    "#0072b2",
    "#d55e00",
    "#00875f",
    "#b0578d",
    "#3a9bd8",
    "#b87f00",
    "#7d818a",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # in the order of the colours
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 3)), (0, (1, 3)))
#: Colour in a figure -> CSS variable of the page, which has a value for each theme.
VARIABLES = {INK: "--ink", QUIET: "--quiet", RULE: "--rule", PAPER: "--page"} | {
    colour: f"--hue-{at}" for at, colour in enumerate(COLOURS, start=1)
}
DPI = 200  # of the PNG copies
PX_PER_INCH = 96  # CSS
MAX_GROWTH = 1.2  # of a panel where the page has room
#: Titles of baselines that are too long for figures; tables have the full ones.
SHORT_TITLES = {
    TITLES["majority"]: "most frequent answer",
    TITLES[NO_RECOVERY_DROPOUT]: "no recovery, modality dropout",
}
LABEL_LENGTH = 30  # characters of a name in a figure; the table has the whole name
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": RULE,
    "hatch.color": ORANGE,  # in both themes
    "hatch.linewidth": 0.8,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text is text
    "svg.hashsalt": "r2scp-pipe",  # makes files reproducible
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is not a formula
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}
_FALLBACKS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Hebrew")
_FONT = re.compile(r"font-family: [^;]*")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes, of `width` by `height` inches."""

    draw: Callable[[Axes], None]
    width: float = 3.4
    height: float = 2.6


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure with its texts and numbers. `name`: of its files and ids; never text from outside."""

    name: str
    title: str
    caption: str
    alt: str
    panels: Sequence[Panel]
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    per_row: int = 3  # panels side by side in files


def shorten(text: str, most: int = LABEL_LENGTH) -> str:
    """A name from outside, made printable and short enough for a figure."""
    text = printable(" ".join(SHORT_TITLES.get(text, text).split()) or "(none)")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def figure_markup(drawing: Figure) -> Markup:
    """The panels for a page, with its colour variables and its font."""
    parts = []
    for at, panel in enumerate(drawing.panels):
        svg = inline_svg(_with_page_font(_svg([panel], 1)), f"{drawing.name}-{at}", VARIABLES)
        width, most = panel.width * PX_PER_INCH, panel.width * PX_PER_INCH * MAX_GROWTH
        style = f"flex: 1 1 {width:.0f}px; max-width: {most:.0f}px"
        parts.append(Markup('<div class="panel" style="{}">{}</div>').format(style, svg))
    return Markup('<div class="panels">{}</div>').format(Markup("").join(parts))


def write_images(drawing: Figure, folder: Path) -> list[Path]:
    """Write `NAME.png` (200 dpi) and `NAME.svg`, on white. Raises `R2SCPError` if that fails."""
    png, svg = folder / f"{drawing.name}.png", folder / f"{drawing.name}.svg"
    out = io.BytesIO()
    with _styled():
        figure = _figure(drawing.panels, drawing.per_row, "white")
        FigureCanvasAgg(figure)
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": "", "Title": drawing.title})
    replace_file(png, out.getvalue())
    replace_file(svg, _svg(drawing.panels, drawing.per_row, "white").encode())
    return [png, svg]


@contextmanager
def _styled() -> Iterator[None]:
    installed = set(fontManager.get_font_names())
    families = [name for name in _FALLBACKS if name in installed]
    with mpl.rc_context({**_STYLE, "font.family": families or ["sans-serif"]}), warnings.catch_warnings():
        # no font here has the script: browsers bring their own, a PNG shows boxes
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


def _figure(panels: Sequence[Panel], per_row: int, paper: str) -> MplFigure:
    columns = min(per_row, len(panels))
    rows = -(-len(panels) // columns)
    lines = [panels[at * columns : (at + 1) * columns] for at in range(rows)]
    widths = [max(line[at].width for line in lines if at < len(line)) for at in range(columns)]
    heights = [max(panel.height for panel in line) for line in lines]
    figure = MplFigure(figsize=(sum(widths), sum(heights)), layout="constrained", facecolor=paper)
    grid = figure.add_gridspec(rows, columns, width_ratios=widths, height_ratios=heights)
    for at, panel in enumerate(panels):
        panel.draw(figure.add_subplot(grid[at // columns, at % columns]))
    return figure


def _svg(panels: Sequence[Panel], per_row: int, paper: str = "none") -> str:
    out = io.StringIO()
    with _styled():
        figure = _figure(panels, per_row, paper)
        FigureCanvasSVG(figure)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]


def _with_page_font(text: str) -> str:
    """Only style attributes change; text between tags stays as it is."""
    root = ElementTree.fromstring(text)
    for element in root.iter():
        if style := element.get("style"):
            element.set("style", _FONT.sub("font-family: var(--label)", style))
    return ElementTree.tostring(root, encoding="unicode")
