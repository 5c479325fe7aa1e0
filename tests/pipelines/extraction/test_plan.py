"""What a run has to do, told from files and memory alone: nothing is planned twice, nothing is forgotten."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from r2scp.pipelines.corpora.formats import Corpus, open_corpus
from r2scp.pipelines.extraction.plan import InputRecord, PlanOptions, input_records, metadata_of, plan_clips
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import METADATA_COLUMNS, Table

FINGERPRINT = "grid1"
SCOPE = PlanOptions(decode_fingerprint=FINGERPRINT)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Four files that no one will decode."""
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(b"x" * (number + 1))
    return open_corpus("folder", tmp_path)


def remembered(corpus: Corpus, **changes: object) -> dict[str, InputRecord]:
    """What a store knows after it has taken in all of `corpus`, with some facts changed."""
    known = {}
    for clip in corpus.clips():
        facts = os.stat(clip.uri)
        told = {"bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns, "content_sha256": "ab"}
        known[clip.clip_id] = InputRecord(**told | {"decode_fingerprint": FINGERPRINT} | changes)
    return known


def test_an_empty_store_needs_all(corpus: Corpus) -> None:
    plan = plan_clips(corpus, {}, SCOPE)
    assert (plan.inputs, plan.unchanged, plan.gone, plan.missing_files) == (4, 0, [], 0)
    assert list(plan.pending) == [f"folder/{n}.mp4" for n in range(4)]
    assert plan.sources["clip_id"].to_pylist() == list(plan.pending)
    assert plan.sources["known_sha256"].to_pylist() == [""] * 4
    assert all(Path(uri).is_absolute() for uri in plan.sources["uri"].to_pylist())


def test_a_full_store_needs_nothing(corpus: Corpus) -> None:
    plan = plan_clips(corpus, remembered(corpus), SCOPE)
    assert (plan.inputs, plan.unchanged) == (4, 4)
    assert not plan.pending
    assert plan.sources.num_rows == 0


@pytest.mark.parametrize("change", [{"bytes": 99}, {"mtime_ns": 1}])
def test_a_file_that_looks_changed_is_compared_by_content(corpus: Corpus, change: dict) -> None:
    plan = plan_clips(corpus, remembered(corpus, **change), SCOPE)
    assert len(plan.pending) == 4
    assert plan.sources["known_sha256"].to_pylist() == ["ab"] * 4


def test_another_decoder_needs_all_again(corpus: Corpus) -> None:
    """Even where the content is the same: its digest must not make the file count as unchanged."""
    plan = plan_clips(corpus, remembered(corpus, decode_fingerprint="older"), SCOPE)
    assert len(plan.pending) == 4
    assert plan.sources["known_sha256"].to_pylist() == [""] * 4


def test_dead_letters_wait_for_a_change_or_to_be_asked(corpus: Corpus) -> None:
    known = remembered(corpus, failure="corrupt", attempts=2)
    plan = plan_clips(corpus, known, SCOPE)
    assert (plan.already_failed, plan.inputs) == (4, 4)
    assert not plan.pending
    again = plan_clips(corpus, known, PlanOptions(decode_fingerprint=FINGERPRINT, retry_failed=True))
    assert again.already_failed == 0
    assert again.sources["attempts"].to_pylist() == [2] * 4
    assert again.sources["known_sha256"].to_pylist() == [""] * 4, "a dead letter's content is not stored"
    Path(corpus.tree.uri("2.mp4")).write_bytes(b"mended")
    assert list(plan_clips(corpus, known, SCOPE).pending) == ["folder/2.mp4"]


def test_a_dead_letter_of_another_decoder_is_tried_again(corpus: Corpus) -> None:
    known = remembered(corpus, failure="corrupt", decode_fingerprint="older")
    assert len(plan_clips(corpus, known, SCOPE).pending) == 4


def test_other_annotations_of_the_same_file_need_no_decoding(corpus: Corpus) -> None:
    clips = {clip.clip_id: clip for clip in corpus.clips()}
    known = {}
    for clip_id, before in remembered(corpus).items():
        row = {name: getattr(clips[clip_id], name) for name in METADATA_COLUMNS}
        row |= {"split": "test"} if clip_id == "folder/2.mp4" else {}
        known[clip_id] = replace(before, metadata=metadata_of(row))
    plan = plan_clips(corpus, known, SCOPE)
    assert (plan.unchanged, len(plan.pending)) == (4, 0)
    assert [row["clip_id"] for row in plan.metadata_changed] == ["folder/2.mp4"]
    assert plan.metadata_changed[0]["split"] == "train"


def test_a_limit_counts_clips_on_the_disk(corpus: Corpus) -> None:
    plan = plan_clips(corpus, {}, PlanOptions(decode_fingerprint=FINGERPRINT, limit=3))
    assert plan.inputs == len(plan.pending) == 3
    known = remembered(corpus) | {"folder/old.mp4": InputRecord(1, 1, "", FINGERPRINT)}
    limited = plan_clips(corpus, known, PlanOptions(decode_fingerprint=FINGERPRINT, limit=2))
    assert (limited.unchanged, limited.gone) == (2, []), "beyond the limit nobody looked"


def test_what_is_gone_is_named(corpus: Corpus) -> None:
    lost = {f"folder/old{n:02}.mp4": InputRecord(1, 1, "", FINGERPRINT) for n in range(25)}
    plan = plan_clips(corpus, remembered(corpus) | lost, SCOPE)
    assert plan.gone == list(lost)


def test_annotated_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "here.mp4").write_bytes(b"x")
    questions = tmp_path / "mine.csv"
    questions.write_text("video,question,answer\nhere,What ?,this\nnowhere,What ?,that\n")
    corpus = open_corpus("folder", tmp_path, [questions])
    known = {"folder/nowhere": InputRecord(1, 1, "ab", FINGERPRINT)}
    plan = plan_clips(corpus, known, SCOPE)
    assert (plan.inputs, plan.missing_files) == (1, 1)
    assert plan.gone == ["folder/nowhere"]


