"""Clips of the memory bank that stand in for what a recording from outside the store lacks.

The search is the one that `index` makes for the store's own clips: exact, of the bank's splits and corpora
alone, and never a hit of the recording's own source, or the same file under another name.

Legend: Q recordings, T one-second tokens of a clip, D their width.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from r2scp.pipelines.extraction.embed import key_of
from r2scp.store.commits import sql_literal
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval
from r2scp.store.search.bank import OTHER, BankScope, MemoryBank, Queries, Search
from r2scp.store.sources import source_of
from r2scp.store.token_cache import views

METADATA_COLUMNS = ("uri", "split", "source_id", "content_sha256")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RetrievalQuery:
    """A recording that lacks a modality. `key_D`: of the other one, float32 and unit norm.

    `source_id`: what the leak guard compares, beside the sources of the same file in the store.
    """

    key_D: np.ndarray
    content_sha256: str
    source_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RetrievedClip:
    """One clip whose missing modality stands in.

    `second`: the one whose token is most like the recording's key, of the modality that the search compared.
    `alike`: cosine of the clip's and the recording's keys of the modality that is there, NaN where the clip
    lacks it; whatever the search compared.
    """

    clip_id: str
    score: float
    second: int
    similarity: float
    tokens_TD: np.ndarray  # float16
    metadata: dict[str, object]  # FACTS
    labels: list[str]


class Retriever:
    """A bank, opened once at the version that `store` reads."""

    def __init__(self, store: FeatureStore, scope: BankScope) -> None:
        self.store = store
        self.bank = MemoryBank.open(store, scope)

    def retrieve(self, queries: Sequence[RetrievalQuery], search: Search) -> list[list[RetrievedClip]]:
        """The nearest clips for each recording, best first; fewer than `how.n` where the bank has no more."""
        barred = self._excluded_sources(queries)
        # the search keeps one source away; clips of the others, and no more than these, are left out after it
        spare = self._count_clips({source for each in barred for source in each[1:]})
        keys_QD = np.stack([one.key_D for one in queries])
        queries = Queries(keys_QD=keys_QD, sources=[next(iter(each), "") for each in barred])
        nearest = self.bank.search(queries, replace(search, n=search.n + spare)).nearest
        ids = [nearest.ids(query) for query in range(len(queries))]
        rows = self._read({clip_id for found in ids for clip_id in found})
        return [
            [
                self._retrieved_clip(rows[clip_id], one.key_D, float(score), search)
                for clip_id, score in zip(found, nearest.scores(query), strict=True)
                if source_of(clip_id, rows[clip_id]["source_id"]) not in barred[query]
            ][: search.n]
            for query, (found, one) in enumerate(zip(ids, queries, strict=True))
        ]

    def _excluded_sources(self, lacking: Sequence[RetrievalQuery]) -> list[list[str]]:
        """The sources of each recording: its own, and those of all clips that the store holds its file as."""
        held = self._sources_by_content({one.content_sha256 for one in lacking})
        return [
            list(dict.fromkeys(filter(None, (one.source_id, *held.get(one.content_sha256, ())))))
            for one in lacking
        ]

    def _count_clips(self, sources: Collection[str]) -> int:
        """At most so many clips are of these sources; a clip without any is a source of its own."""
        if not sources:
            return 0
        where = f"source_id IN ({', '.join(map(sql_literal, sorted(sources)))})"
        return self.store.clips(["clip_id"], where, self.bank.version).num_rows + len(sources)

    def _sources_by_content(self, contents: Collection[str]) -> dict[str, list[str]]:
        """Content -> the sources of the clips that the store holds it as."""
        where = f"content_sha256 IN ({', '.join(map(sql_literal, sorted(contents)))})"
        columns = ["clip_id", "source_id", "content_sha256"]
        held: dict[str, list[str]] = {}
        for row in self.store.clips(columns, where, self.bank.version).to_pylist():
            held.setdefault(row["content_sha256"], []).append(source_of(row["clip_id"], row["source_id"]))
        return held

    def _retrieved_clip(self, row: dict[str, Any], key_D: np.ndarray, score: float, how: Search) -> RetrievedClip:
        tokens: dict[Modality, np.ndarray] = {modality: row[modality] for modality in Modality}
        missing_TD, there_TD = tokens[how.missing], tokens[OTHER[how.missing]]
        weight = {Retrieval.CROSS: 1.0, Retrieval.PAIRED: 0.0, Retrieval.HYBRID: how.cross_weight}[
            how.retrieval
        ]
        like = [
            share * (part_TD.astype(np.float32) @ key_D)
            for share, part_TD in ((weight, missing_TD), (1 - weight, there_TD))
            if share
        ]
        seconds = min(map(len, like))
        return RetrievedClip(
            clip_id=str(row["clip_id"]),
            score=score,
            similarity=float(key_of(there_TD) @ key_D) if len(there_TD) else math.nan,
            second=int(np.sum([part[:seconds] for part in like], axis=0).argmax()),
            tokens_TD=missing_TD,
            metadata={name: row[name] for name in METADATA_COLUMNS},
            labels=row["labels"] or [],
        )

    def _read(self, clip_ids: set[str]) -> dict[str, dict[str, Any]]:
        """Facts and tokens of some clips."""
        if not clip_ids:
            return {}
        where = f"clip_id IN ({', '.join(map(sql_literal, sorted(clip_ids)))})"
        table = self.store.clips(["clip_id", "labels", *METADATA_COLUMNS, *Modality], where, self.bank.version)
        rows = table.select(["clip_id", "labels", *METADATA_COLUMNS]).to_pylist()
        for modality in Modality:
            for row, tokens_TD in zip(rows, self._tokens(table, modality), strict=True):
                row[modality] = tokens_TD
        return {row["clip_id"]: row for row in rows}

    def _tokens(self, table: pa.Table, modality: Modality) -> list[np.ndarray]:
        return [view for chunk in table[modality].chunks for view in views(chunk, self.store.dim)]
