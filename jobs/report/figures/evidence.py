"""Figures of the model's internals: joint vectors (Fig. 7), retrieval precision, scores, dissonance."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from r2scp.jobs.report.facts.agreement import Agreements, Share
from r2scp.jobs.report.facts.precision import RetrievalPrecision
from r2scp.jobs.report.facts.probe import (
    MIN_VECTORS,
    NEAREST_VECTORS,
    RECOVERY_OFF,
    SEED,
    TRAINED_WITHOUT,
    WITH_RECOVERY,
    Probe,
)
from r2scp.jobs.report.figures.marks import Line, Mark, draw_lines, mark_of, percent_axis
from r2scp.jobs.report.figures.style import (
    BLUE,
    COLOURS,
    MARKERS,
    ORANGE,
    PAPER,
    STONE,
    Figure,
    Panel,
    shorten,
)
from r2scp.store.schema import MODALITY_NAMES, Condition

COLOURED_ANSWERS = 6  # the most frequent; the others are grey
BINS = 40
ABLATED = {c: f"{MODALITY_NAMES[c.missing]} missing" for c in Condition if c.missing}


def joint_vectors_figure(probe: Probe) -> Figure | None:
    """Fig. 7: t-SNE of joint vectors by answer, with and without recovery."""
    if len(probe.answers) < MIN_VECTORS or (WITH_RECOVERY, "A") not in probe.outputs:
        return None
    others = [name for name in (TRAINED_WITHOUT, RECOVERY_OFF) if (name, "A") in probe.outputs][:1]
    shown = [(name, condition) for condition in ABLATED for name in (WITH_RECOVERY, *others)]
    common = [answer for answer, _ in Counter(probe.answers).most_common(COLOURED_ANSWERS)]
    points = {key: probe.tsne(*key) for key in shown}
    answers = np.asarray(probe.answers)
    rows = probe.metrics()
    metrics = {(row[0], row[1]): row for row in rows}

    def draw(ax: Axes, model: str, condition: Condition) -> None:
        _draw_answers(ax, points[model, condition], answers, common)
        row = metrics[model, condition]
        ax.set_title(f"{ABLATED[condition].capitalize()}: {shorten(model, 44)}", fontsize=9)
        ax.set_xlabel(f"{NEAREST_VECTORS} nearest agree: {row[3]:.1f} % (chance {row[6]:.1f} %)")

    agreement = "; ".join(
        f"{title}: {metrics[WITH_RECOVERY, c][3]:.1f} % with recovery"
        + "".join(f", {metrics[name, c][3]:.1f} % {shorten(name, 44)}" for name in others)
        for c, title in ABLATED.items()
    )
    nearest = f"{NEAREST_VECTORS} nearest"
    return Figure(
        name="joint-vectors",
        title="Joint vectors by answer (Fig. 7)",
        caption=f"t-SNE (perplexity {probe.perplexity:.0f}, cosine, seed {SEED}) of the vectors that the "
        f"joint head classifies, for {len(probe.answers)} of {probe.population} validation questions; the "
        f"{len(common)} most frequent answers have a colour and a mark, all others are grey. t-SNE preserves "
        "neighbourhoods, not distances: cluster sizes, gaps and positions mean nothing, each panel is fitted "
        "separately, and a question's wording alone can form clusters. The percentages do not depend on "
        f"t-SNE: of the {nearest} vectors by cosine in the full space, the share with the same answer; "
        "chance is the same for two random questions of one type.",
        alt=f"Share of the {nearest} joint vectors with the same answer. {agreement}.",
        panels=[Panel(draw=partial(draw, model=m, condition=c), width=4.6, height=3.7) for m, c in shown],
        columns=[
            *("model", "condition", "accuracy on the sample, %", f"{nearest} with the same answer, %"),
            *("from, %", "to, %", "chance, %", "silhouette by answer (cosine)"),
        ],
        rows=rows,
        per_row=len(others) + 1,
    )


def _draw_answers(ax: Axes, points_Q2: np.ndarray, answers_Q: np.ndarray, common: Sequence[str]) -> None:
    """A scatter plot with a colour, a mark and a label for each of the `common` answers."""
    rest = ~np.isin(answers_Q, common)
    ax.scatter(*points_Q2[rest].T, s=7, color=STONE, alpha=0.5, linewidths=0)
    looks = list(zip(common, COLOURS, MARKERS, strict=False))
    for answer, colour, marker in looks:
        group = points_Q2[answers_Q == answer]
        ax.scatter(*group.T, s=13, color=colour, marker=marker, alpha=0.85, linewidths=0)
    for answer, colour, _ in looks:
        place = _densest_point(points_Q2[answers_Q == answer])
        style = {"fontsize": 8.5, "color": colour, "weight": "bold", "ha": "center", "va": "center"}
        text = ax.annotate(shorten(answer, 18), place, **style)
        text.set_path_effects([withStroke(linewidth=2.5, foreground=PAPER)])
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)


def _densest_point(points_Q2: np.ndarray) -> tuple[float, float]:
    """The point with the most others around it."""
    distance_QQ = np.square(points_Q2[:, None] - points_Q2[None]).sum(axis=-1)
    radius = np.quantile(distance_QQ, 0.1)
    x, y = points_Q2[(distance_QQ <= radius).sum(axis=1).argmax()]
    return float(x), float(y)


def agreement_figure(precision: RetrievalPrecision) -> Figure | None:
    """Share of neighbours that agree with the query, by rank, nearest and farthest, compared with chance."""
    agreements = {key: one for key, one in precision.agreements.items() if one.share().pairs}
    if not agreements:
        return None
    panels: dict[tuple[str, str], dict[str, Agreements]] = {}
    for (kind, missing, side), one in agreements.items():
        panels.setdefault((kind, missing), {})[side] = one
    best = [
        f"{kind}, {MODALITY_NAMES[missing]} missing: {100 * share.share:.1f} % of the first {precision.n}, "
        f"chance {100 * share.chance:.1f} %"
        for (kind, missing, side), one in agreements.items()
        if side == "nearest" and (share := one.share(slice(precision.n))).pairs
    ]
    return Figure(
        name="purity",
        title="Retrieval precision by rank",
        caption=f"Queries: the {precision.clips} clips of the validation questions, {precision.retrieval} "
        "retrieval. Answer agreement: a question about the query was also asked, word for word, about the "
        "neighbour in training, and has the same answer there. Label agreement: the two clips share a label. "
        "Chance: the same for clips drawn from the memory bank at random. Bars: 95 % intervals that treat "
        "clips, not pairs, as independent.",
        alt="; ".join(best) + ".",
        panels=[
            Panel(
                draw=partial(_draw_agreement, sides=sides, precision=precision, kind=kind, missing=missing),
                width=4.4,
                height=2.8,
            )
            for (kind, missing), sides in panels.items()
        ],
        columns=[
            *("agreement in", "missing", "side", "rank"),
            *("share, %", "from, %", "to, %", "chance, %", "pairs", "clips"),
        ],
        rows=[
            [kind, MODALITY_NAMES[missing], side, rank]
            + [round(100 * x, 2) for x in (share.share, *share.interval, share.chance)]
            + [share.pairs, share.clips]
            for (kind, missing, side), one in agreements.items()
            for rank, share in _ranks(one)
        ],
        per_row=2,
    )


def _draw_agreement(
    ax: Axes, sides: Mapping[str, Agreements], precision: RetrievalPrecision, kind: str, missing: str
) -> None:
    lines = [_agreement_line(one, side, at) for at, (side, one) in enumerate(sides.items())]
    lines.append(_chance_line(sides["nearest"]))
    percent_axis(ax, [y for line in lines for y in (*line.ys, *line.low, *line.high)])
    ax.axvspan(0.5, precision.n + 0.5, color=STONE, alpha=0.12, linewidth=0)
    draw_lines(ax, lines)
    ax.set_xlim(0.4, precision.depth + 0.6)
    ax.set_xticks([1, *range(5, precision.depth + 1, 5)])
    ax.set_xlabel(f"rank (shaded: the {precision.n} that the model uses)")
    ax.set_ylabel(f"same {kind}, %")
    ax.set_title(f"{MODALITY_NAMES[missing].capitalize()} missing: {kind}")


def _agreement_line(agreements: Agreements, side: str, at: int) -> Line:
    ranks = _ranks(agreements)
    return Line(
        name=side,
        xs=[rank for rank, _ in ranks],
        ys=[share.share for _, share in ranks],
        low=[share.interval[0] for _, share in ranks],
        high=[share.interval[1] for _, share in ranks],
        mark=mark_of(at, filled=side == "nearest"),
    )


def _chance_line(nearest: Agreements) -> Line:
    """Chance at each rank, for the queries that are comparable there."""
    ranks = _ranks(nearest)
    return Line(
        name="chance",
        xs=[rank for rank, _ in ranks],
        ys=[share.chance for _, share in ranks],
        mark=Mark(colour=STONE, marker="", dash=(0, (2, 2))),
    )


def _ranks(agreements: Agreements) -> list[tuple[int, Share]]:
    """The ranks at which anything can be compared."""
    return [(rank, share) for rank, share in enumerate(agreements.by_rank(), start=1) if share.pairs]


def scores_figure(precision: RetrievalPrecision) -> Figure | None:
    """Cosines of the nearest and the farthest neighbours."""
    pairs = {missing: sides for missing, sides in precision.scores.items() if all(map(len, sides))}
    if not pairs:
        return None
    medians = "; ".join(
        f"{MODALITY_NAMES[missing]} missing: nearest {np.median(near):.2f}, farthest {np.median(far):.2f}"
        for missing, (near, far) in pairs.items()
    )
    histograms = Histograms(pairs=pairs, names=("nearest", "farthest"), of_all=False)
    return Figure(
        name="scores",
        title="Scores of neighbours",
        caption=f"Cosine between a clip's key and the keys compared with it, of the {precision.depth} "
        f"nearest and farthest of {precision.clips} validation clips, {precision.retrieval} retrieval; "
        f"shares of each side's neighbours in {BINS} bins.",
        alt=f"Medians: {medians}.",
        panels=histograms.panels("missing", "cosine of the keys", "share of each side, %"),
        columns=["missing", "side", "from", "to", "hits", "share, %"],
        rows=histograms.rows(),
    )


def dissonance_figure(probe: Probe, k: int) -> Figure | None:
    """δ of eq. 3 of the recovered tokens, kept and purged."""
    pairs = {
        missing: (values[~purged], values[purged])
        for missing, (values, purged) in probe.dissonance.items()
        if len(values)
    }
    if not pairs:
        return None
    counts = []
    for missing, (kept, purged) in pairs.items():
        name, total = MODALITY_NAMES[missing], len(kept) + len(purged)
        counts.append(f"{name}: {len(purged)} of {total} tokens purged")
        if len(kept) and len(purged):
            counts[-1] += f", median δ {np.median(purged):.2f}, kept {np.median(kept):.2f}"
    histograms = Histograms(pairs=pairs, names=("kept", "purged"), of_all=True)
    return Figure(
        name="dissonance",
        title="Dissonance of recovered tokens",
        caption="δ = 1 − cos(H_miss·W_proj, g_u) of eq. 3, in [0, 2], of all tokens recovered for "
        f"{len(probe.answers)} validation questions. For each question the k = {k} tokens with the largest "
        "δ are purged, so a purged token can have a smaller δ than one kept for another question.",
        alt="; ".join(counts) + ".",
        panels=histograms.panels("recovered", "dissonance δ", "share of tokens, %"),
        columns=["recovered", "tokens", "δ from", "δ to", "number", "share, %"],
        rows=histograms.rows(),
    )


@dataclass(frozen=True, kw_only=True)
class Histograms:
    """Two distributions for each modality, over the same bins: the first filled, the second hatched."""

    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    names: tuple[str, str]
    of_all: bool  # bars are shares of both together

    @cached_property
    def edges(self) -> np.ndarray:
        sides = [side for pair in self.pairs.values() for side in pair if len(side)]
        low, high = min(float(s.min()) for s in sides), max(float(s.max()) for s in sides)
        return np.linspace(*((low, high) if high > low else (low - 0.5, high + 0.5)), BINS + 1)

    def panels(self, outcome: str, x_label: str, y_label: str) -> list[Panel]:
        """One for each modality; `outcome`: missing or recovered."""

        def draw(ax: Axes, modality: str) -> None:
            self._draw(ax, self.pairs[modality])
            ax.set_title(f"{MODALITY_NAMES[modality].capitalize()} {outcome}")
            ax.set_xlabel(x_label)
            ax.set_ylabel(y_label)

        return [Panel(draw=partial(draw, modality=modality), width=4.4) for modality in self.pairs]

    def rows(self) -> list[list[object]]:
        """A row for each bin that is not empty."""
        rows: list[list[object]] = []
        for modality, pair in self.pairs.items():
            for name, values in zip(self.names, pair, strict=True):
                counts = np.histogram(values, self.edges)[0].tolist()
                bins = zip(self.edges.tolist(), self.edges[1:].tolist(), counts, strict=False)
                for low, high, count in bins:
                    if count:
                        share = round(100 * count / len(values), 2)
                        ends = round(low, 3), round(high, 3)
                        rows.append([MODALITY_NAMES[modality], name, *ends, count, share])
        return rows

    def _draw(self, ax: Axes, pair: tuple[np.ndarray, np.ndarray]) -> None:
        total, highest, edges = sum(map(len, pair)), 0.0, self.edges
        fills = ({"alpha": 0.35, "facecolor": BLUE}, {"alpha": 0.9, "facecolor": "none", "hatch": "////"})
        outlines = ((BLUE, "-"), (ORANGE, (0, (4, 2))))
        for values, name, fill, (colour, dash) in zip(pair, self.names, fills, outlines, strict=True):
            shares = np.histogram(values, edges)[0] / max(total if self.of_all else len(values), 1)
            ax.stairs(shares, edges, fill=True, color=colour, linewidth=0, **fill)
            ax.stairs(shares, edges, color=colour, linewidth=1.5, linestyle=dash)
            highest = max(highest, float(shares.max(initial=0.0)))
            if len(values):
                peak = int(shares.argmax())
                place = ((edges[peak] + edges[peak + 1]) / 2, shares[peak])
                style = {"color": colour, "fontsize": 8, "ha": "center", "va": "bottom"}
                ax.annotate(name, place, xytext=(0, 3), textcoords="offset points", **style)
        ax.set_ylim(0, 1.18 * highest or 1)
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
