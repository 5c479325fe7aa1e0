"""The generated questions: MUSIC-AVQA's wordings, balanced, and true.

Answers are derived a second time, naively, from `truth.jsonl` and the published slots.
"""

import json
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.demo.questions import TEMPLATES, TYPES, fill_template, make_questions
from r2scp.pipelines.demo.scene import make_scene

SEED = 11


def test_there_are_nine_types_and_thirty_three_wordings() -> None:
    assert len(TYPES) == 9
    assert len(TEMPLATES) == len({template.text for template in TEMPLATES}) == 33


@pytest.mark.parity
def test_wordings_slots_and_answers_are_music_avqa_s(shared_dir: Path) -> None:
    published = defaultdict(set)
    answers = set()
    for name in ("avqa-val", "avqa-test"):
        path = shared_dir / "media/annotations/MUSIC-AVQA/json_update" / f"{name}.json"
        for row in json.loads(path.read_text()):
            published[row["question_content"]].add((row["type"], len(json.loads(row["templ_values"]))))
            answers.add(row["anser"])
    for template in TEMPLATES:
        kind = json.dumps([template.modality, template.kind])
        assert (kind, len(template.slots)) in published[template.text], template.text
    given = {row["anser"] for index in range(1500) for row in make_questions(make_scene(SEED, index))}
    assert given <= answers | {"zero"}


def test_no_answer_to_a_wording_is_too_frequent() -> None:
    answers = defaultdict(Counter)
    for index in range(3000):
        for row in make_questions(make_scene(SEED, index)):
            answers[row["question_content"]][row["anser"]] += 1
    for text, counted in answers.items():
        chance = 1 / min(len([n for n in counted.values() if n > 3]), 4)
        total = counted.total()
        limit = chance + 0.17 + 2 * np.sqrt(0.25 / total)
        assert counted.most_common(1)[0][1] / total < limit, (text, counted)
    assert {template.text for template in TEMPLATES} == answers.keys()


