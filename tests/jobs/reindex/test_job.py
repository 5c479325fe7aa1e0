"""A re-index job end to end, with real Ray, ffmpeg and towers.

The store follows its corpora, `serving` moves only if the gate passes, readers see one snapshot, and with
nothing to do nothing is written.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from r2scp.jobs.cli.main import app
from r2scp.jobs.reindex.config import read_job_file
from r2scp.jobs.reindex.job import ReindexReport, run_reindex
from r2scp.store.errors import LeaseHeld
from r2scp.store.feature_store import FeatureStore
from r2scp.store.lease import LEASE_SECONDS
from r2scp.store.schema import Table
from r2scp.store.snapshots import SERVING

pytestmark = pytest.mark.usefixtures("local_ray")

NAMES = ("a", "b", "c", "d", "e", "f")


@dataclass
class JobFolder:
    """A folder of recordings with questions, a job's file, and the store that it fills."""

    folder: Path
    weights: Path
    contents: Mapping[str, bytes]
    log: list[str] = field(default_factory=list)
    mtime: int = 1_800_000_000

    def write(self, name: str, content: str = "both.mp4") -> None:
        path = self.folder / "media" / f"{name}.mp4"
        path.write_bytes(self.contents[content])
        self.mtime += 1
        os.utime(path, (self.mtime, self.mtime))  # a new time, however coarse the clock

    def remove(self, name: str) -> None:
        (self.folder / "media" / f"{name}.mp4").unlink()

    def ask(self, *names: str) -> None:
        rows = [{"video": name, "question": f"What is in {name}?", "answer": "tone"} for name in names]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "questions.jsonl").write_text(text)

    def job(self, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "name": "nightly",
            "store": "store",
            "encoder": "imagebind-demo",
            "weights": str(self.weights),
            "corpora": [{"corpus": "folder", "root": "media", "annotations": ["questions.jsonl"]}],
            "index": {"retrieval": ["paired"], "n": 3},
            "gate": {"max_dead_share": 0.5, "max_lost_share": 0.5, "recall_queries": 16},
        }
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    def run(self, dry_run: bool = False, **changes: Any) -> ReindexReport:
        return run_reindex(read_job_file(self.job(**changes)), self.log.append, dry_run)

    @property
    def store(self) -> FeatureStore:
        return FeatureStore.open(str(self.folder / "store"))


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, rendered_media: Mapping[str, bytes]
) -> JobFolder:
    """A job that has run once; only to be copied."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "media").mkdir()
    job = JobFolder(folder, tiny_weights, rendered_media)
    for name in NAMES:
        job.write(name)
    job.ask(*NAMES)
    assert job.run().outcome == "published"
    return job


@pytest.fixture
def running(tmp_path: Path, published: JobFolder) -> JobFolder:
    """A copy of `published`, with the files' times."""
    shutil.copytree(published.folder, tmp_path / "site")
    root, old_root = str(tmp_path / "site" / "media"), str(published.folder / "media")
    job = JobFolder(tmp_path / "site", published.weights, published.contents)
    job.mtime = published.mtime + 100
    store = job.store
    clips = store.clips(["clip_id", "uri", "split", "labels", "source_id"]).to_pylist()
    store.update_metadata([row | {"uri": row["uri"].replace(old_root, root)} for row in clips], {})
    job.run()
    return job


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> (modification time, size) of everything below `folder`."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def clips(store: FeatureStore) -> set[str]:
    return {
        name.removeprefix("folder/").removesuffix(".mp4") for name in store.clips()["clip_id"].to_pylist()
    }


def test_first_run_and_second(published: JobFolder) -> None:
    store = published.store
    serving = store.at(SERVING)
    assert clips(serving) == set(NAMES)
    assert serving.questions().num_rows == len(NAMES)
    assert serving.neighbours().num_rows == 2 * len(NAMES)
    [run] = store.dataset(Table.RUNS).to_table().to_pylist()
    assert (run["kind"], run["status"]) == ("reindex", "done")
    counts = json.loads(run["counts"])
    assert counts["corpora"]["folder"]["stored"] == len(NAMES)
    assert all(check["passed"] for check in counts["checks"])
    assert counts["serving_index"]["kind"] == "exact"
    assert counts["due"] == ["folder: 6 new"]
    before = listing(published.folder / "store")
    again = published.run()
    assert (again.outcome, again.due, again.run_id) == ("nothing to do", [], "")
    assert again.serving == {table.value: v for table, v in store.snapshots()[SERVING].versions.items()}
    assert listing(published.folder / "store") == before, "a run with nothing to do writes nothing"


