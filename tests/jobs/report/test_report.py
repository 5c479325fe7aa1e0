"""A report shows what the files say, says what is missing and why, and is safe whatever its texts.

A tiny run is trained, evaluated and reported on: the numbers of figures are those of the JSON files, every
section is there or says why not, and invalid files are reported. The page is opened in a browser.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from typer.testing import CliRunner

from r2scp.jobs.cli.main import app
from r2scp.jobs.html.render import page
from r2scp.jobs.ingest.encoders import encoder_spec
from r2scp.jobs.ingest.index import run_index
from r2scp.jobs.report.builder import Section
from r2scp.jobs.report.facts.precision import retrieval_precision
from r2scp.jobs.report.facts.probe import RECOVERY_OFF, TRAINED_WITHOUT, WITH_RECOVERY, Probe, probe
from r2scp.jobs.report.facts.run_folder import (
    INVALID_JSON,
    TEST_EVALUATION,
    read_curves,
    read_runs,
    unique_names,
)
from r2scp.jobs.report.figures.evaluation import (
    accuracy_by_type_figure,
    accuracy_figure,
    missing_rates_figure,
)
from r2scp.jobs.report.figures.evidence import dissonance_figure, joint_vectors_figure
from r2scp.jobs.report.figures.style import COLOURS, Figure, Panel, figure_markup, shorten, write_images
from r2scp.jobs.report.figures.training import expert_loads_figure, study_figure, training_figure
from r2scp.jobs.report.gallery import pick_questions
from r2scp.jobs.report.provenance import commands, nearest_preset
from r2scp.jobs.report.results import _add_notices, _add_study
from r2scp.jobs.report.run import ReportRequest, run_report
from r2scp.jobs.report.store import store_section
from r2scp.jobs.training.checkpoints import BEST, Checkpoint, read_checkpoint, write_checkpoint
from r2scp.jobs.training.config import demo
from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions, data_for, questions_of, run_evaluate
from r2scp.jobs.training.evaluation_table import OURS_TITLE
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.model.r2scp import R2SCP, Stage
from r2scp.pipelines.batches.dataset import MISSING_COLUMN, BatchRequest
from r2scp.pipelines.corpora.formats import open_corpus
from r2scp.pipelines.decoding.decode import DEFAULT_LIMITS, decode_fingerprint
from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.extraction.embed import EmbedClips
from r2scp.pipelines.extraction.plan import PlanOptions, plan_clips
from r2scp.pipelines.extraction.questions import plan_questions, write_questions
from r2scp.pipelines.extraction.stages import DecodeClips, Provenance, StageRows
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.commits import Staged
from r2scp.store.errors import CheckpointError, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import METADATA_COLUMNS, Condition, Modality, Table

pytestmark = pytest.mark.usefixtures("one_thread")

SECTIONS = ["accuracy", "missing-rates", "training", "studies", "vectors", "purity", "store", "provenance"]
HOSTILE = "<script>alert(1)</script>\"'>\x1b[2J\u202egpj\n$a_b$ #0072b2"

Run = tuple[FeatureStore, Path]


class Parsed(HTMLParser):
    """The elements of a page with their attributes, its headings and ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.headings = [int(tag[1]) for tag, _ in self.elements if re.fullmatch(r"h[1-6]", tag)]
        self.ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


@dataclass(frozen=True)
class Report:
    """What `run_report` returned, as JSON, and the page."""

    values: dict[str, Any]
    html: str

    def missing(self, section: str) -> list[dict[str, str]]:
        return [part for part in self.values["missing"] if part["section"] == section]


def make_report(*runs: Path, out: Path, **options: Any) -> Report:
    values = json.loads(json.dumps(run_report(ReportRequest(runs=runs, out=out, **options))))
    return Report(values, out.read_text())


