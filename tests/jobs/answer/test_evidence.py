"""The evidence of an answer is true.

A recording in the store gets the logits that evaluation gives it. The evidence that an answer names gives the
same logits again, and other ones when a name in it is changed.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from r2scp.jobs.answer.answerer import Answerer
from r2scp.jobs.answer.records import Request, Result
from r2scp.jobs.training.checkpoints import read_checkpoint
from r2scp.jobs.training.evaluate import data_for
from r2scp.model.batch import AUDIO, VISUAL, Batch, Neighbours
from r2scp.model.config import Stage
from r2scp.pipelines.batches.dataset import BatchRequest as Rows
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "How many instruments are sounding in the video?"
OTHER = {"audio": "visual", "visual": "audio"}


def logits(result: Result) -> dict[str, float]:
    return {candidate.answer: candidate.logit for candidate in result.answers}


@pytest.mark.parametrize("missing", ["audio", "visual"])
def test_logits_of_a_stored_clip_are_those_of_evaluation(world, answerer: Answerer, missing: str) -> None:
    checkpoint = read_checkpoint(world.run)
    opened = data_for(checkpoint, world.store)
    examples = opened.examples("train")
    whole = examples.present_BM.all(axis=1)
    rows = np.flatnonzero(whole)[:6]
    dataset = opened.dataset(examples)
    column = {"audio": AUDIO, "visual": VISUAL}[missing]
    with torch.no_grad():
        expected = checkpoint.model()(dataset.batch(rows, Rows.uniform(len(rows), column))).logits_BK.numpy()
    questions = {
        row["question_id"]: row for row in world.store.questions(["question_id", "question"]).to_pylist()
    }
    for row, expected_K in zip(rows, expected, strict=True):
        video = world.video(opened.clips.ids[examples.clip_row_B[row]])
        result = answerer.answer(video, questions[examples.question_ids[row]]["question"], missing)
        actual = logits(result)
        # the towers work in bf16, and other batches round otherwise
        assert checkpoint.answers is not None
        np.testing.assert_allclose(
            [actual[name] for name in checkpoint.answers], expected_K, atol=0.02 * np.ptp(expected_K)
        )
        own = world.rows()[opened.clips.ids[examples.clip_row_B[row]]]
        assert own["source_id"] not in {each.source_id for each in result.neighbours}


def replayed(world, result: Result, tokens: Mapping[str, np.ndarray], names: Sequence[str]) -> tuple:
    """(logits by answer, seconds purged -> what replaced them) from what an answer names alone."""
    available = OTHER[str(result.missing)]
    versions: Any = result.store["versions"]
    assert all(each.clips_version == versions["clips"] for each in result.neighbours)
    assert all(each.encoder == world.store.fingerprint for each in result.neighbours)
    near = [torch.from_numpy(world.sequence(name, str(result.missing))) for name in names]
    words, sentences = world.spec.load().questions([result.question])
    own_1LC = torch.from_numpy(tokens[available][None])
    mask_1L, nothing = torch.ones(own_1LC.shape[:2], dtype=torch.bool), torch.zeros(1, 1, own_1LC.shape[2])
    streams = {
        f"{available}_BLC": own_1LC,
        f"{available}_mask_BL": mask_1L,
        f"{result.missing}_BLC": nothing.half(),
        f"{result.missing}_mask_BL": torch.zeros(1, 1, dtype=torch.bool),
    }
    tokens_NLC = torch.nn.utils.rnn.pad_sequence(near, batch_first=True)
    lengths = torch.tensor([len(part) for part in near])
    batch = Batch(
        **streams,
        words_BWC=torch.from_numpy(words[0][None].astype(np.float16)),
        words_mask_BW=torch.ones(1, len(words[0]), dtype=torch.bool),
        sentence_BC=torch.from_numpy(sentences),
        present_BM=torch.tensor([[available == "audio", available == "visual"]]),
        retrieved=Neighbours(
            tokens_NLC[None],
            (torch.arange(tokens_NLC.shape[1]) < lengths[:, None])[None],
            torch.arange(len(near))[None],
        ),
    )
    checkpoint = read_checkpoint(Path(str(result.model["run"])))
    assert checkpoint.sha256 == result.model["sha256"]
    with torch.no_grad():
        answer = checkpoint.model()(batch)
    purified = answer.evidence.purified[AUDIO if result.missing == "audio" else VISUAL]
    assert purified is not None
    replaced = {
        int(second): int(purified.source_BL[0, second]) for second in purified.noise_BL[0].nonzero().flatten()
    }
    assert checkpoint.answers is not None
    return dict(zip(checkpoint.answers, answer.logits_BK[0].tolist(), strict=True)), replaced


@pytest.mark.parametrize("missing", ["audio", "visual"])
def test_evidence_reproduces_the_logits_and_other_evidence_does_not(
    world, answerer: Answerer, missing: str
) -> None:
    clip_id = world.whole()[0]
    result = answerer.answer(world.video(clip_id), QUESTION, missing)
    tokens = {OTHER[missing]: world.sequence(clip_id, OTHER[missing])}
    names = [each.clip_id for each in result.neighbours]
    assert len(names) == 3
    actual, replaced = replayed(world, result, tokens, names)
    expected = logits(result)
    scale = np.ptp(list(expected.values()))
    assert max(abs(actual[name] - expected[name]) for name in expected) < 0.02 * scale
    assert replaced == {one.second: one.replaced_by for one in result.recovered if one.purged}
    assert len(replaced) == 2
    strangers = [name for name in world.whole() if name not in names and name != clip_id]
    other, _ = replayed(world, result, tokens, [strangers[0], *names[1:]])
    assert max(abs(other[name] - expected[name]) for name in expected) > 0.02 * scale


def test_scores_and_seconds_of_the_retrieved_clips(world, answerer: Answerer) -> None:
    clip_id = world.whole()[1]
    result = answerer.answer(world.video(clip_id), QUESTION, "audio")
    own = world.sequence(clip_id, "visual").astype(np.float32)
    key = own.mean(axis=0) / np.linalg.norm(own.mean(axis=0))
    facts = world.rows()
    bank = [name for name in world.whole() if facts[name]["split"] == "train" and name != clip_id]
    similar = {}
    for name in bank:
        tokens = world.sequence(name, "visual").astype(np.float32)
        mean = tokens.mean(axis=0)
        similar[name] = (float(mean @ key / np.linalg.norm(mean)), int((tokens @ key).argmax()))
    best = sorted(bank, key=lambda name: -similar[name][0])[:3]
    assert [each.clip_id for each in result.neighbours] == best
    for each in result.neighbours:
        assert each.score == pytest.approx(similar[each.clip_id][0], abs=1e-3)
        assert each.second == similar[each.clip_id][1]
        assert (each.file, each.content_sha256) == (
            facts[each.clip_id]["uri"],
            facts[each.clip_id]["content_sha256"],
        )
    assert [one.second for one in result.recovered] == list(range(10))
    purged = sorted(result.recovered, key=lambda one: -(one.dissonance or 0))[:2]
    assert all(one.purged for one in purged)  # the most dissonant ones
    assert sum(one.probability for one in result.answers) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("twin", "source"),
    [
        ({"source_id": "elsewhere"}, {}),  # the same file
        ({"content_sha256": "0" * 64}, {}),  # another file of the source of the same file
        ({"content_sha256": "0" * 64, "source_id": "named"}, {"source_id": "named"}),
    ],
)
def test_no_clip_of_the_same_source_is_retrieved(
    world, tmp_path: Path, twin: dict[str, str], source: dict[str, str]
) -> None:
    clip_id = next(name for name in world.whole() if world.rows()[name]["split"] == "train")
    shutil.copytree(world.store.uri, tmp_path / "store")
    store = FeatureStore.open(str(tmp_path / "store"))
    table = store.clips(where=f"clip_id = '{clip_id}'")
    rows = pa.Table.from_pylist([table.to_pylist()[0] | twin | {"clip_id": "demo/twin"}], schema=table.schema)
    also_delete = [clip_id] if source else []  # then the store does not know the file
    store.commit(Table.CLIPS, [store.stage(Table.CLIPS, rows)], {}, also_delete)
    copied = tmp_path / "renamed.mp4"
    shutil.copy(world.video(clip_id), copied)
    answerer = Answerer.open(store, world.run)
    result = answerer.answer_request(Request(video=str(copied), question=QUESTION, missing="audio", **source))
    assert len(result.neighbours) == 3
    assert not {"demo/twin", clip_id} & {each.clip_id for each in result.neighbours}
    if source:  # without it the twin is retrieved
        bare = answerer.answer_request(Request(video=str(copied), question=QUESTION, missing="audio"))
        assert bare.neighbours[0].clip_id == "demo/twin"
        assert any("may be this very recording" in note for note in bare.notes)
    assert not any("may be this very recording" in note for note in result.notes)


def test_a_stage_one_model_recovers_nothing(world, damaged: dict[str, Path], tmp_path: Path) -> None:
    run = world.checkpoint(tmp_path / "run", ["a", "b", "c"], stage=Stage.EXPERTS)
    result = Answerer.open(world.store, run).answer(damaged["deaf"], QUESTION)
    assert (result.recovery, result.neighbours, result.recovered) == ("dropped", [], [])
    assert any("does not recover" in note for note in result.notes)
    assert result.router["audio"] == 0


def test_an_empty_bank_is_noted_as_fallback(world, damaged: dict[str, Path], tmp_path: Path) -> None:
    scope = replace(IndexSettings().bank, splits=("nowhere",))
    run = world.checkpoint(tmp_path / "run", ["a", "b"], index=IndexSettings(bank=scope))
    result = Answerer.open(world.store, run).answer(damaged["deaf"], QUESTION)
    assert (result.recovery, result.neighbours, len(result.recovered)) == ("fallback", [], 10)
    assert any("no clip of the memory bank" in note for note in result.notes)


def test_a_retrieved_clip_that_may_be_the_recording_is_noted(
    world, damaged: dict[str, Path], tmp_path: Path
) -> None:
    run = world.checkpoint(tmp_path / "run", ["a", "b"], retrieval=Retrieval.CROSS)
    config = read_checkpoint(run).config
    wide = replace(config.model, neighbours=config.index.n)
    opened = Answerer.open(world.store, run)
    opened.checkpoint = replace(opened.checkpoint, config=replace(config, model=wide))
    result = opened.answer(damaged["deaf"], QUESTION)
    assert world.whole()[0] in {each.clip_id for each in result.neighbours}
    assert max(each.score for each in result.neighbours) < 0.99
    assert any("may be this very recording" in note for note in result.notes)


@pytest.mark.parametrize("retrieval", list(Retrieval))
def test_evidence_for_every_retrieval(
    world, damaged: dict[str, Path], tmp_path: Path, retrieval: Retrieval
) -> None:
    run = world.checkpoint(tmp_path / "run", ["a", "b"], retrieval=retrieval)
    result = Answerer.open(world.store, run).answer(damaged["deaf"], QUESTION)
    assert result.store["retrieval"] == retrieval.value
    assert len(result.neighbours) == 3
    scores = [each.score for each in result.neighbours]
    assert scores == sorted(scores, reverse=True)
