"""`jobs run`: bring a store up to date with its corpora, and let it serve if it is fit to.

Plan, extract what is new or changed, let go what is gone, merge small fragments, refresh the serving index,
search the neighbours that can have changed; then the gate: only if it passes does the snapshot `serving`
move, and only then are old files cleaned away. All of it under one lease and one row in `runs`.

Where nothing is to do nothing is written: no version, no lease, no run. A run that is killed leaves what it
had committed, and readers of `serving` see nothing of it; the next one goes on from there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r2scp.jobs.ingest.encoders import encoder_spec, pick_device
from r2scp.jobs.ingest.extract import Destination, Extraction, OnProgress, Source
from r2scp.jobs.ingest.index import Index
from r2scp.jobs.reindex.config import ReindexConfig
from r2scp.jobs.reindex.gate import Check, dead_check, drift_checks, neighbour_checks, row_checks
from r2scp.pipelines.neighbours.plan import neighbours_current
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.commits import sql_literal
from r2scp.store.errors import GateFailed
from r2scp.store.feature_store import FeatureStore
from r2scp.store.maintenance import clean, compact
from r2scp.store.runs import ActiveRun, RunSpec, recorded_run
from r2scp.store.schema import Table
from r2scp.store.search.recall import Sampling, measure_recalls
from r2scp.store.search.vector_index import index_due, refresh_index, segments
from r2scp.store.snapshots import PREVIOUS, SERVING

SEED = 1  # of samples that recall and drift are measured on
COMPACTED = (Table.CLIPS, Table.QUESTIONS, Table.FAILURES, Table.RUNS)
Told = Callable[[str], None]
ProgressOf = Callable[[str], OnProgress]  # of a corpus


@dataclass(kw_only=True)
class ReindexReport:
    """The account of one run. `outcome`: published | nothing to do | refused."""

    name: str
    outcome: str = ""
    why: str = ""  # refused: which check; nothing to do: what is held back, if anything
    run_id: str = ""  # "": nothing was written
    due: list[str] = field(default_factory=list)  # what was to be done, in words
    corpora: dict[str, dict[str, object]] = field(default_factory=dict)
    serving_index: dict[str, object] = field(default_factory=dict)
    neighbours: dict[str, dict[str, int]] = field(default_factory=dict)
    recall: dict[str, object] = field(default_factory=dict)
    checks: list[dict[str, object]] = field(default_factory=list)
    merged: dict[str, int] = field(default_factory=dict)  # fragments fewer than before, by table
    bytes_removed: int = 0
    serving: dict[str, int] = field(default_factory=dict)  # versions that serve at the end
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)


def run_reindex(
    config: ReindexConfig, told: Told, dry_run: bool = False, progress: ProgressOf | None = None
) -> ReindexReport:
    """Do what the job says. Raises `R2SCPError` where it cannot go on; a gate that fails is no error here."""
    job = _Job.open(config, told, progress or (lambda corpus: lambda report, total: None))
    with job.clock("plan"):
        job.plan()
    if dry_run:
        job.report.outcome = "dry run"
    elif not job.report.due:
        job.report.outcome = "nothing to do"
    else:
        with suppress(GateFailed):  # the report says it
            job.run()
    snapshots = job.store.snapshots()
    if SERVING in snapshots:
        job.report.serving = {table.value: v for table, v in snapshots[SERVING].versions.items()}
    return job.report


@dataclass(kw_only=True)
class _Job:
    """One run of a job."""

    config: ReindexConfig
    told: Told
    store: FeatureStore
    extractions: list[Extraction]
    resources: Resources
    planned_on: dict[str, int]  # versions
    progress: ProgressOf
    report: ReindexReport

    @classmethod
    def open(cls, config: ReindexConfig, told: Told, progress: ProgressOf) -> "_Job":
        """Open the store and the corpora; makes the store's tables where there are none."""
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
                annotations=tuple(Path(one) for one in corpus.annotations),
                split=corpus.split,
                attempts=config.attempts,
                remove_gone=config.gone == "remove",
                name=corpus.name,
            )
            for corpus in config.corpora
        ]
        store = FeatureStore.create(config.store, encoder.fingerprint, encoder.dim, config.storage_options)
        planned_on = _data(store)
        return cls(
            config=config,
            told=told,
            store=store,
            extractions=[Extraction.open(source, destination, encoder, resources) for source in sources],
            resources=resources,
            planned_on=planned_on,
            progress=progress,
            report=ReindexReport(name=config.name),
        )

    @contextmanager
    def clock(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.report.seconds[step] = round(time.monotonic() - started, 3)

    # -- what is to do

    def plan(self) -> None:
        """Say in the report what is due. Reads only."""
        due = self.report.due = []
        for extraction in self.extractions:
            self.report.corpora[extraction.corpus.name] = extraction.report.to_json()
            due += _due(extraction)
        due += index_due(self.store, self.config.serving)
        index = self.config.index
        if index and not (due or neighbours_current(self.store, index)):
            due.append("neighbours are behind the clips")
        if not due:
            due += self._unpublished()

    def _unpublished(self) -> list[str]:
        """Whether the latest versions serve; says why not where they were taken back."""
        found, latest = self.store.snapshots(), self.store.snapshot_versions()
        if SERVING in found and found[SERVING].versions == latest:
            return []
        previous = found.get(PREVIOUS)
        if previous and previous.rolled_back and previous.versions == latest:
            self.report.why = (
                f"the latest versions (run {previous.run_id}) were rolled back, and stay so until something "
                "changes"
            )
            return []
        return ["what was written does not serve yet"]

    # -- doing it

    def run(self) -> None:
        """All under the lease. Raises `GateFailed` where what was made is not fit to serve."""
        config = self.config
        spec = RunSpec(
            kind="reindex",
            purpose=f"jobs run {config.name}",
            config=config.told(),
            account=self.report.to_json,
            wait_s=config.wait_s,
            told=self.told,
        )
        with recorded_run(self.store, spec) as writer:
            self.report.run_id = writer.run_id
            if _data(self.store) != self.planned_on:  # another writer was at work until we had the lease
                for extraction in self.extractions:
                    extraction.refresh_plan()
                self.plan()
            if not self.report.due:
                self.report.outcome = "nothing to do"
                return
            try:
                self._make(writer)
            except GateFailed as error:
                self.report.outcome, self.report.why = "refused", str(error)
                raise
            with self.clock("publish"):
                writer.lease.require()
                self.store.publish(writer.run_id)
                self.report.outcome = "published"
            with self.clock("clean"):
                writer.lease.require()
                self.report.bytes_removed = clean(self.store, config.kept, alone=True).bytes_removed

    def _make(self, writer: ActiveRun) -> None:
        """Everything up to a candidate that is fit to serve."""
        self._extract(writer)
        with self.clock("compact"):
            writer.lease.require()
            self.report.merged = compact(self.store, COMPACTED)
        with self.clock("serving index"):
            writer.lease.require()
            self.report.serving_index = asdict(refresh_index(self.store, self.config.serving))
        self._neighbours(writer)
        with self.clock("gate"):
            self._gate(writer)

    def _extract(self, writer: ActiveRun) -> None:
        due = [extraction for extraction in self.extractions if extraction.has_work]
        for extraction in due:
            self._require_not_gone(extraction)
        with self.clock("extract"), ExitStack() as stack:
            if any(extraction.plan.pending for extraction in due):
                stack.enter_context(ray_session(self.resources))
            for extraction in due:
                extraction.write(writer, self.progress(extraction.corpus.name))
                self.report.corpora[extraction.corpus.name] = extraction.report.to_json()
                self.told(f"{extraction.corpus.name}: {_said(extraction)}")

    def _require_not_gone(self, extraction: Extraction) -> None:
        """A disk that is not mounted must not empty the store: refuse before anything is written."""
        limit, gone = self.config.gate.max_lost_share, len(extraction.plan.gone)
        if not extraction.source.remove_gone or limit is None or not gone:
            return
        held = gone + extraction.plan.inputs - extraction.plan.new
        if gone > limit * held:
            raise GateFailed(
                f"{gone} of the {held} clips of {extraction.corpus.name} are gone from "
                f"{extraction.source.root}, more than gate.max_lost_share ({limit:g}) allows; nothing was "
                "removed: look whether the disk is there, raise the limit, or set `gone: keep`"
            )

    def _neighbours(self, writer: ActiveRun) -> None:
        if self.config.index is None or neighbours_current(self.store, self.config.index):
            return
        with self.clock("neighbours"):
            index = Index.open(self.store, self.config.index)
            index.write(writer, lambda mode, done, total: None)
            self.report.neighbours = index.report().modes
            compact(self.store, [Table.NEIGHBOURS])

    def _gate(self, writer: ActiveRun) -> None:
        gate, report = self.config.gate, self.report
        dead = sum(extraction.report.dead for extraction in self.extractions)
        inputs = sum(extraction.report.inputs for extraction in self.extractions)
        checks = [*row_checks(self.store, gate), *dead_check(dead, inputs, gate)]
        if self.config.index:
            checks += neighbour_checks(self.store, self.config.index)
        checks += self._recall(writer)
        checks += drift_checks(self.store, writer.run_id, gate, SEED)
        report.checks = [asdict(check) for check in checks]
        if failed := [str(check) for check in checks if not check.passed]:
            serves = self.store.snapshots().get(SERVING)
            what = f"run {serves.run_id} still serves" if serves else "nothing serves yet"
            raise GateFailed(
                f"{'; '.join(failed)}: not published, {what}; what was extracted stays, and serves once a "
                f"run passes (`r2scp-pipe jobs show {writer.run_id}`)"
            )

    def _recall(self, writer: ActiveRun) -> list[Check]:
        """Recall of the serving index: of the clips that this run brought and, where the index is not the one
        that serves, of all. A search without an index is exact, and not measured."""
        gate, checks = self.config.gate, []
        if self.report.serving_index["kind"] == "exact":
            return checks
        asked: dict[str, str | None] = {"new": f"run_id = {sql_literal(writer.run_id)}"}
        serves = self.store.snapshots().get(SERVING)
        if not serves or segments(self.store) != segments(self.store, serves.versions[Table.CLIPS]):
            asked["all"] = None
        samplings = {
            who: Sampling(where=where, queries=gate.recall_queries, seed=SEED) for who, where in asked.items()
        }
        for who, recall in measure_recalls(self.store, self.config.serving, samplings).items():
            self.report.recall[who] = [asdict(pair) for pair in recall.pairs]
            for pair in recall.pairs:
                what = f"of {who} clips, {pair.query.value} to {pair.among.value}"
                if gate.min_recall_at_3 is not None:
                    checks.append(Check.at_least(f"recall@3 {what}", pair.at_3, gate.min_recall_at_3))
                if gate.min_recall_at_10 is not None:
                    checks.append(Check.at_least(f"recall@10 {what}", pair.at_10, gate.min_recall_at_10))
        return checks


def _data(store: FeatureStore) -> dict[str, int]:
    """Versions of the tables that only another writer's work changes."""
    return {name: version for name, version in store.versions().items() if name != Table.RUNS.value}


def _due(extraction: Extraction) -> list[str]:
    """What is to do about one corpus, in words."""
    plan, name = extraction.plan, extraction.corpus.name
    counts = {
        "new": plan.new,
        "changed": plan.changed,
        "decoded by another program": plan.decoder_changed,
        "to be tried again": plan.retried,
        "described anew": len(plan.metadata_changed),
        "gone": len(plan.gone) if extraction.source.remove_gone else 0,
    }
    questions = extraction.questions
    counts["questions new or changed"] = len(questions.to_store) if questions else 0
    counts["questions dropped"] = len(questions.to_delete) if questions else 0
    said = [f"{count} {what}" for what, count in counts.items() if count]
    return [f"{name}: {', '.join(said)}"] if said else []


def _said(extraction: Extraction) -> str:
    report = extraction.report
    gone = f", {report.gone} gone" if report.gone and extraction.source.remove_gone else ""
    return f"{report.stored} stored, {report.unchanged} unchanged, {report.dead} dead{gone}"
