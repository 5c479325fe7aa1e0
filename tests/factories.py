"""Tiny rows of stores for tests; the same at every call."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa

from r2scp.pipelines.extraction.embed import key_of
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

WIDTH = 12  # of the embeddings in `question_store`
LEARNABLE = 16  # width of the embeddings in `learnable_store`
#: Of questions in `evaluated_run`, split `odd`.
HOSTILE_TYPES = ("[bold]x[bold]", "a\x1b[2J/b\x1b]0;c\x07", "\u202egpj/exe\r\n", "Audio", "Audio/", "/x", "")
HOSTILE_TYPES += ("Audio/" + 200 * "long ", "Audio/" + 200 * "x", "Ton/字 | 字")


def picture_and_sound(seconds: float, hertz: int = 440, picture: str = "testsrc") -> list[str]:
    """ffmpeg's arguments for a clip with both streams."""
    return [
        *("-f", "lavfi", "-i", f"{picture}=size=64x64:rate=8:duration={seconds}"),
        *("-f", "lavfi", "-i", f"sine=frequency={hertz}:sample_rate=16000:duration={seconds}"),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "aac", "-shortest"),
    ]


def unit_rows(rng: np.random.Generator, rows: int) -> np.ndarray:
    """float16 (rows, WIDTH) of unit norm."""
    drawn = rng.standard_normal((rows, WIDTH))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


def clip_row(number: int, seed: int) -> dict[str, object]:
    """Every 7th clip is deaf, every 11th blind; two of a source are neighbours; 1 to 7 s."""
    rng = np.random.default_rng((seed, number))
    corpus = ("music-avqa", "avqa")[number % 2]
    row: dict[str, object] = {
        "clip_id": f"{corpus}/{number:03d}",
        "corpus": corpus,
        "source_id": f"youtube{number // 4}" if number else "",
        "split": ("train", "train", "val", "train", "test")[number % 5],
        "ingested_at": datetime(2026, 1, 31, tzinfo=UTC),
    }
    for name, gone in (("audio", number % 7 == 6), ("visual", number % 11 == 10)):
        tokens_TD = unit_rows(rng, int(rng.integers(1, 8)))
        row[name] = None if gone else list(tokens_TD)
        row[f"{name}_key"] = None if gone else key_of(tokens_TD)
    return row


def question_row(number: int, clip: Mapping[str, object]) -> dict[str, object]:
    """MUSIC-AVQA's have one of four answers, AVQA's four choices, of which one may be null."""
    rng = np.random.default_rng((7, number))
    text = f"What is sound {number % 9} ?"
    words_WD = unit_rows(np.random.default_rng(crc32(text.encode())), 2 + number % 9 % 4)
    row: dict[str, object] = {
        "question_id": f"{clip['corpus']}/{number * 37 % 101:03d}",
        "clip_id": clip["clip_id"],
        "corpus": clip["corpus"],
        "split": ("train", "val", "train", "test")[number // 2 % 4],
        "question": text,
        "type": f"type {number % 3}",
        "answer": ("two", "flute", "yes", "no")[int(rng.integers(4))],
        "choices": [],
        "answer_index": -1,
        "words": list(words_WD),
        "sentence": key_of(words_WD),
    }
    if clip["corpus"] == "avqa":
        right = int(rng.integers(4))
        choices = [None if number % 3 == 0 and at == right - 1 else f"choice {at}" for at in range(4)]
        sentences_KD = [np.zeros(WIDTH, np.float16) if c is None else unit_rows(rng, 1)[0] for c in choices]
        row |= {"choices": choices, "choice_sentences": sentences_KD}
        row |= {"answer_index": right, "answer": choices[right]}
    return row


def write_rows(
    store: FeatureStore, table: Table, rows: Sequence[Mapping[str, object]], parts: int = 1
) -> None:
    """In one commit of several fragments."""
    schema, size = store.address(table).schema, -(-len(rows) // parts)
    cut = [list(rows[at : at + size]) for at in range(0, len(rows), size)]
    store.commit(table, [store.stage(table, pa.Table.from_pylist(part, schema)) for part in cut], {})


def learnable_clip(number: int, split: str, rng: np.random.Generator) -> dict[str, object]:
    """3 to 6 s, of kind `number % 4`."""
    corpus, kind = "music-avqa" if number < 26 else "avqa", number % 4
    row: dict[str, object] = {"clip_id": f"{corpus}/{number}", "corpus": corpus, "split": split}
    row |= {"source_id": f"video{number}", "uri": f"/nowhere/{number}.mp4", "labels": [str(kind)]}
    for name, direction in (("audio", kind), ("visual", 4 + kind)):
        tokens_TD = near_axis(direction, int(rng.integers(3, 7)), rng)
        row |= {name: list(tokens_TD), f"{name}_key": key_of(tokens_TD)}
    return row


def learnable_question(clip: Mapping[str, Any], which: int, rng: np.random.Generator) -> dict[str, object]:
    """0: what kind; 1: whether it is an even one; 2: which of four choices."""
    kind = int(clip["labels"][0])
    answer = ("yes", "no")[kind % 2] if which == 1 else f"kind {kind}"
    row: dict[str, object] = {name: clip[name] for name in ("clip_id", "corpus", "split")}
    row |= {"question_id": f"{clip['clip_id']}/{which}", "question": f"question {which} ?", "answer": answer}
    words_WD = near_axis(8 + which, 2 + which, np.random.default_rng(which))
    row |= {"type": f"type {which}", "choices": [], "answer_index": -1, "words": list(words_WD)}
    row["sentence"] = key_of(words_WD)
    if which == 2:
        order = rng.permutation(4).tolist()
        sentences_KD = [near_axis(12 + kind, 1, np.random.default_rng(kind))[0] for kind in order]
        row |= {"choices": [f"kind {kind}" for kind in order], "choice_sentences": sentences_KD}
        row["answer_index"] = order.index(kind)
    return row


def near_axis(direction: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    """float16 (rows, LEARNABLE), unit vectors near one axis."""
    drawn = np.eye(LEARNABLE)[direction] + 0.1 * rng.standard_normal((rows, LEARNABLE))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


def odd_questions(clips: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Train and test questions of other types than `learnable_question` gives, on its 26 clips of MUSIC-AVQA.

    Split `test`: 30 about clips 16 (deaf) to 25, some of types that training has not, and 3 of them with an
    answer that it never saw; 2 about missing clips. Split `odd`: hostile types.
    """
    rng, questions = np.random.default_rng(10), []
    counting, place = "Audio-Visual/Counting", "Visual/Location"
    for at in range(6):  # the most frequent of `place` is none: it must not count as an answer
        questions.append(learnable_question(clips[at], at % 2, rng) | {"type": ("type 0", place)[at % 2]})
        questions[-1] |= {"question_id": f"more/{at}", "answer": ("no", "")[at in (1, 3)]}
    for at in range(30):
        kind = ("type 0", "type 1", counting, place, "Audio-Visual/Existential")[at % 5]
        questions.append(
            learnable_question(clips[16 + at // 3], at % 2, rng) | {"type": kind, "split": "test"}
        )
        questions[-1] |= {"question_id": f"test/{at}"} | ({"answer": "bagpipe"} if at in (3, 7, 13) else {})
    questions += [questions[-1] | {"question_id": f"gone/{at}", "clip_id": "gone"} for at in range(2)]
    for at, kind in enumerate(HOSTILE_TYPES):
        questions.append(learnable_question(clips[18 + at % 8], 0, rng) | {"type": kind, "split": "odd"})
        questions[-1] |= {"question_id": f"odd/{at}"}
    return questions
