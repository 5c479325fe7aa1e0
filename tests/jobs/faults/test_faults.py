"""The crash test finds nothing in a correct job, and finds what it looks for in a broken one.

The audit is checked against stores damaged on purpose, one kind of damage at a time; its ledger against the
files themselves. Slow tests run the real job in processes of its own, without and with a planted bug.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from r2scp.jobs.faults.audit import (
    Finding,
    Kind,
    RenderingKeys,
    audit,
    audit_serving,
    duplicates,
    file_states,
    inconsistencies,
    orphaned_files,
    outdated_neighbours,
    rendering_keys,
    snapshot_digest,
    writes_overlap,
)
from r2scp.jobs.faults.corpus import INDEX, ChangingCorpus, Expected, RenderSettings
from r2scp.jobs.faults.full_disk import fill_disk, mounted_disk
from r2scp.jobs.faults.injection import Fault
from r2scp.jobs.faults.reader import SnapshotReader, versions_read
from r2scp.jobs.faults.report import MIN_CLIPS, CrashTestReport, CrashTestSettings, Round, fault_sequence
from r2scp.jobs.faults.rounds import FaultRunner
from r2scp.jobs.faults.run import run_crash_test
from r2scp.jobs.reindex.config import read_job_file
from r2scp.jobs.reindex.job import run_reindex
from r2scp.store.commits import Staged
from r2scp.store.errors import UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.snapshots import PREVIOUS, SERVING

SEED = 1
Audit = Callable[..., list[Finding]]


@pytest.fixture(scope="module")
def rendering(tmp_path_factory: pytest.TempPathFactory) -> RenderSettings:
    """The clips of all tests in this file, rendered once."""
    pool = tmp_path_factory.mktemp("faults") / "pool"
    return RenderSettings(pool=pool, clips=MIN_CLIPS, seed=SEED, num_workers=2)


@pytest.fixture
def corpus(tmp_path: Path, rendering: RenderSettings) -> ChangingCorpus:
    return ChangingCorpus.create(tmp_path / "corpus", tmp_path / "corpus" / "store", rendering)


@pytest.fixture(scope="module")
def intact(
    tmp_path_factory: pytest.TempPathFactory, rendering: RenderSettings, local_ray: None
) -> tuple[ChangingCorpus, RenderingKeys]:
    """A corpus with a damaged clip whose job has run without a fault; read-only."""
    folder = tmp_path_factory.mktemp("intact")
    corpus = ChangingCorpus.create(folder / "corpus", folder / "store", rendering)
    assert run(corpus) == "published"
    keys = rendering_keys(FeatureStore.open(str(corpus.store)), corpus.expected())
    corpus.change(random.Random(SEED))
    assert corpus.expected().failed
    assert run(corpus) == "published"
    return corpus, keys


def run(corpus: ChangingCorpus) -> str:
    return run_reindex(read_job_file(corpus.write_job()), lambda text: None).outcome


@pytest.fixture
def store(intact: tuple[ChangingCorpus, RenderingKeys], tmp_path: Path) -> FeatureStore:
    """A copy of the intact store, to be damaged."""
    return FeatureStore.open(shutil.copytree(intact[0].store, tmp_path / "store").as_posix())


@pytest.fixture
def expected(intact: tuple[ChangingCorpus, RenderingKeys]) -> Expected:
    return intact[0].expected()


@pytest.fixture
def audited(intact: tuple[ChangingCorpus, RenderingKeys], store: FeatureStore, expected: Expected) -> Audit:
    """Audits `store` against the ledger, or against a changed one."""
    return lambda ledger=expected: audit(store, ledger, intact[1])


def messages(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings]


def put(store: FeatureStore, table: Table, row: dict[str, Any]) -> None:
    rows = pa.Table.from_pylist([row], schema=store.address(table).schema)
    store.commit(table, [store.stage(table, rows)], {})


# -- the audit


def test_an_intact_store_has_no_findings(intact: tuple[ChangingCorpus, RenderingKeys]) -> None:
    corpus, keys = intact
    store, expected = FeatureStore.open(str(corpus.store)), corpus.expected()
    assert audit(store, expected, keys) == []
    assert audit_serving(store.at(SERVING), expected, keys) == []
    assert outdated_neighbours(store, INDEX) == []
    assert orphaned_files(corpus.store) == []
    assert list(duplicates(store)) == []
    assert len(expected.clips) + len(expected.failed) == len(corpus.contents)
    assert len(expected.questions) == store.questions().num_rows > len(expected.clips)


def test_missing_rows_are_lost(store: FeatureStore, expected: Expected, audited: Audit) -> None:
    clip, question = sorted(expected.clips)[0], sorted(expected.questions)[0]
    store.commit(Table.CLIPS, [], {}, also_delete=[clip])
    findings = audited()
    kinds = {finding.kind.value for finding in findings}
    assert {"lost", "unaccounted", "torn"} <= kinds, "its questions and neighbours are still there"
    assert f"clip {clip} is missing" in messages(findings)
    assert inconsistencies(store)
    store.commit(Table.QUESTIONS, [], {}, also_delete=[question])
    lost = [finding.what for finding in audited() if finding.kind is Kind.LOST]
    assert sorted(lost) == [f"clip {clip} is missing", f"question {question} is missing"]


def test_outdated_content_is_lost(store: FeatureStore, expected: Expected, audited: Audit) -> None:
    clip, other = sorted(expected.clips)[:2]
    assert expected.clips[clip][1] != expected.clips[other][1], "two different videos"
    rows = {row["clip_id"]: row for row in store.clips().to_pylist()}
    put(store, Table.CLIPS, rows[clip] | {"visual_key": rows[other]["visual_key"]})
    assert messages(audited()) == [f"visual_key of {clip} come from another video"]
    put(store, Table.CLIPS, rows[clip] | {"content_sha256": "0" * 64})
    [finding] = audited()
    assert (finding.kind, finding.what) == (Kind.LOST, f"clip {clip} has outdated content")
    put(store, Table.CLIPS, rows[clip] | {"split": "elsewhere"})
    put(store, Table.QUESTIONS, store.questions().to_pylist()[0] | {"answer": "forty"})
    assert [finding.kind for finding in audited()] == [Kind.LOST] * 2


def test_rows_without_input_and_inputs_without_rows(
    store: FeatureStore, expected: Expected, audited: Audit
) -> None:
    failed, clip, question = (
        next(iter(ids)) for ids in (expected.failed, expected.clips, expected.questions)
    )
    store.commit(Table.FAILURES, [], {}, also_delete=[failed])
    assert messages(audited()) == [f"damaged clip {failed} has no dead letter"]

    def without(rows: dict[str, Any], key: str) -> dict[str, Any]:
        return {name: row for name, row in rows.items() if name != key}

    fewer = replace(expected, clips=without(expected.clips, clip))
    assert f"clip {clip} must not be in the store" in messages(audited(fewer))
    fewer = replace(
        expected, failed=without(expected.failed, failed), questions=without(expected.questions, question)
    )
    [finding] = audited(fewer)
    assert finding.kind is Kind.UNACCOUNTED
    assert finding.what == f"question {question} must not be in the store"


@pytest.mark.parametrize("table", [Table.CLIPS, Table.QUESTIONS])
def test_duplicate_ids(store: FeatureStore, table: Table) -> None:
    dataset = store.dataset(table)
    dataset.insert(dataset.to_table(limit=1))
    assert [finding.kind for finding in duplicates(store)] == [Kind.DUPLICATE]


def test_neighbours_that_differ_from_an_exact_search(store: FeatureStore) -> None:
    row = next(row for row in store.neighbours().to_pylist() if len(row["nearest_ids"]) > 1)
    put(store, Table.NEIGHBOURS, row | {"nearest_ids": row["nearest_ids"][::-1]})
    assert len(outdated_neighbours(store, INDEX)) == 1
    store.commit(Table.NEIGHBOURS, [], {}, also_delete=[row["neighbour_id"]])
    assert len(outdated_neighbours(store, INDEX)) == 1


def test_files_that_no_version_names(store: FeatureStore) -> None:
    folder = Path(store.uri)
    before = set(file_states(folder))
    staged = store.stage(Table.CLIPS, store.clips().slice(0, 2))
    [left] = [path for path in set(file_states(folder)) - before if path.endswith(".lance")]
    [finding] = orphaned_files(folder)
    assert finding.kind is Kind.ORPHANED
    assert finding.what.split(" ")[0] == str(Path(left).relative_to(folder))
    store.commit(Table.CLIPS, [staged], {})
    assert orphaned_files(folder) == []
    (Path(store.database) / "leases.lance" / "data" / "of a heartbeat").write_bytes(b"")
    assert orphaned_files(folder) == [], "another process may be writing it"
    index = next(folder.rglob("*.idx"))
    shutil.copytree(index.parent, index.parent.parent / "another")
    (folder / "half.manifest").write_bytes(b"")
    (index.parent.parent.parent / "_transactions" / "9-9.txn").write_bytes(b"")
    assert len(orphaned_files(folder)) == 2 + len(list(index.parent.iterdir()))


def test_a_reader_reports_torn_snapshots(store: FeatureStore) -> None:
    with SnapshotReader(store).reading() as reader:
        pass
    assert reader.findings == []
    assert reader.reads >= 2, "at the beginning and at the end"
    serving = store.at(SERVING)
    reader = SnapshotReader(store)
    reader.digests[versions_read(serving)] = snapshot_digest(store.at(PREVIOUS))
    with reader.reading():
        pass
    [finding] = reader.findings
    assert finding.kind is Kind.TORN
    assert "changed while they were published" in finding.what
    with (blind := SnapshotReader(store)).reading():
        for path in (Path(serving.dataset(Table.QUESTIONS).uri) / "data").iterdir():
            path.unlink()
    assert {what.partition(":")[0] for what in messages(blind.findings)} == {
        "a reader could not read the published snapshot"
    }


def test_writes_in_turn_and_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "writes.jsonl"
    assert not writes_overlap(path)
    for spans, overlap in (
        ([(1, 0.0, 1.0), (1, 2.0, 3.0), (2, 3.5, 4.0)], False),
        ([(1, 0.0, 1.0), (2, 1.5, 1.6), (1, 2.0, 3.0)], True),
    ):
        path.write_text("".join(json.dumps(span) + "\n" for span in spans))
        assert writes_overlap(path) == overlap


# -- the ledger


def test_the_ledger_matches_the_files(corpus: ChangingCorpus) -> None:
    """Over many changes: digests match the files, questions the annotation files, limits are kept."""
    rng, states = random.Random(7), Counter()
    for _ in range(60):
        corpus.change(rng)
        expected = corpus.expected()
        videos = list((corpus.folder / "corpus" / "videos").iterdir())
        digests = {f"demo/{path.stem}": hashlib.sha256(path.read_bytes()).hexdigest() for path in videos}
        assert digests == {k: v[0] for k, v in expected.clips.items()} | expected.failed
        questions = {}
        for split in ("train", "val", "test"):
            rows = json.loads((corpus.folder / "corpus" / "json" / f"avqa-{split}.json").read_text())
            assert rows, "an annotation file without rows would be rejected"
            for row in rows:
                questions[f"demo/{row['question_id']}"] = (f"demo/{row['video_id']}", split, row["anser"])
        assert expected.questions == {k: v for k, v in questions.items() if v[0] in expected.clips}
        assert any(v[2] == "train" for v in expected.clips.values()), "the bank is never empty"
        states.update(failed=len(expected.failed), absent=len(corpus.rows) - len(digests))
        times = {path.stat().st_mtime_ns for path in videos}
        assert len(times) == len(videos), "a coarse clock cannot hide a change"
    assert min(states["failed"], states["absent"]) > 30


def test_the_same_seed_gives_the_same_changes(tmp_path: Path, rendering: RenderSettings) -> None:
    def changes(name: str, seed: int) -> tuple[list[str], Expected]:
        corpus = ChangingCorpus.create(tmp_path / name, tmp_path / name / "store", rendering)
        done = [text for number in range(5) for text in corpus.change(random.Random(f"{seed}/{number}"))]
        return done, corpus.expected()

    assert changes("one", 3) == changes("two", 3)
    assert changes("three", 3)[0] != changes("four", 4)[0]


# -- faults, settings and report


def test_every_fault_finds_the_functions_it_wraps() -> None:
    """In a process of its own, which is wrapped for good."""
    program = (
        "from r2scp.jobs.faults.injection import Fault, FaultOrder, install\n"
        "for fault in Fault: install(FaultOrder(file='', fault=fault.value, writes_file='x', chance=0.5))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_all_faults_are_used_equally_often() -> None:
    settings = CrashTestSettings(rounds=3 * len(Fault) + 2)
    faults = fault_sequence(settings)
    counts = Counter(faults)
    assert set(counts) == set(Fault)
    assert set(counts.values()) <= {3, 4}
    assert faults == fault_sequence(settings)
    assert faults != fault_sequence(replace(settings, seed=2))


def test_settings_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="new or empty folder"):
        CrashTestSettings(folder=tmp_path)
    with pytest.raises(UsageError, match="rounds 0, clips 3"):
        CrashTestSettings(rounds=0, clips=3)


def test_a_report_counts_findings_and_faults() -> None:
    report = CrashTestReport(rounds=2, seed=SEED)
    good = Round(number=1, fault=Fault.TABLES, rng=random.Random(0))
    bad = Round(number=2, fault=Fault.DRIVER, rng=random.Random(0), hit=False)
    lost = Finding(kind=Kind.LOST, what="clip a is missing")
    bad.add("after recovery", [lost, lost])
    bad.add_failure("next run", "it wrote")
    assert not report.record(good, SEED)
    assert not report.bad
    assert report.record(bad, SEED) == {"lost": 1, "failed": 1}
    assert report.bad
    assert (report.faults, report.missed) == ({Fault.TABLES.value: 1}, {Fault.DRIVER.value: 1})
    values = report.to_json()
    assert json.loads(json.dumps(values)) == values
    assert {kind.value: values[kind.value] for kind in Kind if values[kind.value]} == {"lost": 1, "failed": 1}


# -- the disk


def test_a_private_disk_runs_full_and_is_unmounted(tmp_path: Path) -> None:
    with mounted_disk(tmp_path) as mounted:
        if not mounted:
            pytest.skip("this user may not mount a tmpfs")
        assert os.path.ismount(tmp_path)
        with fill_disk(tmp_path, 8 << 10):
            (tmp_path / "fits").write_bytes(bytes(4 << 10))
            with pytest.raises(OSError, match="No space left"):
                (tmp_path / "does not").write_bytes(bytes(64 << 10))
        (tmp_path / "does").write_bytes(bytes(64 << 10))
    assert not os.path.ismount(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_goes_with_a_killed_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from r2scp.jobs.faults.full_disk import mounted_disk\n"
        "with mounted_disk(Path(sys.argv[1])) as mounted: print(mounted, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "True":
            process.kill()
            pytest.skip("this user may not mount a tmpfs")
        [guard] = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    guard.wait(60)
    assert not os.path.ismount(tmp_path)


# -- the whole crash test


def settings_of(rendering: RenderSettings, folder: Path, rounds: int, *faults: Fault) -> CrashTestSettings:
    return CrashTestSettings(
        rounds=rounds,
        seed=SEED,
        clips=rendering.clips,
        pool=rendering.pool,
        folder=folder,
        faults=faults or tuple(Fault),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_short_crash_test_finds_nothing(
    tmp_path: Path, rendering: RenderSettings, temporary_folders: Callable[[], set[str]]
) -> None:
    lines: list[str] = []
    processes = job_processes()
    settings = settings_of(rendering, tmp_path / "work", 2, Fault.TABLES, Fault.UNTAGGED)
    report = run_crash_test(settings, lines.append)
    assert report.findings == []
    assert not report.bad
    assert report.faults == {Fault.TABLES.value: 1, Fault.UNTAGGED.value: 1}, "each kill took effect"
    assert report.looks > 2
    assert len(lines) == 3
    assert temporary_folders() == set()
    assert job_processes() <= processes
    assert not os.path.ismount(tmp_path / "work" / "disk")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_planted_bug_is_found(
    tmp_path: Path, rendering: RenderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first fault, a commit of clips forgets one fragment."""
    rounds: list[Round] = []
    inject, commit = FaultRunner.inject, FeatureStore.commit

    def recorded(self: FaultRunner, round_: Round) -> None:
        inject(self, round_)
        rounds.append(round_)

    def forgetful(
        self: FeatureStore, table: Table, staged: list[Staged], properties: Any, also_delete: Any = ()
    ) -> int:
        full = [batch for batch in staged if batch.ids] if table is Table.CLIPS and rounds else []
        kept = [batch for batch in staged if batch not in full[:1]]
        return commit(self, table, kept, properties, also_delete)

    monkeypatch.setattr(FaultRunner, "inject", recorded)
    monkeypatch.setattr(FeatureStore, "commit", forgetful)
    report = run_crash_test(settings_of(rendering, tmp_path / "work", 1, Fault.STAGED), lambda text: None)
    assert report.counts["lost"] > 0
    assert report.bad
    assert {finding["round"] for finding in report.findings} == {1}
    assert report.counts["failed"], "the next run has to do again what was forgotten"


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_dozen_rounds_lose_nothing(tmp_path: Path, rendering: RenderSettings) -> None:
    report = run_crash_test(settings_of(rendering, tmp_path / "work", 12), print)
    assert report.findings == []
    assert sum(report.faults.values()) >= 9, report.missed


def job_processes() -> set[psutil.Process]:
    """Job processes and disk guards started from here; not the shared Ray's workers, which come and go."""
    return {
        process
        for process in psutil.Process().children(recursive=True)
        if "r2scp.jobs.faults" in words(process)
    }


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture
def temporary_folders(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Temporary folders that this process made and that still exist."""
    folders: set[str] = set()

    def recorded(*arguments: Any, make: Callable[..., str] = tempfile.mkdtemp, **named: Any) -> str:
        folders.add(folder := make(*arguments, **named))
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", recorded)
    return lambda: {folder for folder in folders if os.path.exists(folder)}
