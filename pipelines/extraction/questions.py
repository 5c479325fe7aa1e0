"""Questions of a corpus to rows of `questions`, embedded by the text tower.

Only questions about clips in the store are stored. Each distinct text is embedded once: a corpus
of 32,000 questions from 33 templates has far fewer texts than questions.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from r2scp.pipelines.corpora.corpus import Corpus, QuestionRow
from r2scp.pipelines.extraction.embed import Encoder, EncoderSpec
from r2scp.store.commits import sql_literal
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import now
from r2scp.store.schema import Table

COMPARED = ("clip_id", "split", "question", "type", "answer", "choices", "answer_index")
ROWS_PER_FRAGMENT = 4_096
TEXTS_AT_ONCE = 1_024  # of twenty words each: 80 MB at D = 1024, float32


@dataclass(kw_only=True)
class QuestionPlan:
    """What to do about the questions of one corpus, and the counts of all of them.

    Counts: `inputs` (well-formed questions), `stored`, `unchanged`, `without_clip` (their clip is not in the
    store), `rejects`, `duplicates`, `dropped` (to delete: no longer in the corpus, or without their clip).
    """

    to_store: list[QuestionRow]
    to_delete: list[str]  # question ids
    counts: dict[str, int]

    @property
    def has_work(self) -> bool:
        return bool(self.to_store or self.to_delete)


def plan_questions(corpus: Corpus, store: FeatureStore, delete_missing: bool = False) -> QuestionPlan:
    """Compare a corpus's questions with the store's; `delete_missing`: delete those only in the store."""
    counts = {"inputs": 0, "stored": 0, "unchanged": 0, "without_clip": 0}
    where = f"corpus = {sql_literal(corpus.name)}"
    clips = set(store.clips(columns=["clip_id"], where=where)["clip_id"].to_pylist())
    rows = store.questions(columns=["question_id", *COMPARED], where=where).to_pylist()
    stored = {row["question_id"]: _content(row) for row in rows}
    plan = QuestionPlan(to_store=[], to_delete=[], counts=counts)
    with_clip: set[str] = set()
    for question in corpus.questions():
        counts["inputs"] += 1
        if question.clip_id not in clips:
            counts["without_clip"] += 1
            continue
        with_clip.add(question.question_id)
        if stored.get(question.question_id) == _content(_plain(question)):
            counts["unchanged"] += 1
        else:
            counts["stored"] += 1
            plan.to_store.append(question)
    counts["rejects"] = corpus.question_tally.rejects.total()
    counts["duplicates"] = corpus.question_tally.duplicates
    if delete_missing:
        plan.to_delete = [question_id for question_id in stored if question_id not in with_clip]
    counts["dropped"] = len(plan.to_delete)
    return plan


def write_questions(plan: QuestionPlan, store: FeatureStore, encoder: EncoderSpec, run_id: str) -> None:
    """Embed and store new and changed questions and delete old ones, in one new version."""
    staged = []
    if plan.to_store:
        tables = _tables(plan.to_store, encoder.load(), store, run_id)
        staged = [store.stage(Table.QUESTIONS, table) for table in tables]
    properties = {"run": run_id, "sequence": "questions"}
    store.commit(Table.QUESTIONS, staged, properties, also_delete=plan.to_delete)


def _plain(question: QuestionRow) -> dict[str, object]:
    return {name: getattr(question, name) for name in COMPARED}


def _content(row: Mapping[str, object]) -> tuple[object, ...]:
    choices = row["choices"]
    assert isinstance(choices, list | tuple)
    return tuple(tuple(choices) if name == "choices" else row[name] for name in COMPARED)


def choice_texts(question: str, choices: Sequence[str | None]) -> list[str | None]:
    """The text by which the answer head scores a choice: the question followed by the choice."""
    return [None if choice is None else f"{question} {choice}" for choice in choices]


class TextEmbeddings:
    """Embeddings of the texts so far. The words of choices are not kept: nothing reads them."""

    def __init__(self, encoder: Encoder) -> None:
        self.words: dict[str, np.ndarray] = {}  # float16 (W, D), of questions
        self.sentences: dict[str, np.ndarray] = {}  # float32 (D,), of questions and choice texts
        self._encoder = encoder

    def embed(self, texts: Set[str], *, words: bool) -> None:
        """Add the `sentences` of some texts, and their `words` if asked to."""
        missing = sorted(texts - (self.words if words else self.sentences).keys())
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            part = missing[start : start + TEXTS_AT_ONCE]
            all_words, sentences = self._encoder.questions(part)
            for text, words_WD, sentence_D in zip(part, all_words, sentences, strict=True):
                self.sentences[text] = sentence_D
                if words:
                    self.words[text] = words_WD.astype(np.float16)


def _tables(
    questions: Sequence[QuestionRow], encoder: Encoder, store: FeatureStore, run_id: str
) -> Iterator[pa.Table]:
    schema = store.address(Table.QUESTIONS).schema
    texts = TextEmbeddings(encoder)
    absent = np.zeros(store.dim, np.float16)
    for start in range(0, len(questions), ROWS_PER_FRAGMENT):
        part = questions[start : start + ROWS_PER_FRAGMENT]
        choices = {q.question_id: choice_texts(q.question, q.choices) for q in part}
        texts.embed({question.question for question in part}, words=True)
        texts.embed({text for each in choices.values() for text in each if text}, words=False)
        yield pa.Table.from_pylist(
            [
                _plain(question)
                | {
                    "question_id": question.question_id,
                    "corpus": question.corpus,
                    "words": list(texts.words[question.question]),
                    "sentence": texts.sentences[question.question],
                    "choice_sentences": [
                        absent if text is None else texts.sentences[text].astype(np.float16)
                        for text in choices[question.question_id]
                    ]
                    or None,
                    "encoder_fingerprint": store.fingerprint,
                    "run_id": run_id,
                    "ingested_at": now(),
                }
                for question in part
            ],
            schema=schema,
        )
