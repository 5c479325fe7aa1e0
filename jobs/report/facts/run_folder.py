"""What a run folder holds. A part that cannot be read becomes a `MissingPart`; it never ends the report."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r2scp.jobs.training.checkpoints import BEST, Checkpoint, read_checkpoint
from r2scp.jobs.training.evaluate import BASELINES
from r2scp.jobs.training.evaluation_table import OURS_TITLE, TITLES
from r2scp.model.config import Stage
from r2scp.store.errors import R2SCPError
from r2scp.store.schema import Condition

EXPERTS_FOLDER = "experts"  # stage I of a run with baselines, which share it
TEST_EVALUATION = "evaluation-test.json"
#: Raised for JSON of another shape than expected: the files may have been written by anyone.
INVALID_JSON = (KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class MissingPart:
    """Something that a report cannot show, why, and the command that makes it; "" if there is none."""

    section: str
    what: str
    why: str
    make: str = ""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """An accuracy in [0, 1] over n questions, with its 95 % interval."""

    accuracy: float
    n: int
    low: float
    high: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Accuracy":
        low, high = values["interval"]
        score = cls(accuracy=float(values["accuracy"]), n=int(values["n"]), low=float(low), high=float(high))
        if not 0 <= score.low <= score.high <= 1 or not 0 <= score.accuracy <= 1:
            raise ValueError(f"an accuracy and its interval must be in [0, 1]; got {values}")
        return score


@dataclass(frozen=True, kw_only=True)
class ConditionScores:
    """Accuracies of one model under one condition, overall and by question group and type."""

    overall: Accuracy
    groups: dict[str, Accuracy]
    types: dict[str, Accuracy]
    router: dict[str, float]
    recovered: int
    fallbacks: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ConditionScores":
        return cls(
            overall=Accuracy.from_json(values),
            groups=_accuracies(values["groups"]),
            types=_accuracies(values["types"]),
            router={str(name): float(weight) for name, weight in values["router"].items()},
            recovered=int(values["recovered"]),
            fallbacks=int(values["fallbacks"]),
        )


def _accuracies(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Accuracy]:
    """By name, of those with any question."""
    return {str(name): Accuracy.from_json(one) for name, one in values.items() if one["n"]}


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Our model or a baseline in an evaluation. `rates`: modality -> share missing -> accuracy."""

    name: str
    conditions: dict[str, ConditionScores]
    average: float
    rates: dict[str, dict[float, Accuracy]]

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> "ModelScores":
        conditions = {c.value: ConditionScores.from_json(values["conditions"][c]) for c in Condition}
        rates: dict[str, dict[float, Accuracy]] = {}
        for key, score in values.get("missing_rates", {}).items():
            modality, share = key.split()  # "audio 50%"
            rates.setdefault(modality, {})[float(share.rstrip("%")) / 100] = Accuracy.from_json(score)
        return cls(name=name, conditions=conditions, average=float(values["average"]), rates=rates)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One `evaluation-SPLIT.json`. `models`: ours first, then the baselines, the best first."""

    file: str
    split: str
    latest: bool
    models: list[ModelScores]
    leak_guard: bool
    disjoint: bool
    unfinished: list[str]
    left_out: dict[str, int]
    answers_unknown: int
    sha256: str  # of the tensors that were evaluated
    code: str

    @property
    def ours(self) -> ModelScores:
        return self.models[0]

    @property
    def n(self) -> int:
        return self.ours.conditions["AV"].overall.n

    @classmethod
    def from_json(cls, file: str, values: Mapping[str, Any]) -> "Evaluation":
        """Raises one of `INVALID_JSON` for a file that `evaluate` did not write."""
        baselines = values["baselines"].items()
        models = [ModelScores.from_json(TITLES.get(key, str(key)), row) for key, row in baselines]
        ours, settings = ModelScores.from_json(OURS_TITLE, values), values["settings"]
        return cls(
            file=file,
            split=str(values["split"]),
            latest=bool(values["latest"]),
            models=[ours, *sorted(models, key=lambda model: -model.average)],
            leak_guard=bool(settings["leak_guard"]),
            disjoint=bool(settings["disjoint"]),
            unfinished=[str(name) for name in values["unfinished"]],
            left_out={str(why): int(count) for why, count in values["left_out"].items()},
            answers_unknown=int(values["answers_unknown"]),
            sha256=str(values["checkpoint"]["sha256"]),
            code=str(values["code"]),
        )


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of `metrics.jsonl`: means over the epoch, and accuracies of validation."""

    stage: str
    epoch: int
    train: dict[str, float]
    validation: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The epochs of one training, by stage."""

    epochs: list[Epoch] = field(default_factory=list)
    invalid_lines: int = 0  # of the file, left out

    def of_stage(self, stage: Stage) -> list[Epoch]:
        return [one for one in self.epochs if one.stage == stage.value]


@dataclass(kw_only=True)
class RunFacts:
    """One run. `name`: its name in the report, which no other run has."""

    name: str
    folder: Path
    checkpoint: Checkpoint | None = None
    evaluation: Evaluation | None = None
    other_files: list[str] = field(default_factory=list)  # evaluations that are not shown
    curves: dict[str, Curves] = field(default_factory=dict)  # by model, ours first
    missing: list[MissingPart] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        return self.checkpoint.config.seed if self.checkpoint else None


def read_runs(folders: Sequence[Path], store: str | None) -> list[RunFacts]:
    """What the folders hold. Raises `CheckpointError` for a folder that is not a run."""
    return [_read(folder, name, store) for folder, name in zip(folders, unique_names(folders), strict=True)]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as makes them different."""
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts[-1:])} ({at})" for at, parts in enumerate(paths, start=1)]


