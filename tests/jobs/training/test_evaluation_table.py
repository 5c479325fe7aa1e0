"""Tables fit a terminal of 80 columns with every number whole, and hold what the report holds.

Question types and names come from outside; they are shown and steer nothing.
"""

import copy
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from r2scp.jobs.training.evaluate import MISSING_RATES, EvaluateOptions, run_evaluate
from r2scp.jobs.training.evaluation_table import TITLES, tables
from r2scp.jobs.training.study.run import MEASURES
from r2scp.jobs.training.study.table import markdown
from r2scp.jobs.training.study.table import tables as study_tables
from r2scp.store.feature_store import FeatureStore

WIDTH = 80
HOSTILE = "[red]\x1b[2J\u202e|x\n"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
EvaluatedRun = tuple[FeatureStore, Path]


def rendered(shown: RenderableType, width: int = WIDTH) -> str:
    """As on a terminal without colours."""
    out = StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(shown)
    text = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())
    assert not STEERING.search(text)
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


def cell(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f})"


@pytest.fixture(scope="module")
def report(evaluated_run: EvaluatedRun) -> dict[str, Any]:
    return run_evaluate(*evaluated_run, EvaluateOptions(rates=MISSING_RATES))


@pytest.fixture(scope="module")
def odd(evaluated_run: EvaluatedRun) -> dict[str, Any]:
    """Of questions whose types are hostile."""
    return run_evaluate(*evaluated_run, EvaluateOptions(split="odd"))


def cells_of(text: str, label: str) -> list[str]:
    """The numbers in the first row of a label, which may be wrapped after some words."""
    rows = re.findall(r"(?m)^ ?(\S.*?) +(\d+\.\d \(.*)$", text)
    others = set(TITLES.values()) - {label}
    return next(cells for start, cells in rows if label.startswith(start) and start not in others).split()


def test_the_main_table_holds_every_model(report: dict[str, Any]) -> None:
    text = rendered(tables(report))
    models = {"R²ScP": report} | {TITLES[name]: row for name, row in report["baselines"].items()}
    assert len(models) == 5
    for label, row in models.items():
        cells = [cell(row["conditions"][condition]) for condition in ("A", "V", "AV")]
        expected = [*" ".join(cells).split(), f"{100 * row['average']:.1f}"]
        assert cells_of(text, label) == expected
    order = [text.index("\n" + " ".join(label.split()[:3]) + " ") for label in models]
    averages = [row["average"] for row in report["baselines"].values()]
    best_first = sorted(range(4), key=lambda at: -averages[at])
    assert [order[1 + at] for at in best_first] == sorted(order[1:])
    assert order[0] == min(order), "ours first"
    assert "test split, 32 questions" in text
    assert "CMR + CAP, paired retrieval" in " ".join(text.split())


def test_types_are_listed_below_their_group(report: dict[str, Any]) -> None:
    text = rendered(tables(report))
    both = report["conditions"]["AV"]
    lines = text[text.index("by question type") :].splitlines()
    for kind, score in both["types"].items():
        group, _, name = kind.partition("/")
        at = next(at for at, line in enumerate(lines) if line.startswith(f"{group} "))
        if name:
            at = next(i for i in range(at, len(lines)) if lines[i].startswith(f"  {name} "))
        cells = " ".join(cell(report["conditions"][c]["types"][kind]) for c in ("A", "V", "AV"))
        assert lines[at].split()[-7:] == [str(score["n"]), *cells.split()]


def test_missing_rates_are_listed_for_every_model(report: dict[str, Any]) -> None:
    text = rendered(tables(report))
    for title, modality in (("whose sound is missing", "audio"), ("whose picture is missing", "visual")):
        part = text[text.index(title) :]
        for label, row in {"R²ScP": report, "no recovery": report["baselines"]["no-recovery"]}.items():
            cells = " ".join(cell(row["missing_rates"][f"{modality} {rate:.0%}"]) for rate in MISSING_RATES)
            assert cells_of(part, label) == cells.split()


def test_no_number_is_cut_at_eighty_columns(report: dict[str, Any]) -> None:
    """At its widest: everything right, of a hundred thousand questions."""
    widest = copy.deepcopy(report)

    def widen(part: Any) -> None:
        if isinstance(part, dict):
            if "interval" in part:
                part |= {"accuracy": 1.0, "interval": [1.0, 1.0], "n": 123_456}
            if "average" in part:
                part["average"] = 1.0
            for value in part.values():
                widen(value)

    widen(widest)
    text = rendered(tables(widest))
    models, types = 5, len(widest["conditions"]["AV"]["types"])
    groups = len(
        [g for g in widest["conditions"]["AV"]["groups"] if g not in widest["conditions"]["AV"]["types"]]
    )
    assert text.count("100.0 (100–100)") == 3 * (models + types + groups) + 6 * models
    assert text.count("123456") == types + groups
    assert "…" not in text


