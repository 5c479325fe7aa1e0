"""Requests and results: an answer with its evidence, or the reason why there is none.

Plain values only. `to_json` is what `answer --json` prints; it is enough to compute the same logits again
from the store, since the ids of the retrieved clips and the version of `clips` identify the tokens used.
"""

from dataclasses import asdict, dataclass, field

from r2scp.store.errors import MediaError, R2SCPError
from r2scp.store.schema import MODALITY_NAMES, Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One question about one file.

    `missing`: `audio` or `visual` ignores that stream, `none` accepts silence and blank pictures as they are,
    `auto` detects what is missing. `choices`: only for models trained on multiple choice. `source_id`: source
    video of the recording; clips of it are never retrieved, nor clips of the same file's source in the store.
    `id` is returned unchanged.
    """

    video: str
    question: str
    missing: str = "auto"
    choices: tuple[str, ...] = ()
    source_id: str = ""
    id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A request that cannot be answered. `reason`: a `FailureReason`, or `usage`."""

    reason: str
    message: str
    id: str = ""
    video: str = ""
    question: str = ""

    @classmethod
    def of(cls, request: Request, error: R2SCPError) -> "Rejected":
        """The request with its error."""
        media = isinstance(error, MediaError)
        return cls(
            reason=error.reason.value if media else "usage",
            message=error.detail if media else str(error),
            id=request.id,
            video=request.video,
            question=request.question,
        )

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        error = {"reason": self.reason, "message": self.message}
        return {"id": self.id, "video": self.video, "question": self.question, "error": error}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One of the model's answer classes, or one of the question's choices."""

    answer: str
    probability: float  # softmax of the logits; not calibrated
    logit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """One modality of the recording. `expected` and `decoded`: frames (one a second), or seconds of sound."""

    status: str  # a ModalityStatus
    expected: float
    decoded: float
    used: bool  # by the model
    why: str  # why it was not used, or is incomplete; "" if all is well


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """A clip retrieved from the memory bank in place of the missing modality."""

    clip_id: str
    file: str  # path when it was extracted
    second: int  # of the clip, the most similar to the recording's key
    score: float  # cosine of the two keys, in [-1, 1]
    labels: list[str]
    split: str
    source_id: str
    content_sha256: str
    encoder: str  # fingerprint
    clips_version: int  # of the table `clips`


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveredSecond:
    """One second of the recovered modality."""

    second: int
    dissonance: float | None  # δ of eq. 3, in [0, 2]; None without purification
    purged: bool
    replaced_by: int | None  # second of the available modality whose guided token replaced it


# by recovery
_RECOVERY_TEXT = {
    "neighbours": "the {missing} of {count} from the memory bank was used instead",
    "fallback": "no clip of the memory bank could be retrieved; the available modality was used instead",
    "common": "this model does not retrieve; the available modality was used instead",
    "dropped": "this model does not recover missing modalities; it answered without it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The answer and its evidence.

    `recovery`: `neighbours`, retrieved clips; `fallback`, the recording's other modality because the bank had
    no clip; `common`, the other modality because this model does not retrieve; `dropped`, no recovery;
    `none`, nothing was missing.
    """

    video: str
    question: str
    answers: list[Candidate]  # all, best first
    missing: str | None  # a Modality
    audio: Stream
    visual: Stream
    duration_s: float
    content_sha256: str
    recovery: str
    neighbours: list[Neighbour]
    recovered: list[RecoveredSecond]
    router: dict[str, float]  # weights of audio, visual, text; 0 if neither available nor recovered
    model: dict[str, object]  # run, checkpoint hash, stage and step, code version
    store: dict[str, object]  # uri, snapshot, versions, encoder, retrieval, bank
    notes: list[str] = field(default_factory=list)  # caveats
    id: str = ""  # of the request

    def finding(self) -> str:
        """What is missing, why, and how it was recovered, in one sentence; "" if nothing is missing."""
        if self.missing is None:
            return ""
        name = MODALITY_NAMES[Modality(self.missing)]
        stream = self.audio if self.missing == "audio" else self.visual
        count = f"{len(self.neighbours)} clip{'s'[: len(self.neighbours) != 1]}"
        recovery = _RECOVERY_TEXT.get(self.recovery, "").format(missing=name, count=count)
        return f"The {name} is missing ({stream.why}){': ' if recovery else ''}{recovery}."

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)
