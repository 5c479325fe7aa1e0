"""What a re-index costs, by the size of the change and of the store.

A store of generated clips is filled to its size: the features of each row are interpolated between those
of two of a few hundred real clips, with a little noise, and each has a file on disk (hard links). One clip
in twenty has questions, and neighbours among all. Then `jobs run`, in this order:

- *first*: the store as it was filled: serving indexes and neighbours are built, the snapshot published;
- *nothing new*: three times; the files of the store must stay as they are, to the byte;
- *N new*: N more generated clips, decoded and embedded like any other; 1 % by default.

All but *nothing new* run once: their seconds are no medians.

The encoder is the demo's, its embeddings laid isometrically into as many dimensions as ImageBind has.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from benchmarks.contest import Grade, Report, Row, Sheet, run
from benchmarks.machine import cores
from r2scp.jobs.ingest.encoders import encoder_spec
from r2scp.jobs.ingest.extract import Destination, Source, run_extract
from r2scp.jobs.ingest.weights import resolve_encoder
from r2scp.jobs.reindex.config import read_job_file
from r2scp.jobs.reindex.job import ReindexReport, run_reindex
from r2scp.model.imagebind.imagebind import ImageBind
from r2scp.pipelines.corpora.corpus import ClipRow
from r2scp.pipelines.corpora.formats import open_corpus
from r2scp.pipelines.decoding.decode import decode_fingerprint
from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.ray_session import Resources
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import now
from r2scp.store.schema import Table

DIM = 1024  # as ImageBind's
QUESTIONED = 20  # one clip in this many has questions
FILES_PER_FOLDER = 1_000
ROWS_AT_ONCE = 2_048  # 100 MB of features
NOISE = 0.1  # length of what is added to each token of length 1
SEEDS = (31, 32)  # of the clips that fill the store, and of those that are new
NEIGHBOURS = 15
IDLE = "nothing new"
IDLE_GOAL_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """The files of one size of store."""

    folder: Path
    weights: Path
    models: Sequence[Path]  # media files that are linked to

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    def link(self, root: str, numbers: range, models: Sequence[Path], prefix: str = "") -> None:
        """Files named by number, each a link to one of `models`."""
        for number in numbers:
            folder = self.folder / root / f"{number // FILES_PER_FOLDER:04}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(models[number % len(models)], folder / f"{prefix}{number:07}.mp4")


def widen(folder: Path) -> Path:
    """The demo encoder with embeddings of width DIM; all inner products stay the same."""
    small = ImageBind.load(resolve_encoder("imagebind-demo", None), dtype=torch.float32)
    wide = ImageBind(replace(small.config, dim=DIM))
    generator = torch.Generator().manual_seed(1)
    basis_DE, _ = torch.linalg.qr(torch.randn(DIM, small.dim, generator=generator))
    state = {
        name: basis_DE @ tensor if name in _heads(small, wide) else tensor
        for name, tensor in small.state_dict().items()
    }
    wide.load_state_dict(state)
    path = folder / "wide.safetensors"
    wide.save(path)
    return path


def _heads(small: ImageBind, wide: ImageBind) -> set[str]:
    shapes = {name: tensor.shape for name, tensor in wide.state_dict().items()}
    return {name for name, tensor in small.state_dict().items() if tensor.shape != shapes[name]}


def fill(site: Site, clips: int, donor: FeatureStore) -> None:
    """Files and rows of a store of `clips`; the rows' features are the donor's, with noise."""
    asked = clips // QUESTIONED
    site.link("asked", range(asked), site.models)
    site.link("bank", range(clips - asked), site.models)
    features = donor.clips().to_pylist()
    store = FeatureStore.create(str(site.folder / "store"), donor.fingerprint, donor.dim)
    rng = np.random.default_rng(1)
    for name in ("asked", "bank"):
        rows: list[dict[str, object]] = []
        for clip in open_corpus("folder", site.folder / name, name=name).clips():
            one, other = rng.choice(len(features), 2)
            rows.append(_row(clip, (features[one], features[other]), rng))
            if len(rows) == ROWS_AT_ONCE:
                _commit(store, rows)
                rows = []
        _commit(store, rows)


def _row(
    clip: ClipRow, models: tuple[Mapping[str, object], Mapping[str, object]], rng: np.random.Generator
) -> dict[str, object]:
    row, share = dict(models[0]), np.float32(rng.uniform())
    for column in ("audio", "visual"):
        if any(model[column] is None for model in models):
            continue
        one_TD, other_TD = (np.array(model[column], dtype=np.float32) for model in models)
        tokens_TD = share * one_TD + (1 - share) * other_TD
        tokens_TD += rng.standard_normal(tokens_TD.shape, np.float32) * np.float32(NOISE / DIM**0.5)
        tokens_TD /= np.linalg.norm(tokens_TD, axis=1, keepdims=True)
        mean_D = tokens_TD.mean(axis=0)
        row[column] = list(tokens_TD.astype(np.float16))
        row[f"{column}_key"] = mean_D / np.linalg.norm(mean_D)
    facts = os.stat(clip.uri)
    row |= {
        name: getattr(clip, name) for name in ("clip_id", "corpus", "video_id", "source_id", "split", "uri")
    }
    row |= {"labels": list(clip.labels), "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    return row | {"decode_fingerprint": decode_fingerprint(None), "run_id": "fill", "ingested_at": now()}


def _commit(store: FeatureStore, rows: list[dict[str, object]]) -> None:
    if rows:
        table = pa.Table.from_pylist(rows, store.address(Table.CLIPS).schema)
        store.commit(Table.CLIPS, [store.stage(Table.CLIPS, table)], {"run": "fill"})


def describe_job(site: Site) -> None:
    """Writes the job file."""
    job = {
        "name": "benchmark",
        "store": "store",
        "encoder": "imagebind-demo",
        "weights": str(site.weights),
        "corpora": [{"corpus": "folder", "root": name, "name": name} for name in ("asked", "bank")],
        "index": {"retrieval": ["paired"], "n": NEIGHBOURS, "query_corpora": ["asked"]},
        "machine": {"num_workers": cores()},
    }
    site.job.write_text(yaml.safe_dump(job))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """The files below a folder, with modification time and size."""
    facts = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {str(path): (fact.st_mtime_ns, fact.st_size) for path, fact in facts}


def measure(site: Site, news: Sequence[int], models: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """One row per run: its name, seconds in total and per step, what was written."""
    yield _run(site, "first")
    before = listing(site.folder / "store")
    idle = [_run(site, IDLE) for _ in range(3)]
    assert listing(site.folder / "store") == before, "a run with nothing to do wrote something"
    assert all(row["outcome"] == "nothing to do" for row in idle)
    yield idle[0] | {"seconds": statistics.median(row["seconds"] for row in idle)}  # pyright: ignore
    start = 0
    for new in news:
        site.link("bank", range(start, start + new), models, prefix="new")
        start += new
        yield _run(site, f"{new:,} new")


def _run(site: Site, what: str) -> dict[str, Any]:
    started = time.perf_counter()
    report: ReindexReport = run_reindex(read_job_file(site.job), lambda text: None)
    seconds = time.perf_counter() - started
    assert report.outcome in ("published", "nothing to do"), report.why
    searched = sum(mode["searched"] for mode in report.neighbours.values())
    recall = [pair["at_10"] for who in report.recall.values() for pair in who]  # pyright: ignore
    return {
        "what": what,
        "outcome": report.outcome,
        "seconds": seconds,
        "steps": report.seconds,
        "searched": searched,
        "recall_at_10": min(recall, default=None),
    }


def benchmark(options: argparse.Namespace) -> Report:
    """Fill a store of each size, then run the job on it."""
    sizes = options.clips or ([2_000] if options.short else [20_000])
    results = []
    with tempfile.TemporaryDirectory(prefix="r2scp-reindex-") as name:
        folder = Path(name)
        weights = widen(folder)
        roots = [folder / f"clips-{seed}" for seed in SEEDS]
        for root, seed in zip(roots, SEEDS, strict=True):
            generate(root, clips=options.distinct, seed=seed, workers=cores())
        models, fresh = (sorted((root / "videos").glob("*.mp4")) for root in roots)
        spec = encoder_spec("imagebind-demo", str(weights), "cpu")
        source, to = Source("demo", roots[0]), Destination(str(folder / "donor"))
        run_extract(source, to, spec, Resources(num_workers=cores()), lambda report, total: None)
        donor = FeatureStore.open(to.uri)
        for clips in sizes:
            site = Site(folder=folder / str(clips), weights=weights, models=models)
            fill(site, clips, donor)
            describe_job(site)
            for row in measure(site, options.new or [clips // 100], fresh):
                results.append({"clips": clips} | row)
                print(json.dumps(results[-1], default=str), file=sys.stderr, flush=True)
    idle = max(row["seconds"] for row in results if row["what"] == IDLE)
    return Report(
        sheets=[Sheet(title=f"Seconds of a re-index, D = {DIM}", rows=[_shown(row) for row in results])],
        grades=[Grade(what="nothing new, s", goal=IDLE_GOAL_S, reached=idle, at_most=True)],
        settings={"neighbours": NEIGHBOURS, "asked about": f"one clip in {QUESTIONED}"},
    )


def _shown(row: Mapping[str, Any]) -> Row:
    recall = {"recall@10": row["recall_at_10"]} if row["recall_at_10"] is not None else {}
    figures = {"all": row["seconds"]} | row["steps"] | {"searched": float(row["searched"])} | recall
    return Row(name=f"{row['clips']:,} clips, {row['what']}", figures=figures)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clips", type=int, nargs="+", help="sizes of store (default: 20000; short: 2000)")
    parser.add_argument("--new", type=int, nargs="+", help="sizes of change (default: 1 %% of the store)")
    parser.add_argument("--distinct", type=int, default=100, help="distinct generated clips, old and new")


def main(arguments: Sequence[str] | None = None) -> int:
    return run("reindex", __doc__ or "", _options, benchmark, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