def test_the_store_follows_its_corpus(running: JobFolder) -> None:
    reader = running.store.at(SERVING)
    running.write("a", "other.mp4")
    running.remove("b")
    running.write("new", "silent.mp4")
    running.write("bad", "text.mp4")
    running.ask("a", "c", "d", "e", "new")  # none about f
    before = listing(running.folder / "store")
    dry = running.run(dry_run=True)
    assert dry.due == ["folder: 2 new, 1 changed, 1 gone, 2 questions deleted from the store"]
    assert listing(running.folder / "store") == before, "a dry run writes nothing"
    report = running.run()
    assert report.outcome == "published"
    expected = {"new": 2, "changed": 1, "gone": 1, "stored": 2, "dead": 1, "unchanged": 4}
    assert report.corpora["folder"].items() >= expected.items()
    now = running.store.at(SERVING)
    assert clips(now) == {"a", "c", "d", "e", "f", "new"}
    assert now.questions().num_rows == 5
    assert clips(reader) == set(NAMES), "a reader keeps what it opened"
    assert clips(running.store.at("previous")) == set(NAMES)
    named = {name for ids in now.neighbours()["nearest_ids"].to_pylist() for name in ids}
    assert named <= set(now.clips()["clip_id"].to_pylist()), "neighbours refer to stored clips"
    assert running.run().outcome == "nothing to do"


def test_a_failed_gate_keeps_the_published_snapshot(running: JobFolder) -> None:
    published = running.store.snapshots()[SERVING]
    for name in ("x", "y", "z"):
        running.write(name, "text.mp4")
    result = CliRunner().invoke(app, ["jobs", "run", str(running.job(gate={"max_dead_share": 0.1}))])
    assert result.exit_code == 1
    assert "share of failed clips is 0.3333, and must be at most 0.1: not published" in result.stderr
    assert f"run {published.run_id} is still published" in result.stderr
    assert running.store.snapshots()[SERVING] == published
    rows = running.store.dataset(Table.RUNS).to_table().to_pylist()
    assert max(rows, key=lambda row: row["started_at"])["status"] == "refused"
    assert running.store.failures().num_rows == 3, "the dead letters are kept"
    again = CliRunner().invoke(app, ["jobs", "run", str(running.job(gate={"max_dead_share": 0.1})), "--json"])
    assert again.exit_code == 0, "clips, questions and neighbours are unchanged"
    assert json.loads(again.stdout)["outcome"] == "nothing to do"


def test_refused_clips_are_published_once_a_run_passes(running: JobFolder) -> None:
    running.write("x", "other.mp4")
    refused = running.run(gate={"min_clips": 100})
    assert (refused.outcome, refused.why.partition(":")[0]) == (
        "refused",
        "clips is 7, and must be at least 100",
    )
    decoded = running.store.clips()["run_id"].to_pylist()
    passed = running.run()
    assert (passed.outcome, passed.due) == ("published", ["changes are not published yet"])
    assert running.store.clips()["run_id"].to_pylist() == decoded, "nothing was extracted again"
    assert "x" in clips(running.store.at(SERVING))


def test_an_unmounted_disk_does_not_empty_the_store(running: JobFolder) -> None:
    for name in ("a", "b", "c", "d"):
        running.remove(name)
    before = running.store.versions()
    refused = running.run()
    assert refused.outcome == "refused"
    assert "4 of the 6 clips of folder are gone" in refused.why
    after = running.store.versions()
    assert {name for name in after if after[name] != before[name]} == {"runs"}
    assert running.run(gone="keep").outcome == "nothing to do"
    assert running.run(gate={"max_lost_share": 0.7}).outcome == "published"
    assert clips(running.store.at(SERVING)) == {"e", "f"}