def test_a_file_that_vanishes_after_it_was_listed_goes_into_the_flow(corpus: Corpus) -> None:
    """Its failure is the decode stage's to tell, and is not told again while it stays away."""
    known = remembered(corpus)
    Path(corpus.tree.uri("1.mp4")).unlink()
    assert list(plan_clips(corpus, known, SCOPE).pending) == ["folder/1.mp4"]
    known["folder/1.mp4"] = InputRecord(None, None, None, FINGERPRINT, "unreadable", 1)
    assert plan_clips(corpus, known, SCOPE).already_failed == 1


def test_a_large_corpus_is_planned_in_one_pass(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(corpus.clips())
    passes = []

    def many() -> Iterator:
        passes.append(1)
        for number in range(3_000):
            yield type(first)(
                clip_id=f"folder/{number}",
                corpus="folder",
                video_id=str(number),
                source_id=str(number),
                split="train",
                labels=("a",),
                uri=first.uri,
            )

    monkeypatch.setattr(corpus, "clips", many)
    plan = plan_clips(corpus, {}, SCOPE)
    assert plan.sources.num_rows == len(plan.pending) == plan.inputs == 3_000
    assert len(passes) == 1


def test_dead_letters_that_may_pass_are_tried_again_and_not_for_ever(corpus: Corpus) -> None:
    known = remembered(corpus)
    ids = sorted(known)
    failed = {
        ids[0]: replace(known[ids[0]], failure="timeout", attempts=2),
        ids[1]: replace(known[ids[1]], failure="timeout", attempts=3),
        ids[2]: replace(known[ids[2]], failure="corrupt", attempts=1),
    }
    plan = plan_clips(corpus, known | failed, PlanOptions(decode_fingerprint=FINGERPRINT, attempts=3))
    assert (list(plan.pending), plan.retried, plan.already_failed) == ([ids[0]], 1, 2)
    assert plan_clips(corpus, known | failed, SCOPE).already_failed == 3


def test_why_a_clip_is_to_be_done(corpus: Corpus) -> None:
    known = remembered(corpus)
    ids = sorted(known)
    held = {
        ids[0]: replace(known[ids[0]], mtime_ns=1),
        ids[1]: replace(known[ids[1]], decode_fingerprint="older"),
        ids[2]: known[ids[2]],
    }
    plan = plan_clips(corpus, held, SCOPE)
    assert (plan.changed, plan.decoder_changed, plan.unchanged, plan.new) == (1, 1, 1, 1)


def test_records_come_from_the_newer_of_row_and_failure(tmp_path: Path, write: Callable[..., None]) -> None:
    store, noon = (
        FeatureStore.create(str(tmp_path / "store"), "encoder", 4),
        datetime(2026, 1, 31, 12, tzinfo=UTC),
    )
    facts = {
        "corpus": "c",
        "bytes": 10,
        "mtime_ns": 5,
        "content_sha256": "ab",
        "decode_fingerprint": FINGERPRINT,
    }
    clip = facts | {"split": "train", "labels": ["a", "b"], "ingested_at": noon}
    ids = ("c/fine", "c/broke", "c/mended")
    write(
        store,
        Table.CLIPS,
        [*(clip | {"clip_id": name} for name in ids), clip | {"clip_id": "o/1", "corpus": "o"}],
    )
    failure = facts | {"reason": "corrupt", "attempts": 3, "bytes": 20}
    failures = {"c/broke": timedelta(seconds=1), "c/mended": timedelta(seconds=-1), "c/never": timedelta(0)}
    write(
        store, Table.FAILURES, [failure | {"clip_id": name, "at": noon + by} for name, by in failures.items()]
    )
    stored = InputRecord(10, 5, "ab", FINGERPRINT, metadata=("train", ("a", "b"), None, None))
    failed = InputRecord(20, 5, "ab", FINGERPRINT, "corrupt", 3)
    assert input_records(store, "c") == {
        "c/fine": stored,
        "c/mended": stored,
        "c/broke": failed,
        "c/never": failed,
    }
    assert input_records(store, "o'ther") == {}
