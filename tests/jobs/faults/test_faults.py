"""Torture finds nothing in a sound job, and would find what it looks for.

Its accounts are held against stores that were spoilt on purpose, one kind of wrong at a time; its ledger
against the files themselves; and a short torture of the real job, in processes of its own, is sound until a
bug is planted in it.
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
    RenderingKeys,
    Finding,
    Kind,
    audit,
    digest,
    listing,
    inconsistencies,
    orphaned,
    rendering_keys,
    audit_serving,
    stale,
    duplicates,
    writes_together,
)
from r2scp.jobs.faults.corpus import INDEX, Expected, Rendered, Site
from r2scp.jobs.faults.full_disk import filled, own_disk
from r2scp.jobs.faults.injection import Fault
from r2scp.jobs.faults.reader import Reader, moment
from r2scp.jobs.faults.report import LEAST_CLIPS, Round, TortureWanted, fault_order
from r2scp.jobs.faults.rounds import Rack
from r2scp.jobs.faults.run import run_torture
from r2scp.jobs.reindex import job as reindex
from r2scp.jobs.reindex.config import read_config
from r2scp.store.commits import Staged
from r2scp.store.errors import UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.snapshots import PREVIOUS, SERVING

SEED = 1


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """What all tests of this file render, once."""
    pool = tmp_path_factory.mktemp("torture") / "pool"
    return Rendered(pool=pool, clips=LEAST_CLIPS, seed=SEED, num_workers=2)


@pytest.fixture
def site(tmp_path: Path, rendered: Rendered) -> Site:
    return Site.make(tmp_path / "site", tmp_path / "site" / "store", rendered)


@pytest.fixture(scope="module")
def sound(
    tmp_path_factory: pytest.TempPathFactory, rendered: Rendered, local_ray: None
) -> tuple[Site, RenderingKeys]:
    """A site with a damaged clip, whose job has run without a fault; only to be read."""
    folder = tmp_path_factory.mktemp("sound")
    site = Site.make(folder / "site", folder / "store", rendered)
    assert run(site) == "published"
    features = rendering_keys(FeatureStore.open(str(site.store)), site.expected())
    site.change(random.Random(SEED))
    assert site.expected().dead
    assert run(site) == "published"
    return site, features


def run(site: Site) -> str:
    return reindex.run_reindex(read_config(site.job()), lambda text: None).outcome


@pytest.fixture
def spoilt(sound: tuple[Site, RenderingKeys], tmp_path: Path) -> FeatureStore:
    """A copy of the sound store, to be spoilt."""
    return FeatureStore.open(shutil.copytree(sound[0].store, tmp_path / "store").as_posix())


def kinds(found: list[Finding]) -> Counter[str]:
    return Counter(finding.kind.value for finding in found)


# -- the accounts


def test_a_sound_store_has_nothing_wrong(sound: tuple[Site, RenderingKeys]) -> None:
    site, features = sound
    store, expected = FeatureStore.open(str(site.store)), site.expected()
    assert audit(store, expected, features) == []
    assert audit_serving(store.at(SERVING), expected, features) == []
    assert stale(store, INDEX) == []
    assert orphaned(site.store) == []
    assert len(expected.clips) + len(expected.dead) == len(site.contents)
    assert len(expected.questions) == store.questions().num_rows > len(expected.clips)


def test_what_is_gone_is_lost(spoilt: FeatureStore, sound: tuple[Site, RenderingKeys]) -> None:
    site, features = sound
    gone, question = sorted(site.expected().clips)[0], sorted(site.expected().questions)[0]
    spoilt.commit(Table.CLIPS, [], {}, also_delete=[gone])
    found = audit(spoilt, site.expected(), features)
    assert {"lost", "unaccounted", "torn"} <= set(kinds(found)), (
        "its questions and neighbours are still there"
    )
    assert f"clip {gone} is not there" in {finding.what for finding in found}
    assert inconsistencies(spoilt)
    spoilt.commit(Table.QUESTIONS, [], {}, also_delete=[question])
    lost = [
        finding.what for finding in audit(spoilt, site.expected(), features) if finding.kind is Kind.LOST
    ]
    assert sorted(lost) == [f"clip {gone} is not there", f"question {question} is not there"]


def test_a_row_of_another_content_is_lost(spoilt: FeatureStore, sound: tuple[Site, RenderingKeys]) -> None:
    site, features = sound
    expected = site.expected()
    one, other = sorted(expected.clips)[:2]
    assert expected.clips[one][1] != expected.clips[other][1], "two films"
    rows = {row["clip_id"]: row for row in spoilt.clips().to_pylist()}
    put(spoilt, Table.CLIPS, rows[one] | {"visual_key": rows[other]["visual_key"]})
    found = audit(spoilt, expected, features)
    assert [f.what for f in found] == [f"visual_key of {one} are of another film"]
    put(spoilt, Table.CLIPS, rows[one] | {"content_sha256": "0" * 64})
    [wrong] = audit(spoilt, expected, features)
    assert (wrong.kind, wrong.what) == (Kind.LOST, f"clip {one} is there with an earlier content")
    put(spoilt, Table.CLIPS, rows[one] | {"split": "elsewhere"})
    assert kinds(audit(spoilt, expected, features)) == {"lost": 1}


def test_an_answer_that_was_not_followed_is_lost(spoilt: FeatureStore, sound: tuple[Site, RenderingKeys]) -> None:
    site, features = sound
    row = spoilt.questions().to_pylist()[0]
    put(spoilt, Table.QUESTIONS, row | {"answer": "forty"})
    assert kinds(audit(spoilt, site.expected(), features)) == {"lost": 1}


def test_rows_of_no_input_and_inputs_without_rows(spoilt: FeatureStore, sound: tuple[Site, RenderingKeys]) -> None:
    site, features = sound
    expected = site.expected()
    dead = next(iter(expected.dead))
    spoilt.commit(Table.FAILURES, [], {}, also_delete=[dead])
    assert [f.what for f in audit(spoilt, expected, features)] == [
        f"damaged clip {dead} has no dead letter"
    ]
    others = {key: value for key, value in expected.dead.items() if key != dead}
    clip_id = next(iter(expected.clips))
    less = replace(expected, clips={k: v for k, v in expected.clips.items() if k != clip_id})
    assert f"clip {clip_id} is there, and must not be" in {f.what for f in audit(spoilt, less, features)}
    question_id = next(iter(expected.questions))
    asked = {key: value for key, value in expected.questions.items() if key != question_id}
    found = audit(spoilt, replace(expected, dead=others, questions=asked), features)
    assert [(f.kind, f.what) for f in found] == [
        (Kind.UNACCOUNTED, f"question {question_id} is there, and must not be")
    ]


def put(store: FeatureStore, table: Table, row: dict[str, Any]) -> None:
    rows = pa.Table.from_pylist([row], schema=store.address(table).schema)
    store.commit(table, [store.stage(table, rows)], {})


@pytest.mark.parametrize("table", [Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS, Table.FAILURES])
def test_what_is_there_twice(spoilt: FeatureStore, table: Table) -> None:
    assert list(duplicates(spoilt)) == []
    dataset = spoilt.dataset(table)
    dataset.insert(dataset.to_table(limit=1))
    assert [finding.kind for finding in duplicates(spoilt)] == [Kind.DUPLICATE]


def test_neighbours_that_a_full_search_would_not_give(spoilt: FeatureStore) -> None:
    row = next(row for row in spoilt.neighbours().to_pylist() if len(row["nearest_ids"]) > 1)
    put(spoilt, Table.NEIGHBOURS, row | {"nearest_ids": row["nearest_ids"][::-1]})
    assert len(stale(spoilt, INDEX)) == 1
    spoilt.commit(Table.NEIGHBOURS, [], {}, also_delete=[row["neighbour_id"]])
    assert len(stale(spoilt, INDEX)) == 1


def test_files_that_no_version_names(spoilt: FeatureStore) -> None:
    folder = Path(spoilt.uri)
    before = set(listing(folder))
    staged = spoilt.stage(Table.CLIPS, spoilt.clips().slice(0, 2))
    [left] = [path for path in set(listing(folder)) - before if path.endswith(".lance")]
    [found] = orphaned(folder)
    assert (found.kind, found.what.split(" ")[0]) == (Kind.ORPHANED, str(Path(left).relative_to(folder)))
    spoilt.commit(Table.CLIPS, [staged], {})
    assert orphaned(folder) == []
    (Path(spoilt.database) / "leases.lance" / "data" / "of a heartbeat").write_bytes(b"")
    assert orphaned(folder) == [], "somebody may be writing it"
    index = next(folder.rglob("*.idx"))
    shutil.copytree(index.parent, index.parent.parent / "another")
    (folder / "half.manifest").write_bytes(b"")
    (index.parent.parent.parent / "_transactions" / "9-9.txn").write_bytes(b"")
    lost_indices = len(list(index.parent.iterdir()))
    assert len(orphaned(folder)) == 2 + lost_indices


def test_a_reader_says_what_is_torn(spoilt: FeatureStore) -> None:
    with Reader(spoilt).reading() as reader:
        pass
    assert reader.findings == []
    assert reader.looks >= 2, "at the beginning and at the end"
    serving = spoilt.at(SERVING)
    other = Reader(spoilt)
    other.seen[moment(serving)] = digest(spoilt.at(PREVIOUS))
    with other.reading():
        pass
    [changed] = other.findings
    assert (changed.kind, "changed while it served" in changed.what) == (Kind.TORN, True)
    with (blind := Reader(spoilt)).reading():
        dataset = serving.dataset(Table.QUESTIONS)
        for path in (Path(dataset.uri) / "data").iterdir():
            path.unlink()
    assert {finding.what.partition(":")[0] for finding in blind.findings} == {
        "a reader could not read what serves"
    }


def test_two_that_write_in_turns_or_at_once(tmp_path: Path) -> None:
    note = tmp_path / "writes.jsonl"
    assert not writes_together(note)

    def told(*spans: tuple[int, float, float]) -> bool:
        note.write_text("".join(json.dumps(span) + "\n" for span in spans))
        return writes_together(note)

    assert not told((1, 0.0, 1.0), (1, 2.0, 3.0), (2, 3.5, 4.0))
    assert told((1, 0.0, 1.0), (2, 1.5, 1.6), (1, 2.0, 3.0))


# -- the ledger


def test_the_ledger_tells_the_truth(site: Site) -> None:
    """Over many changes: digests are of the files, questions of the annotation files, limits are kept."""
    draw, states = random.Random(7), Counter()
    for _ in range(60):
        site.change(draw)
        expected = site.expected()
        videos = site.folder / "corpus" / "videos"
        on_disk = {
            f"demo/{path.stem}": hashlib.sha256(path.read_bytes()).hexdigest() for path in videos.iterdir()
        }
        assert on_disk == {k: v[0] for k, v in expected.clips.items()} | expected.dead
        asked = {}
        for split in ("train", "val", "test"):
            rows = json.loads((site.folder / "corpus" / "json" / f"avqa-{split}.json").read_text())
            assert rows, "a file without a row is no annotation file"
            for row in rows:
                clip_id = f"demo/{row['video_id']}"
                asked[f"demo/{row['question_id']}"] = (clip_id, split, row["anser"])
        assert expected.questions == {k: v for k, v in asked.items() if v[0] in expected.clips}
        assert sum(v[2] == "train" for v in expected.clips.values()) >= 1, "the bank is never empty"
        states.update(dead=len(expected.dead), absent=len(site.rows) - len(on_disk))
        times = [path.stat().st_mtime_ns for path in videos.iterdir()]
        assert len(set(times)) == len(times), "no change can be missed for a coarse clock"
    assert states["dead"] > 30
    assert states["absent"] > 30


def test_a_seed_repeats(tmp_path: Path, rendered: Rendered) -> None:
    def changes(name: str, seed: int) -> tuple[list[str], Expected]:
        site = Site.make(tmp_path / name, tmp_path / name / "store", rendered)
        said = [what for number in range(5) for what in site.change(random.Random(f"{seed}/{number}"))]
        return said, site.expected()

    assert changes("one", 3) == changes("two", 3)
    assert changes("three", 3)[0] != changes("four", 4)[0]


def test_all_faults_get_equal_shares() -> None:
    order = fault_order(TortureWanted(rounds=3 * len(Fault) + 2))
    counts = Counter(order)
    assert set(counts) == set(Fault)
    assert set(counts.values()) <= {3, 4}
    assert order == fault_order(TortureWanted(rounds=3 * len(Fault) + 2))
    assert order != fault_order(TortureWanted(rounds=3 * len(Fault) + 2, seed=2))


def test_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="new or empty folder"):
        TortureWanted(folder=tmp_path)
    with pytest.raises(UsageError, match="rounds 0, clips 3"):
        TortureWanted(rounds=0, clips=3)


# -- the disk


def test_a_disk_of_ones_own_runs_full_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with own_disk(folder) as mounted:
        if not mounted:
            pytest.skip("this user may not mount a tmpfs")
        assert os.path.ismount(folder)
        with filled(folder, 8 << 10):
            (folder / "fits").write_bytes(bytes(4 << 10))
            with pytest.raises(OSError, match="No space left"):
                (folder / "does not").write_bytes(bytes(64 << 10))
        (folder / "does").write_bytes(bytes(64 << 10))
    assert not os.path.ismount(folder)
    assert list(folder.iterdir()) == []


def test_the_disk_goes_with_whoever_asked_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    program = (
        "import sys; from pathlib import Path; from r2scp.jobs.faults.full_disk import own_disk\n"
        "with own_disk(Path(sys.argv[1])) as mounted: print(mounted, flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        if asking.stdout.readline().strip() != "True":
            asking.kill()
            pytest.skip("this user may not mount a tmpfs")
        [guard] = psutil.Process(asking.pid).children()
        asking.send_signal(signal.SIGKILL)
    guard.wait(60)
    assert not os.path.ismount(folder)


# -- torture


def wanted(rendered: Rendered, folder: Path, rounds: int, *faults: Fault) -> TortureWanted:
    return TortureWanted(
        rounds=rounds,
        seed=SEED,
        clips=rendered.clips,
        pool=rendered.pool,
        folder=folder,
        faults=faults,
    )


@pytest.mark.usefixtures("local_ray")
def test_a_short_torture_finds_nothing(
    tmp_path: Path, rendered: Rendered, scratch: Callable[[], set[str]]
) -> None:
    said: list[str] = []
    processes = family()
    report = run_torture(wanted(rendered, tmp_path / "rack", 2, Fault.TABLES, Fault.UNTAGGED), said.append)
    told = report.to_json()
    assert report.findings == []
    assert not report.bad
    assert {told[kind.value] for kind in Kind} == {0}
    assert told["faults"] == {Fault.TABLES.value: 1, Fault.UNTAGGED.value: 1}, "each blow fell"
    assert report.looks > 2
    assert len(said) == 3
    assert json.loads(json.dumps(told)) == told
    assert scratch() == set(), "nothing is left in the folder for temporary files"
    assert family() <= processes, "no process is left"
    assert not os.path.ismount(tmp_path / "rack" / "disk")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_torture_sees_a_bug(tmp_path: Path, rendered: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first blow on, a commit of clips forgets one fragment."""
    blows: list[Round] = []
    strike, commit = Rack.strike, FeatureStore.commit

    def struck(self: Rack, one: Round) -> None:
        strike(self, one)
        blows.append(one)

    def forgetful(
        self: FeatureStore, table: Table, staged: list[Staged], properties: Any, also_delete: Any = ()
    ) -> int:
        full = [batch for batch in staged if batch.ids] if table is Table.CLIPS and blows else []
        kept = [batch for batch in staged if batch not in full[:1]]
        return commit(self, table, kept, properties, also_delete)

    monkeypatch.setattr(Rack, "strike", struck)
    monkeypatch.setattr(FeatureStore, "commit", forgetful)
    report = run_torture(wanted(rendered, tmp_path / "rack", 1, Fault.STAGED), lambda text: None)
    assert report.counts["lost"] > 0
    assert report.bad
    assert {finding["round"] for finding in report.findings} == {1}
    assert report.counts["failed"], "the further run has what was forgotten to do again"


def family() -> set[psutil.Process]:
    """All that this process has started, less Ray's own workers, which come and go."""
    found = psutil.Process().children(recursive=True)
    return {process for process in found if process.is_running() and "torture" in " ".join(words(process))}


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Folders for temporary files that this process has made and that are still there."""
    made: set[str] = set()

    def noting(*arguments: Any, make: Callable[..., str] = tempfile.mkdtemp, **named: Any) -> str:
        made.add(folder := make(*arguments, **named))
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", noting)
    return lambda: {folder for folder in made if os.path.exists(folder)}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_thirty_rounds_lose_nothing(tmp_path: Path, rendered: Rendered) -> None:
    report = run_torture(
        TortureWanted(rounds=30, seed=1, pool=rendered.pool, clips=rendered.clips, folder=tmp_path / "rack"),
        print,
    )
    assert report.findings == []
    assert sum(report.faults.values()) >= 24, report.missed