def answer_from(truth: dict, text: str, slots: list[str]) -> str:
    """A second derivation, from the file alone: deliberately naive, second by second."""
    parts = truth["parts"]
    on = {p["place"]: p for p in parts if p["place"] != "offstage"}
    lit = {id(p): [s for s in range(10) if p["start"] <= s < p["end"]] for p in parts}
    sounding = [p for p in parts if lit[id(p)]]
    staged = [on[place] for place in ("left", "middle", "right") if place in on]
    number = ["zero", "one", "two", "three", "four", "five"]

    def yes(truth_value: bool) -> str:
        return "yes" if truth_value else "no"

    def is_heard(name: str) -> bool:
        return any(p["instrument"] == name for p in sounding)

    def is_seen(name: str) -> bool:
        return any(p["instrument"] == name for p in staged)

    def named(name: str) -> dict:
        (part,) = [p for p in parts if p["instrument"] == name and (lit[id(p)] or p in staged)]
        return part

    def extreme(which: str) -> dict:
        first = min if which == "first" else max
        second = first(lit[id(p)][0] for p in sounding)
        (part,) = [p for p in sounding if lit[id(p)][0] == second]
        return part

    def next_to(p: dict, side: str) -> str:
        order = [q["place"] for q in staged]
        return staged[order.index(p["place"]) + {"left": -1, "right": 1}[side]]["instrument"]

    def power(p: dict) -> int:
        return -p["loudness"]

    playing = [p for p in staged if lit[id(p)]]
    match text.strip(), slots:
        case "Are there <Object> and <Object> sound?", [a, b]:
            return yes(is_heard(a) and is_heard(b))
        case "How many musical instruments were heard throughout the video?", []:
            return number[len(sounding)]
        case "Is there a <Object> sound?", [a]:
            return yes(is_heard(a))
        case "Is the <Object> louder than the <Object>?", [a, b]:
            return yes(power(named(a)) > power(named(b)))
        case "Is the <Object> more rhythmic than the <Object>?", [a, b]:
            return yes(named(a)["rate"] > named(b)["rate"])
        case "Is the <Object> playing longer than the <Object>?", [a, b]:
            return yes(len(lit[id(named(a))]) > len(lit[id(named(b))]))
        case "Are there <Object> and <Object> instruments in the video?", [a, b]:
            return yes(is_seen(a) and is_seen(b))
        case "How many <Object> are in the entire video?", [a]:
            return number[sum(p["instrument"] == a for p in staged)]
        case "How many types of musical instruments appeared in the entire video?", []:
            return number[len({p["instrument"] for p in staged})]
        case "Is there a <Object> in the entire video?", [a]:
            return yes(is_seen(a))
        case "What is the instrument on the <LR> of <Object>?", [side, a]:
            return next_to(named(a), side)
        case "What kind of instrument is the <LRer> instrument?", [outer]:
            return staged[0 if outer == "leftest" else -1]["instrument"]
        case "What kind of musical instrument is it?", []:
            (only,) = staged
            return only["instrument"]
        case "Where is the performance?", []:
            return "outdoor" if truth["backdrop"]["outdoor"] else "indoor"
        case "Is the <Object> in the video always playing?", [a]:
            return yes(len(lit[id(named(a))]) == 10)
        case "Is there a voiceover?", []:
            return yes(truth["voice_end"] - truth["voice_start"] > 0)
        case "Is this sound from the instrument in the video?", []:
            return yes(all(p in staged for p in sounding))
        case "How many instruments are sounding in the video?", []:
            return number[len(playing)]
        case "How many instruments in the video did not sound from beginning to end?", []:
            return number[sum(not lit[id(p)] for p in staged)]
        case "How many sounding <Object> in the video？", [a]:
            return number[sum(p["instrument"] == a for p in playing)]
        case "How many types of musical instruments sound in the video?", []:
            return number[len({p["instrument"] for p in playing})]
        case "Is the <Object> on the <LR> louder than the <Object> on the <LR>?", [a, place, b, other]:
            assert (on[place]["instrument"], on[other]["instrument"]) == (a, b)
            return yes(power(on[place]) > power(on[other]))
        case "Is the <Object> on the <LR> more rhythmic than the <Object> on the <LR>?", [a, place, b, other]:
            assert (on[place]["instrument"], on[other]["instrument"]) == (a, b)
            return yes(on[place]["rate"] > on[other]["rate"])
        case "Is the instrument on the <LR> louder than the instrument on the <LR>?", [place, other]:
            return yes(power(on[place]) > power(on[other]))
        case "Is the instrument on the <LR> more rhythmic than the instrument on the <LR>?", [place, other]:
            return yes(on[place]["rate"] > on[other]["rate"])
        case "Is the <FL> sound coming from the <LR> instrument?", [which, other]:
            return yes(extreme(which) is on[other])
        case "What is the <LR> instrument of the <FL> sounding instrument?", [side, which]:
            return next_to(extreme(which), side)
        case "Where is the <LL> instrument?", [which]:
            best = max if which == "loudest" else min
            return best(sounding, key=power)["place"]
        case "Which is the musical instrument that sounds at the same time as the <Object>?", [a]:
            mine = set(lit[id(named(a))])
            (other,) = {p["instrument"] for p in sounding if p["instrument"] != a and mine & set(lit[id(p)])}
            return other
        case "What is the <TH> instrument that comes in?", [which]:
            order = sorted(sounding, key=lambda p: lit[id(p)][0])
            return order[["first", "second", "third"].index(which)]["instrument"]
        case "Where is the <FL> sounding instrument?", [which]:
            return extreme(which)["place"]
        case "Which <Object> makes the sound <FL>?", [a, which]:
            twins = sorted((p for p in playing if p["instrument"] == a), key=lambda p: lit[id(p)][0])
            if lit[id(twins[0])][0] == lit[id(twins[-1])][0]:
                return "simultaneously"
            return twins[0 if which == "first" else -1]["place"]
        case "Which instrument makes sounds <BA> the <Object>?", [which, a]:
            order = [p["instrument"] for p in sorted(sounding, key=lambda p: lit[id(p)][0])]
            return order[order.index(a) + (1 if which == "after" else -1)]
    raise AssertionError(f"no derivation for {text} with {slots}")


def test_every_wording_is_answered_truly_on_many_scenes() -> None:
    wordings = set()
    for index in range(1200):
        scene = make_scene(SEED + 1, index)
        truth = json.loads(json.dumps(asdict(scene)))
        for row in make_questions(scene):
            slots = json.loads(str(row["templ_values"]))
            assert answer_from(truth, str(row["question_content"]), slots) == row["anser"], (row, truth)
            wordings.add(row["question_content"])
    assert len(wordings) == len(TEMPLATES)


def test_slots_fill_the_wording() -> None:
    template = next(t for t in TEMPLATES if t.key == "louder by place")
    assert template.slots == ("<Object>", "<LR>", "<Object>", "<LR>")
    text = fill_template(template, ("acoustic_guitar", "left", "drum", "right"))
    assert text == "Is the acoustic guitar on the left louder than the drum on the right?"
    assert all("<" not in fill_template(t, ("x",) * len(t.slots)) for t in TEMPLATES)


def test_every_answer_in_the_files_is_true_of_its_clip(tmp_path: Path) -> None:
    generate(tmp_path / "demo", clips=10, seed=3, workers=2)
    lines = (tmp_path / "demo" / "truth.jsonl").read_text().splitlines()
    truths = {truth["video_id"]: truth for truth in map(json.loads, lines)}
    counts = Counter()
    for split in ("train", "val", "test"):
        for row in json.loads((tmp_path / "demo" / "json" / f"avqa-{split}.json").read_text()):
            truth = truths[row["video_id"]]
            assert truth["split"] == split
            slots = json.loads(row["templ_values"])
            assert answer_from(truth, row["question_content"], slots) == row["anser"], row
            counts[row["video_id"]] += 1
    assert counts.keys() == truths.keys()
    assert set(counts.values()) <= {4, 5, 6}
