"""`FeatureStore`: opening reports errors clearly, reads and writes agree, maintenance loses no row.

The end-to-end test runs on a folder and, through a server on loopback, on an object store.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from r2scp.store import feature_store
from r2scp.store.errors import FailureReason, FingerprintMismatch, LeaseHeld, StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.maintenance import clean, superseded
from r2scp.store.runs import RunSpec, recorded_run
from r2scp.store.schema import SCHEMA_VERSION, Table

DIM = 4
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture(params=["folder", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "folder":
        return SimpleNamespace(uri=str(tmp_path / "store"), options={})
    return request.getfixturevalue("object_store")("features")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.create(str(tmp_path / "store"), "encoder-a", DIM)


def clip(clip_id: str, **changes: object) -> dict[str, object]:
    sequence = np.eye(DIM, dtype=np.float16)[:2]
    key = sequence.astype(np.float32).mean(0)
    return {
        "clip_id": clip_id,
        "corpus": clip_id.split("/")[0],
        "video_id": clip_id.split("/")[-1],
        "split": "train",
        "labels": ["a", "b"],
        "bytes": 10,
        "mtime_ns": 1_800_000_000_123_456_789,
        "content_sha256": "ab" * 32,
        "visual": list(sequence),
        "visual_key": key / np.linalg.norm(key),
        "visual_status": "present",
        "audio_status": "absent",
        "decode_fingerprint": "grid1",
        "ingested_at": NOON,
    } | changes


def failure(clip_id: str, **changes: object) -> dict[str, object]:
    return {
        "clip_id": clip_id,
        "corpus": clip_id.split("/")[0],
        "reason": FailureReason.CORRUPT.value,
        "attempts": 1,
        "bytes": 20,
        "mtime_ns": 5,
        "content_sha256": "cd" * 32,
        "decode_fingerprint": "grid1",
        "at": NOON,
    } | changes


def put(store: FeatureStore, table: Table, *rows: dict[str, object]) -> int:
    staged = store.stage(table, pa.Table.from_pylist(list(rows), schema=store.address(table).schema))
    return store.commit(table, [staged], {"run": "test"})


def test_end_to_end(location: Any) -> None:
    """Create, lease, stage, commit, replace, tag, compact, clean, on any kind of store."""
    store = FeatureStore.create(location.uri, "encoder-a", DIM, location.options)
    with store.lease("test").hold() as lease:
        lease.require()
        with pytest.raises(LeaseHeld):
            store.lease("another").acquire()
        put(store, Table.CLIPS, *(clip(f"c/{i}") for i in range(5)))
        store.publish("r")
        put(store, Table.CLIPS, clip("c/3", split="test"))
        store.record_run({"run_id": "r", "status": "done"})
    with store.lease("next").hold():
        pass
    opened = FeatureStore.open(location.uri, storage_options=location.options)
    assert (opened.fingerprint, opened.dim) == ("encoder-a", DIM)
    assert opened.clips(columns=["clip_id"]).num_rows == 5
    assert opened.clips(where="split = 'test'")["clip_id"].to_pylist() == ["c/3"]
    assert opened.at("serving").clips(where="split = 'test'").num_rows == 0
    clean(opened, older_than=timedelta(0))
    assert opened.at("serving").clips().num_rows == opened.clips(version="serving").num_rows == 5
    assert opened.dataset(Table.RUNS).count_rows() == 1


def test_a_missing_store_says_how_to_create_one(tmp_path: Path) -> None:
    assert FeatureStore.encoders(str(tmp_path)) == {}
    with pytest.raises(StoreError, match=r"no store at .*nowhere.*r2scp-pipe extract --store"):
        FeatureStore.open(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_several_encoders_must_be_distinguished(tmp_path: Path) -> None:
    uri = str(tmp_path / "store")
    FeatureStore.create(uri, "encoder-a", DIM)
    FeatureStore.create(uri, "encoder-b", 2 * DIM)
    FeatureStore.create(uri, "encoder-a", DIM)  # again: nothing happens
    assert FeatureStore.encoders(uri) == {"encoder-a": DIM, "encoder-b": 2 * DIM}
    with pytest.raises(StoreError, match=r"several encoders.*encoder-a, encoder-b"):
        FeatureStore.open(uri)
    assert FeatureStore.open(uri, "encoder-b").dim == 2 * DIM
    with pytest.raises(FingerprintMismatch, match=r"no encoder encoder-c.*it has: encoder-a, encoder-b"):
        FeatureStore.open(uri, "encoder-c")
    with pytest.raises(FingerprintMismatch, match=r"encoder-a has width 4.*got 5"):
        FeatureStore.create(uri, "encoder-a", 5)


def test_another_layout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(feature_store, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        FeatureStore.create(str(tmp_path), "encoder-a", DIM)
    with pytest.raises(StoreError, match=rf"layout {SCHEMA_VERSION + 1}.*reads layout {SCHEMA_VERSION}"):
        FeatureStore.open(str(tmp_path))


def test_an_interrupted_creation_is_completed(tmp_path: Path) -> None:
    """The catalogue is written last; without it there is no store, and creating it again completes it."""
    half = FeatureStore(str(tmp_path), "encoder-a", DIM)
    half.address(Table.CLIPS).create()
    with pytest.raises(StoreError, match="no store"):
        FeatureStore.open(str(tmp_path))
    store = FeatureStore.create(str(tmp_path), "encoder-a", DIM)
    assert set(store.versions()) >= {"clips", "questions", "failures", "runs"}


def test_a_relative_path_works_from_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in other folders and must stage rows where the driver commits them."""
    monkeypatch.chdir(tmp_path)
    store = FeatureStore.create("./mine/", "encoder-a", DIM)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    put(store, Table.CLIPS, clip("c/1"))
    assert store.uri == str(tmp_path / "mine")
    assert FeatureStore.open(str(tmp_path / "mine")).clips().num_rows == 1


