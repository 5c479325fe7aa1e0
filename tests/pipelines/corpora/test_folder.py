"""Proves that a folder of media, with or without own questions, becomes the right clips and questions."""

import json
from pathlib import Path

from r2scp.pipelines.corpora.formats import RejectReason, open_corpus


def media(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_folder_without_questions_takes_every_file_in_order(tmp_path):
    root = media(tmp_path, "b/c/2.mp4", "a.wav", "b/1 é.png", "readme.md")
    corpus = open_corpus("folder", root)
    clips, questions = list(corpus.clips()), list(corpus.questions())
    assert [clip.video_id for clip in clips] == ["a.wav", "b/1 é.png", "b/c/2.mp4"]
    assert [clip.labels for clip in clips] == [(), ("b",), ("b", "c")]
    assert all(clip.clip_id == f"folder/{clip.source_id}" and Path(clip.uri).is_file() for clip in clips)
    assert ({clip.split for clip in clips}, questions) == ({"train"}, [])
    assert corpus.ignored.examples == ["readme.md"]
    assert {clip.split for clip in open_corpus("folder", root, split="holdout").clips()} == {"holdout"}


def test_folder_with_ones_own_questions(tmp_path):
    root = media(tmp_path / "v", "x/dog.mp4", "x/cat.mp4", "y/cat.mp4", "y/Fu\u0308ße.mp4", "z.mp4")
    table = (
        "video,question,answer,split,type,choices,question_id,labels\n"
        'x/dog.mp4,"How many, in all?",two,test,Count,one|two,q1,pets|dogs\n'
        "dog,Which?,,Validation,,,,\n"  # a bare name; no answer yet
        "./y/cat,Where?,indoor,,,,,\n"
        "F\u00fcße.mp4,Who?,me,train,,,,\n"  # the other way to write an umlaut
        "gone/away.mp4,What?,that,test,,,,\n"
        "z.mp4,,,holdout,,,,night\n"  # a split and a label, no question
        "cat,Which cat?,?,test,,,,\n../v/z.mp4,Why?,no,test,,,,\n/etc/passwd,Why?,no,test,,,,\n"
        "z.mp4,,yes,test,,,,\nz.mp4,Why?,no,test,,yes|maybe,,\nz.mp4,Why?,no,a b,,,,\n"
    )
    corpus = open_corpus("folder", root, [written(tmp_path / "own.csv", table)])
    clips, questions = list(corpus.clips()), list(corpus.questions())
    assert {clip.video_id: clip.split for clip in clips} == {
        "x/cat.mp4": "train", "x/dog.mp4": "val", "y/Fu\u0308ße.mp4": "train",
        "y/cat.mp4": "train", "z.mp4": "holdout", "gone/away.mp4": "test",
    }  # fmt: skip
    assert {clip.video_id: clip.labels for clip in clips}["x/dog.mp4"] == ("x", "pets", "dogs")
    assert [clip.uri for clip in clips if "gone" in clip.video_id] == [""]
    first = questions[0]
    assert (first.question_id, first.choices, first.answer_index) == ("folder/q1", ("one", "two"), 1)
    assert [q.answer for q in questions] == ["two", "", "indoor", "me", "that"]
    assert corpus.clip_tally.unannotated == 1
    assert corpus.question_tally.no_question == 1
    assert corpus.question_tally.rejects == {
        RejectReason.AMBIGUOUS_VIDEO: 1, RejectReason.BAD_VIDEO_ID: 2, RejectReason.NO_QUESTION: 1,
        RejectReason.BAD_ANSWER: 1, RejectReason.BAD_SPLIT: 1,
    }  # fmt: skip


def test_folder_takes_json_lines_and_refuses_keys_it_does_not_know(tmp_path):
    rows = [
        {"video": "a", "question": "Which?", "choices": ["x", None, "y"], "answer": 2, "labels": ["k"]},
        {"video": "a", "question": "Why?", "anwser": "typo"},
        ["not", "an", "object"],
    ]
    path = written(tmp_path / "own.jsonl", "\n".join(map(json.dumps, rows)) + '\n{"video": "a", \n')
    corpus = open_corpus("folder", media(tmp_path / "v", "a.mp4"), [path])
    clips, questions = list(corpus.clips()), list(corpus.questions())
    assert clips[0].labels == ("k",)
    assert (questions[0].choices, questions[0].answer, questions[0].answer_index) == (
        ("x", None, "y"),
        "y",
        2,
    )
    assert corpus.question_tally.rejects == {
        RejectReason.WRONG_COLUMNS: 1, RejectReason.NOT_AN_OBJECT: 1, RejectReason.NOT_JSON: 1,
    }  # fmt: skip
