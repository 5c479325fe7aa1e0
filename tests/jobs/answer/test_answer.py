"""Answers about recordings from outside the store, and that their evidence is true.

A recording that the store holds gets the logits that evaluation gives it; what an answer names as its
evidence gives the same logits again, and other ones when a name in it is changed. What is missing is found,
whatever made it so. Many at once are answered like one by one, in order, and none waits for one to come.
"""

import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from r2scp.jobs.answer.answerer import Answerer, AnswerOptions
from r2scp.jobs.answer.records import Rejected, Request, Result
from r2scp.jobs.cli.main import app
from r2scp.jobs.ingest.encoders import encoder_spec
from r2scp.jobs.ingest.index import run_index
from r2scp.jobs.training.checkpoints import BEST, Checkpoint, read_checkpoint, write_checkpoint
from r2scp.jobs.training.config import demo
from r2scp.jobs.training.evaluate import data_for
from r2scp.model.batch import AUDIO, VISUAL, Batch, Neighbours
from r2scp.model.config import Stage
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.batches.dataset import BatchRequest as Rows
from r2scp.pipelines.corpora.formats import open_corpus
from r2scp.pipelines.decoding.decode import DEFAULT_LIMITS, decode_fingerprint
from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.extraction.embed import EmbedClips, EncoderSpec
from r2scp.pipelines.extraction.plan import PlanOptions, plan_clips
from r2scp.pipelines.extraction.questions import plan_questions, write_questions
from r2scp.pipelines.extraction.stages import DecodeClips, Provenance, StageRows
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.pipelines.recordings.recording import Recording
from r2scp.store.commits import Staged
from r2scp.store.errors import FailureReason, FingerprintMismatch, MediaError, R2SCPError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS = 16
QUESTION = "How many instruments are sounding in the video?"
OTHER = {"audio": "visual", "visual": "audio"}
STEERING = "\x1b[2J\x1b]0;owned\x07\u202egpj.exe\r[red]"


@dataclass(frozen=True)
class World:
    """A corpus of real mp4 files in a store, with an untrained model for it."""

    store: FeatureStore
    run: Path
    spec: EncoderSpec

    def video(self, clip_id: str) -> str:
        return self.rows()[clip_id]["uri"]

    def rows(self) -> dict[str, dict]:
        columns = ["clip_id", "uri", "content_sha256", "source_id", "split", "visual_status", "audio_status"]
        return {row["clip_id"]: row for row in self.store.clips(columns).to_pylist()}

    def whole(self) -> list[str]:
        """Clips with both modalities."""
        return sorted(
            clip_id
            for clip_id, row in self.rows().items()
            if row["visual_status"] == row["audio_status"] == "present"
        )

    def sequence(self, clip_id: str, modality: str) -> np.ndarray:
        table = self.store.clips([modality], f"clip_id = '{clip_id}'")
        return np.array(table[modality][0].as_py(), dtype=np.float16)


