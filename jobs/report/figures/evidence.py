"""Figures of what lies behind answers: joint vectors (Fig. 7), retrieval purity, scores, dissonance."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from r2scp.jobs.report.facts.agreement import Agreements
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

NAMED = 6  # answers with a colour and a name; the others are grey
BINS = 40
ABLATED = {c: f"{MODALITY_NAMES[c.missing]} missing" for c in Condition if c.missing}


def joint_vectors_figure(probe: Probe) -> Figure | None:
    """Fig. 7: t-SNE of joint vectors by answer, with and without recovery."""
    if len(probe.answers) < MIN_VECTORS or (WITH_RECOVERY, "A") not in probe.outputs:
        return None
    others = [name for name in (TRAINED_WITHOUT, RECOVERY_OFF) if (name, "A") in probe.outputs][:1]
    shown = [(name, condition) for condition in ABLATED for name in (WITH_RECOVERY, *others)]
    common = [answer for answer, _ in Counter(probe.answers).most_common(NAMED)]
    places = {at: probe.tsne(*at) for at in shown}
    answers = np.asarray(probe.answers)
    rows = probe.metrics()
    told = {(row[0], row[1]): row for row in rows}

    def panel(at: tuple[str, str]) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            place = places[at]
            rest = ~np.isin(answers, common)
            ax.scatter(*place[rest].T, s=7, color=STONE, alpha=0.5, linewidths=0)
            for order, answer in enumerate(common):
                mine = place[answers == answer]
                ax.scatter(
                    *mine.T, s=13, color=COLOURS[order], marker=MARKERS[order], alpha=0.85, linewidths=0
                )
            for order, answer in enumerate(common):
                x, y = _thickest(place[answers == answer])
                text = ax.annotate(
                    shorten(answer, 18),
                    (x, y),
                    fontsize=8.5,
                    color=COLOURS[order],
                    weight="bold",
                    ha="center",
                    va="center",
                )
                text.set_path_effects([withStroke(linewidth=2.5, foreground=PAPER)])
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(visible=False)
            ax.set_title(f"{ABLATED[at[1]].capitalize()}: {shorten(at[0], 44)}", fontsize=9)
            ax.set_xlabel(
                f"{NEAREST_VECTORS} nearest agree: {told[at][3]:.1f} % (chance {told[at][6]:.1f} %)"
            )

        return draw

    ours = {condition: told[WITH_RECOVERY, condition] for condition in ABLATED}
    beside = "; ".join(
        f"{ABLATED[c]}: {ours[c][3]:.1f} % with recovery"
        + "".join(f", {told[name, c][3]:.1f} % {shorten(name, 44)}" for name in others)
        for c in ABLATED
    )
    return Figure(
        name="joint-vectors",
        title="Joint vectors by answer (Fig. 7)",
        caption=f"t-SNE (perplexity {probe.perplexity:.0f}, cosine, seed {SEED}) of what the joint head "
        f"answers from, for {len(probe.answers)} of {probe.of} validation questions; the {len(common)} "
        "most frequent answers have a colour and a mark, all others are grey. t-SNE keeps neighbours, not "
        "distances: sizes of clusters, gaps between them and places on the page mean nothing, each panel "
        "is a fit of its own, and a question's wording alone can make clusters. The numbers do not depend "
        f"on it: of the {NEAREST_VECTORS} nearest vectors in the full space by cosine, the share with the same "
        "answer; chance is two questions of one type.",
        alt=f"Share of the {NEAREST_VECTORS} nearest joint vectors with the same answer. {beside}.",
        panels=[Panel(draw=panel(at), width=4.6, height=3.7) for at in shown],
        columns=[
            *(
                "model",
                "condition",
                "accuracy on the sample, %",
                f"{NEAREST_VECTORS} nearest with the same answer, %",
                "from, %",
            ),
            *("to, %", "chance, %", "silhouette by answer (cosine)"),
        ],
        rows=rows,
        per_row=len(others) + 1,
    )


def _thickest(place_Q2: np.ndarray) -> tuple[float, float]:
    """The point that has most of its own kind around it."""
    apart_QQ = np.square(place_Q2[:, None] - place_Q2[None]).sum(axis=-1)
    reach = np.quantile(apart_QQ, 0.1)
    x, y = place_Q2[(apart_QQ <= reach).sum(axis=1).argmax()]
    return float(x), float(y)


def agreement_figure(purity: RetrievalPrecision) -> Figure | None:
    """Share of neighbours that agree, by rank, nearest and farthest, beside chance."""
    told = {at: one for at, one in purity.agreements.items() if one.share().pairs}
    if not told:
        return None
    places = list(dict.fromkeys((kind, missing) for kind, missing, _ in told))
    rows: list[list[object]] = []
    for (kind, missing, side), one in told.items():
        for rank, share in enumerate(one.by_rank(), start=1):
            if share.pairs:
                ends = (share.share, *share.interval, share.chance)
                rows.append(
                    [
                        kind,
                        MODALITY_NAMES[missing],
                        side,
                        rank,
                        *(round(100 * x, 2) for x in ends),
                        share.pairs,
                        share.clips,
                    ]
                )

    def panel(kind: str, missing: str) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            mine = {side: one for (k, m, side), one in told.items() if (k, m) == (kind, missing)}
            lines = [_ranked(one, side, at) for at, (side, one) in enumerate(mine.items())]
            lines.append(_chance(mine))
            percent_axis(ax, [y for line in lines for y in (*line.ys, *line.low, *line.high)])
            ax.axvspan(0.5, purity.n + 0.5, color=STONE, alpha=0.12, linewidth=0)
            draw_lines(ax, lines)
            ax.set_xlim(0.4, purity.depth + 0.6)
            ax.set_xticks([1, *range(5, purity.depth + 1, 5)])
            ax.set_xlabel(f"rank (shaded: the {purity.n} that stand in)")
            ax.set_ylabel(f"agree in {kind}, %")
            ax.set_title(f"{MODALITY_NAMES[missing].capitalize()} missing: {kind}")

        return draw

    best = [
        f"{kind}, {MODALITY_NAMES[missing]} missing: {100 * share.share:.1f} % of the first {purity.n}, chance "
        f"{100 * share.chance:.1f} %"
        for (kind, missing, side), one in told.items()
        if side == "nearest" and (share := one.share(slice(purity.n))).pairs
    ]
    return Figure(
        name="purity",
        title="Retrieval purity by rank",
        caption=f"Queries: the {purity.clips} clips of the validation questions, {purity.retrieval} "
        "retrieval. Agreement in answer: a question of the query, asked word for word of the neighbour in "
        "training, has the same answer there; in label: the clips share one. Chance: the same of clips "
        "drawn from the bank at random. Bars are 95 % intervals that take clips, not pairs, to be "
        "independent.",
        alt="; ".join(best) + ".",
        panels=[Panel(draw=panel(*place), width=4.4, height=2.8) for place in places],
        columns=[
            "agree in",
            "missing",
            "side",
            "rank",
            "share, %",
            "from, %",
            "to, %",
            "chance, %",
            "pairs",
            "clips",
        ],
        rows=rows,
        per_row=2,
    )


def _ranked(one: Agreements, name: str, at: int) -> Line:
    shares = [(rank, share) for rank, share in enumerate(one.by_rank(), start=1) if share.pairs]
    return Line(
        name=name,
        xs=[rank for rank, _ in shares],
        ys=[share.share for _, share in shares],
        low=[share.interval[0] for _, share in shares],
        high=[share.interval[1] for _, share in shares],
        mark=mark_of(at, filled=name == "nearest"),
    )


def _chance(sides: Mapping[str, Agreements]) -> Line:
    """Chance at each rank, for the queries that can be told there."""
    shares = [
        (rank, share.chance) for rank, share in enumerate(sides["nearest"].by_rank(), start=1) if share.pairs
    ]
    return Line(
        name="chance",
        xs=[x for x, _ in shares],
        ys=[y for _, y in shares],
        mark=Mark(colour=STONE, marker="", dash=(0, (2, 2))),
    )


def scores_figure(purity: RetrievalPrecision) -> Figure | None:
    """Cosines of the nearest and the farthest that were kept."""
    found = {missing: sides for missing, sides in purity.scores.items() if all(len(s) for s in sides)}
    if not found:
        return None
    edges = np.linspace(*_span([side for sides in found.values() for side in sides]), BINS + 1)

    def panel(missing: str) -> Callable[[Axes], None]:
        return lambda ax: _two(
            ax,
            found[missing],
            edges,
            ("nearest", "farthest"),
            f"{MODALITY_NAMES[missing].capitalize()} missing",
            "cosine of the keys",
        )

    rows = _counted(edges, _by_side(found, ("nearest", "farthest")))
    medians = "; ".join(
        f"{MODALITY_NAMES[m]} missing: nearest {np.median(a):.2f}, farthest {np.median(b):.2f}"
        for m, (a, b) in found.items()
    )
    return Figure(
        name="scores",
        title="Scores of neighbours",
        caption=f"Cosine between a clip's key and the keys compared with it, of the {purity.depth} nearest "
        f"and farthest of {purity.clips} validation clips, {purity.retrieval} retrieval; shares of each "
        f"side's hits in {BINS} bins.",
        alt=f"Medians: {medians}.",
        panels=[Panel(draw=panel(missing), width=4.4) for missing in found],
        columns=["missing", "side", "from", "to", "hits", "share, %"],
        rows=rows,
    )


def _by_side(
    found: Mapping[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, str]
) -> list[tuple[str, str, np.ndarray]]:
    """What is missing, which side, its values."""
    return [
        (MODALITY_NAMES[missing], name, side)
        for missing, sides in found.items()
        for name, side in zip(names, sides, strict=True)
    ]


def dissonance_figure(probe: Probe, k: int) -> Figure | None:
    """δ of eq. 3 of recovered tokens, with those that were purged."""
    found = {
        m: (values[~purged], values[purged])
        for m, (values, purged) in probe.dissonance.items()
        if len(values)
    }
    if not found:
        return None
    edges = np.linspace(*_span([side for sides in found.values() for side in sides if len(side)]), BINS + 1)

    def panel(missing: str) -> Callable[[Axes], None]:
        return lambda ax: _two(
            ax,
            found[missing],
            edges,
            ("kept", "purged"),
            f"{MODALITY_NAMES[missing].capitalize()} recovered",
            "dissonance δ",
            whole=True,
        )

    rows = _counted(edges, _by_side(found, ("kept", "purged")))
    said = "; ".join(
        f"{MODALITY_NAMES[m]}: {len(b)} of {len(a) + len(b)} tokens purged"
        + (
            f", median δ {np.median(b):.2f} against {np.median(a):.2f} of the kept"
            if len(a) and len(b)
            else ""
        )
        for m, (a, b) in found.items()
    )
    return Figure(
        name="dissonance",
        title="Dissonance of recovered tokens",
        caption="δ = 1 − cos(H_miss·W_proj, g_u) of eq. 3, in [0, 2], of all tokens recovered for "
        f"{len(probe.answers)} validation questions. Of each question the {k} with the largest δ are "
        "purged: a token can be purged with a smaller δ than one that another question keeps.",
        alt=said + ".",
        panels=[Panel(draw=panel(missing), width=4.4) for missing in found],
        columns=["recovered", "tokens", "δ from", "δ to", "number", "share, %"],
        rows=rows,
    )


def _span(sides: Sequence[np.ndarray]) -> tuple[float, float]:
    low, high = min(float(s.min()) for s in sides), max(float(s.max()) for s in sides)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _two(
    ax: Axes,
    sides: Sequence[np.ndarray],
    edges: np.ndarray,
    names: tuple[str, str],
    title: str,
    axis: str,
    whole: bool = False,
) -> None:
    """Two distributions: the first filled, the second hatched. `whole`: both are shares of all."""
    total = sum(len(side) for side in sides)
    looks = ((BLUE, None, 0.35), (ORANGE, "////", 0.0))
    most = 0.0
    for side, name, (colour, hatch, alpha) in zip(sides, names, looks, strict=True):
        weight = np.histogram(side, edges)[0] / max(total if whole else len(side), 1)
        ax.stairs(
            weight,
            edges,
            fill=True,
            color=colour,
            alpha=alpha or 0.9,
            hatch=hatch,
            facecolor="none" if hatch else colour,
            linewidth=0,
        )
        ax.stairs(weight, edges, color=colour, linewidth=1.5, linestyle="-" if hatch is None else (0, (4, 2)))
        most = max(most, float(weight.max(initial=0.0)))
        if len(side):
            peak = int(weight.argmax())
            ax.annotate(
                name,
                ((edges[peak] + edges[peak + 1]) / 2, weight[peak]),
                xytext=(0, 3),
                textcoords="offset points",
                color=colour,
                fontsize=8,
                ha="center",
                va="bottom",
            )
    ax.set_ylim(0, 1.18 * most or 1)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    ax.set_ylabel("share of tokens, %" if whole else "share of each side's hits, %")
    ax.set_xlabel(axis)
    ax.set_title(title)


def _counted(edges: np.ndarray, sides: Sequence[tuple[str, str, np.ndarray]]) -> list[list[object]]:
    """A row for each bin that holds anything."""
    rows: list[list[object]] = []
    for what, name, values in sides:
        counts = np.histogram(values, edges)[0]
        for at, count in enumerate(counts.tolist()):
            if count:
                share = round(100 * count / len(values), 2)
                rows.append(
                    [what, name, round(float(edges[at]), 3), round(float(edges[at + 1]), 3), count, share]
                )
    return rows
