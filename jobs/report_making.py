"""A report on its way: what is wanted, what was found, and the parts that are done."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from r2scp.jobs.report_blocks import Section
from r2scp.jobs.report_probe import Probe
from r2scp.jobs.report_runs import Gap, RunFacts
from r2scp.store.errors import R2SCPError
from r2scp.store.feature_store import FeatureStore

GALLERY = 12  # questions
Told = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ReportWanted:
    """What to report on. `store` None: the one that the first run was trained on. `studies`: where `study`
    keeps its results. `asked`: the words of the command, for the page."""

    runs: tuple[Path, ...]
    store: str | None = None
    fingerprint: str | None = None
    storage_options: Mapping[str, str] | None = None
    studies: Path | None = None
    out: Path | None = None
    figures: Path | None = None
    gallery: int = GALLERY
    device: str = "cpu"
    weights: str | None = None  # of the encoder that filled the store; by themselves the ones that fit
    asked: tuple[str, ...] = ("report",)


@dataclass(kw_only=True)
class Making:
    """A report on its way."""

    wanted: ReportWanted
    told: Told
    runs: list[RunFacts]
    store: FeatureStore | None = None
    no_store: str = ""  # why there is none
    sections: list[Section] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)  # by run

    @contextmanager
    def part(self, name: str, heading: str) -> Iterator[Section]:
        """A section on its way: what our errors say becomes a gap in it."""
        self.told(heading)
        section, started = Section(name=name, heading=heading), time.monotonic()
        try:
            yield section
        except R2SCPError as error:
            self.lack(section, Gap(section=name, what=heading, why=str(error)))
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.sections.append(section)

    def lack(self, section: Section, gap: Gap) -> None:
        self.gaps.append(gap)
        section.gap(gap)

    def of_runs(self, section: Section, name: str) -> None:
        """What the runs' own folders lack of a section."""
        for gap in (gap for run in self.runs for gap in run.gaps if gap.section == name):
            self.lack(section, gap)

    def opened(self) -> FeatureStore:
        """Raises `R2SCPError` that says why there is no store."""
        if self.store is None:
            raise R2SCPError(f"{self.no_store}; name the store with --store")
        return self.store
