"""`jobs torture`: crash test of the re-index job, which must not lose anything.

Each round changes a small generated corpus, runs the real job with one fault (see `injection`) while a reader
looks on, runs it again without a fault, and audits every clip, question, neighbour and file against a ledger
of what was written into the corpus. Choices depend on the seed alone, the times of kills on the machine too.
"""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from r2scp.jobs.faults.audit import (
    Finding,
    Kind,
    RenderingKeys,
    audit,
    audit_serving,
    duplicates,
    file_states,
    orphaned_files,
    outdated_neighbours,
    rendering_keys,
)
from r2scp.jobs.faults.corpus import INDEX, ChangingCorpus, RenderSettings
from r2scp.jobs.faults.full_disk import mounted_disk
from r2scp.jobs.faults.injection import Fault
from r2scp.jobs.faults.reader import SnapshotReader, Versions, versions_read
from r2scp.jobs.faults.report import CrashTestReport, CrashTestSettings, Round, fault_sequence
from r2scp.jobs.faults.rounds import FaultRunner
from r2scp.jobs.reindex.config import read_job_file
from r2scp.jobs.reindex.job import run_reindex
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.errors import R2SCPError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.snapshots import SERVING

__all__ = ["CrashTestReport", "CrashTestSettings", "Fault", "run_crash_test"]

Log = Callable[[str], None]


def run_crash_test(settings: CrashTestSettings, log: Log) -> CrashTestReport:
    """Run the test. Raises `R2SCPError` if even a run without a fault fails."""
    started = time.monotonic()
    report = CrashTestReport(rounds=settings.rounds, seed=settings.seed)
    with ExitStack() as stack:
        ray_folder = _temporary_folder(stack, "r2t")  # Ray's sockets need a short path
        folder = (
            settings.folder.absolute() if settings.folder else _temporary_folder(stack, "r2scp-crash-test-")
        )
        disk = folder / "disk"
        disk.mkdir(parents=True)
        mounted = stack.enter_context(mounted_disk(disk))
        report.disk = "a private tmpfs, filled" if mounted else "simulated: writes fail with ENOSPC"
        stack.enter_context(_environment("RAY_TMPDIR", str(ray_folder)))
        stack.enter_context(ray_session(Resources(num_workers=settings.num_workers)))
        log(f"rendering {settings.clips} clips")
        rendering = RenderSettings(
            pool=settings.pool or folder / "pool",
            clips=settings.clips,
            seed=settings.seed,
            num_workers=settings.num_workers,
        )
        corpus = ChangingCorpus.create(folder, disk / "store", rendering)
        runner = FaultRunner(
            corpus=corpus,
            disk=disk if mounted else None,
            ray_folder=ray_folder,
            num_workers=settings.num_workers,
        )
        stack.callback(runner.close)
        _CrashTest(settings, corpus, runner, report, log).run()
    report.seconds = round(time.monotonic() - started, 1)
    return report


def _temporary_folder(stack: ExitStack, prefix: str) -> Path:
    """A temporary folder; files that are still open elsewhere may survive it."""
    folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    return Path(stack.enter_context(folder))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if previous is None else os.environ.update({name: previous})


