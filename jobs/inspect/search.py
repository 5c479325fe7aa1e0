"""`store search`: clips by a text, through the encoder's text tower, or clips like one that is there.

A text is compared with the picture keys and with the sound keys, and each is ranked by itself. They are not
merged: how near an encoder puts texts to pictures, and how near to sounds, differs for reasons that have
nothing to do with the text, so a score of one says nothing beside a score of the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.text import Text

from r2scp.jobs.ingest.encoders import encoder_of, pick_device
from r2scp.jobs.inspect.condition import both, count_where
from r2scp.jobs.inspect.show import literal_id, near_names
from r2scp.jobs.inspect.tables import listing
from r2scp.model.imagebind.tokenizer import CONTEXT, Tokenizer
from r2scp.pipelines.extraction.embed import Encoder
from r2scp.store.commits import sql_in
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality
from r2scp.store.search.bank import KEY_COLUMNS
from r2scp.store.search.vector_search import Hit, ServingIndex
from r2scp.store.token_cache import views

BOTH = "both"
ORDER = (Modality.VISUAL, Modality.AUDIO)  # as they are shown
HEADINGS = {"visual": "by what is to be seen", "audio": "by what is to be heard"}
START_AND_END = 2  # tokens of a text that says nothing
TOLD = ("clip_id", "corpus", "split", "labels", "uri", "duration_s", "content_sha256")


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What to look for: a text, or clips like one. `most` of each modality; `where`: a condition on clips.

    Raises `UsageError` for what cannot be.
    """

    text: str | None = None
    like: str | None = None  # a clip's id
    modality: str = BOTH  # visual, audio or both
    most: int = 10
    where: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.like is None):
            raise UsageError('give a text, such as "a dog barking", or --like CLIP, and not both')
        if self.modality not in (BOTH, *Modality):
            raise UsageError(f"--in must be one of {', '.join((*ORDER, BOTH))}; got {self.modality!r}")
        if self.most < 1:
            raise UsageError(f"-n must be at least 1; got {self.most}")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return ORDER if self.modality == BOTH else (Modality(self.modality),)


def run_search(store: FeatureStore, query: Query, encoder: Encoder | None = None) -> dict[str, Any]:
    """What is nearest to a query, as plain values: `found` has a list for each modality, the best first.

    Each has its `score`, the cosine of the query and the clip's key, and `second`, the second of the clip
    that is most like the query. `encoder`: the one that filled the store, found by itself where none is
    given. Raises `UsageError` for a condition or text that is none, `StoreError` where there is no such clip,
    `FingerprintMismatch` where the encoder is none of ours.
    """
    matching = None if query.where is None else count_where(store, query.where)
    notes = ["no clip meets the condition"] if matching == 0 else []
    if query.text is not None:
        check_text(query.text, notes)
        encoder = encoder or encoder_of(store, None, None, pick_device(None)).load()
        keys = dict.fromkeys(query.modalities, text_key(encoder, query.text))
    else:
        keys = _keys_of(store, query, notes)
    index = ServingIndex(store, in_memory_bytes=0)  # for one search it is not worth reading all keys
    found: dict[str, list[dict[str, Any]]] = {modality.value: [] for modality in query.modalities}
    for modality, key_D in keys.items():
        hits = _nearest(index, query, modality, key_D)
        found[modality.value] = _described(store, index.version, (modality, key_D), hits)
    return {
        "store": store.uri,
        "encoder": store.fingerprint,
        "clips_version": index.version,
        "query": asdict(query),
        "matching": matching,
        "found": found,
        "notes": notes,
    }


def check_text(text: str, notes: list[str]) -> None:
    """Note where the text tower does not see all of a text. Raises `UsageError` where it sees nothing."""
    length = int(Tokenizer().tokens([text]).lengths_N[0])
    if length <= START_AND_END:
        raise UsageError(f'there is nothing to look for in {text!a}; give a text, such as "a dog barking"')
    if length >= CONTEXT:
        notes.append(f"the text is long: no more than its first {CONTEXT - START_AND_END} tokens count")


def text_key(encoder: Encoder, text: str) -> np.ndarray:
    """float32 (D,), of unit length: what the text tower reads off the end of the whole text."""
    return encoder.questions([text])[1][0]


def show(found: Mapping[str, Any]) -> None:
    """A table for each modality, on stdout."""
    parts: list[RenderableType] = []
    for modality, rows in found["found"].items():
        cells = [
            (
                at,
                row["clip_id"],
                row["score"],
                clock(row["second"]),
                row["split"],
                ", ".join(row["labels"] or ()),
            )
            for at, row in enumerate(rows, 1)
        ]
        columns = ("", "clip", "score", "at", "split", "labels")
        parts += [listing(HEADINGS[modality], columns, cells, wide=1), Text()]
    parts += [Text(f"note: {note}", style="yellow") for note in found["notes"]]
    Console(markup=False, highlight=False, emoji=False).print(Group(*parts))


def clock(second: int) -> str:
    """A second of a clip as minutes and seconds."""
    return f"{second // 60}:{second % 60:02d}"


def _keys_of(store: FeatureStore, query: Query, notes: list[str]) -> dict[Modality, np.ndarray]:
    """The clip's own keys, of those modalities that it has."""
    assert query.like is not None
    columns = [KEY_COLUMNS[modality] for modality in query.modalities]
    rows = store.clips(columns, where=f"clip_id = {literal_id(query.like)}").to_pylist()
    if not rows:
        near = ", ".join(near_names(store, query.like))
        raise StoreError(
            f"there is no clip {query.like!a} in {store.uri}" + (f"; near it: {near}" if near else "")
        )
    keys = {}
    for modality, column in zip(query.modalities, columns, strict=True):
        if rows[0][column] is None:
            notes.append(f"the clip has no {modality.value} key")
        else:
            keys[modality] = np.array(rows[0][column], dtype=np.float32)
    return keys


def _nearest(index: ServingIndex, query: Query, modality: Modality, key_D: np.ndarray) -> list[Hit]:
    """Without the clip itself, where clips like one are looked for."""
    itself = 0 if query.like is None else 1
    hits = index.nearest(key_D, modality, query.most + itself, both(query.where))
    return [hit for hit in hits if hit.clip_id != query.like][: query.most]


def _described(
    store: FeatureStore, version: int, asked: tuple[Modality, np.ndarray], hits: Sequence[Hit]
) -> list[dict[str, Any]]:
    """What a person needs to know of each hit, in their order; of the very version that was searched."""
    modality, key_D = asked
    if not hits:
        return []

    columns = [*TOLD, f"{modality}_status", modality.value]
    table = store.clips(columns, sql_in("clip_id", (hit.clip_id for hit in hits)), version)
    tokens = [tokens_TD for chunk in table[modality.value].chunks for tokens_TD in views(chunk, store.dim)]
    rows = {}
    for row, tokens_TD in zip(table.drop_columns([modality.value]).to_pylist(), tokens, strict=True):
        second = int((tokens_TD.astype(np.float32) @ key_D).argmax()) if len(tokens_TD) else 0
        rows[row["clip_id"]] = row | {"status": row.pop(f"{modality}_status"), "second": second}
    return [rows[hit.clip_id] | {"score": hit.score} for hit in hits]
