"""Questions are stored with the text tower's embeddings of themselves and of each choice behind them.

The oracle is the encoder, asked for each text alone.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from r2scp.pipelines.corpora.corpus import Corpus
from r2scp.pipelines.corpora.formats import open_corpus
from r2scp.pipelines.extraction import questions
from r2scp.pipelines.extraction.embed import Encoder, EncoderSpec
from r2scp.pipelines.extraction.questions import plan_questions, write_questions
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

CLIP = "aaaaaaaaaaa_000010"
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # half precision at rest; sums of another order in bf16


class Counting:
    """The encoder behind it, and the texts that went through."""

    def __init__(self, encoder: Encoder, seen: list[str]) -> None:
        self.dim, self._encoder, self._seen = encoder.dim, encoder, seen

    def questions(self, texts: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
        assert len(texts) <= questions.TEXTS_AT_ONCE
        self._seen += texts
        return self._encoder.questions(texts)


def counting(spec: EncoderSpec, seen: list[str]) -> EncoderSpec:
    class Spec(EncoderSpec):
        def load(self) -> Encoder:
            return Counting(spec.load(), seen)  # pyright: ignore[reportReturnType]

    return Spec(**asdict(spec))


@pytest.fixture
def store(tmp_path: Path, tiny_encoder: EncoderSpec, write: Callable[..., None]) -> FeatureStore:
    store = FeatureStore.create(str(tmp_path / "store"), tiny_encoder.fingerprint, tiny_encoder.dim)
    write(store, Table.CLIPS, [{"clip_id": f"avqa/{CLIP}", "corpus": "avqa"}])
    return store


def corpus(folder: Path, asked: list[tuple[str, list[str | None], object]]) -> Corpus:
    """AVQA's file of (question, choices, answer), all about one clip."""
    rows = [
        {"id": at, "video_name": CLIP, "question_text": text, "multi_choice": choices, "answer": answer}
        for at, (text, choices, answer) in enumerate(asked)
    ]
    folder.mkdir(exist_ok=True)
    (folder / f"{CLIP}.mp4").touch()
    (folder / "train_qa.json").write_text(json.dumps(rows))
    return open_corpus("avqa", folder, [folder / "train_qa.json"])


def commit(asked: Corpus, store: FeatureStore, encoder: EncoderSpec, run_id: str) -> dict[str, int]:
    plan = plan_questions(asked, store, delete_missing=run_id == "dropping")
    write_questions(plan, store, encoder, run_id)
    return plan.counts


def test_each_choice_is_embedded_behind_its_question(
    tmp_path: Path, store: FeatureStore, tiny_encoder: EncoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "ROWS_PER_FRAGMENT", 2)
    monkeypatch.setattr(questions, "TEXTS_AT_ONCE", 3)
    asked: list[tuple[str, list[str | None], object]] = [
        ("What sounds?", ["a dog", "a cat", "rain", "wind"], 2),
        ("Who plays", ["guitar?", None, "a drum", ""], 0),
        ("Who plays guitar?", ["she", "he"], 1),  # met before, as a question with its choice
        ("What sounds?", ["a dog", "a train", "rain", "a car"], 0),
        ("What sounds?", [], "a bell"),
    ]
    seen: list[str] = []
    counts = commit(corpus(tmp_path / "media", asked), store, counting(tiny_encoder, seen), "run")
    assert (counts["inputs"], counts["stored"], counts["rejects"]) == (5, 5, 0)
    assert len(store.dataset(Table.QUESTIONS).get_fragments()) == 3
    encoder, allowed = tiny_encoder.load(), TOLERANCE[tiny_encoder.dtype]
    rows = {row["question_id"]: row for row in store.questions().to_pylist()}
    for at, (text, choices, _) in enumerate(asked):
        row = rows[f"avqa/{at}"]
        words, sentence = encoder.questions([text])
        np.testing.assert_allclose(np.array(row["words"]), words[0], atol=allowed)
        np.testing.assert_allclose(row["sentence"], sentence[0], atol=allowed)
        assert row["choices"] == [choice or None for choice in choices]
        if not choices:
            assert row["choice_sentences"] is None
            continue
        assert len(row["choice_sentences"]) == len(choices)
        for choice, stored in zip(choices, row["choice_sentences"], strict=True):
            wanted = encoder.questions([f"{text} {choice}"])[1][0] if choice else np.zeros(store.dim)
            np.testing.assert_allclose(stored, wanted, atol=allowed)
    first, second = rows["avqa/0"]["choice_sentences"][:2]
    assert np.abs(np.subtract(first, second)).max() > 2 * allowed, "choices look alike"
    embedded_as_both = {"Who plays guitar?"}
    assert sorted(seen) == sorted([*set(seen), *embedded_as_both]), "a text went through the tower twice"


def test_a_changed_choice_is_embedded_again_and_alone(
    tmp_path: Path, store: FeatureStore, tiny_encoder: EncoderSpec
) -> None:
    asked: list[tuple[str, list[str | None], object]] = [
        ("What sounds?", ["a dog", "a cat"], 0),
        ("What is seen?", ["a dog", "a cat"], 1),
    ]
    commit(corpus(tmp_path / "media", asked), store, tiny_encoder, "one")
    before = {row["question_id"]: row for row in store.questions().to_pylist()}
    seen: list[str] = []
    asked[1] = ("What is seen?", ["a dog", "a cow"], 1)
    counts = commit(corpus(tmp_path / "media", asked), store, counting(tiny_encoder, seen), "two")
    assert (counts["stored"], counts["unchanged"]) == (1, 1)
    assert sorted(seen) == ["What is seen?", "What is seen? a cow", "What is seen? a dog"]
    after = {row["question_id"]: row for row in store.questions().to_pylist()}
    assert after["avqa/0"] == before["avqa/0"]
    one, two = (np.array(rows["avqa/1"]["choice_sentences"]) for rows in (before, after))
    assert np.abs(one[0] - two[0]).max() < TOLERANCE[tiny_encoder.dtype]
    assert np.abs(one[1] - two[1]).max() > 1e-3


def test_what_is_no_longer_asked_stays_unless_it_is_to_go(
    tmp_path: Path, store: FeatureStore, tiny_encoder: EncoderSpec
) -> None:
    asked: list[tuple[str, list[str | None], object]] = [
        ("What sounds?", [], "rain"),
        ("What is seen?", [], "it"),
    ]
    commit(corpus(tmp_path / "media", asked), store, tiny_encoder, "one")
    fewer = corpus(tmp_path / "media", asked[:1])
    assert not plan_questions(fewer, store).has_work
    assert plan_questions(fewer, store, delete_missing=True).to_delete == ["avqa/1"]
    assert commit(fewer, store, tiny_encoder, "dropping")["dropped"] == 1
    assert store.questions()["question_id"].to_pylist() == ["avqa/0"]
    store.commit(Table.CLIPS, [], {}, also_delete=[f"avqa/{CLIP}"])
    without = plan_questions(fewer, store, delete_missing=True)
    assert (without.to_delete, without.counts["without_clip"]) == (["avqa/0"], 1)
