"""`jobs run`: bring a store up to date with its corpora and publish it if it passes the gate.

Plan, extract what is new or changed, delete what is gone, merge small fragments, refresh the serving index
and outdated neighbours; then the gate: only if it passes does the snapshot `serving` move, and only then are
old files cleaned up. All of it under one lease and one row in `runs`.

With nothing to do nothing is written: no version, no lease, no run. A killed run keeps what it had committed,
invisible to readers of `serving`; the next run continues from there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r2scp.jobs.ingest.encoders import encoder_spec, pick_device
from r2scp.jobs.ingest.extract import Destination, Extraction, OnProgress, Source
from r2scp.jobs.ingest.index import NeighbourUpdate
from r2scp.jobs.reindex.config import ReindexConfig
from r2scp.jobs.reindex.gate import Check, drift_checks, failed_check, neighbour_checks, row_checks
from r2scp.pipelines.neighbours.plan import neighbours_current
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.commits import sql_literal
from r2scp.store.errors import GateFailed
from r2scp.store.feature_store import FeatureStore
from r2scp.store.maintenance import clean, compact
from r2scp.store.runs import ActiveRun, RunSpec, recorded_run
from r2scp.store.schema import Table
from r2scp.store.search.recall import Sampling, measure_recalls
from r2scp.store.search.vector_index import refresh_index, refresh_reasons, segments
from r2scp.store.snapshots import PREVIOUS, SERVING

SEED = 1  # of the samples for recall and drift
COMPACTED = (Table.CLIPS, Table.QUESTIONS, Table.FAILURES, Table.RUNS)
Log = Callable[[str], None]
ProgressFactory = Callable[[str], OnProgress]  # of a corpus


@dataclass(kw_only=True)
class ReindexReport:
    """What one run did. `outcome`: published | nothing to do | refused | dry run."""

    name: str
    outcome: str = ""
    why: str = ""  # refused: the failed checks; nothing to do: what was rolled back, if anything
    run_id: str = ""  # empty if nothing was written
    due: list[str] = field(default_factory=list)  # what was to do, in words
    corpora: dict[str, dict[str, object]] = field(default_factory=dict)
    serving_index: dict[str, object] = field(default_factory=dict)
    neighbours: dict[str, dict[str, int]] = field(default_factory=dict)
    recall: dict[str, object] = field(default_factory=dict)
    checks: list[dict[str, object]] = field(default_factory=list)
    merged: dict[str, int] = field(default_factory=dict)  # table -> number of fragments merged away
    bytes_removed: int = 0
    serving: dict[str, int] = field(default_factory=dict)  # published versions at the end
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def run_reindex(
    config: ReindexConfig, log: Log, dry_run: bool = False, progress_of: ProgressFactory | None = None
) -> ReindexReport:
    """Run the job. Raises `R2SCPError` if it cannot continue; a failed gate is reported, not raised."""
    job = _Job.open(config, log, progress_of or (lambda corpus: lambda report, total: None))
    with job.clock("plan"):
        job.plan()
    if dry_run:
        job.report.outcome = "dry run"
    elif not job.report.due:
        job.report.outcome = "nothing to do"
    else:
        with suppress(GateFailed):  # it is in the report
            job.run()
    snapshots = job.store.snapshots()
    if SERVING in snapshots:
        job.report.serving = {table.value: v for table, v in snapshots[SERVING].versions.items()}
    return job.report


@dataclass(kw_only=True)
class _Job:
    """One run of a job."""

    config: ReindexConfig
    log: Log
    store: FeatureStore
    extractions: list[Extraction]
    resources: Resources
    planned_versions: dict[str, int]
    progress_of: ProgressFactory
    report: ReindexReport

    @classmethod
    def open(cls, config: ReindexConfig, log: Log, progress_of: ProgressFactory) -> "_Job":
        """Open the store and the corpora; creates missing tables."""
        machine = config.machine
        encoder = encoder_spec(config.encoder, config.weights, pick_device(machine.device))
        resources = Resources(
            num_workers=machine.num_workers,
            gpus_per_actor=machine.gpus_per_actor,
            ray_address=machine.ray_address,
            wheel=machine.wheel,
            ffmpeg=machine.ffmpeg,
        )
        destination = Destination(config.store, dict(config.storage_options))
        sources = [
            Source(
                corpus=corpus.corpus,
                root=Path(corpus.root),
                annotations=tuple(Path(path) for path in corpus.annotations),
                split=corpus.split,
                attempts=config.attempts,
                remove_gone=config.gone == "remove",
                name=corpus.name,
            )
            for corpus in config.corpora
        ]
        store = FeatureStore.create(config.store, encoder.fingerprint, encoder.dim, config.storage_options)
        planned_versions = _data_versions(store)
        return cls(
            config=config,
            log=log,
            store=store,
            extractions=[Extraction.open(source, destination, encoder, resources) for source in sources],
            resources=resources,
            planned_versions=planned_versions,
            progress_of=progress_of,
            report=ReindexReport(name=config.name),
        )

    @contextmanager
    def clock(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.report.seconds[step] = round(time.monotonic() - started, 3)

    # -- planning

    def plan(self) -> None:
        """List what is to do in the report. Reads only."""
        pending = self.report.due = []
        for extraction in self.extractions:
            self.report.corpora[extraction.corpus.name] = extraction.report.to_json()
            pending += _pending_work(extraction)
        pending += refresh_reasons(self.store, self.config.serving)
        index = self.config.index
        if index and not (pending or neighbours_current(self.store, index)):
            pending.append("neighbour lists are outdated")
        if not pending:
            pending += self._unpublished()

    def _unpublished(self) -> list[str]:
        """What is to do if the latest versions are not published; nothing if they were rolled back."""
        snapshots, latest = self.store.snapshots(), self.store.snapshot_versions()
        if SERVING in snapshots and snapshots[SERVING].versions == latest:
            return []
        previous = snapshots.get(PREVIOUS)
        if previous and previous.rolled_back and previous.versions == latest:
            self.report.why = (
                f"the latest versions (run {previous.run_id}) were rolled back; they are published "
                "again after the next change"
            )
            return []
        return ["changes are not published yet"]

    # -- running

    def run(self) -> None:
        """Do everything under the lease. Raises `GateFailed` if the result must not be published."""
        config = self.config
        spec = RunSpec(
            kind="reindex",
            purpose=f"jobs run {config.name}",
            config=config.to_record(),
            counts=self.report.to_json,
            wait_s=config.wait_s,
            log=self.log,
        )
        with recorded_run(self.store, spec) as run:
            self.report.run_id = run.run_id
            # another writer may have finished while this one waited for the lease
            if _data_versions(self.store) != self.planned_versions:
                for extraction in self.extractions:
                    extraction.refresh_plan()
                self.plan()
            if not self.report.due:
                self.report.outcome = "nothing to do"
                return
            try:
                self._build_candidate(run)
            except GateFailed as error:
                self.report.outcome, self.report.why = "refused", str(error)
                raise
            with self.clock("publish"):
                run.lease.require()
                self.store.publish(run.run_id)
                self.report.outcome = "published"
            with self.clock("clean"):
                run.lease.require()
                self.report.bytes_removed = clean(self.store, config.retention, exclusive=True).bytes_removed

    def _build_candidate(self, run: ActiveRun) -> None:
        """Bring all tables up to date and check them."""
        self._extract(run)
        with self.clock("compact"):
            run.lease.require()
            self.report.merged = compact(self.store, COMPACTED)
        with self.clock("serving index"):
            run.lease.require()
            self.report.serving_index = asdict(refresh_index(self.store, self.config.serving))
        self._neighbours(run)
        with self.clock("gate"):
            self._gate(run)

    def _extract(self, run: ActiveRun) -> None:
        pending = [extraction for extraction in self.extractions if extraction.has_work]
        for extraction in pending:
            self._check_mass_deletion(extraction)
        with self.clock("extract"), ExitStack() as stack:
            if any(extraction.plan.pending for extraction in pending):
                stack.enter_context(ray_session(self.resources))
            for extraction in pending:
                extraction.write(run, self.progress_of(extraction.corpus.name))
                self.report.corpora[extraction.corpus.name] = extraction.report.to_json()
                self.log(f"{extraction.corpus.name}: {_summary(extraction)}")

    def _check_mass_deletion(self, extraction: Extraction) -> None:
        """An unmounted disk must not empty the store: refuse before anything is written."""
        limit, gone = self.config.gate.max_lost_share, len(extraction.plan.gone)
        if not extraction.source.remove_gone or limit is None or not gone:
            return
        total = gone + extraction.plan.inputs - extraction.plan.new
        if gone > limit * total:
            raise GateFailed(
                f"{gone} of the {total} clips of {extraction.corpus.name} are gone from "
                f"{extraction.source.root}, more than gate.max_lost_share ({limit:g}) allows; nothing was "
                "removed: check that the disk is mounted, raise the limit, or set `gone: keep`"
            )

    def _neighbours(self, run: ActiveRun) -> None:
        if self.config.index is None or neighbours_current(self.store, self.config.index):
            return
        with self.clock("neighbours"):
            index = NeighbourUpdate.open(self.store, self.config.index)
            index.write(run, lambda mode, done, total: None)
            self.report.neighbours = index.report().modes
            compact(self.store, [Table.NEIGHBOURS])

    def _gate(self, run: ActiveRun) -> None:
        gate, report = self.config.gate, self.report
        failed = sum(extraction.report.failed for extraction in self.extractions)
        inputs = sum(extraction.report.inputs for extraction in self.extractions)
        checks = [*row_checks(self.store, gate), *failed_check(failed, inputs, gate)]
        if self.config.index:
            checks += neighbour_checks(self.store, self.config.index)
        checks += self._recall(run)
        checks += drift_checks(self.store, run.run_id, gate, SEED)
        report.checks = [asdict(check) for check in checks]
        if failed := [str(check) for check in checks if not check.passed]:
            published = self.store.snapshots().get(SERVING)
            what = f"run {published.run_id} is still published" if published else "nothing is published yet"
            raise GateFailed(
                f"{'; '.join(failed)}: not published, {what}; extracted clips are kept and published once "
                f"a run passes (`r2scp-pipe jobs show {run.run_id}`)"
            )

    def _recall(self, run: ActiveRun) -> list[Check]:
        """Recall of the serving index on the clips of this run and, if the index was rebuilt, on all clips.
        A search without an index is exact and not measured."""
        gate, checks = self.config.gate, []
        if self.report.serving_index["kind"] == "exact":
            return checks
        conditions: dict[str, str | None] = {"new": f"run_id = {sql_literal(run.run_id)}"}
        published = self.store.snapshots().get(SERVING)
        if not published or segments(self.store) != segments(self.store, published.versions[Table.CLIPS]):
            conditions["all"] = None
        samplings = {
            name: Sampling(where=where, queries=gate.recall_queries, seed=SEED)
            for name, where in conditions.items()
        }
        for name, recall in measure_recalls(self.store, self.config.serving, samplings).items():
            self.report.recall[name] = [asdict(pair) for pair in recall.pairs]
            for pair in recall.pairs:
                what = f"of {name} clips, {pair.query.value} to {pair.among.value}"
                if gate.min_recall_at_3 is not None:
                    checks.append(Check.at_least(f"recall@3 {what}", pair.at_3, gate.min_recall_at_3))
                if gate.min_recall_at_10 is not None:
                    checks.append(Check.at_least(f"recall@10 {what}", pair.at_10, gate.min_recall_at_10))
        return checks


def _data_versions(store: FeatureStore) -> dict[str, int]:
    """Versions of the tables that only a writer changes."""
    return {name: version for name, version in store.versions().items() if name != Table.RUNS.value}


def _pending_work(extraction: Extraction) -> list[str]:
    """What is to do for one corpus, in words."""
    plan, name = extraction.plan, extraction.corpus.name
    counts = {
        "new": plan.new,
        "changed": plan.changed,
        "decoder changed": plan.decoder_changed,
        "to retry": plan.retried,
        "metadata updated": len(plan.metadata_changed),
        "gone": len(plan.gone) if extraction.source.remove_gone else 0,
    }
    questions = extraction.questions
    counts["questions new or changed"] = len(questions.to_store) if questions else 0
    counts["questions deleted from the store"] = len(questions.to_delete) if questions else 0
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return [f"{name}: {', '.join(parts)}"] if parts else []


def _summary(extraction: Extraction) -> str:
    report = extraction.report
    gone = f", {len(report.plan.gone)} gone" if report.plan.gone and extraction.source.remove_gone else ""
    return f"{report.stored} stored, {report.unchanged} unchanged, {report.failed} failed{gone}"