def checkpoint_in(
    folder: Path,
    store: FeatureStore,
    answers: list[str] | None,
    stage: Stage = Stage.MIXING,
    **changes: object,
) -> Path:
    """A run's folder with an untrained model."""
    config = demo(store.dim, None if answers is None else len(answers))
    config = replace(config, model=replace(config.model, k=2, dropout=0.0), **changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = R2SCP(config.model).set_stage(stage)
    told = {
        "uri": store.uri,
        "fingerprint": store.fingerprint,
        "dim": store.dim,
        "versions": store.versions(),
    }
    told["versions"] = {name: told["versions"][name] for name in ("clips", "questions", "neighbours")}
    named = Checkpoint(
        stage=stage, epoch=1, step=1, config=config, answers=answers, store=told, metrics={}, best={}, code=""
    )
    folder.mkdir(parents=True)
    write_checkpoint(folder, [BEST], named, model, {})
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("answer")
    generate(folder / "corpus", clips=CLIPS, seed=3)
    spec = encoder_spec("imagebind-demo", None, "cpu")
    store = FeatureStore.create(str(folder / "store"), spec.fingerprint, spec.dim)
    corpus = open_corpus("demo", folder / "corpus")
    plan = plan_clips(corpus, {}, PlanOptions(decode_fingerprint=decode_fingerprint()))
    stage = StageRows(
        store.address(Table.CLIPS),
        store.address(Table.FAILURES),
        Provenance.of("run", spec.fingerprint, None),
    )
    embed = EmbedClips(spec, threads=1)
    for part in DecodeClips(DEFAULT_LIMITS, None)(plan.sources):
        staged = stage(embed(part))["stored"][0].as_py()
        store.commit(Table.CLIPS, [Staged.from_json(staged)], {})
    write_questions(plan_questions(corpus, store), store, spec, "run")
    run_index(store, IndexSettings(), lambda *_: None)
    asked = store.questions(["answer"])["answer"].to_pylist()
    return World(store, checkpoint_in(folder / "run", store, sorted(set(asked))), spec)


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.open(world.store, world.run, AnswerOptions(workers=2))


def logits(answered: Result) -> dict[str, float]:
    return {one.answer: one.logit for one in answered.answers}


@pytest.mark.parametrize("missing", ["audio", "visual"])
def test_a_clip_of_the_store_gets_the_logits_that_evaluation_gives_it(
    world: World, answerer: Answerer, missing: str
) -> None:
    checkpoint = read_checkpoint(world.run)
    opened = data_for(checkpoint, world.store)
    examples = opened.examples("train")
    whole = examples.present_BM.all(axis=1)
    rows = np.flatnonzero(whole)[:6]
    dataset = opened.dataset(examples)
    column = {"audio": AUDIO, "visual": VISUAL}[missing]
    with torch.no_grad():
        expected = checkpoint.model()(dataset.batch(rows, Rows.uniform(len(rows), column))).logits_BK.numpy()
    asked = {
        row["question_id"]: row for row in world.store.questions(["question_id", "question"]).to_pylist()
    }
    for row, expected_K in zip(rows, expected, strict=True):
        video = world.video(opened.clips.ids[examples.clip_row_B[row]])
        answered = answerer.answer(video, asked[examples.question_ids[row]]["question"], missing)
        found = logits(answered)
        # the towers work in bf16, and other batches round otherwise
        assert checkpoint.answers is not None
        np.testing.assert_allclose(
            [found[name] for name in checkpoint.answers], expected_K, atol=0.02 * np.ptp(expected_K)
        )
        own = world.rows()[opened.clips.ids[examples.clip_row_B[row]]]
        assert own["source_id"] not in {each.source_id for each in answered.neighbours}


def replayed(
    world: World, answered: Result, tokens: Mapping[str, np.ndarray], names: Sequence[str]
) -> tuple:
    """(logits by answer, seconds purged -> what replaced them) from what an answer names alone."""
    there = OTHER[str(answered.missing)]
    assert all(each.clips_version == answered.store["versions"]["clips"] for each in answered.neighbours)
    assert all(each.encoder == world.store.fingerprint for each in answered.neighbours)
    near = [torch.from_numpy(world.sequence(name, str(answered.missing))) for name in names]
    words, sentences = world.spec.load().questions([answered.question])
    own_1LC = torch.from_numpy(tokens[there][None])
    mask_1L, nothing = torch.ones(own_1LC.shape[:2], dtype=torch.bool), torch.zeros(1, 1, own_1LC.shape[2])
    streams = {
        f"{there}_BLC": own_1LC,
        f"{there}_mask_BL": mask_1L,
        f"{answered.missing}_BLC": nothing.half(),
        f"{answered.missing}_mask_BL": torch.zeros(1, 1, dtype=torch.bool),
    }
    tokens_NLC = torch.nn.utils.rnn.pad_sequence(near, batch_first=True)
    lengths = torch.tensor([len(part) for part in near])
    batch = Batch(
        **streams,
        words_BWC=torch.from_numpy(words[0][None].astype(np.float16)),
        words_mask_BW=torch.ones(1, len(words[0]), dtype=torch.bool),
        sentence_BC=torch.from_numpy(sentences),
        present_BM=torch.tensor([[there == "audio", there == "visual"]]),
        retrieved=Neighbours(
            tokens_NLC[None],
            (torch.arange(tokens_NLC.shape[1]) < lengths[:, None])[None],
            torch.arange(len(near))[None],
        ),
    )
    checkpoint = read_checkpoint(Path(str(answered.model["run"])))
    assert checkpoint.sha256 == answered.model["sha256"]
    with torch.no_grad():
        answer = checkpoint.model()(batch)
    purified = answer.evidence.purified[AUDIO if answered.missing == "audio" else VISUAL]
    assert purified is not None
    replaced = {
        int(second): int(purified.source_BL[0, second]) for second in purified.noise_BL[0].nonzero().flatten()
    }
    assert checkpoint.answers is not None
    return dict(zip(checkpoint.answers, answer.logits_BK[0].tolist(), strict=True)), replaced


@pytest.mark.parametrize("missing", ["audio", "visual"])
def test_evidence_gives_the_same_logits_again_and_other_evidence_others(
    world: World, answerer: Answerer, missing: str
) -> None:
    clip_id = world.whole()[0]
    answered = answerer.answer(world.video(clip_id), QUESTION, missing)
    tokens = {OTHER[missing]: world.sequence(clip_id, OTHER[missing])}
    names = [each.clip_id for each in answered.neighbours]
    assert len(names) == 3
    found, replaced = replayed(world, answered, tokens, names)
    expected = logits(answered)
    scale = np.ptp(list(expected.values()))
    assert max(abs(found[name] - expected[name]) for name in expected) < 0.02 * scale
    assert replaced == {one.second: one.replaced_by for one in answered.recovered if one.purged}
    assert len(replaced) == 2
    strangers = [name for name in world.whole() if name not in names and name != clip_id]
    other, _ = replayed(world, answered, tokens, [strangers[0], *names[1:]])
    assert max(abs(other[name] - expected[name]) for name in expected) > 0.02 * scale


def test_scores_and_seconds_are_those_of_the_named_clips(world: World, answerer: Answerer) -> None:
    clip_id = world.whole()[1]
    answered = answerer.answer(world.video(clip_id), QUESTION, "audio")
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
    assert [each.clip_id for each in answered.neighbours] == best
    for each in answered.neighbours:
        assert each.score == pytest.approx(similar[each.clip_id][0], abs=1e-3)
        assert each.second == similar[each.clip_id][1]
        assert (each.file, each.content_sha256) == (
            facts[each.clip_id]["uri"],
            facts[each.clip_id]["content_sha256"],
        )
    assert [one.second for one in answered.recovered] == list(range(10))
    purged = sorted(answered.recovered, key=lambda one: -(one.dissonance or 0))[:2]
    assert all(one.purged for one in purged)  # the most dissonant ones
    assert sum(one.probability for one in answered.answers) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("twin", "ask"),
    [
        ({"source_id": "elsewhere"}, {}),  # the same file
        ({"content_sha256": "0" * 64}, {}),  # another file of the source of the same file
        ({"content_sha256": "0" * 64, "source_id": "told"}, {"source_id": "told"}),
    ],
)
def test_nothing_of_the_same_source_stands_in(
    world: World, tmp_path: Path, twin: dict[str, str], ask: dict[str, str]
) -> None:
    clip_id = next(name for name in world.whole() if world.rows()[name]["split"] == "train")
    shutil.copytree(world.store.uri, tmp_path / "store")
    store = FeatureStore.open(str(tmp_path / "store"))
    table = store.clips(where=f"clip_id = '{clip_id}'")
    rows = pa.Table.from_pylist([table.to_pylist()[0] | twin | {"clip_id": "demo/twin"}], schema=table.schema)
    also_delete = [clip_id] if ask else []  # then the store does not know the file
    store.commit(Table.CLIPS, [store.stage(Table.CLIPS, rows)], {}, also_delete)
    copied = tmp_path / "renamed.mp4"
    shutil.copy(world.video(clip_id), copied)
    answerer = Answerer.open(store, world.run)
    found = answerer.answer_request(Request(video=str(copied), question=QUESTION, missing="audio", **ask))
    assert len(found.neighbours) == 3
    assert not {"demo/twin", clip_id} & {each.clip_id for each in found.neighbours}
    if ask:  # or nothing was shown
        bare = answerer.answer_request(Request(video=str(copied), question=QUESTION, missing="audio"))
        assert bare.neighbours[0].clip_id == "demo/twin"
        assert any("may be this very recording" in note for note in bare.notes)
    assert not any("may be this very recording" in note for note in found.notes)


