"""Cached states equal those that the model computes for each batch, and each is computed once.

The oracle is `R2SCP.encode` of `Dataset.batch`; both may pad differently.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r2scp.jobs.training.stages import MixingObjective
from r2scp.model.batch import AUDIO, VISUAL, Tokens
from r2scp.model.config import ModelConfig, Stage
from r2scp.model.r2scp import R2SCP, Encoded
from r2scp.pipelines.batches import expert_cache
from r2scp.pipelines.batches.dataset import NO_MODALITY, BatchRequest, Dataset
from r2scp.pipelines.batches.expert_cache import ExpertCache
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore

Open = Callable[..., Dataset]

ANSWERS = ("yes", "two", "no", "flute")
CPU = torch.device("cpu")


def model(**changes: object) -> R2SCP:
    torch.manual_seed(1)
    config = ModelConfig(encoder_dim=12, classes=len(ANSWERS), dim=16, heads=2, k=2, dropout=0.3)
    return R2SCP(replace(config, **changes)).set_stage(Stage.MIXING)  # pyright: ignore[reportArgumentType]


def close(result: Tokens | None, expected: Tokens | None) -> None:
    """Equal where there are tokens; where not, zeros however many."""
    assert (result is None) is (expected is None)
    if result is None or expected is None:
        return
    length = max(result.mask_BL.shape[1], expected.mask_BL.shape[1])
    masks = [F.pad(part.mask_BL, (0, length - part.mask_BL.shape[1])) for part in (result, expected)]
    assert torch.equal(*masks)
    states = [
        F.pad(part.states_BLD, (0, 0, 0, length - part.states_BLD.shape[1])) for part in (result, expected)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-6)
    assert result.states_BLD.shape[1] == max(1, int(result.mask_BL.sum(dim=1).max())), (
        "more padding than needed"
    )


def equal(result: Tensor | None, expected: Tensor | None) -> None:
    assert (result is None) is (expected is None)
    assert result is None or expected is None or torch.equal(result, expected)


def same(result: Encoded, expected: Encoded) -> None:
    """`common` may be given although it is not needed."""
    for name in ("audio", "visual", "words", "retrieved", "farthest"):
        close(getattr(result, name), getattr(expected, name))
    for name in ("present_BM", "retrieved_ids_BN", "farthest_ids_BN", "target_B"):
        equal(getattr(result, name), getattr(expected, name))
    for one, two in zip(result.question, expected.question, strict=True):
        equal(one, two)
    for one, two in zip(result.common, expected.common, strict=True):
        if two is not None:
            close(one, two)


def referenced_clips(datasets: list[Dataset]) -> set[int]:
    """Rows of `clips` of their questions and of those clips' neighbours, one by one."""
    own_rows = {row for dataset in datasets for row in dataset.examples.clip_row_B.tolist()}
    all_rows = set(own_rows)
    for dataset in datasets:
        assert dataset.neighbours is not None
        for side in (dataset.neighbours.nearest_RN, dataset.neighbours.farthest_RN):
            for found_RN in side.values():
                all_rows |= {int(hit) for row in own_rows for hit in found_RN[row]}
    return all_rows - {NO_MODALITY}