def command(*words: str, store: str | None = None) -> str:
    """A command line to copy."""
    return shlex.join(["r2scp-pipe", *words, *(["--store", store] if store else [])])


def _read(folder: Path, name: str, store: str | None) -> RunFacts:
    facts = RunFacts(name=name, folder=folder)
    try:
        facts.checkpoint = read_checkpoint(folder, BEST)
    except R2SCPError as error:
        if not any((folder / file).exists() for file in ("config.json", "metrics.jsonl", TEST_EVALUATION)):
            raise
        facts.missing.append(MissingPart(section="run", what=f"best checkpoint of {name}", why=str(error)))
    if store is None and facts.checkpoint is not None:
        store = str(facts.checkpoint.store["uri"])
    facts.curves = _read_curves(facts)
    _read_evaluation(facts, store)
    return facts


def _read_evaluation(facts: RunFacts, store: str | None) -> None:
    """That of the test split if there is one, otherwise any; it is never computed here."""
    files = sorted(
        facts.folder.glob("evaluation-*.json"), key=lambda path: (path.name != TEST_EVALUATION, path.name)
    )
    make = command("evaluate", str(facts.folder), "--missing-rates", store=store)
    for path in files:
        if facts.evaluation is not None:
            facts.other_files.append(path.name)
            continue
        try:
            facts.evaluation = Evaluation.from_json(path.name, json.loads(path.read_bytes()))
        except (OSError, *INVALID_JSON) as error:
            why = f"{path.name} was not written by evaluate: {type(error).__name__}: {error}"
            facts.missing.append(MissingPart(section="accuracy", what=facts.name, why=why, make=make))
    if facts.evaluation is None and not files:
        why = "the run has not been evaluated, and a report never evaluates the test split"
        facts.missing.append(MissingPart(section="accuracy", what=facts.name, why=why, make=make))
    elif facts.evaluation is not None and not facts.evaluation.ours.rates:
        why = f"{facts.evaluation.file} was made without missing rates"
        facts.missing.append(MissingPart(section="missing-rates", what=facts.name, why=why, make=make))


def _read_curves(facts: RunFacts) -> dict[str, Curves]:
    """Of our model, with stage I if it was kept, and of the baselines."""
    ours = read_curves(facts.folder / "metrics.jsonl")
    if not ours.of_stage(Stage.EXPERTS):
        experts = read_curves(facts.folder / EXPERTS_FOLDER / "metrics.jsonl")
        ours = Curves(
            epochs=experts.of_stage(Stage.EXPERTS) + ours.epochs,
            invalid_lines=experts.invalid_lines + ours.invalid_lines,
        )
    curves = {OURS_TITLE: ours}
    for path in sorted((facts.folder / BASELINES).glob("*/metrics.jsonl")):
        key = path.parent.name
        curves[TITLES.get(key, key)] = read_curves(path)
    for name, curve in curves.items():
        if curve.invalid_lines:
            why = f"{curve.invalid_lines} lines of its metrics.jsonl cannot be read and are left out"
            facts.missing.append(MissingPart(section="training", what=f"{facts.name}: {name}", why=why))
    if not ours.epochs:
        why = "metrics.jsonl has no epoch of the model"
        facts.missing.append(MissingPart(section="training", what=facts.name, why=why))
    return curves


def read_curves(path: Path) -> Curves:
    """The epochs of a `metrics.jsonl`; for an epoch that is logged twice, the later line."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Curves()
    epochs: dict[tuple[str, int], Epoch] = {}
    invalid_lines = 0
    for line in text.splitlines():
        try:
            values = json.loads(line)
            if values["kind"] != "epoch":
                continue
            epoch = Epoch(
                stage=str(values["stage"]),
                epoch=int(values["epoch"]),
                train=dict(_numbers(values["train"])),
                validation=dict(_numbers(values["validation"])),
            )
        except INVALID_JSON:
            invalid_lines += 1
            continue
        epochs[epoch.stage, epoch.epoch] = epoch
    return Curves(epochs=[epochs[key] for key in sorted(epochs)], invalid_lines=invalid_lines)


def _numbers(values: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield str(name), float(value)
