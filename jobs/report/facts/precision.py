"""Retrieval precision: whether the neighbours that a run reads agree with their query, from the store."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r2scp.jobs.report.facts.agreement import (
    NO_ROW,
    Agreements,
    BankClips,
    ClipAnswer,
    answer_agreement,
    label_agreement,
)
from r2scp.jobs.training.data import TrainingData
from r2scp.pipelines.batches.examples import MODALITIES, Examples
from r2scp.pipelines.neighbours.settings import read_neighbours
from r2scp.store.schema import Table

SIDES = ("nearest", "farthest")


@dataclass(frozen=True, kw_only=True)
class RetrievalPrecision:
    """`agreements` by (label | answer, missing modality, side); `scores` by modality: nearest, farthest.

    `same_source`: modality -> side -> (hits of the clip's own source, clips with any, clips searched for),
    over the whole index; a clip of the bank counts as such a hit of itself.
    """

    retrieval: str
    n: int  # neighbours that the model uses
    depth: int  # neighbours that are stored
    clips: int  # queries
    bank_size: int  # clips
    labelled: int  # clips with labels
    leak_guard: bool
    agreements: dict[tuple[str, str, str], Agreements]
    scores: dict[str, tuple[np.ndarray, np.ndarray]]
    same_source: dict[str, dict[str, tuple[int, int, int]]]


def retrieval_precision(opened: TrainingData, examples: Examples) -> RetrievalPrecision:
    """Of the index that a run reads, for the clips of `examples`. Raises `StoreError` without an index."""
    config, clips = opened.config, opened.clips
    rows = read_neighbours(opened.store, config.index, config.retrieval, opened.pins.neighbours)
    labels, in_bank_R = _labels_and_bank(opened)
    sources_R = np.unique(np.array(clips.sources), return_inverse=True)[1]
    queries = np.unique(examples.clip_row_B)
    answers = _clip_answers(opened, examples), _clip_answers(opened, opened.train_and_validation()[0])
    agreements, scores, same_source = {}, {}, {}
    for column, modality in enumerate(MODALITIES):
        missing = modality.value
        neighbours = rows.filter(pc.field("missing") == missing)
        bank = BankClips(in_bank_R=in_bank_R & clips.present_RM[:, column], sources_R=sources_R)
        for side in SIDES:
            hits_RN = _hits(neighbours, f"{side}_ids", clips.row_of, config.index.n)
            agreements["label", missing, side] = label_agreement(labels, queries, hits_RN[queries], bank)
            agreements["answer", missing, side] = answer_agreement(*answers, hits_RN, bank)
        near, far = (_scores(neighbours, f"{side}_scores", clips.row_of, queries) for side in SIDES)
        scores[missing] = near, far
        same_source[missing] = {side: _count_hits(neighbours, f"{side}_own_source") for side in SIDES}
    return RetrievalPrecision(
        retrieval=config.retrieval.value,
        n=config.model.neighbours,
        depth=config.index.n,
        clips=len(queries),
        bank_size=int(in_bank_R.sum()),
        labelled=sum(map(bool, labels)),
        leak_guard=config.index.leak_guard,
        agreements=agreements,
        scores=scores,
        same_source=same_source,
    )


def _labels_and_bank(opened: TrainingData) -> tuple[list[list[str]], np.ndarray]:
    """Of all clips by row: their labels, and whether they are in the memory bank."""
    dataset = opened.store.dataset(Table.CLIPS, opened.pins.clips)
    table = dataset.to_table(columns=["corpus", "split", "labels"], scan_in_order=True)
    labels = [[label for label in row or () if label] for row in table["labels"].to_pylist()]
    corpora, splits = table["corpus"].to_pylist(), table["split"].to_pylist()
    is_in_bank = opened.config.index.bank.includes
    clips = zip(corpora, splits, opened.clips.sources, strict=True)
    return labels, np.array([is_in_bank(*clip) for clip in clips], dtype=bool)


def _clip_answers(opened: TrainingData, examples: Examples) -> list[ClipAnswer]:
    """The answered questions of the examples."""
    dataset = opened.store.dataset(Table.QUESTIONS, opened.pins.questions)
    table = dataset.take(examples.question_row_B, columns=["question", "answer"])
    columns = (table[column].to_pylist() for column in ("question", "answer"))
    rows = zip(examples.clip_row_B.tolist(), *columns, strict=True)
    return [ClipAnswer(clip, question, answer) for clip, question, answer in rows if question and answer]


def _hits(rows: pa.Table, column: str, row_of: dict[str, int], n: int) -> np.ndarray:
    """(R, N) rows of `clips`, NO_ROW where there are fewer."""
    hits_RN = np.full((len(row_of), n), NO_ROW, dtype=np.int64)
    for clip_id, ids in zip(rows["clip_id"].to_pylist(), rows[column].to_pylist(), strict=True):
        if clip_id in row_of:
            hits = [row_of[hit] for hit in ids if hit in row_of][:n]
            hits_RN[row_of[clip_id], : len(hits)] = hits
    return hits_RN


def _scores(rows: pa.Table, column: str, row_of: dict[str, int], queries: np.ndarray) -> np.ndarray:
    """All scores of the queries, flat."""
    query_rows = set(queries.tolist())
    pairs = zip(rows["clip_id"].to_pylist(), rows[column].to_pylist(), strict=True)
    return np.array(
        [score for clip_id, scores in pairs if row_of.get(clip_id) in query_rows for score in scores]
    )


def _count_hits(rows: pa.Table, column: str) -> tuple[int, int, int]:
    """(hits, clips with any, clips)."""
    counts = rows[column].to_numpy()
    return int(counts.sum()), int((counts > 0).sum()), len(counts)
