"""`extract`: a corpus into the store. Plan, run the flow, commit as it goes, account for every input.

Nothing is decoded that the store already holds, and where nothing is to do nothing is written: no version,
no lease, no run. A run that is killed leaves what it had committed; the next one goes on from there.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r2scp.pipelines.corpora.formats import Corpus, open_corpus
from r2scp.pipelines.decoding.decode import decode_fingerprint
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.extraction.flow import extract
from r2scp.pipelines.extraction.plan import ClipPlan, PlanOptions, plan_clips
from r2scp.pipelines.extraction.questions import QuestionPlan, plan_questions, write_questions
from r2scp.pipelines.extraction.stages import Provenance
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.commits import Staged
from r2scp.store.errors import TRANSIENT_REASONS, R2SCPError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import Lease
from r2scp.store.maintenance import compact
from r2scp.store.runs import ActiveRun, RunSpec, recorded_run
from r2scp.store.schema import Table

COMMIT_EVERY_S = 5.0  # what a crash can cost in finished work
COMMIT_EVERY_FRAGMENTS = 16
GONE_NAMED = 20  # clips named one by one in the account


@dataclass(frozen=True)
class Source:
    """Which corpus, where it is, and how much of it."""

    corpus: str
    root: Path
    annotations: tuple[Path, ...] = ()
    split: str = ""
    limit: int | None = None
    retry_failed: bool = False  # all dead letters of untouched files
    attempts: int = 0  # else those that may pass, up to so many attempts
    remove_gone: bool = False  # clips and questions that are no longer there leave the store
    name: str = ""  # of the corpus in the store; its kind's where none is given


@dataclass(frozen=True)
class Destination:
    """Which store."""

    uri: str
    storage_options: dict[str, str] = field(default_factory=dict)


@dataclass
class ExtractReport:
    """The account of one run; `inputs == stored + unchanged + dead`."""

    corpus: str = ""
    encoder: str = ""
    inputs: int = 0
    new: int = 0  # of those to be done; the other three likewise
    changed: int = 0
    other_fingerprint: int = 0
    retried: int = 0
    stored: int = 0
    unchanged: int = 0
    dead: int = 0
    dead_before: int = 0  # of `dead`: failed in an earlier run, file untouched, not tried again
    decoded: int = 0  # files decoded, or tried, in this run
    missing_files: int = 0
    redescribed: int = 0  # of `unchanged`: same file, other split, labels or place; no feature was computed
    partial: int = 0
    gone: int = 0
    gone_first: list[str] = field(default_factory=list)
    rejects: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0  # annotation rows that say again what was said
    ambiguous_files: int = 0  # clips for which several files stand
    ignored_files: int = 0  # below the root, and no media
    unusable_names: int = 0  # media whose names hold control characters or are not UTF-8
    unreadable_folders: int = 0
    questions: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    annotations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    clips_per_second: float = 0.0
    clips_version: int = 0
    run_id: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)


OnProgress = Callable[[ExtractReport, int], None]  # the account so far, how many clips there are to do


def run_extract(
    source: Source, destination: Destination, encoder: EncoderSpec, resources: Resources, progress: OnProgress
) -> ExtractReport:
    """Extract one corpus. Raises `R2SCPError` with one clear line where it cannot go on."""
    started = time.monotonic()
    extraction = Extraction.open(source, destination, encoder, resources)
    report, store = extraction.report, extraction.store
    if extraction.has_work:
        spec = RunSpec(
            kind="extract",
            purpose=f"extract --corpus {report.corpus}",
            config=asdict(source) | {"encoder": encoder.fingerprint},
            account=report.to_json,
        )
        with recorded_run(store, spec) as writer:
            extraction.write(writer, progress)
            compact(store)
    report.clips_version = store.dataset(Table.CLIPS).version
    report.seconds = round(time.monotonic() - started, 3)
    report.clips_per_second = round(report.decoded / report.seconds, 3)
    return report


@dataclass(kw_only=True)
class Extraction:
    """One corpus on its way into one store: `open` plans, `write` does what is planned."""

    source: Source
    store: FeatureStore
    encoder: EncoderSpec
    resources: Resources
    corpus: Corpus
    plan: ClipPlan = field(default_factory=ClipPlan)
    questions: QuestionPlan | None = None
    report: ExtractReport = field(default_factory=ExtractReport)
    _sequence: int = 0

    @classmethod
    def open(
        cls, source: Source, destination: Destination, encoder: EncoderSpec, resources: Resources
    ) -> "Extraction":
        """Compare the corpus with the store; makes the store's tables, and writes nothing else."""
        corpus = open_corpus(source.corpus, source.root, source.annotations, source.split, source.name)
        decode_fingerprint(resources.ffmpeg)  # an ffmpeg that cannot serve is told before anything is written
        store = FeatureStore.create(
            destination.uri, encoder.fingerprint, encoder.dim, destination.storage_options
        )
        extraction = cls(source=source, store=store, encoder=encoder, resources=resources, corpus=corpus)
        extraction.refresh_plan()
        return extraction

    @property
    def has_work(self) -> bool:
        """Whether there is anything to write."""
        plan = self.plan
        gone = bool(plan.gone) and self.source.remove_gone
        return bool(plan.pending or plan.metadata_changed or gone) or bool(self.questions and self.questions.has_work)

    def refresh_plan(self) -> None:
        """Compare the corpus with the store as it is now, and begin the account anew."""
        source, corpus = self.source, self.corpus
        scope = PlanOptions(
            decode_fingerprint=decode_fingerprint(self.resources.ffmpeg),
            limit=source.limit,
            retry_failed=source.retry_failed,
            attempts=source.attempts,
        )
        plan = self.plan = plan_clips(corpus, self.store.input_records(corpus.name), scope)
        self.questions = plan_questions(corpus, self.store, delete_missing=source.remove_gone)
        tally = corpus.clip_tally
        fresh = ExtractReport(
            corpus=corpus.name,
            encoder=self.encoder.fingerprint,
            inputs=plan.inputs,
            new=plan.new,
            changed=plan.changed,
            other_fingerprint=plan.decoder_changed,
            retried=plan.retried,
            unchanged=plan.unchanged,
            dead=plan.already_failed,
            dead_before=plan.already_failed,
            redescribed=len(plan.metadata_changed),
            missing_files=plan.missing_files,
            gone=len(plan.gone),
            gone_first=plan.gone[:GONE_NAMED],
            rejects={reason.value: count for reason, count in tally.rejects.items()},
            duplicates=tally.duplicates,
            ambiguous_files=tally.ambiguous_files,
            ignored_files=corpus.ignored.count,
            unusable_names=corpus.tree.unusable.count,
            unreadable_folders=corpus.tree.unreadable.count,
            questions=self.questions.counts,
            annotations=[str(file.path) for file in corpus.files],
        )
        vars(self.report).update(vars(fresh))  # who asked for the account keeps it

    def write(self, writer: ActiveRun, progress: OnProgress) -> None:
        """Do what is planned, commit by commit. Raises `R2SCPError` where an input is unaccounted for."""
        self.report.run_id = writer.run_id
        writer.lease.require()
        self._reconcile()
        self.store.update_metadata(self.plan.metadata_changed, self._properties("redescribe"))
        if self.source.remove_gone and self.plan.gone:
            writer.lease.require()
            for table in (Table.CLIPS, Table.FAILURES):
                self.store.commit(table, [], self._properties("gone"), also_delete=self.plan.gone)
        if self.plan.pending:
            self._clips(writer, progress)
        questions = plan_questions(self.corpus, self.store, delete_missing=self.source.remove_gone)
        writer.lease.require()
        write_questions(questions, self.store, self.encoder, writer.run_id)
        self.report.questions = questions.counts
        writer.lease.require()
        self._reconcile()
        report = self.report
        if report.inputs != report.stored + report.unchanged + report.dead:
            raise R2SCPError(
                f"inputs are unaccounted for: {report.inputs} inputs, but {report.stored} stored, "
                f"{report.unchanged} unchanged, {report.dead} dead; run it again and report this"
            )

    def _properties(self, sequence: str) -> dict[str, str]:
        return {"run": self.report.run_id, "sequence": sequence}

    def _clips(self, writer: ActiveRun, progress: OnProgress) -> None:
        """Run the flow over the plan's sources and commit what it stages."""
        plan = self.plan
        tables = (self.store.address(Table.CLIPS), self.store.address(Table.FAILURES))
        provenance = Provenance.of(self.report.run_id, self.encoder.fingerprint, self.resources.ffmpeg)
        total, waiting = len(plan.pending), []
        progress(self.report, total)
        with ray_session(self.resources):
            due = time.monotonic() + COMMIT_EVERY_S
            for batch in extract(plan.sources, self.encoder, tables, provenance, self.resources):
                waiting.append(batch)
                if len(waiting) >= COMMIT_EVERY_FRAGMENTS or time.monotonic() >= due:
                    self._commit(waiting, writer.lease)
                    waiting, due = [], time.monotonic() + COMMIT_EVERY_S
                    progress(self.report, total)
            self._commit(waiting, writer.lease)
        progress(self.report, total)
        if plan.pending:
            first = next(iter(plan.pending))
            raise R2SCPError(f"{len(plan.pending)} clips went into the flow and did not come out: {first}")

    def _commit(self, batches: list[dict], lease: Lease) -> None:
        """Make staged rows visible: new clips first, then dead letters and what is no longer true."""
        if not batches:
            return
        lease.require()
        stored = [Staged.from_json(batch["stored"]) for batch in batches]
        dead = [Staged.from_json(batch["dead"]) for batch in batches]
        stored_ids = [clip_id for staged in stored for clip_id in staged.ids]
        dead_ids = [clip_id for staged in dead for clip_id in staged.ids]
        reasons = [reason for batch in batches for reason in json.loads(batch["reasons"])]
        unchanged = [clip_id for batch in batches for clip_id in batch["unchanged"]]
        for clip_id in (*stored_ids, *dead_ids, *unchanged):
            del self.plan.pending[clip_id]  # KeyError: a clip came out that did not go in, or came out twice
        self._sequence += 1
        properties = self._properties(str(self._sequence))
        lasting = [i for i, why in zip(dead_ids, reasons, strict=True) if why not in TRANSIENT_REASONS]
        self.store.commit(Table.CLIPS, stored, properties, also_delete=lasting)
        self.store.commit(Table.FAILURES, dead, properties, also_delete=stored_ids)
        report = self.report
        report.stored += len(stored_ids)
        report.dead += len(dead_ids)
        report.unchanged += len(unchanged)
        report.decoded += len(stored_ids) + len(dead_ids)
        report.partial += sum(batch["partial"] for batch in batches)
        for reason in reasons:
            report.reasons[reason] = report.reasons.get(reason, 0) + 1

    def _reconcile(self) -> None:
        stale_clips, stale_failures = self.store.superseded()
        properties = self._properties("reconcile")
        self.store.commit(Table.CLIPS, [], properties, also_delete=stale_clips)
        self.store.commit(Table.FAILURES, [], properties, also_delete=stale_failures)
