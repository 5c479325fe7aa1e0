"""`index` with its progress on stderr."""

from r2scp.jobs.console import log, progress_bar
from r2scp.jobs.ingest.index import run_index
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval


def index_with_progress(store: FeatureStore, settings: IndexSettings) -> dict[str, object]:
    """`run_index` with progress on stderr."""
    if not settings.leak_guard:
        log("note: without the leak guard a clip may be its own neighbour; its rows are marked")
    with progress_bar() as bar:
        tasks = {mode: bar.add_task(mode.value, total=None, note="searches") for mode in settings.retrieval}

        def show(mode: str, done: int, total: int) -> None:
            bar.update(tasks[Retrieval(mode)], completed=done, total=total)

        return run_index(store, settings, show).to_json()