class _CrashTest:
    """The rounds, one after the other."""

    def __init__(
        self,
        settings: CrashTestSettings,
        corpus: ChangingCorpus,
        runner: FaultRunner,
        report: CrashTestReport,
        log: Log,
    ) -> None:
        self._settings, self._corpus, self._runner, self._report, self._log = (
            settings,
            corpus,
            runner,
            report,
            log,
        )
        self._keys: RenderingKeys = {}

    @property
    def _store(self) -> FeatureStore:
        return FeatureStore.open(str(self._corpus.store))

    def run(self) -> None:
        self._build()
        self._runner.start_process()
        faults = fault_sequence(self._settings)
        for number, fault in enumerate(faults, 1):
            began = time.monotonic()
            round_ = Round(number=number, fault=fault, rng=random.Random(f"{self._settings.seed}/{number}"))
            self._run_round(round_, last=number == len(faults))
            counts = self._report.record(round_, self._settings.seed)
            summary = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing lost"
            missed = "" if round_.hit else " (the job had ended before)"
            seconds = time.monotonic() - began
            self._log(f"round {number} of {len(faults)}: {fault.value}{missed}: {summary}, {seconds:.0f} s")
            if counts and number < len(faults):
                self._save_store(number)
                self._build()  # start from a good store, so that nothing is counted twice

    def _save_store(self, number: int) -> None:
        """Keep a copy of the damaged store if the folder is the user's."""
        if self._settings.folder:
            shutil.copytree(self._corpus.store, self._corpus.folder / f"round-{number}")

    def _build(self) -> None:
        """Build a new store of the current corpus."""
        shutil.rmtree(self._corpus.store, ignore_errors=True)
        began = time.monotonic()
        outcome = self._run_job()
        if outcome != "published":
            raise R2SCPError(f"a run without a fault on a new store must publish; got: {outcome}")
        self._runner.durations_s.append(time.monotonic() - began)
        if not self._keys:
            self._keys = rendering_keys(self._store, self._corpus.expected())

    def _run_round(self, round_: Round, last: bool) -> None:
        changed = self._corpus.change(round_.rng, switch_index=round_.fault is Fault.INDEX)
        before = versions_read(self._store.at(SERVING))
        with SnapshotReader(self._store).reading() as reader:
            self._runner.inject(round_)
        round_.add("during the run", reader.findings)
        self._report.looks += reader.reads
        if not last:
            self._runner.start_process()  # starts while this round is audited
        self._check_before_recovery(round_, before)
        cleaned = self._recover(round_)
        # files left by a kill after publishing go with the next run that has work to do
        if last and not cleaned:
            changed += self._corpus.change(round_.rng)
            self._recover(round_)
        if round_.findings:
            round_.notes.append(f"changes in this round: {'; '.join(changed)}")

    def _check_before_recovery(self, round_: Round, before: Versions) -> None:
        """The published snapshot must be the old one or a complete new one; nothing is duplicated."""
        when = "before recovery"
        try:
            store = self._store
            round_.add(when, list(duplicates(store)))
            serving = store.at(SERVING)
            if versions_read(serving) != before:  # the reader has checked the old one
                round_.add(when, audit_serving(serving, self._corpus.expected(), self._keys))
        except Exception as error:
            round_.add(when, [Finding(kind=Kind.TORN, what=f"the store cannot be read: {error}")])

    def _recover(self, round_: Round) -> bool:
        """Run without a fault, audit, run again; returns whether the job cleaned up."""
        outcome, when, expected = self._run_job(), "after recovery", self._corpus.expected()
        if outcome not in ("published", "nothing to do"):
            round_.add_failure("recovery", outcome)
            return False
        try:
            store = self._store
            round_.add(when, audit(store, expected, self._keys))
            serving = store.at(SERVING)
            round_.add("published snapshot", audit_serving(serving, expected, self._keys))
            round_.add(when, outdated_neighbours(serving, INDEX))
            if outcome == "published":
                round_.add(when, orphaned_files(self._corpus.store))
            self._check_idle_run(round_)
        except Exception as error:
            round_.add(when, [Finding(kind=Kind.TORN, what=f"the store cannot be read: {error}")])
        return outcome == "published"

    def _check_idle_run(self, round_: Round) -> None:
        """Another run has nothing to do and changes no file."""
        files = file_states(self._corpus.store)
        outcome = self._run_job()
        if outcome != "nothing to do":
            round_.add_failure("next run", f"expected nothing to do, got: {outcome}")
        elif file_states(self._corpus.store) != files:
            round_.add_failure("next run", "it had nothing to do but wrote files")

    def _run_job(self) -> str:
        """Run the job without a fault; its outcome, or the error."""
        try:
            report = run_reindex(read_job_file(self._corpus.write_job()), lambda text: None)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return report.why if report.outcome == "refused" else report.outcome
