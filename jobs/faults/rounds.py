"""What befalls the job in one round of `jobs torture`, and whether it ended as it may."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from r2scp.jobs.faults.audit import Finding, Kind, writes_together
from r2scp.jobs.faults.corpus import Site
from r2scp.jobs.faults.full_disk import filled
from r2scp.jobs.faults.injection import Fault, Order
from r2scp.jobs.faults.processes import DECODE, EMBED, Ended, Victim
from r2scp.jobs.faults.report import Round
from r2scp.store.errors import R2SCPError

VICTIM_LIMIT_S = 300.0  # one run of the job takes some ten seconds
SKEW_S = 5.0  # by which clocks may differ: what a lease allows for is "a few seconds"
WRONG_CLOCK_S = 600.0
ROOM_BYTES = (16 << 10, 640 << 10)  # left on a full disk; one run writes about the latter
MOST_NTH = {Fault.COMMIT: 8, Fault.STAGED: 3, Fault.TABLES: 3, Fault.NEIGHBOURS: 2, Fault.DISK: 20}
#: From the beginning of each to the blow, at most: about as long as it takes.
MOST_DELAY_S = {Fault.COMMIT: 0.03, Fault.COMPACTION: 0.1, Fault.INDEX: 0.15, Fault.CLEANING: 0.05}
PAUSE_S = 2.0  # at most, before a blow from outside or a second job with a wrong clock
KILLED = -9  # how a process ends that was killed
TWICE = (Fault.TWO, Fault.SKEW, Fault.CLOCK)
FROM_OUTSIDE = {Fault.WORKER: DECODE, Fault.ACTOR: EMBED}
DONE = "torture: published"  # what the job says at its very end
HELD = "another writer holds this store"
STARTS = 3  # of one process, before torture gives up
WORDS = 300  # characters of a job's last ones
REMEMBERED = 5  # runs whose length tells when to kill the next one


@dataclass(kw_only=True)
class Rack:
    """Where jobs are run with a fault. `disk`: the folder of a disk of our own, None where there is none."""

    site: Site
    disk: Path | None
    ray_folder: Path
    num_workers: int
    took_s: list[float] = field(default_factory=list)  # by runs that came to their end
    _waiting: list[Victim] = field(default_factory=list)
    _started: int = 0

    @property
    def _note(self) -> Path:
        return self.site.folder / "writes.jsonl"

    def warm_up(self) -> None:
        """Have a process come up for the next blow."""
        self._started += 1
        folder = self.site.folder
        self._waiting.append(Victim.start(folder, self._started, self.ray_folder, self.num_workers))

    def close(self) -> None:
        """Leave no process."""
        while self._waiting:
            self._waiting.pop().end()

    def strike(self, one: Round) -> None:
        """Run the job with the fault in it, and leave nothing of it but what is in the store."""
        draw, fault, victims = one.draw, one.fault, self._waiting
        self._note.unlink(missing_ok=True)
        while len(victims) < (2 if fault in TWICE else 1):
            self.warm_up()
        self._wait_ready()
        orders = [self._order(one, off_s) for off_s in _clocks_off(one)[: len(victims)]]
        room, fraction, pause_s = draw.randrange(*ROOM_BYTES), draw.random(), draw.uniform(0.0, PAUSE_S)
        with filled(self.disk, room) if fault is Fault.DISK and self.disk else nullcontext():
            for victim, order in zip(victims, orders, strict=True):
                victim.order(order)
                if fault is Fault.CLOCK:
                    time.sleep(pause_s)
            if fault is Fault.DRIVER and victims[0].wait(fraction * min(self.took_s)) is None:
                victims[0].kill()
            elif title := FROM_OUTSIDE.get(fault):
                one.struck = victims[0].kill_child(title, pause_s / 4)
            ended = [victim.wait(VICTIM_LIMIT_S) for victim in victims]
            self.close()
        self._judge(one, ended)

    def _wait_ready(self) -> None:
        """For all that were started. On a busy machine a Ray may not come up in time: it gets another try."""
        for at in range(len(self._waiting)):
            for left in reversed(range(STARTS)):
                try:
                    self._waiting[at].wait_ready()
                    break
                except R2SCPError:
                    if not left:
                        raise
                    self.warm_up()
                    self._waiting[at] = self._waiting.pop()

    def _order(self, one: Round, clock_off_s: float) -> Order:
        draw, fault = one.draw, one.fault
        chance = {Fault.FLAKY: draw.uniform(0.003, 0.03), Fault.DISK: 0.0 if self.disk else 0.3}
        wait_s = draw.choice([0.0, 120.0])
        return Order(
            file=str(self.site.job(wait_s=wait_s if fault in TWICE else 0.0)),
            fault=fault.value,
            note=str(self._note),
            seed=draw.randrange(1 << 30),
            delay_s=draw.uniform(0.0, MOST_DELAY_S.get(fault, 0.0)),
            nth=draw.randint(1, MOST_NTH.get(fault, 1)),
            chance=chance.get(fault, 0.0),
            clock_off_s=clock_off_s,
        )

    def _judge(self, one: Round, ended: Sequence[Ended | None]) -> None:
        """Whether the job ended as it may under this fault."""
        when, fault = "at its end", one.fault
        for end in ended:
            if end is None:
                one.failed(when, f"the job did not end within {VICTIM_LIMIT_S:.0f} s")
                continue
            said = (end.words.strip().splitlines() or [""])[-1]
            one.ended.append(f"{end.code}: {said}"[:WORDS])
            if end.code == 0:
                self.took_s = [*self.took_s[1 - REMEMBERED :], end.seconds]
            elif not _may_end(fault, end):
                one.failed(when, f"the job ended with code {end.code}: {said}")
            if end.code > 0 and "Traceback" in end.words:
                one.notes.append(f"it ended with a traceback: {said}")
        codes = [end.code for end in ended if end]
        late = any(DONE in end.words for end in ended if end)
        if fault not in TWICE:
            one.struck = one.struck if fault in FROM_OUTSIDE else any(codes) and not late
            return
        if 0 not in codes:
            one.failed(when, "of two jobs none did its work")
        if writes_together(self._note):
            one.found(when, [Finding(kind=Kind.TOGETHER, what="two jobs wrote at once")])


def _clocks_off(one: Round) -> tuple[float, float]:
    """By how many seconds the clocks of the first and of the second job are off.

    A wrong clock is wrong so that the first job's lease looks expired to the second.
    """
    if one.fault is Fault.SKEW:
        return one.draw.uniform(-SKEW_S, SKEW_S), one.draw.uniform(-SKEW_S, SKEW_S)
    if one.fault is Fault.CLOCK:
        return one.draw.choice([(-WRONG_CLOCK_S, 0.0), (0.0, WRONG_CLOCK_S)])
    return 0.0, 0.0


def _may_end(fault: Fault, end: Ended) -> bool:
    """Whether a job may end so, which did not do its work."""
    if fault in TWICE:
        return end.code == 1 and HELD in end.words
    if fault in (Fault.DISK, Fault.FLAKY):
        return end.code == 1
    return end.code == KILLED and fault not in FROM_OUTSIDE