@pytest.fixture(scope="module")
def damaged(world: World, tmp_path_factory: pytest.TempPathFactory, render: Callable) -> dict[str, Path]:
    """One clip of the store in several states of damage."""
    folder, whole = tmp_path_factory.mktemp("damaged"), world.video(world.whole()[0])
    return {
        name: render(folder / f"{name}.{'mkv' if name == 'unplugged' else 'mp4'}", ["-i", whole, *arguments])
        for name, arguments in {
            "deaf": ["-an", "-c", "copy"],
            "blind": ["-vn", "-c", "copy"],
            "silent": ["-af", "volume=0", "-c:v", "copy"],
            "blank": ["-vf", "drawbox=color=black:t=fill", "-c:a", "copy"],
            "nothing": ["-vf", "drawbox=color=gray:t=fill", "-af", "volume=0"],
            "quiet": ["-af", "volume=-60dB", "-c:v", "copy"],
            "unplugged": ["-af", "volume=-90dB", "-c:v", "copy", "-c:a", "pcm_s16le"],  # last bits alone
        }.items()
    }


@pytest.mark.parametrize(
    ("name", "missing", "why"),
    [
        ("deaf", "audio", "the file has no sound"),
        ("blind", "visual", "the file has no picture"),
        ("silent", "audio", "the sound is silence from beginning to end"),
        ("unplugged", "audio", "the sound is silence from beginning to end"),
        ("blank", "visual", "the picture is blank from beginning to end"),
        ("quiet", None, ""),
    ],
)
def test_what_is_missing_is_found(
    answerer: Answerer, damaged: dict[str, Path], name: str, missing: str | None, why: str
) -> None:
    answered = answerer.answer(damaged[name], QUESTION)
    assert answered.missing == missing
    streams = {"audio": answered.audio, "visual": answered.visual}
    assert {key for key, stream in streams.items() if not stream.used} == ({missing} if missing else set())
    if missing:
        assert (streams[missing].why, answered.recovery, len(answered.neighbours)) == (why, "neighbours", 3)
        assert answered.router[missing] > 0
    else:
        assert (answered.recovery, answered.neighbours, answered.recovered) == ("none", [], [])


