"""`Answerer`: answers questions about recordings outside the store, with evidence.

    >>> store = FeatureStore.open("demo/store-600-seed7")
    >>> answerer = Answerer.open(store, Path("demo/run-600-seed7"))
    >>> result = answerer.answer("broken.mp4", "How many instruments are sounding?")
    >>> result.answers[0].answer, result.missing, [clip.clip_id for clip in result.neighbours]
    ('two', 'audio', ['demo/demo0412_000170', ...])

A recording is decoded and embedded as by `extract`. Missing modalities are detected: a stream that is absent
or cannot be decoded, silence, a blank picture. Clips are retrieved from the bank of the `serving` snapshot
with the retrieval settings of the training. Nothing is written, and nothing leaves the machine.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from r2scp.jobs.answer.batching import in_batches
from r2scp.jobs.answer.evidence import SharedFacts, build_result
from r2scp.jobs.answer.records import Rejected, Request, Result
from r2scp.jobs.ingest.encoders import encoder_of, pick_device
from r2scp.jobs.training.checkpoints import Checkpoint, read_checkpoint
from r2scp.jobs.training.stages import Worker
from r2scp.pipelines.decoding.decode import DEFAULT_LIMITS, DecodeLimits
from r2scp.pipelines.decoding.ffmpeg_command import find_program
from r2scp.pipelines.extraction.embed import EncoderSpec, key_of
from r2scp.pipelines.extraction.questions import TextEmbeddings, choice_texts
from r2scp.pipelines.recordings.batch import RecordedQuestion, recorded_batch
from r2scp.pipelines.recordings.recording import Recording, embed, mark_unusable
from r2scp.pipelines.recordings.retriever import RetrievalQuery, RetrievedClip, Retriever
from r2scp.store.errors import FailureReason, MediaError, R2SCPError, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Table
from r2scp.store.snapshots import SERVING

BATCH_SIZE = 16  # requests embedded and answered together
CACHED_TEXTS = 2_048  # embedded questions and choices: 80 MB of twenty words each at D = 1024
MAX_CHOICES = 1_000  # per question; each is embedded
MISSING = ("auto", "none", *Modality)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How to answer. `encoder`, `weights`: as of `extract`; default: those that filled the store.

    `at`: snapshot whose bank is searched; default `serving`, or the latest versions if there is none.
    `workers`: recordings decoded in parallel.
    """

    encoder: str | None = None
    weights: str | None = None
    device: str | None = None
    at: str | None = None
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    limits: DecodeLimits = DEFAULT_LIMITS
    ffmpeg: str | None = None


