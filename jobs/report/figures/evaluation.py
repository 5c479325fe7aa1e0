"""Figures of evaluations: accuracy by condition, by type, and where a modality is missing at times."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from r2scp.jobs.report.facts.run_folder import Accuracy, Evaluation, ModelScores, RunFacts
from r2scp.jobs.report.figures.marks import (
    ROW_HEIGHT,
    Dot,
    Line,
    Mark,
    add_legend,
    draw_dots,
    draw_lines,
    mark_of,
    percent_axis,
)
from r2scp.jobs.report.figures.style import QUIET, STONE, Figure, Panel, shorten
from r2scp.jobs.training.evaluation_table import OURS, TITLES
from r2scp.store.schema import MODALITY_NAMES, Condition, Modality

MAX_TYPES = 18  # rows of a figure; the table beside it has all
MAJORITY = TITLES["majority"]
TO_PERCENT = 100


def evaluation_scope(evaluation: Evaluation) -> str:
    """What an evaluation asked, for captions."""
    split = f"{shorten(evaluation.split)} split" + (" by source" if evaluation.disjoint else "")
    guard = "" if evaluation.leak_guard else "; made WITHOUT the leak guard"
    return f"{split}, n = {evaluation.n:,} questions{guard}"


def accuracy_figure(runs: Sequence[RunFacts]) -> Figure | None:
    """Accuracy of ours and the baselines under each condition, of all runs that were evaluated."""
    judged = [(run.name, run.evaluation) for run in runs if run.evaluation]
    if not judged:
        return None
    names = list(dict.fromkeys(model.name for _, one in judged for model in one.models))
    rows, dots = [], {condition: [] for condition in Condition}
    for at, (run, evaluation) in enumerate(judged):
        lift = (at - (len(judged) - 1) / 2) * 0.7 / len(judged)
        for model in evaluation.models:
            mark = _model_mark(model.name, at)
            cells: list[object] = [run, model.name]
            for condition in Condition:
                score = model.conditions[condition].overall
                dots[condition].append(_dot(names.index(model.name), score, mark, lift))
                cells += [*_accuracy_cells(score)]
            rows.append([*cells, round(TO_PERCENT * model.average, 2)])
    ends = [end for found in dots.values() for dot in found for end in (dot.low, dot.high)]
    span = (max(-0.02, min(ends) - 0.05), min(1.08, max(ends) + 0.1))  # of all three, to compare
    several = len(judged) > 1
    height = 0.75 + ROW_HEIGHT * len(names) * (1 + 0.55 * (len(judged) - 1)) + 0.2 * several * len(judged)

    def panel(condition: Condition) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            draw_dots(ax, names, dots[condition])
            ax.set_xlim(*span)
            ax.set_title(condition.heading)
            ax.set_xlabel("accuracy, %")
            for dot in dots[condition]:
                if names[dot.row] == MAJORITY and not several:
                    ax.axvline(dot.share, color=QUIET, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            if several:
                add_legend(ax, [(run, _model_mark(OURS, at)) for at, (run, _) in enumerate(judged)])

        return draw

    shared = "; ".join(f"{shorten(run)}: {evaluation_scope(one)}" for run, one in judged)
    best = max(
        (model for _, one in judged for model in one.models[1:]), key=lambda m: m.average, default=None
    )
    beside = f"; the best baseline, {shorten(best.name)}, {_three(best)}" if best else ""
    return Figure(
        name="accuracy",
        title="Accuracy by condition",
        caption="Accuracy under each condition, ours beside what it must beat. Bars are 95 % Wilson "
        f"intervals, which hold for questions drawn by themselves, not for seeds. {shared}.",
        alt="Accuracy in % with sound alone, picture alone, both: "
        + "; ".join(f"{shorten(run)} {OURS} {_three(one.ours)}" for run, one in judged)
        + beside
        + ".",
        panels=[Panel(draw=panel(condition), height=height) for condition in Condition],
        columns=["run", "model", *_score_columns([*Condition]), "mean of the three, %"],
        rows=rows,
    )


def accuracy_by_type_figure(run: RunFacts, number: int) -> Figure | None:
    """Accuracy by question type of one run, ours beside the best baseline and the majority."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    rivals = [model for model in evaluation.models[1:] if model.name != MAJORITY][:1]
    majority = [model for model in evaluation.models if model.name == MAJORITY]
    shown = [(evaluation.ours, mark_of(0))]
    shown += [(model, mark_of(1, filled=False)) for model in rivals]
    shown += [(model, Mark(colour=STONE, marker="|")) for model in majority]
    counts = {name: score.n for name, score in evaluation.ours.conditions["AV"].types.items()}
    most = sorted(counts, key=lambda name: -counts[name])[:MAX_TYPES]
    names = sorted(most)
    lifts = (-0.16, 0.16, 0.0)
    labels = [f"{shorten(name, 26)} ({counts[name]})" for name in names]

    def panel(condition: Condition) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            dots = []
            for (model, mark), lift in zip(shown, lifts, strict=False):
                for row, name in enumerate(names):
                    if (score := model.conditions[condition].types.get(name)) is not None:
                        bare = mark.marker == "|"
                        dots.append(_dot(row, score, mark, lift, bare=bare))
            draw_dots(ax, labels, dots, told=False)
            ax.set_title(condition.heading)
            ax.set_xlabel("accuracy, %")
            add_legend(ax, [(model.name, mark) for model, mark in shown])

        return draw

    rows = []
    for model in evaluation.models:
        for name in sorted(counts):
            cells: list[object] = [model.name, name]
            for condition in Condition:
                score = model.conditions[condition].types.get(name)
                cells += [None, None, None, None] if score is None else [*_accuracy_cells(score)]
            rows.append(cells)
    left = (
        f" The {len(names)} types with the most questions of {len(counts)}."
        if len(counts) > len(names)
        else ""
    )
    spread = [evaluation.ours.conditions["AV"].types[name] for name in names]
    low, high = min(spread, key=lambda s: s.accuracy), max(spread, add_legend=lambda s: s.accuracy)
    beside = ", ".join(shorten(model.name) for model, _ in shown[1:])
    return Figure(
        name="accuracy-by-type" + (f"-{number}" if number else ""),
        title="Accuracy by question type" + (f", {shorten(run.name)}" if number else ""),
        caption=f"{OURS} of {shorten(run.name)} beside {beside or 'nothing'}, by question type (in brackets "
        f"how many questions). Bars are 95 % Wilson intervals; the tick is the majority's.{left} "
        f"{evaluation_scope(evaluation)}.",
        alt=f"With both modalities {OURS} ranges over {len(names)} question types from "
        f"{_percent(low.accuracy)} to {_percent(high.accuracy)} %.",
        panels=[
            Panel(draw=panel(condition), width=3.9, height=1.3 + 0.24 * len(names)) for condition in Condition
        ],
        columns=["model", "type", *_score_columns([*Condition])],
        rows=rows,
    )


