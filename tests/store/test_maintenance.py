"""Compaction and cleaning: no row is lost, no file is left over, old versions are removed."""

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from r2scp.store.feature_store import FeatureStore
from r2scp.store.maintenance import clean, compact
from r2scp.store.schema import Table

Write = Callable[..., None]
DIM = 4


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.create(str(tmp_path / "store"), "encoder-a", DIM)


def clip(clip_id: str, split: str = "train") -> dict[str, object]:
    return {"clip_id": clip_id, "split": split, "visual": np.eye(DIM, dtype=np.float16)[:2].tolist()}


def rows(store: FeatureStore) -> list[dict]:
    table = store.clips(columns=["clip_id", "visual", "split"])
    return sorted(table.to_pylist(), key=lambda row: row["clip_id"])


def test_compaction_keeps_every_row(store: FeatureStore, write: Write) -> None:
    for number in range(40):
        write(store, Table.CLIPS, [clip(f"c/{number}"), clip(f"d/{number}")])
    store.name_snapshot("before")
    store.commit(Table.CLIPS, [], {}, also_delete=[f"c/{i}" for i in range(0, 40, 3)])
    before, many = rows(store), len(store.dataset(Table.CLIPS).get_fragments())
    assert compact(store) == {"clips": many - 1}
    assert rows(store) == before
    version = store.dataset(Table.CLIPS).version
    assert compact(store) == {"clips": 0}
    assert store.dataset(Table.CLIPS).version == version, "compacting again writes nothing"
    write(store, Table.CLIPS, [clip("c/1", split="test"), clip("c/new")])
    assert store.clips(where="clip_id = 'c/1'")["split"].to_pylist() == ["test"]
    assert store.clips().num_rows == len(before) + 1
    assert clean(store, timedelta(0)).bytes_removed > 0
    assert store.at("before").clips().num_rows == 80, "a snapshot outlives the cleaning"
    assert store.clips().num_rows == len(before) + 1


def test_a_fragment_with_many_deleted_rows_is_rewritten(store: FeatureStore, write: Write) -> None:
    write(store, Table.CLIPS, [clip(f"c/{number}") for number in range(100)])
    store.commit(Table.CLIPS, [], {}, also_delete=[f"c/{i}" for i in range(20)])
    assert compact(store) == {"clips": 0}
    assert store.dataset(Table.CLIPS).get_fragments()[0].num_deletions == 20
    store.commit(Table.CLIPS, [], {}, also_delete=[f"c/{i}" for i in range(20, 30)])
    compact(store)
    assert [f.num_deletions for f in store.dataset(Table.CLIPS).get_fragments()] == [0]
    assert store.clips().num_rows == 70


def test_the_lease_holder_removes_what_a_crash_left(store: FeatureStore, write: Write) -> None:
    write(store, Table.CLIPS, [clip("c/1")])
    folder = Path(store.address(Table.CLIPS).uri)

    def data_files() -> set[Path]:
        return set((folder / "data").iterdir())

    before = data_files()
    (folder / "_transactions" / ".tmpAbC").write_bytes(b"half")  # Lance renames it when it is complete
    store.stage(Table.CLIPS, store.clips())  # and then the process dies
    assert data_files() > before
    clean(store)
    assert data_files() > before, "it may be another writer's work in progress"
    clean(store, exclusive=True)
    assert data_files() == before
    assert not [path for path in folder.rglob(".tmp*")]
    assert rows(store)[0]["clip_id"] == "c/1"


@pytest.mark.slow
def test_many_small_commits_do_not_slow_a_store(store: FeatureStore, write: Write, tmp_path: Path) -> None:
    """500 commits, then maintenance: reading ids takes less than twice as long as from one commit."""
    for number in range(500):
        write(store, Table.CLIPS, [clip(f"c/{number}-{each}") for each in range(4)])
    slow = scan_s(store)
    compact(store)
    clean(store, timedelta(0), exclusive=True)
    fresh = FeatureStore.create(str(tmp_path / "fresh"), "encoder-a", DIM)
    write(fresh, Table.CLIPS, [clip(f"c/{number}-{each}") for number in range(500) for each in range(4)])
    maintained, best = scan_s(store), scan_s(fresh)
    print(
        f"ids of 2,000 clips: {1e3 * slow:.2f} ms after 500 commits, {1e3 * maintained:.2f} ms maintained, "
        f"{1e3 * best:.2f} ms written at once"
    )
    assert maintained < 2 * best
    assert len(store.dataset(Table.CLIPS).get_fragments()) == 1


def scan_s(store: FeatureStore) -> float:
    """Median seconds to open the table and read all ids."""
    seconds = []
    for _ in range(21):
        start = time.perf_counter()
        assert store.clips(["clip_id"]).num_rows == 2_000
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
