"""Proves that `tokenizer` gives CLIP's ids, for ordinary, odd, overlong and hostile texts.

Oracles: the reference ids; ids of a sentence known from CLIP's own documentation; a naive byte-pair encoder
that applies the shipped merges one at a time, as the method's definition has it.
"""

import gzip
import itertools
import json
import random
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from r2scp.model.imagebind.tokenizer import CONTEXT, END, START, VOCABULARY, Tokenizer, clean


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def merges() -> list[tuple[str, str]]:
    packed = (resources.files("r2scp.model.imagebind") / "data" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    return [tuple(line.split()) for line in lines[1:48_895]]  # type: ignore[misc]


def naive_ids(text: str, merges: list[tuple[str, str]], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Byte-pair encoding of lower-case ASCII text by its definition."""
    ascii_ids = {chr(code): code - 33 for code in range(33, 127)}
    ids = []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            merged, at = [], 0
            while at < len(pieces):
                hit = tuple(pieces[at : at + 2]) == best
                merged.append("".join(best) if hit else pieces[at])
                at += 2 if hit else 1
            pieces = merged
        for piece in pieces:
            letter = piece.removesuffix("</w>")
            if letter in ascii_ids:
                ids.append(ascii_ids[letter] + (256 if piece != letter else 0))
            else:
                ids.append(512 + next(i for i, pair in enumerate(merges) if "".join(pair) == piece))
    return ids


@pytest.mark.parity
def test_equals_the_reference_ids(shared_dir: Path, tokenizer: Tokenizer) -> None:
    with safe_open(shared_dir / "parity" / "imagebind_io.safetensors", framework="pt") as file:
        texts, ids_NW = json.loads(file.metadata()["texts"]), file.get_tensor("text_ids")
    assert torch.equal(tokenizer.encode(texts), ids_NW)


def test_a_sentence_known_from_clip(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer.encode(["a photo of a cat"]).tolist()
    assert row == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70


def test_equals_a_naive_encoder(tokenizer: Tokenizer, merges: list[tuple[str, str]]) -> None:
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    rng = random.Random(3)
    letters = "eeeettaaooiinnsshhrrddllu'''  ..,!?0123456789#xqz"
    texts = ["".join(rng.choices(letters, k=rng.randint(1, 30))).strip() for _ in range(40)]
    texts += ["is the guzheng more rhythmic than the bassoon?", "they'll say it's what we'd've done"]
    for text, row in zip(texts, tokenizer.encode(texts).tolist(), strict=True):
        assert row[1 : row.index(END)] == naive_ids(text, merges, ranks), text


def test_shape_padding_and_lengths(tokenizer: Tokenizer) -> None:
    ids_NW, lengths_N = tokenizer.tokens(["", "!", "one two three", "word " * 200])
    assert ids_NW.shape == (4, CONTEXT)
    assert ids_NW.dtype == torch.int64
    assert lengths_N.tolist() == [2, 3, 5, 77]
    for row, length in zip(ids_NW.tolist(), lengths_N.tolist(), strict=True):
        assert row[0] == START
        assert row[length - 1] == END
        assert row.count(END) == 1
        assert not any(row[length:])
    assert VOCABULARY == 49_408
    assert tokenizer.encode([]).shape == (0, CONTEXT)


def test_a_long_text_is_cut_and_keeps_the_end_token(tokenizer: Tokenizer) -> None:
    words = [f"{number % 10}" for number in range(300)]
    short, long = tokenizer.encode([" ".join(words[:75]), " ".join(words)])
    assert torch.equal(short, long)


def test_names_of_special_tokens_are_ordinary_text(tokenizer: Tokenizer) -> None:
    ids_NW, lengths_N = tokenizer.tokens(["<|endoftext|> and <|startoftext|>", "&lt;|endoftext|&gt;"])
    for row, length in zip(ids_NW.tolist(), lengths_N.tolist(), strict=True):
        assert row.index(END) == length - 1
        assert START not in row[1:]


@pytest.mark.parametrize(
    ("odd", "plain"),
    [
        ("Is the ＜Object＞ louder？", "is the <object> louder?"),
        ("“It’s”\u00a0 LOUD", '"it\'s" loud'),
        ("&lt;b&gt; &amp;amp; co.", "<b> & co."),
        ("oﬃce ﬁrst", "office first"),
        ("cafe\u0301", "café"),
        ("tab\t, new\nline\r\n\x00\x07 ", "tab , new line"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("don\x92t", "don't"),
        ("\ud83d\ude00 and \ud800", "😀 and \ufffd"),
        ("ＡＢＣ\u3000ｶﾀ", "abc カタ"),
    ],
)
def test_typography_does_not_change_the_ids(tokenizer: Tokenizer, odd: str, plain: str) -> None:
    assert clean(odd) == plain
    assert torch.equal(*tokenizer.encode([odd, plain]))


def test_any_unicode_text_has_ids(tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    texts = ["".join(chr(rng.randrange(0x110000)) for _ in range(50)) for _ in range(200)]
    ids_NW, lengths_N = tokenizer.tokens(texts)
    assert (ids_NW.gather(1, lengths_N[:, None] - 1) == END).all()
    assert (lengths_N > 2).all()


def test_refuses_one_string(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="a list of strings"):
        tokenizer.encode("a dog")
