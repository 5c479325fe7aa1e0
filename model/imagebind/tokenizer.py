"""Input of the text tower: token ids of CLIP's byte-pair encoding (Radford et al. 2021).

Texts are untrusted: the names of special tokens, written inside a text, are ordinary text.
"""

import gzip
import html
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import Regex, models, pre_tokenizers
from torch import Tensor

CONTEXT = 77  # tokens, start and end included
MERGES = 48_894  # CLIP uses the first lines of the list
START = 2 * 256 + MERGES  # 49406: after each byte, each byte at a word's end, and each merge
END = START + 1  # 49407, the highest id
PADDING = 0  # also the id of "!": padding is known by the length, not by the id
VOCABULARY = END + 1
WORD_END = "</w>"
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

CONTROLS = re.compile("\x1b\\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
SPACES = re.compile(r"\s+")


class TokenIds(NamedTuple):
    """Ids int64 (N, 77), zero after the end token, and the number of real ones, int64 (N)."""

    ids_NW: Tensor
    lengths_N: Tensor


class Tokenizer:
    """CLIP's tokenizer. Takes 0.2 s to build: reuse it."""

    def __init__(self) -> None:
        self._bpe = _byte_pair_encoding()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Ids int64 (N, 77): start, text, end, zeros. A longer text is truncated before the end token."""
        return self.tokens(texts).ids_NW

    def tokens(self, texts: Sequence[str]) -> TokenIds:
        """Ids as of `encode`, and the number of real ones per row (2 to 77)."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings; got one string")
        encoded = self._bpe.encode_batch([clean(text) for text in texts], add_special_tokens=False)
        ids_NW = torch.full((len(encoded), CONTEXT), PADDING, dtype=torch.int64)
        lengths_N = torch.zeros(len(encoded), dtype=torch.int64)
        for row, encoding in enumerate(encoded):
            ids = [START, *encoding.ids, END]
            ids_NW[row, : len(ids)] = torch.tensor(ids)
            lengths_N[row] = len(ids)
        return TokenIds(ids_NW, lengths_N)


def clean(text: str) -> str:
    """The text as in CLIP's training: plain typography, HTML entities resolved, single blanks, lower case.

    Typography: straight quotes, full-width and half-width forms and Latin ligatures as plain letters, stray
    Windows-1252 bytes as the characters they stand for, no control characters, composed accents (NFC). Text
    that was decoded with a wrong encoding altogether ("cafÃ©") is left unchanged.
    """
    if "<" not in text:  # an entity beside a tag is intended markup
        text = html.unescape(text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = CONTROLS.sub("", text.translate(_typography()))
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return SPACES.sub(" ", text).strip().lower()


def _byte_pair_encoding() -> tokenizers.Tokenizer:
    file = resources.files("r2scp.model.imagebind") / "data" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n", MERGES + 1)
    lines = lines[1 : MERGES + 1]  # the first is a comment
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a letter per byte, in CLIP's order
    final = [letter + WORD_END for letter in alphabet]
    words = [*alphabet, *final, *(left + right for left, right in merges)]
    vocabulary = {word: position for position, word in enumerate(words)}
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.enable_truncation(CONTEXT - 2)  # leaves space for start and end
    return bpe


@lru_cache(maxsize=1)
def _typography() -> dict[int, str]:
    """For `str.translate`: characters that `clean` replaces."""
    ligatures = [0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
    widths = [0x3000, *range(0xFF01, 0xFFF0)]
    plain = {code: unicodedata.normalize("NFKC", chr(code)) for code in (*ligatures, *widths)}
    plain |= {0x149: "'n", 0xFB05: "\u017ft"}  # where the reference differs from NFKC
    stray = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}
    single, double = range(0x2018, 0x201C), range(0x201C, 0x2020)
    quotes = {0x2BC: "'", **dict.fromkeys(single, "'"), **dict.fromkeys(double, '"')}
    # A stray Windows-1252 byte may itself mean a curly quote.
    return plain | {code: letter.translate(quotes) for code, letter in stray.items() if letter} | quotes
