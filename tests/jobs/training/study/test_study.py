"""A study runs each missing training once, whatever happens to it, and reports the results of its runs.

Compared with numpy, with `run_evaluate` on the single runs, and with a study that was killed and resumed. On
real Ray; kills are SIGKILL to the driver.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from r2scp.jobs.cli.main import app
from r2scp.jobs.training.checkpoints import read_checkpoint
from r2scp.jobs.training.command import TrainRequest, plan_training
from r2scp.jobs.training.config import StageConfig, TrainConfig
from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions, run_evaluate
from r2scp.jobs.training.log import read_metrics
from r2scp.jobs.training.study import run as study_module
from r2scp.jobs.training.study.definitions import FULL, Study, study_of
from r2scp.jobs.training.study.run import MEASURES, StudyOptions, run_study
from r2scp.jobs.training.study.table import markdown
from r2scp.jobs.training.study.trainings import StoreContents, TrainingTask
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import R2SCPError, StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table
from r2scp.store.search.bank import BankScope

pytestmark = pytest.mark.usefixtures("local_ray")
SEEDS = (4, 5)
SETTINGS = ("model.dim=16", "model.heads=2", "index.n=4", 'corpora=["music-avqa"]', "batch_size=8")
SETTINGS += (
    "stage_one.epochs=2",
    "stage_two.epochs=2",
    "stage_one.warmup_steps=2",
    "stage_two.warmup_steps=2",
)
WITHOUT_RANK = "without rank loss"
PATIENCE_S = 240  # for anything waited for; far beyond what a busy machine needs

EvaluatedRun = tuple[FeatureStore, Path]
Studied = tuple[StudyOptions, dict[str, Any]]


def options_of(store: FeatureStore, folder: Path, **changes: Any) -> StudyOptions:
    plan = plan_training(store, folder, TrainRequest(preset="demo", settings=SETTINGS))
    return replace(StudyOptions(plan=plan, folder=folder, seeds=SEEDS), **changes)


@pytest.fixture(scope="module")
def studied(
    evaluated_run: EvaluatedRun, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Studied:
    """`strategy` with two seeds, undisturbed; what it gave. Only to be read."""
    log: list[str] = []
    options = options_of(evaluated_run[0], tmp_path_factory.mktemp("studied"), log=log.append)
    report = run_study("strategy", study_of("strategy", options.plan.config, ()), options)
    assert len([line for line in log if line.startswith("stage I: ")]) == 2
    assert (
        len([line for line in log if re.match(r"strategy: \d of 8 trainings; .+, seed [45]: val", line)]) == 8
    )
    return options, report


def files(folder: Path) -> dict[Path, int]:
    """When each file below was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_stage_one_is_trained_once_for_each_seed(studied: Studied) -> None:
    options, report = studied
    experts, runs = (sorted((options.folder / kind).iterdir()) for kind in ("experts", "runs"))
    assert len(experts) == len(SEEDS)
    assert len(runs) == 3 * len(SEEDS), "stage I alone is a run of experts"
    for run in runs:
        config, stages = (
            read_checkpoint(run).config,
            {line["stage"] for line in read_metrics(run / "metrics.jsonl")},
        )
        assert stages == {"mixing"}
        begun = [
            one for one in experts if read_checkpoint(one, "experts").sha256 == read_checkpoint(run).experts
        ]
        assert len(begun) == (config.stage_one.epochs > 0)
        assert all(read_checkpoint(one).config.seed == config.seed for one in begun)
    named = {run for row in report["variants"].values() for run in row["runs"]}
    assert named == {path.relative_to(options.folder).as_posix() for path in [*experts, *runs]}