def test_caveats_are_shown(report: dict[str, Any]) -> None:
    text = rendered(tables(report))
    assert "WITHOUT" not in text
    assert "not finished" not in text
    marked = report | {"settings": report["settings"] | {"leak_guard": False, "disjoint": True}}
    text = rendered(tables(marked | {"unfinished": ["r2scp", HOSTILE]}))
    assert "Made WITHOUT the leak guard" in text
    assert "split by source" in text
    assert "Training not finished: r2scp, [red]" in text


def test_outside_text_cannot_control_the_terminal(odd: dict[str, Any]) -> None:
    text = rendered(tables(odd))
    for shown in ("[bold]x[bold]", "\\x1b[2J", "\\x07", "\\u202egpj", "exe\\r\\n", "(none)", "字 | 字"):
        assert shown in text
    n = odd["conditions"]["AV"]["n"]
    rows = text[text.index("by question type") :]
    kinds = set(odd["conditions"]["AV"]["types"]) - set(odd["conditions"]["AV"]["groups"])
    assert n == 10
    assert rows.count("–100)") + rows.count("(0–") >= 3 * len(kinds), "each with its numbers"
    folded = re.findall(r"(?m)^ *(xx+)(?: |$)", rows)
    assert sum(map(len, folded)) == 200, "a long word gives way, whole"


def study_report(variants: int, measures: tuple[str, ...], loads: bool = False) -> dict[str, Any]:
    spread = {"mean": 1.0, "sd": 0.25, "values": [1.0, 0.5]}
    difference = {"mean": -1.0, "sd": 0.25, "values": [0.0, 0.0]}
    row = {"accuracy": dict.fromkeys(measures, spread), "difference": dict.fromkeys(measures, difference)}
    if loads:
        weights = {f"{c}/{s}": 1 / 3 for c in ("A", "V", "AV") for s in ("audio", "visual", "text")}
        row["loads"] = [[weights, {name: 0.5 for name in weights if name[0] != "V"}]] * 2
    names = [HOSTILE, *(f"without pre-training (stage II trains all) {at}" for at in range(1, variants))]
    return {
        "title": "A study",
        "asks": "Does it?",
        "split": "test",
        "n": 123_456,
        "seeds": [1, 2],
        "against": names[-1],
        "variants": {name: row for name in names},
        "leak_guard": True,
        "disjoint": False,
        "code": ["a"],
    }


@pytest.mark.parametrize("show", [lambda report: rendered(study_tables(report)), markdown])
def test_studies_show_whole_numbers_and_inert_names(show: Callable[[dict[str, Any]], str]) -> None:
    rates = tuple(f"{modality} {rate:.0%}" for modality in ("audio", "visual") for rate in MISSING_RATES)
    report = study_report(3, (*MEASURES, *rates))
    text = show(report)
    assert text.count("(-100.0 ± 25.0)") == 2 * 10
    assert text.count("100.0 ± 25.0") == 3 * 10 + 2 * 10
    assert not STEERING.search(text)
    assert "[red]\\x1b[2J" in " ".join(text.split())
    assert "…" not in text
    assert "WITHOUT" not in text
    marked = show(report | {"leak_guard": False, "disjoint": True, "code": ["a", "b"]})
    assert "WITHOUT the leak guard" in " ".join(marked.split())
    assert "split by source" in " ".join(marked.split())
    assert "2 versions of the program" in " ".join(marked.split())


def test_loads_of_a_condition_that_an_epoch_did_not_meet() -> None:
    report = study_report(1, MEASURES, loads=True)
    lines = markdown(report).splitlines()
    heading = next(line for line in lines if line.startswith("| epoch"))
    at = [name.strip() for name in heading.strip("|").split("|")].index("V/audio")
    rows = [line.strip("|").split("|") for line in lines if re.match(r"\| \d+ \|", line)]
    assert [row[at].strip() for row in rows] == ["0.333", "–"] * 2
    assert "0.333" in rendered(study_tables(report))
    table = [line for line in lines if line.startswith("|")]
    assert all(line.count("|") == 1 + len(MEASURES) + 1 for line in table[:3]), "a bar in a name is no column"
