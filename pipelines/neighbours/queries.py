"""The clips of a store as queries: those that have the modality one searches with.

Legend: Q queries, D their width.
"""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from r2scp.store.commits import sql_in
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import KEY_COLUMNS, OTHER, MemoryBank, Queries, unit_keys
from r2scp.store.sources import source_of

QUERY_CHUNK = 16_384  # queries searched together: 67 MB at D = 1024
FEW = 2_000  # clips that are asked for by name; of more, all keys are read


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Some clips that have a key to search with."""

    clip_ids: list[str]
    sources: list[str]
    keys_QD: np.ndarray

    def queries(self) -> Queries:
        return Queries(keys_QD=self.keys_QD, sources=self.sources)

    def fingerprint(self, at: int) -> str:
        """Of all that decides what one clip finds in a given bank."""
        digest = hashlib.blake2b(self.sources[at].encode(), digest_size=8)
        digest.update(b"\0" + self.keys_QD[at].tobytes())
        return digest.hexdigest()

    def only(self, clip_ids: set[str]) -> "Chunk":
        at = [i for i, clip_id in enumerate(self.clip_ids) if clip_id in clip_ids]
        return Chunk(
            clip_ids=[self.clip_ids[i] for i in at],
            sources=[self.sources[i] for i in at],
            keys_QD=self.keys_QD[at],
        )


def query_clips(bank: MemoryBank, missing: Modality) -> pa.Table:
    """clip_id, source_id, corpus of all clips that have the modality that is not `missing`."""
    where = f"{KEY_COLUMNS[OTHER[missing]]} IS NOT NULL"
    return bank.store.clips(["clip_id", "source_id", "corpus"], where, bank.version)


def query_chunks(bank: MemoryBank, missing: Modality, pending: set[str]) -> Iterator[Chunk]:
    """The queries of `pending`."""
    if not pending:
        return
    for chunk in _read(bank, missing, pending):
        due = chunk.only(pending)
        if due.clip_ids:
            yield due


def _read(bank: MemoryBank, missing: Modality, pending: Collection[str]) -> Iterator[Chunk]:
    """Queries for the `missing` modality at the bank's version, about `QUERY_CHUNK` at a time; of few that
    are pending, theirs alone."""
    column = KEY_COLUMNS[OTHER[missing]]
    where = f"{column} IS NOT NULL"
    if len(pending) <= FEW:
        where = f"{where} AND {sql_in('clip_id', sorted(pending))}"
    dataset = bank.store.dataset(Table.CLIPS, bank.version)
    batches = dataset.to_batches(
        columns=["clip_id", "source_id", column], filter=where, batch_size=QUERY_CHUNK
    )
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(b.num_rows for b in waiting) >= QUERY_CHUNK:
            yield _chunk(pa.Table.from_batches(waiting), column, bank.store.dim)
            waiting = []
    if waiting:
        yield _chunk(pa.Table.from_batches(waiting), column, bank.store.dim)


def _chunk(table: pa.Table, column: str, dim: int) -> Chunk:
    clip_ids = table["clip_id"].to_pylist()
    sources = [source_of(*pair) for pair in zip(clip_ids, table["source_id"].to_pylist(), strict=True)]
    return Chunk(clip_ids=clip_ids, sources=sources, keys_QD=unit_keys(table, column, dim)[0])
