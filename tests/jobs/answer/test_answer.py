"""Answers about recordings outside the store, one at a time and many at once.

Missing modalities are detected whatever the cause. Many requests get the same answers as one by one, in
order, and none waits for the next one to arrive.
"""

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r2scp.jobs.answer.answerer import Answerer, AnswerOptions
from r2scp.jobs.answer.records import Rejected, Request, Result
from r2scp.pipelines.recordings.recording import Recording
from r2scp.store.errors import FailureReason, FingerprintMismatch, MediaError, R2SCPError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "How many instruments are sounding in the video?"


def logits(result: Result) -> dict[str, float]:
    return {candidate.answer: candidate.logit for candidate in result.answers}


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
def test_missing_modalities_are_detected(
    answerer: Answerer, damaged: dict[str, Path], name: str, missing: str | None, why: str
) -> None:
    result = answerer.answer(damaged[name], QUESTION)
    assert result.missing == missing
    streams = {"audio": result.audio, "visual": result.visual}
    assert {key for key, stream in streams.items() if not stream.used} == ({missing} if missing else set())
    if missing:
        assert (streams[missing].why, result.recovery, len(result.neighbours)) == (why, "neighbours", 3)
        assert result.router[missing] > 0
    else:
        assert (result.recovery, result.neighbours, result.recovered) == ("none", [], [])


def test_missing_none_accepts_silence(answerer: Answerer, damaged: dict[str, Path]) -> None:
    assert answerer.answer(damaged["silent"], QUESTION, "none").missing is None
    assert answerer.answer(damaged["deaf"], QUESTION, "none").missing == "audio"


def test_a_recording_without_content_is_rejected(answerer: Answerer, damaged: dict[str, Path]) -> None:
    with pytest.raises(MediaError, match="silence from beginning to end; the picture is blank") as caught:
        answerer.answer(damaged["nothing"], QUESTION)
    assert caught.value.reason is FailureReason.NOTHING_RECORDED
    with pytest.raises(MediaError, match="you asked to ignore it"):
        answerer.answer(damaged["deaf"], QUESTION, "visual")


def test_a_partial_stream_is_used_and_noted(
    world, answerer: Answerer, tmp_path: Path, render: Callable
) -> None:
    whole = world.video(world.whole()[0])
    cut = render(tmp_path / "cut.mkv", ["-i", whole, "-c", "copy"])
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    result = answerer.answer(cut, QUESTION)
    assert result.missing is None
    partial = [s for s in (result.audio, result.visual) if s.status == "partial"]
    assert partial
    assert all(stream.used and "could be decoded; they were used" in stream.why for stream in partial)
    assert any("could be decoded" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"question": "  "}, "a question must have words"),
        ({"missing": "smell"}, "missing must be one of auto, none, audio, visual; got 'smell'"),
        ({"choices": ("a", "b")}, "takes no choices"),
        ({"choices": ("a",) * 1001}, "at most 1000 choices; got 1001"),
    ],
)
def test_invalid_requests(world, answerer: Answerer, changes: dict, says: str) -> None:
    request = replace(Request(video=world.video(world.whole()[0]), question=QUESTION), **changes)
    with pytest.raises(UsageError, match=says):
        answerer.answer_request(request)
    refused = next(answerer.answer_all([request]))
    assert isinstance(refused, Rejected)
    assert refused.reason == "usage"


def test_mismatched_encoder_store_and_model(world, tmp_path: Path, tiny_weights: Path) -> None:
    other = FeatureStore.create(str(tmp_path / "other"), "another-encoder", world.store.dim)
    with pytest.raises(FingerprintMismatch, match="was trained on features of encoder"):
        Answerer.open(other, world.run)
    with pytest.raises(FingerprintMismatch, match="name the encoder that filled it"):
        Answerer.open(world.store, world.run, AnswerOptions(weights=str(tiny_weights)))
    foreign = world.checkpoint(tmp_path / "foreign", ["a", "b"], store=other_fingerprint(world, tmp_path))
    with pytest.raises(FingerprintMismatch, match="was filled by encoder"):
        Answerer.open(other_fingerprint(world, tmp_path), foreign)
    empty = FeatureStore.create(str(tmp_path / "empty"), world.store.fingerprint, world.store.dim)
    with pytest.raises(R2SCPError, match="has no clips"):
        Answerer.open(empty, world.run)
    with pytest.raises(R2SCPError, match="no snapshot 'nowhere'"):
        Answerer.open(world.store, world.run, AnswerOptions(at="nowhere"))


