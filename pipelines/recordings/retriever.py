"""Retrieves clips from the memory bank whose missing modality replaces that of a recording.

The recording is a file from outside the store. The search is the one that `index` makes for the store's own
clips: exact, within the bank's splits and corpora, and without hits of the recording's own source or of the
same file under another name.

Legend: Q recordings, T one-second tokens of a clip, D their width.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from r2scp.pipelines.extraction.embed import key_of
from r2scp.store.commits import sql_in
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval
from r2scp.store.search.bank import BankScope, MemoryBank, Queries, Search
from r2scp.store.sources import source_of
from r2scp.store.token_cache import token_views

METADATA_COLUMNS = ("uri", "split", "source_id", "content_sha256")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RetrievalQuery:
    """A recording with one modality missing. `key_D`: key of the available one, float32 and unit norm.

    `source_id`: excluded by the leak guard, with the sources of all stored clips of the same content.
    """

    key_D: np.ndarray
    content_sha256: str
    source_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RetrievedClip:
    """One clip, with the tokens of the modality that the recording lacks.

    `second`: whose token is most similar to the recording's key, in the modality that the search compared.
    `similarity`: cosine of the clip's and the recording's keys of the available modality, whichever modality
    the search compared; NaN where the clip has none.
    """

    clip_id: str
    score: float
    second: int
    similarity: float
    tokens_TD: np.ndarray  # float16
    metadata: dict[str, object]  # column -> value
    labels: list[str]


class Retriever:
    """Searches one bank, opened once at the version that `store` reads."""

    def __init__(self, store: FeatureStore, scope: BankScope) -> None:
        self.store = store
        self.bank = MemoryBank.open(store, scope)

    def retrieve(self, queries: Sequence[RetrievalQuery], search: Search) -> list[list[RetrievedClip]]:
        """The nearest clips for each query, best first; fewer than `search.n` where the bank has no more."""
        excluded = self._excluded_sources(queries)
        # The bank's search excludes one source per query; hits of the others are dropped here: ask for more.
        extra = self._count_clips({source for sources in excluded for source in sources[1:]})
        keys_QD = np.stack([query.key_D for query in queries])
        bank_queries = Queries(keys_QD=keys_QD, sources=[next(iter(sources), "") for sources in excluded])
        nearest = self.bank.search(bank_queries, replace(search, n=search.n + extra)).nearest
        ids = [nearest.ids(index) for index in range(len(queries))]
        rows = self._read({clip_id for clip_ids in ids for clip_id in clip_ids})
        return [
            [
                self._retrieved_clip(rows[clip_id], query.key_D, float(score), search)
                for clip_id, score in zip(ids[index], nearest.scores(index), strict=True)
                if source_of(clip_id, rows[clip_id]["source_id"]) not in excluded[index]
            ][: search.n]
            for index, query in enumerate(queries)
        ]

    def _excluded_sources(self, queries: Sequence[RetrievalQuery]) -> list[list[str]]:
        """For each query its own source and those of all stored clips of the same content."""
        by_content = self._sources_by_content({query.content_sha256 for query in queries})
        return [
            list(dict.fromkeys(filter(None, (query.source_id, *by_content.get(query.content_sha256, ())))))
            for query in queries
        ]

    def _count_clips(self, sources: Collection[str]) -> int:
        """Upper bound of the clips of these sources; a clip that names none is a source of its own."""
        if not sources:
            return 0
        where = sql_in("source_id", sorted(sources))
        return self.store.clips(["clip_id"], where, self.bank.version).num_rows + len(sources)

    def _sources_by_content(self, contents: Collection[str]) -> dict[str, list[str]]:
        """Content hash -> sources of the stored clips that have it."""
        where = sql_in("content_sha256", sorted(contents))
        columns = ["clip_id", "source_id", "content_sha256"]
        by_content: dict[str, list[str]] = {}
        for row in self.store.clips(columns, where, self.bank.version).to_pylist():
            source = source_of(row["clip_id"], row["source_id"])
            by_content.setdefault(row["content_sha256"], []).append(source)
        return by_content

    def _retrieved_clip(
        self, row: dict[str, Any], key_D: np.ndarray, score: float, search: Search
    ) -> RetrievedClip:
        tokens: dict[Modality, np.ndarray] = {modality: row[modality] for modality in Modality}
        missing_TD, available_TD = tokens[search.missing], tokens[search.missing.other]
        cross_weight = {Retrieval.CROSS: 1.0, Retrieval.PAIRED: 0.0, Retrieval.HYBRID: search.cross_weight}[
            search.retrieval
        ]
        scores_T = [
            weight * (tokens_TD.astype(np.float32) @ key_D)
            for weight, tokens_TD in ((cross_weight, missing_TD), (1 - cross_weight, available_TD))
            if weight
        ]
        seconds = min(map(len, scores_T))
        return RetrievedClip(
            clip_id=str(row["clip_id"]),
            score=score,
            similarity=float(key_of(available_TD) @ key_D) if len(available_TD) else math.nan,
            second=int(np.sum([part_T[:seconds] for part_T in scores_T], axis=0).argmax()),
            tokens_TD=missing_TD,
            metadata={name: row[name] for name in METADATA_COLUMNS},
            labels=row["labels"] or [],
        )

    def _read(self, clip_ids: set[str]) -> dict[str, dict[str, Any]]:
        """Metadata and tokens of some clips, by id."""
        if not clip_ids:
            return {}
        where = sql_in("clip_id", sorted(clip_ids))
        table = self.store.clips(
            ["clip_id", "labels", *METADATA_COLUMNS, *Modality], where, self.bank.version
        )
        rows = table.select(["clip_id", "labels", *METADATA_COLUMNS]).to_pylist()
        for modality in Modality:
            for row, tokens_TD in zip(rows, self._tokens(table, modality), strict=True):
                row[modality] = tokens_TD
        return {row["clip_id"]: row for row in rows}

    def _tokens(self, table: pa.Table, modality: Modality) -> list[np.ndarray]:
        return [view for chunk in table[modality].chunks for view in token_views(chunk, self.store.dim)]