def test_rollback_and_a_reader_across_it(running: JobFolder) -> None:
    def call(*words: str) -> Result:
        return CliRunner().invoke(app, ["jobs", *words, "--store", str(running.folder / "store"), "--json"])

    running.write("x", "other.mp4")
    second = running.run()
    reader = running.store.at(SERVING)
    rolled = json.loads(call("rollback").stdout)
    assert (rolled["rolled_back"], rolled["clips"], rolled["clips_before"]) == (second.run_id, 6, 7)
    assert "x" not in clips(running.store.at(SERVING))
    assert "x" in clips(reader)
    idle = running.run()
    assert idle.outcome == "nothing to do", "it is not published again by itself"
    assert second.run_id in idle.why
    assert call("rollback").exit_code == 1
    running.write("y", "other.mp4")
    assert running.run().outcome == "published"
    assert {"x", "y"} < clips(running.store.at(SERVING))
    listed = json.loads(call("list").stdout)["runs"]
    assert [(row["kind"], row["status"], row["serving"]) for row in listed[:4]] == [
        ("reindex", "done", True),
        ("rollback", "failed", False),
        ("rollback", "done", False),
        ("reindex", "done", False),
    ]
    shown = json.loads(call("show", second.run_id[-8:]).stdout)
    assert (shown["run_id"], shown["counts"]["outcome"]) == (second.run_id, "published")
    assert shown["versions_before"]["clips"] < shown["versions_after"]["clips"]
    assert call("show", "reindex").exit_code == 2
    assert "storage_options" not in shown["config"]


def test_a_second_job_waits_or_names_the_writer(running: JobFolder) -> None:
    running.write("x", "other.mp4")
    first = running.store.lease("jobs run other")
    with first.hold():
        with pytest.raises(
            LeaseHeld, match=r"another writer holds this store: jobs run other on .*, process \d+"
        ):
            running.run()
        assert clips(running.store) == set(NAMES)
        timer = threading.Thread(target=lambda: _until(lambda: bool(running.log)) or released.set())
        released = threading.Event()
        timer.start()
        outcome: list[ReindexReport] = []
        waiting = threading.Thread(target=lambda: outcome.append(running.run(wait_s=LEASE_SECONDS)))
        waiting.start()
        assert released.wait(LEASE_SECONDS)
        assert running.log[0].startswith("waiting up to 60 s: another writer holds this store")
    waiting.join(120)
    timer.join()
    assert outcome[0].outcome == "published"


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_readers_always_see_one_snapshot(running: JobFolder) -> None:
    """Read `serving` repeatedly while clips and questions change."""
    snapshots: list[tuple[set[str], set[str], set[str]]] = []
    errors: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            serving = running.store.at(SERVING)
            stored = clips(serving)
            about = {row.removeprefix("folder/") for row in serving.questions()["clip_id"].to_pylist()}
            rows = serving.neighbours(["clip_id", "nearest_ids"]).to_pylist()
            named = {clip_id for row in rows for clip_id in [row["clip_id"], *row["nearest_ids"]]}
            named = {clip_id.removeprefix("folder/").removesuffix(".mp4") for clip_id in named}
            if not named <= stored:
                errors.append(f"neighbours refer to {named - stored}")
            if (stored, about, named) not in snapshots:
                snapshots.append((stored, about, named))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn, name in enumerate(("x", "y")):
            running.write(name, "other.mp4")
            running.remove(NAMES[turn])
            running.ask(*[n for n in NAMES if n not in NAMES[: turn + 1]], name)
            assert running.run().outcome == "published"
    finally:
        stop.set()
        reader.join()
    assert errors == []
    assert len(snapshots) <= 3
    assert snapshots[0][0] == set(NAMES)
    assert snapshots[-1][0] == (set(NAMES) | {"x", "y"}) - {"a", "b"}


def test_two_folders_with_names_of_their_own(running: JobFolder) -> None:
    """The same relative path in two folders is two clips."""
    shutil.copytree(running.folder / "media", running.folder / "porch")
    corpora = [
        {"corpus": "folder", "root": "media", "annotations": ["questions.jsonl"]},
        {"corpus": "folder", "root": "porch", "name": "porch"},
    ]
    assert running.run(corpora=corpora).outcome == "published"
    clips: Any = running.store.status()["clips"]
    by_corpus = clips["by_corpus"]
    assert by_corpus == {"folder": 6, "porch": 6}
    assert running.run(corpora=corpora).outcome == "nothing to do"
