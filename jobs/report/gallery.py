"""The gallery of a report: validation questions asked again, a modality taken away, with their evidence."""

import os
from dataclasses import dataclass

import numpy as np

from r2scp.jobs.answer.answerer import Answerer, AnswerOptions
from r2scp.jobs.answer.page import answer_card, shown
from r2scp.jobs.answer.records import Rejected, Request, Result
from r2scp.jobs.html.thumbnails import Previews
from r2scp.jobs.report.builder import Section
from r2scp.jobs.report.facts.probe import SEED, WITH_RECOVERY, Probe
from r2scp.jobs.report.facts.run_folder import MissingPart, RunFacts
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import MODALITY_NAMES, Condition, Modality, Table


@dataclass(frozen=True, kw_only=True)
class GalleryQuestion:
    """One question for the gallery, and what the probe said of it."""

    ask: Request
    answer: str
    right: bool


def gallery_section(
    run: RunFacts, probe: Probe, store: FeatureStore, count: int, means: AnswerOptions
) -> Section:
    """Raises `EncoderError` or the like where recordings cannot be embedded here."""
    section = Section(name="gallery", heading="Answered questions")
    picked, on_disk = pick(probe, count)
    if not picked:
        why = "no file of a validation clip with sound and picture is where it was"
        section.add_missing(MissingPart(section="gallery", what="Gallery", why=why))
        return section
    right = sum(one.right for one in picked)
    section.add_text(
        f"{len(picked)} of the {on_disk} questions of the sample that are about clips with sound and picture "
        f"whose file is still there, drawn by seed {SEED}: as far as there are enough, half of them answered "
        f"right from the store's features ({right} here) and half wrong, sound or picture taken away in "
        f"turns. So this is no measure of accuracy. Run {run.name}; the files are decoded and embedded anew."
    )
    assert run.checkpoint is not None
    answerer = Answerer.open(store, run.checkpoint.folder, means)
    previews = Previews()
    answers = answerer.answers([one.ask for one in picked])
    for at, (one, answered) in enumerate(zip(picked, answers, strict=True), start=1):
        if isinstance(answered, Rejected):
            section.add_notice(f"{one.ask.video}: {one.ask.question}: {answered.message}", "warning")
            continue
        section.blocks.append(
            {
                "kind": "card",
                "id": f"answer-{at}",
                "verdict": _verdict(one, answered),
                "card": answer_card(answered, shown(answered, previews)),
            }
        )
    return section


def _verdict(one: GalleryQuestion, answered: Result) -> str:
    said = answered.answers[0].answer
    gone = f"Its {MODALITY_NAMES[one.ask.missing]} was taken away."
    if said == one.answer:
        return f"{gone} Right: {one.answer}."
    return f"{gone} Wrong: the model says {said}; right is {one.answer}."


def pick(probe: Probe, count: int) -> tuple[list[GalleryQuestion], int]:
    """Questions in turns, right or wrong, sound or picture missing; and how many are about whole clips."""
    examples, opened = probe.examples, probe.opened
    clips = opened.store.dataset(Table.CLIPS, opened.pins.clips).take(examples.clip_row_B, columns=["uri"])
    uris = clips["uri"].to_pylist()
    whole = np.logical_and.reduce(examples.present_BM, axis=1)
    there = [at for at, uri in enumerate(uris) if uri and whole[at] and os.path.isfile(uri)]  # raises nothing
    order = np.random.default_rng(SEED).permutation(there).tolist() if there else []
    questions = opened.store.dataset(Table.QUESTIONS, opened.pins.questions).take(
        examples.question_row_B, columns=["question", "choices"]
    )
    rows = questions.to_pylist()
    kinds = [(missing, right) for right in (True, False) for missing in Modality]
    outputs = {modality: probe.outputs[WITH_RECOVERY, Condition.without(modality)] for modality in Modality}
    waiting = {
        (missing, right): [at for at in order if outputs[missing].right_Q[at] == right]
        for missing, right in kinds
    }
    taken: list[tuple[int, Modality, bool]] = []
    used: set[int] = set()
    while len(taken) < count and any(waiting.values()):
        for kind in kinds:
            at = next((at for at in waiting[kind] if at not in used), None)
            waiting[kind] = [other for other in waiting[kind] if other not in used and other != at]
            if at is not None and len(taken) < count:
                used.add(at)
                taken.append((at, *kind))
    return [
        GalleryQuestion(
            ask=Request(
                video=uris[at],
                question=rows[at]["question"],
                missing=missing,
                choices=tuple(choice or "" for choice in rows[at]["choices"] or ())
                if opened.answers is None
                else (),
                source_id=opened.clips.sources[examples.clip_row_B[at]],
                id=examples.question_ids[at],
            ),
            answer=probe.answers[at],
            right=right,
        )
        for at, missing, right in taken
    ], len(there)
