"""Accuracies are those of a count by hand, question by question, under every condition and missing rate.

What is missing never enters the model: with NaN in its place nothing changes. Numbers are the same in another
process, and those that training scores. What cannot be compared is refused.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r2scp.jobs.ingest.index import run_index
from r2scp.jobs.training.checkpoints import Checkpoint, read_checkpoint
from r2scp.jobs.training.config import StageConfig
from r2scp.jobs.training.data import TrainingData
from r2scp.jobs.training.evaluate import (
    MISSING_RATES,
    ConditionResult,
    EvaluateOptions,
    data_for,
    evaluate_model,
    missing_at_rate,
    questions_of,
    run_evaluate,
)
from r2scp.jobs.training.run import TrainOptions, TrainPlan, run_training
from r2scp.model.batch import AUDIO, SOURCES, VISUAL, Answer
from r2scp.model.config import ModelConfig
from r2scp.pipelines.batches.dataset import MISSING_COLUMN, NO_MODALITY, BatchRequest, Dataset
from r2scp.pipelines.batches.examples import Examples, Pins
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import CheckpointError, FingerprintMismatch, StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Condition, Retrieval, Table

pytestmark = pytest.mark.usefixtures("one_thread")

Z = 1.959963984540054  # standard deviations around the mean that hold 95 % of a normal distribution
BASELINES = ("no-recovery", "no-recovery-dropout", "question-only")
EvaluatedRun = tuple[FeatureStore, Path]
TEST = EvaluateOptions(rates=MISSING_RATES)


@pytest.fixture(scope="module")
def report(evaluated_run: EvaluatedRun) -> dict[str, Any]:
    return json.loads(json.dumps(run_evaluate(*evaluated_run, TEST), allow_nan=False))


@pytest.fixture(scope="module")
def rows(evaluated_run: EvaluatedRun) -> dict[str, dict[str, Any]]:
    """What the store says of each test question that can be asked, in the order of their ids."""
    store = evaluated_run[0]
    columns = ["question_id", "clip_id", "type", "answer"]
    results = store.questions(columns, "split = 'test' AND clip_id != 'gone'").to_pylist()
    assert len(results) == 32
    return {row["question_id"]: row for row in sorted(results, key=lambda row: row["question_id"])}


def answered(checkpoint: Checkpoint, data: TrainingData, examples: Examples, missing: int) -> list[tuple]:
    """Of each question, asked alone: its answer's text, and what the router listened to."""
    model, dataset, answers = checkpoint.model(), data.dataset(examples), []
    assert checkpoint.answers is not None
    for row in range(len(examples)):
        with torch.no_grad():
            answer = model(dataset.batch(np.array([row]), BatchRequest.uniform(1, missing)))
        assert answer.logits_BK.isfinite().all()
        evidence = answer.evidence
        counts = [bool(part.any()) for part in (evidence.recovered_BM, evidence.fallback_BM)]
        answers.append((checkpoint.answers[int(answer.logits_BK.argmax())], evidence.router_BS[0], *counts))
    return answers


def check_score(score: dict[str, Any], hits: list[bool]) -> None:
    """The interval's ends are where the true share would lie Z standard deviations away."""
    n, share = len(hits), sum(hits) / len(hits)
    ends = np.roots([1 + Z * Z / n, -2 * share - Z * Z / n, share * share]).real
    assert (score["n"], score["accuracy"]) == (n, pytest.approx(share, abs=1e-12))
    assert score["interval"] == pytest.approx(sorted(ends), abs=1e-7)


def check_all(answers: dict[str, Any], hits: dict[str, bool], rows: dict[str, dict]) -> None:
    """The overall score, groups and types, of hits by question."""
    check_score(answers, list(hits.values()))
    types, groups = defaultdict(list), defaultdict(list)
    for question, hit in hits.items():
        kind = rows[question]["type"]
        types[kind].append(hit)
        groups[kind.split("/")[0]].append(hit)
    for part, expected in (("types", types), ("groups", groups)):
        assert answers[part].keys() == expected.keys()
        for name, parts in expected.items():
            check_score(answers[part][name], parts)


