"""Figures of trainings and studies: losses and accuracies by epoch, expert loads, accuracy by n and k."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from r2scp.jobs.training.evaluation_table import OURS_TITLE
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
NUMERIC_STUDIES = {"n": "neighbours n", "k": "tokens purged, k"}  # studies of a number, Fig. 4

Measure = Callable[[Epoch], float | None]


def training_figure(runs: Sequence[RunFacts]) -> Figure | None:
    """Losses and validation accuracy by epoch of both stages, our model and the baselines."""
    if not any(curves.epochs for run in runs for curves in run.curves.values()):
        return None
    several = " Several runs share a colour; the first is named." if len(runs) > 1 else ""
    return Figure(
        name="training",
        title="Training",
        caption="Means over each epoch's batches, and accuracy on the validation split after each epoch, "
        "not smoothed. Rings: each model's best epoch, whose checkpoint is kept. The loss of stage I is the "
        "sum over three heads; the baseline that sees only the question has one head and so starts lower. "
        "Checkpoints were chosen on the validation split, so its accuracy is optimistic for all models "
        f"alike.{several}",
        alt=f"Stage II on validation: {_best_epochs(runs) or 'no epoch yet'}.",
        panels=_training_panels(runs),
        columns=["run", "model", "stage", "epoch", *LOSSES, *(f"validation {c}, %" for c in VALIDATED)],
        rows=[
            [run.name, name, epoch.stage, epoch.epoch]
            + [epoch.train.get(part) for part in LOSSES]
            + [_rounded_percent(epoch.validation.get(measure)) for measure in VALIDATED]
            for run in runs
            for name, curves in run.curves.items()
            for epoch in curves.epochs
        ],
    )


def _training_panels(runs: Sequence[RunFacts]) -> list[Panel]:
    models = list(dict.fromkeys(name for run in runs for name in run.curves))
    marks = {name: mark_of(at) for at, name in enumerate(models)}
    one, two = Stage.EXPERTS, Stage.MIXING
    loss, real_loss, mean = _train("loss"), _train("loss/real"), _validation("mean")
    losses = {name: _train(part) for part, name in LOSS_NAMES.items()}
    accuracies = {condition.value: _validation(condition) for condition in Condition}
    panels = [
        _models_panel(runs, marks, one, ("Stage I: loss", "sum over heads, nats"), loss),
        _models_panel(runs, marks, one, ("Stage I: validation", "accuracy (AV), %"), mean),
        _models_panel(
            runs, marks, two, ("Stage II: loss, nothing missing", "cross-entropy, nats"), real_loss
        ),
        _models_panel(runs, marks, two, ("Stage II: validation", "mean of A, V, AV, %"), mean),
        _measures_panel(runs, (f"{OURS_TITLE}: parts of its loss", "nats"), losses),
        _measures_panel(runs, (f"{OURS_TITLE}: validation", "accuracy, %"), accuracies),
    ]
    return [panel for panel in panels if panel]


def _best_epochs(runs: Sequence[RunFacts]) -> str:
    words = []
    for run in runs:
        if epochs := _stage_two(run):
            best = max(epochs, key=lambda epoch: epoch.validation.get("mean") or 0)
            accuracy = TO_PERCENT * (best.validation.get("mean") or 0)
            words.append(
                f"{shorten(run.name)}: best mean {accuracy:.1f} % in epoch {best.epoch} of {len(epochs)}"
            )
    return "; ".join(words)


def _models_panel(
    runs: Sequence[RunFacts],
    marks: Mapping[str, Mark],
    stage: Stage,
    titles: tuple[str, str],
    measure: Measure,
) -> Panel | None:
    """One measure of all models over the epochs of a stage; the best epoch is ringed if it is an accuracy."""
    is_share = titles[1].endswith("%")
    lines: list[Line] = []
    for run in runs:
        for name, curves in run.curves.items():
            xs, ys = _curve(curves.of_stage(stage), measure)
            if ys:
                best = max(range(len(ys)), key=ys.__getitem__) if is_share else None
                faint = any(line.name == name for line in lines)
                lines.append(Line(name=name, xs=xs, ys=ys, mark=marks[name], faint=faint, highlight=best))
    return _epochs_panel(lines, titles, "epoch")


def _measures_panel(
    runs: Sequence[RunFacts], titles: tuple[str, str], measures: Mapping[str, Measure]
) -> Panel | None:
    """Several measures of our model over the epochs of stage II."""
    lines = []
    for order, run in enumerate(runs):
        for at, (name, measure) in enumerate(measures.items()):
            xs, ys = _curve(_stage_two(run), measure)
            lines.append(Line(name=name, xs=xs, ys=ys, mark=mark_of(at), faint=order > 0))
    return _epochs_panel(lines, titles, "epoch of stage II")


def _epochs_panel(lines: Sequence[Line], titles: tuple[str, str], x_label: str) -> Panel | None:
    """Lines over epochs; `titles` of the panel and of its y axis, where a final % means shares in [0, 1]."""
    values = [y for line in lines for y in line.ys]
    if not values:
        return None

    def draw(ax: Axes) -> None:
        if titles[1].endswith("%"):
            percent_axis(ax, values)
        else:
            ax.set_ylim(0, 1.08 * max(values) or 1)
        draw_lines(ax, lines, points=False)
        integer_axis(ax)
        ax.set_title(titles[0])
        ax.set_xlabel(x_label)
        ax.set_ylabel(titles[1])

    return Panel(draw=draw, width=4.4)


def expert_loads_figure(runs: Sequence[RunFacts]) -> Figure | None:
    """Fig. 6: router weights by epoch of stage II."""
    epochs = {run.name: _stage_two(run) for run in runs if OURS_TITLE in run.curves}
    weights = {
        (name, epoch.epoch): [epoch.train.get(f"router/{c}/{s}") for c in Condition for s in SOURCES]
        for name, run_epochs in epochs.items()
        for epoch in run_epochs
    }
    rows = [[*key, *row] for key, row in weights.items() if any(weight is not None for weight in row)]
    if not rows:
        return None
    first = next(name for name in epochs if epochs[name])
    return Figure(
        name="expert-loads",
        title="Expert loads over training (Fig. 6)",
        caption="Router weights α of eq. 11, means over each epoch's training questions, by missing "
        "modality; hollow marks: the recovered source. The paper shows them on its test set; the last rows "
        "of the table have them on the evaluated split, for the best checkpoint only."
        + (" Faint: further runs." if len(epochs) > 1 else ""),
        alt=f"Router weights at the end of {shorten(first)}. {_final_loads(epochs[first][-1])}.",
        panels=[Panel(draw=partial(_draw_loads, runs=[*epochs.values()], condition=c)) for c in Condition],
        columns=["run", "epoch", *(f"{c}: {SOURCE_NAMES[s]}" for c in Condition for s in SOURCES)],
        rows=rows + _evaluated_loads(runs),
    )


def _draw_loads(ax: Axes, runs: Sequence[Sequence[Epoch]], condition: Condition) -> None:
    """Router weights under one condition; `runs`: the epochs of each."""
    lines = []
    for at, epochs in enumerate(runs):
        for column, source in enumerate(SOURCES):
            recovered = source == condition.missing
            name = SOURCE_NAMES[source] + (" (recovered)" if recovered else "")
            xs, ys = _curve(epochs, _train(f"router/{condition}/{source}"))
            mark = mark_of(column, filled=not recovered)
            lines.append(Line(name=name, xs=xs, ys=ys, mark=mark, faint=at > 0))
    ax.set_ylim(0, max([0.6, *(1.15 * y for line in lines for y in line.ys)]))
    reference_line(ax, 1 / len(SOURCES), "uniform")
    draw_lines(ax, lines)
    integer_axis(ax)
    ax.set_title(condition.heading)
    ax.set_xlabel("epoch of stage II")
    ax.set_ylabel("router weight, mean")


def _evaluated_loads(runs: Sequence[RunFacts]) -> list[list[object]]:
    rows: list[list[object]] = []
    for run in runs:
        if run.evaluation:
            scores = run.evaluation.ours.conditions
            weights = [scores[c].router.get(s) for c in Condition for s in SOURCES]
            rows.append([run.name, f"{run.evaluation.split} split, best checkpoint", *weights])
    return rows


def _final_loads(epoch: Epoch) -> str:
    """The router weights of one epoch, in words."""
    return "; ".join(
        f"{c}: "
        + ", ".join(
            f"{SOURCE_NAMES[s]} {epoch.train.get(f'router/{c}/{s}', float('nan')):.2f}" for s in SOURCES
        )
        for c in Condition
    )


def study_figure(study: Mapping[str, Any]) -> Figure:
    """Fig. 4: accuracy by n or k, of each seed and with the spread over them. Raises `INVALID_JSON`."""
    name, seeds, varied = study["study"], study["seeds"], NUMERIC_STUDIES[study["study"]]
    points = sorted((_variant_value(variant), row["accuracy"]) for variant, row in study["variants"].items())
    configured = _variant_value(study["against"])
    rows: list[list[object]] = []
    for value, row in points:
        for measure in MEASURES:
            spread = row[measure]
            shares = (spread["mean"], spread["sd"], *spread["values"])
            rows.append([value, measure, *(_rounded_percent(float(share)) for share in shares)])

    def draw(ax: Axes) -> None:
        _draw_study(ax, points)
        labels = [f"{value}*" if value == configured else str(value) for value, _ in points]
        ax.set_xticks(range(len(points)), labels)
        ax.set_xlabel(f"{varied} (* as configured)")
        ax.set_title(f"By {varied}")

    best, row = max(points, key=lambda point: point[1]["average"]["mean"])
    mean = TO_PERCENT * row["average"]["mean"]
    return Figure(
        name=f"study-{name}",
        title=f"Accuracy by {varied} (Fig. 4)",
        caption=f"{shorten(study['split'])} split, n = {int(study['n']):,} questions; means over "
        f"{len(seeds)} seeds, bars: one standard deviation over seeds (not an interval), ticks: each seed. "
        "Points are spaced evenly, not to scale."
        + ("" if study["leak_guard"] else " Trained and evaluated WITHOUT the leak guard."),
        alt=f"The mean of the three conditions is highest, {mean:.1f} %, at {name} = {best}, of "
        f"{', '.join(str(value) for value, _ in points)}.",
        panels=[Panel(draw=draw, width=4.4, height=3.0)],
        columns=[name, "condition", "mean, %", "standard deviation", *(f"seed {seed}, %" for seed in seeds)],
        rows=rows,
    )


def _draw_study(ax: Axes, points: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    """`points`: (value of the setting, accuracies by measure), evenly spaced."""
    percent_axis(ax, [share for _, row in points for one in MEASURES for share in row[one]["values"]])
    lines = []
    for order, measure in enumerate(MEASURES):
        mark, spreads = mark_of(order), [row[measure] for _, row in points]
        xs = [x + 0.05 * (order - 1.5) for x in range(len(points))]
        for x, spread in zip(xs, spreads, strict=True):
            seeds = spread["values"]
            style = {"marker": "_", "markersize": 5, "color": mark.colour, "alpha": 0.6, "linestyle": ""}
            ax.plot([x] * len(seeds), seeds, **style)
        means = [spread["mean"] for spread in spreads]
        low = [spread["mean"] - spread["sd"] for spread in spreads]
        high = [spread["mean"] + spread["sd"] for spread in spreads]
        lines.append(Line(name=measure, xs=xs, ys=means, mark=mark, low=low, high=high))
    draw_lines(ax, lines)
    ax.set_ylabel("accuracy, %")


def _variant_value(variant: str) -> int:
    """3 of `n = 3`."""
    return int(str(variant).rpartition("=")[2])


def _stage_two(run: RunFacts) -> list[Epoch]:
    """Our model's epochs."""
    return run.curves[OURS_TITLE].of_stage(Stage.MIXING) if OURS_TITLE in run.curves else []


def _curve(epochs: Sequence[Epoch], measure: Measure) -> tuple[list[int], list[float]]:
    """Epochs that have the measure, and its values."""
    points = [(epoch.epoch, value) for epoch in epochs if (value := measure(epoch)) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _train(name: str) -> Measure:
    return lambda epoch: epoch.train.get(name)


def _validation(name: str) -> Measure:
    return lambda epoch: epoch.validation.get(name)


def _rounded_percent(share: float | None) -> float | None:
    return None if share is None else round(TO_PERCENT * share, 2)
