"""Examples match the store's rows: targets, clips and modalities, against plain dictionaries."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import lance
import numpy as np
import pytest

from r2scp.pipelines.batches.examples import (
    MODALITIES,
    NO_ANSWER,
    Clips,
    Examples,
    Pins,
    QuestionFilter,
    vocabulary,
)
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.sources import SHARES, disjoint_split

Write = Callable[[FeatureStore, Table, Sequence[Mapping[str, object]]], None]


def examples(
    store: FeatureStore, split: str, corpora: tuple[str, ...] = (), answers: Sequence[str] | None = None
) -> Examples:
    pins = Pins.latest(store)
    selected = QuestionFilter(split=split, corpora=corpora)
    return Examples.read(store, pins, Clips.read(store, pins.clips), selected, answers)


def rows(store: FeatureStore, table: Table) -> dict[str, dict]:
    """Rows by key, in the order of a scan, with their number as "row"."""
    read = store.dataset(table).to_table(scan_in_order=True).to_pylist()
    key = "clip_id" if table is Table.CLIPS else "question_id"
    return {row[key]: row | {"row": at} for at, row in enumerate(read)}


def test_clips_are_numbered_as_they_are_read(question_store: FeatureStore) -> None:
    clips, rows_by_id = (
        Clips.read(question_store, question_store.versions()["clips"]),
        rows(question_store, Table.CLIPS),
    )
    assert clips.ids == list(rows_by_id)
    assert clips.row_of == {clip_id: row["row"] for clip_id, row in rows_by_id.items()}
    assert clips.present_RM.dtype == bool
    for at, row in enumerate(rows_by_id.values()):
        assert clips.present_RM[at].tolist() == [row[m.value] is not None for m in MODALITIES]
        assert clips.sources[at] == (row["source_id"] or f"clip:{row['clip_id']}")
    assert len(set(clips.sources)) < len(clips.ids)
    assert not clips.present_RM.all(axis=0).any()


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("corpora", [(), ("avqa",)])
def test_questions_with_classes(question_store: FeatureStore, split: str, corpora: tuple[str, ...]) -> None:
    answers = ["yes", "two", "flute", "no"]
    result = examples(question_store, split, corpora, answers)
    clips, questions = rows(question_store, Table.CLIPS), rows(question_store, Table.QUESTIONS)
    selected = [
        row
        for row in questions.values()
        if row["split"] == split and row["corpus"] in (corpora or row["corpus"])
    ]
    expected = sorted(
        (row for row in selected if row["clip_id"] in clips), key=lambda row: row["question_id"]
    )
    assert result.question_ids == [row["question_id"] for row in expected]
    assert result.types == [row["type"] for row in expected]
    assert result.question_row_B.tolist() == [row["row"] for row in expected]
    assert result.clip_row_B.tolist() == [clips[row["clip_id"]]["row"] for row in expected]
    assert result.target_B.dtype == np.int64
    assert result.target_B.tolist() == [
        answers.index(row["answer"]) if row["answer"] in answers else NO_ANSWER for row in expected
    ]
    assert result.present_BM.tolist() == [
        [clips[row["clip_id"]][m.value] is not None for m in MODALITIES] for row in expected
    ]
    dropped = len(selected) - len(expected)
    assert dropped == (split == "test" and corpora != ("avqa",))
    assert result.left_out == ({"clip not in the store": dropped} if dropped else {})
    assert len(result) == len(expected)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_questions_with_choices(question_store: FeatureStore, split: str) -> None:
    result = examples(question_store, split)
    questions = [row for row in rows(question_store, Table.QUESTIONS).values() if row["split"] == split]
    kept = {row["question_id"]: row for row in questions if row["choices"] and row["answer_index"] >= 0}
    assert result.question_ids == sorted(kept)
    assert {row["corpus"] for row in kept.values()} == {"avqa"}
    assert any(None in row["choices"] for row in kept.values())
    for question_id, target in zip(result.question_ids, result.target_B.tolist(), strict=True):
        assert kept[question_id]["choices"][target] == kept[question_id]["answer"]
    reasons = Counter({"no choices": sum(not row["choices"] for row in questions)})
    if split == "test":
        reasons["the right choice is not there"] = 1
    assert result.left_out == dict(reasons)
    assert reasons["no choices"]


def test_a_choice_that_is_null_or_beyond_is_never_right(own_store: FeatureStore, write: Write) -> None:
    train = own_store.questions(where="corpus = 'avqa' AND split = 'train'").to_pylist()
    broken = [
        train[0] | {"choices": [None, "a"], "answer_index": 0},
        train[1] | {"answer_index": 4},
        train[2] | {"answer_index": None},
        train[3] | {"choices": [None, None]},
        train[4] | {"choices": None},
    ]
    write(own_store, Table.QUESTIONS, broken)
    result = examples(own_store, "train", ("avqa",))
    assert result.left_out == {"no choices": 2, "the right choice is not there": 3}
    assert not set(result.question_ids) & {row["question_id"] for row in broken}


def test_only_counts_what_goes(question_store: FeatureStore) -> None:
    whole = examples(question_store, "val", answers=["yes", "no"])
    odd = whole.keep(np.arange(len(whole)) % 2 == 1, "even")
    assert odd.question_ids == whole.question_ids[1::2]
    assert odd.types == whole.types[1::2]
    for name in ("question_row_B", "clip_row_B", "target_B", "present_BM"):
        assert np.array_equal(getattr(odd, name), getattr(whole, name)[1::2])
    assert whole.left_out == {}
    assert odd.left_out == {"even": len(whole) - len(odd)}
    assert odd.keep(np.ones(len(odd), bool), "nothing").left_out == odd.left_out
    assert odd.keep(np.arange(len(odd)) > 0, "even").left_out == {"even": odd.left_out["even"] + 1}


def test_versions_are_pinned(own_store: FeatureStore, write: Write) -> None:
    pins = Pins.latest(own_store)
    assert pins == Pins(**{name: own_store.versions()[name] for name in ("clips", "questions", "neighbours")})
    clips = Clips.read(own_store, pins.clips)
    before = examples(own_store, "train", answers=["yes"])
    train = own_store.questions(where="split = 'train'").to_pylist()
    dropped = own_store.clips(["clip_id"])["clip_id"].to_pylist()[0]
    write(own_store, Table.QUESTIONS, [row | {"split": "val"} for row in train])
    own_store.commit(Table.CLIPS, [], {}, also_delete=[dropped])
    assert dropped not in Clips.read(own_store, own_store.versions()["clips"]).row_of
    again = Examples.read(
        own_store, pins, Clips.read(own_store, pins.clips), QuestionFilter(split="train"), ["yes"]
    )
    assert Clips.read(own_store, pins.clips).ids == clips.ids
    assert again.question_ids == before.question_ids
    assert np.array_equal(again.question_row_B, before.question_row_B)


def train_vocabulary(store: FeatureStore, corpora: tuple[str, ...] = ()) -> list[str]:
    pins = Pins.latest(store)
    selected = QuestionFilter(split="train", corpora=corpora)
    return vocabulary(store, pins, Clips.read(store, pins.clips), selected)


def test_vocabulary_is_the_train_splits(question_store: FeatureStore) -> None:
    train = [row for row in rows(question_store, Table.QUESTIONS).values() if row["split"] == "train"]
    counts = Counter(row["answer"] for row in train if row["corpus"] == "music-avqa")
    answers = train_vocabulary(question_store, ("music-avqa",))
    assert set(answers) == set(counts)
    assert "bagpipe" not in answers  # only the test split has it
    assert [counts[answer] for answer in answers] == sorted(counts.values(), reverse=True)
    assert set(train_vocabulary(question_store)) == {row["answer"] for row in train}
    result = examples(question_store, "test", ("music-avqa",), answers)
    assert result.target_B[result.question_ids.index("music-avqa/unheard")] == NO_ANSWER


def test_equally_frequent_answers_are_in_alphabetical_order(own_store: FeatureStore, write: Write) -> None:
    train = own_store.questions(where="corpus = 'music-avqa' AND split = 'train'").to_pylist()
    names = ["zither", "drum", None, "", "accordion", "bell", "zither", "bell"]
    labels = [names[at] if at < len(names) else None for at in range(len(train))]
    assert len(train) >= len(names)
    write(
        own_store, Table.QUESTIONS, [row | {"answer": name} for row, name in zip(train, labels, strict=True)]
    )
    answers = train_vocabulary(own_store, ("music-avqa",))
    assert answers == ["bell", "zither", "accordion", "drum"]


def test_no_questions_is_an_error(own_store: FeatureStore, write: Write) -> None:
    for split, corpora in (("dev", ()), ("train", ("vggsound",))):
        with pytest.raises(StoreError, match=r"has no question \(.*(dev|vggsound).*status"):
            examples(own_store, split, corpora, ["yes"])
    with pytest.raises(StoreError, match=r"can be used: \d+ no choices"):
        examples(own_store, "train", ("music-avqa",))
    with pytest.raises(StoreError, match=r"two different answers.*has 0"):
        train_vocabulary(own_store, ("vggsound",))
    own_store.commit(Table.CLIPS, [], {}, also_delete=own_store.clips(["clip_id"])["clip_id"].to_pylist())
    with pytest.raises(StoreError, match=r"can be used: \d+ clip not in the store"):
        examples(own_store, "train", (), ["yes"])


def test_a_store_without_an_index_has_no_version_of_it(own_store: FeatureStore) -> None:
    lance.LanceDataset.drop(own_store.address(Table.NEIGHBOURS).uri)
    assert Pins.latest(own_store).neighbours == 0


def test_under_a_disjoint_split_no_source_is_in_two(question_store: FeatureStore) -> None:
    pins = Pins.latest(question_store)
    clips = Clips.read(question_store, pins.clips)
    sources, ids = {}, []
    for split in SHARES:
        try:
            result = Examples.read(
                question_store, pins, clips, QuestionFilter(split=split, disjoint=True), ["yes"]
            )
        except StoreError:  # none of these few sources falls there
            continue
        ids += result.question_ids
        for row in result.clip_row_B:
            assert (
                sources.setdefault(clips.sources[row], split) == split == disjoint_split(clips.sources[row])
            )
    selected = [
        row for row in rows(question_store, Table.QUESTIONS).values() if row["clip_id"] in clips.row_of
    ]
    assert sorted(ids) == sorted(row["question_id"] for row in selected)
    assert len(set(sources.values())) > 1


def test_shares_of_the_disjoint_split() -> None:
    counts = Counter(disjoint_split(f"video{number}") for number in range(20_000))
    for split, share in SHARES.items():
        assert counts[split] / 20_000 == pytest.approx(share / 100, abs=0.01)
