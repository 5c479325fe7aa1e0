"""A store of MUSIC-AVQA's size with generated features, as extraction and `index` leave one.

Every clip has 60 s of sound and picture, tokens of unit norm around one of a few hundred directions.
Questions come from a few hundred texts, as MUSIC-AVQA's 33 templates give; words and sentences are those of
the text. Fragments are as large as extraction writes them, and neighbours are those that `index` finds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from r2scp.jobs.ingest.index import run_index
from r2scp.pipelines.extraction.flow import ROWS_PER_FRAGMENT as CLIPS_PER_FRAGMENT
from r2scp.pipelines.extraction.questions import ROWS_PER_FRAGMENT as QUESTIONS_PER_FRAGMENT
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import now
from r2scp.store.schema import Retrieval, Table

DIM = 1024  # imagebind-huge's
SECONDS = 60  # of a clip
CORPUS = "music-avqa"
ANSWERS = 42
TEXTS = 700  # distinct questions
WORDS = (6, 21)  # of a question: least, and one more than most
KINDS = 300  # directions that clips lie around
FRAGMENTS_PER_COMMIT = 16
INDEX = IndexSettings(retrieval=(Retrieval.CROSS,))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    clips: int = 9_288
    train: int = 31_927  # questions
    val: int = 4_568

    @classmethod
    def of(cls, clips: int) -> "Scale":
        """The same proportions with fewer clips."""
        whole = cls()
        part = clips / whole.clips
        return cls(clips=clips, train=round(whole.train * part), val=round(whole.val * part))

    @property
    def feature_bytes(self) -> int:
        """Of the clips' sequences, float16."""
        return self.clips * SECONDS * DIM * 2 * 2


def fill(folder: Path, scale: Scale) -> FeatureStore:
    """The store in `folder`, created if missing."""
    uri = str(folder / "store")
    if not FeatureStore.encoders(uri):
        store = FeatureStore.create(uri, "generated", DIM)
        _commit(store, Table.QUESTIONS, _questions(store, scale))
        _commit(store, Table.CLIPS, _clips(store, scale))
        run_index(store, INDEX, lambda mode, done, total: None)
    return FeatureStore.open(uri)


def _commit(store: FeatureStore, table: Table, parts: Iterator[pa.Table]) -> None:
    staged = []
    for part in parts:
        staged.append(store.stage(table, part))
        if len(staged) == FRAGMENTS_PER_COMMIT:
            store.commit(table, staged, {"run": "fill"})
            staged = []
    store.commit(table, staged, {"run": "fill"})


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def _clips(store: FeatureStore, scale: Scale) -> Iterator[pa.Table]:
    rng = np.random.default_rng(1)
    kinds_KD = _unit(rng.standard_normal((2 * KINDS, DIM), np.float32))
    for start in range(0, scale.clips, CLIPS_PER_FRAGMENT[1]):
        numbers = np.arange(start, min(start + CLIPS_PER_FRAGMENT[1], scale.clips))
        ids = [f"{CORPUS}/{number:05}" for number in numbers]
        row: dict[str, object] = {"clip_id": ids, "video_id": ids, "source_id": ids}
        row |= {
            "corpus": [CORPUS] * len(ids),
            "split": ["train"] * len(ids),
            "ingested_at": [now()] * len(ids),
        }
        for at, name in enumerate(("audio", "visual")):
            noise_RLD = rng.standard_normal((len(ids), SECONDS, DIM), np.float32) / np.float32(DIM**0.5)
            tokens_RLD = _unit(kinds_KD[at * KINDS + numbers % KINDS, None] + noise_RLD).astype(np.float16)
            row[name] = _sequences(tokens_RLD.reshape(-1), [SECONDS] * len(ids))
            row[f"{name}_key"] = _vectors(_unit(tokens_RLD.astype(np.float32).mean(axis=1)))
            row[f"{name}_status"] = ["present"] * len(ids)
        yield _table(store, Table.CLIPS, row, len(ids))


def _questions(store: FeatureStore, scale: Scale) -> Iterator[pa.Table]:
    rng = np.random.default_rng(2)
    words = [_unit(rng.standard_normal((n, DIM), np.float32)) for n in rng.integers(*WORDS, size=TEXTS)]
    sentences_TD = _unit(np.stack([part.mean(axis=0) for part in words]))
    halves = [part.astype(np.float16) for part in words]
    for split, count in (("train", scale.train), ("val", scale.val)):
        for start in range(0, count, QUESTIONS_PER_FRAGMENT):
            numbers = range(start, min(start + QUESTIONS_PER_FRAGMENT, count))
            texts, clips = (rng.integers(most, size=len(numbers)) for most in (TEXTS, scale.clips))
            parts = [halves[text] for text in texts]
            row: dict[str, object] = {
                "question_id": [f"{CORPUS}/{split}/{number:05}" for number in numbers],
                "clip_id": [f"{CORPUS}/{clip:05}" for clip in clips],
                "corpus": [CORPUS] * len(numbers),
                "split": [split] * len(numbers),
                "question": [f"Question {text} ?" for text in texts],
                "type": ["Audio-Visual/Counting"] * len(numbers),
                "answer": [f"answer {at}" for at in rng.integers(ANSWERS, size=len(numbers))],
                "choices": pa.array([[]] * len(numbers), pa.list_(pa.string())),
                "answer_index": [-1] * len(numbers),
                "words": _sequences(np.concatenate(parts).reshape(-1), [len(part) for part in parts]),
                "sentence": _vectors(sentences_TD[texts]),
            }
            yield _table(store, Table.QUESTIONS, row, len(numbers))


def _vectors(values_RD: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_RD.reshape(-1)), DIM)


def _sequences(flat: np.ndarray, lengths: list[int]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _vectors(flat))


def _table(store: FeatureStore, table: Table, row: dict[str, object], rows: int) -> pa.Table:
    """Columns that are not named are null."""
    schema = store.address(table).schema
    return pa.table([_column(row.get(field.name), field, rows) for field in schema], schema=schema)


def _column(values: object, field: pa.Field, rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(rows, field.type)
    return values if isinstance(values, pa.Array) else pa.array(values, field.type)
