"""A batch holds the values of the store's rows and nothing that is hidden.

The oracle builds every tensor one number at a time from plain rows of the tables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace

import lance
import numpy as np
import pytest
import torch
from torch import Tensor

from r2scp.model.batch import AUDIO, VISUAL, Batch, Neighbours
from r2scp.pipelines.batches.dataset import NO_MODALITY, BatchRequest, Dataset, NeighbourRows
from r2scp.pipelines.batches.examples import Clips, Pins
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval, Table

Open = Callable[..., Dataset]
Write = Callable[[FeatureStore, Table, Sequence[Mapping[str, object]]], None]

NAMES = ("audio", "visual")
ANSWERS = ("yes", "two", "no")


def by_key(table: list[dict], *keys: str) -> dict:
    return {tuple(row[key] for key in keys) if keys[1:] else row[keys[0]]: row for row in table}


def padded(parts: Sequence[Sequence | None], dim: int) -> tuple[Tensor, Tensor]:
    longest = max([len(part) for part in parts if part is not None], default=0) or 1
    tokens, mask = torch.zeros(len(parts), longest, dim), torch.zeros(len(parts), longest, dtype=torch.bool)
    for at, part in enumerate(parts):
        for second, token in enumerate(part or ()):
            tokens[at, second] = torch.tensor(token)
            mask[at, second] = True
    return tokens, mask


class Oracle:
    """The store as plain rows."""

    def __init__(self, dataset: Dataset) -> None:
        store = dataset.store
        self.dataset, self.dim = dataset, store.dim
        self.clips = by_key(store.clips().to_pylist(), "clip_id")
        self.questions = by_key(store.questions().to_pylist(), "question_id")
        self.near = by_key(store.neighbours().to_pylist(), "clip_id", "missing")

    def question(self, row: int) -> dict:
        return self.questions[self.dataset.examples.question_ids[row]]

    def clip(self, row: int) -> dict:
        return self.clips[self.question(row)["clip_id"]]

    def recovered(self, row: int, missing: int) -> int:
        absent = [column for column in (AUDIO, VISUAL) if self.clip(row)[NAMES[column]] is None]
        return absent[0] if missing == NO_MODALITY and len(absent) == 1 else missing

    def own(self, row: int, column: int, request: BatchRequest, at: int) -> list | None:
        return None if request.hide and request.missing_B[at] == column else self.clip(row)[NAMES[column]]

    def neighbours(
        self, rows: np.ndarray, request: BatchRequest, side: str, n: int
    ) -> tuple[Tensor, Tensor, list]:
        parts, ids = [], []
        for row, missing in zip(rows, request.missing_B.tolist(), strict=True):
            name = (
                "nothing" if (recovered := self.recovered(row, missing)) == NO_MODALITY else NAMES[recovered]
            )
            result = self.near.get((self.clip(row)["clip_id"], name), {f"{side}_ids": []})[f"{side}_ids"][:n]
            parts += [self.clips[clip_id][name] for clip_id in result] + [None] * (n - len(result))
            ids.append([self.dataset.clips.ids.index(i) for i in result] + [-1] * (n - len(result)))
        tokens, mask = padded(parts, self.dim)
        return tokens.unflatten(0, (len(rows), n)), mask.unflatten(0, (len(rows), n)), ids


def same(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(result[0].float(), expected[0])
    assert torch.equal(result[1], expected[1])


def expect_batch(dataset: Dataset, rows: np.ndarray, request: BatchRequest, n: int = 3) -> Batch:
    """The batch, after a check of each tensor."""
    oracle, batch = Oracle(dataset), dataset.batch(rows, request)
    for column, name in enumerate(NAMES):
        parts = [oracle.own(row, column, request, at) for at, row in enumerate(rows)]
        same(batch.sequence(name), padded(parts, oracle.dim))
        assert batch.present_BM[:, column].tolist() == [part is not None for part in parts]
    same(batch.sequence("words"), padded([oracle.question(row)["words"] for row in rows], oracle.dim))
    assert batch.sentence_BC.tolist() == [oracle.question(row)["sentence"] for row in rows]
    recovered = [
        oracle.recovered(row, missing) for row, missing in zip(rows, request.missing_B.tolist(), strict=True)
    ]
    expected = {"nearest": batch.retrieved} | ({"farthest": batch.farthest} if request.farthest else {})
    for side, result in expected.items():
        if dataset.neighbours is None or all(column == NO_MODALITY for column in recovered):
            assert result is None
            continue
        assert result is not None
        tokens, mask, ids = oracle.neighbours(rows, request, side, n)
        same((result.tokens_BNLC, result.mask_BNL), (tokens, mask))
        assert result.ids_BN.tolist() == ids
    assert request.farthest or batch.farthest is None
    assert batch.target_B is not None
    assert batch.target_B.tolist() == dataset.examples.target_B[rows].tolist()
    return batch


@pytest.mark.parametrize(
    ("answers", "missing", "hide", "farthest"),
    [
        (ANSWERS, NO_MODALITY, True, False),
        (ANSWERS, AUDIO, True, True),
        (ANSWERS, VISUAL, False, True),
        (None, NO_MODALITY, False, True),
        (None, AUDIO, False, False),
        (None, VISUAL, True, False),
    ],
)
def test_every_tensor(
    question_store: FeatureStore,
    open_dataset: Open,
    answers: object,
    missing: int,
    hide: bool,
    farthest: bool,
) -> None:
    dataset = open_dataset(question_store, "test", answers)
    rows = np.random.default_rng(missing + 1).permutation(len(dataset.examples))
    request = BatchRequest.uniform(len(rows), missing, hide=hide, farthest=farthest)
    batch = expect_batch(dataset, rows, request)
    assert not batch.present_BM.all()
    expect_batch(dataset, np.array([3, 3, 0]), BatchRequest.uniform(3, missing, hide=hide, farthest=farthest))
    expect_batch(open_dataset(question_store, "test", answers, n=0), rows, request)
    if missing == NO_MODALITY:
        assert (
            dataset.batch(rows, replace(request, hide=False)).present_BM.tolist() == batch.present_BM.tolist()
        )


@pytest.mark.parametrize("hide", [False, True])
def test_rows_that_miss_different_things(
    question_store: FeatureStore, open_dataset: Open, hide: bool
) -> None:
    dataset = open_dataset(question_store, "train", ANSWERS, n=2)
    rows = np.arange(len(dataset.examples))[::-1]
    request = BatchRequest(missing_B=rows % 3 - 1, hide=hide, farthest=True)
    batch = expect_batch(dataset, rows.copy(), request, n=2)
    assert batch.retrieved is not None
    hit_B = batch.retrieved.mask_BNL.any(dim=2)
    for at, row in enumerate(rows):  # a deaf clip has no query to find pictures with
        alone = dataset.batch(
            rows[at : at + 1].copy(), BatchRequest.uniform(1, int(request.missing_B[at]), hide=hide)
        )
        recovered = dataset.recovered_modality(
            rows[at : at + 1], BatchRequest.uniform(1, int(request.missing_B[at]))
        )[0]
        queried = recovered != NO_MODALITY and bool(dataset.examples.present_BM[row, 1 - recovered])
        assert hit_B[at].tolist() == [queried] * 2
        assert (alone.retrieved is None) is bool(recovered == NO_MODALITY)
    assert not hit_B.any(dim=1).all()


def test_missing_choices_are_masked(question_store: FeatureStore, open_dataset: Open) -> None:
    dataset = open_dataset(question_store, "train")
    rows, oracle = np.arange(len(dataset.examples)), Oracle(dataset)
    question = dataset.question(rows)
    assert question.choices_BKC is not None
    assert question.choices_mask_BK is not None
    listed = [oracle.question(row)["choices"] for row in rows.tolist()]
    assert question.choices_mask_BK.tolist() == [[choice is not None for choice in row] for row in listed]
    assert not question.choices_mask_BK.all()
    expected = [oracle.question(row)["choice_sentences"] for row in rows.tolist()]
    assert question.choices_BKC.tolist() == expected
    batch = dataset.batch(rows, BatchRequest.uniform(len(rows), AUDIO))
    assert torch.equal(batch.question.choices_BKC, question.choices_BKC)  # pyright: ignore
    assert open_dataset(question_store, "train", ANSWERS).question(rows).choices_BKC is None


def test_fewer_choices_than_others(own_store: FeatureStore, open_dataset: Open, write: Write) -> None:
    short = own_store.questions(where="corpus = 'avqa' AND split = 'val'").to_pylist()[0]
    short |= {"choices": ["a", "b"], "choice_sentences": short["choice_sentences"][:2], "answer_index": 1}
    write(own_store, Table.QUESTIONS, [short])
    dataset = open_dataset(own_store, "val")
    at = dataset.examples.question_ids.index(short["question_id"])
    question = dataset.question(np.array([at, (at + 1) % len(dataset.examples)]))
    assert question.choices_mask_BK is not None
    assert question.choices_mask_BK.shape == (2, 4)
    assert question.choices_mask_BK[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("missing", [AUDIO, VISUAL])
def test_what_is_hidden_is_not_read(
    own_store: FeatureStore, open_dataset: Open, write: Write, missing: int
) -> None:
    """The store holds NaN there: neither it nor anything computed from it may reach a batch."""
    name = NAMES[missing]
    outside = own_store.clips(where=f"split != 'train' AND {name} IS NOT NULL").to_pylist()
    poison = [np.full(own_store.dim, np.nan, np.float16)]
    write(own_store, Table.CLIPS, [row | {name: poison * len(row[name])} for row in outside])
    poisoned = {row["clip_id"] for row in outside}
    dataset = open_dataset(own_store, "test", ANSWERS)
    rows = np.array([at for at in range(len(dataset.examples)) if clip_of(dataset, at) in poisoned])
    request = BatchRequest.uniform(len(rows), missing, farthest=True)
    batch = dataset.batch(rows, request)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(batch))
    assert not all(
        bool(tensor.isfinite().all()) for tensor in tensors(dataset.batch(rows, replace(request, hide=False)))
    )
    alone = open_dataset(own_store, "test", ANSWERS, n=0)
    alone.batch(rows, request)
    assert alone._clips.rows_read[name] == 0
    assert alone._clips.rows_read[NAMES[1 - missing]] > 0


def clip_of(dataset: Dataset, row: int) -> str:
    return dataset.clips.ids[dataset.examples.clip_row_B[row]]


def tensors(batch: Batch) -> list[Tensor]:
    values = [getattr(batch, name) for name in batch.__slots__]
    return [
        part
        for value in values
        for part in (value if isinstance(value, Neighbours) else (value,))
        if part is not None
    ]


def test_only_the_requested_index_is_read(own_store: FeatureStore, open_dataset: Open) -> None:
    pins = Pins.latest(own_store)
    clips = Clips.read(own_store, pins.clips)
    settings = IndexSettings(retrieval=(Retrieval.PAIRED,), n=4)
    with pytest.raises(StoreError, match=r"at most those of the index, 4; got 5"):
        NeighbourRows.read(own_store, pins, clips, settings, Retrieval.PAIRED, 5)
    with pytest.raises(StoreError, match=r"run `r2scp-pipe index`"):
        NeighbourRows.read(own_store, pins, clips, settings, Retrieval.CROSS, 3)
    whole = NeighbourRows.read(own_store, pins, clips, settings, Retrieval.PAIRED, 4)
    first = int(whole.nearest_RN[Modality.AUDIO].max())  # a hit that goes after the index was made
    own_store.commit(Table.CLIPS, [], {}, also_delete=[clips.ids[first]])
    dataset = open_dataset(own_store, "train", ANSWERS, n=3)  # the fourth comes after it
    assert dataset.neighbours is not None
    for modality, rows_RN in dataset.neighbours.nearest_RN.items():
        for row, result in enumerate(rows_RN.tolist()):
            before = whole.nearest_RN[modality][clips.row_of[dataset.clips.ids[row]]].tolist()
            kept = [clips.ids[hit] for hit in before if hit not in (first, NO_MODALITY)][:3]
            assert [dataset.clips.ids[hit] for hit in result if hit != NO_MODALITY] == kept
            assert result[len(kept) :] == [NO_MODALITY] * (3 - len(kept))
    lance.LanceDataset.drop(own_store.address(Table.NEIGHBOURS).uri)
    with pytest.raises(StoreError, match=r"r2scp-pipe index"):
        NeighbourRows.read(own_store, Pins.latest(own_store), clips, settings, Retrieval.PAIRED, 3)


def test_random_negatives(question_store: FeatureStore, open_dataset: Open) -> None:
    dataset = open_dataset(question_store, "train", ANSWERS)
    rows, clips = dataset.neighbours, dataset.clips
    assert rows is not None
    drawn, again, other = (rows.with_random_farthest(clips, seed) for seed in (1, 1, 2))
    sources = np.array(clips.sources)
    for column, modality in enumerate(Modality):
        rows_RN = drawn.farthest_RN[modality]
        assert np.array_equal(drawn.nearest_RN[modality], rows.nearest_RN[modality])
        assert np.array_equal(rows_RN, again.farthest_RN[modality])
        assert not np.array_equal(rows_RN, other.farthest_RN[modality])
        assert not np.array_equal(rows_RN, rows.farthest_RN[modality])
        assert np.array_equal(rows_RN == NO_MODALITY, rows.farthest_RN[modality] == NO_MODALITY)
        hit_RN = rows_RN != NO_MODALITY
        assert not (hit_RN & (sources[rows_RN] == sources[:, None])).any()
        assert clips.present_RM[rows_RN[hit_RN], column].all()
        assert {split_of(question_store, clips.ids[hit]) for hit in rows_RN[hit_RN]} == {"train"}
    one = replace(clips, sources=["same"] * len(clips.ids))  # nobody else: the farthest stay
    kept = rows.with_random_farthest(one, 1).farthest_RN
    assert all(np.array_equal(kept[modality], rows.farthest_RN[modality]) for modality in Modality)
    assert astuple(rows)[0].keys() == set(Modality)


def split_of(store: FeatureStore, clip_id: str) -> str:
    return store.clips(["split"], f"clip_id = '{clip_id}'")["split"][0].as_py()
