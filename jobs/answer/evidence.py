"""What an answer rests on, from what the model gave: `Answered` from one row of an `Answer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from r2scp.jobs.answer.records import Answered, Ask, Candidate, Neighbour, Second, Stream
from r2scp.jobs.ingest.weights import DEMO_WEIGHTS
from r2scp.jobs.training.checkpoints import Checkpoint
from r2scp.model.batch import SOURCES, Answer
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.batches.examples import MODALITIES
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.recordings.recording import Recording
from r2scp.pipelines.recordings.retriever import RetrievedClip, Retriever
from r2scp.store.schema import MODALITY_NAMES, Modality, ModalityStatus, Table

ALIKE = 0.999  # cosine of what both have, above which a clip may be the recording itself, coded otherwise


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all answers of one `Answerer` have in common."""

    classes: list[str] | None
    encoder: str  # fingerprint
    clips_version: int
    model: dict[str, object]
    store: dict[str, object]
    notes: list[str]
    notes_missing: list[str]  # where something is missing

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, model: R2SCP, encoder: EncoderSpec, bank: Retriever, snapshot: str
    ) -> "Shared":
        """What a careful reader should know of model, encoder and bank."""
        notes, missing = [], []
        if Path(encoder.source).name == DEMO_WEIGHTS:
            notes.append("imagebind-demo knows generated clips only; of anything else it says little")
        if not checkpoint.config.index.leak_guard:
            notes.append("the model was trained without the leak guard; here it is on")
        if not model.recovers:
            missing.append("this model recovers nothing: it answers from what is there")
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


def evidence(
    shared: Shared, ask: Ask, recording: Recording, stand_ins: Sequence[RetrievedClip], answer: Answer, row: int
) -> Answered:
    """The answer to one question, which is row `row` of what the model gave."""
    missing = next((modality for modality in MODALITIES if modality in recording.unusable), None)
    streams = {modality: _stream(recording, modality) for modality in Modality}
    notes = shared.notes + (shared.notes_missing if missing else [])
    fallback = bool(answer.evidence.fallback_BM[row].any())
    recovered = bool(answer.evidence.recovered_BM[row].any())
    if any(found.similarity >= ALIKE for found in stand_ins):
        notes = [
            *notes,
            "a clip that stood in is so like this recording that it may be the same; no test of recovery",
        ]
    if fallback:
        notes = [
            *notes,
            "the bank held no clip that could stand in: what is there served for what is missing",
        ]
    return Answered(
        id=ask.id,
        video=ask.video,
        question=ask.question,
        answers=_candidates(answer.logits_BK[row], shared.classes or list(ask.choices)),
        missing=missing,
        audio=streams[Modality.AUDIO],
        visual=streams[Modality.VISUAL],
        duration_s=recording.duration_s,
        content_sha256=recording.content_sha256,
        recovery="fallback"
        if fallback
        else "neighbours"
        if stand_ins and recovered
        else _other(missing, recovered),
        neighbours=[_neighbour(shared, found) for found in stand_ins],
        recovered=_seconds(answer, row, missing, stand_ins, recording) if missing and recovered else [],
        router=dict(zip(SOURCES, answer.evidence.router_BS[row].float().tolist(), strict=True)),
        model=shared.model,
        store=shared.store,
        notes=notes
        + [f"{MODALITY_NAMES[m]}: {streams[m].why}" for m in Modality if streams[m].used and streams[m].why],
    )


def _other(missing: Modality | None, recovered: bool) -> str:
    if missing is None:
        return "none"
    return "common" if recovered else "dropped"


def _candidates(logits_K: torch.Tensor, names: Sequence[str]) -> list[Candidate]:
    """The best first; of equal logits the one that is named first. Choices that are missing are left out,
    and so is what other questions of the batch have more of them."""
    logits_K = logits_K[: len(names)].float()
    probabilities = logits_K.softmax(dim=0).tolist()
    found = [
        Candidate(answer=name, probability=probability, logit=logit)
        for name, probability, logit in zip(names, probabilities, logits_K.tolist(), strict=True)
        if name
    ]
    return sorted(found, key=lambda one: -one.logit)


def _stream(recording: Recording, modality: Modality) -> Stream:
    report = recording.streams[modality]
    why = recording.unusable.get(modality, "")
    if not why and report.status is ModalityStatus.PARTIAL:
        unit = "s" if modality is Modality.AUDIO else "frames"
        why = (
            f"{report.decoded:.4g} of {report.expected:.4g} {unit} could be decoded and were used as they are"
        )
    return Stream(
        status=report.status.value,
        expected=report.expected,
        decoded=report.decoded,
        used=modality not in recording.unusable,
        why=why,
    )


def _neighbour(shared: Shared, found: RetrievedClip) -> Neighbour:
    return Neighbour(
        clip_id=found.clip_id,
        file=str(found.metadata["uri"] or ""),
        second=found.second,
        score=found.score,
        labels=found.labels,
        split=str(found.metadata["split"] or ""),
        source_id=str(found.metadata["source_id"] or ""),
        content_sha256=str(found.metadata["content_sha256"] or ""),
        encoder=shared.encoder,
        clips_version=shared.clips_version,
    )


def _seconds(
    answer: Answer, row: int, missing: Modality, stand_ins: Sequence[RetrievedClip], recording: Recording
) -> list[Second]:
    """What became of each second that stood in."""
    length = max((len(found.tokens_TD) for found in stand_ins), default=0)
    length = length or max(map(len, recording.tokens.values()))  # of what is there, which then served
    purified = answer.evidence.purified[MODALITIES.index(missing)]
    if purified is None:
        return [Second(second=t, dissonance=None, purged=False, replaced_by=None) for t in range(length)]
    dissonance, noise, source = (
        part[row, :length].tolist()
        for part in (purified.dissonance_BL, purified.noise_BL, purified.source_BL)
    )
    return [
        Second(
            second=t, dissonance=dissonance[t], purged=noise[t], replaced_by=source[t] if noise[t] else None
        )
        for t in range(length)
    ]