@pytest.mark.parametrize("name", ["r2scp", *BASELINES])
def test_every_condition_is_a_count_by_hand(
    evaluated_run: EvaluatedRun, report: dict[str, Any], rows: dict[str, dict], name: str
) -> None:
    checkpoint = read_checkpoint(
        evaluated_run[1] if name == "r2scp" else evaluated_run[1] / "baselines" / name
    )
    data = data_for(checkpoint, evaluated_run[0])
    scores = report if name == "r2scp" else report["baselines"][name]
    examples = data.examples("test")
    assert examples.question_ids == list(rows), "clips that lack a modality are asked about in each condition"
    hits = {}
    for condition, missing in MISSING_COLUMN.items():
        answers = answered(checkpoint, data, examples, missing)
        pairs = zip(rows.items(), answers, strict=True)
        hits[condition] = {question: text == row["answer"] for (question, row), (text, *_) in pairs}
        check_all(scores["conditions"][condition], hits[condition], rows)
        weights = torch.stack([router_S for _, router_S, *_ in answers]).mean(dim=0)
        router = scores["conditions"][condition]["router"]
        assert [router[source] for source in SOURCES] == pytest.approx(weights.tolist(), abs=1e-4)
        for at, counted in enumerate(("recovered", "fallbacks"), start=2):
            assert scores["conditions"][condition][counted] == sum(one[at] for one in answers)
    accuracies = [np.mean(list(one.values())) for one in hits.values()]
    assert scores["average"] == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert scores["conditions"].keys() == {"A", "V", "AV"}
    for rate in MISSING_RATES:
        for modality, lacking in (("audio", "V"), ("visual", "A")):
            lost = missing_at_rate(len(rows), rate)[f"{modality} {rate:.0%}"] != NO_MODALITY
            mixed = {q: hits[lacking if gone else "AV"][q] for q, gone in zip(rows, lost, strict=True)}
            check_all(scores["missing_rates"][f"{modality} {rate:.0%}"], mixed, rows)


def test_the_model_is_accurate_and_recovers(report: dict[str, Any]) -> None:
    """Else much of this file would compare nothing with nothing."""
    accuracy = {name: score["accuracy"] for name, score in report["conditions"].items()}
    assert min(accuracy.values()) > 0.6
    assert report["baselines"]["question-only"]["average"] < min(accuracy.values())
    recovered = {name: score["recovered"] for name, score in report["conditions"].items()}
    assert recovered == {"A": 29, "V": 29, "AV": 3 + 3}, "32, less those that have nothing left to go by"
    assert all(one["recovered"] == 0 for one in report["baselines"]["no-recovery"]["conditions"].values())


def test_majority_is_a_count_by_hand(
    evaluated_run: EvaluatedRun, report: dict[str, Any], rows: dict[str, dict]
) -> None:
    """Per type of training; a type that training has not gets the most frequent answer of all."""
    columns = ["type", "answer", "corpus"]
    trained = evaluated_run[0].questions(columns, "split = 'train' AND corpus = 'music-avqa'").to_pylist()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in trained:
        for kind in (row["type"], "all types"):
            counts[kind].update([row["answer"]] if row["answer"] else [])
    assert {row["type"] for row in rows.values()} - counts.keys(), "types that training has not"
    assert any(not row["answer"] for row in trained), "answers that are none"
    for kind, count in counts.items():
        (_, first), *rest = count.most_common()
        assert not rest or first > rest[0][1], f"a draw in {kind}: any would do"
    best = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
    hits = {q: best.get(row["type"], best["all types"]) == row["answer"] for q, row in rows.items()}
    assert 0 < sum(hits.values()) < len(hits)
    majority = report["baselines"]["majority"]
    for answers in [*majority["conditions"].values(), *majority["missing_rates"].values()]:
        check_all(answers, hits, rows)
    assert majority["average"] == pytest.approx(np.mean(list(hits.values())))


def test_unanswerable_questions_are_counted(report: dict[str, Any], rows: dict[str, dict]) -> None:
    assert report["answers_unknown"] == sum(row["answer"] == "bagpipe" for row in rows.values()) == 3
    assert report["left_out"] == {"clip not in the store": 2}
    assert report["conditions"]["AV"]["n"] == 32
    assert report["unfinished"] == []


