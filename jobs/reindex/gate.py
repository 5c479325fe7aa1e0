"""Checks that a store must pass before it is published."""

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r2scp.jobs.settings import check_types
from r2scp.pipelines.neighbours.plan import index_key, read_validity
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.errors import UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, ModalityStatus, Table
from r2scp.store.search.bank import KEY_COLUMNS, unit_keys
from r2scp.store.snapshots import SERVING

DRIFT_SAMPLE = 4_096  # keys per side


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Thresholds; shares are in [0, 1]. Null disables a check.

    `max_lost_share`: of the published clips, and of the published questions, that would disappear.
    `max_dead_share`: of the corpora's files that failed. `max_partial_share`: of the clips with a partial or
    corrupt modality. `min_recall_at_3`, `min_recall_at_10`: of the serving index against an exact search, for
    all clips and for new ones. `max_drift`: of new keys against published ones, see `drift`.
    """

    min_clips: int = 1
    max_lost_share: float | None = 0.1
    max_dead_share: float | None = 0.2
    max_partial_share: float | None = 0.5
    min_recall_at_3: float | None = 0.98
    min_recall_at_10: float | None = 0.98
    max_drift: float | None = None
    recall_queries: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        if self.recall_queries < 1:
            raise UsageError(f"recall_queries must be at least 1; got {self.recall_queries}")
        for key, value in asdict(self).items():
            maximum = float("inf") if key in ("min_clips", "recall_queries", "max_drift") else 1.0
            if value is not None and not 0 <= value <= maximum:
                raise UsageError(f"{key} must be in [0, {maximum:g}]; got {value}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check."""

    what: str
    value: float
    limit: float
    passed: bool

    @classmethod
    def at_least(cls, what: str, value: float, limit: float) -> "Check":
        return cls(what=what, value=value, limit=limit, passed=value >= limit)

    @classmethod
    def at_most(cls, what: str, value: float, limit: float) -> "Check":
        return cls(what=what, value=value, limit=limit, passed=value <= limit)

    def __str__(self) -> str:
        bound = "least" if self.value < self.limit else "most"
        return f"{self.what} is {self.value:.4g}, and must be at {bound} {self.limit:.4g}"


def row_checks(store: FeatureStore, settings: GateSettings) -> list[Check]:
    """Checks of the latest tables: no duplicates, enough clips, few of the published rows lost."""
    table = store.clips(["clip_id", "visual_status", "audio_status"])
    ids = table["clip_id"]
    duplicates = table.num_rows - len(ids.unique())
    questions = store.questions(["question_id", "clip_id"])
    orphans = questions.num_rows - _count_in(questions["clip_id"], ids)
    checks = [
        Check.at_most("duplicate clips", duplicates, 0),
        Check.at_most("questions without a clip", orphans, 0),
        Check.at_least("clips", table.num_rows, settings.min_clips),
    ]
    if settings.max_partial_share is not None and table.num_rows:
        damaged = [ModalityStatus.PARTIAL.value, ModalityStatus.CORRUPT.value]
        audio, visual = (pc.field(f"{m.value}_status").isin(damaged) for m in Modality)
        share = table.filter(audio | visual).num_rows / table.num_rows
        checks.append(Check.at_most("share of partial clips", share, settings.max_partial_share))
    if settings.max_lost_share is not None and SERVING in store.snapshots():
        before = store.at(SERVING)
        for what, now, published in (
            ("clips", ids, before.clips(["clip_id"])["clip_id"]),
            ("questions", questions["question_id"], before.questions(["question_id"])["question_id"]),
        ):
            share = 1 - _count_in(published, now) / len(published) if len(published) else 0.0
            checks.append(
                Check.at_most(
                    f"share of published {what} that would disappear", share, settings.max_lost_share
                )
            )
    return checks


def _count_in(values: pa.ChunkedArray, allowed: pa.ChunkedArray) -> int:
    """How many of `values` are in `allowed`."""
    return pa.table({"value": values}).filter(pc.field("value").isin(allowed.combine_chunks())).num_rows


def failed_check(failed_count: int, inputs: int, settings: GateSettings) -> list[Check]:
    """Check of the share of files that could not be stored."""
    if settings.max_dead_share is None or not inputs:
        return []
    return [Check.at_most("share of failed clips", failed_count / inputs, settings.max_dead_share)]


def neighbour_checks(store: FeatureStore, index: IndexSettings) -> list[Check]:
    """Check that the neighbours of every search belong to the latest clips."""
    version = store.dataset(Table.CLIPS).version
    validities = [read_validity(store, index_key(index, retrieval)) for retrieval in index.retrieval]
    outdated = sum(v is None or v.bank_version != version for v in validities)
    return [Check.at_most("outdated neighbour lists", outdated, 0)]


def drift_checks(store: FeatureStore, run_id: str, settings: GateSettings, seed: int) -> list[Check]:
    """Checks of the drift of a run's new keys against the published keys, per modality."""
    if settings.max_drift is None or SERVING not in store.snapshots():
        return []
    checks, serving = [], store.at(SERVING)
    for modality, column in KEY_COLUMNS.items():
        new, old = _sample(store, column, seed, run_id), _sample(serving, column, seed)
        if len(new) > 1 and len(old) > 1:
            value = drift(old, new)
            checks.append(Check.at_most(f"drift of {modality.value} keys", value, settings.max_drift))
    return checks


def drift(old_ND: np.ndarray, new_ND: np.ndarray) -> float:
    """Squared distance between the means of new and old keys, divided by the variance of the old keys.

    The estimate is unbiased: two samples of one distribution give about 0, sometimes slightly less; 1 is a
    shift by one standard deviation.
    """
    variance = float(old_ND.var(axis=0, ddof=1).sum())
    chance = variance / len(old_ND) + float(new_ND.var(axis=0, ddof=1).sum()) / len(new_ND)
    distance = float(np.square(old_ND.mean(axis=0) - new_ND.mean(axis=0)).sum())
    return (distance - chance) / variance if variance else 0.0


def _sample(store: FeatureStore, column: str, seed: int, run_id: str | None = None) -> np.ndarray:
    """(N, D): the keys in a random sample of the rows of one run, or of all rows."""
    dataset = store.dataset(Table.CLIPS)
    runs = dataset.to_table(columns=["run_id"], scan_in_order=True)["run_id"]
    rows = np.flatnonzero(np.array(runs.to_pylist()) == run_id) if run_id else np.arange(len(runs))
    if len(rows) > DRIFT_SAMPLE:
        rows = np.sort(np.random.default_rng(seed).choice(rows, DRIFT_SAMPLE, replace=False))
    keys, valid = unit_keys(dataset.take(rows, columns=["clip_id", column]), column, store.dim)
    return keys[valid]
