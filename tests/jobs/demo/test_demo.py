"""`r2scp-pipe demo`, the whole pipeline at a small size: every step does its work, and does it once."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r2scp.jobs.cli.main import app
from r2scp.jobs.training.checkpoints import read_checkpoint
from r2scp.store.feature_store import FeatureStore

CLIPS, QUESTIONED = 12, {"train", "val", "test"}
STEPS = ("generate", "extract", "index", "train", "evaluate", "report")
SHORT = ("--set", "stage_one.epochs=1", "--set", "stage_two.epochs=1", "--set", "model.dim=16")

pytestmark = pytest.mark.usefixtures("local_ray")


def test_the_demo_runs_and_a_second_run_repeats_nothing(tmp_path: Path) -> None:
    arguments = ["demo", "--folder", str(tmp_path), "--clips", str(CLIPS), "--seed", "3", *SHORT]
    first = CliRunner().invoke(app, [*arguments, "--json"], env={"COLUMNS": "80"})
    assert first.exit_code == 0, first.output
    assert first.stdout.count("\n") == 1
    result = json.loads(first.stdout)
    assert tuple(result["seconds"]) == STEPS
    assert [line[:3] for line in first.stderr.splitlines() if line[1:3] == "/6"] == [
        f"{n}/6" for n in range(1, 7)
    ]
    assert result["extract"] == {
        "inputs": CLIPS,
        "stored": CLIPS,
        "unchanged": 0,
        "dead": 0,
        "decoded": CLIPS,
    }

    store = FeatureStore.open(result["store"])
    assert (
        len(list((tmp_path / "corpus-12-seed3" / "videos").glob("*.mp4"))) == store.clips().num_rows == CLIPS
    )
    questions = store.questions(["split", "question_id"])
    assert set(questions["split"].to_pylist()) == QUESTIONED
    assert set(store.neighbours(["retrieval"])["retrieval"].to_pylist()) == {"cross", "paired", "hybrid"}
    test_questions = questions["split"].to_pylist().count("test")
    assert {row["n"] for row in result["conditions"].values()} == {test_questions}
    assert result["conditions"].keys() == {"A", "V", "AV"}
    assert result["baselines"].keys() == {"majority", "question-only", "no-recovery", "no-recovery-dropout"}
    page = Path(result["report"]).read_text()
    assert page.startswith("<!doctype html>")
    assert "</html>" in page
    best = read_checkpoint(Path(result["run"]))
    assert (best.config.model.dim, best.config.stage_two.epochs) == (16, 1)

    (Path(result["run"]) / "evaluation-test.json").unlink()
    again = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert again.exit_code == 0, again.output
    for text in ("0 written", f"0 stored, {CLIPS} unchanged, 0 failed", "0 searches"):
        assert text in again.stderr
    assert "epoch 1/1" not in again.stderr, "nothing is trained again"
    assert "R²ScP" in again.stdout
    assert max(map(len, again.stdout.splitlines()[:8])) <= 80
    accuracy = result["conditions"]["AV"]["accuracy"]
    assert f"{100 * accuracy:.1f} (" in again.stdout
