"""Proves that no row is lost: whatever a file holds, each row is a clip, a question or in one counter.

Oracles: files of rows whose fate is known by construction, drawn at random in any order and number;
sound files with random bytes overwritten; the process's own peak memory.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from r2scp.pipelines.corpora.formats import CORPORA, Corpus, RejectReason, open_corpus
from r2scp.store.errors import CorpusError

Row = dict[str, object] | str
MUSIC = {"type": '["Audio", "Counting"]', "question_content": "Is <Object> loud?", "templ_values": '["it"]'}


def music_row(fate: str, n: int) -> Row:
    row: dict[str, object] = {"video_id": f"{n:08d}", "question_id": n, "anser": "yes", **MUSIC}
    changes: dict[str, dict[str, object]] = {
        "new question": {"video_id": "00000000", "question_id": f"more {n}", "templ_values": f'["{n}"]'},
        "duplicate": {"video_id": "00000000", "question_id": 0},
        "deleted": {"question_deleted": 1},
        "bad_template": {"templ_values": '["one", "too many"]'},
        "missing_key": {"anser": None},
        "bad_text": {"question_content": "a <Object>\x00"},
        "bad_video_id": {"video_id": "../../etc/passwd"},
        "bad_type": {"type": "[]"},
        "conflicting_answer": {"video_id": "00000000", "question_id": 0, "anser": "no"},
    }
    return row | changes.get(fate, {})


def avqa_row(fate: str, n: int) -> Row:
    row: dict[str, object] = {"id": n, "video_name": f"-_{n:07d}-__{n:06d}", "question_text": "Which?"}
    row |= {"multi_choice": ["a", None, "c"], "answer": 2, "question_type": "Which"}
    changes: dict[str, dict[str, object]] = {
        "new question": {
            "id": f"more {n}",
            "video_name": f"-_{0:07d}-__{0:06d}",
            "question_text": f"Who is {n}?",
        },
        "duplicate": {"id": 0, "video_name": f"-_{0:07d}-__{0:06d}"},
        "bad_answer": {"answer": 1},
        "no_question": {"question_text": ""},
        "bad_choices": {"multi_choice": list("abcdefg")},
        "bad_video_id": {"video_name": "/etc/passwd"},
        "conflicting_answer": {"id": 0, "video_name": f"-_{0:07d}-__{0:06d}", "answer": 0},
    }
    return row | changes.get(fate, {})


def folder_row(fate: str, n: int) -> Row:
    row: dict[str, object] = {"video": f"{n}.mp4", "question": "Why?", "answer": "so", "question_id": str(n)}
    changes: dict[str, dict[str, object]] = {
        "new question": {"video": "0.mp4", "question_id": f"more {n}", "question": f"Why {n}?"},
        "duplicate": {"video": "0.mp4", "question_id": "0"},
        "clip only": {"question": None, "answer": None},
        "no_question": {"question": ""},
        "bad_split": {"split": "a\nb"},
        "bad_video_id": {"video": "a/../../b.mp4"},
        "wrong_columns": {"vidoe": 1},
        "bad_answer": {"choices": ["a", "b"]},
    }
    return row | changes.get(fate, {})


def vggsound_row(fate: str, n: int) -> Row:
    lines = {
        "clip only": f'-_{n:07d}-_,{n},"a label, quoted",train',
        "duplicate": "-_0000000-_,0,another label,train",
        "bad_start": f"-_{n:07d}-_,{('-1', '12.5', '1e3', 'nan', '', '30x')[n % 6]},label,train",
        "bad_split": f"-_{n:07d}-_,{n},label,holdout",
        "bad_video_id": f"../{n:08d},{n},label,train",
        "wrong_columns": f"-_{n:07d}-_,{n},label",
        "not_csv": f'-_{n:07d}-_,{n},"label,train',
        "bad_text": f"-_{n:07d}-_,{n},la\x1bbel,train",
    }
    return lines[fate]


ADAPTERS: dict[str, tuple[Callable[[str, int], Row], str, str, tuple[str, ...]]] = {
    "music-avqa": (
        music_row, "avqa-train.json", "sound",
        ("new question", "duplicate", "deleted", "bad_template", "missing_key", "bad_text", "bad_video_id",
         "bad_type", "conflicting_answer"),
    ),
    "avqa": (
        avqa_row, "train_qa.json", "sound",
        ("new question", "duplicate", "bad_answer", "no_question", "bad_choices", "bad_video_id",
         "conflicting_answer"),
    ),
    "folder": (
        folder_row, "own.jsonl", "sound",
        ("new question", "duplicate", "clip only", "no_question", "bad_split", "bad_video_id",
         "wrong_columns", "bad_answer"),
    ),
    "vggsound": (
        vggsound_row, "vggsound.csv", "clip only",
        ("duplicate", "bad_start", "bad_split", "bad_video_id", "wrong_columns", "not_csv", "bad_text"),
    ),
}  # fmt: skip
ADAPTERS["demo"] = ADAPTERS["music-avqa"]


def media(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    root.mkdir(exist_ok=True)
    for name in ("0.mp4", "unnamed.mp4", "00000000.mp4"):
        (root / name).touch()
    return root


def annotated(name: str, tmp_path: Path, seed: int) -> tuple[Corpus, Counter[str]]:
    """A corpus whose rows have known fates; the first row is sound."""
    make, file, sound, fates = ADAPTERS[name]
    rng = random.Random(seed)
    drawn = [sound, *(rng.choice((sound, sound, *fates)) for _ in range(rng.randrange(5, 400)))]
    rows = [make(fate, n) for n, fate in enumerate(drawn)]
    if file.endswith(".json"):
        text = json.dumps(rows, indent=rng.choice([None, 2]))
    else:
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (tmp_path / file).write_text(text)
    return open_corpus(name, media(tmp_path), [tmp_path / file]), Counter(drawn)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CORPORA)
def test_every_row_ends_where_it_must(name, seed, tmp_path):
    corpus, fates = annotated(name, tmp_path, seed)
    clips, questions = list(corpus.clips()), list(corpus.questions())
    reasons = {reason: fates[reason] for reason in RejectReason if fates[reason]}
    for tally in (corpus.clip_tally, corpus.question_tally):
        assert tally.rows == fates.total()
        assert tally.rejects == reasons
        assert len(tally.first_rejects) == min(100, sum(reasons.values()))
        assert tally.deleted == fates["deleted"]
        assert tally.duplicates == fates["duplicate"] * (tally is corpus.clip_tally or name != "vggsound")
        assert tally.unaccounted == 0
    assert len(questions) == fates["sound"] + fates["new question"]
    assert len(clips) - corpus.clip_tally.unannotated == fates["sound"] + fates["clip only"]
    assert corpus.clip_tally.repeats == fates["new question"]
    assert corpus.clip_tally.missing_files == sum(not clip.uri for clip in clips)
    assert {question.clip_id for question in questions} <= {clip.clip_id for clip in clips}


@pytest.mark.parametrize("name", CORPORA)
def test_a_damaged_file_gives_one_clear_error_or_an_account_without_a_gap(name, tmp_path):
    corpus, _ = annotated(name, tmp_path, seed=11)
    (path,) = (file.path for file in corpus.files)
    sound, rng = path.read_bytes(), random.Random(5)
    messages = []
    for _ in range(60):
        damaged = bytearray(sound)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'\x00\x1b\n"{}[],:\\a9\xff\xc3')
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(1, len(damaged))])])
        try:
            corpus = open_corpus(name, media(tmp_path), [path])
            clips, questions = list(corpus.clips()), list(corpus.questions())
        except CorpusError as error:
            messages.append(str(error))
            continue
        assert corpus.clip_tally.unaccounted == corpus.question_tally.unaccounted == 0
        for text in (value for row in (*clips, *questions) for value in (row.clip_id, row.split)):
            assert not any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in text)
        assert all(not clip.uri or Path(clip.uri).parent == tmp_path / "media" for clip in clips)
    assert all(message.isprintable() and len(message) < 900 for message in messages)
    assert len(messages) < 60


def test_no_video_id_reaches_outside_the_root(tmp_path):
    root = media(tmp_path)
    (tmp_path / "secret.mp4").touch()
    bad = ("../../secret", "/secret", "a\x00b", "a\nb", "..", ".secret", "a\\b", "", 7.5, None)
    rows = [music_row("sound", 0)]
    rows += [music_row("sound", 1) | {"video_id": video_id} for video_id in bad]  # type: ignore[operator]
    (tmp_path / "avqa-test.json").write_text(json.dumps(rows))
    corpus = open_corpus("music-avqa", root, [tmp_path / "avqa-test.json"])
    assert [clip.video_id for clip in corpus.clips()] == ["00000000"]
    rejects = corpus.clip_tally.first_rejects
    assert [reject.row for reject in rejects] == list(range(2, 12))
    reasons = [RejectReason.BAD_VIDEO_ID] * 9 + [RejectReason.MISSING_KEY]
    assert [reject.reason for reject in rejects] == reasons
    assert all(reject.detail.isprintable() for reject in rejects)


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "demo"])
def test_a_file_of_another_dataset_is_one_error_that_names_it(name, tmp_path):
    for other in ADAPTERS:
        if ADAPTERS[other] != ADAPTERS[name]:
            annotated(other, tmp_path, seed=2)
            path = tmp_path / ADAPTERS[other][1]
            with pytest.raises(CorpusError, match=r"must be .*; got ") as raised:
                open_corpus(name, media(tmp_path), [path], split="train")
            assert str(path) in str(raised.value)


def test_a_wrong_file_is_given_up_after_a_hundred_rows_and_before_the_walk(tmp_path):
    path = tmp_path / "avqa-test.json"
    path.write_text(json.dumps([{"id": n, "image": "x"} for n in range(5_000)]))
    with pytest.raises(CorpusError, match="100 rows of which none fits; row 1: missing_key: no video_id"):
        open_corpus("music-avqa", tmp_path / "no such folder", [path])


def test_missing_and_empty_files_are_reported_before_any_work(tmp_path):
    root = media(tmp_path)
    with pytest.raises(CorpusError, match=r"avqa-train\.json.*--annotations"):
        open_corpus("music-avqa", root)
    (tmp_path / "list.txt").write_text("-_0000000-__000000\n")
    with pytest.raises(CorpusError, match="name must say train, val or test"):
        open_corpus("vggsound", root, [tmp_path / "list.txt"])
    (tmp_path / "train.csv").write_text("-_0000000-__000000.mp4,x\n")
    with pytest.raises(CorpusError, match="must be a folder"):
        open_corpus("vggsound", tmp_path / "absent", [tmp_path / "train.csv"])
    with pytest.raises(CorpusError, match="got a folder"):
        open_corpus("folder", root, [root])
    for empty in ("[]", "[\n]\n"):
        (tmp_path / "avqa-val.json").write_text(empty)
        with pytest.raises(CorpusError, match="without a single row"):
            open_corpus("music-avqa", root, [tmp_path / "avqa-val.json"])


MEASURE = """
import resource, sys, time
from pathlib import Path
from r2scp.pipelines.corpora.formats import open_corpus
start = time.perf_counter()
corpus = open_corpus("vggsound", Path(sys.argv[1]), [Path(sys.argv[2])])
clips = sum(1 for _ in corpus.clips())
print(clips, corpus.clip_tally.missing_files, time.perf_counter() - start,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_two_hundred_thousand_rows_take_seconds_and_a_hundred_megabytes(tmp_path):
    root = media(tmp_path)
    figures = {}
    for count in (2_000, 200_000):
        path = tmp_path / f"{count}.csv"
        path.write_text("".join(f'-_{n:07d}-_,{n % 600},"label {n % 309}, x",train\n' for n in range(count)))
        command = [sys.executable, "-c", MEASURE, str(root), str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        clips, missing, seconds, megabytes = map(float, printed.split())
        assert clips == missing == count
        figures[count] = seconds, megabytes
    assert figures[200_000][0] < 30  # 1.7 s on an idle core
    assert figures[200_000][1] - figures[2_000][1] < 150  # MB; 83 measured
