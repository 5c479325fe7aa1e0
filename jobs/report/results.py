"""The sections of a report on results: accuracy, missing rates, training, studies."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from r2scp.jobs.report.builder import Making, Section, share_cell
from r2scp.jobs.report.facts.run_folder import MISSHAPEN, Gap, Judged, RunFacts, command
from r2scp.jobs.report.figures import evaluation as report_figures
from r2scp.jobs.report.figures import training as report_curves
from r2scp.pipelines.batches.dataset import MISSING_COLUMN


def accuracy(made: Making) -> None:
    with made.part("accuracy", "Accuracy") as section:
        made.of_runs(section, "run")
        made.of_runs(section, "accuracy")
        for run in made.runs:
            _warn(section, run)
        section.figure(report_figures.accuracy(made.runs))
        _accuracy_table(section, made.runs)
        judged = [run for run in made.runs if run.evaluation]
        for number, run in enumerate(judged, start=1):
            section.figure(report_figures.accuracy_by_type(run, number if len(judged) > 1 else 0))
            _types_table(section, run)
    with made.part("missing-rates", "Missing rates") as section:
        made.of_runs(section, "missing-rates")
        section.figure(report_figures.missing_rates(made.runs))
        if not section.blocks:
            section.say("There is no evaluation yet; see above.")


def _warn(section: Section, run: RunFacts) -> None:
    """What a careful reader of an evaluation should know."""
    evaluation = run.evaluation
    if evaluation is None:
        return
    if run.checkpoint is not None and evaluation.sha256 != run.checkpoint.sha256:
        section.note(
            f"{run.name}: {evaluation.file} is of another checkpoint than the best one now; evaluate again.",
            "warning",
        )
    if evaluation.unfinished:
        section.note(
            f"{run.name}: not trained to the end when it was evaluated: {', '.join(evaluation.unfinished)}.",
            "warning",
        )
    if not evaluation.leak_guard:
        section.note(
            f"{run.name}: made WITHOUT the leak guard: a clip may have served as its own neighbour.", "fault"
        )
    if evaluation.latest:
        section.note(
            f"{run.name}: evaluated on the store as it was then, not as the training read it.", "warning"
        )
    if evaluation.split != "test":
        section.note(
            f"{run.name}: these are questions of the split {evaluation.split}, not of the test split.",
            "warning",
        )
    if evaluation.left_out or evaluation.answers_unknown:
        left = "; ".join(f"{count:,} left out: {why}" for why, count in evaluation.left_out.items() if count)
        unknown = (
            f"{evaluation.answers_unknown:,} have an answer that training never saw, which counts as wrong"
        )
        section.note(
            f"{run.name}: "
            + "; ".join(part for part in (left, unknown if evaluation.answers_unknown else "") if part)
            + "."
        )
    if run.other_files:
        section.say(f"{run.name} shows {evaluation.file}; also there: {', '.join(run.other_files)}.")


def _accuracy_table(section: Section, runs: Sequence[RunFacts]) -> None:
    several = len(runs) > 1
    rows = [
        [*([run.name] if several else []), model.name]
        + [_cell(model.conditions[condition].overall) for condition in MISSING_COLUMN]
        + [share_cell(model.average)]
        for run in runs
        if run.evaluation
        for model in run.evaluation.models
    ]
    heads = [report_figures.CONDITION_TITLES[condition] for condition in MISSING_COLUMN]
    if rows:
        note = (
            "In brackets the 95 % interval of each accuracy, for the questions as drawn; mean: of the three."
        )
        section.table("Accuracy, %", [*(["run"] if several else []), "model", *heads, "mean"], rows, note)


def _types_table(section: Section, run: RunFacts) -> None:
    assert run.evaluation is not None
    told = run.evaluation.ours.conditions
    rows: list[list[object]] = []
    for group, score in told["AV"].groups.items():
        kinds = [kind for kind in told["AV"].types if kind.split("/", 1)[0] == group]
        if kinds != [group]:
            rows.append(
                [f"{group or '(none)'}, all", score.n, *(_cell(told[c].groups[group]) for c in MISSING_COLUMN)]
            )
        rows += [
            [kind or "(none)", told["AV"].types[kind].n, *(_cell(told[c].types[kind]) for c in MISSING_COLUMN)]
            for kind in kinds
        ]
    section.table(f"Accuracy by question type, %, {run.name}", ["type", "n", *MISSING_COLUMN], rows)


def training(made: Making) -> None:
    with made.part("training", "Training") as section:
        made.of_runs(section, "training")
        section.figure(report_curves.training(made.runs))
        if not section.figure(report_curves.expert_loads(made.runs)):
            made.lack(
                section,
                Gap(section="training", what="Expert loads", why="no epoch of stage II tells router weights"),
            )


def studies(made: Making) -> None:
    with made.part("studies", "Studies") as section:
        store = str(made.store.uri) if made.store else None
        folder = made.wanted.studies
        found = sorted(folder.glob("*.json")) if folder else []
        names = {path.stem for path in found}
        for name, what in report_curves.VARIED.items():
            if name not in names:
                why = f"no results of that study in {folder}" if folder else "no --studies FOLDER was given"
                made.lack(
                    section,
                    Gap(
                        section="studies",
                        what=f"Accuracy over {what} (Fig. 4)",
                        why=why,
                        make=command(
                            "study",
                            name,
                            "--seeds",
                            "3",
                            *(["--folder", str(folder)] if folder else []),
                            store=store,
                        ),
                    ),
                )
        for path in found:
            try:
                _study(section, json.loads(path.read_bytes()))
            except (OSError, *MISSHAPEN) as error:
                why = f"it is not what a study writes: {type(error).__name__}: {error}"
                made.lack(section, Gap(section="studies", what=path.name, why=why))


def _study(section: Section, study: Mapping[str, Any]) -> None:
    """Raises one of `MISSHAPEN`, before anything of it stands in the section."""
    [first, *_] = study["variants"].values()  # ValueError where there is none
    columns = list(first["accuracy"])
    rows = []
    for variant, row in study["variants"].items():
        cells: list[object] = [variant]
        for measure in columns:
            mean, deviation = (float(row["accuracy"][measure][part]) for part in ("mean", "sd"))
            if not 0 <= mean <= 1:  # also where it is no number
                raise ValueError(f"an accuracy must be in [0, 1]; got {mean}")
            apart = 100 * float(row["difference"][measure]["mean"])
            minor = f"± {100 * deviation:.1f}" + ("" if variant == study["against"] else f", {apart:+.1f}")
            cells.append({"text": f"{100 * mean:.1f}", "value": mean, "minor": minor})
        rows.append(cells)
    drawing = report_curves.along(study) if study["study"] in report_curves.VARIED else None
    seeds = ", ".join(str(int(seed)) for seed in study["seeds"])
    note = (
        f"{study['asks']} {study['split']} split, n = {int(study['n']):,}; mean ± standard deviation over "
        f"seeds {seeds}, then the difference in points from “{study['against']}”, paired by seed."
    )
    section.figure(drawing)
    section.table(f"{study['title']}: accuracy, %", ["variant", *columns], rows, note)
    if not study["leak_guard"]:
        section.note("Made WITHOUT the leak guard.", "fault")


def _cell(score: Judged) -> dict[str, object]:
    ends = f"({100 * score.low:.0f}–{100 * score.high:.0f})"
    return {"text": f"{100 * score.accuracy:.1f}", "value": score.accuracy, "minor": ends}
