"""What figures share: axes in %, intervals, and labels at the ends of lines instead of legends."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from r2scp.jobs.report.figures.style import COLOURS, DASHES, INK, MARKERS, PAPER, QUIET, shorten

LINE_GAP = 0.15  # inches between labels
ROW_HEIGHT = 0.27  # inches, of a row of a dot plot


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The look of one series, the same in every figure."""

    colour: str
    marker: str
    dash: object = "-"
    filled: bool = True

    @property
    def face(self) -> str:
        return self.colour if self.filled else PAPER


def mark_of(at: int, filled: bool = True) -> Mark:
    """The look of the `at`-th series: each has its own colour, marker and dash."""
    at %= len(COLOURS)
    return Mark(colour=COLOURS[at], marker=MARKERS[at], dash=DASHES[at], filled=filled)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a plot. `low`, `high`: ends of intervals, if any."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    mark: Mark
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    faint: bool = False  # a further line of the same name; not labelled
    highlight: int | None = None  # the point to ring


def draw_lines(ax: Axes, lines: Sequence[Line], points: bool = True) -> None:
    """Lines with their intervals, each labelled at its right end."""
    for line in lines:
        mark = line.mark
        if not len(line.xs):
            continue
        style = {"color": mark.colour, "linestyle": mark.dash, "alpha": 0.45 if line.faint else 1.0}
        ax.plot(
            line.xs,
            line.ys,
            marker=mark.marker if points else "",
            markerfacecolor=mark.face,
            markeredgecolor=mark.colour,
            markersize=4.5,
            linewidth=1.1 if line.faint else 1.7,
            **style,
        )
        if line.low:
            below = [y - low for y, low in zip(line.ys, line.low, strict=True)]
            above = [high - y for y, high in zip(line.ys, line.high, strict=True)]
            ax.errorbar(
                line.xs, line.ys, yerr=[below, above], fmt="none", ecolor=mark.colour, elinewidth=1, capsize=2
            )
        if line.highlight is not None:
            ax.plot(
                line.xs[line.highlight],
                line.ys[line.highlight],
                marker="o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=mark.colour,
                linestyle="",
            )
    label_line_ends(ax, [line for line in lines if len(line.xs) and not line.faint])


def label_line_ends(ax: Axes, lines: Sequence[Line]) -> None:
    """Labels right of the axes, as close to the ends of their lines as possible without overlapping."""
    if not lines:
        return
    low, high = ax.get_ylim()
    gap = LINE_GAP / max(ax.get_window_extent().height / ax.figure.dpi, 0.8)
    placed: list[tuple[float, Line]] = []
    for line in sorted(lines, key=lambda line: line.ys[-1]):
        at = (line.ys[-1] - low) / ((high - low) or 1)
        placed.append((max(at, placed[-1][0] + gap) if placed else at, line))
    over = placed[-1][0] - 1.0
    if over > 0:  # shift down as far as there is room
        placed = [(max(at - over, 0.0 + gap * order), line) for order, (at, line) in enumerate(placed)]
    for at, line in placed:
        ax.annotate(
            shorten(line.name),
            xy=(1.0, (line.ys[-1] - low) / ((high - low) or 1)),
            xytext=(1.03, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=line.mark.colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def integer_axis(ax: Axes) -> None:
    """Integers on the x axis: epochs, ranks."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def percent_axis(ax: Axes, values: Sequence[float], floor: float | None = None) -> None:
    """A y axis of shares in [0, 1], shown in %, around `values`, and never so narrow that it exaggerates."""
    low = min(values) if floor is None else floor
    high = max(values)
    room = max(0.12, 0.12 * (high - low)) / 2
    ax.set_ylim(max(-0.01, low - room), min(1.01, high + room))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(_whole_percent)


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A share with its interval, in one row of a dot plot."""

    row: int
    share: float
    low: float
    high: float
    mark: Mark
    offset: float = 0.0  # in rows, where several dots share a row


def draw_dots(ax: Axes, names: Sequence[str], dots: Sequence[Dot], show_values: bool = True) -> None:
    """A dot plot, first row at the top. `show_values`: print the share in % beside each dot."""
    for dot in dots:
        y = dot.row + dot.offset
        ax.plot([dot.low, dot.high], [y, y], color=dot.mark.colour, linewidth=1.3)
        ax.plot(
            dot.share,
            y,
            marker=dot.mark.marker,
            markersize=5.5,
            color=dot.mark.colour,
            markerfacecolor=dot.mark.face,
        )
        if show_values:
            ax.annotate(
                f"{100 * dot.share:.1f}",
                xy=(dot.high, y),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=7.5,
                color=INK,
                va="center",
                annotation_clip=False,
            )
    ax.set_yticks(range(len(names)), [shorten(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ends = [end for dot in dots for end in (dot.low, dot.high)]
    if ends:
        ax.set_xlim(max(-0.02, min(ends) - 0.05), min(1.06, max(ends) + 0.1))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(_whole_percent)


def add_legend(ax: Axes, entries: Sequence[tuple[str, Mark]], columns: int = 1) -> None:
    """A legend below the axes, where labels at the marks would not fit."""
    for name, mark in entries:
        ax.plot(
            [],
            [],
            marker=mark.marker,
            color=mark.colour,
            markerfacecolor=mark.face,
            linestyle="",
            label=shorten(name, 44),
        )
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=columns, borderaxespad=0, handletextpad=0.4)


def reference_line(ax: Axes, level: float, name: str) -> None:
    """A dashed horizontal line to compare with, such as chance."""
    ax.axhline(level, color=QUIET, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    ax.annotate(
        shorten(name, 40),
        xy=(0.99, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, -2),
        textcoords="offset points",
        fontsize=7.5,
        color=QUIET,
        ha="right",
        va="top",
    )


def _whole_percent(share: float, _: object) -> str:
    return f"{100 * share:.0f}"