@pytest.mark.parametrize(("condition", "gone"), [("A", "visual"), ("V", "audio")])
@pytest.mark.parametrize("name", ["r2scp", "no-recovery-dropout"])
def test_a_missing_modality_is_never_read(
    evaluated_run: EvaluatedRun, copy: Callable, write: Callable, condition: str, gone: str, name: str
) -> None:
    """Features of the clips asked about are NaN in the missing modality; their keys are as they were."""
    checkpoint = read_checkpoint(
        evaluated_run[1] if name == "r2scp" else evaluated_run[1] / "baselines" / name
    )
    clean = data_for(checkpoint, evaluated_run[0])
    store = copy(evaluated_run[0])
    # those of the train split may stand in for what is missing
    spoilt = [row for row in store.clips().to_pylist() if row["split"] != "train"]
    for row in spoilt:
        row[gone] = None if row[gone] is None else [np.full(16, np.nan, np.float16)] * len(row[gone])
    write(store, Table.CLIPS, spoilt)
    pins = replace(clean.pins, clips=Pins.latest(store).clips)
    poisoned = TrainingData.read(store, pins, checkpoint.config, checkpoint.answers)

    def scores(data: TrainingData) -> dict[str, tuple[dict[str, object], torch.Tensor]]:
        logits: dict[int, list[torch.Tensor]] = {}
        real = ConditionResult.add

        def add(self: ConditionResult, examples: Examples, rows: np.ndarray, answer: Answer) -> None:
            logits.setdefault(id(self), []).append(answer.logits_BK)
            real(self, examples, rows, answer)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ConditionResult, "add", add)
            results = evaluate_model(checkpoint, data, data.examples("test"), EvaluateOptions())
        return {name: (one.to_json(), torch.cat(logits[id(one)])) for name, one in results.items()}

    results, expected = scores(poisoned), scores(clean)
    assert results[condition][0] == expected[condition][0]
    assert torch.equal(results[condition][1], expected[condition][1])
    assert results[condition][1].isfinite().all()
    assert not results["AV"][1].isfinite().all(), "where it is not missing it does enter"


def test_missing_modalities_are_drawn_once() -> None:
    count = 20_000
    lost = {rate: missing_at_rate(count, rate) for rate in (0.0, *MISSING_RATES, 1.0)}
    for modality, number in (("audio", AUDIO), ("visual", VISUAL)):
        gone = {rate: results[f"{modality} {rate:.0%}"] == number for rate, results in lost.items()}
        for rate, results in gone.items():
            assert np.mean(results) == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / count))
            assert set(lost[rate][f"{modality} {rate:.0%}"]) <= {number, NO_MODALITY}, (
                "one modality at a time"
            )
        assert (gone[0.3] <= gone[0.5]).all()
        assert (gone[0.5] <= gone[0.7]).all()
    both = (lost[0.5]["audio 50%"] == AUDIO) & (lost[0.5]["visual 50%"] == VISUAL)
    assert np.mean(both) == pytest.approx(0.25, abs=0.02), "drawn apart"
    assert all((missing_at_rate(count, 0.5)[name] == results).all() for name, results in lost[0.5].items())