def test_silence_passes_for_sound_where_it_is_asked_for(answerer: Answerer, damaged: dict[str, Path]) -> None:
    assert answerer.answer(damaged["silent"], QUESTION, "none").missing is None
    assert answerer.answer(damaged["deaf"], QUESTION, "none").missing == "audio"


def test_a_recording_of_nothing_is_refused(answerer: Answerer, damaged: dict[str, Path]) -> None:
    with pytest.raises(MediaError, match="silence from beginning to end; the picture is blank") as caught:
        answerer.answer(damaged["nothing"], QUESTION)
    assert caught.value.reason is FailureReason.NOTHING_RECORDED
    with pytest.raises(MediaError, match="you asked to ignore it"):
        answerer.answer(damaged["deaf"], QUESTION, "visual")


def test_a_partial_stream_is_used_and_said_to_be(
    world: World, answerer: Answerer, tmp_path: Path, render: Callable
) -> None:
    whole = world.video(world.whole()[0])
    cut = render(tmp_path / "cut.mkv", ["-i", whole, "-c", "copy"])
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    answered = answerer.answer(cut, QUESTION)
    assert answered.missing is None
    partial = [s for s in (answered.audio, answered.visual) if s.status == "partial"]
    assert partial
    assert all(stream.used and "could be decoded; they were used" in stream.why for stream in partial)
    assert any("could be decoded" in note for note in answered.notes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"question": "  "}, "a question must have words"),
        ({"missing": "smell"}, "missing must be one of auto, none, audio, visual; got 'smell'"),
        ({"choices": ("a", "b")}, "takes no choices"),
        ({"choices": ("a",) * 1001}, "at most 1000 choices; got 1001"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(
    world: World, answerer: Answerer, changes: dict, says: str
) -> None:
    ask = replace(Request(video=world.video(world.whole()[0]), question=QUESTION), **changes)
    with pytest.raises(UsageError, match=says):
        answerer.answer_request(ask)
    refused = next(answerer.answer_all([ask]))
    assert isinstance(refused, Rejected)
    assert refused.reason == "usage"


def test_what_does_not_fit_together_is_one_clear_error(
    world: World, tmp_path: Path, tiny_weights: Path
) -> None:
    other = FeatureStore.create(str(tmp_path / "other"), "another-encoder", world.store.dim)
    with pytest.raises(FingerprintMismatch, match="was trained on features of encoder"):
        Answerer.open(other, world.run)
    with pytest.raises(FingerprintMismatch, match="name the encoder that filled it"):
        Answerer.open(world.store, world.run, AnswerOptions(weights=str(tiny_weights)))
    foreign = checkpoint_in(tmp_path / "foreign", other_fingerprint(world, tmp_path), ["a", "b"])
    with pytest.raises(FingerprintMismatch, match="was filled by encoder"):
        Answerer.open(other_fingerprint(world, tmp_path), foreign)
    empty = FeatureStore.create(str(tmp_path / "empty"), world.store.fingerprint, world.store.dim)
    with pytest.raises(R2SCPError, match="has no clips"):
        Answerer.open(empty, world.run)
    with pytest.raises(R2SCPError, match="no snapshot 'nowhere'"):
        Answerer.open(world.store, world.run, AnswerOptions(at="nowhere"))


def other_fingerprint(world: World, tmp_path: Path) -> FeatureStore:
    """A store that no encoder of ours has filled."""
    store = FeatureStore.create(str(tmp_path / "strange"), "strange", world.store.dim)
    run = world.store.clips().slice(0, 4)
    if not store.dataset(Table.CLIPS).count_rows():
        store.commit(Table.CLIPS, [store.stage(Table.CLIPS, run)], {})
    return store


def test_a_model_of_stage_one_does_without(world: World, damaged: dict[str, Path], tmp_path: Path) -> None:
    run = checkpoint_in(tmp_path / "run", world.store, ["a", "b", "c"], stage=Stage.EXPERTS)
    answered = Answerer.open(world.store, run).answer(damaged["deaf"], QUESTION)
    assert (answered.recovery, answered.neighbours, answered.recovered) == ("dropped", [], [])
    assert any("does not recover" in note for note in answered.notes)
    assert answered.router["audio"] == 0


def test_a_bank_that_holds_nothing_makes_it_fall_back_and_say_so(
    world: World, damaged: dict[str, Path], tmp_path: Path
) -> None:
    scope = replace(IndexSettings().bank, splits=("nowhere",))
    run = checkpoint_in(tmp_path / "run", world.store, ["a", "b"], index=IndexSettings(bank=scope))
    answered = Answerer.open(world.store, run).answer(damaged["deaf"], QUESTION)
    assert (answered.recovery, answered.neighbours, len(answered.recovered)) == ("fallback", [], 10)
    assert any("no clip of the memory bank" in note for note in answered.notes)


def test_a_model_that_chooses_gets_its_choices(
    world: World, damaged: dict[str, Path], tmp_path: Path
) -> None:
    opened = Answerer.open(world.store, checkpoint_in(tmp_path / "run", world.store, None))
    answered = opened.answer(damaged["deaf"], QUESTION, choices=("one", "", "two"))
    assert sorted(one.answer for one in answered.answers) == ["one", "two"]
    assert sum(one.probability for one in answered.answers) == pytest.approx(1, abs=1e-5)
    turned = opened.answer(damaged["deaf"], QUESTION, choices=("two", "one"))
    assert logits(turned) == pytest.approx(logits(answered), abs=1e-3)  # their order is no evidence
    with pytest.raises(UsageError, match="give some with --choice"):
        opened.answer(damaged["deaf"], QUESTION)


def test_choices_of_questions_asked_together_are_their_own(
    world: World, damaged: dict[str, Path], tmp_path: Path
) -> None:
    opened = Answerer.open(world.store, checkpoint_in(tmp_path / "run", world.store, None))
    lists = [("one", "two"), ("three", "", "four", "five"), (), ("one",), ("six", "seven", "eight")]
    asked = [
        Request(id=str(at), video=str(damaged["deaf"]), question=QUESTION, choices=lists[at % len(lists)])
        for at in range(3 * len(lists))
    ]
    for ask, one in zip(asked, opened.answer_all(asked), strict=True):
        if not ask.choices:
            assert isinstance(one, Rejected)
            assert "give some with --choice" in one.message
            continue
        assert isinstance(one, Result)
        assert {each.answer for each in one.answers} == set(filter(None, ask.choices))
        assert sum(each.probability for each in one.answers) == pytest.approx(1, abs=1e-5)
        expected = logits(opened.answer_request(ask))
        assert logits(one) == pytest.approx(expected, abs=0.02 + 0.02 * np.ptp(list(expected.values())))


def test_a_clip_that_may_be_the_recording_is_said_to_be_however_it_was_found(
    world: World, damaged: dict[str, Path], tmp_path: Path
) -> None:
    run = checkpoint_in(tmp_path / "run", world.store, ["a", "b"], retrieval=Retrieval.CROSS)
    config = read_checkpoint(run).config
    wide = replace(config.model, neighbours=config.index.n)
    opened = Answerer.open(world.store, run)
    opened.checkpoint = replace(opened.checkpoint, config=replace(config, model=wide))
    answered = opened.answer(damaged["deaf"], QUESTION)
    assert world.whole()[0] in {each.clip_id for each in answered.neighbours}
    assert max(each.score for each in answered.neighbours) < 0.99
    assert any("may be this very recording" in note for note in answered.notes)


@pytest.mark.parametrize("retrieval", list(Retrieval))
def test_every_way_to_retrieve_has_its_evidence(
    world: World, damaged: dict[str, Path], tmp_path: Path, retrieval: Retrieval
) -> None:
    run = checkpoint_in(tmp_path / "run", world.store, ["a", "b"], retrieval=retrieval)
    answered = Answerer.open(world.store, run).answer(damaged["deaf"], QUESTION)
    assert answered.store["retrieval"] == retrieval.value
    assert len(answered.neighbours) == 3
    scores = [each.score for each in answered.neighbours]
    assert scores == sorted(scores, reverse=True)


# -- many


def many(world: World, damaged: dict[str, Path]) -> list[Request | Rejected]:
    videos = [*map(str, damaged.values()), *(world.video(name) for name in world.whole()[:3]), "/nowhere.mp4"]
    asked: list[Request | Rejected] = [
        Request(id=str(at), video=videos[at % len(videos)], question=(QUESTION, "Is it loud?")[at % 2])
        for at in range(2 * len(videos) + 5)
    ]
    for at, missing in enumerate(("audio", "visual", "none", "auto")):  # of one file, one after another
        asked.append(Request(id=missing, video=videos[at // 4 - 2], question=QUESTION, missing=missing))
    asked.insert(3, Rejected(reason="usage", message="a line that is none", id="bad"))
    return asked


def test_many_are_answered_like_one_by_one_and_in_order(
    world: World, answerer: Answerer, damaged: dict[str, Path]
) -> None:
    asked = many(world, damaged)
    found = list(answerer.answer_all(asked))
    assert [one.id for one in found] == [one.id for one in asked]
    assert found[3] is asked[3]
    refused = Counter(one.reason for one in found if isinstance(one, Rejected))
    assert refused == {"usage": 1, "nothing_recorded": 3, "unreadable": 2}
    for ask, one in zip(asked, found, strict=True):
        if isinstance(one, Rejected) or isinstance(ask, Rejected):
            continue
        expected = answerer.answer_request(ask)
        scale = np.ptp(list(logits(expected).values()))
        assert logits(one) == pytest.approx(logits(expected), abs=0.02 * scale)
        assert [each.clip_id for each in one.neighbours] == [each.clip_id for each in expected.neighbours]
        assert one.router == pytest.approx(expected.router, abs=0.01)
        dissonance, again = ([each.dissonance for each in part.recovered] for part in (one, expected))
        assert dissonance == pytest.approx(again, abs=0.02)


def test_one_question_that_cannot_be_asked_spoils_no_other_of_its_file(
    world: World, answerer: Answerer
) -> None:
    good = Request(video=world.video(world.whole()[0]), question=QUESTION)
    bad = [replace(good, question=" "), replace(good, choices=("a", "b")), replace(good, missing="smell")]
    for asked in ([good, *bad, good], [*bad, good, *bad]):
        for ask, one in zip(asked, answerer.answer_all(asked), strict=True):
            assert isinstance(one, Result if ask is good else Rejected)
            assert isinstance(one, Result) or one.reason == "usage"


def test_a_file_is_decoded_once_however_often_it_is_asked_about(
    world: World, answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    read = Recording.read.__func__

    def counted(cls: type[Recording], path: str, *arguments: object, **named: object) -> Recording:
        counts[path] += 1
        return read(cls, path, *arguments, **named)

    monkeypatch.setattr(Recording, "read", classmethod(counted))
    videos = [world.video(name) for name in world.whole()[:2]]
    asked = [Request(video=videos[at % 2], question=f"{QUESTION} {at % 5}") for at in range(40)]
    assert all(isinstance(one, Result) for one in answerer.answer_all(asked))
    assert counts == dict.fromkeys(videos, 1)


def test_a_question_is_answered_before_the_next_one_comes(world: World, answerer: Answerer) -> None:
    video, answered = world.video(world.whole()[0]), threading.Event()

    def slowly() -> Iterator[Request]:
        yield Request(video=video, question=QUESTION, id="first")
        assert answered.wait(timeout=60), "the first answer waited for the second question"
        yield Request(video=video, question=QUESTION, id="second")

    found = []
    for one in answerer.answer_all(slowly()):
        found.append(one.id)
        answered.set()
    assert found == ["first", "second"]


def test_what_goes_wrong_with_the_asking_is_not_swallowed(world: World, answerer: Answerer) -> None:
    def broken() -> Iterator[Request]:
        yield Request(video=world.video(world.whole()[0]), question=QUESTION)
        raise OSError("the line went dead")

    found = answerer.answer_all(broken())
    assert isinstance(next(found), Result)
    with pytest.raises(OSError, match="went dead"):
        next(found)


def test_whoever_has_read_enough_may_go(world: World, answerer: Answerer) -> None:
    def endless() -> Iterator[Request]:
        while True:
            yield Request(video=world.video(world.whole()[0]), question=QUESTION)

    found = answerer.answer_all(endless())
    assert isinstance(next(found), Result)
    found.close()
    waiting = [thread for thread in threading.enumerate() if thread.name == "requests"]
    for thread in waiting:
        thread.join(timeout=30)
        assert not thread.is_alive()


# -- the command


def call(*words: object, stdin: str = "") -> "object":
    return CliRunner().invoke(app, ["answer", *map(str, words)], input=stdin, env={"COLUMNS": "200"})


def test_the_command_says_what_is_missing_and_what_stood_in(
    world: World, damaged: dict[str, Path], answerer: Answerer
) -> None:
    result = call("--run", world.run, damaged["deaf"], QUESTION, "--explain")
    assert result.exit_code == 0, result.output
    expected = answerer.answer(damaged["deaf"], QUESTION)
    assert "The sound is missing (the file has no sound): the sound of 3 clips from the memory bank was used" in result.stdout
    for each in expected.neighbours:
        assert each.clip_id in result.stdout
        assert each.content_sha256 in result.stdout
    plain = json.loads(call("--run", world.run, damaged["deaf"], QUESTION, "--json", "--top", 0).stdout)
    assert plain["missing"] == "audio"
    assert {one["answer"]: one["logit"] for one in plain["answers"]} == pytest.approx(
        logits(expected), abs=0.05
    )


def test_outside_text_is_inert_on_a_terminal(world: World, tmp_path: Path, answerer: Answerer) -> None:
    video = tmp_path / "\x1b[2Jé [red]x.mp4"
    shutil.copy(world.video(world.whole()[0]), video)
    result = call("--run", world.run, video, f"Is it {STEERING}?", "--missing", "audio", "--explain")
    assert result.exit_code == 0, result.output
    assert not set("\x1b\x07\u202e\r") & set(result.stdout)
    assert "[red]" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["no.mp4", QUESTION], 1, "no.mp4"),
        ([], 2, "give a video and a question"),
        (["--batch", "a.mp4"], 2, "leave out VIDEO"),
        (["--batch", "--explain"], 2, "leave out VIDEO"),
        (["--batch", "--missing", "audio"], 2, "leave out VIDEO"),
    ],
)
def test_the_command_refuses_in_one_line(world: World, words: list[str], code: int, says: str) -> None:
    result = call("--run", world.run, *words)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def command(world: World) -> list[str]:
    program = Path(sys.executable).with_name("r2scp-pipe")
    return [str(program), "answer", "--run", str(world.run), "--batch"]


def test_lines_in_lines_out(world: World, damaged: dict[str, Path]) -> None:
    lines = [
        json.dumps({"id": 7, "video": str(damaged["deaf"]), "question": QUESTION}),
        "{not json",
        "",
        json.dumps(["a", "list"]),
        json.dumps({"video": str(damaged["deaf"]), "question": QUESTION, "mising": "audio"}),
        json.dumps({"id": "x", "video": "/etc/passwd", "question": QUESTION}),
        json.dumps({"id": "y", "video": "http://127.0.0.1/a.mp4", "question": QUESTION}),
        json.dumps({"id": "long", "video": "a" * (2 << 20), "question": QUESTION}),
        json.dumps({"id": "last", "video": str(damaged["blind"]), "question": QUESTION, "missing": "none"}),
    ]
    ran = subprocess.run(
        command(world), input="\n".join(lines).encode() + b"\n\xff\xfe\n", capture_output=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"Traceback" not in ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [one["id"] for one in found] == ["7", "", "", "", "x", "y", "", "last", ""]
    assert [one.get("error", {}).get("reason") for one in found] == [
        *(None, "usage", "usage", "usage", "not_media", "unreadable", "usage", None, "usage")
    ]
    assert "mising" in found[3]["error"]["message"]
    assert found[0]["missing"] == "audio"
    assert len(found[0]["answers"]) == 5
    assert "2 answered" in ran.stderr.decode()


def test_a_caller_who_waits_for_each_line_gets_each_line(world: World, damaged: dict[str, Path]) -> None:
    line = json.dumps({"video": str(damaged["deaf"]), "question": QUESTION}) + "\n"
    with subprocess.Popen(
        command(world), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin
        assert process.stdout
        killer = threading.Timer(180, process.kill)
        killer.start()
        for _ in range(3):
            process.stdin.write(line.encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["missing"] == "audio"
        process.stdin.close()
        assert process.wait() == 0
        killer.cancel()


@pytest.mark.parametrize(
    ("plumbing", "code", "says"),
    [
        ("<&-", 2, "is closed"),
        (">&- </dev/null", 2, "is closed"),
        ("0> written", 2, "cannot read standard input: Bad file descriptor"),
        ("< asked.jsonl > /dev/full", 1, "cannot write to standard output: No space left"),
    ],
)
def test_pipes_that_are_none_are_one_clear_error(
    world: World, tmp_path: Path, plumbing: str, code: int, says: str
) -> None:
    ask = {"video": "no.mp4", "question": QUESTION}
    (tmp_path / "asked.jsonl").write_text(json.dumps(ask) + "\n")
    shell = ["bash", "-c", f'"$@" {plumbing}', "bash", *command(world)]
    ran = subprocess.run(shell, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=tmp_path, timeout=240)
    assert ran.returncode == code, ran.stderr.decode()
    assert says in ran.stderr.decode()
    assert ran.stderr.count(b"\n") == 1


def test_all_lines_refused_is_exit_3(world: World) -> None:
    ran = subprocess.run(command(world), input=b'{"video": "no.mp4", "question": "a"}\n', capture_output=True)
    assert ran.returncode == 3


@pytest.mark.realmedia
def test_every_hostile_file_is_answered_or_refused_for_a_reason(answerer: Answerer, shared_dir: Path) -> None:
    files = sorted(
        path
        for part in ("hostile", "audio")
        for path in (shared_dir / "media" / part).rglob("*")
        if path.is_file()
    )
    found = list(answerer.answer_all([Request(video=str(path), question=QUESTION) for path in files]))
    assert len(found) == len(files) > 50
    reasons = Counter(one.reason if isinstance(one, Rejected) else "" for one in found)
    assert not reasons.keys() - {"", *FailureReason}
    assert reasons[""] > len(files) / 2
    for one in found:
        if isinstance(one, Result):
            assert np.isfinite([each.logit for each in one.answers]).all()
            assert one.missing is None or len(one.neighbours) == 3