def other_fingerprint(world, tmp_path: Path) -> FeatureStore:
    """A store that no encoder of ours has filled."""
    store = FeatureStore.create(str(tmp_path / "strange"), "strange", world.store.dim)
    run = world.store.clips().slice(0, 4)
    if not store.dataset(Table.CLIPS).count_rows():
        store.commit(Table.CLIPS, [store.stage(Table.CLIPS, run)], {})
    return store


def test_multiple_choice(world, damaged: dict[str, Path], tmp_path: Path) -> None:
    opened = Answerer.open(world.store, world.checkpoint(tmp_path / "run", None))
    result = opened.answer(damaged["deaf"], QUESTION, choices=("one", "", "two"))
    assert sorted(one.answer for one in result.answers) == ["one", "two"]
    assert sum(one.probability for one in result.answers) == pytest.approx(1, abs=1e-5)
    turned = opened.answer(damaged["deaf"], QUESTION, choices=("two", "one"))
    assert logits(turned) == pytest.approx(logits(result), abs=1e-3)  # their order is no evidence
    with pytest.raises(UsageError, match="give some with --choice"):
        opened.answer(damaged["deaf"], QUESTION)


def test_choices_in_one_batch_are_separate(world, damaged: dict[str, Path], tmp_path: Path) -> None:
    opened = Answerer.open(world.store, world.checkpoint(tmp_path / "run", None))
    lists = [("one", "two"), ("three", "", "four", "five"), (), ("one",), ("six", "seven", "eight")]
    requests = [
        Request(id=str(at), video=str(damaged["deaf"]), question=QUESTION, choices=lists[at % len(lists)])
        for at in range(3 * len(lists))
    ]
    for request, one in zip(requests, opened.answer_all(requests), strict=True):
        if not request.choices:
            assert isinstance(one, Rejected)
            assert "give some with --choice" in one.message
            continue
        assert isinstance(one, Result)
        assert {each.answer for each in one.answers} == set(filter(None, request.choices))
        assert sum(each.probability for each in one.answers) == pytest.approx(1, abs=1e-5)
        expected = logits(opened.answer_request(request))
        assert logits(one) == pytest.approx(expected, abs=0.02 + 0.02 * np.ptp(list(expected.values())))


