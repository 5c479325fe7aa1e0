"""Benchmarks compare fairly: in turns, ratios within a round, a reason for each peer that cannot run."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.__main__ import NAMES
from benchmarks.contest import Grade, Report, Row, Sheet, Spread, contest, ratios, run, show, timed
from r2scp.model.imagebind.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.pipelines.demo.corpus import generate
from r2scp.store.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
CLIPS, BROKEN = 3, 1
PATIENCE_S = 300  # for the whole benchmark on a busy machine; takes half a minute


def test_contenders_take_turns_and_another_begins_each_round():
    turns: list[str] = []
    contest({name: lambda name=name: turns.append(name) for name in "abc"}, rounds=3)
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab", "first a warm-up, then the rounds"


def test_one_that_cannot_run_is_out_with_its_reason_and_the_others_go_on():
    def fails() -> None:
        raise OSError("no such\nlibrary " + "x" * 500)

    seconds = contest({"good": lambda: 2.0, "bad": fails}, rounds=2)
    assert seconds["good"] == [2.0, 2.0]
    assert seconds["bad"].startswith("OSError: no such library x")  # pyright: ignore[reportAttributeAccessIssue]
    assert len(seconds["bad"]) <= 160
    calls = iter([None, None])
    with pytest.raises(StopIteration):  # a contender that fails in the midst is no result
        contest({"late": lambda: next(calls)}, rounds=2)


def test_a_contender_may_say_how_long_it_took():
    assert timed(lambda: 12.5) == 12.5
    assert 0 <= timed(lambda: 3) < 3, "a count is no time"


def test_ratios_are_taken_within_each_round():
    spread = ratios([2.0, 30.0, 4.0], [1.0, 10.0, 8.0])
    assert (spread.median, spread.least, spread.most) == (2.0, 0.5, 3.0)
    assert str(Spread.of([1234.4, 0.01234, 12.34])) == "12.3 (0.012 – 1,234)"


def test_grades_know_their_direction():
    assert Grade(what="share", goal=0.9, reached=0.9).met
    assert not Grade(what="share", goal=0.9, reached=0.89).met
    assert Grade(what="s", goal=0.5, reached=0.4, at_most=True).met
    assert not Grade(what="s", goal=0.5, reached=0.6, at_most=True).met


def test_the_table_tells_every_figure_reason_and_goal(tmp_path: Path):
    rows = [
        Row(name="ours", figures={"s": Spread.of([1.0, 2.0, 3.0]), "hits": 12_345}),
        Row(name="theirs", unable="ImportError: [red]none[/red]"),
    ]
    report = Report(
        sheets=[Sheet(title="A title", rows=rows)],
        grades=[Grade(what="speed", goal=2.0, reached=1.0)],
        settings={"clips": 7},
    )
    out = Console(width=160, markup=False, record=True, file=io.StringIO())
    show(report, {"machine": {"cores": 2}}, out)
    text = out.export_text()
    for words in (
        "A title",
        "2.00 (1.00 – 3.00)",
        "12,345",
        "[red]none[/red]",
        "not met",
        "cores 2",
        "clips 7",
    ):
        assert words in text
    written = tmp_path / "out.json"
    assert run("x", "", lambda parser: None, lambda options: report, ["--json", str(written)]) == 0
    written_json = json.loads(written.read_text())
    assert written_json["sheets"][0]["rows"][0]["figures"]["s"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert written_json["grades"] == [{"what": "speed", "goal": 2.0, "reached": 1.0, "at_most": False}]


def test_bad_options_and_errors_are_one_line(capsys: pytest.CaptureFixture[str]):
    def never(options: object) -> Report:
        raise UsageError("clips must be more")

    assert run("x", "", lambda parser: None, never, ["--rounds", "0"]) == 2
    assert "--rounds must be at least 1; got 0" in capsys.readouterr().err
    assert run("x", "", lambda parser: None, never, []) == 2
    assert capsys.readouterr().err == "error: clips must be more\n"


def module(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_stands_alone_without_peers(name: str):
    shown = module(f"benchmarks.{name}", "--help")
    assert shown.returncode == 0, shown.stderr
    for option in ("--short", "--rounds", "--json"):
        assert option in shown.stdout
    assert (ROOT / "docs" / "PERFORMANCE.md").read_text().count(f"python -m benchmarks.{name}") >= 1


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny ImageBind; an untrained one is as fast as any."""
    tower = TowerConfig(width=32, depth=1, heads=2)
    model = ImageBind(ImageBindConfig(vision=tower, audio=tower, text=tower, dim=32, patch=14))
    model.save(tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.mark.slow
def test_extraction_is_compared_on_the_clips_that_decode(tmp_path: Path, weights: Path):
    generate(tmp_path / "corpus", clips=CLIPS, seed=1)
    media, written = tmp_path / "corpus" / "videos", tmp_path / "result.json"
    (media / "broken.mp4").write_bytes(b"\0" * 1_000)
    arguments = ("--root", media, "--clips", CLIPS + BROKEN, "--rounds", 2, "--cores", 1)
    done = module("benchmarks.extract", *arguments, "--weights", weights, "--json", written)
    assert done.returncode == 0, done.stderr
    result = json.loads(written.read_text())
    assert result["machine"]["cores"] >= 1
    assert result["settings"]["cores used"] == 1
    rows = {row["name"]: row for row in result["sheets"][0]["rows"]}
    for name in ("decode alone", "embed alone", "plain loop", "flow"):
        rate = rows[name]["figures"]["all"]
        assert 0 < rate["least"] <= rate["median"] <= rate["most"]
    one, other = (rows[name]["figures"]["all"] for name in ("decode alone", "embed alone"))
    ceiling = rows["ceiling, shared cores"]["figures"]["all"]
    slowest, quickest = (1 / (1 / one[end] + 1 / other[end]) for end in ("least", "most"))
    assert slowest * 0.999 <= ceiling["median"] <= quickest * 1.001
    for name in ("Daft", "Pixeltable"):
        assert rows[name]["unable"] or rows[name]["figures"]["all"]["median"] > 0