def test_numbers_are_those_of_the_runs(studied: Studied, evaluated_run: EvaluatedRun) -> None:
    options, report = studied
    assert json.loads((options.folder / "strategy.json").read_text()) == report
    reached: dict[str, np.ndarray] = {}
    for variant, row in report["variants"].items():
        folders = [options.folder / run for run in row["runs"]]
        assert [read_checkpoint(folder).config.seed for folder in folders] == list(SEEDS)
        assert row["validation"] == [read_checkpoint(folder).metrics["mean"] for folder in folders]
        reports = [run_evaluate(evaluated_run[0], folder, EvaluateOptions()) for folder in folders]
        reached[variant] = np.array(
            [
                [one["conditions"][name]["accuracy"] for name in ("A", "V", "AV")] + [one["average"]]
                for one in reports
            ]
        )
    assert np.ptp(np.stack(list(reached.values()))[..., 3]) > 0, "they are not all alike"
    for variant, row in report["variants"].items():
        for at, measure in enumerate(MEASURES):
            apart = reached[variant][:, at] - reached[report["against"]][:, at]
            for kind, values in (("accuracy", reached[variant][:, at]), ("difference", apart)):
                log = row[kind][measure]
                assert log["values"] == pytest.approx(values.tolist(), abs=1e-12)
                assert log["mean"] == pytest.approx(np.mean(values), abs=1e-12)
                assert log["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    assert report["seeds"] == list(SEEDS)
    assert report["n"] == 32
    assert report["leak_guard"] is True


def test_the_markdown_table_holds_the_same_numbers(studied: Studied) -> None:
    report = studied[1]
    table = [line for line in markdown(report).splitlines() if line.startswith("|")]
    heading, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert heading == ["variant", *MEASURES]
    assert rule == ["---", *["---:"] * 4]
    assert [row[0] for row in rows] == list(report["variants"])
    for name, *cells in rows:
        row = report["variants"][name]
        for measure, cell in zip(MEASURES, cells, strict=True):
            log = [float(number) for number in re.findall(r"[-+]?\d+\.\d", cell)]
            expected = [row["accuracy"][measure][part] for part in ("mean", "sd")]
            if name != report["against"]:
                expected += [row["difference"][measure][part] for part in ("mean", "sd")]
            assert log == pytest.approx([100 * value for value in expected], abs=0.0501)
    assert "seeds 4, 5" in markdown(report)
    assert f"from “{FULL}”" in markdown(report)


def test_another_study_reuses_trainings(
    studied: Studied, evaluated_run: EvaluatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = studied[0]
    before = files(options.folder)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("there is nothing to train")

    monkeypatch.setattr(study_module, "fan_out", never)
    monkeypatch.setattr(study_module, "ray_session", never)
    report = run_study("loads", study_of("loads", options.plan.config, ()), options)
    assert report["variants"][FULL]["accuracy"] == studied[1]["variants"][FULL]["accuracy"]
    assert files(options.folder) == before | {
        options.folder / "loads.json": files(options.folder)[options.folder / "loads.json"]
    }
    for run, reports in zip(report["variants"][FULL]["runs"], report["variants"][FULL]["loads"], strict=True):
        epochs = [
            line["train"]
            for line in read_metrics(options.folder / run / "metrics.jsonl")
            if line["kind"] == "epoch"
        ]
        assert len(epochs) == len(reports) == 2
        for train, weights in zip(epochs, reports, strict=True):
            assert {f"router/{name}": value for name, value in weights.items()}.items() <= train.items()
            assert len(weights) == sum(name.startswith("router/") for name in train) >= 6
            for condition in {name.split("/")[0] for name in weights}:
                shares = [value for name, value in weights.items() if name.split("/")[0] == condition]
                assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_missing_rates_are_evaluated_on_existing_runs(studied: Studied, evaluated_run: EvaluatedRun) -> None:
    options = studied[0]
    before = files(options.folder)
    study = Study(
        title="Rates", question="?", variants={FULL: options.plan.config}, reference=FULL, rates=True
    )
    report = run_study("rates", study, options)
    new = {path for path, at in files(options.folder).items() if before.get(path) != at}
    runs = [options.folder / run for run in report["variants"][FULL]["runs"]]
    kept = {run / "evaluation-test-rates.json" for run in runs}
    assert {path for path in new if path.name not in ("rates.json", "lock")} == kept
    reports = [
        run_evaluate(evaluated_run[0], run, EvaluateOptions(rates=MISSING_RATES))["missing_rates"]
        for run in runs
    ]
    log = report["variants"][FULL]["accuracy"]
    assert list(log) == [*MEASURES, *reports[0]]
    assert len(reports[0]) == 6
    for name in reports[0]:
        assert log[name]["values"] == [one[name]["accuracy"] for one in reports]


@pytest.fixture
def words(evaluated_run: EvaluatedRun, tmp_path: Path) -> list[str]:
    """The command that gives `studied`, in another folder."""
    words = ["study", "strategy", "--store", evaluated_run[0].uri, "--folder", str(tmp_path), "--seeds", "2"]
    words += ["--first-seed", str(SEEDS[0]), "--num-workers", "2", "--device", "cpu", "--json"]
    return [*words, *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture
def driver(words: list[str]) -> Iterator[psutil.Popen]:
    """The command, at work; what is left of it when the test is over is ended, by number."""
    code = "import sys; from r2scp.jobs.cli.main import app; app(sys.argv[1:])"
    started = psutil.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    yield started
    if started.is_running():
        for process in [*started.children(recursive=True), started]:
            process.kill()
    started.wait(PATIENCE_S)
    started.stderr.close()


@pytest.mark.slow
def test_a_killed_study_resumes(
    studied: Studied, driver: psutil.Popen, words: list[str], tmp_path: Path
) -> None:
    """SIGKILL to the driver once a run is finished; the resumed study leaves finished runs as they are."""

    def read_until(start: str) -> None:
        while not (reports := driver.stderr.readline().decode()).startswith(start):
            assert reports, "the study ended by itself"

    read_until("stage I: 2 of 2")
    children = driver.children(recursive=True)
    workers = [child for child in children if re.match(r"ray::(work|IDLE)", child.cmdline()[0])]
    assert len(workers) >= 2
    read_until("strategy: 1 of 8")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(PATIENCE_S)
    assert psutil.wait_procs(workers, PATIENCE_S)[1] == [], "a worker is still training"
    for child in children:  # Ray's agents would look around for a minute
        if child.is_running():
            child.kill()
    finished = [path.parent for path in tmp_path.glob("*/*/evaluation-test.json")]
    assert 1 <= len(finished) < 8
    before = {folder: files(folder) for folder in finished}
    assert not (tmp_path / "strategy.json").exists()

    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    left = 8 - len(finished)
    assert f"strategy: {left} of {left} trainings" in result.stderr
    assert "stage I:" not in result.stderr
    report = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert report["variants"] == studied[1]["variants"], "as if nothing had happened"
    assert {folder: files(folder) for folder in finished} == before
    assert (tmp_path / "strategy.md").read_text() == report["markdown"] == markdown(studied[1])


def test_one_training_that_fails_leaves_the_others(evaluated_run: EvaluatedRun, tmp_path: Path) -> None:
    options = options_of(evaluated_run[0], tmp_path, seeds=(4,))
    base = options.plan.config
    broken = replace(base, stage_two=replace(base.stage_two, lr=1e30, warmup_steps=0))
    study = Study(title="One breaks", question="?", variants={"broken": broken, FULL: base}, reference=FULL)
    with pytest.raises(
        R2SCPError, match=r"1 of 2 trainings failed: broken, seed 4: the loss became"
    ) as failed:
        run_study("one", study, options)
    assert "\n" not in str(failed.value)
    assert not (tmp_path / "one.json").exists()
    done = [path.parent for path in tmp_path.glob("runs/*/evaluation-test.json")]
    assert [read_checkpoint(folder).config for folder in done] == [replace(base, seed=4)]
    before = files(done[0])
    mended = replace(study, variants=study.variants | {"broken": replace(base, batch_size=6)})
    assert run_study("one", mended, options)["variants"].keys() == {"broken", FULL}
    assert files(done[0]) == before


def test_missing_data_is_reported_before_training(evaluated_run: EvaluatedRun, tmp_path: Path) -> None:
    options = options_of(evaluated_run[0], tmp_path / "studies")
    strategy = study_of("strategy", options.plan.config, ())
    with pytest.raises(StoreError, match=r"no question .*weather"):
        run_study("strategy", strategy, replace(options, split="weather"))
    with pytest.raises(StoreError, match=r"run `r2scp-pipe index --retrieval cross --neighbours 4`"):
        run_study("components", study_of("components", options.plan.config, ()), options)
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize(
    ("retrieval", "settings"),
    [
        (Retrieval.CROSS, {}),
        (Retrieval.HYBRID, {"cross_weight": 0.25, "n": 3}),
        (Retrieval.PAIRED, {"bank": BankScope(corpora=("avqa", "music-avqa")), "leak_guard": False}),
        (Retrieval.PAIRED, {"bank": BankScope(splits=("train", "val"), disjoint=True)}),
    ],
)
def test_the_suggested_index_command_helps(
    evaluated_run: EvaluatedRun, copy: Callable, retrieval: Retrieval, settings: dict[str, Any]
) -> None:
    store = copy(evaluated_run[0])
    base = options_of(store, Path("unused")).plan.config
    config = replace(base, retrieval=retrieval, index=IndexSettings(**settings))
    with pytest.raises(StoreError, match="has no neighbours") as error:
        StoreContents(store=store, pins=Pins.latest(store)).key(config)
    command = str(error.value).split("`")[1].split()
    assert command[0] == "r2scp-pipe"
    result = CliRunner().invoke(app, [*command[1:], "--store", store.uri])
    assert result.exit_code == 0, result.output
    assert StoreContents(store=store, pins=Pins.latest(store)).key(config)


def test_training_keys_depend_on_settings_and_data(
    evaluated_run: EvaluatedRun, copy: Callable, write: Callable
) -> None:
    def key(store: FeatureStore, config: TrainConfig) -> str:
        return StoreContents(store=store, pins=Pins.latest(store)).key(config)

    store, moved = evaluated_run[0], copy(evaluated_run[0])
    config = options_of(store, Path("unused")).plan.config
    known = key(store, config)
    assert key(store, replace(config)) == known
    assert key(moved, config) == known, "wherever the store is"
    others = [
        replace(config, seed=9),
        replace(config, model=replace(config.model, k=3)),
        replace(config, stage_two=StageConfig(epochs=7)),
    ]
    assert len({known, *(key(store, other) for other in others)}) == 4
    CliRunner().invoke(app, ["index", "--retrieval", "cross", "--neighbours", "4", "--store", moved.uri])
    assert Pins.latest(moved).neighbours > Pins.latest(store).neighbours
    assert key(moved, config) == known, "another index changes nothing for this training"
    assert key(moved, replace(config, retrieval=Retrieval.CROSS)) != known
    row = moved.questions(where="question_id = 'test/0'").to_pylist()[0]
    write(moved, Table.QUESTIONS, [row | {"answer": "another"}])
    changed = key(moved, config)
    assert changed != known
    clip = moved.clips(where="clip_id = 'music-avqa/3'").to_pylist()[0]
    write(moved, Table.CLIPS, [clip | {"split": "val"}])
    assert key(moved, config) not in (known, changed)
    blind = replace(config, sees="question", stage_two=StageConfig(epochs=0))
    assert key(store, blind) == key(store, replace(blind, retrieval=blind.retrieval)), "needs no index"


def test_a_run_is_finished_when_its_best_checkpoint_is_evaluated(studied: Studied, tmp_path: Path) -> None:
    options, report = studied
    source = options.folder / report["variants"][FULL]["runs"][0]
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    job = TrainingTask(name="x", plan=replace(options.plan, folder=tmp_path), split="test")
    assert job.finished
    assert not replace(job, split="val").finished
    assert replace(job, split="").finished
    assert "/" not in replace(job, split="../../up").evaluation.name
    kept = job.evaluation.read_text()
    job.evaluation.write_text(kept.replace(read_checkpoint(tmp_path).sha256, "0" * 64))
    assert not job.finished, "evaluated when another checkpoint was the best"
    job.evaluation.write_text(kept)
    last = json.loads((tmp_path / "last.json").read_text())
    (tmp_path / "last.json").write_text(json.dumps(last | {"epoch": 1}))
    assert not job.finished, "evaluated in the middle of the training"