def test_every_model_answers_the_same_questions(
    evaluated_run: EvaluatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[list[int]] = []
    real = Dataset.batch

    def noted(self: Dataset, rows: np.ndarray, ask: BatchRequest) -> Any:
        assert ask.hide
        requests.append(ask.missing_B.tolist())
        return real(self, rows, ask)

    monkeypatch.setattr(Dataset, "batch", noted)
    run_evaluate(*evaluated_run, TEST)
    assert len(requests) == 4 * 9 * 5, "four models, three conditions and six rates, in batches of 7"
    whole = [tuple(chain(*requests[at : at + 5])) for at in range(0, len(requests), 5)]
    assert whole[:9] == whole[9:18] == whole[18:27] == whole[27:]
    assert len(set(whole)) == 9


def test_another_process_gives_identical_numbers(evaluated_run: EvaluatedRun, report: dict[str, Any]) -> None:
    store, run = evaluated_run
    words = ["evaluate", str(run), "--store", store.uri, "--missing-rates", "--json", "--device", "cpu"]
    code = "import sys; from r2scp.jobs.cli.main import app; app(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == report
    kept = run / "evaluation-test.json"
    assert json.loads(kept.read_text()) == report
    kept.unlink()


def test_validation_equals_the_trainings_metrics(evaluated_run: EvaluatedRun) -> None:
    report = run_evaluate(*evaluated_run, EvaluateOptions(split="val"))
    for name, scores in {"r2scp": report, **report["baselines"]}.items():
        if name != "majority":
            metrics = read_checkpoint(
                evaluated_run[1] if name == "r2scp" else evaluated_run[1] / "baselines" / name
            ).metrics
            accuracies = {condition: scores["conditions"][condition]["accuracy"] for condition in Condition}
            assert metrics.pop("mean") == (accuracies["AV"] if name == "question-only" else scores["average"])
            assert metrics == {condition: accuracies[condition] for condition in metrics}


def test_choices_and_held_out_questions(
    learnable_store: FeatureStore, quick_plan: Callable[..., TrainPlan], tmp_path: Path
) -> None:
    """AVQA: `val` are the questions held out from training; the majority's answer is a place."""
    model = ModelConfig(encoder_dim=16, classes=None, dim=16, heads=2)
    plan = quick_plan(tmp_path, model=model, corpora=("avqa",), holdout=0.3)
    best = run_training(plan, TrainOptions(), lambda _: None)
    report = run_evaluate(learnable_store, tmp_path, EvaluateOptions(split="val"))
    assert report["average"] == best.metrics["mean"]
    examples = questions_of(data_for(best, learnable_store), "val")
    whole = {row["question_id"]: row for row in learnable_store.questions().to_pylist()}
    held_out = [whole[question] for question in examples.question_ids]
    trained_on = [row for row in whole.values() if row["corpus"] == "avqa" and row not in held_out]
    assert len(trained_on) + len(held_out) == 24
    assert report["conditions"]["A"]["n"] == len(held_out) >= 2
    places = Counter(row["answer_index"] for row in trained_on).most_common()
    shares = [
        np.mean([row["answer_index"] == at for row in held_out]) for at, n in places if n == places[0][1]
    ]
    assert any(report["baselines"]["majority"]["average"] == pytest.approx(share) for share in shares)
    with pytest.raises(StoreError, match="no question"):
        run_evaluate(learnable_store, tmp_path, EvaluateOptions(split="test"))


def test_incomparable_runs_are_refused(evaluated_run: EvaluatedRun, tmp_path: Path) -> None:
    store, run = evaluated_run[0], shutil.copytree(evaluated_run[1], tmp_path / "run")
    other = FeatureStore.create(str(tmp_path / "other"), "another-encoder", 16)
    with pytest.raises(FingerprintMismatch, match=r"encoder learnable; .* another-encoder: use"):
        run_evaluate(other, run, TEST)
    with pytest.raises(CheckpointError, match=r"no checkpoint .*holds: none"):
        run_evaluate(store, tmp_path, TEST)
    document = run / "baselines" / "no-recovery" / "best.json"
    values = json.loads(document.read_text())
    values["store"]["versions"]["clips"] += 1
    document.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"no-recovery was trained on other versions") as refused:
        run_evaluate(store, run, TEST)
    assert "\n" not in str(refused.value)
    shutil.rmtree(run / "baselines")
    assert list(run_evaluate(store, run, EvaluateOptions())["baselines"]) == ["majority"]


def test_a_moved_store_and_an_unfinished_training(
    evaluated_run: EvaluatedRun, report: dict[str, Any], copy: Callable, tmp_path: Path
) -> None:
    run, moved = shutil.copytree(evaluated_run[1], tmp_path / "run"), copy(evaluated_run[0])
    last = run / "baselines" / "no-recovery" / "last.json"
    values = json.loads(last.read_text())
    last.write_text(json.dumps(values | {"epoch": values["epoch"] - 1}))
    again = run_evaluate(moved, run, TEST)
    assert again["unfinished"] == ["no-recovery"]
    assert (again["store"]["uri"], again["trained_on"]) == (moved.uri, evaluated_run[0].uri)
    where = {"run": report["run"], "unfinished": [], "store": report["store"]}
    assert json.loads(json.dumps(again)) | where == report


def test_a_missing_leak_guard_is_reported(
    evaluated_run: EvaluatedRun, quick_plan: Callable[..., TrainPlan], tmp_path: Path, copy: Callable
) -> None:
    store, unguarded = (
        copy(evaluated_run[0]),
        IndexSettings(retrieval=(Retrieval.PAIRED,), n=4, leak_guard=False),
    )
    run_index(store, unguarded, lambda *_: None)
    once = StageConfig(epochs=1, lr=1e-3)
    plan = quick_plan(tmp_path / "run", store, index=unguarded, stage_one=once, stage_two=once)
    run_training(plan, TrainOptions(), lambda _: None)
    assert run_evaluate(store, tmp_path / "run", EvaluateOptions())["settings"]["leak_guard"] is False
