"""Figures of evaluations: accuracy by condition, by type, and where a modality is missing at times."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from r2scp.jobs.report.facts.run_folder import Evaluation, Judged, Model, RunFacts
from r2scp.jobs.report.figures.marks import (
    ROW_HEIGHT,
    Dot,
    Line,
    Mark,
    draw_dots,
    draw_lines,
    key,
    mark_of,
    percent,
)
from r2scp.jobs.report.figures.style import QUIET, STONE, Drawing, Panel, short
from r2scp.jobs.training.evaluation_table import OURS, TITLES
from r2scp.pipelines.batches.dataset import MISSING_COLUMN

CONDITION_TITLES = {
    "A": "A: sound only",
    "V": "V: picture only",
    "AV": "AV: both there",
}
LOST = {"audio": ("sound", "V"), "visual": ("picture", "A")}  # its name, and the condition without any of it
MOST_TYPES = 18  # rows of a figure; the table beside it has all
MAJORITY = TITLES["majority"]
TO_PERCENT = 100


def shared_of(evaluation: Evaluation) -> str:
    """What an evaluation asked, for captions."""
    split = f"{short(evaluation.split)} split" + (" by source" if evaluation.disjoint else "")
    guard = "" if evaluation.leak_guard else "; made WITHOUT the leak guard"
    return f"{split}, n = {evaluation.n:,} questions{guard}"


def accuracy(runs: Sequence[RunFacts]) -> Drawing | None:
    """Accuracy of ours and the baselines under each condition, of all runs that were evaluated."""
    judged = [(run.name, run.evaluation) for run in runs if run.evaluation]
    if not judged:
        return None
    names = list(dict.fromkeys(model.name for _, one in judged for model in one.models))
    rows, dots = [], {condition: [] for condition in MISSING_COLUMN}
    for at, (run, evaluation) in enumerate(judged):
        lift = (at - (len(judged) - 1) / 2) * 0.7 / len(judged)
        for model in evaluation.models:
            mark = _weight(model.name, at)
            cells: list[object] = [run, model.name]
            for condition in MISSING_COLUMN:
                score = model.conditions[condition].overall
                dots[condition].append(_dot(names.index(model.name), score, mark, lift))
                cells += [*_cells(score)]
            rows.append([*cells, round(TO_PERCENT * model.average, 2)])
    ends = [end for found in dots.values() for dot in found for end in (dot.low, dot.high)]
    span = (max(-0.02, min(ends) - 0.05), min(1.08, max(ends) + 0.1))  # of all three, to compare
    several = len(judged) > 1
    height = 0.75 + ROW_HEIGHT * len(names) * (1 + 0.55 * (len(judged) - 1)) + 0.2 * several * len(judged)

    def panel(condition: str) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            draw_dots(ax, names, dots[condition])
            ax.set_xlim(*span)
            ax.set_title(CONDITION_TITLES[condition])
            ax.set_xlabel("accuracy, %")
            for dot in dots[condition]:
                if names[dot.row] == MAJORITY and not several:
                    ax.axvline(dot.share, color=QUIET, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            if several:
                key(ax, [(run, _weight(OURS, at)) for at, (run, _) in enumerate(judged)])

        return draw

    shared = "; ".join(f"{short(run)}: {shared_of(one)}" for run, one in judged)
    best = max(
        (model for _, one in judged for model in one.models[1:]), key=lambda m: m.average, default=None
    )
    beside = f"; the best baseline, {short(best.name)}, {_three(best)}" if best else ""
    return Drawing(
        name="accuracy",
        title="Accuracy by condition",
        caption="Accuracy under each condition, ours beside what it must beat. Bars are 95 % Wilson "
        f"intervals, which hold for questions drawn by themselves, not for seeds. {shared}.",
        alt="Accuracy in % with sound alone, picture alone, both: "
        + "; ".join(f"{short(run)} {OURS} {_three(one.ours)}" for run, one in judged)
        + beside
        + ".",
        panels=[Panel(draw=panel(condition), height=height) for condition in MISSING_COLUMN],
        columns=["run", "model", *_score_columns([*MISSING_COLUMN]), "mean of the three, %"],
        rows=rows,
    )


def accuracy_by_type(run: RunFacts, number: int) -> Drawing | None:
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
    most = sorted(counts, key=lambda name: -counts[name])[:MOST_TYPES]
    names = sorted(most)
    lifts = (-0.16, 0.16, 0.0)
    labels = [f"{short(name, 26)} ({counts[name]})" for name in names]

    def panel(condition: str) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            dots = []
            for (model, mark), lift in zip(shown, lifts, strict=False):
                for row, name in enumerate(names):
                    if (score := model.conditions[condition].types.get(name)) is not None:
                        bare = mark.marker == "|"
                        dots.append(_dot(row, score, mark, lift, bare=bare))
            draw_dots(ax, labels, dots, told=False)
            ax.set_title(CONDITION_TITLES[condition])
            ax.set_xlabel("accuracy, %")
            key(ax, [(model.name, mark) for model, mark in shown])

        return draw

    rows = []
    for model in evaluation.models:
        for name in sorted(counts):
            cells: list[object] = [model.name, name]
            for condition in MISSING_COLUMN:
                score = model.conditions[condition].types.get(name)
                cells += [None, None, None, None] if score is None else [*_cells(score)]
            rows.append(cells)
    left = (
        f" The {len(names)} types with the most questions of {len(counts)}."
        if len(counts) > len(names)
        else ""
    )
    spread = [evaluation.ours.conditions["AV"].types[name] for name in names]
    low, high = min(spread, key=lambda s: s.accuracy), max(spread, key=lambda s: s.accuracy)
    beside = ", ".join(short(model.name) for model, _ in shown[1:])
    return Drawing(
        name="accuracy-by-type" + (f"-{number}" if number else ""),
        title="Accuracy by question type" + (f", {short(run.name)}" if number else ""),
        caption=f"{OURS} of {short(run.name)} beside {beside or 'nothing'}, by question type (in brackets "
        f"how many questions). Bars are 95 % Wilson intervals; the tick is the majority's.{left} "
        f"{shared_of(evaluation)}.",
        alt=f"With both modalities {OURS} ranges over {len(names)} question types from "
        f"{_percent(low.accuracy)} to {_percent(high.accuracy)} %.",
        panels=[
            Panel(draw=panel(condition), width=3.9, height=1.3 + 0.24 * len(names))
            for condition in MISSING_COLUMN
        ],
        columns=["model", "type", *_score_columns([*MISSING_COLUMN])],
        rows=rows,
    )


def missing_rates(runs: Sequence[RunFacts]) -> Drawing | None:
    """Fig. 5: accuracy over the share of questions that lack a modality; 0 and 100 % are AV and A or V."""
    judged = [(run.name, run.evaluation) for run in runs if run.evaluation and run.evaluation.ours.rates]
    if not judged:
        return None
    names = list(dict.fromkeys(model.name for _, one in judged for model in one.models))
    curves = {
        (modality, run, model.name): _over_rates(model, modality)
        for modality in LOST
        for run, one in judged
        for model in one.models
    }

    def panel(modality: str) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            mine = {at: curve for at, curve in curves.items() if at[0] == modality}
            percent(
                ax, [end for curve in mine.values() for _, score in curve for end in (score.low, score.high)]
            )
            lines = [
                Line(
                    name=name,
                    xs=[share for share, _ in curve],
                    ys=[score.accuracy for _, score in curve],
                    mark=_weight(name, names.index(name)),
                    low=[score.low for _, score in curve] if name == OURS else (),
                    high=[score.high for _, score in curve] if name == OURS else (),
                    faint=run != judged[0][0],
                )
                for (_, run, name), curve in mine.items()
            ]
            draw_lines(ax, lines)
            ax.set_title(f"{LOST[modality][0].capitalize()} missing")
            ax.set_xlabel(f"questions without {LOST[modality][0]}, %")
            ax.set_ylabel("accuracy, %")
            ax.set_xticks(sorted({share for curve in mine.values() for share, _ in curve}))
            ax.xaxis.set_major_formatter(lambda value, _: f"{TO_PERCENT * value:.0f}")

        return draw

    rows = [
        [run, name, LOST[modality][0], round(TO_PERCENT * share), *_cells(score)]
        for (modality, run, name), curve in curves.items()
        for share, score in curve
    ]
    run, first = judged[0]
    ends = []
    for modality, (word, _) in LOST.items():
        curve = curves[modality, run, OURS]
        ends.append(
            f"without {word} from {_percent(curve[0][1].accuracy)} to {_percent(curve[-1][1].accuracy)} %"
        )
    return Drawing(
        name="missing-rates",
        title="Missing rates (Fig. 5)",
        caption="Accuracy where each question loses the modality with a probability, the same questions "
        "for every model; 0 % is condition AV, 100 % V or A. Bars: 95 % Wilson intervals, of ours alone, "
        f"so that they can be told apart; the table has all. {short(run)}: {shared_of(first)}.",
        alt=f"From no question to every question lacking it, {OURS} of {short(run)} goes "
        + " and ".join(ends)
        + ".",
        panels=[Panel(draw=panel(modality), width=4.4, height=3.0) for modality in LOST],
        columns=["run", "model", "missing", "share missing, %", *_score_columns(("",))],
        rows=rows,
    )


def _over_rates(model: Model, modality: str) -> list[tuple[float, Judged]]:
    """(share missing, accuracy), ascending, with the conditions at the ends."""
    everywhere = model.conditions[LOST[modality][1]].overall
    curve = {0.0: model.conditions["AV"].overall, **model.rates.get(modality, {}), 1.0: everywhere}
    return sorted(curve.items())


def _weight(name: str, at: int) -> Mark:
    """Ours filled, what it must beat hollow, in one size; the majority as a tick of its own."""
    return mark_of(at, filled=name == OURS)


def _dot(row: int, score: Judged, mark: Mark, lift: float, bare: bool = False) -> Dot:
    low, high = (score.accuracy, score.accuracy) if bare else (score.low, score.high)
    return Dot(row=row, share=score.accuracy, low=low, high=high, mark=mark, lift=lift)


def _cells(score: Judged) -> tuple[object, ...]:
    ends = (score.accuracy, score.low, score.high)
    return (*(round(TO_PERCENT * end, 2) for end in ends), score.n)


def _score_columns(conditions: Sequence[str]) -> list[str]:
    parts = ("accuracy, %", "from, %", "to, %", "n")
    return [f"{condition}: {part}" if condition else part for condition in conditions for part in parts]


def _three(model: Model) -> str:
    return ", ".join(f"{_percent(model.conditions[c].overall.accuracy)}" for c in MISSING_COLUMN)


def _percent(share: float) -> str:
    return f"{TO_PERCENT * share:.1f}"