@pytest.mark.parametrize(
    ("clips_per_forward", "neighbours", "choices"), [(7, 1, False), (7, 4, True), (256, 3, False)]
)
def test_states_are_what_the_model_computes(
    question_store: FeatureStore,
    open_dataset: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clips_per_forward: int,
    neighbours: int,
    choices: bool,
) -> None:
    monkeypatch.setattr(expert_cache, "CLIPS_PER_FORWARD", clips_per_forward)
    answers = None if choices else ANSWERS
    train, test = (open_dataset(question_store, split, answers, n=4) for split in ("train", "test"))
    few = test.examples.keep(test.text_B > 1, "other texts")
    test = replace(test, examples=few)
    assert len(np.unique(test.text_B)) < len(np.unique(train.text_B))
    net = model(neighbours=neighbours, classes=None if choices else len(ANSWERS))
    states = ExpertCache(net, [train, test], tmp_path, CPU)
    net.eval()  # frozen experts ignored training mode until here
    for dataset in (train, test):
        rows = np.random.default_rng(0).permutation(len(dataset.examples))
        assert not dataset.examples.present_BM[rows].all()
        for missing in (NO_MODALITY, AUDIO, VISUAL):
            for farthest in (False, True):
                request = BatchRequest.uniform(len(rows), missing, farthest=farthest)
                same(states.encoded_batch(dataset, rows, request), net.encode(dataset.batch(rows, request)))
            answer = net.answer(states.encoded_batch(dataset, rows, request))
            expected = net(dataset.batch(rows, request))
            torch.testing.assert_close(answer.logits_BK, expected.logits_BK, rtol=0, atol=1e-5)
            equal(answer.evidence.neighbours_BN, expected.evidence.neighbours_BN)
        mixed = BatchRequest(missing_B=rows % 3 - 1, farthest=True)
        same(states.encoded_batch(dataset, rows, mixed), net.encode(dataset.batch(rows, mixed)))
        twice = np.array([2, 2])
        one = BatchRequest.uniform(2, AUDIO)
        same(states.encoded_batch(dataset, twice, one), net.encode(dataset.batch(twice, one)))


@pytest.mark.parametrize("missing", [AUDIO, VISUAL])
def test_states_beside_what_is_there(
    question_store: FeatureStore, open_dataset: Open, tmp_path: Path, missing: int
) -> None:
    """Stage II: nothing is hidden, and the batch holds neighbours for the modality to drop."""
    dataset, net = open_dataset(question_store, "train", ANSWERS), model()
    states = ExpertCache(net, [dataset], tmp_path, CPU)
    present_B, known_B = dataset.examples.present_BM.all(axis=1), dataset.examples.target_B >= 0
    rows = np.flatnonzero(present_B & known_B)[::-1].copy()
    request = BatchRequest.uniform(len(rows), missing, hide=False, farthest=True)
    batch, encoded = dataset.batch(rows, request), states.encoded_batch(dataset, rows, request)
    same(encoded, net.encode(batch, missing))
    assert len(encoded) == len(rows)
    objective = MixingObjective(net.eval())
    result, expected = (objective(inputs, missing).loss for inputs in (encoded, batch))
    assert result.parts.keys() == expected.parts.keys()
    torch.testing.assert_close(result.total, expected.total, rtol=0, atol=1e-5)
    assert "rank_negative" in result.parts


@pytest.mark.parametrize(("cmr", "cap"), [(False, False), (False, True), (True, False)])
def test_without_retrieval_or_purification(
    question_store: FeatureStore, open_dataset: Open, tmp_path: Path, cmr: bool, cap: bool
) -> None:
    dataset = open_dataset(question_store, "train", ANSWERS, n=3 if cmr else 0)
    net = model(cmr=cmr, cap=cap).eval()
    states = ExpertCache(net, [dataset], tmp_path, CPU)
    rows = np.arange(len(dataset.examples))
    for missing in (NO_MODALITY, AUDIO, VISUAL):
        request = BatchRequest.uniform(len(rows), missing)
        batch, encoded = dataset.batch(rows, request), states.encoded_batch(dataset, rows, request)
        same(encoded, net.encode(batch))
        torch.testing.assert_close(net.answer(encoded).logits_BK, net(batch).logits_BK, rtol=0, atol=1e-5)
    if not (cmr or cap):  # common features are not needed and not computed
        clips = len(np.unique(dataset.examples.clip_row_B))
        assert states.forwards == 2 * clips + len(np.unique(dataset.text_B))
        assert encoded.common == (None, None)


