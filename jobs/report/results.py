"""The sections on results: accuracy, missing rates, training, studies."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from r2scp.jobs.report.builder import ReportBuilder, Section, interval_cell, share_cell
from r2scp.jobs.report.facts.run_folder import INVALID_JSON, Accuracy, RunFacts, command
from r2scp.jobs.report.figures.evaluation import (
    accuracy_by_type_figure,
    accuracy_figure,
    missing_rates_figure,
)
from r2scp.jobs.report.figures.training import (
    NUMERIC_STUDIES,
    expert_loads_figure,
    study_figure,
    training_figure,
)
from r2scp.store.schema import Condition


def add_accuracy(builder: ReportBuilder) -> None:
    with builder.section("accuracy", "Accuracy") as section:
        builder.add_missing_of_runs(section, "run")
        builder.add_missing_of_runs(section, "accuracy")
        for run in builder.runs:
            _add_notices(section, run)
        section.add_figure(accuracy_figure(builder.runs))
        _add_accuracy_table(section, builder.runs)
        evaluated = [run for run in builder.runs if run.evaluation]
        for number, run in enumerate(evaluated, start=1):
            section.add_figure(accuracy_by_type_figure(run, number if len(evaluated) > 1 else 0))
            _add_types_table(section, run)
    with builder.section("missing-rates", "Missing rates") as section:
        builder.add_missing_of_runs(section, "missing-rates")
        section.add_figure(missing_rates_figure(builder.runs))
        if not section.blocks:
            section.add_text("No run has been evaluated yet; see Accuracy.")


def _add_notices(section: Section, run: RunFacts) -> None:
    """What limits the figures of an evaluation."""
    evaluation = run.evaluation
    if evaluation is None:
        return
    warnings: list[tuple[object, str]] = [
        (
            run.checkpoint is not None and evaluation.sha256 != run.checkpoint.sha256,
            f"{evaluation.file} was made with another checkpoint than the current best one; evaluate again.",
        ),
        (
            evaluation.unfinished,
            f"training had not finished when it was evaluated: {', '.join(evaluation.unfinished)}.",
        ),
        (evaluation.latest, "evaluated on the latest store version, not on the one trained on."),
        (
            evaluation.split != "test",
            f"these are questions of the {evaluation.split} split, not of the test split.",
        ),
    ]
    for applies, text in warnings:
        if applies:
            section.add_notice(f"{run.name}: {text}", "warning")
    if not evaluation.leak_guard:
        text = "evaluated WITHOUT the leak guard: a clip may have been retrieved for itself."
        section.add_notice(f"{run.name}: {text}", "fault")
    notes = [f"{count:,} left out: {why}" for why, count in evaluation.left_out.items() if count]
    if count := evaluation.answers_unknown:
        notes.append(f"{count:,} have an answer that does not occur in training, which counts as wrong")
    if notes:
        section.add_notice(f"{run.name}: questions: {'; '.join(notes)}.")
    if run.other_files:
        section.add_text(f"{run.name}: shown is {evaluation.file}; also there: {', '.join(run.other_files)}.")


def _add_accuracy_table(section: Section, runs: Sequence[RunFacts]) -> None:
    several = len(runs) > 1
    rows = [
        [*([run.name] if several else []), model.name]
        + [_cell(model.conditions[condition].overall) for condition in Condition]
        + [share_cell(model.average)]
        for run in runs
        if run.evaluation
        for model in run.evaluation.models
    ]
    heads = [condition.heading for condition in Condition]
    if rows:
        note = (
            "In brackets: 95 % intervals, which cover sampling of questions. Mean: of the three conditions."
        )
        section.add_table("Accuracy, %", [*(["run"] if several else []), "model", *heads, "mean"], rows, note)


def _add_types_table(section: Section, run: RunFacts) -> None:
    assert run.evaluation is not None
    scores = run.evaluation.ours.conditions
    types = scores["AV"].types
    rows: list[list[object]] = []
    for group, total in scores["AV"].groups.items():
        members = [name for name in types if name.split("/", 1)[0] == group]
        if members != [group]:
            rows.append(
                [f"{group or '(none)'}, all", total.n, *(_cell(scores[c].groups[group]) for c in Condition)]
            )
        rows += [
            [name or "(none)", types[name].n, *(_cell(scores[c].types[name]) for c in Condition)]
            for name in members
        ]
    section.add_table(f"Accuracy by question type, %, {run.name}", ["type", "n", *Condition], rows)


def add_training(builder: ReportBuilder) -> None:
    with builder.section("training", "Training") as section:
        builder.add_missing_of_runs(section, "training")
        section.add_figure(training_figure(builder.runs))
        if not section.add_figure(expert_loads_figure(builder.runs)):
            builder.add_missing(section, "Expert loads", "no epoch of stage II has logged router weights")


def add_studies(builder: ReportBuilder) -> None:
    with builder.section("studies", "Studies") as section:
        folder = builder.request.studies
        paths = sorted(folder.glob("*.json")) if folder else []
        for name in NUMERIC_STUDIES:
            if name not in {path.stem for path in paths}:
                _add_missing_study(builder, section, name)
        for path in paths:
            try:
                _add_study(section, json.loads(path.read_bytes()))
            except (OSError, *INVALID_JSON) as error:
                why = f"not a file written by study: {type(error).__name__}: {error}"
                builder.add_missing(section, path.name, why)


def _add_missing_study(builder: ReportBuilder, section: Section, name: str) -> None:
    store = str(builder.store.uri) if builder.store else None
    folder = builder.request.studies
    why = f"no results of this study in {folder}" if folder else "no --studies FOLDER was given"
    words = ["study", name, "--seeds", "3", *(["--folder", str(folder)] if folder else [])]
    what = f"Accuracy by {NUMERIC_STUDIES[name]} (Fig. 4)"
    builder.add_missing(section, what, why, command(*words, store=store))


def _add_study(section: Section, study: Mapping[str, Any]) -> None:
    """Raises one of `INVALID_JSON`, before anything is added to the section."""
    [first, *_] = study["variants"].values()  # ValueError where there is none
    columns = list(first["accuracy"])
    rows = []
    for variant, row in study["variants"].items():
        cells: list[object] = [variant]
        for measure in columns:
            mean, deviation = (float(row["accuracy"][measure][part]) for part in ("mean", "sd"))
            if not 0 <= mean <= 1:  # NaN included
                raise ValueError(f"an accuracy must be in [0, 1]; got {mean}")
            difference = 100 * float(row["difference"][measure]["mean"])
            minor = f"± {100 * deviation:.1f}"
            if variant != study["against"]:
                minor += f", {difference:+.1f}"
            cells.append({"text": f"{100 * mean:.1f}", "value": mean, "minor": minor})
        rows.append(cells)
    figure = study_figure(study) if study["study"] in NUMERIC_STUDIES else None
    seeds = ", ".join(str(int(seed)) for seed in study["seeds"])
    note = (
        f"{study['asks']} {study['split']} split, n = {int(study['n']):,}; mean ± standard deviation over "
        f"seeds {seeds}, then the difference in points from “{study['against']}”, paired by seed."
    )
    section.add_figure(figure)
    section.add_table(f"{study['title']}: accuracy, %", ["variant", *columns], rows, note)
    if not study["leak_guard"]:
        section.add_notice("Trained and evaluated WITHOUT the leak guard.", "fault")


def _cell(score: Accuracy) -> dict[str, object]:
    return interval_cell(score.accuracy, score.low, score.high)
