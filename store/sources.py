"""The source of a clip, and a split by source: no source is in two splits.

Corpora come with splits of their own. MUSIC-AVQA's is by question, so that one video may be asked about in
training and in the test. Under the disjoint split, training and the memory bank use other videos than the
test.
"""

import hashlib

SHARES = {"train": 70, "val": 10, "test": 20}  # per cent


def source_of(clip_id: str, source_id: str | None) -> str:
    """What the leak guard compares: the clip's source or, if it is not known, the clip itself."""
    return source_id or f"clip:{clip_id}"


def disjoint_split(source: str) -> str:
    """train, val or test: the same for all clips of one source, on every machine."""
    draw = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        if draw < share:
            return split
        draw -= share
    raise AssertionError("the shares add up to 100")
