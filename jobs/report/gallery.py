"""The gallery: validation questions answered again, a modality removed, with the evidence."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r2scp.jobs.answer.answerer import Answerer, AnswerOptions
from r2scp.jobs.answer.page import answer_card, load_media
from r2scp.jobs.answer.records import Rejected, Request, Result
from r2scp.jobs.html.thumbnails import Previews
from r2scp.jobs.report.builder import Section
from r2scp.jobs.report.facts.probe import SEED, WITH_RECOVERY, Probe
from r2scp.jobs.report.facts.run_folder import MissingPart, RunFacts
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import MODALITY_NAMES, Condition, Modality, Table


@dataclass(frozen=True, kw_only=True)
class GalleryQuestion:
    """A question for the gallery. `right`: whether the probe answered it correctly."""

    request: Request
    answer: str
    right: bool


def gallery_section(
    run: RunFacts, probe: Probe, store: FeatureStore, count: int, options: AnswerOptions
) -> Section:
    """Raises `R2SCPError`, such as `EncoderError`, if recordings cannot be embedded on this machine."""
    section = Section(name="gallery", heading="Answered questions")
    questions, available = pick_questions(probe, count)
    if not questions:
        why = "no file of a validation clip with sound and picture is still in its place"
        section.add_missing(MissingPart(section="gallery", what="Gallery", why=why))
        return section
    right = sum(question.right for question in questions)
    section.add_text(
        f"{len(questions)} of the {available} sampled validation questions whose clip has sound and picture "
        f"and whose file still exists, drawn with seed {SEED}, with sound and picture removed in turn. As "
        f"far as possible, half are questions that the model answers correctly from the stored "
        f"features ({right} here) and half are not, so this is not a measure of accuracy. The files are "
        f"decoded and embedded again. Run: {run.name}."
    )
    assert run.checkpoint is not None
    answerer = Answerer.open(store, run.checkpoint.folder, options)
    previews = Previews()
    answers = answerer.answer_all([question.request for question in questions])
    for at, (question, answered) in enumerate(zip(questions, answers, strict=True), start=1):
        if isinstance(answered, Rejected):
            request = question.request
            section.add_notice(f"{request.video}: {request.question}: {answered.message}", "warning")
            continue
        section.blocks.append(
            {
                "kind": "card",
                "id": f"answer-{at}",
                "verdict": _verdict(question, answered),
                "card": answer_card(answered, load_media(answered, previews)),
            }
        )
    return section


def _verdict(question: GalleryQuestion, answered: Result) -> str:
    removed = f"{MODALITY_NAMES[question.request.missing].capitalize()} removed."
    given = answered.answers[0].answer
    verdict = "The model is right." if given == question.answer else f"The model's answer: {given}."
    return f"{removed} Correct answer: {question.answer}. {verdict}"


def pick_questions(probe: Probe, count: int) -> tuple[list[GalleryQuestion], int]:
    """Questions, alternating in correctness and missing modality; and how many there are to choose from.

    These are questions about clips with both modalities whose file exists.
    """
    examples, opened = probe.examples, probe.opened
    clips = opened.store.dataset(Table.CLIPS, opened.pins.clips).take(examples.clip_row_B, columns=["uri"])
    uris = clips["uri"].to_pylist()
    whole = np.logical_and.reduce(examples.present_BM, axis=1)
    # os.path.isfile, unlike Path.is_file, raises for no name
    available = [at for at, uri in enumerate(uris) if uri and whole[at] and os.path.isfile(uri)]
    order = np.random.default_rng(SEED).permutation(available).tolist() if available else []
    questions = opened.store.dataset(Table.QUESTIONS, opened.pins.questions).take(
        examples.question_row_B, columns=["question", "choices"]
    )
    rows = questions.to_pylist()
    kinds = [(missing, right) for right in (True, False) for missing in Modality]
    outputs = {modality: probe.outputs[WITH_RECOVERY, Condition.without(modality)] for modality in Modality}
    groups = [[at for at in order if outputs[missing].right_Q[at] == right] for missing, right in kinds]
    return [
        GalleryQuestion(
            request=Request(
                video=uris[at],
                question=rows[at]["question"],
                missing=kinds[group][0],
                choices=tuple(choice or "" for choice in rows[at]["choices"] or ())
                if opened.answers is None
                else (),
                source_id=opened.clips.sources[examples.clip_row_B[at]],
                id=examples.question_ids[at],
            ),
            answer=probe.answers[at],
            right=kinds[group][1],
        )
        for at, group in _take_in_turn(groups, count)
    ], len(available)


def _take_in_turn(groups: Sequence[Sequence[int]], count: int) -> list[tuple[int, int]]:
    """At most `count` different (item, number of its group), from each group in turn."""
    taken: dict[int, int] = {}
    queues = [iter(group) for group in groups]
    before = -1
    while before < len(taken) < count:
        before = len(taken)
        for number, queue in enumerate(queues):
            item = next((item for item in queue if item not in taken), None)
            if item is not None and len(taken) < count:
                taken[item] = number
    return list(taken.items())