def missing_rates_figure(runs: Sequence[RunFacts]) -> Figure | None:
    """Fig. 5: accuracy over the share of questions that lack a modality; 0 and 100 % are AV and A or V."""
    judged = [(run.name, run.evaluation) for run in runs if run.evaluation and run.evaluation.ours.rates]
    if not judged:
        return None
    names = list(dict.fromkeys(model.name for _, one in judged for model in one.models))
    curves = {
        (modality, run, model.name): _rate_curve(model, modality)
        for modality in Modality
        for run, one in judged
        for model in one.models
    }

    def panel(modality: Modality) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            mine = {at: curve for at, curve in curves.items() if at[0] == modality}
            percent_axis(
                ax, [end for curve in mine.values() for _, score in curve for end in (score.low, score.high)]
            )
            lines = [
                Line(
                    name=name,
                    xs=[share for share, _ in curve],
                    ys=[score.accuracy for _, score in curve],
                    mark=_model_mark(name, names.index(name)),
                    low=[score.low for _, score in curve] if name == OURS else (),
                    high=[score.high for _, score in curve] if name == OURS else (),
                    faint=run != judged[0][0],
                )
                for (_, run, name), curve in mine.items()
            ]
            draw_lines(ax, lines)
            ax.set_title(f"{MODALITY_NAMES[modality].capitalize()} missing")
            ax.set_xlabel(f"questions without {MODALITY_NAMES[modality]}, %")
            ax.set_ylabel("accuracy, %")
            ax.set_xticks(sorted({share for curve in mine.values() for share, _ in curve}))
            ax.xaxis.set_major_formatter(lambda value, _: f"{TO_PERCENT * value:.0f}")

        return draw

    rows = [
        [run, name, MODALITY_NAMES[modality], round(TO_PERCENT * share), *_accuracy_cells(score)]
        for (modality, run, name), curve in curves.items()
        for share, score in curve
    ]
    run, first = judged[0]
    ends = []
    for modality in Modality:
        curve = curves[modality, run, OURS]
        start, end = (_percent(score.accuracy) for _, score in (curve[0], curve[-1]))
        ends.append(f"without {MODALITY_NAMES[modality]} from {start} to {end} %")
    return Figure(
        name="missing-rates",
        title="Missing rates (Fig. 5)",
        caption="Accuracy where each question loses the modality with a probability, the same questions "
        "for every model; 0 % is condition AV, 100 % V or A. Bars: 95 % Wilson intervals, of ours alone, "
        f"so that they can be told apart; the table has all. {shorten(run)}: {evaluation_scope(first)}.",
        alt=f"From no question to every question lacking it, {OURS} of {shorten(run)} goes "
        + " and ".join(ends)
        + ".",
        panels=[Panel(draw=panel(modality), width=4.4, height=3.0) for modality in Modality],
        columns=["run", "model", "missing", "share missing, %", *_score_columns(("",))],
        rows=rows,
    )


def _rate_curve(model: ModelScores, modality: Modality) -> list[tuple[float, Accuracy]]:
    """(share missing, accuracy), ascending, with the conditions at the ends."""
    everywhere = model.conditions[Condition.without(modality)].overall
    curve = {0.0: model.conditions["AV"].overall, **model.rates.get(modality, {}), 1.0: everywhere}
    return sorted(curve.items())


def _model_mark(name: str, at: int) -> Mark:
    """Ours filled, what it must beat hollow, in one size; the majority as a tick of its own."""
    return mark_of(at, filled=name == OURS)


def _dot(row: int, score: Accuracy, mark: Mark, lift: float, bare: bool = False) -> Dot:
    low, high = (score.accuracy, score.accuracy) if bare else (score.low, score.high)
    return Dot(row=row, share=score.accuracy, low=low, high=high, mark=mark, offset=lift)


def _accuracy_cells(score: Accuracy) -> tuple[object, ...]:
    ends = (score.accuracy, score.low, score.high)
    return (*(round(TO_PERCENT * end, 2) for end in ends), score.n)


def _score_columns(conditions: Sequence[str]) -> list[str]:
    parts = ("accuracy, %", "from, %", "to, %", "n")
    return [f"{condition}: {part}" if condition else part for condition in conditions for part in parts]


def _three(model: ModelScores) -> str:
    return ", ".join(f"{_percent(model.conditions[c].overall.accuracy)}" for c in Condition)


def _percent(share: float) -> str:
    return f"{TO_PERCENT * share:.1f}"
