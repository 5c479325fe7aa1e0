"""Proves that annotation files become numbered rows, and that a file of another kind is one clear error.

Oracles: the values a JSON list and the cells a CSV were written from.
"""

import csv
import gzip
import json
import os
import random
from pathlib import Path

import pytest

from r2scp.pipelines.corpora import readers
from r2scp.pipelines.corpora.readers import csv_lines, csv_records, json_rows
from r2scp.pipelines.corpora.values import InvalidRow, RejectReason
from r2scp.store.errors import CorpusError

EXPECTS = "a file of tests"


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_list_elements_come_numbered_whatever_the_layout(tmp_path):
    values = [{"é音": [1, -2.5e3, None]}, 'a\\n"[{', 7, True, [], {"a": {"b": "\U0001f3b8"}}]
    for ascii_only, indent, before in ((True, None, ""), (False, 4, "\ufeff"), (False, 0, " \r\n")):
        text = before + json.dumps(values, ensure_ascii=ascii_only, indent=indent) + "\n\n"
        path = written(tmp_path / "list.json", text.replace("\n", "\r\n"))
        assert list(json_rows(path, EXPECTS)) == list(enumerate(values, 1))


def test_json_lines_lose_only_the_line_that_is_broken(tmp_path):
    path = written(tmp_path / "rows.jsonl", '{"a": 1}\r\n\n{"a": 2,}\n  \n[3]\n{"a": "\u2028"}\n')
    rows = dict(json_rows(path, EXPECTS))
    assert [rows[1], rows[5], rows[6]] == [{"a": 1}, [3], {"a": "\u2028"}]
    assert isinstance(rows[3], InvalidRow)
    assert rows[3].reason is RejectReason.NOT_JSON


def test_a_json_list_beyond_the_limit_is_one_clear_error(tmp_path, monkeypatch):
    path = written(tmp_path / "big.json", json.dumps([{"question": "x" * 200}] * 100))
    assert len(list(json_rows(path, EXPECTS))) == 100
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 10_000)
    with pytest.raises(CorpusError, match=r"a JSON list of 21,\d{3} bytes, more than 10,000; split it"):
        list(json_rows(path, EXPECTS))


def test_cells_come_back_as_they_were_written(tmp_path):
    rng = random.Random(3)
    rows = [["".join(rng.choice('ab", é') for _ in range(8)).strip() for _ in range(4)] for _ in range(200)]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    assert [cells for _, cells in csv_lines(path, EXPECTS)] == rows


def test_an_open_quote_costs_one_line_and_not_the_rest(tmp_path):
    path = written(tmp_path / "rows.csv", 'a,"b, c"\na,"b\nc,d\n')
    rows = dict(csv_lines(path, EXPECTS))
    assert (rows[1], rows[3]) == (["a", "b, c"], ["c", "d"])
    assert rows[2].reason is RejectReason.NOT_CSV  # type: ignore[union-attr]


def test_records_keep_line_breaks_in_cells_and_refuse_ragged_rows(tmp_path):
    content = '\ufeffQuestion, video\r\n"two\r\nlines",a.mp4\r\n\r\n,,\r\nwhy?,b.mp4\r\none\r\n'
    rows = [
        row for _, row in csv_records(written(tmp_path / "q.csv", content), EXPECTS, ("video", "question"))
    ]
    assert rows[0] == {"question": "two\nlines", "video": "a.mp4"}
    assert rows[1] == {"question": "why?", "video": "b.mp4"}
    assert [row.reason for row in rows[2:]] == [RejectReason.WRONG_COLUMNS]  # type: ignore[union-attr]
    tabbed = written(tmp_path / "q.tsv", "video\tquestion\na.mp4\twhy, and how?\n")
    assert next(csv_records(tabbed, EXPECTS, ("video", "question")))[1]["question"] == "why, and how?"  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "an empty file"),
        (b"\xef\xbb\xbf \r\n\n", "an empty file"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (gzip.compress(b"[]", mtime=0), "a gzip archive"),
        (b"PK\x03\x04rest", "a zip archive"),
        ("[1]".encode("utf-16"), "UTF-16"),
        (bytes(range(256)) * 4, "binary data"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "binary data"),
        (b"id,start\n1,2\n", "neither a JSON list nor JSON lines"),
        (b'"just text"', "neither a JSON list nor JSON lines"),
        (b'[{"a": 1}, {"a": ', "cannot be parsed (Expecting value: line 1 column 18"),
        (b'[{"a": 1}] [', "cannot be parsed (Extra data"),
        (b"[" * 200_000, "cannot be parsed (maximum recursion depth"),
        (b"[" + b"9" * 5000 + b"]", "cannot be parsed (Exceeds the limit"),
        (b'{"a": "' + b"x" * 3_000_000, "characters on line 1"),
    ],
)
def test_a_file_of_another_kind_is_one_clear_error(content, problem, tmp_path):
    path = written(tmp_path / "file.json", content)
    with pytest.raises(CorpusError) as raised:
        list(json_rows(path, EXPECTS))
    message = str(raised.value)
    assert problem in message
    assert message.startswith(f"{path}: must be {EXPECTS}; got ")
    assert message.isprintable()
    assert len(message) < 600


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, tmp_path / "absent.json"):
        with pytest.raises(CorpusError):
            list(json_rows(path, EXPECTS))


@pytest.mark.parametrize(
    "content",
    [
        "a,b\n1,2\n",
        "video,video\n1,2\n",
        "video,anwser\n1,2\n",
        'video,answer\na.mp4,"never closed\nb.mp4,yes\n',
    ],
)
def test_a_table_with_another_header_or_an_endless_quote_is_one_clear_error(content, tmp_path):
    with pytest.raises(CorpusError, match="got a"):
        list(csv_records(written(tmp_path / "q.csv", content), EXPECTS, ("video", "answer")))
