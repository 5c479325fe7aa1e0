"""Questions about demo scenes, by construction: MUSIC-AVQA's 33 wordings, in its file format.

`demo_answers` gives the candidates (slots, answer) of a wording in a scene. One answer is drawn
uniformly among those possible, then slots for it; then `KEEP` thins out frequent answers so that no
wording is answered by its majority.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from r2scp.pipelines.demo import answers as ask
from r2scp.pipelines.demo.answers import Candidates, Facts
from r2scp.pipelines.demo.scene import Scene
from r2scp.pipelines.demo.world import INSTRUMENTS, PLACES

QUESTIONS_A_CLIP = 5
_TAG = 6  # of this module's random numbers

SLOTS = {
    "<Object>": INSTRUMENTS,
    "<LR>": PLACES,
    "<FL>": ask.ENDS,
    "<LL>": ("loudest", "lowest"),
    "<TH>": ask.ORDINALS,
    "<BA>": ("before", "after"),
    "<LRer>": ("leftest", "rightest"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One wording. `key` says what is asked, in a few words."""

    key: str
    modality: str
    kind: str
    text: str
    find: Callable[[Facts], Candidates]

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of its slots, in order."""
        return tuple(word.strip("?. ？") for word in self.text.split() if word.startswith("<"))


def _t(modality: str, kind: str, key: str, text: str, find: Callable[[Facts], Candidates]) -> Template:
    return Template(key=key, modality=modality, kind=kind, text=text, find=find)


A, V, AV = "Audio", "Visual", "Audio-Visual"
TEMPLATES = (
    _t(
        A,
        "Counting",
        "both heard",
        "Are there <Object> and <Object> sound? ",
        ask.both_heard,
    ),
    _t(
        A,
        "Counting",
        "number heard",
        "How many musical instruments were heard throughout the video?",
        ask.count_heard,
    ),
    _t(A, "Counting", "heard", "Is there a <Object> sound?", ask.is_heard),
    _t(
        A,
        "Comparative",
        "louder",
        "Is the <Object> louder than the <Object>?",
        ask.louder,
    ),
    _t(
        A,
        "Comparative",
        "more rhythmic",
        "Is the <Object> more rhythmic than the <Object>?",
        ask.more_rhythmic,
    ),
    _t(
        A,
        "Comparative",
        "playing longer",
        "Is the <Object> playing longer than the <Object>?",
        ask.playing_longer,
    ),
    _t(
        V,
        "Counting",
        "both seen",
        "Are there <Object> and <Object> instruments in the video?",
        ask.both_seen,
    ),
    _t(
        V,
        "Counting",
        "number seen of one type",
        "How many <Object> are in the entire video?",
        ask.count_seen_of_type,
    ),
    _t(
        V,
        "Counting",
        "types seen",
        "How many types of musical instruments appeared in the entire video?",
        ask.count_types_seen,
    ),
    _t(V, "Counting", "seen", "Is there a <Object> in the entire video?", ask.is_seen),
    _t(V, "Location", "beside", "What is the instrument on the <LR> of <Object>?", ask.beside),
    _t(V, "Location", "outermost", "What kind of instrument is the <LRer> instrument? ", ask.outermost),
    _t(V, "Location", "solo", "What kind of musical instrument is it?", ask.solo),
    _t(
        V,
        "Location",
        "place of performance",
        "Where is the performance?",
        ask.place_of_performance,
    ),
    _t(
        AV,
        "Existential",
        "always playing",
        "Is the <Object> in the video always playing?",
        ask.always_playing,
    ),
    _t(
        AV,
        "Existential",
        "voiceover",
        "Is there a voiceover?",
        ask.voiceover,
    ),
    _t(
        AV,
        "Existential",
        "sound from the stage",
        "Is this sound from the instrument in the video?",
        ask.sound_from_stage,
    ),
    _t(
        AV,
        "Counting",
        "number seen and heard",
        "How many instruments are sounding in the video?",
        ask.count_playing,
    ),
    _t(
        AV,
        "Counting",
        "number seen and silent",
        "How many instruments in the video did not sound from beginning to end?",
        ask.count_silent,
    ),
    _t(
        AV,
        "Counting",
        "number seen and heard of one type",
        "How many sounding <Object> in the video？",
        ask.count_playing_of_type,
    ),
    _t(
        AV,
        "Counting",
        "types seen and heard",
        "How many types of musical instruments sound in the video?",
        ask.count_types_playing,
    ),
    _t(
        AV,
        "Comparative",
        "louder by place",
        "Is the <Object> on the <LR> louder than the <Object> on the <LR>?",
        ask.louder_by_name_and_place,
    ),
    _t(
        AV,
        "Comparative",
        "more rhythmic by place",
        "Is the <Object> on the <LR> more rhythmic than the <Object> on the <LR>?",
        ask.more_rhythmic_by_name_and_place,
    ),
    _t(
        AV,
        "Comparative",
        "louder place",
        "Is the instrument on the <LR> louder than the instrument on the <LR>?",
        ask.louder_by_place,
    ),
    _t(
        AV,
        "Comparative",
        "more rhythmic place",
        "Is the instrument on the <LR> more rhythmic than the instrument on the <LR>?",
        ask.more_rhythmic_by_place,
    ),
    _t(
        AV,
        "Location",
        "sound from a place",
        "Is the <FL> sound coming from the <LR> instrument?",
        ask.from_place,
    ),
    _t(
        AV,
        "Location",
        "beside the sounding",
        "What is the <LR> instrument of the <FL> sounding instrument?",
        ask.beside_end,
    ),
    _t(AV, "Location", "where by loudness", "Where is the <LL> instrument?", ask.where_by_loudness),
    _t(
        AV,
        "Location",
        "at the same time",
        "Which is the musical instrument that sounds at the same time as the <Object>?",
        ask.at_same_time,
    ),
    _t(AV, "Temporal", "comes in", "What is the <TH> instrument that comes in?", ask.comes_in),
    _t(AV, "Temporal", "where by entry", "Where is the <FL> sounding instrument?", ask.where_by_entry),
    _t(AV, "Temporal", "which of two", "Which <Object> makes the sound <FL>?", ask.which_of_two),
    _t(
        AV,
        "Temporal",
        "before or after",
        "Which instrument makes sounds <BA> the <Object>?",
        ask.before_or_after,
    ),
)
TYPES = tuple(dict.fromkeys((template.modality, template.kind) for template in TEMPLATES))

_BY_TYPE = tuple(tuple(t for t in TEMPLATES if (t.modality, t.kind) == kind) for kind in TYPES)
# Fewer scenes allow these, so they are asked twice as readily where they can be.
_RARE = (
    ("Audio", "Comparative"),
    *(("Audio-Visual", kind) for kind in ("Comparative", "Location", "Temporal")),
)
_TYPE_WEIGHTS = np.array([2.0 if kind in _RARE else 1.0 for kind in TYPES])
_TYPE_WEIGHTS /= _TYPE_WEIGHTS.sum()

#: Share of drawn questions that stay, by (key, answer); others all stay. Fitted on worlds 1-6.
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
    return fill(template, slots), meaning


def fill(template: Template, slots: tuple[str, ...]) -> str:
    """The question as it is asked."""
    text = template.text
    for name, slot in zip(template.slots, slots, strict=True):
        text = text.replace(name, slot.replace("_", " "), 1)
    return text


def questions(scene: Scene) -> list[dict[str, object]]:
    """Rows in MUSIC-AVQA's format, `QUESTIONS_A_CLIP` of them (fewer only where the scene gives no more)."""
    rng = np.random.default_rng([scene.seed, _TAG, scene.index])
    found = ask.facts(scene, rng)
    drawn: list[tuple[Template, tuple[str, ...], str]] = []
    order = rng.choice(len(TYPES), len(TYPES), replace=False, p=_TYPE_WEIGHTS)
    for templates in [_BY_TYPE[i] for i in order] * 2:
        if len(drawn) == QUESTIONS_A_CLIP:
            break
        for at in rng.permutation(len(templates)):
            template = templates[at]
            asked = any(template is other for other, _, _ in drawn)
            if not asked and (one := _draw(rng, template, found)) is not None:
                drawn.append((template, *one))
                break
    return [_row(scene, number, *one) for number, one in enumerate(drawn)]


def _draw(rng: np.random.Generator, template: Template, found: Facts) -> tuple[tuple[str, ...], str] | None:
    candidates = list(template.find(found))
    if not candidates:
        return None
    answers = sorted({answer for _, answer in candidates})
    answer = answers[int(rng.integers(len(answers)))]
    if rng.random() >= KEEP.get((template.key, answer), 1.0):
        return None
    fitting = [slots for slots, a in candidates if a == answer]
    return fitting[int(rng.integers(len(fitting)))], answer


def _row(
    scene: Scene, number: int, template: Template, slots: tuple[str, ...], answer: str
) -> dict[str, object]:
    return {
        "video_id": scene.video_id,
        "question_id": scene.index * QUESTIONS_A_CLIP + number,
        "type": json.dumps([template.modality, template.kind]),
        "question_content": template.text,
        "templ_values": json.dumps(list(slots)),
        "question_deleted": 0,
        "anser": answer,
    }
