"""What an epoch costs, in counts: rows and bytes read, calls, memory allocated, forwards of experts.

No clock is read, so that the machine may be busy. Twelve clips of 40 s and sixty questions about them in four
texts; D = 1024 makes a batch large enough for memory that goes round.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pytest
import torch
from torch import Tensor

from r2scp.jobs.ingest.index import run_index
from r2scp.model.batch import AUDIO, Tokens
from r2scp.model.config import ModelConfig, Stage
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.batches import expert_cache as expert_states
from r2scp.pipelines.batches import pooled_gather
from r2scp.pipelines.batches.dataset import BatchRequest, Dataset, NeighbourRows
from r2scp.pipelines.batches.examples import Clips, Examples, Pins, QuestionFilter
from r2scp.pipelines.batches.expert_cache import ExpertCache
from r2scp.pipelines.batches.prefetch import prefetch, shuffled_batches
from r2scp.pipelines.extraction.embed import key_of
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table
from r2scp.store.token_cache import TokenCache

Write = Callable[[FeatureStore, Table, Sequence[Mapping[str, object]]], None]

DIM, SECONDS, WORDS, CLIPS, QUESTIONS, TEXTS = 1024, 40, 5, 12, 60, 4
ANSWERS = ["yes", "no"]
CLIP_BYTES = SECONDS * DIM * 2  # of one modality
BATCH = 15
INDEX = IndexSettings(retrieval=(Retrieval.CROSS,), n=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, write: Write) -> FeatureStore:
    store = FeatureStore.create(str(tmp_path_factory.mktemp("cost") / "store"), "cost", DIM)
    rng = np.random.default_rng(3)

    def unit(rows: int) -> np.ndarray:
        drawn = rng.standard_normal((rows, DIM))
        return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)

    clips = []
    for number in range(CLIPS):
        row: dict[str, object] = {"clip_id": f"c/{number}", "corpus": "c", "split": "train"}
        row["source_id"] = f"video{number}"
        for name in ("audio", "visual"):
            tokens_TD = unit(SECONDS)
            row |= {name: list(tokens_TD), f"{name}_key": key_of(tokens_TD)}
        clips.append(row)
    texts = [unit(WORDS) for _ in range(TEXTS)]
    questions = [
        {
            "question_id": f"q/{number:02}",
            "clip_id": f"c/{number % CLIPS}",
            "corpus": "c",
            "split": "train",
            "question": f"text {number % TEXTS} ?",
            "type": "t",
            "answer": ANSWERS[number % 2],
            "choices": [],
            "answer_index": -1,
            "words": list(texts[number % TEXTS]),
            "sentence": key_of(texts[number % TEXTS]),
        }
        for number in range(QUESTIONS)
    ]
    write(store, Table.CLIPS, clips)
    write(store, Table.QUESTIONS, questions)
    run_index(store, INDEX, lambda mode, done, total: None)
    return store


@pytest.fixture
def dataset(store: FeatureStore) -> Dataset:
    pins = Pins.latest(store)
    clips = Clips.read(store, pins.clips)
    return Dataset(
        store=store,
        pins=pins,
        clips=clips,
        examples=Examples.read(store, pins, clips, QuestionFilter(split="train"), ANSWERS),
        neighbours=NeighbourRows.read(store, pins, clips, INDEX, Retrieval.CROSS, 2),
        cache=TokenCache(1 << 24),
    )


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Columns and rows of every read by row number from now on."""
    calls: list[tuple[list[str], int]] = []
    real = lance.LanceDataset.take

    def noted(self: lance.LanceDataset, rows: Sequence[int], columns: list[str]) -> object:
        calls.append(([str(column) for column in columns], len(rows)))
        return real(self, rows, columns=columns)

    monkeypatch.setattr(lance.LanceDataset, "take", noted)
    return calls


@pytest.fixture
def no_spare() -> Iterator[None]:
    pooled_gather._pool.clear()
    yield
    pooled_gather._pool.clear()


def whole(rows: np.ndarray) -> BatchRequest:
    """The most that a batch can hold."""
    return BatchRequest.uniform(len(rows), AUDIO, hide=False, farthest=True)


def epoch(dataset: Dataset, number: int) -> list[np.ndarray]:
    return shuffled_batches(len(dataset.examples), BATCH, (1, number))


def test_an_epoch_reads_each_row_once_and_the_next_none(
    dataset: Dataset, taken: list[tuple[list[str], int]]
) -> None:
    for rows in epoch(dataset, 0):
        dataset.batch(rows, whole(rows))
    read = dict.fromkeys(("audio", "visual", "words"), 0)
    for columns, count in taken:
        for column in columns:
            read[column] += count
    assert read == {"audio": CLIPS, "visual": CLIPS, "words": TEXTS}
    assert dataset.cache.bytes == 2 * CLIPS * CLIP_BYTES + TEXTS * WORDS * DIM * 2
    assert len(taken) <= 4 * 4, "more than four reads for a batch"
    together = sum(count for columns, count in taken if columns == ["audio", "visual"])
    assert together > CLIPS / 2, "modalities of one clip were read apart"
    taken.clear()
    for number in (1, 2):
        for rows in epoch(dataset, number):
            dataset.batch(rows, whole(rows))
    assert taken == []


def test_sentences_are_held_once_for_a_text(dataset: Dataset) -> None:
    assert dataset._sentences_TC.shape == (TEXTS, DIM)


