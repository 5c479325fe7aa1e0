"""What is asked, and what comes back: an answer with all that it rests on, or why there is none.

Plain values alone: `to_json` is what `answer --json` prints, and enough to compute the same logits again from
the store (the neighbours' ids and the version of `clips` say which tokens stood in).
"""

from dataclasses import asdict, dataclass, field

from r2scp.store.errors import MediaError, R2SCPError
from r2scp.store.schema import MODALITY_NAMES, Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One question about one file.

    `missing`: `audio` or `visual` takes that away, `none` lets silence and blank pictures pass for sound and
    picture, `auto` finds out. `choices`: for models that choose among them. `source_id`: of the recording;
    no clip of it stands in, nor of the source of the same file in the store. `id` comes back.
    """

    video: str
    question: str
    missing: str = "auto"
    choices: tuple[str, ...] = ()
    source_id: str = ""
    id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A question that cannot be answered. `reason`: a `FailureReason`, or `usage`."""

    reason: str
    message: str
    id: str = ""
    video: str = ""
    question: str = ""

    @classmethod
    def of(cls, ask: Ask, error: R2SCPError) -> "Refused":
        """What an error says of a question."""
        media = isinstance(error, MediaError)
        return cls(
            reason=error.reason.value if media else "usage",
            message=error.detail if media else str(error),
            id=ask.id,
            video=ask.video,
            question=ask.question,
        )

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        error = {"reason": self.reason, "message": self.message}
        return {"id": self.id, "video": self.video, "question": self.question, "error": error}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One answer that the model knows, or one of the question's choices."""

    answer: str
    probability: float  # softmax of the logits; not calibrated
    logit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """One modality of the recording. `expected` and `decoded`: frames (one a second), or seconds of sound."""

    status: str  # a ModalityStatus
    expected: float
    decoded: float
    used: bool  # whether the model saw it
    why: str  # why it was not used, or was although it is not whole; "" where all is well


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """One clip of the memory bank whose missing modality stood in."""

    clip_id: str
    file: str  # where it was when it was stored
    second: int  # of the clip: the one most like the recording, by the key that was compared
    score: float  # cosine of the two keys, in [-1, 1]
    labels: list[str]
    split: str
    source_id: str
    content_sha256: str
    encoder: str  # fingerprint
    clips_version: int  # of the table `clips`


@dataclass(frozen=True, kw_only=True, slots=True)
class Second:
    """One second of the modality that was recovered."""

    second: int
    dissonance: float | None  # δ of eq. 3, in [0, 2]; None where nothing was purified
    purged: bool
    replaced_by: int | None  # second of the modality that is there, whose guided token took its place


#: By recovery, what was done about a missing modality.
_DONE = {
    "neighbours": "the {gone} of {count} of the memory bank stood in",
    "fallback": "the memory bank held no clip that could stand in; what is there served for the {gone} too",
    "common": "this model does not retrieve; what is there served for the {gone} too",
    "dropped": "this model recovers nothing; it answered without",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """The answer and its evidence.

    `recovery`: `neighbours`; `fallback`, from the recording's other modality, where the bank had no clip;
    `common`, from that too, where this model does not retrieve; `dropped`, where it recovers nothing; `none`,
    where nothing was missing.
    """

    video: str
    question: str
    answers: list[Candidate]  # all there are, the best first
    missing: str | None  # a Modality
    audio: Stream
    visual: Stream
    duration_s: float
    content_sha256: str
    recovery: str
    neighbours: list[Neighbour]
    recovered: list[Second]
    router: dict[str, float]  # weight of audio, visual, text; 0 where it was neither there nor recovered
    model: dict[str, object]  # run, checkpoint, its hash and step, code
    store: dict[str, object]  # uri, snapshot, versions, encoder, retrieval, bank
    notes: list[str] = field(default_factory=list)  # what a careful reader should know
    id: str = ""  # the asker's own

    def finding(self) -> str:
        """What is missing, why, and what was done about it, in one sentence; "" where nothing is."""
        if self.missing is None:
            return ""
        gone, stream = MODALITY_NAMES[Modality(self.missing)], self.audio if self.missing == "audio" else self.visual
        clips = f"{len(self.neighbours)} clip{'s'[: len(self.neighbours) != 1]}"
        done = _DONE.get(self.recovery, "").format(gone=gone, count=clips)
        return f"The {gone} is missing ({stream.why}){': ' if done else ''}{done}."

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)
