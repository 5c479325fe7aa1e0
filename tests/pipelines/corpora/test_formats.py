"""Proves that each dataset's own files, with all their drift, become the right clips and questions.

Oracles: what the makers publish about their formats, drift by drift; the datasets' own files beside real
media, of which it is known which row belongs to which file.
"""

import json
from pathlib import Path

import pytest

from r2scp.pipelines.corpora.formats import CORPORA, Corpus, RejectReason, open_corpus
from r2scp.store.errors import UsageError

IDS = [f"-_{n:03d}_a-Z{n % 10}{n % 7}" for n in range(600)]  # 11 characters, with what ids may hold


def media(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def written(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def music(number: int = 1, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "video_id": f"{number:08d}",
        "question_id": number,
        "type": '["Audio-Visual", "Counting"]',
        "question_content": "How many sounding <Object> in the video？",
        "templ_values": '["cello"]',
        "question_deleted": 0,
        "anser": "two",
    }
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


def avqa(number: int = 1, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "id": number,
        "video_name": f"{IDS[number]}_{number:06d}",
        "video_id": 10_000 - number,
        "question_text": "What animal is in the video?",
        "multi_choice": ["dog", "cat", "sheep", "cow"],
        "answer": 2,
        "question_relation": "Both",
        "question_type": "Which",
    }
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


def passes(corpus: Corpus) -> tuple[list, list]:
    """Both passes; nothing is lost in either, and they agree on what is sound."""
    clips, questions = list(corpus.clips()), list(corpus.questions())
    assert corpus.clip_tally.unaccounted == corpus.question_tally.unaccounted == 0
    assert corpus.clip_tally.rejects == corpus.question_tally.rejects
    assert corpus.clip_tally.deleted == corpus.question_tally.deleted
    assert corpus.clip_tally.clips == len(clips) == len({clip.clip_id for clip in clips})
    assert corpus.question_tally.questions == len(questions) == len({q.question_id for q in questions})
    assert {question.clip_id for question in questions} <= {clip.clip_id for clip in clips}
    assert list(corpus.clips()) == clips  # again, and the same
    return clips, questions


# --- VGGSound -----------------------------------------------------------------------------------------


def test_vggsound_joins_both_namings_under_one_id(tmp_path):
    root = media(
        tmp_path / "v", f"a/{IDS[1]}_000030.mp4", f"b/{IDS[2]}_30000_40000.webm", f"{IDS[4]}_1_2.mp4"
    )
    lines = [f'{n},30,"chirping, tweeting",{"test" if n == IDS[3] else "train"}' for n in IDS[1:5]]
    clips, questions = passes(
        open_corpus("vggsound", root, [written(tmp_path / "vggsound.csv", "\r\n".join(lines))])
    )
    assert [clip.video_id for clip in clips] == [f"{n}_000030" for n in IDS[1:5]]
    assert [Path(clip.uri).name for clip in clips[:2]] == [
        f"{IDS[1]}_000030.mp4",
        f"{IDS[2]}_30000_40000.webm",
    ]
    assert [clip.uri for clip in clips[2:]] == ["", ""]
    assert [clip.split for clip in clips] == ["train", "train", "test", "train"]
    assert {clip.labels for clip in clips} == {("chirping, tweeting",)}
    assert [clip.source_id for clip in clips] == IDS[1:5]
    assert questions == []


def test_vggsound_older_files_and_id_lists_name_the_same_clips(tmp_path):
    root = media(tmp_path / "v", f"{IDS[1]}_30000_40000.mp4", f"{IDS[2]}_10500_20500.mp4")
    older = written(tmp_path / "AStest.csv", f"{IDS[1]}_000030.mp4,playing harp\r\n")
    listed = written(tmp_path / "vggsound_valid.txt", f"{IDS[1]}_30000_40000\n{IDS[2]}_10500_20500\n")
    from_older, _ = passes(open_corpus("vggsound", root, [older]))
    from_list, _ = passes(open_corpus("vggsound", root, [listed]))
    assert (from_older[0].split, from_list[0].split) == ("test", "val")
    assert from_older[0].clip_id == from_list[0].clip_id == f"vggsound/{IDS[1]}_000030"
    assert from_list[1].video_id == f"{IDS[2]}_10500_20500"  # no whole second: keeps the name it has
    assert all(clip.uri for clip in from_older + from_list)
    corpus = open_corpus("vggsound", root, [older, listed])
    clips, _ = passes(corpus)
    assert [(clip.split, clip.labels) for clip in clips] == [("val", ("playing harp",)), ("val", ())]
    assert corpus.clip_tally.duplicates == 1


def test_vggsound_merges_a_clip_named_twice_and_counts_it(tmp_path):
    starts = ("30,dog", '30.0,"dog, barking"', "30,dog", "40,dog")
    rows = "".join(f"{IDS[1]},{start},train\n" for start in starts)
    corpus = open_corpus("vggsound", media(tmp_path / "v", "x.mp4"), [written(tmp_path / "a.csv", rows)])
    clips, _ = passes(corpus)
    assert [clip.labels for clip in clips] == [("dog", "dog, barking"), ("dog",)]
    assert corpus.clip_tally.duplicates == 2
    assert corpus.clip_tally.missing_files == 2


# --- MUSIC-AVQA and demo ------------------------------------------------------------------------------


def test_music_avqa_fills_templates_and_joins_video_or_sound(tmp_path):
    rows = [
        music(1, question_content="Is the <Object> on the <LR> louder? ", templ_values='["tuba", "left"]'),
        music(2, type=["Audio", "Comparative"], templ_values=["<LR> & <Object>"]),
        music(
            3,
            question_content="Where is the performance?",
            templ_values=...,
            question_deleted=...,
            type='["Visual"]',
        ),
        music(4, video_id=4, anser=..., answer="acoustic_guitar"),
    ]
    root = media(
        tmp_path / "v", "00000001.mp4", "00000001.mp3", "d/00000002.mp3", "00000003.jpg", "00000004.mkv"
    )
    corpus = open_corpus("music-avqa", root, [written(tmp_path / "avqa-test.json", rows)])
    clips, questions = passes(corpus)
    assert [q.question for q in questions] == [
        "Is the tuba on the left louder?",
        "How many sounding <LR> & <Object> in the video?",  # what fills a slot is never a slot
        "Where is the performance?",
        "How many sounding cello in the video?",
    ]
    assert [q.type for q in questions] == [
        "Audio-Visual/Counting",
        "Audio/Comparative",
        "Visual",
        "Audio-Visual/Counting",
    ]
    assert questions[3].answer == "acoustic_guitar"
    assert [Path(clip.uri).name for clip in clips] == ["00000001.mp4", "00000002.mp3", "", "00000004.mkv"]
    assert (corpus.clip_tally.missing_files, corpus.clip_tally.ambiguous_files) == (1, 1)
    assert {q.split for q in questions} == {clip.split for clip in clips} == {"test"}
    assert questions[0].question_id == "music-avqa/1"
    assert (questions[0].choices, questions[0].answer_index) == ((), -1)


def test_music_avqa_sources_tie_what_was_made_from_one_recording(tmp_path):
    names = ["00000695", "00000695_flip", "eva00000695", "esa00000695_flip", "sa00000695", "vv00000695"]
    rows = [music(n, video_id=name) for n, name in enumerate(names)]
    root = media(tmp_path / "v", "x.mp4")
    clips, _ = passes(open_corpus("music-avqa", root, [written(tmp_path / "avqa-train.json", rows)]))
    assert [clip.source_id for clip in clips] == ["00000695"] * 4 + ["sa00000695", "vv00000695"]


@pytest.mark.parametrize("order", [("train", "val", "test"), ("test", "val", "train")])
def test_a_clip_with_a_training_question_is_in_train_and_questions_keep_their_split(order, tmp_path):
    numbered = {"test": [(1, "a"), (2, "b"), (3, "c")], "val": [(4, "b"), (5, "a")], "train": [(6, "a")]}
    files = [
        written(tmp_path / f"avqa-{split}.json", [music(n, video_id=video) for n, video in numbered[split]])
        for split in order
    ]
    clips, questions = passes(open_corpus("music-avqa", media(tmp_path / "v", "a.mp4"), files))
    assert {clip.video_id: clip.split for clip in clips} == {"a": "train", "b": "val", "c": "test"}
    assert [q.split for q in questions] == [split for split in order for _ in numbered[split]]


def test_question_ids_are_stable_and_never_stand_for_two_questions(tmp_path):
    rows = [
        music(1, question_id=...),  # no id
        music(1, question_id=7),  # has one, same words
        music(1, question_id=7),  # said again
        music(1, question_id=7, anser="three"),  # contradicted
        music(2, question_id=7),  # the id used again for another video
        music(2, question_id=7.0),  # said again
        music(1, question_id=None),  # the first one said again
    ]
    root = media(tmp_path / "v", "x.mp4")
    corpus = open_corpus("music-avqa", root, [written(tmp_path / "avqa-val.json", rows)])
    _, questions = passes(corpus)
    ids = [question.question_id for question in questions]
    assert ids[1] == "music-avqa/7"
    assert ids[2].startswith("music-avqa/7~")
    assert corpus.question_tally.duplicates == 3
    assert corpus.question_tally.rejects == {RejectReason.CONFLICTING_ANSWER: 1}
    reordered = open_corpus("music-avqa", root, [written(tmp_path / "avqa-val2.json", rows[:1])], split="val")
    assert [question.question_id for question in reordered.questions()] == ids[:1]


@pytest.mark.parametrize("name", ["music-avqa", "demo"])
def test_usual_places_are_searched_and_the_corrected_files_preferred(name, tmp_path):
    root = media(tmp_path, "videos/00000001.mp4")
    written(tmp_path / "json/avqa-train.json", [music(1)])
    assert open_corpus(name, root).files[0].path == tmp_path / "json/avqa-train.json"
    written(tmp_path / "data/json_update/avqa-test.json", [music(1)])
    corpus = open_corpus(name, root)
    assert [file.path.name for file in corpus.files] == ["avqa-test.json"]
    assert [(clip.clip_id, clip.split) for clip in corpus.clips()] == [(f"{name}/00000001", "test")]


# --- AVQA ---------------------------------------------------------------------------------------------


def test_avqa_choices_may_be_short_or_hold_null_but_the_answer_must_be_there(tmp_path):
    rows = [
        avqa(1),
        avqa(2, multi_choice=["3", None, "4 ", ""], answer=0),
        avqa(3, multi_choice=["yes", "no"], answer=1.0),
        avqa(4, multi_choice=[3, 4], answer=1),
        avqa(
            5, multi_choice=["honk ", "honk", "horn"], answer="honk ", label="vehicle horn"
        ),  # answer written out
        avqa(6, multi_choice=..., answer="cowbell "),  # an open question
        avqa(7, video_name=f"{IDS[7]}_trimmed.mp4"),  # says its source, not its start
    ]
    faults = {
        RejectReason.BAD_ANSWER: [
            avqa(11, answer=4),
            avqa(12, answer=-1),
            avqa(13, answer="bird"),
            avqa(14, answer=True),
            avqa(15, multi_choice=["a", None], answer=1),
        ],
        RejectReason.MISSING_KEY: [avqa(16, answer=None), avqa(17, video_name=...)],
        RejectReason.BAD_CHOICES: [
            avqa(18, multi_choice=[None, ""], answer=0),
            avqa(19, multi_choice=list("abcde")),
            avqa(20, multi_choice={"a": 1}),
        ],
        RejectReason.NO_QUESTION: [
            avqa(21, question_text=None),
            avqa(22, question_text=" "),
            avqa(23, question_text=...),
        ],
        RejectReason.BAD_VIDEO_ID: [
            avqa(24, video_name="../../../etc/passwd"),
            avqa(25, video_name="short_000001"),
        ],
        RejectReason.BAD_TEXT: [avqa(26, question_text="Is\u001b[31m it?"), avqa(27, question_text={"a": 1})],
    }
    path = written(tmp_path / "val_qa.json", rows + [row for each in faults.values() for row in each])
    root = media(tmp_path / "v", f"{IDS[1]}_000001.mp4", f"{IDS[7]}_000123.mp4", f"{IDS[6]}_000007.mp4")
    corpus = open_corpus("avqa", root, [path])
    clips, questions = passes(corpus)
    assert [(q.answer, q.answer_index) for q in questions] == [
        ("sheep", 2), ("3", 0), ("no", 1), ("4", 1), ("honk", 0), ("cowbell", -1), ("sheep", 2),
    ]  # fmt: skip
    assert [len(q.choices) for q in questions] == [4, 4, 2, 2, 3, 0, 4]
    assert questions[1].choices == ("3", None, "4", None)
    assert {q.split for q in questions} == {"test"}  # AVQA's val_qa.json is its test split
    assert [bool(clip.uri) for clip in clips] == [True, *[False] * 5, True]
    assert clips[4].labels == ("vehicle horn",)
    assert [clip.source_id for clip in clips] == IDS[1:8]
    assert corpus.question_tally.rejects == {reason: len(each) for reason, each in faults.items()}


# --- real files ---------------------------------------------------------------------------------------


@pytest.mark.realmedia
def test_the_real_music_avqa_files_join_the_real_recordings(shared_dir):
    annotations = shared_dir / "media/annotations"
    corpus = open_corpus("music-avqa", shared_dir / "media/videos/music_avqa", [annotations])
    assert [file.path.parent.name for file in corpus.files] == ["json_update"] * 2
    clips, questions = passes(corpus)
    assert len(questions) == 4_568 + 9_129
    assert len({question.type for question in questions}) == 9
    assert not any(mark in question.question for question in questions for mark in "<>？")
    assert [Path(clip.uri).name for clip in clips if clip.uri] == ["00003491.mp4"]
    assert corpus.clip_tally.missing_files == len(clips) - 1 == 7_917
    assert not corpus.question_tally.rejects
    (row,) = (question for question in questions if question.clip_id == "music-avqa/00003491")
    assert row.question_id == "music-avqa/8487"
    assert row.question == "Is the instrument on the left louder than the instrument on the right?"
    assert (row.answer, row.split, row.type) == ("no", "test", "Audio-Visual/Comparative")

    sounds = open_corpus("music-avqa", shared_dir / "media/hostile", [annotations / "MUSIC-AVQA/json_update"])
    assert [Path(clip.uri).name for clip in sounds.clips() if clip.uri] == [
        "00006835.mp3"
    ]  # sound without video


@pytest.mark.realmedia
def test_the_uncorrected_music_avqa_files_contradict_themselves_and_it_is_counted(shared_dir):
    folder = shared_dir / "media/annotations/MUSIC-AVQA/json"
    files = [folder / f"avqa-{name}.json" for name in ("train_fake", "val", "test")]
    corpus = open_corpus("music-avqa", shared_dir / "media/videos", files)
    _, questions = passes(corpus)
    assert corpus.question_tally.rejects == {RejectReason.CONFLICTING_ANSWER: 55 + 27 + 56}
    assert len(questions) + 138 == 9_185 + 4_595 + 6_233


@pytest.mark.realmedia
def test_the_real_vggsound_files_join_the_real_clips(shared_dir):
    joinable = json.loads((shared_dir / "media/annotations/joinable_rows.json").read_text())["vggsound"]
    videos = shared_dir / "media/videos"
    expected = {
        row["vggsound_id"]: row["label"]
        for row in joinable
        if (shared_dir / "media" / row["media"]).is_file() and row["specvqgan_split"] == "test"
    }
    corpus = open_corpus("vggsound", videos, [shared_dir / "media/annotations/VGGSound/test.csv"])
    clips, _ = passes(corpus)
    joined = {clip.video_id: clip.labels[0] for clip in clips if clip.uri}
    assert joined == expected
    assert len(joined) == 8
    assert {clip.split for clip in clips} == {"test"}
    assert corpus.clip_tally.missing_files == 15_446 - 8
    assert len({clip.labels for clip in clips}) == 309

    lists = sorted((shared_dir / "media/annotations/VGGSound_SpecVQGAN").glob("*.txt"))
    listed = open_corpus("vggsound", videos, lists)
    splits = {clip.video_id: clip.split for clip in listed.clips()}
    assert len(splits) == 14_512 + 156_487 + 19_056
    assert {splits[video_id] for video_id in expected} == {"test"}


@pytest.mark.realmedia
def test_the_real_avqa_rows_and_every_real_file_of_a_folder(shared_dir):
    root = shared_dir / "media/videos"
    corpus = open_corpus("avqa", root, [shared_dir / "media/annotations/AVQA/val_qa.excerpt12.json"])
    _, questions = passes(corpus)
    assert len(questions) == 12
    assert (questions[0].answer, questions[0].split, len(questions[0].choices)) == ("2", "test", 4)
    for folder in (root, shared_dir / "media/hostile"):
        files = {str(path) for path in folder.rglob("*") if path.is_file()}
        assert {clip.uri for clip in open_corpus("folder", folder).clips()} == files


def test_a_name_or_split_that_cannot_be_is_a_usage_error(tmp_path):
    root = media(tmp_path, "a.mp4")
    assert CORPORA == ("vggsound", "music-avqa", "avqa", "folder", "demo")
    with pytest.raises(UsageError, match="vggsound, music-avqa"):
        open_corpus("vgg\nsound", root)
    with pytest.raises(UsageError, match="split"):
        open_corpus("folder", root, split="no such; split")
