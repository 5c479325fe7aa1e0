"""`jobs torture`: a re-index job is killed, starved and doubled, round after round, and must lose nothing.

Each round changes a small generated corpus, runs the real job with one fault (see `torture_faults`) while a
reader looks on, runs it again without, and then accounts for every clip, question, neighbour and file against
a ledger that knows what was written into the corpus. Choices come from the seed alone; moments of blows
depend on the machine as well.
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
    RenderingKeys,
    Finding,
    Kind,
    audit,
    rendering_keys,
    listing,
    orphaned,
    audit_serving,
    stale,
    duplicates,
)
from r2scp.jobs.faults.corpus import INDEX, Rendered, Site
from r2scp.jobs.faults.full_disk import own_disk
from r2scp.jobs.faults.injection import Fault
from r2scp.jobs.faults.reader import Moment, Reader, moment
from r2scp.jobs.faults.report import Round, TortureReport, TortureWanted, fault_order
from r2scp.jobs.faults.rounds import Rack
from r2scp.jobs.reindex.config import read_config
from r2scp.jobs.reindex.job import run_reindex
from r2scp.pipelines.ray_session import Resources, ray_session
from r2scp.store.errors import R2SCPError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.snapshots import SERVING

__all__ = ["Fault", "TortureReport", "TortureWanted", "run_torture"]

Told = Callable[[str], None]


def run_torture(wanted: TortureWanted, told: Told) -> TortureReport:
    """Torture the job. Raises `R2SCPError` where not even a run without a fault does well."""
    started = time.monotonic()
    report = TortureReport(rounds=wanted.rounds, seed=wanted.seed)
    with ExitStack() as stack:
        ray_folder = _scratch(stack, "r2t")  # sockets of Ray's need a folder with a short name
        folder = wanted.folder.absolute() if wanted.folder else _scratch(stack, "r2scp-torture-")
        disk = folder / "disk"
        disk.mkdir(parents=True)
        mounted = stack.enter_context(own_disk(disk))
        report.disk = "a tmpfs of its own, filled" if mounted else "writes that fail as a full disk's do"
        stack.enter_context(_environment("RAY_TMPDIR", str(ray_folder)))
        stack.enter_context(ray_session(Resources(num_workers=wanted.num_workers)))
        told(f"rendering {wanted.clips} clips")
        rendered = Rendered(
            pool=wanted.pool or folder / "pool",
            clips=wanted.clips,
            seed=wanted.seed,
            num_workers=wanted.num_workers,
        )
        site = Site.make(folder, disk / "store", rendered)
        rack = Rack(
            site=site,
            disk=disk if mounted else None,
            ray_folder=ray_folder,
            num_workers=wanted.num_workers,
        )
        stack.callback(rack.close)
        _Torture(wanted, site, rack, report, told).run()
    report.seconds = round(time.monotonic() - started, 1)
    return report


def _scratch(stack: ExitStack, prefix: str) -> Path:
    """A folder that is gone afterwards, as far as others let go of it."""
    made = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    return Path(stack.enter_context(made))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


class _Torture:
    """The rounds, one after another."""

    def __init__(
        self, wanted: TortureWanted, site: Site, rack: Rack, report: TortureReport, told: Told
    ) -> None:
        self._wanted, self._site, self._rack, self._report, self._told = wanted, site, rack, report, told
        self._features: RenderingKeys = {}

    @property
    def _store(self) -> FeatureStore:
        return FeatureStore.open(str(self._site.store))

    def run(self) -> None:
        self._build()
        self._rack.warm_up()
        faults = fault_order(self._wanted)
        for number, fault in enumerate(faults, 1):
            began = time.monotonic()
            one = Round(number=number, fault=fault, draw=random.Random(f"{self._wanted.seed}/{number}"))
            self._round(one, last=number == len(faults))
            wrong = self._report.record(one, self._wanted.seed)
            said = ", ".join(f"{count} {kind}" for kind, count in wrong.items()) or "nothing lost"
            missed = "" if one.struck else " (the job was over before)"
            seconds = time.monotonic() - began
            self._told(f"round {number} of {len(faults)}: {fault.value}{missed}: {said}, {seconds:.0f} s")
            if wrong and number < len(faults):
                self._keep(number)
                self._build()  # a sound store to go on with, so that nothing is counted twice

    def _keep(self, number: int) -> None:
        """The store as it was found, where the folder is somebody's."""
        if self._wanted.folder:
            shutil.copytree(self._site.store, self._site.folder / f"found-{number}")

    def _build(self) -> None:
        """A new store of the corpus as it is."""
        shutil.rmtree(self._site.store, ignore_errors=True)
        began = time.monotonic()
        outcome = self._job()
        if outcome != "published":
            raise R2SCPError(f"a run without a fault on a new store must publish; got: {outcome}")
        self._rack.took_s.append(time.monotonic() - began)
        if not self._features:
            self._features = rendering_keys(self._store, self._site.expected())

    def _round(self, one: Round, last: bool) -> None:
        changed = self._site.change(one.draw, index_anew=one.fault is Fault.INDEX)
        before = moment(self._store.at(SERVING))
        with Reader(self._store).reading() as reader:
            self._rack.strike(one)
        one.found("while it ran", reader.findings)
        self._report.looks += reader.looks
        if not last:
            self._rack.warm_up()  # comes up while this round's traces are looked at
        self._look(one, before)
        cleaned = self._recover(one)
        if last and not cleaned:  # what a blow after publishing left goes with the next run that has work
            changed += self._site.change(one.draw)
            self._recover(one)
        if one.findings:
            one.notes.append(f"what had changed: {'; '.join(changed)}")

    def _look(self, one: Round, before: Moment) -> None:
        """At what the fault left: what serves is the old moment or the new one, whole; nothing is twice."""
        when = "before recovery"
        try:
            store = self._store
            one.found(when, list(duplicates(store)))
            serving = store.at(SERVING)
            if moment(serving) != before:  # the reader has seen that the old one is as it was
                one.found(when, audit_serving(serving, self._site.expected(), self._features))
        except Exception as error:
            one.found(when, [Finding(kind=Kind.TORN, what=f"the store cannot be read: {error}")])

    def _recover(self, one: Round) -> bool:
        """Run without a fault, account, run again; whether the job cleaned."""
        outcome, when, expected = self._job(), "after recovery", self._site.expected()
        if outcome not in ("published", "nothing to do"):
            one.failed("recovery", outcome)
            return False
        try:
            store = self._store
            one.found(when, audit(store, expected, self._features))
            serving = store.at(SERVING)
            one.found("what serves", audit_serving(serving, expected, self._features))
            one.found(when, stale(serving, INDEX))
            if outcome == "published":
                one.found(when, orphaned(self._site.store))
            self._idle(one)
        except Exception as error:
            one.found(when, [Finding(kind=Kind.TORN, what=f"the store cannot be read: {error}")])
        return outcome == "published"

    def _idle(self, one: Round) -> None:
        """A further run finds nothing to do and leaves every file as it is."""
        files = listing(self._site.store)
        outcome = self._job()
        if outcome != "nothing to do":
            one.failed("further run", f"nothing was to be done, but: {outcome}")
        elif listing(self._site.store) != files:
            one.failed("further run", "it had nothing to do, and wrote")

    def _job(self) -> str:
        """Run the job without a fault: its outcome, or why there is none."""
        try:
            report = run_reindex(read_config(self._site.job()), lambda text: None)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return report.why if report.outcome == "refused" else report.outcome
