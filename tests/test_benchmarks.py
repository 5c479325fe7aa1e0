"""The benchmark runs as README says, does the same clips with every contender, and its ratios are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2scp.model.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.pipelines.demo_corpus import generate

ROOT = Path(__file__).resolve().parents[1]
CLIPS, BROKEN = 3, 1
PATIENCE_S = 300  # for the whole benchmark on a busy machine; takes half a minute


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.extract", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny ImageBind; an untrained one is as fast as any."""
    tower = TowerConfig(width=32, depth=1, heads=2)
    model = ImageBind(ImageBindConfig(vision=tower, audio=tower, text=tower, dim=32, patch=14))
    model.save(tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_help_and_impossible_options_take_one_line():
    shown = run("--help")
    assert shown.returncode == 0
    assert "--num-workers" in shown.stdout
    wrong = run("--encoder", "imagebind-huge", "--weights", "random:0", "--clips", "1")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "--clips" in wrong.stderr


@pytest.mark.slow
def test_every_contender_does_the_clips_that_decode(tmp_path: Path, weights: Path):
    generate(tmp_path / "corpus", clips=CLIPS, seed=1)
    media, written = tmp_path / "corpus" / "videos", tmp_path / "result.json"
    (media / "broken.mp4").write_bytes(b"\0" * 1_000)
    arguments = ("--root", media, "--clips", CLIPS + BROKEN, "--rounds", 2, "--num-workers", 1)
    done = run(*arguments, "--weights", weights, "--json", written)
    assert done.returncode == 0, done.stderr
    result = json.loads(written.read_text())
    found, rounds = result["summary"], result["round_seconds"]
    assert [one["clips"] for one in rounds] == [CLIPS, CLIPS]
    assert result["machine"]["cores"] >= 1
    assert result["versions"]["ray"].startswith("2.")
    speeds = found["clips_per_second"]
    assert all(0 < rate["min"] <= rate["median"] <= rate["max"] for rate in speeds.values())
    for name in (
        "decode alone",
        "embed alone",
        "plain loop",
        "flow",
        "flow, started",
        "ceiling, shared cores",
    ):
        assert name.split(",")[0] in done.stdout
        assert name in speeds
    by_hand = sorted((one["decode"] + one["embed"]) / one["flow"] for one in rounds)
    share = found["of_ceiling"]["ceiling, shared cores"]["flow"]
    assert share["min"] == pytest.approx(by_hand[0], abs=6e-4)
    assert share["max"] == pytest.approx(by_hand[1], abs=6e-4)
    slower = min(CLIPS / one["decode"] for one in rounds), min(CLIPS / one["embed"] for one in rounds)
    assert speeds["ceiling, GPU"]["min"] == pytest.approx(min(slower), abs=6e-4)
    assert found["applies"] in ("ceiling, shared cores", "ceiling, GPU")
