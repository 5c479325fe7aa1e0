"""Proves that foreign values become text, lists and splits of ours, or are refused, and print harmlessly."""

import json
from pathlib import Path

import pytest

from r2scp.pipelines.corpora.values import (
    InvalidRow,
    choices_of,
    excerpt,
    optional_id,
    split_from_name,
    text_of,
)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("avqa-train.json", "train"), ("avqa-train_fake.json", "train"), ("vggsound_valid.txt", "val"),
        ("AStest.csv", "test"), ("TEST.CSV", "test"), ("trainSet.json", "train"), ("my.dev.jsonl", "val"),
        ("latest.json", ""), ("interval.csv", ""), ("contest-training2.json", "train"), ("vggsound.csv", ""),
        ("train_and_test.json", ""),
    ],
)  # fmt: skip
def test_a_file_name_speaks_of_one_split_or_of_none(name, split):
    assert split_from_name(Path("test/train") / name) == split


def test_text_is_one_line_without_anything_that_acts():
    assert text_of(" How\tmany\n  sounds？ ", "x") == "How many sounds?"
    assert text_of("Füße 音楽 🎸 \u200d", "x") == "Füße 音楽 🎸 \u200d"
    assert (text_of(3, "x"), text_of(0.5, "x")) == ("3", "0.5")
    for bad in ("a\x00b", "a\x1b[2J", "a\x7f", "lone \udc80", "x" * 5000, None, True, float("nan"), [], {}):
        with pytest.raises(InvalidRow) as raised:
            text_of(bad, "x")
        assert raised.value.detail.isprintable()


def test_lists_come_as_json_as_text_or_not_at_all():
    assert choices_of('["a", null, " "]') == choices_of(["a", None, ""]) == ("a", None, None)
    assert choices_of("a | b|") == ("a", "b", None)
    assert choices_of(None) == choices_of("") == ()
    for bad in ({"a": 1}, '["a"', "[" * 100_000, [[1]], 7):
        with pytest.raises(InvalidRow):
            choices_of(bad)


def test_ids_are_the_same_text_however_they_are_written():
    assert optional_id(12) == optional_id(12.0) == optional_id(" 12 ") == "12"
    assert optional_id(None) == optional_id("") == optional_id(float("nan")) == ""


@pytest.mark.parametrize(
    "foreign", ["\x1b]0;title\x07", "\u202egpj.exe", "a\nb\rc", "\udcff", "x" * 10_000, ["\x00"]]
)
def test_foreign_text_in_messages_is_short_and_printable(foreign):
    shown = excerpt(foreign)
    assert shown.isprintable()
    assert len(shown) <= 6 * 81
    json.dumps(shown).encode("ascii")
