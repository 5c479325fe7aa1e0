"""The evidence of an answer: `Result` from one row of the model's `Answer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from r2scp.jobs.answer.records import Candidate, Neighbour, RecoveredSecond, Request, Result, Stream
from r2scp.jobs.ingest.weights import DEMO_WEIGHTS
from r2scp.jobs.training.checkpoints import Checkpoint
from r2scp.model.batch import SOURCES, Answer
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.batches.examples import MODALITIES
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.recordings.recording import Recording
from r2scp.pipelines.recordings.retriever import RetrievedClip, Retriever
from r2scp.store.schema import MODALITY_NAMES, Modality, ModalityStatus, Table

# cosine of the available modality above which a clip may be the same recording, encoded differently
SAME_RECORDING = 0.999


@dataclass(frozen=True, kw_only=True)
class SharedFacts:
    """What all results of one `Answerer` have in common."""

    classes: list[str] | None
    encoder: str  # fingerprint
    clips_version: int
    model: dict[str, object]
    store: dict[str, object]
    notes: list[str]
    notes_missing: list[str]  # only if a modality is missing

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, model: R2SCP, encoder: EncoderSpec, bank: Retriever, snapshot: str
    ) -> "SharedFacts":
        """Facts and caveats of model, encoder and bank."""
        notes, missing = [], []
        if Path(encoder.source).name == DEMO_WEIGHTS:
            notes.append(
                "imagebind-demo knows generated clips only; results on real videos are not meaningful"
            )
        if not checkpoint.config.index.leak_guard:
            notes.append("the model was trained without the leak guard; it is on here")
        if not model.recovers:
            missing.append(
                "this model does not recover missing modalities: it answers from the available one"
            )
        config = checkpoint.config
        return cls(
            classes=checkpoint.answers,
            encoder=encoder.fingerprint,
            clips_version=bank.bank.version,
            model={
                "run": str(checkpoint.folder),
                "stage": checkpoint.stage.value,
                "epoch": checkpoint.epoch,
                "step": checkpoint.step,
                "sha256": checkpoint.sha256,
                "code": checkpoint.code,
                "neighbours": config.model.neighbours,
                "k": config.model.k,
                "cmr": config.model.cmr,
                "cap": config.model.cap,
            },
            store={
                "uri": bank.store.uri,
                "snapshot": snapshot,
                "versions": {Table.CLIPS.value: bank.bank.version},
                "encoder": bank.store.fingerprint,
                "retrieval": config.retrieval.value,
                "bank_clips": len(bank.bank),
                "bank_splits": list(config.index.bank.splits),
                "bank_corpora": list(config.index.bank.corpora),
            },
            notes=notes,
            notes_missing=missing,
        )


def build_result(
    shared: SharedFacts,
    request: Request,
    recording: Recording,
    clips: Sequence[RetrievedClip],
    answer: Answer,
    row: int,
) -> Result:
    """The result of one request, from row `row` of the model's output."""
    missing = next((modality for modality in MODALITIES if modality in recording.unusable), None)
    streams = {modality: _stream(recording, modality) for modality in Modality}
    notes = shared.notes + (shared.notes_missing if missing else [])
    fallback = bool(answer.evidence.fallback_BM[row].any())
    recovered = bool(answer.evidence.recovered_BM[row].any())
    if any(clip.similarity >= SAME_RECORDING for clip in clips):
        notes = [*notes, "a retrieved clip may be this very recording; its answer is no test of recovery"]
    if fallback:
        notes = [
            *notes,
            "no clip of the memory bank could be retrieved; the available modality was used instead",
        ]
    return Result(
        id=request.id,
        video=request.video,
        question=request.question,
        answers=_candidates(answer.logits_BK[row], shared.classes or list(request.choices)),
        missing=missing,
        audio=streams[Modality.AUDIO],
        visual=streams[Modality.VISUAL],
        duration_s=recording.duration_s,
        content_sha256=recording.content_sha256,
        recovery=_recovery(missing, recovered, fallback, bool(clips)),
        neighbours=[_neighbour(shared, clip) for clip in clips],
        recovered=_seconds(answer, row, missing, clips, recording) if missing and recovered else [],
        router=dict(zip(SOURCES, answer.evidence.router_BS[row].float().tolist(), strict=True)),
        model=shared.model,
        store=shared.store,
        notes=notes
        + [f"{MODALITY_NAMES[m]}: {streams[m].why}" for m in Modality if streams[m].used and streams[m].why],
    )


def _recovery(missing: Modality | None, recovered: bool, fallback: bool, retrieved: bool) -> str:
    if fallback:
        return "fallback"
    if missing is None:
        return "none"
    if not recovered:
        return "dropped"
    return "neighbours" if retrieved else "common"


def _candidates(logits_K: torch.Tensor, names: Sequence[str]) -> list[Candidate]:
    """Best first, ties in the order of `names`. Empty choices and the batch's padding are left out."""
    logits_K = logits_K[: len(names)].float()
    probabilities = logits_K.softmax(dim=0).tolist()
    candidates = [
        Candidate(answer=name, probability=probability, logit=logit)
        for name, probability, logit in zip(names, probabilities, logits_K.tolist(), strict=True)
        if name
    ]
    return sorted(candidates, key=lambda candidate: -candidate.logit)


def _stream(recording: Recording, modality: Modality) -> Stream:
    report = recording.streams[modality]
    why = recording.unusable.get(modality, "")
    if not why and report.status is ModalityStatus.PARTIAL:
        unit = "s" if modality is Modality.AUDIO else "frames"
        why = f"only {report.decoded:.4g} of {report.expected:.4g} {unit} could be decoded; they were used"
    return Stream(
        status=report.status.value,
        expected=report.expected,
        decoded=report.decoded,
        used=modality not in recording.unusable,
        why=why,
    )


def _neighbour(shared: SharedFacts, clip: RetrievedClip) -> Neighbour:
    return Neighbour(
        clip_id=clip.clip_id,
        file=str(clip.metadata["uri"] or ""),
        second=clip.second,
        score=clip.score,
        labels=clip.labels,
        split=str(clip.metadata["split"] or ""),
        source_id=str(clip.metadata["source_id"] or ""),
        content_sha256=str(clip.metadata["content_sha256"] or ""),
        encoder=shared.encoder,
        clips_version=shared.clips_version,
    )


def _seconds(
    answer: Answer, row: int, missing: Modality, clips: Sequence[RetrievedClip], recording: Recording
) -> list[RecoveredSecond]:
    """What purification did to each recovered second."""
    length = max((len(clip.tokens_TD) for clip in clips), default=0)
    # without retrieved clips the available modality was used instead
    length = length or max(map(len, recording.tokens.values()))
    purified = answer.evidence.purified[MODALITIES.index(missing)]
    if purified is None:
        return [
            RecoveredSecond(second=t, dissonance=None, purged=False, replaced_by=None) for t in range(length)
        ]
    dissonance, noise, source = (
        part[row, :length].tolist()
        for part in (purified.dissonance_BL, purified.noise_BL, purified.source_BL)
    )
    return [
        RecoveredSecond(
            second=t, dissonance=dissonance[t], purged=noise[t], replaced_by=source[t] if noise[t] else None
        )
        for t in range(length)
    ]
