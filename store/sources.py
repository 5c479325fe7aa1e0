"""Where a clip comes from, and a split by it: no source is in two splits.

Corpora are split by their authors, MUSIC-AVQA by question, so that a video may be asked about in training and
in the test. Under this split what a model sees in training and what serves as its memory is of other videos
than it is tested on.
"""

import hashlib

SHARES = {"train": 70, "val": 10, "test": 20}  # in hundredths


def disjoint_split(source: str) -> str:
    """train, val or test: the same for all clips of one source, on every machine."""
    draw = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        if draw < share:
            return split
        draw -= share
    raise AssertionError("the shares make up the whole")


def source_of(clip_id: str, source_id: str | None) -> str:
    """What the leak guard compares: the clip's source or, where none is known, the clip itself."""
    return source_id or f"clip:{clip_id}"