@pytest.fixture(scope="module")
def evaluated(evaluated_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of `evaluated_run` with its evaluation file."""
    store, run = evaluated_run
    copied = Path(shutil.copytree(run, tmp_path_factory.mktemp("evaluated") / "run"))
    evaluation = run_evaluate(store, copied, EvaluateOptions(rates=MISSING_RATES))
    (copied / TEST_EVALUATION).write_text(json.dumps(evaluation, indent=1))
    return store, copied


@pytest.fixture(scope="module")
def probed(evaluated: Run) -> Probe:
    return probe(read_checkpoint(evaluated[1]), evaluated[0])


@pytest.fixture
def own_run(evaluated: Run, tmp_path: Path) -> Path:
    """A copy of the run to change."""
    return Path(shutil.copytree(evaluated[1], tmp_path / "run"))


@pytest.fixture
def run_without_store(own_run: Path, tmp_path: Path) -> Path:
    """A copy of the run whose store no longer exists: its report takes no time."""
    edit_json(own_run / "best.json", lambda values: values["store"].update(uri=str(tmp_path / "gone")))
    return own_run


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_bytes())
    edit(values)
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    """Results of a study of n, as `study` writes them."""
    rng, variants = np.random.default_rng(4), {}
    for n in (10, 1, 3):
        row: dict[str, Any] = {"accuracy": {}, "difference": {}}
        for measure in ("A", "V", "AV", "average"):
            values = rng.uniform(0.4, 0.6, 3)
            spread = {"mean": values.mean(), "sd": values.std(ddof=1), "values": values.tolist()}
            row["accuracy"][measure], row["difference"][measure] = spread, spread
        variants[f"n = {n}"] = row
    names = {"study": "n", "title": "Neighbours n", "asks": "How many?", "split": "val", "against": "n = 3"}
    numbers = {"n": 16, "seeds": [1, 2, 3], "leak_guard": True, "disjoint": False, "code": ["x"]}
    return {**names, **numbers, "variants": variants}


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def report(evaluated: Run, study: dict[str, Any], report_folder: Path) -> Report:
    """A complete report, `r.html`, with image files in `figures`; one study file is invalid."""
    (report_folder / "n.json").write_text(json.dumps(study))
    (report_folder / "invalid.json").write_text(json.dumps(study | {"variants": {}}))
    options = {"store": evaluated[0].uri, "studies": report_folder, "figures": report_folder / "figures"}
    return make_report(evaluated[1], out=report_folder / "r.html", **options)


def test_every_section_is_there_or_says_why_not(report: Report) -> None:
    assert [name for name in report.values["sections"] if name != "gallery"] == SECTIONS
    parsed = Parsed(report.html)
    assert set(SECTIONS) < set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert report.values["bytes"] == len(report.html.encode())
    results = {"accuracy", "accuracy-by-type", "missing-rates", "training", "expert-loads", "study-n"}
    assert results | {"joint-vectors", "purity", "scores", "dissonance"} == set(report.values["figures"])
    absent, invalid = report.missing("studies")
    assert absent["make"].startswith("r2scp-pipe study k --seeds 3")
    assert invalid["what"] == "invalid.json"
    assert "not a file written by study" in invalid["why"]
    assert report.missing("gallery")[0]["why"]  # no clip has a file
    assert all(later - before <= 1 for before, later in pairwise(parsed.headings))


def test_figures_are_written_as_valid_png_and_svg(report: Report, report_folder: Path) -> None:
    folder, names = report_folder / "figures", report.values["figures"]
    assert {path.name for path in folder.iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("png", "svg")
    }
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            image.verify()
            assert round(image.info["dpi"][0]) == 200
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        links = [value for e in root.iter() for key, value in e.attrib.items() if key.endswith("href")]
        assert all(link.startswith("#") for link in links)
        assert any(element.text for element in root.iter("{http://www.w3.org/2000/svg}text"))


def test_accuracies_are_those_of_the_evaluation(evaluated: Run) -> None:
    expected = json.loads((evaluated[1] / TEST_EVALUATION).read_bytes())
    [facts] = read_runs([evaluated[1]], None)
    figure = accuracy_figure([facts])
    assert figure is not None
    rows = {row[1]: row for row in figure.rows}
    assert len(rows) == 1 + len(expected["baselines"])
    for at, condition in enumerate(Condition):
        score = expected["conditions"][condition]
        shares = [100 * share for share in (score["accuracy"], *score["interval"])]
        assert rows[OURS_TITLE][2 + 4 * at : 6 + 4 * at] == pytest.approx([*shares, score["n"]], abs=0.006)
    by_type = accuracy_by_type_figure(facts, 0)
    assert by_type is not None
    ours = {row[1]: row for row in by_type.rows if row[0] == OURS_TITLE}
    assert set(ours) == set(expected["conditions"]["AV"]["types"])
    for kind, score in expected["conditions"]["A"]["types"].items():
        assert ours[kind][2] == pytest.approx(100 * score["accuracy"], abs=0.006)
    rates = missing_rates_figure([facts])
    assert rates is not None
    points = {tuple(row[2:4]): row[4] for row in rates.rows if row[1] == OURS_TITLE}
    for point, score in (
        (("sound", 50), expected["missing_rates"]["audio 50%"]),
        (("sound", 100), expected["conditions"]["V"]),
        (("picture", 0), expected["conditions"]["AV"]),
    ):
        assert points[point] == pytest.approx(100 * score["accuracy"], abs=0.006)


def test_curves_are_those_of_the_log(evaluated: Run) -> None:
    [facts] = read_runs([evaluated[1]], None)
    figure, loads = training_figure([facts]), expert_loads_figure([facts])
    assert figure is not None
    assert loads is not None
    lines = [json.loads(line) for line in (evaluated[1] / "metrics.jsonl").read_text().splitlines()]
    epochs = [line["train"] for line in lines if line["kind"] == "epoch" and line["stage"] == "mixing"]
    ours = [row for row in figure.rows if row[1] == OURS_TITLE and row[2] == "mixing"]
    assert [row[4] for row in ours] == [epoch["loss"] for epoch in epochs]
    assert len({row[1] for row in figure.rows}) == 1 + 3
    assert loads.rows[0][2:5] == [epochs[0].get(f"router/A/{s}") for s in ("audio", "visual", "text")]
    assert sum(loads.rows[-1][2:5]) == pytest.approx(1, abs=1e-3)  # of the evaluation


def test_a_study_is_drawn_in_the_order_of_its_setting(study: dict[str, Any]) -> None:
    figure = study_figure(study)
    assert [row[0] for row in figure.rows][::4] == [1, 3, 10]
    spread = study["variants"]["n = 10"]["accuracy"]["average"]
    row = next(row for row in figure.rows if row[:2] == [10, "average"])
    shares = (spread["mean"], spread["sd"], *spread["values"])
    assert row[2:] == pytest.approx([100 * share for share in shares], abs=0.006)


def test_an_invalid_study_adds_nothing(study: dict[str, Any]) -> None:
    nan = {"mean": np.nan, "sd": np.nan, "values": [np.nan] * 3}
    rows = {"accuracy": {"A": nan}, "difference": {"A": nan}}
    for values in ({}, [study], study | {"variants": {}}, study | {"variants": {"n = 3": rows}}):
        section = Section(name="studies", heading="Studies")
        with pytest.raises(INVALID_JSON):
            _add_study(section, values)  # type: ignore[arg-type]
        assert (section.blocks, section.figures) == ([], [])


def test_joint_vectors_are_what_the_joint_head_classifies(evaluated: Run, probed: Probe) -> None:
    store, run = evaluated
    names = {(WITH_RECOVERY, "A"), (WITH_RECOVERY, "V"), (WITH_RECOVERY, "AV")}
    assert set(probed.outputs) >= names | {(RECOVERY_OFF, "A"), (TRAINED_WITHOUT, "V")}
    checkpoint = read_checkpoint(run)
    model, dataset = checkpoint.model(), data_for(checkpoint, store).dataset(probed.examples)
    rows = np.arange(len(probed.examples))
    for condition, missing in MISSING_COLUMN.items():
        outputs = probed.outputs[WITH_RECOVERY, condition]
        with torch.no_grad():
            answer = model(dataset.batch(rows, BatchRequest.uniform(len(rows), missing)))
            head = model.decoders.joint.classes
            assert head is not None
            joint_BK = head(torch.from_numpy(outputs.joint_QD))
        torch.testing.assert_close(joint_BK, answer.joint_BK, atol=1e-4, rtol=1e-4)
        right = answer.logits_BK.argmax(dim=1).numpy() == probed.examples.target_B
        np.testing.assert_array_equal(outputs.right_Q, right)
    # the same weights without recovery see other sequences
    without = probed.outputs[RECOVERY_OFF, "A"].joint_QD
    assert not np.allclose(probed.outputs[WITH_RECOVERY, "A"].joint_QD, without)
    with torch.no_grad():
        purified = model(dataset.batch(rows, BatchRequest.uniform(len(rows), 0))).evidence.purified[0]
    assert purified is not None
    values, purged = probed.dissonance["audio"]
    assert int(purged.sum()) == int(purified.noise_BL.sum())
    dissonance = purified.dissonance_BL[~purified.dissonance_BL.isnan()].numpy()
    np.testing.assert_allclose(np.sort(values), np.sort(dissonance), atol=1e-5)


def test_dissonance_is_counted_kept_and_purged(probed: Probe) -> None:
    figure = dissonance_figure(probed, 5)
    assert figure is not None
    for missing, (_, purged) in probed.dissonance.items():
        word = {"audio": "sound", "visual": "picture"}[missing]
        for name, count in (("purged", int(purged.sum())), ("kept", int((~purged).sum()))):
            assert sum(row[4] for row in figure.rows if row[:2] == [word, name]) == count
        assert purged.any()


def test_the_same_run_gives_the_same_numbers_and_figure(evaluated: Run, probed: Probe) -> None:
    again = probe(read_checkpoint(evaluated[1]), evaluated[0])
    first, second = joint_vectors_figure(probed), joint_vectors_figure(again)
    assert first is not None
    assert second is not None
    assert first.rows == second.rows
    assert figure_markup(first) == figure_markup(second)


def test_only_the_validation_split_is_probed(evaluated: Run, probed: Probe) -> None:
    questions = evaluated[0].questions(["question_id", "split"]).to_pylist()
    splits = {row["question_id"]: row["split"] for row in questions}
    assert {splits[question_id] for question_id in probed.examples.question_ids} == {"val"}


def test_precision_counts_the_neighbours_of_the_run(evaluated: Run) -> None:
    store, run = evaluated
    data = data_for(read_checkpoint(run), store)
    examples = questions_of(data, "val")
    precision = retrieval_precision(data, examples)
    rows = store.neighbours(["clip_id", "missing", "nearest_ids", "nearest_own_source"]).to_pylist()
    labels = {row["clip_id"]: row["labels"][0] for row in store.clips(["clip_id", "labels"]).to_pylist()}
    queries = {data.clips.ids[row] for row in examples.clip_row_B}
    agree = [
        labels[row["clip_id"]] == labels[hit]
        for row in rows
        if row["missing"] == "audio" and row["clip_id"] in queries
        for hit in row["nearest_ids"]
    ]
    share = precision.agreements["label", "audio", "nearest"].share()
    assert (share.pairs, share.share) == (len(agree), pytest.approx(np.mean(agree)))
    assert share.share > share.chance
    own = [row["nearest_own_source"] for row in rows if row["missing"] == "visual"]
    assert precision.same_source["visual"]["nearest"] == (sum(own), sum(n > 0 for n in own), len(own))


def test_a_missing_evaluation_names_the_command_that_makes_it(
    run_without_store: Path, tmp_path: Path
) -> None:
    """Logs and the store are missing too; the report is still written."""
    run = run_without_store
    (run / TEST_EVALUATION).unlink()
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "baselines")
    shutil.rmtree(run / "experts", ignore_errors=True)
    report = make_report(run, out=tmp_path / "r.html")
    [part] = report.missing("accuracy")
    assert part["make"].startswith(f"r2scp-pipe evaluate {run} --missing-rates --store ")
    assert "r2scp-pipe evaluate" in report.html
    assert "Not evaluated yet" in report.html
    assert not (run / TEST_EVALUATION).exists()
    assert all(map(report.missing, ("training", "vectors", "purity", "gallery", "store")))


def test_an_invalid_evaluation_is_reported(own_run: Path) -> None:
    parts = b'{"split": "test", "baselines": {}, "settings": {}}'
    for content in (b"", b"{", b'{"conditions": 3}', parts, b"\xed\xa0\x80"):
        (own_run / TEST_EVALUATION).write_bytes(content)
        [facts] = read_runs([own_run], None)
        assert facts.evaluation is None
        [part] = [part for part in facts.missing if part.section == "accuracy"]
        assert "evaluation-test.json was not written by evaluate" in part.why


def test_invalid_lines_of_a_log_are_left_out_and_reported(own_run: Path, tmp_path: Path) -> None:
    path = own_run / "metrics.jsonl"
    before = read_curves(path)
    with path.open("ab") as file:
        file.write(b'{"kind": "epoch", "stage": "mixing", "epo\n\xff\xfe\n3\n[]\n')
        file.write(b'{"kind": "epoch", "stage": "mixing"}\n')
    after = read_curves(path)
    assert (after.epochs, after.invalid_lines) == (before.epochs, 5)
    [facts] = read_runs([own_run], None)
    assert any("5 lines" in part.why for part in facts.missing)
    assert read_curves(tmp_path / "nowhere").epochs == []


def test_what_is_not_a_run_or_a_store_is_refused(own_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one run"):
        run_report(ReportRequest(runs=()))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run_report(ReportRequest(runs=(tmp_path,)))
    with pytest.raises(StoreError, match="no store"):
        run_report(ReportRequest(runs=(own_run,), store=str(tmp_path / "none")))


def test_the_limits_of_an_evaluation_are_named(own_run: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["checkpoint"]["sha256"] = "0" * 64
        values["settings"]["leak_guard"] = False
        values |= {"unfinished": ["r2scp"], "latest": True}

    edit_json(own_run / TEST_EVALUATION, edit)
    section = Section(name="accuracy", heading="Accuracy")
    _add_notices(section, *read_runs([own_run], None))
    notices = "\n".join(str(block["text"]) for block in section.blocks)
    for words in ("another checkpoint", "WITHOUT the leak guard", "had not finished", "latest store version"):
        assert words in notices


def test_several_runs_are_compared(evaluated: Run, own_run: Path, tmp_path: Path) -> None:
    edit_json(own_run / "best.json", lambda values: values["config"].update(seed=8))
    report = make_report(evaluated[1], own_run, out=tmp_path / "r.html", gallery=0)
    assert {"accuracy-by-type-1", "accuracy-by-type-2"} < set(report.values["figures"])
    first, second = unique_names([evaluated[1], own_run])
    assert first != second  # both folders are called "run"
    assert second in report.html
    assert f"The figure shows {first}; the table has all runs." in report.html
    assert f"This section is about {first}; the other 1 are not shown here." in report.html
    assert "The runs differ only in their seed." in report.html
    ids = Parsed(report.html).ids
    assert len(ids) == len(set(ids))
    assert len(set(unique_names([own_run, own_run]))) == 2


def check_inert(html: str) -> None:
    elements = Parsed(html).elements
    assert sum(tag == "script" for tag, _ in elements) == 1
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert not {"\x1b", "\u202e"} & set(html)
    assert "&lt;script&gt;alert(1)" in html


def test_hostile_names_are_inert(run_without_store: Path, tmp_path: Path) -> None:
    """In question types, baselines and folders; in page and SVG."""

    def edit(values: dict[str, Any]) -> None:
        for model in (values, *values["baselines"].values()):
            for condition in model["conditions"].values():
                condition["types"] = {HOSTILE + kind: score for kind, score in condition["types"].items()}
        values["baselines"][HOSTILE] = values["baselines"]["no-recovery"]

    edit_json(run_without_store / TEST_EVALUATION, edit)
    (run_without_store / "evaluation-<b>.json").write_text("{}")
    run = run_without_store.rename(tmp_path / "<img src=x onerror=alert(1)> run")
    report = make_report(run, out=tmp_path / "r.html")
    check_inert(report.html)
    assert not any(tag == "img" for tag, _ in Parsed(report.html).elements)
    assert "#0072b2" in report.html.partition("</style>")[2]  # the name of a colour in a text stays
    [facts] = read_runs([run], None)
    for figure in (accuracy_figure([facts]), accuracy_by_type_figure(facts, 0)):
        assert figure is not None
        _, svg = write_images(figure, tmp_path)
        tags = [element.tag for element in ElementTree.parse(svg).getroot().iter()]
        assert not [tag for tag in tags if tag.endswith(("script", "a", "foreignObject", "image"))]


def test_names_in_figures_are_short_and_printable() -> None:
    assert shorten("a" * 99) == "a" * 29 + "…"
    assert shorten(" \n") == "(none)"
    assert shorten("x\u202ey") == "x\\u202ey"


def test_colours_of_a_panel_follow_the_page(tmp_path: Path) -> None:
    def draw(ax: Axes) -> None:
        for at, colour in enumerate(COLOURS):
            ax.plot([0, 1], [at, at], color=colour)
        ax.set_title("$x_1$ 字 <b> #0072b2")

    texts = {"name": "some", "title": "t", "caption": "c", "alt": "a"}
    figure = Figure(**texts, panels=[Panel(draw=draw)] * 2, columns=[], rows=[])
    markup = str(figure_markup(figure))
    for at in range(1, len(COLOURS) + 1):
        assert f"var(--hue-{at})" in markup
    assert not any(re.search(r"#[0-9a-f]{6}", style) for style in re.findall(r'style="([^"]*)"', markup))
    assert "$x_1$ 字 &lt;b&gt; #0072b2" in markup  # unchanged, and not a formula
    ids = Parsed(markup).ids
    assert len(ids) == len(set(ids))
    first, second = (write_images(figure, tmp_path / name) for name in ("one", "two"))
    assert first[1].read_bytes() == second[1].read_bytes()


def test_commands_reproduce_the_settings(evaluated: Run) -> None:
    [facts] = read_runs([evaluated[1]], None)
    assert facts.checkpoint is not None
    index, train, evaluate = commands(facts, facts.checkpoint)
    assert "--neighbours 4" in index
    assert "--set" in train
    assert "--missing-rates" in evaluate
    name, changed = nearest_preset(facts.checkpoint.config)
    assert f"--preset {name}" in train
    assert {"model.dim", "batch_size"} <= {difference[0] for difference in changed}
    assert nearest_preset(demo(16, 6)) == ("demo", [])


def test_the_command_line(run_without_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    result = CliRunner().invoke(app, ["report", str(run_without_store), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (Path(values["report"]), values["bytes"]) == (out, out.stat().st_size)
    assert f"Saved to {out}" in result.stderr
    failed = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert failed.exit_code == 1
    assert len(failed.stderr.splitlines()) == 1


def test_a_model_without_recovery_is_reported(own_run: Path, tmp_path: Path) -> None:
    """The folder of a baseline is a run too."""
    report = make_report(own_run / "baselines" / "no-recovery", out=tmp_path / "r.html", gallery=0)
    assert "retrieves nothing" in report.missing("purity")[0]["why"]
    assert "joint-vectors" in report.values["figures"]


def test_the_store_section_counts_and_shows_hostile_rows(
    evaluated: Run, copy: Callable, write: Callable
) -> None:
    store, now = copy(evaluated[0]), datetime(2026, 1, 31, tzinfo=UTC)
    failure = {"corpus": HOSTILE, "stage": "decode", "attempts": 1, "at": now, "uri": HOSTILE}
    reasons = ["corrupt", "corrupt", "corrupt", "corrupt", "timeout"]
    rows = [{"clip_id": f"{HOSTILE}{at}", "reason": reason} for at, reason in enumerate(reasons)]
    write(store, Table.FAILURES, [failure | {"detail": HOSTILE} | row for row in rows])
    pair = {"query": "audio", "among": "visual", "queries": 64, "at_3": 0.97, "at_10": 0.95, "p50_ms": 1.5}
    counts = json.dumps({"recall": {"all": [pair]}, "due": [HOSTILE]})
    run = {"run_id": f"reindex-{HOSTILE}", "kind": "reindex", "status": "done", "counts": counts}
    store.record_run(run | {"started_at": now, "ended_at": now})
    store.name_snapshot("before")
    section = store_section(store)
    tables: dict[str, Any] = {str(b["caption"]): b["rows"] for b in section.blocks if b["kind"] == "table"}
    by_caption = {caption.split(",")[0]: rows for caption, rows in tables.items()}
    assert [row[:2] for row in by_caption["Failures by reason"]] == [["corrupt", 4], ["timeout", 1]]
    assert len(tables["Failures, up to 3 per reason"]) == 3 + 1
    assert by_caption["Recall of the vector index"] == [["all", *pair.values()]]
    assert "Snapshots" in tables
    checks = {row[0]: row[1:] for row in tables["Checks"]}
    questions = [values for name, values in checks.items() if name.startswith("questions")]
    assert questions == [[2, "no"]]  # of `odd_questions`
    check_inert(page("report.html", {"title": "t", "lede": "", "links": [], "sections": [section]}))


def test_a_model_of_choices_is_reported(
    quick_plan: Callable[..., TrainPlan], learnable_store: FeatureStore, tmp_path: Path
) -> None:
    """Questions with choices, and a part of the train split held out for validation."""
    run = tmp_path / "run"
    model = replace(quick_plan(run).config.model, classes=None)
    run_training(
        quick_plan(run, corpora=("avqa",), holdout=0.4, model=model), TrainOptions(threads=1), lambda *_: None
    )
    probed = probe(read_checkpoint(run), learnable_store)
    assert set(probed.answers) <= {f"kind {kind}" for kind in range(4)}
    questions = learnable_store.questions(["question_id", "answer"]).to_pylist()
    answers = {row["question_id"]: row["answer"] for row in questions}
    assert probed.answers == [answers[question_id] for question_id in probed.examples.question_ids]
    assert (TRAINED_WITHOUT, "A") not in probed.outputs  # no baseline was trained
    assert "purity" in make_report(run, out=tmp_path / "r.html", gallery=1).values["figures"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Generated clips with their files in a store, and an untrained model for them."""
    folder = tmp_path_factory.mktemp("real")
    generate(folder / "corpus", clips=12, seed=3)
    spec = encoder_spec("imagebind-demo", None, "cpu")
    store = FeatureStore.create(str(folder / "store"), spec.fingerprint, spec.dim)
    corpus = open_corpus("demo", folder / "corpus")
    plan = plan_clips(corpus, {}, PlanOptions(decode_fingerprint=decode_fingerprint()))
    addresses = store.address(Table.CLIPS), store.address(Table.FAILURES)
    stage = StageRows(*addresses, Provenance.of("run", spec.fingerprint, None))
    embed = EmbedClips(spec, threads=1)
    for part in DecodeClips(DEFAULT_LIMITS, None)(plan.sources):
        store.commit(Table.CLIPS, [Staged.from_json(stage(embed(part))["stored"][0].as_py())], {})
    write_questions(plan_questions(corpus, store), store, spec, "run")
    run_index(store, IndexSettings(), lambda *_: None)
    answers = sorted(set(store.questions(["answer"])["answer"].to_pylist()))
    config = demo(store.dim, len(answers))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = R2SCP(config.model).set_stage(Stage.MIXING)
    versions = {name: store.versions()[name] for name in ("clips", "questions", "neighbours")}
    origin = {"uri": store.uri, "fingerprint": store.fingerprint, "dim": store.dim, "versions": versions}
    at: dict[str, Any] = {"stage": Stage.MIXING, "epoch": 1, "step": 1, "metrics": {}, "best": {}, "code": ""}
    (folder / "run").mkdir()
    write_checkpoint(
        folder / "run", [BEST], Checkpoint(config=config, answers=answers, store=origin, **at), model, {}
    )
    return store, folder / "run"


def test_the_gallery_shows_real_answers(real: Run, tmp_path: Path, open_page: Callable[..., Any]) -> None:
    report = make_report(real[1], out=tmp_path / "r.html", gallery=3)
    assert not report.missing("gallery")
    assert report.html.count('class="answer"') == 3
    assert report.html.count(" removed. Correct answer: ") == 3
    assert report.html.count("data:image/webp") > 3
    opened = open_page(tmp_path / "r.html", 360, "dark")
    check_layout(opened)
    assert opened.ask("[...document.images].every(one => one.complete && one.naturalWidth > 0)")


def test_the_gallery_uses_the_weights_it_is_given(real: Run, tmp_path: Path, tiny_weights: Path) -> None:
    """Those of another encoder are refused, which shows that they were read."""
    report = make_report(real[1], out=tmp_path / "r.html", gallery=1, weights=str(tiny_weights))
    [part] = report.missing("gallery")
    assert "name the encoder that filled it (--encoder, --weights)" in part["why"]


def test_the_gallery_alternates_right_and_wrong(
    real: Run, copy: Callable[[FeatureStore], FeatureStore]
) -> None:
    checkpoint = read_checkpoint(real[1])
    probed = probe(checkpoint, real[0])
    questions, available = pick_questions(probed, 4)
    assert available == len(probed.examples)
    assert {question.request.missing for question in questions} == set(Modality)
    for question in questions:
        at = probed.examples.question_ids.index(question.request.id)
        condition = Condition.without(Modality(question.request.missing))
        assert question.right == probed.outputs[WITH_RECOVERY, condition].right_Q[at]
        assert question.answer == probed.answers[at]
        assert Path(question.request.video).is_file()
    assert len({question.request.id for question in questions}) == len(questions)
    assert pick_questions(probed, 4) == (questions, available)

    # names that no file can have
    store = copy(real[0])
    rows = store.clips(["clip_id", *METADATA_COLUMNS], "split = 'val'").to_pylist()
    names = zip(rows, ("a" * 5000, "a\0b"), strict=False)
    store.update_metadata([row | {"uri": name} for row, name in names], {})
    pins = {name: store.versions()[name] for name in ("clips", "questions", "neighbours")}
    renamed = replace(checkpoint, store=checkpoint.store | {"versions": pins})
    questions, available = pick_questions(probe(renamed, store), 4)
    assert available == len(questions)


def check_layout(opened: Any) -> None:
    """No errors, no requests, every panel visible, nothing wider than the page."""
    assert (opened.errors, opened.page_errors, opened.requests, opened.dialogs) == ([], [], [], [])
    boxes = opened.ask(
        "[...document.querySelectorAll('.panel svg')].map(one => {const b = one.getBoundingClientRect();"
        "return [b.width, b.height, b.left, b.right]})"
    )
    page_width = opened.ask("document.documentElement.clientWidth")
    assert boxes
    for width, height, left, right in boxes:
        assert min(width, height) > 80
        assert left >= 0
        assert right <= page_width + 1
    assert opened.ask("document.documentElement.scrollWidth") <= page_width
    ink = opened.ask("getComputedStyle(document.querySelector('.panel svg text')).fill")
    paper = opened.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert abs(brightness(ink) - brightness(paper)) > 120


def brightness(colour: str) -> float:
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))


def test_the_page_in_a_browser(report: Report, report_folder: Path, open_page: Callable[..., Any]) -> None:
    for width, scheme in ((1280, "dark"), (360, "light")):
        opened = open_page(report_folder / "r.html", width, scheme)
        check_layout(opened)
        figures = opened.ask("document.querySelectorAll('figure.plate').length")
        assert figures == len(report.values["figures"])
    assert opened.ask("[...document.querySelectorAll('[role=img]')].every(one => one.ariaLabel)")
