"""Figures of trainings and studies: losses and accuracies by epoch, expert loads, n and k over seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from r2scp.jobs.report.facts.run_folder import Epoch, RunFacts
from r2scp.jobs.report.figures.marks import (
    Line,
    Mark,
    draw_lines,
    integer_axis,
    mark_of,
    percent_axis,
    reference_line,
)
from r2scp.jobs.report.figures.style import Figure, Panel, shorten
from r2scp.jobs.training.evaluation_table import OURS
from r2scp.jobs.training.study.run import MEASURES
from r2scp.model.batch import SOURCES
from r2scp.model.config import Stage
from r2scp.store.schema import MODALITY_NAMES, Condition

SOURCE_NAMES: dict[str, str] = {**MODALITY_NAMES, "text": "question"}
TO_PERCENT = 100
LOSSES = ("loss", "loss/real", "loss/lacking", "loss/rank_positive", "loss/rank_negative")
LOSS_NAMES = {
    "loss/real": "nothing missing",
    "loss/lacking": "recovered",
    "loss/rank_positive": "rank⁺",
    "loss/rank_negative": "rank⁻",
}
VALIDATED = (*Condition, "mean")
NUMERIC_STUDIES = {"n": "neighbours n", "k": "tokens purged, k"}  # studies along a number, Fig. 4

Value = Callable[[Epoch], float | None]


def training_figure(runs: Sequence[RunFacts]) -> Figure | None:
    """Losses and validation accuracy by epoch of both stages, ours and the baselines."""
    if not any(curves.epochs for run in runs for curves in run.curves.values()):
        return None
    looks = {name: mark_of(at) for at, name in enumerate(_models(runs))}
    one, two = Stage.EXPERTS, Stage.MIXING
    panels = [
        _curve_panel(runs, looks, one, ("Stage I: loss", "sum over heads, nats"), _loss),
        _curve_panel(runs, looks, one, ("Stage I: validation", "accuracy (AV), %"), _mean),
        _curve_panel(
            runs, looks, two, ("Stage II: loss, nothing missing", "cross-entropy, nats"), _real_loss
        ),
        _curve_panel(runs, looks, two, ("Stage II: validation", "mean of A, V, AV, %"), _mean),
        _own_panel(
            runs, (f"{OURS}: parts of its loss", "nats"), {LOSS_NAMES[p]: _part(p) for p in LOSS_NAMES}
        ),
        _own_panel(runs, (f"{OURS}: validation", "accuracy, %"), {c: _validated(c) for c in Condition}),
    ]
    rows = [
        [run.name, name, epoch.stage, epoch.epoch, *(epoch.train.get(part) for part in LOSSES)]
        + [None if (v := epoch.validation.get(c)) is None else round(TO_PERCENT * v, 2) for c in VALIDATED]
        for run in runs
        for name, curves in run.curves.items()
        for epoch in curves.epochs
    ]
    ends = [
        f"{shorten(run.name)}: best mean {TO_PERCENT * max(_mean(e) or 0 for e in epochs):.1f} % in epoch "
        f"{max(epochs, key=lambda e: _mean(e) or 0).epoch} of {len(epochs)}"
        for run in runs
        if OURS in run.curves and (epochs := run.curves[OURS].of(two))
    ]
    return Figure(
        name="training",
        title="Training",
        caption="Means over each epoch's batches, and accuracy on the validation split after it, nothing "
        "smoothed. Rings: each model's best epoch, whose checkpoint is kept. Stage I's loss is the sum of "
        "three heads, so the baseline that sees the question alone, with one, starts lower. Validation "
        "chose the checkpoints, so it flatters all models alike."
        + (" Several runs share a colour; the first is named." if len(runs) > 1 else ""),
        alt="Stage II on validation: " + ("; ".join(ends) or "no epoch yet") + ".",
        panels=[panel for panel in panels if panel],
        columns=["run", "model", "stage", "epoch", *LOSSES, *(f"validation {c}, %" for c in VALIDATED)],
        rows=rows,
    )


def expert_loads_figure(runs: Sequence[RunFacts]) -> Figure | None:
    """Fig. 6: whom the router listens to over stage II."""
    epochs = {run.name: run.curves[OURS].of(Stage.MIXING) for run in runs if OURS in run.curves}
    rows: list[list[object]] = []
    for name, found in epochs.items():
        for epoch in found:
            weights = [epoch.train.get(f"router/{c}/{s}") for c in Condition for s in SOURCES]
            if any(weight is not None for weight in weights):
                rows.append([name, epoch.epoch, *weights])
    if not rows:
        return None
    for run in runs:
        if run.evaluation:
            told = run.evaluation.ours.conditions
            weights = [told[c].router.get(s) for c in Condition for s in SOURCES]
            rows.append([run.name, f"{run.evaluation.split} split, best checkpoint", *weights])

    def panel(condition: Condition) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            lines, most = [], 0.0
            for at, found in enumerate(epochs.values()):
                for column, source in enumerate(SOURCES):
                    word = f"router/{condition}/{source}"
                    told = [(epoch.epoch, epoch.train[word]) for epoch in found if word in epoch.train]
                    recovered = " (recovered)" if source == condition.missing else ""
                    name = SOURCE_NAMES[source] + recovered
                    mark = mark_of(column, filled=not recovered)
                    lines.append(
                        Line(
                            name=name,
                            xs=[x for x, _ in told],
                            ys=[y for _, y in told],
                            mark=mark,
                            faint=at > 0,
                        )
                    )
                    most = max([most, *(y for _, y in told)])
            ax.set_ylim(0, max(0.6, 1.15 * most))
            reference_line(ax, 1 / len(SOURCES), "even")
            draw_lines(ax, lines)
            integer_axis(ax)
            ax.set_title(condition.heading)
            ax.set_xlabel("epoch of stage II")
            ax.set_ylabel("router weight, mean")

        return draw

    first = next(name for name in epochs if epochs[name])
    last = epochs[first][-1]
    ends = [
        f"{condition}: "
        + ", ".join(
            f"{SOURCE_NAMES[s]} {last.train.get(f'router/{condition}/{s}', float('nan')):.2f}"
            for s in SOURCES
        )
        for condition in Condition
    ]
    return Figure(
        name="expert-loads",
        title="Expert loads over training (Fig. 6)",
        caption="Router weights α of eq. 11, means over each epoch's training questions, by what was "
        "missing; hollow marks: the source that was recovered. The paper draws them on its test set: the "
        "table's last lines have them there, for the best checkpoint alone."
        + (" Faint: further runs." if len(epochs) > 1 else ""),
        alt=f"Router weights at the end of {shorten(first)}. " + "; ".join(ends) + ".",
        panels=[Panel(draw=panel(condition)) for condition in Condition],
        columns=["run", "epoch", *(f"{c}: {SOURCE_NAMES[s]}" for c in Condition for s in SOURCES)],
        rows=rows,
    )


def study_figure(study: Mapping[str, Any]) -> Figure | None:
    """Fig. 4: accuracy over n or k, with each seed's own and the spread over them. Raises `MISSHAPEN`."""
    name, seeds = study["study"], study["seeds"]
    points = sorted(
        (int(variant.rpartition("=")[2]), row["accuracy"]) for variant, row in study["variants"].items()
    )
    chosen = int(str(study["against"]).rpartition("=")[2])
    rows: list[list[object]] = []
    for at, row in points:
        for measure in MEASURES:
            spread = row[measure]
            mean, deviation = (round(TO_PERCENT * float(spread[part]), 2) for part in ("mean", "sd"))
            rows.append(
                [at, measure, mean, deviation, *(round(TO_PERCENT * float(v), 2) for v in spread["values"])]
            )

    def draw(ax: Axes) -> None:
        values = [value for _, row in points for measure in MEASURES for value in row[measure]["values"]]
        percent_axis(ax, values)
        lines = []
        for order, measure in enumerate(MEASURES):
            mark = mark_of(order)
            means = [row[measure]["mean"] for _, row in points]
            sds = [row[measure]["sd"] for _, row in points]
            places = [x + 0.05 * (order - 1.5) for x in range(len(points))]
            for place, (_, row) in zip(places, points, strict=True):
                each = row[measure]["values"]
                ax.plot(
                    [place] * len(each),
                    each,
                    marker="_",
                    markersize=5,
                    color=mark.colour,
                    alpha=0.6,
                    linestyle="",
                )
            low, high = ([m + sign * sd for m, sd in zip(means, sds, strict=True)] for sign in (-1, 1))
            lines.append(Line(name=measure, xs=places, ys=means, mark=mark, low=low, high=high))
        draw_lines(ax, lines)
        ax.set_xticks(range(len(points)), [f"{at}*" if at == chosen else str(at) for at, _ in points])
        ax.set_xlabel(f"{NUMERIC_STUDIES[name]} (* as configured)")
        ax.set_ylabel("accuracy, %")
        ax.set_title(f"Over {NUMERIC_STUDIES[name]}")

    at, row = max(points, key=lambda point: point[1]["average"]["mean"])
    mean = TO_PERCENT * row["average"]["mean"]
    return Figure(
        name=f"study-{name}",
        title=f"Accuracy over {NUMERIC_STUDIES[name]} (Fig. 4)",
        caption=f"{shorten(study['split'])} split, n = {int(study['n']):,} questions; means over "
        f"{len(seeds)} seeds, bars one standard deviation of the seeds (not an interval), ticks each seed. "
        "Places on the axis are even, not to scale."
        + ("" if study["leak_guard"] else " Made WITHOUT the leak guard."),
        alt=f"The mean of the three conditions is highest, {mean:.1f} %, at {name} = {at}, of "
        f"{', '.join(str(x) for x, _ in points)}.",
        panels=[Panel(draw=draw, width=4.4, height=3.0)],
        columns=[name, "condition", "mean, %", "standard deviation", *(f"seed {seed}, %" for seed in seeds)],
        rows=rows,
    )


