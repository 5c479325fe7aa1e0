"""A killed extraction loses nothing, doubles nothing, and leaves no process behind.

The driver is a real `r2scp-pipe extract` in a process of its own, ended by SIGKILL at moments drawn with
fixed seeds. A second run goes on at once (the dead process's lease is taken over) and every clip is in the
store exactly once.
"""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from r2scp.jobs.ingest.extract import Destination, ExtractReport, Source, run_extract
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.extraction.plan import input_records
from r2scp.pipelines.ray_session import Resources
from r2scp.store.feature_store import FeatureStore
from r2scp.store.maintenance import superseded
from r2scp.store.schema import Table

CLIPS, BROKEN = 40, 3
FRAGMENT = 8  # rows that a small run commits at a time
PATIENCE_S = 240  # for anything waited for; far beyond what a busy machine needs
POLL_S = 0.05

#: The command line, but it commits every fragment by itself, and after each commit to a table it says so and
#: waits for a word: so a crash can be put at any moment between two commits.
DRIVER = """
import sys
from r2scp.jobs.ingest import extract
from r2scp.jobs.cli.main import app
from r2scp.store.feature_store import FeatureStore

def pausing(self, table, *arguments, commit=FeatureStore.commit, **named):
    version = commit(self, table, *arguments, **named)
    print(f"committed {table.value} {version}", file=sys.__stdout__, flush=True)
    sys.stdin.readline()
    return version

FeatureStore.commit = pausing
extract.COMMIT_EVERY_S = 0.0
app(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def many_clips(
    tmp_path_factory: pytest.TempPathFactory,
    render: Callable[[Path, Sequence[str]], Path],
    clip_arguments: Callable[..., list[str]],
) -> Path:
    """Forty short recordings, no two alike, three of them broken."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(CLIPS):
        path = folder / f"clip{number:02}.mp4"
        if number % (CLIPS // BROKEN) == 5:
            path.write_text(f"no film number {number}\n" * 20)
        else:
            render(path, clip_arguments(1.0, 200 + 20 * number))
    return folder


@pytest.fixture
def start_driver(
    many_clips: Path, tmp_path: Path, tiny_weights: Path
) -> Iterator[Callable[[], psutil.Popen]]:
    """Start an extraction of `many_clips`; what is left of it when the test is over is ended, by number."""
    drivers: list[psutil.Popen] = []
    store = tmp_path / "store"
    options = {"--corpus": "folder", "--root": many_clips, "--store": store, "--weights": tiny_weights}
    words = [str(word) for option in options.items() for word in option]
    words += ["--encoder", "imagebind-demo", "--device", "cpu", "--num-workers", "2", "--json"]

    def start() -> psutil.Popen:
        with open(tmp_path / "driver.log", "ab") as log:
            driver = psutil.Popen(
                [sys.executable, "-c", DRIVER, "extract", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        drivers.append(driver)
        return driver

    yield start
    for driver in drivers:
        for process in [*descendants(driver), driver]:
            end(process)
        for pipe in (driver.stdin, driver.stdout):
            pipe.close()


@pytest.fixture(scope="module")
def orphans() -> Iterator[list[psutil.Process]]:
    """What the killed drivers had started; whatever a failing test leaves of it is ended here, by number."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            end(process)


def end(process: psutil.Process) -> None:
    try:
        process.kill()
        process.wait(10)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        pass


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(POLL_S)


def next_commit(driver: psutil.Popen) -> str:
    """The table of the next commit; the driver then stands still until it is let go."""
    assert select.select([driver.stdout], [], [], PATIENCE_S)[0], "the driver says nothing"
    words = driver.stdout.readline().decode().split()
    assert words[:1] == ["committed"], f"the driver ended before it could be killed: {words}"
    return words[1]


def let_go(driver: psutil.Popen) -> None:
    driver.stdin.write(b"\n")
    driver.stdin.flush()


def alive(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
        except psutil.NoSuchProcess:
            pass
    return found


def extract_here(root: Path, store: Path, encoder: EncoderSpec) -> ExtractReport:
    """The same extraction, in this process."""
    return run_extract(
        Source("folder", root), Destination(str(store)), encoder, Resources(), lambda report, total: None
    )


def settled(store: FeatureStore) -> int:
    return store.clips(columns=["clip_id"]).num_rows + store.failures().num_rows


def check_whole(store: FeatureStore, report: ExtractReport) -> None:
    """Every clip once, in the table it belongs to."""
    clips = store.clips(columns=["clip_id", "visual", "audio"])
    stored, failed = clips["clip_id"].to_pylist(), store.failures()["clip_id"].to_pylist()
    assert report.inputs == report.stored + report.unchanged + report.failed == CLIPS
    assert len(set(stored)) == len(stored), "a clip is there twice"
    assert sorted(stored + failed) == [f"folder/clip{number:02}.mp4" for number in range(CLIPS)]
    assert len(failed) == BROKEN
    assert not clips["visual"].null_count
    assert not clips["audio"].null_count
    assert superseded(store) == ([], [])


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "seed", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_killed_run_goes_on(
    seed: int,
    many_clips: Path,
    tmp_path: Path,
    tiny_encoder: EncoderSpec,
    start_driver: Callable[[], psutil.Popen],
    orphans: list[psutil.Process],
) -> None:
    draw = random.Random(seed)
    commits = draw.randrange(3, 10)  # to tables, before the blow: the first two put the tables right
    delay_s = draw.choice([None, draw.uniform(0.0, 0.5)])  # None: right between two commits
    driver = start_driver()
    tables = [next_commit(driver)]
    while len(tables) < commits:
        let_go(driver)
        tables.append(next_commit(driver))
    assert tables == (["clips", "failures"] * commits)[:commits]
    family = descendants(driver)
    if delay_s is not None:
        let_go(driver)
        moment = time.monotonic() + delay_s
        until(lambda: time.monotonic() >= moment, "the moment of the blow")
        family += [process for process in descendants(driver) if process not in family]
    orphans += family
    assert len(family) > 2, "a driver at work has children"
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait(30) == -signal.SIGKILL
    opened = FeatureStore.open(str(tmp_path / "store"), tiny_encoder.fingerprint)
    left = settled(opened)
    assert FRAGMENT <= left < CLIPS, "killed too early or too late: the test shows nothing"

    report = extract_here(many_clips, tmp_path / "store", tiny_encoder)  # at once: the lease is taken over

    check_whole(opened, report)


@pytest.mark.usefixtures("local_ray")
def test_crash_between_the_two_tables(media_folder: Path, tmp_path: Path, tiny_encoder: EncoderSpec) -> None:
    """Clips committed, the failures they replace not yet gone: the next run puts that right."""
    extract_here(media_folder, tmp_path / "store", tiny_encoder)
    store = FeatureStore.open(str(tmp_path / "store"), tiny_encoder.fingerprint)
    mended = "folder/text.mp4"
    assert store.failures()["clip_id"].to_pylist() == [mended]
    [row] = store.clips(where="clip_id = 'folder/both.mp4'").to_pylist()
    (media_folder / "text.mp4").write_bytes((media_folder / "both.mp4").read_bytes())
    facts = (media_folder / "text.mp4").stat()
    row |= {
        "clip_id": mended,
        "bytes": facts.st_size,
        "mtime_ns": facts.st_mtime_ns,
        "ingested_at": datetime.now(UTC),
    }
    rows = pa.Table.from_pylist([row], schema=store.address(Table.CLIPS).schema)
    store.commit(Table.CLIPS, [store.stage(Table.CLIPS, rows)], {"run": "crashed"})
    assert superseded(store) == ([], [mended])
    assert input_records(store, "folder")[mended].failure == ""
    (media_folder / "new.wav").write_bytes((media_folder / "sound.wav").read_bytes())

    report = extract_here(media_folder, tmp_path / "store", tiny_encoder)

    assert report.decoded == 1, "only the new file: the clip's row is the truth"
    assert superseded(store) == ([], [])
    assert store.failures().num_rows == 0
    assert store.clips(columns=["clip_id"])["clip_id"].to_pylist().count(mended) == 1


@pytest.mark.slow  # nearly all of it is waiting
def test_nothing_of_the_killed_drivers_is_left(orphans: list[psutil.Process]) -> None:
    """Ray's and ffmpeg's processes end by themselves; Ray's agents take up to a minute to notice."""
    if not orphans:
        pytest.skip("runs after the tests that kill drivers")
    until(lambda: not alive(orphans), "the end of all processes of the killed drivers")
