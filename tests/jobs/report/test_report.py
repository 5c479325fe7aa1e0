"""A report shows what the files say, says what is missing and why, and nothing from outside steers it.

A tiny run is trained, evaluated and reported on: figures' numbers are those of the JSON beside them, every
section is there or says why not, files that are broken or half written are told of. The page is opened in a
browser, wide and narrow.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
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
from r2scp.jobs.ingest.encoders import encoder_spec
from r2scp.jobs.ingest.index import run_index
from r2scp.jobs.report.facts.precision import retrieval_precision
from r2scp.jobs.report.facts.probe import RECOVERY_OFF, TRAINED_WITHOUT, WITH_RECOVERY, probe
from r2scp.jobs.report.facts.run_folder import TEST_EVALUATION, read_curves, read_runs, unique_names
from r2scp.jobs.report.figures import evaluation as report_figures
from r2scp.jobs.report.figures import training as report_curves
from r2scp.jobs.report.figures.evidence import dissonance, joint_vectors_figure
from r2scp.jobs.report.figures.style import COLOURS, Figure, Panel, figure_markup, shorten, write_images
from r2scp.jobs.report.gallery import pick
from r2scp.jobs.report.provenance import commands, nearest_preset
from r2scp.jobs.report.run import ReportRequest, run_report
from r2scp.jobs.report.store import store_section
from r2scp.jobs.training.checkpoints import BEST, Checkpoint, read_checkpoint, write_checkpoint
from r2scp.jobs.training.config import demo
from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions, data_for, questions_of, run_evaluate
from r2scp.jobs.training.evaluation_table import OURS
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
from r2scp.store.feature_store import METADATA_COLUMNS, FeatureStore
from r2scp.store.schema import Condition, Modality, Table

pytestmark = pytest.mark.usefixtures("one_thread")

SECTIONS = ["accuracy", "missing-rates", "training", "studies", "vectors", "purity", "store", "provenance"]
HOSTILE = "<script>alert(1)</script>\"'>\x1b[2J\u202egpj\n$a_b$ #0072b2"
NUMBERS = re.compile(r"-?\d+\.\d+|-?\d+")


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text of each section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))

    @property
    def ids(self) -> list[str]:
        return [str(attrs["id"]) for _, attrs in self.tags if "id" in attrs]


@pytest.fixture(scope="module")
def evaluated(
    evaluated_run: tuple[FeatureStore, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FeatureStore, Path]:
    """`evaluated_run` of one's own, with its evaluation kept as `evaluate` keeps it."""
    store, run = evaluated_run
    mine = Path(shutil.copytree(run, tmp_path_factory.mktemp("evaluated") / "run"))
    report = run_evaluate(store, mine, EvaluateOptions(rates=MISSING_RATES))
    (mine / TEST_EVALUATION).write_text(json.dumps(report, indent=1))
    return store, mine


