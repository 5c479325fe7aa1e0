"""`train`, `evaluate` and `study` as a person or a script meets them.

Values of --set reach the training or are refused in one line that says what there is; --json is one object on
stdout; the same command again does nothing and says the same.
"""

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from r2scp.jobs.cli.main import app
from r2scp.jobs.training.checkpoints import read_checkpoint
from r2scp.jobs.training.command import TrainRequest, changed, plan_training
from r2scp.jobs.training.config import PRESETS, demo
from r2scp.jobs.training.evaluate import EvaluateOptions, run_evaluate
from r2scp.jobs.training.study.definitions import STUDIES
from r2scp.store.feature_store import FeatureStore

SMALL = ("model.dim=16", "model.heads=2", "index.n=4", 'corpora=["music-avqa"]', "batch_size=8")
SHORT = ("stage_one.epochs=1", "stage_two.epochs=1", "stage_one.warmup_steps=2", "stage_two.warmup_steps=2")
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

Judged = tuple[FeatureStore, Path]


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


@pytest.fixture(scope="module")
def trained(evaluated_run: Judged, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that `train` made, with baselines, and what it said."""
    run = tmp_path_factory.mktemp("trained") / "a run"
    values = setting(*SMALL, *SHORT, "model.saliency=literal", "loss.rank_weight=0.5", "model.k=3")
    return run, call(
        "train", run, "--store", evaluated_run[0].uri, "--device", "cpu", "--seed", 7, *values, "--json"
    )


def test_train_says_what_came_out_and_values_reach_it(trained: tuple[Path, Result], evaluated_run: Judged) -> None:
    run, result = trained
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    said = json.loads(result.stdout)
    best = read_checkpoint(run)
    names = {"r2scp", "experts", "question-only", "no-recovery", "no-recovery-dropout"}
    assert said["validation"].keys() == names
    assert said["validation"]["r2scp"] == best.metrics
    assert said["checkpoint"] == str(run / "best.json")
    assert (said["epoch"], said["step"]) == (best.epoch, best.step)
    model = best.config.model
    assert (model.saliency, model.k, best.config.loss.rank_weight) == ("literal", 3, 0.5)
    assert (model.classes, model.encoder_dim, best.config.corpora) == (6, 16, ("music-avqa",))
    assert best.config.seed == 7
    assert read_checkpoint(run / "baselines" / "question-only").config.sees == "question"
    for name in names:
        assert re.search(rf"(?m)^{name}: stage I+, epoch 1/1, loss \d+\.\d+, validation ", result.stderr), (
            name
        )


def test_train_again_does_nothing_and_says_the_same(trained: tuple[Path, Result], evaluated_run: Judged) -> None:
    run, first = trained

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    before, said = files(), json.loads(first.stdout)
    values = setting(*SMALL, *SHORT, "model.saliency=literal", "loss.rank_weight=0.5", "model.k=3")
    words = ["train", run, "--store", evaluated_run[0].uri, "--device", "cpu", "--seed", 7, *values, "--json"]
    again = call(*words)
    assert (again.exit_code, again.stdout, again.stderr) == (0, first.stdout, "")
    alone = call(*words, "--no-baselines")
    assert alone.exit_code == 0
    kept = {name: said["validation"][name] for name in ("experts", "r2scp")}
    assert json.loads(alone.stdout) == said | {"validation": kept}
    assert files() == before
    other = check_one_line_error(call(*words, "--set", "model.k=4"), 1)
    assert "model.k: 3, 4" in other


def test_what_train_says_next_can_be_run(trained: tuple[Path, Result], evaluated_run: Judged) -> None:
    run, result = trained
    words = json.loads(result.stdout)["try_next"]
    assert words.startswith("r2scp-pipe evaluate '")
    said = call("evaluate", run, "--store", evaluated_run[0].uri, "--device", "cpu", "--json")
    assert said.exit_code == 0, said.output
    assert said.stdout.count("\n") == 1
    report = json.loads(said.stdout)
    assert report == json.loads(json.dumps(run_evaluate(evaluated_run[0], run, EvaluateOptions())))
    assert report == json.loads((run / "evaluation-test.json").read_text())
    assert f"kept in {run}/evaluation-test.json" in said.stderr


def test_evaluate_for_people(evaluated_run: Judged, tmp_path: Path) -> None:
    store, run = evaluated_run
    result = call("evaluate", run, "--split", "odd", "--store", store.uri, "--device", "cpu")
    (run / "evaluation-odd.json").unlink()
    assert result.exit_code == 0, result.output
    assert "R²ScP" in result.stdout
    for title in ("question only", "no recovery, dropout", "majority of the type"):
        assert title in result.stdout
    assert "[bold]x[bold]" in result.stdout, "outside text is not markup"
    assert not STEERING.search(result.output)
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("model.depth=3", "encoder_dim, classes, dim, layers"),
        ("epochs=3", "model, stage_one, stage_two, loss"),
        ("model.k.j=3", "model, stage_one"),
        ("model.k", "SETTING=VALUE"),
        ("=3", "SETTING=VALUE"),
        ("model.saliency=loud", "received, output_norm, literal, random"),
        ("retrieval=closest", "cross, paired, hybrid"),
        ("model.k=many", "a whole number"),
        ("model.k=2.5", "a whole number"),
        ("model.cap=yes", "true or false"),
        ("stage_two.lr=NaN", "a finite number"),
        ("stage_two.lr=-1", "above 0"),
        ("model=3", "an object"),
        ("corpora=demo", "a list"),
        ("model.heads=3", "a multiple of heads"),
        ("model.neighbours=9", "at most index.n, 4"),
        ("seed=3", "--seed"),
        ("model.classes=9", "must be 6, the answers of the train split"),
        ("model.encoder_dim=1024", "must be 16, the width"),
        ("stage_one.epochs=\x1b[2J", "a whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(
    evaluated_run: Judged, tmp_path: Path, value: str, named: str
) -> None:
    words = ["train", tmp_path / "run", "--store", evaluated_run[0].uri, *setting(*SMALL, value)]
    assert named in check_one_line_error(call(*words), 2)
    assert not (tmp_path / "run").exists()


def test_other_things_that_cannot_be(evaluated_run: Judged, trained: tuple[Path, Result], tmp_path: Path) -> None:
    store, run = evaluated_run
    at = ["--store", store.uri]
    message = check_one_line_error(call("train", tmp_path / "run", "--preset", "paper", *at), 2)
    assert all(preset in message for preset in PRESETS)
    assert "no store" in check_one_line_error(
        call("train", tmp_path / "run", "--store", tmp_path / "none"), 1
    )
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in check_one_line_error(
        call("train", tmp_path / "file", *at, *setting(*SMALL)), 1
    )
    assert "no checkpoint" in check_one_line_error(call("evaluate", tmp_path / "run", *at), 1)
    assert "no checkpoint" in check_one_line_error(call("evaluate", tmp_path / "file", *at), 1)
    assert "'weather'" in check_one_line_error(call("evaluate", run, "--split", "weather", *at), 1)
    FeatureStore.create(str(tmp_path / "other"), "another-encoder", 16)
    wrong = check_one_line_error(call("evaluate", run, "--store", tmp_path / "other"), 1)
    assert "another-encoder" in wrong
    assert [path.name for path in tmp_path.iterdir()] == ["file", "other"] or len(
        list(tmp_path.iterdir())
    ) == 2


def test_studies_that_cannot_be(evaluated_run: Judged, tmp_path: Path) -> None:
    at = ["--store", evaluated_run[0].uri, "--folder", tmp_path / "studies", *setting(*SMALL)]
    message = check_one_line_error(call("study", "weather", *at), 2)
    assert all(name in message for name in (*STUDIES, "bank"))
    help_text = call("study", "--help", columns=400).stdout
    assert all(name in help_text for name in (*STUDIES, "bank"))
    assert call("study", "loads", "--seeds", 0, *at).exit_code == 2
    lacking = check_one_line_error(call("study", "components", *at), 1)
    assert "r2scp-pipe index --retrieval cross --neighbours 4" in lacking
    assert "'weather'" in check_one_line_error(call("study", "loads", "--split", "weather", *at), 1)
    assert "--first-seed" in check_one_line_error(call("study", "loads", *at, "--set", "seed=3"), 2)
    assert not (tmp_path / "studies").exists()


@pytest.mark.usefixtures("local_ray")
def test_study_for_people(evaluated_run: Judged, tmp_path: Path) -> None:
    words = [
        "study",
        "loads",
        "--store",
        evaluated_run[0].uri,
        "--folder",
        tmp_path,
        "--seeds",
        2,
        "--device",
        "cpu",
    ]
    result = call(*words, *setting(*SMALL, *SHORT))
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    report = json.loads((tmp_path / "loads.json").read_text())
    mean = report["variants"]["CMR+CAP"]["accuracy"]["average"]["mean"]
    assert f"{100 * mean:.1f} ± " in result.stdout
    assert f"{100 * mean:.1f} ± " in (tmp_path / "loads.md").read_text()
    assert result.stdout.count("Router weights, CMR+CAP, seed") >= 2
    assert f"kept in {tmp_path}/loads.json and .md" in result.stderr
    again = call(*words, *setting(*SMALL, *SHORT), "--json")
    assert again.stdout.count("\n") == 1
    said = json.loads(again.stdout)
    assert said.pop("markdown") == (tmp_path / "loads.md").read_text()
    assert said == report
    assert "trainings" not in again.stderr


def test_values_are_read_as_what_they_are() -> None:
    base = demo(24, 6)
    values = ("retrieval=cross", "stage_two.epochs=3", 'corpora=["a", "b"]', "model.cap=false", "model.ffn=8")
    config = changed(base, values)
    assert (config.retrieval, config.stage_two.epochs, config.corpora) == ("cross", 3, ("a", "b"))
    assert (config.model.cap, config.model.ffn) == (False, 8)
    assert changed(config, ("model.ffn=null", "stage_two.lr=1")).model.ffn is None
    assert changed(base, ()) == base
    assert changed(base, ("model.k=1", "model.k=2")).model.k == 2, "the last one holds"
    assert base == demo(24, 6), "a base is not written into"


@pytest.mark.parametrize(
    ("preset", "values", "classes"),
    [
        ("demo", ('corpora=["music-avqa"]',), 6),
        ("paper_music_avqa", (), 6),
        ("paper_avqa", (), None),
        ("demo", ("model.classes=null", 'corpora=["avqa"]', "holdout=0.2"), None),
    ],
)
def test_answers_are_those_of_the_store(
    evaluated_run: Judged, tmp_path: Path, preset: str, values: tuple[str, ...], classes: int | None
) -> None:
    plan = plan_training(evaluated_run[0], tmp_path, TrainRequest(preset=preset, settings=values, seed=3))
    assert plan.config.model.classes == classes
    assert (plan.answers is None) == (classes is None)
    assert plan.answers is None or len(plan.answers) == classes
    assert (plan.config.model.encoder_dim, plan.config.seed, plan.folder) == (16, 3, tmp_path)
    assert plan.config.corpora == (("avqa",) if classes is None else ("music-avqa",))
