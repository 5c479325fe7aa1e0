"""Settings and report of `jobs torture`."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r2scp.jobs.faults.audit import Finding, Kind
from r2scp.jobs.faults.injection import Fault
from r2scp.store.errors import UsageError

MIN_CLIPS = 12


@dataclass(frozen=True, kw_only=True)
class CrashTestSettings:
    """Size of the test. `folder`: working folder, new or empty; None for a temporary one.

    `pool`: folder that keeps renderings of the same clips and seed; None: in the working folder. `faults`:
    used equally often.
    """

    rounds: int = 30
    seed: int = 1
    folder: Path | None = None
    pool: Path | None = None
    clips: int = 14
    num_workers: int = 2
    faults: tuple[Fault, ...] = tuple(Fault)

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.clips < MIN_CLIPS or self.num_workers < 1 or not self.faults:
            raise UsageError(
                f"the crash test needs rounds ≥ 1, clips ≥ {MIN_CLIPS}, workers ≥ 1 and a fault; got rounds "
                f"{self.rounds}, clips {self.clips}, workers {self.num_workers}, {len(self.faults)} faults"
            )
        if self.folder and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UsageError(f"the crash test needs a new or empty folder; {self.folder} is neither")


@dataclass(kw_only=True)
class CrashTestReport:
    """Counts of findings by kind, and the findings. `faults`: how often each took effect; `missed`: how often
    the job had ended before; `disk`: how full disks were produced."""

    rounds: int
    seed: int
    disk: str = ""
    faults: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {kind.value: 0 for kind in Kind})
    findings: list[dict[str, object]] = field(default_factory=list)
    notes: list[dict[str, object]] = field(default_factory=list)  # not wrong, but worth a look
    each: list[dict[str, object]] = field(default_factory=list)  # per round: fault, how the job ended
    looks: int = 0  # reads of the published snapshot
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return any(self.counts.values())

    def to_json(self) -> dict[str, object]:
        """Plain values for JSON, with the counts at the top level."""
        values = asdict(self)
        return {name: values.pop(name) for name in ("rounds", "seed")} | values.pop("counts") | values

    def record(self, round_: "Round", seed: int) -> Counter[str]:
        """Add one round; returns its number of findings by kind."""
        kinds: Counter[str] = Counter()
        tally = self.faults if round_.hit else self.missed
        tally[round_.fault.value] = tally.get(round_.fault.value, 0) + 1
        for when, finding in dict.fromkeys(round_.findings):
            kinds[finding.kind.value] += 1
            self.counts[finding.kind.value] += 1
            about: dict[str, object] = {"round": round_.number, "seed": seed, "fault": round_.fault.value}
            self.findings.append(about | {"when": when, "kind": finding.kind.value, "what": finding.what})
        exits = {"ended": round_.exits, "struck": round_.hit, "wrong": kinds.total()}
        self.each.append({"round": round_.number, "fault": round_.fault.value} | exits)
        self.notes += [
            {"round": round_.number, "fault": round_.fault.value, "what": what} for what in round_.notes
        ]
        return kinds


@dataclass(kw_only=True)
class Round:
    """One round and its findings. `hit`: the fault took effect before the job ended."""

    number: int
    fault: Fault
    rng: random.Random
    hit: bool = True
    findings: list[tuple[str, Finding]] = field(default_factory=list)  # (step, finding)
    exits: list[str] = field(default_factory=list)  # exit code and last line of each process
    notes: list[str] = field(default_factory=list)

    def add(self, when: str, findings: Sequence[Finding]) -> None:
        self.findings += [(when, finding) for finding in findings]

    def add_failure(self, when: str, what: str) -> None:
        self.add(when, [Finding(kind=Kind.FAILED, what=what)])


def fault_sequence(settings: CrashTestSettings) -> list[Fault]:
    """The fault of each round: all of them in random order, repeated."""
    rng, faults = random.Random(settings.seed), []
    while len(faults) < settings.rounds:
        faults += rng.sample(settings.faults, len(settings.faults))
    return faults[: settings.rounds]
