"""Questions about demo scenes, with true answers by construction: MUSIC-AVQA's 33 wordings and file format.

`answers` gives the candidates (slots, answer) of a wording in a scene. An answer is drawn uniformly from
the possible ones, then slots that fit it. `KEEP` then drops some of the frequent answers, so that the
most frequent answer to a wording is no good guess.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from r2scp.pipelines.demo import answers
from r2scp.pipelines.demo.answers import Candidates, Facts
from r2scp.pipelines.demo.scene import Scene
from r2scp.pipelines.demo.world import INSTRUMENTS, PLACES

QUESTIONS_PER_CLIP = 5
_TAG = 6  # seeds this module's random numbers

SLOTS = {
    "<Object>": INSTRUMENTS,
    "<LR>": PLACES,
    "<FL>": answers.ENDS,
    "<LL>": ("loudest", "lowest"),
    "<TH>": answers.ORDINALS,
    "<BA>": ("before", "after"),
    "<LRer>": ("leftest", "rightest"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One wording. `key` describes the question in a few words."""

    key: str
    modality: str
    kind: str
    text: str
    candidates: Callable[[Facts], Candidates]

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of its slots, in order."""
        return tuple(word.strip("?. ？") for word in self.text.split() if word.startswith("<"))


# fmt: off
WORDINGS = {
    ("Audio", "Counting"): (
        ("both heard", "Are there <Object> and <Object> sound? ", answers.both_heard),
        ("number heard", "How many musical instruments were heard throughout the video?", answers.count_heard),  # noqa: E501
        ("heard", "Is there a <Object> sound?", answers.is_heard),
    ),
    ("Audio", "Comparative"): (
        ("louder", "Is the <Object> louder than the <Object>?", answers.louder),
        ("more rhythmic", "Is the <Object> more rhythmic than the <Object>?", answers.more_rhythmic),
        ("playing longer", "Is the <Object> playing longer than the <Object>?", answers.playing_longer),
    ),
    ("Visual", "Counting"): (
        ("both seen", "Are there <Object> and <Object> instruments in the video?", answers.both_seen),
        ("number seen of one type", "How many <Object> are in the entire video?", answers.count_seen_of_type),
        ("types seen", "How many types of musical instruments appeared in the entire video?", answers.count_types_seen),  # noqa: E501
        ("seen", "Is there a <Object> in the entire video?", answers.is_seen),
    ),
    ("Visual", "Location"): (
        ("beside", "What is the instrument on the <LR> of <Object>?", answers.beside),
        ("outermost", "What kind of instrument is the <LRer> instrument? ", answers.outermost),
        ("solo", "What kind of musical instrument is it?", answers.solo),
        ("place of performance", "Where is the performance?", answers.place_of_performance),
    ),
    ("Audio-Visual", "Existential"): (
        ("always playing", "Is the <Object> in the video always playing?", answers.always_playing),
        ("voiceover", "Is there a voiceover?", answers.voiceover),
        ("sound from the stage", "Is this sound from the instrument in the video?", answers.sound_from_stage),
    ),
    ("Audio-Visual", "Counting"): (
        ("number seen and heard", "How many instruments are sounding in the video?", answers.count_playing),
        ("number seen and silent", "How many instruments in the video did not sound from beginning to end?", answers.count_silent),  # noqa: E501
        ("number seen and heard of one type", "How many sounding <Object> in the video？", answers.count_playing_of_type),  # noqa: E501
        ("types seen and heard", "How many types of musical instruments sound in the video?", answers.count_types_playing),  # noqa: E501
    ),
    ("Audio-Visual", "Comparative"): (
        ("louder by place", "Is the <Object> on the <LR> louder than the <Object> on the <LR>?", answers.louder_by_name_and_place),  # noqa: E501
        ("more rhythmic by place", "Is the <Object> on the <LR> more rhythmic than the <Object> on the <LR>?", answers.more_rhythmic_by_name_and_place),  # noqa: E501
        ("louder place", "Is the instrument on the <LR> louder than the instrument on the <LR>?", answers.louder_by_place),  # noqa: E501
        ("more rhythmic place", "Is the instrument on the <LR> more rhythmic than the instrument on the <LR>?", answers.more_rhythmic_by_place),  # noqa: E501
    ),
    ("Audio-Visual", "Location"): (
        ("sound from a place", "Is the <FL> sound coming from the <LR> instrument?", answers.from_place),
        ("beside the sounding", "What is the <LR> instrument of the <FL> sounding instrument?", answers.beside_end),  # noqa: E501
        ("where by loudness", "Where is the <LL> instrument?", answers.where_by_loudness),
        ("at the same time", "Which is the musical instrument that sounds at the same time as the <Object>?", answers.at_same_time),  # noqa: E501
    ),
    ("Audio-Visual", "Temporal"): (
        ("comes in", "What is the <TH> instrument that comes in?", answers.comes_in),
        ("where by entry", "Where is the <FL> sounding instrument?", answers.where_by_entry),
        ("which of two", "Which <Object> makes the sound <FL>?", answers.which_of_two),
        ("before or after", "Which instrument makes sounds <BA> the <Object>?", answers.before_or_after),
    ),
}
# fmt: on
TEMPLATES = tuple(
    Template(modality=modality, kind=kind, key=key, text=text, candidates=candidates)
    for (modality, kind), wordings in WORDINGS.items()
    for key, text, candidates in wordings
)
TYPES = tuple(WORDINGS)

_BY_TYPE = tuple(tuple(t for t in TEMPLATES if (t.modality, t.kind) == kind) for kind in TYPES)
# Fewer scenes allow questions of these types, so they are drawn with twice the weight.
_RARE = (
    ("Audio", "Comparative"),
    *(("Audio-Visual", kind) for kind in ("Comparative", "Location", "Temporal")),
)
_TYPE_WEIGHTS = np.array([2.0 if kind in _RARE else 1.0 for kind in TYPES])
_TYPE_WEIGHTS /= _TYPE_WEIGHTS.sum()

#: Share of drawn questions that is kept, by (key, answer); 1 for all others. Fitted on worlds 1-6.
KEEP = {
    ("both heard", "no"): 0.22,
    ("number heard", "one"): 0.46,
    ("playing longer", "no"): 0.85,
    ("both seen", "no"): 0.53,
    ("number seen of one type", "one"): 0.61,
    ("number seen of one type", "zero"): 0.58,
    ("always playing", "no"): 0.17,
    ("voiceover", "no"): 0.7,
    ("sound from the stage", "yes"): 0.44,
    ("number seen and heard", "one"): 0.26,
    ("number seen and heard", "two"): 0.82,
    ("number seen and silent", "one"): 0.84,
    ("number seen and silent", "zero"): 0.91,
    ("number seen and heard of one type", "one"): 0.2,
    ("number seen and heard of one type", "zero"): 0.57,
    ("types seen and heard", "one"): 0.19,
    ("types seen and heard", "two"): 0.77,
    ("which of two", "simultaneously"): 0.4,
}


def sample_wording(rng: np.random.Generator, template: Template) -> tuple[str, str]:
    """The template with random slots filled in, and a short description of what it asks."""
    slots = tuple(SLOTS[name][int(rng.integers(len(SLOTS[name])))] for name in template.slots)
    meaning = f"{template.modality} {template.kind}: {template.key} {' '.join(slots)}".replace("_", " ")
    return fill_template(template, slots), meaning


def fill_template(template: Template, slots: tuple[str, ...]) -> str:
    """The text of the question."""
    text = template.text
    for name, slot in zip(template.slots, slots, strict=True):
        text = text.replace(name, slot.replace("_", " "), 1)
    return text


def make_questions(scene: Scene) -> list[dict[str, object]]:
    """Rows in MUSIC-AVQA's format: `QUESTIONS_PER_CLIP`, or fewer if the scene allows no more."""
    rng = np.random.default_rng([scene.seed, _TAG, scene.index])
    facts = answers.make_facts(scene, rng)
    drawn: list[tuple[Template, tuple[str, ...], str]] = []
    order = rng.choice(len(TYPES), len(TYPES), replace=False, p=_TYPE_WEIGHTS)
    for templates in [_BY_TYPE[i] for i in order] * 2:
        if len(drawn) == QUESTIONS_PER_CLIP:
            break
        for i in rng.permutation(len(templates)):
            template = templates[i]
            is_new = all(template is not other for other, _, _ in drawn)
            if is_new and (slots_answer := _draw_answer(rng, template, facts)) is not None:
                drawn.append((template, *slots_answer))
                break
    return [_row(scene, number, *question) for number, question in enumerate(drawn)]


def _draw_answer(
    rng: np.random.Generator, template: Template, facts: Facts
) -> tuple[tuple[str, ...], str] | None:
    """Slots and answer; None if the scene does not allow the wording, or `KEEP` drops the answer."""
    candidates = list(template.candidates(facts))
    if not candidates:
        return None
    distinct = sorted({answer for _, answer in candidates})
    answer = distinct[int(rng.integers(len(distinct)))]
    if rng.random() >= KEEP.get((template.key, answer), 1.0):
        return None
    fitting = [slots for slots, a in candidates if a == answer]
    return fitting[int(rng.integers(len(fitting)))], answer


def _row(
    scene: Scene, number: int, template: Template, slots: tuple[str, ...], answer: str
) -> dict[str, object]:
    return {
        "video_id": scene.video_id,
        "question_id": scene.index * QUESTIONS_PER_CLIP + number,
        "type": json.dumps([template.modality, template.kind]),
        "question_content": template.text,
        "templ_values": json.dumps(list(slots)),
        "question_deleted": 0,
        "anser": answer,
    }
