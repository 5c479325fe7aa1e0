"""Neighbours: exact search for all clips at once, and fast search for one query at a time: `python -m
benchmarks.retrieval --help`.

Keys are generated, see `benchmarks.retrieval.data`, and stored in a real store. There are two parts:

*Exact*: `MemoryBank.search`, as `index` uses it for a chunk of clips: the 15 nearest and the 15 farthest keys
of other sources for each. It is compared with the bare matrix product by numpy, in the same tiles into the
same buffers, since no exact search by a product can be faster; with the same product by torch; and with the
alternatives, the product and `argpartition`, and faiss's flat index, both of which find only the nearest and
exclude nothing.

*Serving*: ten neighbours of one query at a time, for queries that are not in the store, in one process: our
index as shipped, LanceDB's default index, faiss and hnswlib. Approximate contenders are swept from their
fastest setting, with separate queries, to the first with a recall@10 of 0.99, and run with it. Contenders
take turns in every round, with a slice of the queries each; those that read all keys per query get only a few
queries. faiss, hnswlib and numpy keep all keys in memory; ours does if both keys of all clips fit in 2 GiB,
and is also measured without; LanceDB reads them from the store. All return the same: indices of clips, best
first.

Indexes are built one after another, with all threads. `--folder` keeps them for another run.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.contest import Grade, Report, Row, Sheet, Spread, contest, ratios, reason, run
from benchmarks.retrieval.data import AMONG, CLIPS_PER_SOURCE, DIM, Bank, Mixture, fill
from benchmarks.retrieval.peers import CONTENDERS, HITS, OURS, Ask, Contender, Index
from r2scp.store.schema import Retrieval
from r2scp.store.search.bank import BLOCK_KEYS, MemoryBank, Queries, Search
from r2scp.store.search.bank import HITS as NEIGHBOURS
from r2scp.store.search.exact import QUERY_ROWS, TILE_KEYS

CLIPS, SHORT_CLIPS, FULL_CLIPS = 200_000, 20_000, 1_000_000
QUERIES, SHORT_QUERIES, TUNING = 500, 200, 200
SLOW_QUERIES = 40  # of a contender that reads all keys
CHUNK = 2_048  # queries of an exact search
RECALL_GOAL, LATENCY_GOAL_MS, PRODUCT_GOAL = 0.99, 5.0, 1.2
GIB = 1 << 30  # bytes
BARE = "bare product, numpy"
HELD_OUT, FOR_TUNING = 7, 8  # seeds


def exact_sheet(bank: Bank, rounds: int) -> tuple[Sheet, list[Grade]]:
    """The exact search and its measures, in turn."""
    clips = len(bank.keys_KD)
    chosen = np.sort(np.random.default_rng(5).choice(clips, min(CHUNK, clips), replace=False))
    queries_QD = np.ascontiguousarray(bank.keys_KD[chosen])
    sources = [f"source{at // CLIPS_PER_SOURCE}" for at in chosen]
    memory_bank = MemoryBank.open(bank.store, in_memory_bytes=1 << 62)
    buffer = np.empty(QUERY_ROWS * TILE_KEYS, np.float32)

    def ours() -> object:
        how = Search(missing=AMONG, retrieval=Retrieval.CROSS)
        return memory_bank.search(Queries(keys_QD=queries_QD, sources=sources), how)

    def bare() -> None:
        for start in range(0, clips, BLOCK_KEYS):
            block = bank.keys_KD[start : start + BLOCK_KEYS]
            for at in range(0, len(queries_QD), QUERY_ROWS):
                some = queries_QD[at : at + QUERY_ROWS]
                for first in range(0, len(block), TILE_KEYS):
                    tile = block[first : first + TILE_KEYS]
                    np.matmul(some, tile.T, out=buffer[: len(some) * len(tile)].reshape(len(some), -1))

    def product() -> None:
        queries = torch.from_numpy(queries_QD)
        for start in range(0, clips, TILE_KEYS):
            torch.mm(queries, torch.from_numpy(np.asarray(bank.keys_KD[start : start + TILE_KEYS])).T)

    contenders = {
        "ours, nearest and farthest": ours,
        BARE: bare,
        "bare product, torch": product,
        "numpy product, argpartition": lambda: bank.truth(queries_QD, NEIGHBOURS),
        "faiss Flat": _faiss_flat(bank, queries_QD),
    }
    seconds = contest(contenders, rounds)
    rows = []
    for name, taken in seconds.items():
        if isinstance(taken, str):
            rows.append(Row(name=name, unable=taken))
            continue
        each = {"ms a query": Spread.of([1e3 * one / len(chosen) for one in taken])}
        rows.append(Row(name=name, figures=each | {"times the product": ratios(taken, seconds[BARE])}))  # pyright: ignore
    times = rows[0].figures["times the product"]
    assert isinstance(times, Spread)
    title = f"Exact neighbours of {len(chosen):,} clips among {clips:,} x {DIM}"
    grade = Grade(
        what=f"exact build, {clips:,}, times the product",
        goal=PRODUCT_GOAL,
        reached=times.median,
        at_most=True,
    )
    return Sheet(title=title, rows=rows), [grade]


def _faiss_flat(bank: Bank, queries_QD: np.ndarray):
    """The index is built at the first call."""
    built = []

    def search() -> None:
        import faiss  # a peer: it may not be installed

        if not built:
            built.append(faiss.IndexFlatIP(DIM))
            for _, keys in bank.blocks():
                built[0].add(keys)
        built[0].search(queries_QD, NEIGHBOURS)

    return search


def serving_sheet(
    bank: Bank, queries: int, rounds: int, memory: float, only: Sequence[str] = ()
) -> tuple[Sheet, list[Grade]]:
    """One query at a time; `memory`: bytes for all contenders together; `only`: parts of names."""
    clips, mixture = len(bank.keys_KD), Mixture()
    chosen = [c for c in CONTENDERS if c.name == OURS or any(part in c.name for part in only or [""])]
    tuning, held_out = mixture.draw(TUNING, FOR_TUNING), mixture.draw(queries, HELD_OUT)
    best_tuning, best = bank.truth(tuning, HITS), bank.truth(held_out, HITS)
    rows: dict[str, Row] = {}
    able: dict[str, tuple[Contender, Ask]] = {}
    about: dict[str, dict[str, Spread | float | str]] = {}
    for contender in chosen:
        needs = contender.vectors * clips * DIM * 4
        if clips > contender.most:
            rows[contender.name] = Row(name=contender.name, unable="its build takes too long at this size")
            continue
        if needs > memory:
            why = f"holds {needs / GIB:.1f} GiB in memory, and {memory / GIB:.1f} are left"
            rows[contender.name] = Row(name=contender.name, unable=why)
            continue
        try:
            index, built = _built(contender, bank)
            setting, ask, recall = _swept(contender, index, tuning, best_tuning)
        except Exception as error:  # a peer may raise anything
            rows[contender.name] = Row(name=contender.name, unable=reason(error))
            continue
        memory -= needs
        able[contender.name] = (contender, ask)
        about[contender.name] = {
            "setting": _shown(setting),
            "build s": built,
            "MB on disk": index.disk / 1e6,
            "MB in memory": index.memory / 1e6,
        }
        _log(f"{contender.name}: built in {built:.1f} s; {_shown(setting)}: {recall:.4f}")
    hits, taken = _ask_all(able, held_out, rounds)
    for name in able:
        rows[name] = Row(name=name, figures=about[name] | _figures(hits[name], taken[name], best))
    title = f"Serving: {HITS} neighbours of one query among {clips:,} x {DIM}, {queries} queries"
    ordered = [rows[contender.name] for contender in chosen]
    ours = rows[OURS].figures
    grades = [
        Grade(what=f"recall@{HITS}, {clips:,}", goal=RECALL_GOAL, reached=float(ours[f"recall@{HITS}"])),  # pyright: ignore
        Grade(what=f"p50 ms, {clips:,}", goal=LATENCY_GOAL_MS, reached=float(ours["p50 ms"]), at_most=True),  # pyright: ignore
    ]
    return Sheet(title=title, rows=ordered), grades


def _built(contender: Contender, bank: Bank) -> tuple[Index, float]:
    """The index, and the seconds it took to build now or in an earlier run."""
    path = bank.folder / "built.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    started = time.perf_counter()
    index = contender.make(bank)
    if contender.name not in known:
        known[contender.name] = time.perf_counter() - started
        path.write_text(json.dumps(known))
    return index, known[contender.name]


def _swept(contender: Contender, index: Index, queries_QD: np.ndarray, best: np.ndarray):
    """(setting, search, recall): the first setting that reaches the goal, or else the best one."""
    reached: list[tuple[float, object]] = []
    for setting in index.settings:
        ask = index.at(setting)
        some = range(SLOW_QUERIES // 4 if contender.slow else len(queries_QD))
        recall = float(np.mean([_recall(ask(queries_QD[at]), best[at], HITS) for at in some]))
        reached.append((recall, setting))
        if recall >= RECALL_GOAL:
            break
    recall, setting = reached[-1] if reached[-1][0] >= RECALL_GOAL else max(reached, key=lambda pair: pair[0])
    return setting, index.at(setting), recall


def _ask_all(able: Mapping[str, tuple[Contender, Ask]], queries_QD: np.ndarray, rounds: int):
    """(hits, seconds) by contender and query."""
    hits: dict[str, dict[int, Sequence[int]]] = {name: {} for name in able}
    taken: dict[str, dict[int, float]] = {name: {} for name in able}
    names = list(able)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            contender, ask = able[name]
            turn_queries = list(range(turn, len(queries_QD), rounds))
            if contender.slow:
                turn_queries = turn_queries[: SLOW_QUERIES // rounds]
            ask(queries_QD[turn_queries[0] - 1])  # refills the caches after another contender
            for at in turn_queries:
                started = time.perf_counter()
                hits[name][at] = ask(queries_QD[at])
                taken[name][at] = time.perf_counter() - started
    return hits, taken


def _figures(hits_by_query: Mapping[int, Sequence[int]], taken: Mapping[int, float], best: np.ndarray):
    milliseconds = 1e3 * np.array(list(taken.values()))
    figures = {
        f"recall@{n}": float(np.mean([_recall(hits, best[at], n) for at, hits in hits_by_query.items()]))
        for n in (3, HITS)
    }
    many = milliseconds.size > 100
    return figures | {
        "p50 ms": float(np.median(milliseconds)),
        "p99 ms": float(np.quantile(milliseconds, 0.99)) if many else "",
        "queries": f"{milliseconds.size}",
    }


def _recall(hits: Sequence[int], best: np.ndarray, n: int) -> float:
    return len(set(hits[:n]) & set(best[:n].tolist())) / n


def _shown(setting: object) -> str:
    return f"nprobes={setting[0]}, refine={setting[1]}" if isinstance(setting, tuple) else str(setting)


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this benchmark."""
    parser.add_argument("--clips", type=int, nargs="+", help=f"sizes of store (default: {CLIPS}; see --full)")
    parser.add_argument("--full", action="store_true", help=f"{FULL_CLIPS:,} clips, too")
    parser.add_argument("--part", choices=("exact", "serving", "both"), default="both")
    parser.add_argument(
        "--folder", type=Path, help="keep the store and the indexes here, and use them if they exist"
    )
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose name has one of these in it")
    parser.add_argument("--memory-gib", type=float, default=6.0, help="for indexes in memory (default: 6)")


def benchmark(options: argparse.Namespace) -> Report:
    """Both parts at each size."""
    sizes = options.clips or ([SHORT_CLIPS] if options.short else [CLIPS, *[FULL_CLIPS] * options.full])
    sheets: list[Sheet] = []
    grades: list[Grade] = []
    with tempfile.TemporaryDirectory(prefix="r2scp-retrieval-") as temporary:
        for clips in sizes:
            folder = (options.folder or Path(temporary)) / f"{clips}"
            folder.mkdir(parents=True, exist_ok=True)
            bank = fill(folder, clips)
            parts = []
            if options.part != "serving":
                parts.append(exact_sheet(bank, options.rounds))
            if options.part != "exact":
                queries = SHORT_QUERIES if options.short else QUERIES
                memory = options.memory_gib * GIB
                parts.append(serving_sheet(bank, queries, options.rounds, memory, options.only))
            for sheet, reached in parts:
                sheets.append(sheet)
                grades.extend(reached)
    settings = {"D": DIM, "among": AMONG, "threads": torch.get_num_threads(), "chunk": CHUNK}
    return Report(sheets=sheets, grades=grades, settings=settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run("retrieval", __doc__ or "", add_options, benchmark, arguments)
