"""The clips of a store as queries: those that have the modality one searches with.

Legend: Q queries, D their width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from r2scp.store.commits import sql_in
from r2scp.store.feature_store import read_blocks
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import KEY_COLUMNS, MemoryBank, Queries, sources_of, unit_keys

QUERY_CHUNK = 16_384  # queries searched together: 67 MB at D = 1024
MAX_IDS_IN_FILTER = 2_000  # clips that are read by id; for more, all keys are read


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryChunk:
    """Some clips with the keys that they are searched by."""

    clip_ids: list[str]
    sources: list[str]
    keys_QD: np.ndarray

    def queries(self) -> Queries:
        return Queries(keys_QD=self.keys_QD, sources=self.sources)

    def fingerprint(self, row: int) -> str:
        """Of everything that decides one clip's hits in a given bank."""
        digest = hashlib.blake2b(self.sources[row].encode(), digest_size=8)
        digest.update(b"\0" + self.keys_QD[row].tobytes())
        return digest.hexdigest()

    def select(self, clip_ids: set[str]) -> "QueryChunk":
        rows = [row for row, clip_id in enumerate(self.clip_ids) if clip_id in clip_ids]
        return QueryChunk(
            clip_ids=[self.clip_ids[row] for row in rows],
            sources=[self.sources[row] for row in rows],
            keys_QD=self.keys_QD[rows],
        )


def query_clips(bank: MemoryBank, missing: Modality) -> pa.Table:
    """clip_id, source_id, corpus of all clips that have the other modality than `missing`."""
    where = f"{KEY_COLUMNS[missing.other]} IS NOT NULL"
    return bank.store.clips(["clip_id", "source_id", "corpus"], where, bank.version)


def query_chunks(bank: MemoryBank, missing: Modality, clip_ids: set[str]) -> Iterator[QueryChunk]:
    """The clips of `clip_ids` as queries for the `missing` modality, about `QUERY_CHUNK` at a time."""
    if not clip_ids:
        return
    column = KEY_COLUMNS[missing.other]
    where = f"{column} IS NOT NULL"
    if len(clip_ids) <= MAX_IDS_IN_FILTER:
        where = f"{where} AND {sql_in('clip_id', sorted(clip_ids))}"
    dataset = bank.store.dataset(Table.CLIPS, bank.version)
    batches = dataset.to_batches(
        columns=["clip_id", "source_id", column], filter=where, batch_size=QUERY_CHUNK
    )
    for block in read_blocks(batches, QUERY_CHUNK):
        chunk = _chunk(block, column, bank.store.dim).select(clip_ids)
        if chunk.clip_ids:
            yield chunk


def _chunk(table: pa.Table, column: str, dim: int) -> QueryChunk:
    keys_QD = unit_keys(table, column, dim)[0]
    return QueryChunk(clip_ids=table["clip_id"].to_pylist(), sources=sources_of(table), keys_QD=keys_QD)