def test_a_smaller_cache_reads_again_and_stays_small(
    dataset: Dataset, taken: list[tuple[list[str], int]]
) -> None:
    few = replace(dataset, cache=TokenCache(20 * CLIP_BYTES))  # of 24 sequences
    for number in range(3):
        for rows in epoch(few, number):
            batch, expected = few.batch(rows, whole(rows)), dataset.batch(rows, whole(rows))
            assert torch.equal(batch.visual_BLC, expected.visual_BLC)
            assert few.cache.bytes <= 20 * CLIP_BYTES
    assert sum(few._clips.rows_read.values()) > 2 * CLIPS


@pytest.mark.usefixtures("no_spare")
def test_batches_are_written_into_memory_that_was_used_before(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New memory is allocated only while batches are in flight."""
    allocated: list[int] = []
    real = pooled_gather._allocate

    def noted(size: int) -> np.ndarray:
        allocated.append(size)
        return real(size)

    monkeypatch.setattr(pooled_gather, "_allocate", noted)
    batches = [rows for number in range(6) for rows in epoch(dataset, number)]
    seen = 0
    for at, _ in enumerate(prefetch(lambda rows: dataset.batch(rows, whole(rows)), batches)):
        if at == 12:
            seen = len(allocated)
    gc.collect()
    large = 4  # tensors of a batch that are not small: sound, picture, nearest, farthest
    assert 0 < len(allocated) <= large * 6, "two wait, one is worked on, one is being made, one goes"
    assert len(allocated) - seen <= large
    assert pooled_gather.pooled_bytes() <= pooled_gather.POOL_BYTES


@pytest.mark.usefixtures("no_spare")
def test_memory_goes_round_only_when_nobody_has_it() -> None:
    rows = torch.arange(4 * pooled_gather.MIN_POOLED_BYTES, dtype=torch.float32).view(4, -1)
    first = pooled_gather.take_rows(rows, torch.tensor([1, 0]))
    part = first[1, :3]  # shares its memory
    kept = part.clone()
    address = first.data_ptr()
    del first
    second = pooled_gather.take_rows(rows, torch.tensor([2, 3]))
    assert second.data_ptr() != address
    assert torch.equal(part, kept)
    del part
    third = pooled_gather.take_rows(rows, torch.tensor([3, 1]))
    assert third.data_ptr() == address, "it was not used again"
    assert torch.equal(third, rows[[3, 1]])
    assert torch.equal(second, rows[[2, 3]])
    assert pooled_gather.take_rows(rows, torch.tensor([0, 1]), out=third) is third
    assert torch.equal(third, rows[:2])


@pytest.mark.usefixtures("no_spare")
def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled_gather, "POOL_BYTES", 3 * pooled_gather.MIN_POOLED_BYTES)
    many = [pooled_gather.pooled_empty((pooled_gather.MIN_POOLED_BYTES,), torch.uint8) for _ in range(6)]
    many.clear()
    assert pooled_gather.pooled_bytes() == 3 * pooled_gather.MIN_POOLED_BYTES
    small = pooled_gather.pooled_empty((pooled_gather.MIN_POOLED_BYTES - 1,), torch.uint8)
    del small
    large = pooled_gather.pooled_empty(
        (pooled_gather.MAX_OVERSIZE * pooled_gather.MIN_POOLED_BYTES + 1,), torch.uint8
    )  # none of them fits
    assert pooled_gather.pooled_bytes() == 3 * pooled_gather.MIN_POOLED_BYTES
    assert large.numel() > pooled_gather.MAX_OVERSIZE * pooled_gather.MIN_POOLED_BYTES


def test_a_clip_is_read_once_and_passes_each_expert_once(
    dataset: Dataset, taken: list[tuple[list[str], int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage II: two forwards of each modality in all; batch by batch it would be nine for each question."""
    monkeypatch.setattr(expert_states, "CLIPS_PER_FORWARD", 5)
    torch.manual_seed(1)
    config = ModelConfig(encoder_dim=DIM, classes=len(ANSWERS), dim=16, heads=2, neighbours=2)
    model = R2SCP(config).set_stage(Stage.MIXING)
    passed = {AUDIO: 0, AUDIO + 1: 0}
    through = model.experts.forward

    def counted(features: Tensor, mask: Tensor, source: int, expert: int) -> Tokens:
        if expert in passed:
            passed[expert] += len(mask)
        return through(features, mask, source, expert)

    monkeypatch.setattr(model.experts, "forward", counted)
    dataset.batch(epoch(dataset, 0)[0], whole(epoch(dataset, 0)[0]))
    taken.clear()
    states = ExpertCache(model, [dataset], tmp_path, torch.device("cpu"))
    read = {name: sum(count for columns, count in taken if columns == [name]) for name in ("audio", "visual")}
    assert 0 < min(read.values()) <= max(read.values()) <= CLIPS
    assert dataset.cache.bytes <= TEXTS * WORDS * DIM * 2, "clips that nobody reads again are kept"
    assert passed == {AUDIO: 2 * CLIPS, AUDIO + 1: 2 * CLIPS}
    assert states.forwards == 4 * CLIPS + TEXTS
    taken.clear()
    for rows in epoch(dataset, 0):
        encoded = states.encoded_batch(dataset, rows, whole(rows))
        assert encoded.common[AUDIO] is not None
        assert encoded.common[1 - AUDIO] is None, "nobody recovers it"
    assert taken == []
    assert passed == {AUDIO: 2 * CLIPS, AUDIO + 1: 2 * CLIPS}
    passed |= dict.fromkeys(passed, 0)
    for rows in epoch(dataset, 0):
        model.encode(dataset.batch(rows, whole(rows)), AUDIO)
    assert sum(passed.values()) == QUESTIONS * (2 + 1 + 2 + 2)
