"""How `index` shows itself, and the command line's options as its settings."""

from dataclasses import dataclass

from r2scp.jobs.console import parse_choice, progress_bar, log
from r2scp.jobs.ingest.index import run_index
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval
from r2scp.store.search.bank import BankScope


@dataclass(frozen=True)
class Scope:
    """Whose clips may serve, and whose get neighbours; an empty list means all."""

    bank_corpora: list[str]
    bank_splits: list[str]
    query_corpora: list[str]
    disjoint: bool = False  # splits by source, not the corpora's own


def index_with_progress(
    store: FeatureStore,
    retrieval: list[str] | None,
    scope: Scope,
    neighbours: int,
    cross_weight: float,
    leak_guard: bool,
) -> dict[str, object]:
    """`run_index`, seen on stderr. Raises `UsageError` for a way to compare that does not exist."""
    settings = IndexSettings(
        retrieval=tuple(parse_choice(Retrieval, name, "--retrieval") for name in retrieval or Retrieval),
        bank=BankScope(
            corpora=tuple(scope.bank_corpora), splits=tuple(scope.bank_splits), disjoint=scope.disjoint
        ),
        query_corpora=tuple(scope.query_corpora),
        n=neighbours,
        leak_guard=leak_guard,
        cross_weight=cross_weight,
    )
    if not leak_guard:
        log("note: without the leak guard a clip may be its own neighbour; the rows say so")
    with progress_bar() as bar:
        tasks = {mode: bar.add_task(mode.value, total=None, note="searches") for mode in settings.retrieval}

        def show(mode: str, done: int, total: int) -> None:
            bar.update(tasks[Retrieval(mode)], completed=done, total=total)

        return run_index(store, settings, show).to_json()
