"""`Answerer`: questions about recordings from outside the store, answered with their evidence.

    >>> store = FeatureStore.open("demo/store-600-seed7")
    >>> answerer = Answerer.open(store, Path("demo/run-600-seed7"))
    >>> answered = answerer.answer("broken.mp4", "How many instruments are sounding?")
    >>> answered.answers[0].answer, answered.missing, [found.clip_id for found in answered.neighbours]
    ('two', 'audio', ['demo/demo0412_000170', ...])

A recording is decoded and embedded as `extract` does it. What it lacks is found by itself: a stream that is
absent or cannot be decoded, silence, a blank picture. The bank is that of the snapshot `serving`, searched as
the model's training was. Nothing is written, and nothing leaves the machine.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from r2scp.jobs.answer.batching import in_lots
from r2scp.jobs.answer.evidence import Shared, evidence
from r2scp.jobs.answer.records import Answered, Ask, Refused
from r2scp.jobs.ingest.encoders import encoder_of, pick_device
from r2scp.jobs.training.checkpoints import Checkpoint, find
from r2scp.jobs.training.stages import Worker
from r2scp.pipelines.decoding.decode import DEFAULT_LIMITS, DecodeLimits
from r2scp.pipelines.decoding.ffmpeg_command import find_program
from r2scp.pipelines.extraction.embed import EncoderSpec, key_of
from r2scp.pipelines.extraction.questions import Texts, choice_texts
from r2scp.pipelines.recordings.batch import RecordedQuestion, recorded_batch
from r2scp.pipelines.recordings.recording import Recording, embed, mark_unusable
from r2scp.pipelines.recordings.retriever import RetrievalQuery, RetrievedClip, Retriever
from r2scp.store.errors import FailureReason, MediaError, R2SCPError, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import OTHER
from r2scp.store.snapshots import SERVING

AT_ONCE = 16  # questions that go through towers and model together
TEXTS_KEPT = 2_048  # embeddings of questions and choices: 80 MB of twenty words each at D = 1024
MOST_CHOICES = 1_000  # of one question: each is embedded
MISSING = ("auto", "none", *Modality)  # what may be asked for


@dataclass(frozen=True, kw_only=True)
class AnswerMeans:
    """How to answer. `encoder`, `weights`: as of `extract`; by themselves what filled the store.

    `at`: the snapshot whose bank is searched; by itself `serving`, or the store as it is now where it has
    none. `workers`: recordings decoded at a time.
    """

    encoder: str | None = None
    weights: str | None = None
    device: str | None = None
    at: str | None = None
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    limits: DecodeLimits = DEFAULT_LIMITS
    ffmpeg: str | None = None


class Answerer:
    """A model, the encoder of its features, and the bank it retrieves from. Made by `open`.

    One thread at a time may ask it.
    """

    def __init__(
        self, checkpoint: Checkpoint, encoder: EncoderSpec, bank: Retriever, snapshot: str, means: AnswerMeans
    ) -> None:
        self.checkpoint, self.bank, self.means = checkpoint, bank, means
        self._worker = Worker(device=torch.device(encoder.device))
        self._encoder = encoder.load()
        self._texts = Texts(self._encoder)
        self._model = checkpoint.model(self._worker.device)
        self._shared = Shared.of(checkpoint, self._model, encoder, bank, snapshot)

    @classmethod
    def open(cls, store: FeatureStore, run: Path, means: AnswerMeans | None = None) -> "Answerer":
        """The best checkpoint of a run, or the one whose document `run` is, with a store's bank.

        Raises `FingerprintMismatch` where checkpoint, store and encoder are not of one encoder,
        `CheckpointError`, `StoreError` or `EncoderError` where one of them is not there.
        """
        means = means or AnswerMeans()
        checkpoint = find(run)
        checkpoint.require_store(store)
        if checkpoint.config.sees == "question":
            raise UsageError(
                f"{checkpoint.folder} holds the question-only baseline: it looks at no recording"
            )
        encoder = encoder_of(store, means.encoder, means.weights, pick_device(means.device))
        find_program(means.ffmpeg)  # now, not in the middle of many
        snapshot = means.at or (SERVING if SERVING in store.snapshots() else "")
        read = store.at(snapshot) if snapshot else store
        if not read.dataset(Table.CLIPS).count_rows():
            raise StoreError(f"the store at {store.uri} holds no clip; fill it with `r2scp-pipe extract`")
        return cls(checkpoint, encoder, Retriever(read, checkpoint.config.index.bank), snapshot, means)

    def answer(
        self, video: str | Path, question: str, missing: str = "auto", choices: Sequence[str] = ()
    ) -> Answered:
        """One question about one file, see `Ask`. Raises `MediaError` for a file that gives nothing, and
        `UsageError` for what this model cannot be asked."""
        return self.ask(Ask(video=str(video), question=question, missing=missing, choices=tuple(choices)))

    def ask(self, ask: Ask) -> Answered:
        """The same with everything that can be said of a question."""
        self._check(ask)
        return self._answered([(ask, self._read(ask))])[0]

    def answers(self, asked: Iterable[Ask | Refused]) -> Iterator[Answered | Refused]:
        """Many questions, in their order, each as soon as its turn comes.

        Files are decoded side by side while the towers work, and all that is ready goes through towers and
        model together; a file that is asked about again is not decoded again. What cannot be answered is
        `Refused`, and so is what comes in as such.
        """
        for lot in in_lots(map(self._sifted, asked), self._read, self.means.workers, AT_ONCE):
            results: dict[int, Answered | Refused] = {}
            due: list[tuple[int, Ask, Recording]] = []
            for at, (ask, recording) in enumerate(lot):
                if isinstance(ask, Refused) or recording is None:
                    assert isinstance(ask, Refused)
                    results[at] = ask
                    continue
                try:
                    due.append((at, ask, recording.result()))
                except R2SCPError as error:
                    results[at] = Refused.of(ask, error)
            embed(self._encoder, [recording for _, _, recording in due])
            for at, ask, recording in due:
                if not recording.tokens:
                    results[at] = Refused.of(ask, not_finite())
            kept = [(at, ask, recording) for at, ask, recording in due if recording.tokens]
            answered = self._answered([(ask, recording) for _, ask, recording in kept]) if kept else []
            results |= {at: answer for (at, _, _), answer in zip(kept, answered, strict=True)}
            yield from (results[at] for at in range(len(lot)))

    def _read(self, ask: Ask) -> Recording:
        """Decode, and find what is missing; the same for all questions of one file. Raises `MediaError`."""
        recording = Recording.read(
            ask.video, self.means.limits, self.means.ffmpeg, detect_blank=ask.missing != "none"
        )
        if ask.missing in set(Modality):
            mark_unusable(recording, Modality(ask.missing), "it was to be taken as missing")
        recording.require()
        return recording

    def _sifted(self, ask: Ask | Refused) -> Ask | Refused:
        """What can be asked as it is, what cannot as `Refused`."""
        if isinstance(ask, Ask):
            try:
                self._check(ask)
            except UsageError as error:
                return Refused.of(ask, error)
        return ask

    def _check(self, ask: Ask) -> None:
        """Raises `UsageError` for what cannot be asked."""
        if not ask.question.strip():
            raise UsageError("a question must have words; got none")
        if ask.missing not in MISSING:
            raise UsageError(f"missing must be one of {', '.join(MISSING)}; got {ask.missing!r}")
        if len(ask.choices) > MOST_CHOICES:
            raise UsageError(f"a question must have at most {MOST_CHOICES} choices; got {len(ask.choices)}")
        answers = self.checkpoint.answers
        if answers is not None and ask.choices:
            raise UsageError(
                f"this model knows {len(answers)} answers and takes no choices; leave them out, or ask one "
                "that was trained on questions with choices"
            )
        if answers is None and not any(choice.strip() for choice in ask.choices):
            raise UsageError("this model chooses among the choices of a question; give some")

    @torch.inference_mode()
    def _answered(self, asked: Sequence[tuple[Ask, Recording]]) -> list[Answered]:
        embed(self._encoder, [recording for _, recording in asked])
        if any(not recording.tokens for _, recording in asked):
            raise not_finite()
        questions = self._questions(asked)
        batch = recorded_batch(questions, self._model.config.neighbours).to(self._worker.device)
        with self._worker.autocast():
            answer = self._model(batch)
        return [
            evidence(self._shared, ask, recording, question.retrieved, answer, row)
            for row, ((ask, recording), question) in enumerate(zip(asked, questions, strict=True))
        ]

    def _questions(self, asked: Sequence[tuple[Ask, Recording]]) -> list[RecordedQuestion]:
        if len(self._texts.sentences) > TEXTS_KEPT:
            self._texts = Texts(self._encoder)
        behind = [choice_texts(ask.question, [choice or None for choice in ask.choices]) for ask, _ in asked]
        self._texts.embed({ask.question for ask, _ in asked}, words=True)
        self._texts.embed({text for each in behind for text in each if text}, words=False)
        stand_ins = self._stand_ins(asked)
        nothing_D = np.zeros(self.bank.store.dim, np.float16)
        return [
            RecordedQuestion(
                tokens={name: tokens_TD.astype(np.float16) for name, tokens_TD in recording.tokens.items()},
                retrieved=stand_ins.get(at, []),
                words_WD=self._texts.words[ask.question],
                sentence_D=self._texts.sentences[ask.question],
                choices_KD=np.stack(
                    [nothing_D if text is None else self._texts.sentences[text] for text in behind[at]]
                ).astype(np.float16)
                if behind[at]
                else None,
            )
            for at, (ask, recording) in enumerate(asked)
        ]

    def _stand_ins(self, asked: Sequence[tuple[Ask, Recording]]) -> dict[int, list[RetrievedClip]]:
        """Number of a question -> clips for what its recording lacks; searched together by modality."""
        found: dict[int, list[RetrievedClip]] = {}
        if not (self._model.recovers and self._model.config.cmr):
            return found
        config = self.checkpoint.config
        settings = replace(config.index, n=config.model.neighbours, leak_guard=True)
        for missing in Modality:
            lacking = {
                at: RetrievalQuery(
                    key_D=key_of(recording.tokens[OTHER[missing]]),
                    content_sha256=recording.content_sha256,
                    source_id=ask.source_id,
                )
                for at, (ask, recording) in enumerate(asked)
                if missing in recording.unusable
            }
            if lacking:
                how = settings.search(missing, config.retrieval)
                found |= dict(zip(lacking, self.bank.retrieve(list(lacking.values()), how), strict=True))
        return found


def not_finite() -> MediaError:
    """What is wrong with a recording that got no tokens."""
    return MediaError(FailureReason.EMBED_FAILED, "the encoder gave numbers that are not finite")
