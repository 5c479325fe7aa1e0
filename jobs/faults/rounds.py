"""One round of `jobs torture`: runs the job with a fault and checks how it ended."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from r2scp.jobs.faults.audit import Finding, Kind, writes_overlap
from r2scp.jobs.faults.corpus import JOB_NAME, ChangingCorpus
from r2scp.jobs.faults.full_disk import fill_disk
from r2scp.jobs.faults.injection import Fault, FaultOrder
from r2scp.jobs.faults.processes import DECODE_WORKER, EMBED_ACTOR, ExitResult, JobProcess
from r2scp.jobs.faults.report import Round
from r2scp.store.errors import R2SCPError

RUN_TIMEOUT_S = 300.0  # one run takes about ten seconds
SKEW_S = 5.0  # largest clock difference of the fault SKEW; leases allow for far more
WRONG_CLOCK_S = 600.0
FREE_BYTES = (16 << 10, 640 << 10)  # left on a full disk; one run writes about the larger amount
#: The fault strikes at one of the first so many occurrences, drawn.
MAX_NTH = {Fault.COMMIT: 8, Fault.STAGED: 3, Fault.TABLES: 3, Fault.NEIGHBOURS: 2, Fault.DISK: 20}
#: From the start of each step to the kill: about the step's duration.
MAX_DELAY_S = {Fault.COMMIT: 0.03, Fault.COMPACTION: 0.1, Fault.INDEX: 0.15, Fault.CLEANING: 0.05}
MAX_PAUSE_S = 2.0  # before a child is killed, or a second job with a wrong clock starts
SIGKILL_CODE = -9
TWO_JOBS = (Fault.TWO, Fault.SKEW, Fault.CLOCK)
CHILD_TITLES = {Fault.WORKER: DECODE_WORKER, Fault.ACTOR: EMBED_ACTOR}
PUBLISHED_MESSAGE = f"{JOB_NAME}: published"  # the job's last line
LEASE_MESSAGE = "another writer holds this store"
MAX_STARTS = 3  # per process
MAX_MESSAGE = 300  # characters of a job's last line
KEPT_DURATIONS = 5  # recent run times, from which to choose when to kill


@dataclass(kw_only=True)
class FaultRunner:
    """Runs jobs with faults. `disk`: the folder of a private disk, None if there is none."""

    corpus: ChangingCorpus
    disk: Path | None
    ray_folder: Path
    num_workers: int
    durations_s: list[float] = field(default_factory=list)  # of complete runs
    _processes: list[JobProcess] = field(default_factory=list)
    _started: int = 0

    @property
    def _writes_file(self) -> Path:
        return self.corpus.folder / "writes.jsonl"

    def start_process(self) -> None:
        """Start a process for the next round."""
        self._started += 1
        folder = self.corpus.folder
        self._processes.append(JobProcess.start(folder, self._started, self.ray_folder, self.num_workers))

    def close(self) -> None:
        """End all processes."""
        while self._processes:
            self._processes.pop().clean_up()

    def inject(self, round_: Round) -> None:
        """Run the job with the round's fault, and remove everything of it except the store."""
        rng, fault, jobs = round_.rng, round_.fault, self._processes
        self._writes_file.unlink(missing_ok=True)
        while len(jobs) < (2 if fault in TWO_JOBS else 1):
            self.start_process()
        self._wait_ready()
        orders = [self._draw_order(round_, off_s) for off_s in _clock_offsets(round_)[: len(jobs)]]
        free_bytes, fraction, pause_s = (
            rng.randrange(*FREE_BYTES),
            rng.random(),
            rng.uniform(0.0, MAX_PAUSE_S),
        )
        with fill_disk(self.disk, free_bytes) if fault is Fault.DISK and self.disk else nullcontext():
            for job, order in zip(jobs, orders, strict=True):
                job.send(order)
                if fault is Fault.CLOCK:
                    time.sleep(pause_s)
            if fault is Fault.DRIVER and jobs[0].wait(fraction * min(self.durations_s)) is None:
                jobs[0].kill()
            elif title := CHILD_TITLES.get(fault):
                round_.hit = jobs[0].kill_child(title, pause_s / 4)
            exits = [job.wait(RUN_TIMEOUT_S) for job in jobs]
            self.close()
        self._check_exits(round_, exits)

    def _wait_ready(self) -> None:
        """Wait for all started processes, with retries: on a busy machine Ray may not start in time."""
        for at in range(len(self._processes)):
            for retries in reversed(range(MAX_STARTS)):
                try:
                    self._processes[at].wait_ready()
                    break
                except R2SCPError:
                    if not retries:
                        raise
                    self.start_process()
                    self._processes[at] = self._processes.pop()

    def _draw_order(self, round_: Round, clock_offset_s: float) -> FaultOrder:
        rng, fault = round_.rng, round_.fault
        chance = {Fault.FLAKY: rng.uniform(0.003, 0.03), Fault.DISK: 0.0 if self.disk else 0.3}
        wait_s = rng.choice([0.0, 120.0])
        return FaultOrder(
            file=str(self.corpus.write_job(wait_s=wait_s if fault in TWO_JOBS else 0.0)),
            fault=fault.value,
            writes_file=str(self._writes_file),
            seed=rng.randrange(1 << 30),
            delay_s=rng.uniform(0.0, MAX_DELAY_S.get(fault, 0.0)),
            nth=rng.randint(1, MAX_NTH.get(fault, 1)),
            chance=chance.get(fault, 0.0),
            clock_offset_s=clock_offset_s,
        )

    def _check_exits(self, round_: Round, exits: Sequence[ExitResult | None]) -> None:
        """Record a failure if the job ended in a way that this fault does not explain."""
        when, fault = "at the end of the job", round_.fault
        for result in exits:
            if result is None:
                round_.add_failure(when, f"the job did not end within {RUN_TIMEOUT_S:.0f} s")
                continue
            last_line = (result.stderr.strip().splitlines() or [""])[-1]
            round_.exits.append(f"{result.code}: {last_line}"[:MAX_MESSAGE])
            if result.code == 0:
                self.durations_s = [*self.durations_s[1 - KEPT_DURATIONS :], result.seconds]
            elif not _exit_allowed(fault, result):
                round_.add_failure(when, f"the job ended with code {result.code}: {last_line}")
            if result.code > 0 and "Traceback" in result.stderr:
                round_.notes.append(f"the job ended with a traceback: {last_line}")
        codes = [result.code for result in exits if result]
        published = any(PUBLISHED_MESSAGE in result.stderr for result in exits if result)
        if fault not in TWO_JOBS:
            round_.hit = round_.hit if fault in CHILD_TITLES else any(codes) and not published
            return
        if 0 not in codes:
            round_.add_failure(when, "neither of two jobs succeeded")
        if writes_overlap(self._writes_file):
            round_.add(when, [Finding(kind=Kind.TOGETHER, what="two jobs wrote at the same time")])


def _clock_offsets(round_: Round) -> tuple[float, float]:
    """Clock offsets in seconds of the first and the second job.

    With a wrong clock the first job's lease looks expired to the second.
    """
    if round_.fault is Fault.SKEW:
        return round_.rng.uniform(-SKEW_S, SKEW_S), round_.rng.uniform(-SKEW_S, SKEW_S)
    if round_.fault is Fault.CLOCK:
        return round_.rng.choice([(-WRONG_CLOCK_S, 0.0), (0.0, WRONG_CLOCK_S)])
    return 0.0, 0.0


def _exit_allowed(fault: Fault, result: ExitResult) -> bool:
    """Whether an unsuccessful job may end like this."""
    if fault in TWO_JOBS:
        return result.code == 1 and LEASE_MESSAGE in result.stderr
    if fault in (Fault.DISK, Fault.FLAKY):
        return result.code == 1
    return result.code == SIGKILL_CODE and fault not in CHILD_TITLES
