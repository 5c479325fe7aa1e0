"""Figures of evaluations: accuracy by condition, by question type, and by missing rate."""

from collections.abc import Mapping, Sequence
from functools import partial

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
from r2scp.jobs.training.evaluation_table import OURS_TITLE, TITLES
from r2scp.store.schema import MODALITY_NAMES, Condition, Modality

MAX_TYPES = 18  # rows of a figure; its table has all
MAJORITY = TITLES["majority"]
TO_PERCENT = 100


Evaluated = tuple[str, Evaluation]  # the run's name, its evaluation
RateCurve = list[tuple[float, Accuracy]]  # (share missing, accuracy), ascending


def evaluation_scope(evaluation: Evaluation) -> str:
    """The split and the number of questions, for captions."""
    split = f"{shorten(evaluation.split)} split" + (" by source" if evaluation.disjoint else "")
    guard = "" if evaluation.leak_guard else "; evaluated WITHOUT the leak guard"
    return f"{split}, n = {evaluation.n:,} questions{guard}"


def accuracy_figure(runs: Sequence[RunFacts]) -> Figure | None:
    """Accuracy of our model and the baselines under each condition, of all evaluated runs."""
    evaluated = [(run.name, run.evaluation) for run in runs if run.evaluation]
    if not evaluated:
        return None
    names = _model_names(evaluated)
    dots = {condition: _accuracy_dots(evaluated, names, condition) for condition in Condition}
    ends = [end for row in dots.values() for dot in row for end in (dot.low, dot.high)]
    limits = (max(-0.02, min(ends) - 0.05), min(1.08, max(ends) + 0.1))  # the same in all panels
    several = len(evaluated) > 1
    legend = [(run, _model_mark(OURS_TITLE, at)) for at, (run, _) in enumerate(evaluated)] if several else []

    def draw(ax: Axes, condition: Condition) -> None:
        draw_dots(ax, names, dots[condition])
        ax.set_xlim(*limits)
        ax.set_title(condition.heading)
        ax.set_xlabel("accuracy, %")
        for dot in dots[condition]:
            if names[dot.row] == MAJORITY and not several:
                ax.axvline(dot.share, color=QUIET, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        if legend:
            add_legend(ax, legend)

    height = 0.75 + ROW_HEIGHT * len(names) * (1 + 0.55 * (len(evaluated) - 1))
    height += 0.2 * several * len(evaluated)
    scopes = "; ".join(f"{shorten(run)}: {evaluation_scope(one)}" for run, one in evaluated)
    return Figure(
        name="accuracy",
        title="Accuracy by condition",
        caption="Accuracy under each condition, our model compared with the baselines. Bars are 95 % Wilson "
        f"intervals, which cover sampling of questions, not training seeds. {scopes}.",
        alt=f"Accuracy in % with sound only, picture only, both: {_accuracy_words(evaluated)}.",
        panels=[Panel(draw=partial(draw, condition=one), height=height) for one in Condition],
        columns=["run", "model", *_score_columns([*Condition]), "mean of the three, %"],
        rows=[
            [run, model.name]
            + [cell for c in Condition for cell in _accuracy_cells(model.conditions[c].overall)]
            + [round(TO_PERCENT * model.average, 2)]
            for run, evaluation in evaluated
            for model in evaluation.models
        ],
    )


def _accuracy_dots(evaluated: Sequence[Evaluated], names: Sequence[str], condition: Condition) -> list[Dot]:
    dots = []
    for at, (_, evaluation) in enumerate(evaluated):
        offset = (at - (len(evaluated) - 1) / 2) * 0.7 / len(evaluated)
        for model in evaluation.models:
            score = model.conditions[condition].overall
            dots.append(_dot(names.index(model.name), score, _model_mark(model.name, at), offset))
    return dots


def _accuracy_words(evaluated: Sequence[Evaluated]) -> str:
    """What the accuracy figure shows, for those who cannot see it."""
    words = [f"{shorten(run)} {OURS_TITLE} {_three(one.ours)}" for run, one in evaluated]
    baselines = [model for _, one in evaluated for model in one.models[1:]]
    if baselines:
        best = max(baselines, key=lambda model: model.average)
        words.append(f"the best baseline, {shorten(best.name)}, {_three(best)}")
    return "; ".join(words)


def accuracy_by_type_figure(run: RunFacts, number: int) -> Figure | None:
    """Accuracy by question type of one run: our model, the best baseline, the most frequent answer.

    `number` tells the figures of several runs apart; 0 for a single run.
    """
    evaluation = run.evaluation
    if evaluation is None:
        return None
    counts = {name: score.n for name, score in evaluation.ours.conditions["AV"].types.items()}
    names = sorted(sorted(counts, key=lambda name: -counts[name])[:MAX_TYPES])
    labels = [f"{shorten(name, 26)} ({counts[name]})" for name in names]
    compared = _models_by_type(evaluation)

    def draw(ax: Axes, condition: Condition) -> None:
        draw_dots(ax, labels, _type_dots(compared, names, condition), show_values=False)
        ax.set_title(condition.heading)
        ax.set_xlabel("accuracy, %")
        add_legend(ax, [(model.name, mark) for model, mark in compared])

    most_asked = f" The {len(names)} types with the most questions, of {len(counts)}."
    note = most_asked if len(counts) > len(names) else ""
    accuracies = [evaluation.ours.conditions["AV"].types[name].accuracy for name in names]
    baselines = " and ".join(shorten(model.name) for model, _ in compared[1:])
    height = 1.3 + 0.24 * len(names)
    return Figure(
        name="accuracy-by-type" + (f"-{number}" if number else ""),
        title="Accuracy by question type" + (f", {shorten(run.name)}" if number else ""),
        caption=f"{OURS_TITLE} of {shorten(run.name)} compared with {baselines or 'no baseline'}, by "
        "question type (number of questions in brackets). Bars are 95 % Wilson intervals; the tick is the "
        f"most frequent answer.{note} On the {evaluation_scope(evaluation)}.",
        alt=f"With both modalities {OURS_TITLE} ranges over {len(names)} question types from "
        f"{_percent(min(accuracies))} to {_percent(max(accuracies))} %.",
        panels=[Panel(draw=partial(draw, condition=one), width=3.9, height=height) for one in Condition],
        columns=["model", "type", *_score_columns([*Condition])],
        rows=[
            [model.name, name]
            + [cell for c in Condition for cell in _accuracy_cells(model.conditions[c].types.get(name))]
            for model in evaluation.models
            for name in sorted(counts)
        ],
    )


def _models_by_type(evaluation: Evaluation) -> list[tuple[ModelScores, Mark]]:
    """Our model, the best baseline and the most frequent answer, with their marks."""
    baselines = [model for model in evaluation.models[1:] if model.name != MAJORITY][:1]
    majority = [model for model in evaluation.models if model.name == MAJORITY]
    return [
        (evaluation.ours, mark_of(0)),
        *((model, mark_of(1, filled=False)) for model in baselines),
        *((model, Mark(colour=STONE, marker="|")) for model in majority),
    ]


def _type_dots(
    compared: Sequence[tuple[ModelScores, Mark]], names: Sequence[str], condition: Condition
) -> list[Dot]:
    offsets = (-0.16, 0.16, 0.0)
    return [
        _dot(row, score, mark, offset, interval=mark.marker != "|")
        for (model, mark), offset in zip(compared, offsets, strict=False)
        for row, name in enumerate(names)
        if (score := model.conditions[condition].types.get(name)) is not None
    ]


def missing_rates_figure(runs: Sequence[RunFacts]) -> Figure | None:
    """Fig. 5: accuracy by the share of questions with a modality missing; 0 % is AV, 100 % is A or V."""
    evaluated = [(run.name, run.evaluation) for run in runs if run.evaluation and run.evaluation.ours.rates]
    if not evaluated:
        return None
    curves = {
        (modality, run, model.name): _rate_curve(model, modality)
        for modality in Modality
        for run, evaluation in evaluated
        for model in evaluation.models
    }
    names = _model_names(evaluated)
    run, first = evaluated[0]

    def draw(ax: Axes, modality: Modality) -> None:
        mine = {key[1:]: curve for key, curve in curves.items() if key[0] == modality}
        _draw_rates(ax, mine, names, run)
        ax.set_title(f"{MODALITY_NAMES[modality].capitalize()} missing")
        ax.set_xlabel(f"questions without {MODALITY_NAMES[modality]}, %")

    changes = []
    for modality in Modality:
        curve = curves[modality, run, OURS_TITLE]
        start, end = (_percent(score.accuracy) for _, score in (curve[0], curve[-1]))
        changes.append(f"without {MODALITY_NAMES[modality]} from {start} to {end} %")
    return Figure(
        name="missing-rates",
        title="Missing rates (Fig. 5)",
        caption="Accuracy where each question loses the modality with a given probability, the same "
        "questions for every model; 0 % is condition AV, 100 % is V or A. Bars: 95 % Wilson intervals, drawn "
        f"for our model only; the table has all. {shorten(run)}: {evaluation_scope(first)}.",
        alt=f"As the missing rate rises from 0 to 100 %, {OURS_TITLE} of {shorten(run)} goes "
        + " and ".join(changes)
        + ".",
        panels=[Panel(draw=partial(draw, modality=one), width=4.4, height=3.0) for one in Modality],
        columns=["run", "model", "missing", "share missing, %", *_score_columns(("",))],
        rows=[
            [run, name, MODALITY_NAMES[modality], round(TO_PERCENT * share), *_accuracy_cells(score)]
            for (modality, run, name), curve in curves.items()
            for share, score in curve
        ],
    )


def _draw_rates(
    ax: Axes, curves: Mapping[tuple[str, str], RateCurve], names: Sequence[str], first_run: str
) -> None:
    """`curves` by run and model; further runs than the first are faint."""
    points = [point for curve in curves.values() for point in curve]
    percent_axis(ax, [end for _, score in points for end in (score.low, score.high)])
    lines = [
        Line(
            name=name,
            xs=[share for share, _ in curve],
            ys=[score.accuracy for _, score in curve],
            mark=_model_mark(name, names.index(name)),
            low=[score.low for _, score in curve] if name == OURS_TITLE else (),
            high=[score.high for _, score in curve] if name == OURS_TITLE else (),
            faint=run != first_run,
        )
        for (run, name), curve in curves.items()
    ]
    draw_lines(ax, lines)
    ax.set_ylabel("accuracy, %")
    ax.set_xticks(sorted({share for share, _ in points}))
    ax.xaxis.set_major_formatter(lambda value, _: f"{TO_PERCENT * value:.0f}")


def _rate_curve(model: ModelScores, modality: Modality) -> RateCurve:
    """With the conditions at the ends."""
    everywhere = model.conditions[Condition.without(modality)].overall
    curve = {0.0: model.conditions["AV"].overall, **model.rates.get(modality, {}), 1.0: everywhere}
    return sorted(curve.items())


def _model_names(evaluated: Sequence[Evaluated]) -> list[str]:
    return list(dict.fromkeys(model.name for _, evaluation in evaluated for model in evaluation.models))


def _model_mark(name: str, at: int) -> Mark:
    """Filled for our model, hollow for the baselines."""
    return mark_of(at, filled=name == OURS_TITLE)


def _dot(row: int, score: Accuracy, mark: Mark, offset: float, interval: bool = True) -> Dot:
    low, high = (score.low, score.high) if interval else (score.accuracy, score.accuracy)
    return Dot(row=row, share=score.accuracy, low=low, high=high, mark=mark, offset=offset)


def _accuracy_cells(score: Accuracy | None) -> list[object]:
    """The cells of one accuracy, see `_score_columns`."""
    if score is None:
        return [None] * 4
    shares = (score.accuracy, score.low, score.high)
    return [*(round(TO_PERCENT * share, 2) for share in shares), score.n]


def _score_columns(conditions: Sequence[str]) -> list[str]:
    parts = ("accuracy, %", "from, %", "to, %", "n")
    return [f"{condition}: {part}" if condition else part for condition in conditions for part in parts]


def _three(model: ModelScores) -> str:
    return ", ".join(_percent(model.conditions[c].overall.accuracy) for c in Condition)


def _percent(share: float) -> str:
    return f"{TO_PERCENT * share:.1f}"