def many_requests(world, damaged: dict[str, Path]) -> list[Request | Rejected]:
    videos = [*map(str, damaged.values()), *(world.video(name) for name in world.whole()[:3]), "/nowhere.mp4"]
    requests: list[Request | Rejected] = [
        Request(id=str(at), video=videos[at % len(videos)], question=(QUESTION, "Is it loud?")[at % 2])
        for at in range(2 * len(videos) + 5)
    ]
    for at, missing in enumerate(("audio", "visual", "none", "auto")):  # of one file, one after another
        requests.append(Request(id=missing, video=videos[at // 4 - 2], question=QUESTION, missing=missing))
    requests.insert(3, Rejected(reason="usage", message="a line that is none", id="bad"))
    return requests


def test_a_batch_gives_the_results_of_single_requests_in_order(
    world, answerer: Answerer, damaged: dict[str, Path]
) -> None:
    requests = many_requests(world, damaged)
    results = list(answerer.answer_all(requests))
    assert [one.id for one in results] == [one.id for one in requests]
    assert results[3] is requests[3]
    rejected = Counter(one.reason for one in results if isinstance(one, Rejected))
    assert rejected == {"usage": 1, "nothing_recorded": 3, "unreadable": 2}
    for request, one in zip(requests, results, strict=True):
        if isinstance(one, Rejected) or isinstance(request, Rejected):
            continue
        expected = answerer.answer_request(request)
        scale = np.ptp(list(logits(expected).values()))
        assert logits(one) == pytest.approx(logits(expected), abs=0.02 * scale)
        assert [each.clip_id for each in one.neighbours] == [each.clip_id for each in expected.neighbours]
        assert one.router == pytest.approx(expected.router, abs=0.01)
        dissonance, again = ([each.dissonance for each in part.recovered] for part in (one, expected))
        assert dissonance == pytest.approx(again, abs=0.02)


def test_an_invalid_request_does_not_affect_others_about_its_file(world, answerer: Answerer) -> None:
    good = Request(video=world.video(world.whole()[0]), question=QUESTION)
    bad = [replace(good, question=" "), replace(good, choices=("a", "b")), replace(good, missing="smell")]
    for requests in ([good, *bad, good], [*bad, good, *bad]):
        for request, one in zip(requests, answerer.answer_all(requests), strict=True):
            assert isinstance(one, Result if request is good else Rejected)
            assert isinstance(one, Result) or one.reason == "usage"


def test_a_file_is_decoded_once_for_all_its_requests(
    world, answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    read = Recording.read.__func__

    def counted(cls: type[Recording], path: str, *arguments: object, **named: object) -> Recording:
        counts[path] += 1
        return read(cls, path, *arguments, **named)

    monkeypatch.setattr(Recording, "read", classmethod(counted))
    videos = [world.video(name) for name in world.whole()[:2]]
    requests = [Request(video=videos[at % 2], question=f"{QUESTION} {at % 5}") for at in range(40)]
    assert all(isinstance(one, Result) for one in answerer.answer_all(requests))
    assert counts == dict.fromkeys(videos, 1)


def test_a_request_is_answered_before_the_next_one_arrives(world, answerer: Answerer) -> None:
    video, received = world.video(world.whole()[0]), threading.Event()

    def slowly() -> Iterator[Request]:
        yield Request(video=video, question=QUESTION, id="first")
        assert received.wait(timeout=60), "the first answer waited for the second question"
        yield Request(video=video, question=QUESTION, id="second")

    results = []
    for one in answerer.answer_all(slowly()):
        results.append(one.id)
        received.set()
    assert results == ["first", "second"]


def test_errors_of_the_requests_are_raised(world, answerer: Answerer) -> None:
    def broken() -> Iterator[Request]:
        yield Request(video=world.video(world.whole()[0]), question=QUESTION)
        raise OSError("the line went dead")

    results = answerer.answer_all(broken())
    assert isinstance(next(results), Result)
    with pytest.raises(OSError, match="went dead"):
        next(results)


def test_closing_the_results_stops_the_feeder(world, answerer: Answerer) -> None:
    def endless() -> Iterator[Request]:
        while True:
            yield Request(video=world.video(world.whole()[0]), question=QUESTION)

    results = answerer.answer_all(endless())
    assert isinstance(results, Generator)
    assert isinstance(next(results), Result)
    results.close()
    feeders = [thread for thread in threading.enumerate() if thread.name == "requests"]
    for thread in feeders:
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.realmedia
def test_every_hostile_file_is_answered_or_rejected_with_a_reason(
    answerer: Answerer, shared_dir: Path
) -> None:
    files = sorted(
        path
        for part in ("hostile", "audio")
        for path in (shared_dir / "media" / part).rglob("*")
        if path.is_file()
    )
    results = list(answerer.answer_all([Request(video=str(path), question=QUESTION) for path in files]))
    assert len(results) == len(files) > 50
    reasons = Counter(one.reason if isinstance(one, Rejected) else "" for one in results)
    assert not reasons.keys() - {"", *FailureReason}
    assert reasons[""] > len(files) / 2
    for one in results:
        if isinstance(one, Result):
            assert np.isfinite([each.logit for each in one.answers]).all()
            assert one.missing is None or len(one.neighbours) == 3