@pytest.fixture
def own_run(evaluated: tuple[FeatureStore, Path], tmp_path: Path) -> Path:
    """A copy of the run to break."""
    return Path(shutil.copytree(evaluated[1], tmp_path / "run"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results of a study of n, as `study` writes them."""
    rng, variants = np.random.default_rng(4), {}
    for n in (10, 1, 3):
        row: dict[str, Any] = {"accuracy": {}, "difference": {}}
        for measure in ("A", "V", "AV", "average"):
            values = rng.uniform(0.4, 0.6, 3)
            spread = {"mean": values.mean(), "sd": values.std(ddof=1), "values": values.tolist()}
            row["accuracy"][measure], row["difference"][measure] = spread, spread
        variants[f"n = {n}"] = row
    folder = tmp_path_factory.mktemp("studies")
    told = {
        "study": "n",
        "title": "Neighbours n",
        "asks": "How many?",
        "split": "val",
        "n": 16,
        "seeds": [1, 2, 3],
    }
    told |= {"against": "n = 3", "variants": variants, "leak_guard": True, "disjoint": False, "code": ["x"]}
    (folder / "n.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def made(
    evaluated: tuple[FeatureStore, Path], study: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str, Path]:
    """A whole report: what was told, the page, where the figures are."""
    folder = tmp_path_factory.mktemp("made")
    wanted = ReportRequest(
        runs=(evaluated[1],),
        store=evaluated[0].uri,
        studies=study,
        out=folder / "r.html",
        figures=folder / "figures",
    )
    told = json.loads(json.dumps(run_report(wanted)))
    return told, (folder / "r.html").read_text(), folder


def test_every_section_is_there_or_says_why_not(made: tuple[dict[str, Any], str, Path]) -> None:
    told, html, _ = made
    assert [name for name in told["sections"] if name != "gallery"] == SECTIONS
    page = Page(html)
    assert set(SECTIONS) < set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert told["bytes"] == len(html.encode())
    for name in ("accuracy", "accuracy-by-type", "missing-rates", "training", "expert-loads", "study-n"):
        assert name in told["figures"]
    for name in ("joint-vectors", "purity", "scores", "dissonance"):
        assert name in told["figures"]
    lacks = {(gap["section"], gap["make"].split(" --")[0]) for gap in told["missing"]}
    # no study of k was made, and no file of a clip exists
    assert ("studies", "r2scp-pipe study k") in lacks
    assert ("gallery", "") in lacks
    for gap in told["missing"]:
        assert gap["why"]
    assert all(later - before <= 1 for before, later in zip(page.headings, page.headings[1:], strict=False))


def test_the_page_is_whole_in_itself(made: tuple[dict[str, Any], str, Path]) -> None:
    html = made[1]
    for tag, attrs in Page(html).tags:
        assert tag not in ("iframe", "object", "embed", "form", "base")
        for name in ("src", "href"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "http://" not in html.replace("http://www.w3.org/", "")
    assert "https://" not in html


def test_figures_are_written_and_valid(made: tuple[dict[str, Any], str, Path]) -> None:
    told, _, folder = made
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(
        f"{name}.{kind}" for name in told["figures"] for kind in ("png", "svg")
    )
    for name in told["figures"]:
        with Image.open(folder / "figures" / f"{name}.png") as image:
            image.verify()
            assert round(image.info["dpi"][0]) == 200
        root = ElementTree.parse(folder / "figures" / f"{name}.svg").getroot()
        links = [value for e in root.iter() for key, value in e.attrib.items() if key.endswith("href")]
        assert all(link.startswith("#") for link in links)
        assert any(element.text for element in root.iter("{http://www.w3.org/2000/svg}text"))


def test_accuracies_are_those_of_the_evaluation(evaluated: tuple[FeatureStore, Path]) -> None:
    said = json.loads((evaluated[1] / TEST_EVALUATION).read_bytes())
    [facts] = read_runs([evaluated[1]], None)
    drawing = report_figures.accuracy([facts])
    assert drawing is not None
    rows = {row[1]: row for row in drawing.rows}
    assert len(rows) == 1 + len(said["baselines"])  # the baselines beside ours
    for at, condition in enumerate(Condition):
        score = said["conditions"][condition]
        low, high = score["interval"]
        expected = [100 * score["accuracy"], 100 * low, 100 * high, score["n"]]
        assert rows[OURS][2 + 4 * at : 6 + 4 * at] == pytest.approx(expected, abs=0.006)
    by_type = report_figures.accuracy_by_type_figure(facts, 0)
    assert by_type is not None
    mine = {row[1]: row for row in by_type.rows if row[0] == OURS}
    assert set(mine) == set(said["conditions"]["AV"]["types"])
    for kind, score in said["conditions"]["A"]["types"].items():
        assert mine[kind][2] == pytest.approx(100 * score["accuracy"], abs=0.006)
    rates = report_figures.missing_rates([facts])
    assert rates is not None
    told = {(row[1], row[2], row[3]): row[4] for row in rates.rows}
    assert told[OURS, "sound", 50] == pytest.approx(
        100 * said["missing_rates"]["audio 50%"]["accuracy"], abs=0.006
    )
    assert told[OURS, "sound", 100] == pytest.approx(100 * said["conditions"]["V"]["accuracy"], abs=0.006)
    assert told[OURS, "picture", 0] == pytest.approx(100 * said["conditions"]["AV"]["accuracy"], abs=0.006)


def test_curves_are_those_of_the_log(evaluated: tuple[FeatureStore, Path]) -> None:
    [facts] = read_runs([evaluated[1]], None)
    drawing = report_curves.training([facts])
    assert drawing is not None
    lines = [json.loads(line) for line in (evaluated[1] / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    mine = [row for row in drawing.rows if row[1] == OURS and row[2] == "mixing"]
    assert [row[4] for row in mine] == [line["train"]["loss"] for line in epochs if line["stage"] == "mixing"]
    assert len({row[1] for row in drawing.rows}) == 1 + 3
    loads = report_curves.expert_loads_figure([facts])
    assert loads is not None
    first = next(line for line in epochs if line["stage"] == "mixing")
    assert loads.rows[0][2:5] == [first["train"].get(f"router/A/{s}") for s in ("audio", "visual", "text")]
    assert sum(w for w in loads.rows[-1][2:5]) == pytest.approx(1, abs=1e-3)  # of the evaluation


def test_a_study_is_drawn_in_the_order_of_its_number(study: Path) -> None:
    told = json.loads((study / "n.json").read_bytes())
    drawing = report_curves.study_figure(told)
    assert [row[0] for row in drawing.rows][::4] == [1, 3, 10]
    spread = told["variants"]["n = 10"]["accuracy"]["average"]
    row = next(row for row in drawing.rows if row[:2] == [10, "average"])
    assert row[2:] == pytest.approx(
        [100 * x for x in (spread["mean"], spread["sd"], *spread["values"])], abs=0.006
    )


@pytest.mark.parametrize("how", ["no variant", "no number", "no object"])
def test_a_study_that_is_none_is_told_of_and_leaves_nothing(
    own_run: Path, study: Path, tmp_path: Path, how: str
) -> None:
    told = json.loads((study / "n.json").read_bytes())
    if how == "no variant":
        told["variants"] = {}
    if how == "no number":
        told["variants"]["n = 3"]["accuracy"]["A"] = {"mean": np.nan, "sd": np.nan, "values": [np.nan] * 3}
    (tmp_path / "n.json").write_text(json.dumps([told] if how == "no object" else told))
    out, figures = tmp_path / "r.html", tmp_path / "figures"
    wanted = ReportRequest(runs=(own_run,), studies=tmp_path, out=out, figures=figures, gallery=0)
    report = run_report(wanted)
    [why] = [gap["why"] for gap in report["missing"] if gap["what"] == "n.json"]  # pyright: ignore
    assert "not what a study writes" in why
    assert "study-n" not in report["figures"]  # pyright: ignore


def test_joint_vectors_are_what_the_joint_head_answers_from(evaluated: tuple[FeatureStore, Path]) -> None:
    store, run = evaluated
    checkpoint = read_checkpoint(run)
    found = probe(checkpoint, store)
    assert set(found.outputs) >= {(WITH_RECOVERY, "A"), (WITH_RECOVERY, "V"), (WITH_RECOVERY, "AV"), (RECOVERY_OFF, "A"), (TRAINED_WITHOUT, "V")}
    opened = data_for(checkpoint, store)
    model, dataset = checkpoint.model(), opened.dataset(found.examples)
    rows = np.arange(len(found.examples))
    for condition, missing in MISSING_COLUMN.items():
        with torch.no_grad():
            answer = model(dataset.batch(rows, BatchRequest.uniform(len(rows), missing)))
            head = model.decoders.joint.classes
            assert head is not None
            joint_BK = head(torch.from_numpy(found.outputs[WITH_RECOVERY, condition].joint_QD))
        torch.testing.assert_close(joint_BK, answer.joint_BK, atol=1e-4, rtol=1e-4)
        right = answer.logits_BK.argmax(dim=1).numpy() == found.examples.target_B
        np.testing.assert_array_equal(found.outputs[WITH_RECOVERY, condition].right_Q, right)
    # with its recovery off the same weights see other sequences
    assert not np.allclose(found.outputs[WITH_RECOVERY, "A"].joint_QD, found.outputs[RECOVERY_OFF, "A"].joint_QD)
    with torch.no_grad():
        noted = model(dataset.batch(rows, BatchRequest.uniform(len(rows), 0))).evidence.purified[0]
    assert noted is not None
    values, purged = found.dissonance["audio"]
    assert int(purged.sum()) == int(noted.noise_BL.sum())
    np.testing.assert_allclose(
        np.sort(values), np.sort(noted.dissonance_BL[~noted.dissonance_BL.isnan()].numpy()), atol=1e-5
    )


def test_the_same_run_gives_the_same_numbers_and_picture(evaluated: tuple[FeatureStore, Path]) -> None:
    store, run = evaluated
    first, second = (joint_vectors_figure(probe(read_checkpoint(run), store)) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.rows == second.rows
    assert figure_markup(first) == figure_markup(second)


def test_the_test_split_is_not_asked(evaluated: tuple[FeatureStore, Path], tmp_path: Path) -> None:
    """Without any test question in the store the report is the same."""
    store, run = evaluated
    found = probe(read_checkpoint(run), store)
    asked = set(found.examples.question_ids)
    splits = {
        row["question_id"]: row["split"] for row in store.questions(["question_id", "split"]).to_pylist()
    }
    assert {splits[one] for one in asked} == {"val"}
    assert questions_of(found.opened, "val").question_ids >= sorted(asked)


def test_purity_counts_the_index_of_the_run(evaluated: tuple[FeatureStore, Path]) -> None:
    store, run = evaluated
    opened = data_for(read_checkpoint(run), store)
    purity = retrieval_precision(opened, questions_of(opened, "val"))
    rows = store.neighbours(["clip_id", "missing", "nearest_ids", "nearest_own_source"]).to_pylist()
    labels = {row["clip_id"]: row["labels"][0] for row in store.clips(["clip_id", "labels"]).to_pylist()}
    asked = {opened.clips.ids[row] for row in questions_of(opened, "val").clip_row_B}
    pairs = [
        labels[row["clip_id"]] == labels[hit]
        for row in rows
        if row["missing"] == "audio" and row["clip_id"] in asked
        for hit in row["nearest_ids"]
    ]
    share = purity.agreements["label", "audio", "nearest"].share()
    assert (share.pairs, share.share) == (len(pairs), pytest.approx(np.mean(pairs)))
    assert share.share > share.chance  # kinds tell
    own = [row["nearest_own_source"] for row in rows if row["missing"] == "visual"]
    assert purity.same_source["visual"]["nearest"] == (sum(own), sum(count > 0 for count in own), len(own))


def test_missing_evaluation_says_which_command_makes_it(own_run: Path) -> None:
    (own_run / TEST_EVALUATION).unlink()
    told = run_report(ReportRequest(runs=(own_run,), gallery=0))
    gaps = [gap for gap in told["missing"] if gap["section"] == "accuracy"]  # pyright: ignore
    assert len(gaps) == 1
    assert gaps[0]["make"].startswith(f"r2scp-pipe evaluate {own_run} --missing-rates --store ")
    assert not (own_run / TEST_EVALUATION).exists()  # never made here
    html = Path(str(told["report"])).read_text()
    assert "r2scp-pipe evaluate" in html
    assert "Not evaluated yet" in html


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        "{",
        '{"conditions": 3}',
        '{"split": "test", "baselines": {}, "settings": {}}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
    ids=["empty", "list", "half", "number", "parts", "bytes"],
)
def test_a_broken_evaluation_is_told_of(own_run: Path, broken: str | bytes) -> None:
    (own_run / TEST_EVALUATION).write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    [facts] = read_runs([own_run], None)
    assert facts.evaluation is None
    [gap] = [gap for gap in facts.missing if gap.section == "accuracy"]
    assert "evaluation-test.json is not what evaluate writes" in gap.why


def test_half_written_logs_are_told_of(own_run: Path, tmp_path: Path) -> None:
    path = own_run / "metrics.jsonl"
    whole = read_curves(path)
    text = path.read_bytes()
    path.write_bytes(
        text
        + b'{"kind": "epoch", "stage": "mixing", "epo\n'
        + b"\xff\xfe\n3\n[]\n"
        + b'{"kind": "epoch", "stage": "mixing"}\n'
    )
    found = read_curves(path)
    assert found.epochs == whole.epochs
    assert found.broken == 5
    [facts] = read_runs([own_run], None)
    assert any("5 lines" in gap.why for gap in facts.missing)
    shutil.rmtree(own_run / "baselines")
    shutil.rmtree(own_run / "experts", ignore_errors=True)
    path.unlink()
    told = run_report(ReportRequest(runs=(own_run,), gallery=0))
    assert "training" in {gap["section"] for gap in told["missing"]}  # pyright: ignore
    assert read_curves(tmp_path / "nowhere").epochs == []


def test_what_is_no_run_and_no_store_is_refused(own_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one run at least"):
        run_report(ReportRequest(runs=()))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run_report(ReportRequest(runs=(tmp_path,)))
    with pytest.raises(StoreError, match="no store"):
        run_report(ReportRequest(runs=(own_run,), store=str(tmp_path / "none")))


def test_a_run_whose_store_is_gone_still_has_its_numbers(own_run: Path, tmp_path: Path) -> None:
    document = own_run / "best.json"
    values = json.loads(document.read_bytes())
    values["store"]["uri"] = str(tmp_path / "gone")
    document.write_text(json.dumps(values))
    told = run_report(ReportRequest(runs=(own_run,)))
    assert "accuracy" in told["figures"]  # pyright: ignore
    lacking = {gap["section"] for gap in told["missing"]}  # pyright: ignore
    assert lacking >= {"vectors", "purity", "gallery", "store"}


def test_an_evaluation_of_another_checkpoint_is_warned_of(own_run: Path) -> None:
    values = json.loads((own_run / TEST_EVALUATION).read_bytes())
    values["checkpoint"]["sha256"] = "0" * 64
    values["settings"]["leak_guard"] = False
    values["unfinished"] = ["r2scp"]
    (own_run / TEST_EVALUATION).write_text(json.dumps(values))
    html = Path(str(run_report(ReportRequest(runs=(own_run,), gallery=0))["report"])).read_text()
    for said in ("another checkpoint than the best", "WITHOUT the leak guard", "not trained to the end"):
        assert said in html


def test_several_runs_stand_side_by_side(
    evaluated: tuple[FeatureStore, Path], own_run: Path, tmp_path: Path
) -> None:
    values = json.loads((own_run / "best.json").read_bytes())
    values["config"]["seed"] = 8
    (own_run / "best.json").write_text(json.dumps(values))
    told = run_report(ReportRequest(runs=(evaluated[1], own_run), out=tmp_path / "r.html", gallery=0))
    assert {"accuracy-by-type-1", "accuracy-by-type-2"} < set(told["figures"])  # pyright: ignore
    html = (tmp_path / "r.html").read_text()
    names = unique_names([evaluated[1], own_run])
    assert len(set(names)) == 2  # both folders are called "run"
    assert all(name in html for name in names)
    assert "The runs differ in their seeds alone." in html
    ids = Page(html).ids
    assert len(ids) == len(set(ids))
    assert len(set(unique_names([own_run, own_run]))) == 2


def test_hostile_names_are_inert(own_run: Path, tmp_path: Path) -> None:
    """In types, baselines, studies, labels and folders; in page, SVG and terminal."""
    values = json.loads((own_run / TEST_EVALUATION).read_bytes())
    for model in (values, *values["baselines"].values()):
        for condition in model["conditions"].values():
            condition["types"] = {HOSTILE + kind: score for kind, score in condition["types"].items()}
    values["baselines"][HOSTILE] = values["baselines"]["no-recovery"]
    (own_run / TEST_EVALUATION).write_text(json.dumps(values))
    (own_run / "evaluation-<b>.json").write_text("{}")
    run = own_run.rename(tmp_path / "<img src=x onerror=alert(1)> run")
    folder = tmp_path / "figures"
    wanted = ReportRequest(runs=(run,), out=tmp_path / "r.html", figures=folder, gallery=0)
    told = run_report(wanted)
    html = (tmp_path / "r.html").read_text()
    tags = Page(html).tags
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not any(tag == "img" and "onerror" in attrs for tag, attrs in tags)
    assert all(not name.startswith("on") for _, attrs in tags for name in attrs)
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "#0072b2" in html.partition("</style>")[2]  # a colour's name in a text stays one
    for name in told["figures"]:  # pyright: ignore
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert not [e for e in root.iter() if e.tag.endswith(("script", "a", "foreignObject", "image"))]
    assert all(re.fullmatch(r"[a-z0-9-]+\.(png|svg)", path.name) for path in folder.iterdir())


def test_names_in_figures_are_short_and_plain() -> None:
    assert shorten("a" * 99) == "a" * 29 + "…"
    assert shorten(" \n") == "(none)"
    assert shorten("x\u202ey") == "x\\u202ey"


def test_colours_of_a_panel_follow_the_page(tmp_path: Path) -> None:
    def draw(ax: Axes) -> None:
        for at, colour in enumerate(COLOURS):
            ax.plot([0, 1], [at, at], color=colour)
        ax.set_title("$x_1$ 字 <b> #0072b2")

    drawing = Figure(
        name="some", title="t", caption="c", alt="a", panels=[Panel(draw=draw)] * 2, columns=[], rows=[]
    )
    markup = str(figure_markup(drawing))
    for at in range(1, len(COLOURS) + 1):
        assert f"var(--hue-{at})" in markup
    styles = re.findall(r'style="([^"]*)"', markup)
    assert not any(re.search(r"#[0-9a-f]{6}", style) for style in styles)
    assert "$x_1$ 字 &lt;b&gt; #0072b2" in markup  # text, as it was, and no formula
    ids = Page(markup).ids
    assert len(ids) == len(set(ids))
    first, second = (write_images(drawing, tmp_path / name) for name in ("one", "two"))
    assert first[1].read_bytes() == second[1].read_bytes()


def test_commands_make_the_same_settings_again(evaluated: tuple[FeatureStore, Path]) -> None:
    [facts] = read_runs([evaluated[1]], None)
    assert facts.checkpoint is not None
    index, train, evaluate = commands(facts, facts.checkpoint)
    assert "--neighbours 4" in index
    assert "--set" in train
    assert "--missing-rates" in evaluate
    name, changed = nearest_preset(facts.checkpoint.config)
    assert f"--preset {name}" in train
    assert {"model.dim", "batch_size"} <= {one[0] for one in changed}
    assert nearest_preset(demo(16, 6)) == ("demo", [])


def test_the_command_line(own_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["report", str(own_run), "--gallery", "0", "--out", str(tmp_path / "r.html"), "--json"]
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert Path(told["report"]) == tmp_path / "r.html"
    assert told["bytes"] == (tmp_path / "r.html").stat().st_size
    lost = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert lost.exit_code == 1
    assert len(lost.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, Path]:
    """Generated clips with their files in a store, and an untrained model for them."""
    folder = tmp_path_factory.mktemp("real")
    generate(folder / "corpus", clips=12, seed=3)
    spec = encoder_spec("imagebind-demo", None, "cpu")
    store = FeatureStore.create(str(folder / "store"), spec.fingerprint, spec.dim)
    corpus = open_corpus("demo", folder / "corpus")
    plan = plan_clips(corpus, {}, PlanOptions(decode_fingerprint=decode_fingerprint()))
    places = store.address(Table.CLIPS), store.address(Table.FAILURES)
    stage = StageRows(*places, Provenance.of("run", spec.fingerprint, None))
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
    told = {"uri": store.uri, "fingerprint": store.fingerprint, "dim": store.dim, "versions": versions}
    at: dict[str, Any] = {"stage": Stage.MIXING, "epoch": 1, "step": 1, "metrics": {}, "best": {}, "code": ""}
    (folder / "run").mkdir()
    write_checkpoint(folder / "run", [BEST], Checkpoint(config=config, answers=answers, store=told, **at), model, {})
    return store, folder / "run"


def test_the_gallery_shows_real_answers_wide_and_narrow(
    real: tuple[FeatureStore, Path], tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    _, run = real
    told = run_report(ReportRequest(runs=(run,), out=tmp_path / "r.html", gallery=3))
    assert not [gap for gap in told["missing"] if gap["section"] == "gallery"]  # pyright: ignore
    html = (tmp_path / "r.html").read_text()
    assert html.count('class="answer"') == 3
    assert html.count("data:image/webp") > 3
    for width, scheme in ((1280, "light"), (360, "dark")):
        looked = open_page(tmp_path / "r.html", width, scheme)
        check_looks(looked)
        loaded = looked.ask("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        assert loaded


def test_the_gallery_takes_the_weights_it_is_given(
    real: tuple[FeatureStore, Path], tmp_path: Path, tiny_weights: Path
) -> None:
    """Those of another encoder: that it is told so shows that they were looked at."""
    wanted = ReportRequest(runs=(real[1],), out=tmp_path / "r.html", gallery=1, weights=str(tiny_weights))
    [why] = [gap["why"] for gap in run_report(wanted)["missing"] if gap["section"] == "gallery"]  # pyright: ignore
    assert "name the encoder that filled it (--encoder, --weights)" in why


def test_questions_for_the_gallery_are_half_right_half_wrong(real: tuple[FeatureStore, Path]) -> None:
    store, run = real
    found = probe(read_checkpoint(run), store)
    picked, there = pick(found, 4)
    assert there == len(found.examples)
    assert {one.ask.missing for one in picked} == set(Modality)
    for one in picked:
        at = found.examples.question_ids.index(one.ask.id)
        assert one.right == found.outputs[WITH_RECOVERY, Condition.without(Modality(one.ask.missing))].right_Q[at]
        assert one.answer == found.answers[at]
        assert Path(one.ask.video).is_file()
    assert len({one.ask.id for one in picked}) == len(picked)
    assert pick(found, 4) == (picked, there)


def test_a_clip_whose_file_can_have_no_such_name_is_no_end(
    real: tuple[FeatureStore, Path], copy: Callable[[FeatureStore], FeatureStore]
) -> None:
    store = copy(real[0])
    rows = store.clips(["clip_id", *METADATA_COLUMNS], "split = 'val'").to_pylist()
    store.update_metadata([row | {"uri": name} for row, name in zip(rows, ("a" * 5000, "a\0b"), strict=False)], {})
    checkpoint = read_checkpoint(real[1])
    pins = {name: store.versions()[name] for name in ("clips", "questions", "neighbours")}
    picked, there = pick(probe(replace(checkpoint, store=checkpoint.store | {"versions": pins}), store), 4)
    assert there == len(picked)


def check_looks(looked: Any) -> None:
    """Nothing amiss, nothing asked of the network, every panel to be seen, nothing wider than the page."""
    assert (looked.errors, looked.page_errors, looked.requests, looked.dialogs) == ([], [], [], [])
    boxes = looked.ask(
        "[...document.querySelectorAll('.panel svg')].map(one => {const b = one.getBoundingClientRect();"
        "return [b.width, b.height, b.left, b.right]})"
    )
    width = looked.ask("document.documentElement.clientWidth")
    assert boxes
    for box in boxes:
        assert min(box[0], box[1]) > 80
        assert box[2] >= 0
        assert box[3] <= width + 1
    assert looked.ask("document.documentElement.scrollWidth") <= width
    ink = looked.ask("getComputedStyle(document.querySelector('.panel svg text')).fill")
    paper = looked.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert abs(brightness(ink) - brightness(paper)) > 120


def brightness(colour: str) -> float:
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))


def test_the_page_in_a_browser(made: tuple[dict[str, Any], str, Path], open_page: Callable[..., Any]) -> None:
    told, _, folder = made
    for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
        looked = open_page(folder / "r.html", width, scheme)
        check_looks(looked)
        assert looked.ask("document.querySelectorAll('figure.plate').length") == len(told["figures"])
    unnamed = looked.ask("[...document.querySelectorAll('[role=img]')].filter(one => !one.ariaLabel).length")
    assert unnamed == 0


def test_dissonance_marks_what_was_purged(evaluated: tuple[FeatureStore, Path]) -> None:
    store, run = evaluated
    found = probe(read_checkpoint(run), store)
    drawing = dissonance(found, 5)
    assert drawing is not None
    for missing, (values, purged) in found.dissonance.items():
        word = {"audio": "sound", "visual": "picture"}[missing]
        for name, count in (("purged", int(purged.sum())), ("kept", int((~purged).sum()))):
            assert sum(row[4] for row in drawing.rows if row[:2] == [word, name]) == count
        assert purged.any()
        assert len(values) > purged.sum() or not (~purged).any()


def test_a_model_that_recovers_nothing_is_reported_too(own_run: Path) -> None:
    """A baseline's own folder is a run as well."""
    told = run_report(ReportRequest(runs=(own_run / "baselines" / "no-recovery",), gallery=2))
    why = {gap["section"]: gap["why"] for gap in told["missing"]}  # pyright: ignore
    assert "retrieves nothing" in why["purity"]
    assert "joint-vectors" in told["figures"]  # pyright: ignore


def test_the_store_section_counts_and_shows_hostile_rows(
    own_run: Path, evaluated: tuple[FeatureStore, Path], copy: Callable, write: Callable, tmp_path: Path
) -> None:
    store = copy(evaluated[0])
    at = datetime(2026, 1, 31, tzinfo=UTC)
    dead = {"corpus": HOSTILE, "stage": "decode", "attempts": 1, "at": at, "uri": HOSTILE, "detail": HOSTILE}
    reasons = ["corrupt", "corrupt", "corrupt", "corrupt", "timeout"]
    rows = [dead | {"clip_id": f"{HOSTILE}{at}", "reason": reason} for at, reason in enumerate(reasons)]
    write(store, Table.FAILURES, rows)
    pair = {"query": "audio", "among": "visual", "queries": 64, "at_3": 0.97, "at_10": 0.95, "p50_ms": 1.5}
    run = {
        "run_id": f"reindex-{HOSTILE}",
        "kind": "reindex",
        "status": "done",
        "started_at": at,
        "ended_at": at,
    }
    store.record_run(run | {"counts": json.dumps({"recall": {"all": [pair]}, "due": [HOSTILE]})})
    store.name_snapshot("before")
    section = store_section(store)
    tables = {str(block["caption"]): block for block in section.blocks if block["kind"] == "table"}
    by_reason = next(
        table for caption, table in tables.items() if caption.startswith("Dead letters by reason")
    )
    assert [row[:2] for row in by_reason["rows"]] == [["corrupt", 4], ["timeout", 1]]  # pyright: ignore
    shown = next(table for caption, table in tables.items() if "up to" in caption)
    assert len(shown["rows"]) == 3 + 1  # pyright: ignore
    recall = next(table for caption, table in tables.items() if caption.startswith("Recall"))
    assert recall["rows"] == [["all", *pair.values()]]
    assert "Snapshots" in tables
    checks = {row[0]: row[1:] for row in tables["Checks"]["rows"]}  # pyright: ignore
    assert checks["questions about clips that are not there"] == [2, "no"]  # of `odd_questions`
    run_report(ReportRequest(runs=(own_run,), store=store.uri, out=tmp_path / "r.html", gallery=0))
    html = (tmp_path / "r.html").read_text()
    assert sum(tag == "script" for tag, _ in Page(html).tags) == 1
    assert "&lt;script&gt;alert(1)" in html
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_a_model_of_choices_is_looked_into(
    quick_plan: Callable[..., TrainPlan], learnable_store: FeatureStore, tmp_path: Path
) -> None:
    """Questions that bring their choices, and a part of the train split held out to choose by."""
    config = quick_plan(tmp_path / "none").config
    plan = quick_plan(
        tmp_path / "run", corpora=("avqa",), holdout=0.4, model=replace(config.model, classes=None)
    )
    run_training(plan, TrainOptions(threads=1), lambda *_: None)
    found = probe(read_checkpoint(tmp_path / "run"), learnable_store)
    assert set(found.answers) <= {f"kind {kind}" for kind in range(4)}
    table = {
        row["question_id"]: row["answer"]
        for row in learnable_store.questions(["question_id", "answer"]).to_pylist()
    }
    assert found.answers == [table[one] for one in found.examples.question_ids]
    told = run_report(ReportRequest(runs=(tmp_path / "run",), gallery=1))
    assert "purity" in told["figures"]  # pyright: ignore
    assert (TRAINED_WITHOUT, "A") not in found.outputs  # no baseline was trained
