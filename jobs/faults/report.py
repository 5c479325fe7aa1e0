"""What `jobs torture` is asked for, and its account."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r2scp.jobs.faults.audit import Finding, Kind
from r2scp.jobs.faults.injection import Fault
from r2scp.store.errors import UsageError

LEAST_CLIPS = 12


@dataclass(frozen=True, kw_only=True)
class TortureWanted:
    """How much. `folder`: where to work, new or empty; None for one that is gone afterwards.

    `pool`: where renderings of the same clips and seed are, or are to be kept; None: in the folder. `faults`:
    of which the rounds take equal shares.
    """

    rounds: int = 30
    seed: int = 1
    folder: Path | None = None
    pool: Path | None = None
    clips: int = 14
    num_workers: int = 2
    faults: tuple[Fault, ...] = tuple(Fault)

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.clips < LEAST_CLIPS or self.num_workers < 1 or not self.faults:
            raise UsageError(
                f"torture needs rounds ≥ 1, clips ≥ {LEAST_CLIPS}, workers ≥ 1 and some fault; got rounds "
                f"{self.rounds}, clips {self.clips}, workers {self.num_workers}, {len(self.faults)} faults"
            )
        if self.folder and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UsageError(f"torture needs a new or empty folder; {self.folder} is neither")


@dataclass(kw_only=True)
class TortureReport:
    """The account; `bad` unless every count of a kind is 0. `faults`: how often each struck; `missed`: how
    often the job was over before it could. `disk`: how disks were made to run full."""

    rounds: int
    seed: int
    disk: str = ""
    faults: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {kind.value: 0 for kind in Kind})
    findings: list[dict[str, object]] = field(default_factory=list)
    notes: list[dict[str, object]] = field(default_factory=list)  # what is no fault, and worth a look
    each: list[dict[str, object]] = field(default_factory=list)  # round by round: fault, how the job ended
    looks: int = 0  # of readers
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return any(self.counts.values())

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON; the counts stand at the top."""
        said = asdict(self)
        return {name: said.pop(name) for name in ("rounds", "seed")} | said.pop("counts") | said

    def record(self, one: "Round", seed: int) -> Counter[str]:
        """Take in one round; how much of which kind was wrong in it."""
        kinds: Counter[str] = Counter()
        struck = self.faults if one.struck else self.missed
        struck[one.fault.value] = struck.get(one.fault.value, 0) + 1
        for when, finding in dict.fromkeys(one.findings):
            kinds[finding.kind.value] += 1
            self.counts[finding.kind.value] += 1
            about: dict[str, object] = {"round": one.number, "seed": seed, "fault": one.fault.value}
            self.findings.append(about | {"when": when, "kind": finding.kind.value, "what": finding.what})
        ended = {"ended": one.ended, "struck": one.struck, "wrong": kinds.total()}
        self.each.append({"round": one.number, "fault": one.fault.value} | ended)
        self.notes += [{"round": one.number, "fault": one.fault.value, "what": what} for what in one.notes]
        return kinds


@dataclass(kw_only=True)
class Round:
    """One round: what befell the job, and what was found. `struck`: the job was not over before."""

    number: int
    fault: Fault
    draw: random.Random
    struck: bool = True
    findings: list[tuple[str, Finding]] = field(default_factory=list)  # when, what
    ended: list[str] = field(default_factory=list)  # how: exit code and last words, of each process
    notes: list[str] = field(default_factory=list)

    def found(self, when: str, findings: Sequence[Finding]) -> None:
        self.findings += [(when, finding) for finding in findings]

    def failed(self, when: str, what: str) -> None:
        self.found(when, [Finding(kind=Kind.FAILED, what=what)])


def fault_order(wanted: TortureWanted) -> list[Fault]:
    """Which fault in which round: all of them, in an order drawn with the seed, then all again."""
    draw, order = random.Random(wanted.seed), []
    while len(order) < wanted.rounds:
        order += draw.sample(wanted.faults, len(wanted.faults))
    return order[: wanted.rounds]
