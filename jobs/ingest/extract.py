"""`extract`: a corpus into the store. Plan, run the flow, commit as it goes, account for every input.

Nothing is decoded that is already in the store, and a run with nothing to do writes nothing: no version, no
lease, no run. A run that is killed leaves what it had committed; the next one resumes from there.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r2scp.pipelines.corpora.formats import Corpus, open_corpus
from r2scp.pipelines.decoding.decode import decode_fingerprint
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.extraction.flow import extract
from r2scp.pipelines.extraction.plan import ClipPlan, PlanOptions, input_records, plan_clips
from r2scp.pipelines.extraction.questions import QuestionPlan, plan_questions, write_questions
from r2scp.pipelines.extraction.stages import Provenance
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.commits import Staged
from r2scp.store.errors import TRANSIENT_REASONS, R2SCPError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import Lease
from r2scp.store.maintenance import compact, superseded
from r2scp.store.runs import ActiveRun, RunSpec, recorded_run
from r2scp.store.schema import Table

COMMIT_EVERY_S = 5.0  # finished work that a crash can cost
COMMIT_EVERY_FRAGMENTS = 16
MAX_LISTED_GONE = 20  # clip ids in the report


@dataclass(frozen=True)
class Source:
    """Which corpus, where it is, and how much of it."""

    corpus: str
    root: Path
    annotations: tuple[Path, ...] = ()
    split: str = ""
    limit: int | None = None
    retry_failed: bool = False  # retry all failures of unchanged files
    attempts: int = 0  # else retry temporary failures, up to so many attempts in all
    remove_gone: bool = False  # delete clips and questions from the store that the corpus no longer has
    name: str = ""  # of the corpus in the store, by default its kind


@dataclass(frozen=True)
class Destination:
    """Which store."""

    uri: str
    storage_options: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class ExtractReport:
    """What one run planned and did; `inputs == stored + unchanged + failed`."""

    corpus: Corpus
    encoder: str
    plan: ClipPlan
    questions: QuestionPlan
    stored: int = 0
    same_content: int = 0  # files that looked changed and are not
    partial: int = 0  # of `stored`
    reasons: Counter[str] = field(default_factory=Counter)  # of failures in this run
    seconds: float = 0.0
    clips_version: int = 0
    run_id: str = ""  # "" where nothing had to be written

    @property
    def inputs(self) -> int:
        return self.plan.inputs

    @property
    def unchanged(self) -> int:
        return self.plan.unchanged + self.same_content

    @property
    def failed(self) -> int:
        """Clips that failed in this run or before."""
        return self.plan.already_failed + self.reasons.total()

    @property
    def decoded(self) -> int:
        """Files that this run decoded or tried to."""
        return self.stored + self.reasons.total()

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        plan, tally, tree = self.plan, self.corpus.clip_tally, self.corpus.tree
        return {
            "corpus": self.corpus.name,
            "encoder": self.encoder,
            "inputs": plan.inputs,
            "new": plan.new,
            "changed": plan.changed,
            "other_fingerprint": plan.decoder_changed,
            "retried": plan.retried,
            "stored": self.stored,
            "unchanged": self.unchanged,
            "dead": self.failed,
            "dead_before": plan.already_failed,
            "decoded": self.decoded,
            "missing_files": plan.missing_files,
            "redescribed": len(plan.metadata_changed),
            "partial": self.partial,
            "gone": len(plan.gone),
            "gone_first": plan.gone[:MAX_LISTED_GONE],
            "rejects": {reason.value: count for reason, count in tally.rejects.items()},
            "duplicates": tally.duplicates,
            "ambiguous_files": tally.ambiguous_files,
            "ignored_files": tree.ignored.count,
            "unusable_names": tree.unusable.count,
            "unreadable_folders": tree.unreadable.count,
            "questions": dict(self.questions.counts),
            "reasons": dict(self.reasons),
            "annotations": [str(file.path) for file in self.corpus.files],
            "seconds": self.seconds,
            "clips_per_second": round(self.decoded / self.seconds, 3) if self.seconds else 0.0,
            "clips_version": self.clips_version,
            "run_id": self.run_id,
        }


OnProgress = Callable[[ExtractReport, int], None]  # the report so far, clips to do in all


def run_extract(
    source: Source,
    destination: Destination,
    encoder: EncoderSpec,
    resources: Resources,
    on_progress: OnProgress,
) -> ExtractReport:
    """Extract one corpus. Raises `R2SCPError` with one clear line where it fails."""
    started = time.monotonic()
    extraction = Extraction.open(source, destination, encoder, resources)
    report, store = extraction.report, extraction.store
    if extraction.has_work:
        spec = RunSpec(
            kind="extract",
            purpose=f"extract --corpus {report.corpus.name}",
            config=asdict(source) | {"encoder": encoder.fingerprint},
            counts=report.to_json,
        )
        with recorded_run(store, spec) as run:
            extraction.write(run, on_progress)
            compact(store)
    report.clips_version = store.dataset(Table.CLIPS).version
    report.seconds = round(time.monotonic() - started, 3)
    return report


@dataclass(kw_only=True)
class Extraction:
    """One corpus on its way into one store: `open` plans, `write` does what is planned."""

    source: Source
    store: FeatureStore
    encoder: EncoderSpec
    resources: Resources
    corpus: Corpus
    report: ExtractReport = field(init=False)
    _sequence: int = 0

    @classmethod
    def open(
        cls, source: Source, destination: Destination, encoder: EncoderSpec, resources: Resources
    ) -> "Extraction":
        """Compare the corpus with the store; creates the store's tables, and writes nothing else."""
        corpus = open_corpus(source.corpus, source.root, source.annotations, source.split, source.name)
        # Before anything is written: an ffmpeg that does not work is an error here.
        decode_fingerprint(resources.ffmpeg)
        store = FeatureStore.create(
            destination.uri, encoder.fingerprint, encoder.dim, destination.storage_options
        )
        extraction = cls(source=source, store=store, encoder=encoder, resources=resources, corpus=corpus)
        extraction.refresh_plan()
        return extraction

    @property
    def plan(self) -> ClipPlan:
        return self.report.plan

    @property
    def questions(self) -> QuestionPlan:
        return self.report.questions

    @property
    def has_work(self) -> bool:
        """Whether there is anything to write."""
        plan = self.plan
        gone = bool(plan.gone) and self.source.remove_gone
        return bool(plan.pending or plan.metadata_changed or gone) or self.questions.has_work

    def refresh_plan(self) -> None:
        """Compare the corpus with the store as it is now, and start a new report."""
        options = PlanOptions(
            decode_fingerprint=decode_fingerprint(self.resources.ffmpeg),
            limit=self.source.limit,
            retry_failed=self.source.retry_failed,
            attempts=self.source.attempts,
        )
        self.report = ExtractReport(
            corpus=self.corpus,
            encoder=self.encoder.fingerprint,
            plan=plan_clips(self.corpus, input_records(self.store, self.corpus.name), options),
            questions=self._plan_questions(),
        )

    def _plan_questions(self) -> QuestionPlan:
        return plan_questions(self.corpus, self.store, delete_missing=self.source.remove_gone)

    def write(self, run: ActiveRun, on_progress: OnProgress) -> None:
        """Do what is planned, commit by commit. Raises `R2SCPError` where an input is unaccounted for."""
        self.report.run_id = run.run_id
        run.lease.require()
        self._reconcile()
        self.store.update_metadata(self.plan.metadata_changed, self._properties("redescribe"))
        if self.source.remove_gone and self.plan.gone:
            run.lease.require()
            for table in (Table.CLIPS, Table.FAILURES):
                self.store.commit(table, [], self._properties("gone"), also_delete=self.plan.gone)
        if self.plan.pending:
            self._extract_clips(run, on_progress)
        self.report.questions = self._plan_questions()  # again: clips that were stored now have questions
        run.lease.require()
        write_questions(self.questions, self.store, self.encoder, run.run_id)
        run.lease.require()
        self._reconcile()
        report = self.report
        if report.inputs != report.stored + report.unchanged + report.failed:
            raise R2SCPError(
                f"inputs are unaccounted for: {report.inputs} inputs, but {report.stored} stored, "
                f"{report.unchanged} unchanged, {report.failed} failed; run it again and report this"
            )

    def _properties(self, sequence: str) -> dict[str, str]:
        return {"run": self.report.run_id, "sequence": sequence}

    def _extract_clips(self, run: ActiveRun, on_progress: OnProgress) -> None:
        """Run the flow over the plan's sources and commit what it stages."""
        plan = self.plan
        tables = (self.store.address(Table.CLIPS), self.store.address(Table.FAILURES))
        provenance = Provenance.of(self.report.run_id, self.encoder.fingerprint, self.resources.ffmpeg)
        total = len(plan.pending)
        on_progress(self.report, total)
        staged: list[dict] = []
        with ray_session(self.resources):
            next_commit = time.monotonic() + COMMIT_EVERY_S
            for batch in extract(plan.sources, self.encoder, tables, provenance, self.resources):
                staged.append(batch)
                if len(staged) >= COMMIT_EVERY_FRAGMENTS or time.monotonic() >= next_commit:
                    self._commit(staged, run.lease)
                    staged, next_commit = [], time.monotonic() + COMMIT_EVERY_S
                    on_progress(self.report, total)
            self._commit(staged, run.lease)
        on_progress(self.report, total)
        if plan.pending:
            first = next(iter(plan.pending))
            raise R2SCPError(
                f"{len(plan.pending)} clips went into the flow and did not come out, such as {first}; "
                "run it again and report this"
            )

    def _commit(self, batches: list[dict], lease: Lease) -> None:
        """Make staged rows visible: new clips first, then failures; both replace what they make outdated."""
        if not batches:
            return
        lease.require()
        stored = [Staged.from_json(batch["stored"]) for batch in batches]
        failed = [Staged.from_json(batch["failed"]) for batch in batches]
        stored_ids = [clip_id for staged in stored for clip_id in staged.ids]
        failed_ids = [clip_id for staged in failed for clip_id in staged.ids]
        reasons = [reason for batch in batches for reason in json.loads(batch["reasons"])]
        unchanged_ids = [clip_id for batch in batches for clip_id in batch["unchanged"]]
        for clip_id in (*stored_ids, *failed_ids, *unchanged_ids):
            del self.plan.pending[clip_id]  # KeyError: a clip came out that did not go in, or came out twice
        self._sequence += 1
        properties = self._properties(str(self._sequence))
        # A clip whose failure may be temporary keeps the features that it has.
        lasting = [
            clip_id
            for clip_id, reason in zip(failed_ids, reasons, strict=True)
            if reason not in TRANSIENT_REASONS
        ]
        self.store.commit(Table.CLIPS, stored, properties, also_delete=lasting)
        self.store.commit(Table.FAILURES, failed, properties, also_delete=stored_ids)
        report = self.report
        report.stored += len(stored_ids)
        report.same_content += len(unchanged_ids)
        report.partial += sum(batch["partial"] for batch in batches)
        report.reasons.update(reasons)

    def _reconcile(self) -> None:
        """Delete rows of clips that both tables have, all but the newer."""
        outdated_clips, outdated_failures = superseded(self.store)
        properties = self._properties("reconcile")
        self.store.commit(Table.CLIPS, [], properties, also_delete=outdated_clips)
        self.store.commit(Table.FAILURES, [], properties, also_delete=outdated_failures)
