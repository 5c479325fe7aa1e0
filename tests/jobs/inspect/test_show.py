"""`store show` prints what the tables say of a clip, checked against the rows themselves.

For a missing clip it suggests similar names; hostile ids harm neither SQL nor a terminal.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from r2scp.jobs.cli.main import app
from r2scp.jobs.inspect.show import clip_facts, similar_ids
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

AT = datetime(2026, 1, 31, tzinfo=UTC)
HOSTILE = (
    "folder/it's; DROP TABLE clips --",
    'folder/"quoted" \\ back',
    "folder/<script>alert(1)</script>",
    "folder/[red]x[/red]",
    "folder/\x1b[2J\x1b]0;owned\x07\u202egpj.exe\r\n",
    "folder/%' OR '1'='1",
    "-n",
)
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})


def test_it_shows_what_the_tables_say(question_store: FeatureStore) -> None:
    rows = question_store.clips().to_pylist()
    for row in rows:
        facts = clip_facts(question_store, row["clip_id"])
        assert facts["clip"]["corpus"] == row["corpus"]
        assert facts["clip"]["source_id"] == row["source_id"]
        for name in ("audio", "visual"):
            assert facts["modalities"][name]["tokens"] == len(row[name] or [])
            assert facts["modalities"][name]["status"] == row[f"{name}_status"]
        assert facts["provenance"]["ingested_at"] == row["ingested_at"].isoformat()
        assert facts["failure"] is None
        where = f"clip_id = '{row['clip_id']}'"
        asked = {q["question_id"]: q for q in question_store.questions(where=where).to_pylist()}
        assert {q["question_id"] for q in facts["questions"]} == set(asked)
        assert all(q[name] == asked[q["question_id"]][name] for q in facts["questions"] for name in q)
    assert any(facts["questions"] for facts in (clip_facts(question_store, r["clip_id"]) for r in rows))


def test_neighbours_are_those_of_the_index(question_store: FeatureStore) -> None:
    split_of = dict(zip(*question_store.clips(["clip_id", "split"]).to_pydict().values(), strict=True))
    rows = question_store.neighbours().to_pylist()
    assert rows
    for row in rows:
        facts = clip_facts(question_store, row["clip_id"])["neighbours"]
        [each] = [one for one in facts if one["missing"] == row["missing"]]
        for side in ("nearest", "farthest"):
            assert [hit["clip_id"] for hit in each[side]] == row[f"{side}_ids"]
            assert [hit["score"] for hit in each[side]] == row[f"{side}_scores"]
            assert all(hit["split"] == split_of[hit["clip_id"]] for hit in each[side])
        assert each["settings"] == json.loads(row["settings"])


def test_a_deleted_neighbour_is_still_listed(own_store: FeatureStore) -> None:
    row = own_store.neighbours().to_pylist()[0]
    deleted = row["nearest_ids"][0]
    own_store.commit(Table.CLIPS, [], {}, also_delete=[deleted])
    facts = clip_facts(own_store, row["clip_id"])["neighbours"]
    [hit] = [
        h
        for one in facts
        if one["missing"] == row["missing"]
        for h in one["nearest"]
        if h["clip_id"] == deleted
    ]
    assert hit["split"] is None
    assert hit["labels"] is None
    shown = call("store", "show", row["clip_id"], "--store", own_store.uri, "-n", 4)
    assert shown.exit_code == 0
    assert deleted in shown.stdout


def test_present_and_past_failures(own_store: FeatureStore, write: Callable[..., None]) -> None:
    failure: dict[str, Any] = {"corpus": "avqa", "stage": "decode", "detail": "moov atom", "attempts": 2}
    stored = own_store.clips(["clip_id"])["clip_id"].to_pylist()[:2]
    failures = [
        failure | {"clip_id": "avqa/broken", "reason": "truncated", "at": AT},
        failure | {"clip_id": stored[0], "reason": "timeout", "at": AT - timedelta(days=1)},
        failure | {"clip_id": stored[1], "reason": "timeout", "at": AT + timedelta(days=1)},
    ]
    write(own_store, Table.FAILURES, failures)
    alone = clip_facts(own_store, "avqa/broken")
    assert alone["clip"] is alone["modalities"] is alone["provenance"] is None
    assert alone["failure"]["reason"] == "truncated"
    assert alone["failure"]["detail"] == "moov atom"
    assert [clip_facts(own_store, one)["failure"]["past"] for one in stored] == [True, False]
    shown = call("store", "show", "avqa/broken", "--store", own_store.uri)
    assert shown.exit_code == 0
    assert "not stored" in shown.stdout
    assert "truncated" in shown.stdout


def test_the_file_is_compared_with_the_stored_one(
    own_store: FeatureStore, write: Callable[..., None], tmp_path: Path
) -> None:
    file = tmp_path / "a film.mp4"
    file.write_bytes(b"12345")
    facts = file.stat()
    row = {"clip_id": "folder/a film.mp4", "corpus": "folder", "ingested_at": AT, "uri": str(file)}
    row |= {"bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    write(own_store, Table.CLIPS, [row])

    def file_state() -> str:
        return clip_facts(own_store, row["clip_id"])["provenance"]["file"]

    assert file_state() == "as stored"
    file.write_bytes(b"123456")
    assert file_state() == "changed"
    file.unlink()
    assert file_state() == "gone"
    for uri, expected in (("s3://bucket/x.mp4", "elsewhere"), ("", "elsewhere"), ("a\0b", "gone")):
        write(own_store, Table.CLIPS, [row | {"uri": uri}])
        assert file_state() == expected


def test_similar_names_are_suggested(own_store: FeatureStore, write: Callable[..., None]) -> None:
    names = ["folder/holiday/beach party.mp4", "folder/holiday/beach walk.mp4", "folder/kitchen.mp4"]
    write(own_store, Table.CLIPS, [{"clip_id": name, "ingested_at": AT} for name in names])
    write(own_store, Table.FAILURES, [{"clip_id": "folder/broken film.mp4", "at": AT}])
    assert similar_ids(own_store, "beach party.mp4")[0] == names[0]
    assert similar_ids(own_store, "FOLDER/holiday/beach_walk.mp4")[0] == names[1]
    assert similar_ids(own_store, "broken film")[0] == "folder/broken film.mp4"
    assert similar_ids(own_store, "\u4e09\u4e09\u4e09\u4e09") == []
    with pytest.raises(StoreError, match=r"Did you mean folder/kitchen\.mp4"):
        clip_facts(own_store, "kitchen.mp4")


def test_hostile_ids_do_no_harm(own_store: FeatureStore, write: Callable[..., None]) -> None:
    before = own_store.clips().num_rows
    rows = [
        {"clip_id": name, "split": name, "labels": [name], "uri": name, "ingested_at": AT} for name in HOSTILE
    ]
    write(own_store, Table.CLIPS, rows)
    question = {"question": HOSTILE[4], "type": HOSTILE[3], "answer": HOSTILE[4], "answer_index": -1}
    write(own_store, Table.QUESTIONS, [{"question_id": n, "clip_id": n, **question} for n in HOSTILE])
    for name in HOSTILE:
        facts = clip_facts(own_store, name)
        assert facts["clip"]["labels"] == [name]
        shown = call("store", "show", "--store", own_store.uri, "--", name)
        assert shown.exit_code == 0, shown.output
        assert not STEERING.search(shown.stdout)
        machine = call("store", "show", "--store", own_store.uri, "--json", "--", name)
        assert machine.stdout.count("\n") == 1
        assert json.loads(machine.stdout)["clip_id"] == name
    assert own_store.clips().num_rows == before + len(HOSTILE)


@pytest.mark.parametrize("name", ["a'b", "\x1b[2J", "a\udcffb", "x" * 5000, ""])
def test_a_missing_clip_is_one_clear_error(question_store: FeatureStore, name: str) -> None:
    result = call("store", "show", "--store", question_store.uri, "--", name)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not STEERING.search(result.stderr)


def test_it_shows_a_snapshot(own_store: FeatureStore, write: Callable[..., None]) -> None:
    own_store.name_snapshot("before")
    write(own_store, Table.CLIPS, [{"clip_id": "avqa/new", "ingested_at": AT}])
    assert call("store", "show", "avqa/new", "--store", own_store.uri).exit_code == 0
    before = call("store", "show", "avqa/new", "--store", own_store.uri, "--at", "before")
    assert before.exit_code == 1
    assert "there is no clip" in before.stderr


def test_it_loads_neither_torch_nor_ray(question_store: FeatureStore) -> None:
    code = (
        "import sys\nfrom r2scp.jobs.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'av'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    clip = question_store.clips(["clip_id"])["clip_id"][0].as_py()
    words = ["store", "show", clip, "--store", question_store.uri]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
