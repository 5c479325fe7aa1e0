"""Whether the neighbours that a run reads agree with what they stand in for, from the store alone."""

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

    `leaks`: modality -> side -> (hits of the clip's own source, clips that had any, clips searched for), over
    the whole index; a clip that serves is itself one of those hits.
    """

    retrieval: str
    n: int  # neighbours that stand in
    depth: int  # neighbours that are kept
    clips: int  # queries
    serving: int  # clips of the bank
    labelled: int  # clips with labels
    leak_guard: bool
    agreements: dict[tuple[str, str, str], Agreements]
    scores: dict[str, tuple[np.ndarray, np.ndarray]]
    leaks: dict[str, dict[str, tuple[int, int, int]]]


def retrieval_precision(opened: TrainingData, asked: Examples) -> RetrievalPrecision:
    """Of the index that a run reads, for the clips of some questions. Raises `StoreError` without one."""
    config, store, clips = opened.config, opened.store, opened.clips
    rows = read_neighbours(store, config.index, config.retrieval, opened.pins.neighbours)
    columns = ["corpus", "split", "labels"]
    told = store.dataset(Table.CLIPS, opened.pins.clips).to_table(columns=columns, scan_in_order=True)
    labels = [[label for label in row or () if label] for row in told["labels"].to_pylist()]
    takes = config.index.bank.takes
    places = zip(told["corpus"].to_pylist(), told["split"].to_pylist(), clips.sources, strict=True)
    in_bank = np.array([takes(*place) for place in places], dtype=bool)
    sources = np.unique(np.array(clips.sources), return_inverse=True)[1]
    queries = np.unique(asked.clip_row_B)
    agreements, scores, leaks = {}, {}, {}
    facts = _facts(opened, asked), _facts(opened, opened.learning()[0])
    for column, modality in enumerate(MODALITIES):
        mine = rows.filter(pc.field("missing") == modality.value)
        bank = BankClips(in_bank_R=in_bank & clips.present_RM[:, column], sources_R=sources)
        kept = []
        for side in SIDES:
            hits_RN = _hits(mine, f"{side}_ids", clips.row_of, config.index.n)
            found = label_agreement(labels, queries, hits_RN[queries], bank)
            agreements["label", modality.value, side] = found
            agreements["answer", modality.value, side] = answer_agreement(*facts, hits_RN, bank)
            kept.append(_scores(mine, f"{side}_scores", clips.row_of, set(queries.tolist())))
        scores[modality.value] = (kept[0], kept[1])
        leaks[modality.value] = {side: _leaks(mine, f"{side}_own_source") for side in SIDES}
    return RetrievalPrecision(
        retrieval=config.retrieval.value,
        n=config.model.neighbours,
        depth=config.index.n,
        clips=len(queries),
        serving=int(in_bank.sum()),
        labelled=sum(map(bool, labels)),
        leak_guard=config.index.leak_guard,
        agreements=agreements,
        scores=scores,
        leaks=leaks,
    )


def _facts(opened: TrainingData, examples: Examples) -> list[ClipAnswer]:
    """What the questions say of their clips; those without an answer say nothing."""
    dataset = opened.store.dataset(Table.QUESTIONS, opened.pins.questions)
    table = dataset.take(examples.question_row_B, columns=["question", "answer"])
    said = zip(
        examples.clip_row_B.tolist(), *(table[c].to_pylist() for c in ("question", "answer")), strict=True
    )
    return [ClipAnswer(clip, question, answer) for clip, question, answer in said if question and answer]


def _hits(rows: pa.Table, column: str, row_of: dict[str, int], n: int) -> np.ndarray:
    """(R, N) rows of `clips`, NO_ROW where there are fewer."""
    hits_RN = np.full((len(row_of), n), NO_ROW, dtype=np.int64)
    for clip_id, ids in zip(rows["clip_id"].to_pylist(), rows[column].to_pylist(), strict=True):
        if clip_id in row_of:
            found = [row_of[hit] for hit in ids if hit in row_of][:n]
            hits_RN[row_of[clip_id], : len(found)] = found
    return hits_RN


def _scores(rows: pa.Table, column: str, row_of: dict[str, int], queries: set[int]) -> np.ndarray:
    pairs = zip(rows["clip_id"].to_pylist(), rows[column].to_pylist(), strict=True)
    return np.array([score for clip_id, found in pairs if row_of.get(clip_id) in queries for score in found])


def _leaks(rows: pa.Table, column: str) -> tuple[int, int, int]:
    counts = rows[column].to_numpy()
    return int(counts.sum()), int((counts > 0).sum()), len(counts)
