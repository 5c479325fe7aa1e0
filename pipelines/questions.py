"""Questions of a corpus to rows of `questions`, embedded by the text tower.

Only questions about clips that the store holds are stored. Each distinct text is embedded once: a corpus
of 32,000 questions from 33 templates has far fewer texts than questions.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from r2scp.pipelines.corpus import Corpus, QuestionRow
from r2scp.pipelines.embed import Encoder, EncoderSpec
from r2scp.store.feature_store import FeatureStore
from r2scp.store.runs import now
from r2scp.store.schema import Table
from r2scp.store.transaction import sql_literal

COMPARED = ("clip_id", "split", "question", "type", "answer", "choices", "answer_index")
ROWS_PER_FRAGMENT = 4_096


def commit_questions(
    corpus: Corpus, store: FeatureStore, encoder: EncoderSpec, run_id: str, dry_run: bool = False
) -> dict[str, int]:
    """Store what is new or changed among the corpus's questions; the account of all of them.

    Counts: `inputs` (well-formed questions), `stored`, `unchanged`, `without_clip` (their clip is not in the
    store), `rejects`, `duplicates`. With `dry_run` nothing is embedded or written.
    """
    counts = {"inputs": 0, "stored": 0, "unchanged": 0, "without_clip": 0}
    where = f"corpus = {sql_literal(corpus.name)}"
    clips = set(store.clips(columns=["clip_id"], where=where)["clip_id"].to_pylist())
    held = store.questions(columns=["question_id", *COMPARED], where=where).to_pylist()
    known = {row["question_id"]: _content(row) for row in held}
    wanted: list[QuestionRow] = []
    for question in corpus.questions():
        counts["inputs"] += 1
        if question.clip_id not in clips:
            counts["without_clip"] += 1
        elif known.get(question.question_id) == _content(_plain(question)):
            counts["unchanged"] += 1
        else:
            counts["stored"] += 1
            wanted.append(question)
    counts["rejects"] = corpus.question_tally.rejects.total()
    counts["duplicates"] = corpus.question_tally.duplicates
    if wanted and not dry_run:
        loaded = encoder.load()
        staged = [store.stage(Table.QUESTIONS, table) for table in _tables(wanted, loaded, store, run_id)]
        store.commit(Table.QUESTIONS, staged, {"run": run_id, "sequence": "questions"})
    return counts


def _plain(question: QuestionRow) -> dict[str, object]:
    return {name: getattr(question, name) for name in COMPARED}


def _content(row: Mapping[str, object]) -> tuple[object, ...]:
    choices = row["choices"]
    assert isinstance(choices, list | tuple)
    return tuple(tuple(choices) if name == "choices" else row[name] for name in COMPARED)


def _tables(
    questions: Sequence[QuestionRow], encoder: Encoder, store: FeatureStore, run_id: str
) -> Iterator[pa.Table]:
    schema = store.address(Table.QUESTIONS).schema
    embedded: dict[str, tuple[list[np.ndarray], np.ndarray]] = {}
    for start in range(0, len(questions), ROWS_PER_FRAGMENT):
        part = questions[start : start + ROWS_PER_FRAGMENT]
        texts = sorted({question.question for question in part} - embedded.keys())
        if texts:
            words, sentences = encoder.questions(texts)
            for text, words_WD, sentence_D in zip(texts, words, sentences, strict=True):
                embedded[text] = list(words_WD.astype(np.float16)), sentence_D
        yield pa.Table.from_pylist(
            [
                _plain(question)
                | {
                    "question_id": question.question_id,
                    "corpus": question.corpus,
                    "words": embedded[question.question][0],
                    "sentence": embedded[question.question][1],
                    "encoder_fingerprint": store.fingerprint,
                    "run_id": run_id,
                    "ingested_at": now(),
                }
                for question in part
            ],
            schema=schema,
        )
