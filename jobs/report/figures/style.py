"""One look for all figures: in a page, where colours follow its dark or light theme, and as files on white.

A figure is panels that stand beside each other. In a page each is an SVG of its own, so that they stand one
below another where there is little room; text in them is text. Nothing here touches pyplot.
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
from r2scp.store.atomic_file import replace_file

INK, QUIET, RULE, PAPER = "#1b1d22", "#5c6069", "#d3d6dc", "#fffffe"
#: Okabe and Ito's palette without its yellow, which white paper swallows: told apart by all kinds of eyes.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, STONE = COLOURS = (
    "#0072b2",
    "#d55e00",
    "#00875f",
    "#b0578d",
    "#3a9bd8",
    "#b87f00",
    "#7d818a",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # beside the colours, in their order
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 3)), (0, (1, 3)))
#: Colour in a figure -> the page's CSS variable, which has a value for either theme.
VARIABLES = {INK: "--ink", QUIET: "--quiet", RULE: "--rule", PAPER: "--page"} | {
    colour: f"--hue-{at}" for at, colour in enumerate(COLOURS, start=1)
}
DPI = 200  # of the PNG copies
PX_PER_INCH = 96  # CSS
MAX_GROWTH = 1.2  # a panel of a page, at most, where there is room
LABEL_LENGTH = 30  # characters of a name in a figure; the table beside it has all of it
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
    "hatch.color": ORANGE,  # what is hatched is orange, in either theme
    "hatch.linewidth": 0.8,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text is text
    "svg.hashsalt": "r2scp-pipe",  # the same figure gives the same file
    "text.color": INK,
    "text.parse_math": False,  # names come from outside; a dollar sign is one
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
    """A figure, what it says, and the numbers it is drawn from. `name`: of its files; ours, not outside's."""

    name: str
    title: str
    caption: str
    alt: str
    panels: Sequence[Panel]
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    per_row: int = 3  # panels beside each other, in files


def shorten(text: str, most: int = LABEL_LENGTH) -> str:
    """A name from outside, fit for a figure."""
    text = printable(" ".join(text.split()) or "(none)")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def figure_markup(drawing: Figure) -> Markup:
    """The panels for a page: colours are its variables, text has its font."""
    parts = []
    for at, panel in enumerate(drawing.panels):
        svg = inline_svg(_with_page_font(_svg([panel], 1)), f"{drawing.name}-{at}", VARIABLES)
        width, most = panel.width * PX_PER_INCH, panel.width * PX_PER_INCH * MAX_GROWTH
        style = f"flex: 1 1 {width:.0f}px; max-width: {most:.0f}px"
        parts.append(Markup('<div class="panel" style="{}">{}</div>').format(style, svg))
    return Markup('<div class="panels">{}</div>').format(Markup("").join(parts))


def write_images(drawing: Figure, folder: Path) -> list[Path]:
    """`NAME.png` (200 dpi) and `NAME.svg`, on white. Raises `R2SCPError` where they cannot be written."""
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
    there = set(fontManager.get_font_names())
    families = [name for name in _FALLBACKS if name in there]
    with mpl.rc_context({**_STYLE, "font.family": families or ["sans-serif"]}), warnings.catch_warnings():
        # a script that no font here has: browsers bring their own, a PNG shows boxes
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
    """Only styles change: what stands between tags is outside's and stays as it is."""
    root = ElementTree.fromstring(text)
    for element in root.iter():
        if style := element.get("style"):
            element.set("style", _FONT.sub("font-family: var(--label)", style))
    return ElementTree.tostring(root, encoding="unicode")
