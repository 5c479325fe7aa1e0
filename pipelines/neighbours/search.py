"""Makes the searches of a plan and writes rows of `neighbours`, and their validity in `indexes`.

All rows of one retrieval mode, and those they replace, go in one commit, so that a reader never sees two
banks mixed; the row of `indexes` follows. A crash between the two leaves rows newer than `indexes` records:
the next run searches those again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from r2scp.pipelines.neighbours.plan import ModePlan
from r2scp.pipelines.neighbours.queries import QueryChunk, query_chunks
from r2scp.pipelines.neighbours.settings import IndexSettings, ModeCounts
from r2scp.store.commits import sql_literal
from r2scp.store.lease import now
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import MemoryBank, PreviousHits, SearchResult, StoredHits


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteContext:
    """The run on whose behalf neighbours are written."""

    run_id: str
    before_commit: Callable[[], None]  # raises if the run may no longer write
    on_progress: Callable[[int], None]  # searches done of the current mode


def write_neighbours(
    bank: MemoryBank, settings: IndexSettings, plan: ModePlan, context: WriteContext
) -> ModeCounts:
    """Search, and commit the new rows in place of the outdated ones, in one new version."""
    store, counts, staged = bank.store, plan.counts, []
    for missing, chunk, known in _chunks_to_search(bank, plan):
        found = bank.search(chunk.queries(), settings.search(missing, plan.retrieval), known)
        searched = _Searched(missing=missing, found=found, run_id=context.run_id)
        rows = _rows(bank, settings, plan, chunk, searched)
        staged.append(store.stage(Table.NEIGHBOURS, rows))
        _count(counts, found, settings.n)
        counts.extended += len(chunk.clip_ids) if known else 0
        context.on_progress(counts.searched)
    context.before_commit()
    properties = {"run": context.run_id, "retrieval": plan.retrieval.value}
    store.commit(Table.NEIGHBOURS, staged, properties, also_delete=plan.to_delete)
    record_validity(bank, settings, plan, context.run_id)
    return counts


def _chunks_to_search(
    bank: MemoryBank, plan: ModePlan
) -> Iterator[tuple[Modality, QueryChunk, PreviousHits | None]]:
    """Chunks of queries: those to search in the whole bank, then those to extend, with their stored hits."""
    for missing, clip_ids in plan.to_search.items():
        for chunk in query_chunks(bank, missing, clip_ids):
            yield missing, chunk, None
    columns = ["clip_id", "nearest_ids", "nearest_scores", "farthest_ids", "farthest_scores"]
    for missing, clip_ids in plan.to_extend.items():
        if not clip_ids:
            continue
        where = f"index = {sql_literal(plan.index)} AND missing = {sql_literal(missing.value)}"
        table = bank.store.neighbours(columns, where)
        row_of = {clip_id: row for row, clip_id in enumerate(table["clip_id"].to_pylist())}
        for chunk in query_chunks(bank, missing, clip_ids):
            rows = table.take([row_of[clip_id] for clip_id in chunk.clip_ids])
            yield missing, chunk, _stored_hits(rows, plan.added)


def _stored_hits(rows: pa.Table, added: set[str]) -> PreviousHits:
    """The hits in rows of `neighbours`, one row per query."""
    sides = [
        [
            StoredHits(ids=ids, scores=scores)
            for ids, scores in zip(
                rows[f"{side}_ids"].to_pylist(), rows[f"{side}_scores"].to_pylist(), strict=True
            )
        ]
        for side in ("nearest", "farthest")
    ]
    return PreviousHits(nearest=sides[0], farthest=sides[1], added=added)


def record_validity(bank: MemoryBank, settings: IndexSettings, plan: ModePlan, run_id: str) -> None:
    """Write into `indexes` that the rows of a mode are right at the bank's version."""
    previous = plan.previous
    store, corpora = bank.store, settings.query_corpora
    store.record_index(
        {
            "index": plan.index,
            "retrieval": plan.retrieval.value,
            "settings": settings.settings_key(plan.retrieval),
            "query_corpora": list(previous.with_corpora(corpora) if previous else corpora),
            "bank_fingerprint": bank.fingerprint,
            "bank_version": bank.version,
            "run_id": run_id,
            "at": now(),
        }
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Searched:
    """The hits of one chunk of queries, and what they were searched for."""

    missing: Modality
    found: SearchResult
    run_id: str


def _rows(
    bank: MemoryBank, settings: IndexSettings, plan: ModePlan, chunk: QueryChunk, searched: _Searched
) -> pa.Table:
    """Rows of `neighbours`, one per query."""
    count = len(chunk.clip_ids)
    mode = {
        "missing": searched.missing.value,
        "retrieval": plan.retrieval.value,
        "leak_guard": settings.leak_guard,
        "settings": settings.settings_key(plan.retrieval),
        "index": plan.index,
        "bank_fingerprint": bank.fingerprint,
        "bank_version": bank.version,
        "run_id": searched.run_id,
        "at": now(),
    }
    columns: dict[str, object] = {name: [value] * count for name, value in mode.items()}
    columns["clip_id"] = chunk.clip_ids
    kind = f"{searched.missing.value}|{plan.retrieval.value}|{plan.index}"
    columns["neighbour_id"] = [f"{clip_id}|{kind}" for clip_id in chunk.clip_ids]
    columns["query_fingerprint"] = [chunk.fingerprint(at) for at in range(count)]
    for name, hits in (("nearest", searched.found.nearest), ("farthest", searched.found.farthest)):
        columns[f"{name}_ids"] = [hits.ids(at) for at in range(count)]
        columns[f"{name}_scores"] = [hits.scores(at) for at in range(count)]
        columns[f"{name}_own_source"] = hits.own_source_Q
    schema = bank.store.address(Table.NEIGHBOURS).schema
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema)


def _count(counts: ModeCounts, found: SearchResult, n: int) -> None:
    hits = (found.nearest.rows_QN >= 0).sum(axis=1)
    counts.searched += len(hits)
    counts.short += int((hits < n).sum())
    counts.empty += int((hits == 0).sum())
    counts.nearest_own_source += int(found.nearest.own_source_Q.sum())
    counts.farthest_own_source += int(found.farthest.own_source_Q.sum())
