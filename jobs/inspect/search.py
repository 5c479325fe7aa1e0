"""`store search`: clips by a text, through the encoder's text tower, or clips similar to a stored one.

A text is compared with the visual keys and with the audio keys, and each modality is ranked by itself. The
lists are not merged: how close an encoder places texts to pictures, and how close to sounds, differs for
reasons unrelated to the text, so that scores of the two are not comparable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.text import Text

from r2scp.jobs.ingest.encoders import encoder_of, pick_device
from r2scp.jobs.inspect.condition import all_of, count_where
from r2scp.jobs.inspect.show import clip_id_literal, did_you_mean
from r2scp.jobs.inspect.tables import listing
from r2scp.model.imagebind.tokenizer import CONTEXT, Tokenizer
from r2scp.pipelines.extraction.embed import Encoder
from r2scp.store.commits import sql_in
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality
from r2scp.store.search.bank import KEY_COLUMNS
from r2scp.store.search.vector_search import Hit, ServingIndex
from r2scp.store.token_cache import token_views

BOTH = "both"
ORDER = (Modality.VISUAL, Modality.AUDIO)  # of the lists
HEADINGS = {"visual": "Visual matches", "audio": "Audio matches"}
START_AND_END = 2  # tokens of an empty text
COLUMNS = ("clip_id", "corpus", "split", "labels", "uri", "duration_s", "content_sha256")


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A text, or a clip whose like to find. `most`: hits per modality; `where`: a condition on clips.

    Raises `UsageError` for invalid values.
    """

    text: str | None = None
    like: str | None = None  # a clip's id
    modality: str = BOTH  # visual, audio or both
    most: int = 10
    where: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.like is None):
            raise UsageError('give either a text, such as "a dog barking", or --like CLIP')
        if self.modality not in (BOTH, *Modality):
            raise UsageError(f"--in must be one of {', '.join((*ORDER, BOTH))}; got {self.modality!r}")
        if self.most < 1:
            raise UsageError(f"-n must be at least 1; got {self.most}")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return ORDER if self.modality == BOTH else (Modality(self.modality),)


def run_search(store: FeatureStore, query: Query, encoder: Encoder | None = None) -> dict[str, Any]:
    """The clips nearest to a query, as plain values: `found` has a list per modality, best first.

    Each hit has a `score`, the cosine of the query and the clip's key, and the `second` of the clip that is
    most similar to the query. `encoder` is by default the one that filled the store. Raises `UsageError` for
    an invalid condition or text, `StoreError` if there is no such clip, `FingerprintMismatch` if the store's
    encoder is unknown.
    """
    matching = None if query.where is None else count_where(store, query.where)
    notes = ["no clip meets the condition"] if matching == 0 else []
    if query.text is not None:
        check_text(query.text, notes)
        encoder = encoder or encoder_of(store, None, None, pick_device(None)).load()
        keys = dict.fromkeys(query.modalities, text_key(encoder, query.text))
    else:
        keys = _keys_of(store, query, notes)
    index = ServingIndex(store, in_memory_bytes=0)  # one search is not worth reading all keys
    hits_of: dict[str, list[dict[str, Any]]] = {modality.value: [] for modality in query.modalities}
    for modality, key_D in keys.items():
        hits = _nearest(index, query, modality, key_D)
        hits_of[modality.value] = _hit_rows(store, index.version, modality, key_D, hits)
    return {
        "store": store.uri,
        "encoder": store.fingerprint,
        "clips_version": index.version,
        "query": asdict(query),
        "matching": matching,
        "found": hits_of,
        "notes": notes,
    }


def check_text(text: str, notes: list[str]) -> None:
    """Add a note if the text tower does not see all of a text. Raises `UsageError` if it sees nothing."""
    length = int(Tokenizer().tokens([text]).lengths_N[0])
    if length <= START_AND_END:
        raise UsageError(f'the text {text!a} is empty; give one such as "a dog barking"')
    if length >= CONTEXT:
        notes.append(f"the text is too long: only its first {CONTEXT - START_AND_END} tokens count")


def text_key(encoder: Encoder, text: str) -> np.ndarray:
    """(D,) float32, unit norm: the text tower's embedding of the whole text."""
    return encoder.questions([text])[1][0]


def show(result: Mapping[str, Any]) -> None:
    """Print the result of `run_search`, a table per modality."""
    parts: list[RenderableType] = []
    for modality, hits in result["found"].items():
        rows = []
        for rank, hit in enumerate(hits, 1):
            time = f"{hit['second'] // 60}:{hit['second'] % 60:02d}"
            labels = ", ".join(hit["labels"] or ())
            rows.append((rank, hit["clip_id"], hit["score"], time, hit["split"], labels))
        columns = ("", "clip", "score", "at", "split", "labels")
        parts += [listing(HEADINGS[modality], columns, rows, wide=1), Text()]
    parts += [Text(f"note: {note}", style="yellow") for note in result["notes"]]
    Console(markup=False, highlight=False, emoji=False).print(Group(*parts))


def _keys_of(store: FeatureStore, query: Query, notes: list[str]) -> dict[Modality, np.ndarray]:
    """The clip's own keys, of the modalities that it has."""
    assert query.like is not None
    columns = [KEY_COLUMNS[modality] for modality in query.modalities]
    rows = store.clips(columns, where=f"clip_id = {clip_id_literal(query.like)}").to_pylist()
    if not rows:
        raise StoreError(f"there is no clip {query.like!a} in {store.uri}{did_you_mean(store, query.like)}")
    keys = {}
    for modality, column in zip(query.modalities, columns, strict=True):
        if rows[0][column] is None:
            notes.append(f"the clip has no {modality.value} key")
        else:
            keys[modality] = np.array(rows[0][column], dtype=np.float32)
    return keys


def _nearest(index: ServingIndex, query: Query, modality: Modality, key_D: np.ndarray) -> list[Hit]:
    """The hits for one modality, without the clip of `like` itself."""
    itself = 0 if query.like is None else 1
    hits = index.nearest(key_D, modality, query.most + itself, all_of(query.where))
    return [hit for hit in hits if hit.clip_id != query.like][: query.most]


def _hit_rows(
    store: FeatureStore, version: int, modality: Modality, key_D: np.ndarray, hits: Sequence[Hit]
) -> list[dict[str, Any]]:
    """The hits' rows in the version that was searched, with score and best matching second."""
    if not hits:
        return []
    columns = [*COLUMNS, f"{modality}_status", modality.value]
    table = store.clips(columns, sql_in("clip_id", (hit.clip_id for hit in hits)), version)
    tokens = [view for chunk in table[modality.value].chunks for view in token_views(chunk, store.dim)]
    rows = {}
    for row, tokens_TD in zip(table.drop_columns([modality.value]).to_pylist(), tokens, strict=True):
        second = int((tokens_TD.astype(np.float32) @ key_D).argmax()) if len(tokens_TD) else 0
        rows[row["clip_id"]] = row | {"status": row.pop(f"{modality}_status"), "second": second}
    return [rows[hit.clip_id] | {"score": hit.score} for hit in hits]