def _models(runs: Sequence[RunFacts]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.curves))


def _curve_panel(
    runs: Sequence[RunFacts], looks: Mapping[str, Mark], stage: Stage, titles: tuple[str, str], value: Value
) -> Panel | None:
    """One measure of all models over the epochs of a stage; accuracies in %, with the best epoch ringed."""
    validated, lines, named = value is _mean, [], set()
    for run in runs:
        for name, curves in run.curves.items():
            epochs = [epoch for epoch in curves.of(stage) if value(epoch) is not None]
            if not epochs:
                continue
            ys = [value(epoch) or 0.0 for epoch in epochs]
            best = max(range(len(ys)), key=lambda at: ys[at]) if validated else None
            xs = [epoch.epoch for epoch in epochs]
            lines.append(Line(name=name, xs=xs, ys=ys, mark=looks[name], faint=name in named, ring=best))
            named.add(name)
    if not lines:
        return None
    return _over_epochs(lines, titles, "epoch", shares=validated)


def _own_panel(
    runs: Sequence[RunFacts], titles: tuple[str, str], measures: Mapping[str, Value]
) -> Panel | None:
    """Several measures of our own model over the epochs of stage II; axes that end in % are shares."""
    lines = []
    for order, run in enumerate(runs):
        epochs = run.curves[OURS].of(Stage.MIXING) if OURS in run.curves else []
        for at, (name, value) in enumerate(measures.items()):
            told = [(epoch.epoch, y) for epoch in epochs if (y := value(epoch)) is not None]
            xs, ys = [x for x, _ in told], [y for _, y in told]
            lines.append(Line(name=name, xs=xs, ys=ys, mark=mark_of(at), faint=order > 0))
    if not any(line.ys for line in lines):
        return None
    return _over_epochs(lines, titles, "epoch of stage II", shares=titles[1].endswith("%"))


def _over_epochs(lines: Sequence[Line], titles: tuple[str, str], study_figure: str, *, shares: bool) -> Panel:
    """Lines over epochs; `titles` of the panel and of its axis of values."""
    values = [y for line in lines for y in line.ys]

    def draw(ax: Axes) -> None:
        if shares:
            percent_axis(ax, values)
        else:
            ax.set_ylim(0, 1.08 * max(values) or 1)
        draw_lines(ax, lines, points=False)
        integer_axis(ax)
        ax.set_title(titles[0])
        ax.set_xlabel(study_figure)
        ax.set_ylabel(titles[1])

    return Panel(draw=draw, width=4.4)


def _part(name: str) -> Value:
    return lambda epoch: epoch.train.get(name)


def _validated(name: str) -> Value:
    return lambda epoch: epoch.validation.get(name)


def _loss(epoch: Epoch) -> float | None:
    return epoch.train.get("loss")


def _real_loss(epoch: Epoch) -> float | None:
    return epoch.train.get("loss/real")


def _mean(epoch: Epoch) -> float | None:
    return epoch.validation.get("mean")
