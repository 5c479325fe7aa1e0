"""`train`, `evaluate` and `study` on the command line.

Values of --set are applied or refused in one line that lists what exists; --json is one object on stdout; the
same command again changes nothing and prints the same.
"""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from r2scp.jobs.cli.main import app
from r2scp.jobs.training.checkpoints import read_checkpoint
from r2scp.jobs.training.command import TrainRequest, plan_training, with_settings
from r2scp.jobs.training.config import PRESETS, demo
from r2scp.jobs.training.evaluate import EvaluateOptions, run_evaluate
from r2scp.jobs.training.study.definitions import STUDIES
from r2scp.store.feature_store import FeatureStore

SMALL = ("model.dim=16", "model.heads=2", "index.n=4", 'corpora=["music-avqa"]', "batch_size=8")
SHORT = ("stage_one.epochs=1", "stage_two.epochs=1", "stage_one.warmup_steps=2", "stage_two.warmup_steps=2")
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

EvaluatedRun = tuple[FeatureStore, Path]


def call(*words: object, columns: int = 80) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": str(columns)})


def setting(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def check_one_line_error(result: Result, code: int) -> str:
    """The error's line."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), "an exception came through"
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not STEERING.search(lines[0])
    return lines[0]


VALUES = setting(*SMALL, *SHORT, "model.saliency=literal", "loss.rank_weight=0.5", "model.k=3")


def train_words(evaluated_run: EvaluatedRun, run: Path) -> list[object]:
    return ["train", run, "--store", evaluated_run[0].uri, "--device", "cpu", "--seed", 7, *VALUES, "--json"]


@pytest.fixture(scope="module")
def trained(
    evaluated_run: EvaluatedRun, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """A run made by `train`, with baselines, and the command's result."""
    run = tmp_path_factory.mktemp("trained") / "a run"
    return run, call(*train_words(evaluated_run, run))


def test_train_applies_settings_and_prints_a_summary(trained: tuple[Path, Result]) -> None:
    run, result = trained
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    summary, best = json.loads(result.stdout), read_checkpoint(run)
    names = {"r2scp", "experts", "question-only", "no-recovery", "no-recovery-dropout"}
    assert summary["validation"].keys() == names
    assert summary["validation"]["r2scp"] == best.metrics
    assert summary["checkpoint"] == str(run / "best.json")
    assert (summary["epoch"], summary["step"]) == (best.epoch, best.step)
    config = best.config
    assert (config.model.saliency, config.model.k, config.loss.rank_weight) == ("literal", 3, 0.5)
    assert (config.model.classes, config.model.encoder_dim, config.corpora) == (6, 16, ("music-avqa",))
    assert config.seed == 7
    assert read_checkpoint(run / "baselines" / "question-only").config.sees == "question"
    for name in names:
        line = rf"(?m)^{name}: stage I+, epoch 1/1, loss \d+\.\d+, validation "
        assert re.search(line, result.stderr), name


def test_training_again_changes_nothing(trained: tuple[Path, Result], evaluated_run: EvaluatedRun) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    run, first = trained
    before, summary, words = files(), json.loads(first.stdout), train_words(evaluated_run, run)
    again = call(*words)
    assert (again.exit_code, again.stdout, again.stderr) == (0, first.stdout, "")
    alone = call(*words, "--no-baselines")
    assert alone.exit_code == 0
    validation = {name: summary["validation"][name] for name in ("experts", "r2scp")}
    assert json.loads(alone.stdout) == summary | {"validation": validation}
    assert files() == before
    assert "model.k: 3, 4" in check_one_line_error(call(*words, "--set", "model.k=4"), 1)


def test_the_suggested_next_command_evaluates_the_run(
    trained: tuple[Path, Result], evaluated_run: EvaluatedRun
) -> None:
    (run, result), store = trained, evaluated_run[0]
    assert json.loads(result.stdout)["try_next"].startswith("r2scp-pipe evaluate '")
    evaluated = call("evaluate", run, "--store", store.uri, "--device", "cpu", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    assert evaluated.stdout.count("\n") == 1
    report = json.loads(evaluated.stdout)
    assert report == json.loads(json.dumps(run_evaluate(store, run, EvaluateOptions())))
    assert report == json.loads((run / "evaluation-test.json").read_text())
    assert f"Saved to {run}/evaluation-test.json" in evaluated.stderr


def test_evaluate_prints_tables(evaluated_run: EvaluatedRun) -> None:
    store, run = evaluated_run
    result = call("evaluate", run, "--split", "odd", "--store", store.uri, "--device", "cpu")
    (run / "evaluation-odd.json").unlink()
    assert result.exit_code == 0, result.output
    for text in ("R²ScP", "question only", "no recovery, trained", "most frequent answer"):
        assert text in result.stdout
    assert "[bold]x[bold]" in result.stdout, "outside text is not markup"
    assert not STEERING.search(result.output)
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("model.depth=3", "encoder_dim, classes, dim, layers"),
        ("epochs=3", "model, stage_one, stage_two, loss"),
        ("model.k.j=3", "model, stage_one"),
        ("model.k", "SETTING=VALUE"),
        ("retrieval=closest", "cross, paired, hybrid"),
        ("stage_two.lr=NaN", "a finite number"),
        ("seed=3", "--seed"),
        ("model.classes=9", "must be 6, the number of answers of the train split"),
        ("model.encoder_dim=1024", "must be 16, the width"),
        ("stage_one.epochs=\x1b[2J", "a whole number"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(
    evaluated_run: EvaluatedRun, tmp_path: Path, value: str, message: str
) -> None:
    words = ["train", tmp_path / "run", "--store", evaluated_run[0].uri, *setting(*SMALL, value)]
    assert message in check_one_line_error(call(*words), 2)
    assert not (tmp_path / "run").exists()


def test_other_errors_are_one_line_too(evaluated_run: EvaluatedRun, tmp_path: Path) -> None:
    (store, run), new = evaluated_run, tmp_path / "run"
    at = ["--store", store.uri]
    (tmp_path / "file").write_text("x")
    FeatureStore.create(str(tmp_path / "other"), "another-encoder", 16)
    message = check_one_line_error(call("train", new, "--preset", "paper", *at), 2)
    assert all(preset in message for preset in PRESETS)
    for words, message in (
        (["train", new, "--store", tmp_path / "none"], "no store"),
        (["train", tmp_path / "file", *at, *setting(*SMALL)], str(tmp_path / "file")),
        (["evaluate", new, *at], "no checkpoint"),
        (["evaluate", tmp_path / "file", *at], "no checkpoint"),
        (["evaluate", run, "--split", "weather", *at], "'weather'"),
        (["evaluate", run, "--store", tmp_path / "other"], "another-encoder"),
    ):
        assert message in check_one_line_error(call(*words), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_invalid_studies_are_refused_in_one_line(evaluated_run: EvaluatedRun, tmp_path: Path) -> None:
    at = ["--store", evaluated_run[0].uri, "--folder", tmp_path / "studies", *setting(*SMALL)]
    help_text = call("study", "--help", columns=400).stdout
    for text in (check_one_line_error(call("study", "weather", *at), 2), help_text):
        assert all(name in text for name in (*STUDIES, "bank"))
    assert call("study", "loads", "--seeds", 0, *at).exit_code == 2
    missing = check_one_line_error(call("study", "components", *at), 1)
    assert "r2scp-pipe index --retrieval cross --neighbours 4" in missing
    assert "'weather'" in check_one_line_error(call("study", "loads", "--split", "weather", *at), 1)
    assert "--first-seed" in check_one_line_error(call("study", "loads", *at, "--set", "seed=3"), 2)
    assert not (tmp_path / "studies").exists()


@pytest.mark.usefixtures("local_ray")
def test_study_prints_and_saves_its_tables(evaluated_run: EvaluatedRun, tmp_path: Path) -> None:
    words = ["study", "loads", "--store", evaluated_run[0].uri, "--folder", tmp_path]
    words += ["--seeds", 2, "--device", "cpu", *setting(*SMALL, *SHORT)]
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    report, text = json.loads((tmp_path / "loads.json").read_text()), (tmp_path / "loads.md").read_text()
    mean = f"{100 * report['variants']['CMR+CAP']['accuracy']['average']['mean']:.1f} ± "
    assert mean in result.stdout
    assert mean in text
    assert result.stdout.count("Router weights, CMR+CAP, seed") >= 2
    assert f"Saved to {tmp_path}/loads.json and .md" in result.stderr
    again = call(*words, "--json")
    assert again.stdout.count("\n") == 1
    assert json.loads(again.stdout) == report | {"markdown": text}
    assert "trainings" not in again.stderr


def test_values_are_json_or_else_text() -> None:
    base = demo(24, 6)
    values = ("retrieval=cross", "stage_two.epochs=3", 'corpora=["a", "b"]', "model.cap=false", "model.ffn=8")
    config = with_settings(base, values)
    assert (config.retrieval, config.stage_two.epochs, config.corpora) == ("cross", 3, ("a", "b"))
    assert (config.model.cap, config.model.ffn) == (False, 8)
    assert with_settings(config, ("model.ffn=null", "stage_two.lr=1")).model.ffn is None
    assert with_settings(base, ()) == base
    assert with_settings(base, ("model.k=1", "model.k=2")).model.k == 2, "the last one wins"
    assert base == demo(24, 6), "the base is not modified"


@pytest.mark.parametrize(
    ("preset", "values", "classes"),
    [("paper_music_avqa", (), 6), ("demo", ("model.classes=null", 'corpora=["avqa"]', "holdout=0.2"), None)],
)
def test_answers_are_the_stores(
    evaluated_run: EvaluatedRun, tmp_path: Path, preset: str, values: tuple[str, ...], classes: int | None
) -> None:
    request = TrainRequest(preset=preset, settings=values, seed=3)
    plan = plan_training(evaluated_run[0], tmp_path, request)
    assert plan.config.model.classes == classes
    assert (None if plan.answers is None else len(plan.answers)) == classes
    assert (plan.config.model.encoder_dim, plan.config.seed, plan.folder) == (16, 3, tmp_path)
    assert plan.config.corpora == (("avqa",) if classes is None else ("music-avqa",))
