"""Searches what a plan says is due, and writes it: rows of `neighbours`, and what they are right for.

All rows of one retrieval mode, and those they replace, go in one commit, so that a reader never sees two
banks mixed; the row of `indexes` follows. A crash between the two leaves rows that are newer than `indexes`
says: the next run searches those again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from r2scp.pipelines.neighbours.plan import ModePlan
from r2scp.pipelines.neighbours.queries import Chunk, query_chunks
from r2scp.pipelines.neighbours.settings import Counts, IndexSettings
from r2scp.store.commits import sql_literal
from r2scp.store.lease import now
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import Found, Known, Listed, MemoryBank


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """What a run brings along: its id, what must hold before a commit, and who hears of progress."""

    run_id: str
    before_commit: Callable[[], None]
    progress: Callable[[int], None]  # searches done, of the mode at work


def write_neighbours(bank: MemoryBank, settings: IndexSettings, plan: ModePlan, writing: Writing) -> Counts:
    """Search for what is pending and commit it, in place of what is stale, in one new version."""
    store, counts, staged = bank.store, plan.counts, []
    for missing, chunk, known in _due(bank, plan):
        found = bank.search(chunk.queries(), settings.search(missing, plan.retrieval), known)
        searched = _Searched(missing=missing, found=found, run_id=writing.run_id)
        rows = _rows(bank, settings, plan, chunk, searched)
        staged.append(store.stage(Table.NEIGHBOURS, rows))
        _count(counts, found, settings.n)
        counts.extended += len(chunk.clip_ids) if known else 0
        writing.progress(counts.searched)
    writing.before_commit()
    properties = {"run": writing.run_id, "retrieval": plan.retrieval.value}
    store.commit(Table.NEIGHBOURS, staged, properties, also_delete=plan.stale)
    note_valid(bank, settings, plan, writing.run_id)
    return counts


def _due(bank: MemoryBank, plan: ModePlan) -> Iterator[tuple[Modality, Chunk, Known | None]]:
    """Chunks of queries: those that know nothing of use, then those that go on from what they know."""
    for missing, pending in plan.pending.items():
        for chunk in query_chunks(bank, missing, pending):
            yield missing, chunk, None
    columns = ["clip_id", "nearest_ids", "nearest_scores", "farthest_ids", "farthest_scores"]
    for missing, touched in plan.touched.items():
        if not touched:
            continue
        where = f"index = {sql_literal(plan.index)} AND missing = {sql_literal(missing.value)}"
        table = bank.store.neighbours(columns, where)
        place = {clip_id: row for row, clip_id in enumerate(table["clip_id"].to_pylist())}
        for chunk in query_chunks(bank, missing, touched):
            rows = table.take([place[clip_id] for clip_id in chunk.clip_ids])
            yield missing, chunk, _known(rows, plan.entered)


def _known(rows: pa.Table, entered: set[str]) -> Known:
    """What rows of `neighbours` say, one a query."""
    sides = [
        [
            Listed(ids=ids, scores=scores)
            for ids, scores in zip(
                rows[f"{side}_ids"].to_pylist(), rows[f"{side}_scores"].to_pylist(), strict=True
            )
        ]
        for side in ("nearest", "farthest")
    ]
    return Known(nearest=sides[0], farthest=sides[1], entered=entered)


def note_valid(bank: MemoryBank, settings: IndexSettings, plan: ModePlan, run_id: str) -> None:
    """Write into `indexes` that the rows of a mode are right at the bank's version."""
    before = plan.valid
    store, corpora = bank.store, settings.query_corpora
    store.record_index(
        {
            "index": plan.index,
            "retrieval": plan.retrieval.value,
            "settings": settings.settings_key(plan.retrieval),
            "query_corpora": list(before.with_corpora(corpora) if before else corpora),
            "bank_fingerprint": bank.fingerprint,
            "bank_version": bank.version,
            "run_id": run_id,
            "at": now(),
        }
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Searched:
    """What one search gave, for what, in which run."""

    missing: Modality
    found: Found
    run_id: str


def _rows(
    bank: MemoryBank, settings: IndexSettings, plan: ModePlan, chunk: Chunk, found: _Searched
) -> pa.Table:
    """Rows of `neighbours`, one a query."""
    count = len(chunk.clip_ids)
    mode = {
        "missing": found.missing.value,
        "retrieval": plan.retrieval.value,
        "leak_guard": settings.leak_guard,
        "settings": settings.settings_key(plan.retrieval),
        "index": plan.index,
        "bank_fingerprint": bank.fingerprint,
        "bank_version": bank.version,
        "run_id": found.run_id,
        "at": now(),
    }
    columns: dict[str, object] = {name: [value] * count for name, value in mode.items()}
    columns["clip_id"] = chunk.clip_ids
    kind = f"{found.missing.value}|{plan.retrieval.value}|{plan.index}"
    columns["neighbour_id"] = [f"{clip_id}|{kind}" for clip_id in chunk.clip_ids]
    columns["query_fingerprint"] = [chunk.fingerprint(at) for at in range(count)]
    for name, hits in (("nearest", found.found.nearest), ("farthest", found.found.farthest)):
        columns[f"{name}_ids"] = [hits.ids(at) for at in range(count)]
        columns[f"{name}_scores"] = [hits.scores(at) for at in range(count)]
        columns[f"{name}_own_source"] = hits.own_source_Q
    schema = bank.store.address(Table.NEIGHBOURS).schema
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema)


def _count(counts: Counts, found: Found, n: int) -> None:
    hits = (found.nearest.rows_QN >= 0).sum(axis=1)
    counts.searched += len(hits)
    counts.short += int((hits < n).sum())
    counts.empty += int((hits == 0).sum())
    counts.nearest_own_source += int(found.nearest.own_source_Q.sum())
    counts.farthest_own_source += int(found.farthest.own_source_Q.sum())
