"""The questions of a split as arrays of numbers, from which batches are drawn.

Only small columns are read here; features are read batch by batch (`r2scp.pipelines.batches.dataset`). Rows
are numbered in scan order of the pinned version of their table.

Legend: B questions, R clips, M the modalities, in the order of `MODALITIES`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Table
from r2scp.store.sources import disjoint_split, source_of

MODALITIES = (Modality.AUDIO, Modality.VISUAL)  # in the order of the model's columns
NO_ANSWER = -1  # target of a question whose answer no training question has: always counted as wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Pins:
    """The version of each table to read."""

    clips: int
    questions: int
    neighbours: int

    @classmethod
    def latest(cls, store: FeatureStore) -> "Pins":
        """The store's current versions."""
        versions = store.versions()
        names = (Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS)
        return cls(**{name.value: versions.get(name.value, 0) for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """All clips of a store, by row."""

    ids: list[str]
    sources: list[str]  # compared by the leak guard
    present_RM: np.ndarray  # bool: has tokens of the modality
    row_of: dict[str, int]

    @classmethod
    def read(cls, store: FeatureStore, version: int) -> "Clips":
        dataset = store.dataset(Table.CLIPS, version)
        columns = {"clip_id": "clip_id", "source_id": "source_id"}
        columns |= {m.value: f"{m.value}_key IS NOT NULL" for m in MODALITIES}
        table = dataset.to_table(columns=columns, scan_in_order=True)
        ids = table["clip_id"].to_pylist()
        pairs = zip(ids, table["source_id"].to_pylist(), strict=True)
        return cls(
            ids=ids,
            sources=[source_of(*pair) for pair in pairs],
            present_RM=np.stack([table[m.value].to_numpy() for m in MODALITIES], axis=1).astype(bool),
            row_of={clip_id: row for row, clip_id in enumerate(ids)},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionFilter:
    """Selects the questions of a split and of some corpora (empty for all).

    With `disjoint` the split is that of `disjoint_split` for the clip's source, not the corpus's own.
    """

    split: str
    corpora: tuple[str, ...] = ()
    disjoint: bool = False

    def __str__(self) -> str:
        protocol = ", disjoint by source" if self.disjoint else ""
        return f"split {self.split!r}{protocol}, corpora: {', '.join(self.corpora) or 'all'}"

    def rows(self, table: pa.Table, clips: Clips) -> pa.Table:
        """The selected rows of `table`, which has the columns clip_id, corpus and split."""
        if self.corpora:
            table = table.filter(pc.field("corpus").isin(self.corpora))
        if not self.disjoint:
            return table.filter(pc.field("split") == self.split)
        rows = (clips.row_of.get(clip_id) for clip_id in table["clip_id"].to_pylist())
        splits = [None if row is None else disjoint_split(clips.sources[row]) for row in rows]
        return table.filter(pa.array([split == self.split for split in splits], pa.bool_()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """The questions of a split, in the order of their ids."""

    question_ids: list[str]
    types: list[str]
    question_row_B: np.ndarray  # int64, of `questions`
    clip_row_B: np.ndarray  # int64, of `clips`
    target_B: np.ndarray  # int64: class, or index of the correct choice, or NO_ANSWER
    present_BM: np.ndarray  # bool: modalities of the clip
    left_out: dict[str, int]  # reason -> questions of the split that cannot be used

    def __len__(self) -> int:
        return len(self.question_ids)

    def keep(self, keep_B: np.ndarray, reason: str) -> "Examples":
        """The examples where keep_B is True; the others are counted under `reason`."""
        kept = np.flatnonzero(keep_B)
        left_out = Counter(self.left_out) + Counter({reason: len(self) - len(kept)})
        return Examples(
            question_ids=[self.question_ids[row] for row in kept],
            types=[self.types[row] for row in kept],
            question_row_B=self.question_row_B[kept],
            clip_row_B=self.clip_row_B[kept],
            target_B=self.target_B[kept],
            present_BM=self.present_BM[kept],
            left_out=dict(left_out),
        )

    @classmethod
    def read(
        cls,
        store: FeatureStore,
        pins: Pins,
        clips: Clips,
        selection: QuestionFilter,
        answers: Sequence[str] | None,
    ) -> "Examples":
        """`answers`: the classes, or None where each question has its own choices.

        Raises `StoreError` if no question can be used.
        """
        dataset = store.dataset(Table.QUESTIONS, pins.questions)
        columns = ["question_id", "clip_id", "corpus", "split", "type", "answer", "choices", "answer_index"]
        table = dataset.to_table(columns=columns, scan_in_order=True)
        table = table.append_column("row", pa.array(np.arange(table.num_rows)))
        table = selection.rows(table, clips).sort_by("question_id")
        if not table.num_rows:
            raise StoreError(
                f"the store at {store.uri} has no question ({selection}); see `r2scp-pipe status`"
            )
        clip_row_B = np.array([clips.row_of.get(c, -1) for c in table["clip_id"].to_pylist()], dtype=np.int64)
        # row -1, of a clip that is not stored, is the last: it has no modality
        present_RM = np.vstack([clips.present_RM, np.zeros((1, len(MODALITIES)), dtype=bool)])
        examples = cls(
            question_ids=table["question_id"].to_pylist(),
            types=[kind or "" for kind in table["type"].to_pylist()],
            question_row_B=table["row"].to_numpy(),
            clip_row_B=clip_row_B,
            target_B=_targets(table, answers),
            present_BM=present_RM[clip_row_B],
            left_out={},
        )
        if answers is None:
            choices = table["choices"].to_pylist()
            has_choice = np.array([any(choice is not None for choice in row or ()) for row in choices])
            examples = examples.keep(has_choice, "no choices")
            examples = examples.keep(examples.target_B != NO_ANSWER, "the right choice is not there")
        examples = examples.keep(examples.clip_row_B >= 0, "clip not in the store")
        if not len(examples):
            reasons = ", ".join(f"{count} {reason}" for reason, count in examples.left_out.items())
            raise StoreError(f"no question ({selection}) in {store.uri} can be used: {reasons}")
        return examples


def vocabulary(store: FeatureStore, pins: Pins, clips: Clips, selection: QuestionFilter) -> list[str]:
    """The answers to the selected questions, usually of the train split; the most frequent first."""
    table = store.questions(["clip_id", "corpus", "split", "answer"], version=pins.questions)
    answers = selection.rows(table, clips)["answer"].to_pylist()
    counts = Counter(answer for answer in answers if answer)
    if len(counts) < 2:
        raise StoreError(
            f"training needs at least two different answers; the store at {store.uri} has {len(counts)} "
            f"({selection})"
        )
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


def _targets(table: pa.Table, answers: Sequence[str] | None) -> np.ndarray:
    if answers is None:
        pairs = zip(table["answer_index"].to_pylist(), table["choices"].to_pylist(), strict=True)
        return np.array([_correct_choice(index, choices or ()) for index, choices in pairs], dtype=np.int64)
    classes = {answer: index for index, answer in enumerate(answers)}
    return np.array(
        [classes.get(answer, NO_ANSWER) for answer in table["answer"].to_pylist()], dtype=np.int64
    )


def _correct_choice(index: int | None, choices: Sequence[str | None]) -> int:
    if index is None or not 0 <= index < len(choices) or choices[index] is None:
        return NO_ANSWER
    return index