def test_each_clip_passes_each_expert_once(
    question_store: FeatureStore, open_dataset: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, seen = model(), []
    through = net.experts.forward

    def counted(features: Tensor, mask: Tensor, source: int, expert: int) -> Tokens:
        seen.append((source, expert, len(mask)))
        return through(features, mask, source, expert)

    monkeypatch.setattr(net.experts, "forward", counted)
    wholes = [open_dataset(question_store, split, ANSWERS, n=1) for split in ("train", "val")]
    in_files = [whole.examples.keep(whole.text_B == 3, "other texts") for whole in wholes]
    train, val = (replace(whole, examples=few) for whole, few in zip(wholes, in_files, strict=True))
    assert train.neighbours is not None
    random = replace(train, neighbours=train.neighbours.with_random_farthest(train.clips, 5))
    datasets = [train, val, random]
    states = ExpertCache(net, datasets, tmp_path, CPU)
    clips = len(referenced_clips(datasets))
    assert len(referenced_clips([train])) < len(referenced_clips([train, val])) < clips < len(train.clips.ids)
    texts = [len(np.unique(dataset.text_B)) for dataset in datasets]
    assert texts[0] < len(train.examples)
    assert sorted(seen[:4]) == [(source, expert, clips) for source in (0, 1) for expert in (0, 1)]
    assert seen[4:] == [(2, 2, count) for count in texts]
    assert states.forwards == 4 * clips + sum(texts)
    for dataset in datasets:
        rows = np.arange(len(dataset.examples))
        states.encoded_batch(dataset, rows, BatchRequest.uniform(len(rows), AUDIO, farthest=True))
    assert len(seen) == 7, "a batch went through the experts"
    monkeypatch.undo()
    rows = np.arange(len(random.examples))
    request = BatchRequest.uniform(len(rows), VISUAL, farthest=True)
    same(states.encoded_batch(random, rows, request), net.encode(random.batch(rows, request)))


@pytest.mark.parametrize("change", [{"freeze_experts": False}, None])
def test_experts_that_move_are_refused(
    question_store: FeatureStore, open_dataset: Open, tmp_path: Path, change: dict | None
) -> None:
    dataset = open_dataset(question_store, "val", ANSWERS)
    net = model(**change) if change else model().set_stage(Stage.EXPERTS)
    with pytest.raises(ValueError, match="frozen"):
        ExpertCache(net, [dataset], tmp_path, CPU)


def test_states_in_files(
    question_store: FeatureStore, open_dataset: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, net, folder = open_dataset(question_store, "val", ANSWERS), model(), tmp_path / "run" / "states"
    rows = np.arange(len(dataset.examples))
    request = BatchRequest.uniform(len(rows), AUDIO, farthest=True)
    in_memory = ExpertCache(net, [dataset], folder, CPU).encoded_batch(dataset, rows, request)
    assert not folder.exists()
    shapes: list[tuple[int, ...]] = []
    mapped = np.memmap

    def memmap(*values: object, shape: tuple[int, ...], **named: object) -> np.ndarray:
        shapes.append(shape)
        return mapped(*values, shape=shape, **named)  # pyright: ignore

    monkeypatch.setattr(expert_cache, "IN_MEMORY_BYTES", 1)
    monkeypatch.setattr(np, "memmap", memmap)
    in_files = ExpertCache(net, [dataset], folder, CPU)
    assert len(shapes) == 5
    same(in_files.encoded_batch(dataset, rows, request), in_memory)
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_reported(
    question_store: FeatureStore, open_dataset: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(question_store, "val", ANSWERS)
    monkeypatch.setattr(expert_cache, "IN_MEMORY_BYTES", 1)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot keep [\d,]+ bytes of states in .*file/states"):
        ExpertCache(model(), [dataset], tmp_path / "file" / "states", CPU)

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"No space left"):
        ExpertCache(model(), [dataset], tmp_path / "states", CPU)
    assert list((tmp_path / "states").iterdir()) == []