class Answerer:
    """A model, the encoder of its features, and the bank it retrieves from. Create with `open`.

    Not thread-safe.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoder: EncoderSpec,
        bank: Retriever,
        snapshot: str,
        options: AnswerOptions,
    ) -> None:
        self.checkpoint, self.bank, self.options = checkpoint, bank, options
        self._worker = Worker(device=torch.device(encoder.device))
        self._encoder = encoder.load()
        self._texts = TextEmbeddings(self._encoder)
        self._model = checkpoint.model(self._worker.device)
        self._shared = SharedFacts.of(checkpoint, self._model, encoder, bank, snapshot)

    @classmethod
    def open(cls, store: FeatureStore, run: Path, options: AnswerOptions | None = None) -> "Answerer":
        """With the best checkpoint of a run, or the one whose document `run` is, and the bank of a store.

        Raises `FingerprintMismatch` if checkpoint, store and encoder differ in their encoder, and
        `CheckpointError`, `StoreError` or `EncoderError` if one of them is missing.
        """
        options = options or AnswerOptions()
        checkpoint = read_checkpoint(run)
        checkpoint.require_store(store)
        if checkpoint.config.sees == "question":
            raise UsageError(f"{checkpoint.folder} holds the question-only baseline: it uses no recording")
        encoder = encoder_of(store, options.encoder, options.weights, pick_device(options.device))
        find_program(options.ffmpeg)  # fail before the first request
        snapshot = options.at or (SERVING if SERVING in store.snapshots() else "")
        pinned = store.at(snapshot) if snapshot else store
        if not pinned.dataset(Table.CLIPS).count_rows():
            raise StoreError(f"the store at {store.uri} has no clips; fill it with `r2scp-pipe extract`")
        return cls(checkpoint, encoder, Retriever(pinned, checkpoint.config.index.bank), snapshot, options)

    def answer(
        self, video: str | Path, question: str, missing: str = "auto", choices: Sequence[str] = ()
    ) -> Result:
        """Answer one question about one file, see `Request`.

        Raises `MediaError` for a file without usable content, and `UsageError` for an invalid request.
        """
        request = Request(video=str(video), question=question, missing=missing, choices=tuple(choices))
        return self.answer_request(request)

    def answer_request(self, request: Request) -> Result:
        """Answer one request with all its fields. Raises as `answer`."""
        self._check(request)
        return self._answer_batch([(request, self._read(request))])[0]

    def answer_all(self, requests: Iterable[Request | Rejected]) -> Iterator[Result | Rejected]:
        """Answer many requests, in order, each as soon as possible.

        Files are decoded in parallel while the encoder works, and all requests that are ready are answered in
        one batch; a file is decoded once for all its requests. Requests that cannot be answered become
        `Rejected`; `Rejected` items pass through.
        """
        batches = in_batches(map(self._validate, requests), self._read, self.options.workers, BATCH_SIZE)
        for batch in batches:
            results: dict[int, Result | Rejected] = {}
            decoded: list[tuple[int, Request, Recording]] = []
            for at, (request, recording) in enumerate(batch):
                if isinstance(request, Rejected) or recording is None:
                    assert isinstance(request, Rejected)
                    results[at] = request
                    continue
                try:
                    decoded.append((at, request, recording.result()))
                except R2SCPError as error:
                    results[at] = Rejected.of(request, error)
            embed(self._encoder, [recording for _, _, recording in decoded])
            for at, request, recording in decoded:
                if not recording.tokens:
                    results[at] = Rejected.of(request, not_finite_error())
            embedded = [(at, request, recording) for at, request, recording in decoded if recording.tokens]
            if embedded:
                answered = self._answer_batch([(request, recording) for _, request, recording in embedded])
                results |= {at: result for (at, _, _), result in zip(embedded, answered, strict=True)}
            yield from (results[at] for at in range(len(batch)))

    def _read(self, request: Request) -> Recording:
        """Decode a file and detect what is missing, for all questions about it. Raises `MediaError`."""
        recording = Recording.read(
            request.video, self.options.limits, self.options.ffmpeg, detect_blank=request.missing != "none"
        )
        if request.missing in set(Modality):
            mark_unusable(recording, Modality(request.missing), "you asked to ignore it")
        recording.require()
        return recording

    def _validate(self, request: Request | Rejected) -> Request | Rejected:
        """The request, or `Rejected` if it is invalid."""
        if isinstance(request, Request):
            try:
                self._check(request)
            except UsageError as error:
                return Rejected.of(request, error)
        return request

    def _check(self, request: Request) -> None:
        """Raises `UsageError` for an invalid request."""
        if not request.question.strip():
            raise UsageError("a question must have words; got none")
        if request.missing not in MISSING:
            raise UsageError(f"missing must be one of {', '.join(MISSING)}; got {request.missing!r}")
        count = len(request.choices)
        if count > MAX_CHOICES:
            raise UsageError(f"a question must have at most {MAX_CHOICES} choices; got {count}")
        answers = self.checkpoint.answers
        if answers is not None and request.choices:
            raise UsageError(
                f"this model has {len(answers)} fixed answers and takes no choices; leave them out, or use a "
                "model that was trained on questions with choices"
            )
        if answers is None and not any(choice.strip() for choice in request.choices):
            raise UsageError("this model picks one of the question's choices; give some with --choice")

    @torch.inference_mode()
    def _answer_batch(self, requests: Sequence[tuple[Request, Recording]]) -> list[Result]:
        embed(self._encoder, [recording for _, recording in requests])
        if any(not recording.tokens for _, recording in requests):
            raise not_finite_error()
        questions = self._questions(requests)
        batch = recorded_batch(questions, self._model.config.neighbours).to(self._worker.device)
        with self._worker.autocast():
            answer = self._model(batch)
        return [
            build_result(self._shared, request, recording, question.retrieved, answer, row)
            for row, ((request, recording), question) in enumerate(zip(requests, questions, strict=True))
        ]

    def _questions(self, requests: Sequence[tuple[Request, Recording]]) -> list[RecordedQuestion]:
        if len(self._texts.sentences) > CACHED_TEXTS:
            self._texts = TextEmbeddings(self._encoder)
        choices = [
            choice_texts(request.question, [choice or None for choice in request.choices])
            for request, _ in requests
        ]
        self._texts.embed({request.question for request, _ in requests}, words=True)
        self._texts.embed({text for texts in choices for text in texts if text}, words=False)
        clips = self._retrieve(requests)
        zero_D = np.zeros(self.bank.store.dim, np.float16)
        return [
            RecordedQuestion(
                tokens={name: tokens_TD.astype(np.float16) for name, tokens_TD in recording.tokens.items()},
                retrieved=clips.get(at, []),
                words_WD=self._texts.words[request.question],
                sentence_D=self._texts.sentences[request.question],
                choices_KD=np.stack(
                    [zero_D if text is None else self._texts.sentences[text] for text in choices[at]]
                ).astype(np.float16)
                if choices[at]
                else None,
            )
            for at, (request, recording) in enumerate(requests)
        ]

    def _retrieve(self, requests: Sequence[tuple[Request, Recording]]) -> dict[int, list[RetrievedClip]]:
        """Request number -> retrieved clips for the missing modality; one search per modality."""
        clips: dict[int, list[RetrievedClip]] = {}
        if not (self._model.recovers and self._model.config.cmr):
            return clips
        config = self.checkpoint.config
        settings = replace(config.index, n=config.model.neighbours, leak_guard=True)
        for missing in Modality:
            queries = {
                at: RetrievalQuery(
                    key_D=key_of(recording.tokens[missing.other]),
                    content_sha256=recording.content_sha256,
                    source_id=request.source_id,
                )
                for at, (request, recording) in enumerate(requests)
                if missing in recording.unusable
            }
            if queries:
                search = settings.search(missing, config.retrieval)
                clips |= dict(zip(queries, self.bank.retrieve(list(queries.values()), search), strict=True))
        return clips


def not_finite_error() -> MediaError:
    """For a recording without tokens."""
    return MediaError(FailureReason.EMBED_FAILED, "the encoder returned values that are not finite")