def test_missing_keeps_the_order(store: FeatureStore) -> None:
    put(store, Table.CLIPS, clip("c/2"), clip("c/4"))
    assert store.missing(f"c/{i}" for i in (5, 4, 3, 2, 1)) == ["c/5", "c/3", "c/1"]


def test_status_counts_rows(store: FeatureStore) -> None:
    put(store, Table.CLIPS, clip("c/1"), clip("c/2", split="test", visual_status="partial"), clip("d/1"))
    put(store, Table.FAILURES, failure("c/9"))
    put(store, Table.QUESTIONS, {"question_id": "c/q", "corpus": "c", "split": "val"})
    store.publish("r")
    status: Any = store.status()
    assert status["clips"] == {
        "rows": 3,
        "by_corpus": {"c": 2, "d": 1},
        "by_split": {"train": 2, "test": 1},
        "visual": {"present": 2, "partial": 1},
        "audio": {"absent": 3},
    }
    assert status["questions"] == {"rows": 1, "by_split": {"val": 1}}
    assert status["failures"] == {"rows": 1, "by_reason": {"corrupt": 1}}
    assert status["versions"].items() >= {"clips": 2, "questions": 2, "failures": 2, "runs": 1}.items()
    [(name, snapshot)] = status["snapshots"].items()
    assert (name, snapshot["run_id"]) == ("serving", "r")
    assert snapshot["versions"] == {"clips": 2, "questions": 2, "neighbours": 1}
    assert (status["encoder"], status["dim"]) == ("encoder-a", DIM)


def test_rows_are_read_as_written(store: FeatureStore) -> None:
    put(store, Table.CLIPS, clip("c/1"))
    [row] = store.clips().to_pylist()
    assert row["mtime_ns"] == 1_800_000_000_123_456_789
    assert row["ingested_at"] == NOON
    assert row["labels"] == ["a", "b"]
    assert np.array_equal(np.array(row["visual"]), np.eye(DIM)[:2])
    assert row["audio"] is None
    assert np.linalg.norm(row["visual_key"]) == pytest.approx(1, abs=1e-6)


def test_read_errors_are_clear(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"colour.*its columns: clip_id, corpus"):
        store.clips(columns=["colour"])
    with pytest.raises(StoreError, match="cannot read clips"):
        store.clips(where="split = = 'x'")
    with pytest.raises(StoreError, match="no-such-tag"):
        store.clips(version="no-such-tag")


def test_lancedb_opens_the_database(store: FeatureStore) -> None:
    put(store, Table.CLIPS, clip("c/1"), clip("c/2", visual_key=[0, 0, 0, 1]))
    database = lancedb.connect(store.database)
    table = database.open_table("clips")
    assert table.count_rows() == 2
    nearest = table.search([0.0, 0.0, 0.0, 0.9], vector_column_name="visual_key").limit(1).to_list()
    assert nearest[0]["clip_id"] == "c/2"


def test_the_older_of_row_and_failure_is_superseded(store: FeatureStore) -> None:
    """A transient failure says nothing about the content and does not supersede the clip."""
    put(store, Table.CLIPS, *(clip(f"c/{name}") for name in ("fine", "broke", "mended", "slow")))
    later, sooner = NOON + timedelta(seconds=1), NOON - timedelta(seconds=1)
    put(
        store,
        Table.FAILURES,
        failure("c/broke", at=later),
        failure("c/mended", at=sooner),
        failure("c/slow", at=later, reason=FailureReason.TIMEOUT.value),
        failure("c/never"),
    )
    assert superseded(store) == (["c/broke"], ["c/mended"])


def test_metadata_is_updated_without_the_features(store: FeatureStore) -> None:
    put(store, Table.CLIPS, clip("c/1"), clip("c/2"), clip("c/3"))
    before = {row["clip_id"]: row for row in store.clips().to_pylist()}
    version = store.dataset(Table.CLIPS).version
    new = {"split": "test", "labels": ["it's", "b;--"], "uri": "/new/2.mp4", "source_id": "s2"}
    store.update_metadata([{"clip_id": "c/2"} | new], {"run": "r"})
    after = {row["clip_id"]: row for row in store.clips().to_pylist()}
    assert after == before | {"c/2": before["c/2"] | new}
    assert store.dataset(Table.CLIPS).version == version + 1
    store.update_metadata([], {"run": "r"})
    assert store.dataset(Table.CLIPS).version == version + 1


def test_killed_runs_are_marked(store: FeatureStore) -> None:
    for run_id, status in (("killed", "running"), ("whole", "done")):
        store.record_run({"run_id": run_id, "kind": "extract", "status": status, "started_at": NOON})
    spec = RunSpec(kind="extract", purpose="test", config={}, counts=dict)
    with recorded_run(store, spec) as run:
        runs = store.dataset(Table.RUNS).to_table(columns=["run_id", "status"]).to_pylist()
    statuses = {row["run_id"]: row["status"] for row in runs}
    assert statuses == {"killed": "interrupted", "whole": "done", run.run_id: "running"}
