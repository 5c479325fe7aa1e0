"""An export is the store's rows, bit for bit, in files that `datasets`, pyarrow and pandas read.

It appears whole or not at all, needs no more memory for a larger store, and hostile split names do no harm.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from r2scp.jobs.cli.main import app
from r2scp.jobs.inspect.export import ExportOptions, TableVersions, export
from r2scp.jobs.inspect.export_card import card, escaped
from r2scp.jobs.inspect.export_files import Limits, file_names
from r2scp.store.errors import R2SCPError, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

AT = datetime(2026, 1, 31, tzinfo=UTC)
KEYS = {"clips": "clip_id", "questions": "question_id", "neighbours": "neighbour_id"}
ODD_SPLITS = ("../../x", "", "a b", "all", "Train", "train", "1", "no", "x" * 300)
ODD_SPLITS += ("\u202egpj", "a'b", "*", "con", None)
SMALL = Limits(row_group_bytes=2_000, file_bytes=8_000)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def tables_of(store: FeatureStore) -> dict[str, pa.Table]:
    return {"clips": store.clips(), "questions": store.questions(), "neighbours": store.neighbours()}


def read(folder: Path, config: str) -> pa.Table:
    return pads.dataset(folder / "data" / config, format="parquet").to_table()


def sorted_rows(table: pa.Table, config: str) -> pa.Table:
    return table.sort_by(KEYS[config]).combine_chunks()


def check_same_rows(folder: Path, config: str, expected: pa.Table) -> None:
    """Values, types and nulls; embeddings by their bits."""
    exported, expected = sorted_rows(read(folder, config), config), sorted_rows(expected, config)
    assert exported.column_names == expected.column_names
    for name in expected.column_names:
        ours, theirs = exported[name].combine_chunks(), expected[name].combine_chunks()
        assert ours.type == theirs.type, name
        assert ours.to_pylist() == theirs.to_pylist(), name
        if pa.types.is_list(theirs.type) and pa.types.is_fixed_size_list(theirs.type.value_type):
            bits = [np.asarray(each.flatten().flatten()).view(np.uint16) for each in (ours, theirs)]
            assert (bits[0] == bits[1]).all(), name


def test_all_rows_are_exported_unchanged(question_store: FeatureStore, tmp_path: Path) -> None:
    summary = export(question_store, tmp_path / "out", ExportOptions(limits=SMALL))
    assert summary["files"] > 9, "the limits make several files of a split"
    for config, expected in tables_of(question_store).items():
        assert sum(summary["rows"][config].values()) == expected.num_rows
        check_same_rows(tmp_path / "out", config, expected)
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert "names that files cannot have" not in card(manifest)


def test_each_split_has_its_own_files(question_store: FeatureStore, tmp_path: Path) -> None:
    summary = export(question_store, tmp_path / "out", ExportOptions(limits=SMALL))
    split_of = dict(zip(*question_store.clips(["clip_id", "split"]).to_pydict().values(), strict=True))
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.parquet")}
    assert files == set(manifest["files"])
    for name, facts in manifest["files"].items():
        match = re.fullmatch(r"data/(\w+)/(\w+)-(\d{5})-of-(\d{5})\.parquet", name)
        assert match, name
        config, split, at, count = match[1], match[2], int(match[3]), int(match[4])
        assert at < count == sum(other.startswith(f"data/{config}/{split}-") for other in files)
        rows = pq.read_table(tmp_path / "out" / name).to_pylist()
        assert len(rows) == facts["rows"] > 0
        splits = {split_of[row["clip_id"]] if config == "neighbours" else row["split"] for row in rows}
        assert splits == {split}
    assert set(summary["rows"]["clips"]) == {"train", "val", "test"}


def test_keys_only(question_store: FeatureStore, tmp_path: Path) -> None:
    export(question_store, tmp_path / "out", ExportOptions(sequences=False))
    clips, questions = read(tmp_path / "out", "clips"), read(tmp_path / "out", "questions")
    assert set(question_store.clips().column_names) - set(clips.column_names) == {"visual", "audio"}
    omitted = set(question_store.questions().column_names) - set(questions.column_names)
    assert omitted == {"words", "choice_sentences"}
    check_same_rows(tmp_path / "out", "clips", question_store.clips(columns=clips.column_names))


def test_selection_by_corpus_split_and_condition(question_store: FeatureStore, tmp_path: Path) -> None:
    export(question_store, tmp_path / "a", ExportOptions(corpora=("avqa",), splits=("train", "test")))
    where = "corpus = 'avqa' AND split IN ('train', 'test')"
    check_same_rows(tmp_path / "a", "clips", question_store.clips(where=where))
    check_same_rows(tmp_path / "a", "questions", question_store.questions(where=where))
    clips = set(question_store.clips(["clip_id"], where)["clip_id"].to_pylist())
    neighbours = question_store.neighbours().to_pylist()
    expected = {row["neighbour_id"] for row in neighbours if row["clip_id"] in clips}
    assert set(read(tmp_path / "a", "neighbours")["neighbour_id"].to_pylist()) == expected

    export(question_store, tmp_path / "b", ExportOptions(where="audio_key IS NULL -- deaf"))
    deaf = set(question_store.clips(["clip_id"], "audio_key IS NULL")["clip_id"].to_pylist())
    assert set(read(tmp_path / "b", "clips")["clip_id"].to_pylist()) == deaf
    questions = question_store.questions(["question_id", "clip_id"]).to_pylist()
    expected = {row["question_id"] for row in questions if row["clip_id"] in deaf}
    assert expected
    assert set(read(tmp_path / "b", "questions")["question_id"].to_pylist()) == expected
    with pytest.raises(StoreError, match="no clip to export"):
        export(question_store, tmp_path / "c", ExportOptions(splits=("nowhere",)))
    with pytest.raises(UsageError, match="--where"):
        export(question_store, tmp_path / "c", ExportOptions(where="true) OR (true"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_file_names_of_splits_are_safe_and_distinct(
    own_store: FeatureStore, write: Callable[..., None], tmp_path: Path
) -> None:
    rows = [
        {"clip_id": f"odd/{at}", "corpus": "odd", "split": split, "ingested_at": AT}
        for at, split in enumerate(ODD_SPLITS)
    ]
    write(own_store, Table.CLIPS, rows)
    summary = export(own_store, tmp_path / "deep" / "out", ExportOptions())
    names = json.loads((tmp_path / "deep" / "out" / "export.json").read_text())["split_names"]
    assert set(names.values()) == {"val", "test", *ODD_SPLITS}
    assert len({name.lower() for name in names}) == len(names), "also where case makes no difference"
    assert all(re.fullmatch(r"[A-Za-z0-9_]{1,64}", name) for name in names)
    assert names["train"] == "train"
    for name, split in names.items():
        paths = list((tmp_path / "deep" / "out" / "data" / "clips").glob(f"{name}-*.parquet"))
        assert {row for path in paths for row in pq.read_table(path)["split"].to_pylist()} == {split}
    assert summary["rows"]["clips"].keys() == names.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "store"}, "nothing is written elsewhere"
    assert file_names(ODD_SPLITS) == file_names(reversed(ODD_SPLITS)), "whatever the order"


def test_the_card_is_yaml_and_describes_every_column(
    own_store: FeatureStore, write: Callable[..., None], tmp_path: Path
) -> None:
    hostile = "\n---\n# x <script>alert(1)</script> | `b` [l](javascript:1) \u202e"
    write(
        own_store, Table.CLIPS, [{"clip_id": "odd/1", "corpus": hostile, "split": hostile, "ingested_at": AT}]
    )
    export(own_store, tmp_path / "out", ExportOptions(corpora=(hostile, "avqa")))
    text = (tmp_path / "out" / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    configs = yaml.safe_load(header)["configs"]
    assert [each["config_name"] for each in configs] == ["clips", "questions", "neighbours"]
    assert all(isinstance(file["split"], str) for each in configs for file in each["data_files"])
    assert "license:" in header
    for bad in ("<script", "[l](", "`b`", "\u202e", "\n# x"):
        assert bad not in text
    for table in (Table.CLIPS, Table.QUESTIONS, Table.NEIGHBOURS):
        assert all(f"| `{name}` |" in body for name in own_store.address(table).schema.names)
    assert escaped("a*b_c&d") == "a&#42;b&#95;c&#38;d"
    for address in ("https://example.org/a", "www.example.org", "a@example.org"):  # GitHub links these
        assert not set(":./@") & set(escaped(address))


def test_a_repeated_export_writes_nothing_and_another_is_refused(
    own_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is allowed
    first = export(own_store, out, ExportOptions())
    (out / "README.md").write_text("with a licence")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = export(own_store, out, ExportOptions())
    assert (first["unchanged"], again["unchanged"]) == (False, True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UsageError, match="something else"):
        export(own_store, out, ExportOptions(sequences=False))
    own_store.commit(Table.CLIPS, [], {}, also_delete=[own_store.clips(["clip_id"])["clip_id"][0].as_py()])
    with pytest.raises(UsageError, match="something else"):
        export(own_store, out, ExportOptions())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_folder_with_other_content_is_refused(question_store: FeatureStore, tmp_path: Path) -> None:
    export(question_store, tmp_path / "out", ExportOptions())
    file = next((tmp_path / "out" / "data").rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "export.json").write_text("[1]")
    (tmp_path / "file").write_text("x")
    for name in ("out", "own", "odd", "file"):
        result = call("store", "export", tmp_path / name, "--store", question_store.uri)
        assert result.exit_code == 2
        assert "must be a new or empty folder" in result.stderr
        assert result.stderr.count("\n") == 1
    assert (tmp_path / "own" / "thesis.txt").read_text() == "x"
    beneath = call("store", "export", tmp_path / "file" / "deeper", "--store", question_store.uri)
    assert beneath.exit_code == 1
    assert "cannot write" in beneath.stderr


def test_a_snapshot_is_exported(own_store: FeatureStore, write: Callable[..., None], tmp_path: Path) -> None:
    own_store.name_snapshot("paper")
    expected = own_store.clips()
    write(
        own_store,
        Table.CLIPS,
        [{"clip_id": "avqa/new", "corpus": "avqa", "split": "train", "ingested_at": AT}],
    )
    done = call("store", "export", tmp_path / "out", "--store", own_store.uri, "--at", "paper", "--json")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["versions"] == {
        t.value: v for t, v in own_store.snapshots()["paper"].versions.items()
    }
    check_same_rows(tmp_path / "out", "clips", expected)


def test_it_reads_one_version_during_writes(
    own_store: FeatureStore, write: Callable[..., None], tmp_path: Path
) -> None:
    expected = own_store.questions()

    def write_meanwhile(table: str, done: int, total: int) -> None:
        if table == "clips":
            write(
                own_store,
                Table.QUESTIONS,
                [{"question_id": "new", "clip_id": "avqa/001", "split": "train", "corpus": "avqa"}],
            )

    export(own_store, tmp_path / "out", ExportOptions(), write_meanwhile)
    assert own_store.questions().num_rows == expected.num_rows + 1
    check_same_rows(tmp_path / "out", "questions", expected)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_export_leaves_nothing(
    question_store: FeatureStore, tmp_path: Path, error: BaseException
) -> None:
    def fail(table: str, done: int, total: int) -> None:
        if table == "questions":
            raise error

    with pytest.raises((R2SCPError, KeyboardInterrupt), match=r"No space left on device|^$"):
        export(question_store, tmp_path / "out", ExportOptions(), fail)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_looks_complete(
    question_store: FeatureStore, tmp_path: Path
) -> None:
    out, mark = tmp_path / "out", tmp_path / "mark"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from r2scp.jobs.inspect.export import ExportOptions, export\n"
        "from r2scp.store.feature_store import FeatureStore\n"
        "def stop(table, done, total):\n"
        "    if table == 'questions':\n"
        "        Path(sys.argv[3]).touch()\n"
        "        time.sleep(600)\n"
        "export(FeatureStore.open(sys.argv[1]), Path(sys.argv[2]), ExportOptions(), stop)\n"
    )
    words = [sys.executable, "-c", code, question_store.uri, str(out), str(mark)]
    with subprocess.Popen(words, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not mark.exists() and time.monotonic() < deadline:
                threading.Event().wait(0.02)
            assert mark.exists()
            with pytest.raises(UsageError, match="another export writes"):
                export(question_store, out, ExportOptions())
        finally:
            process.kill()
    assert not out.exists()
    assert export(question_store, out, ExportOptions())["unchanged"] is False
    mark.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], (
        "the leftovers of the killed one are removed"
    )
    check_same_rows(out, "clips", question_store.clips())


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two stores of long clips, 16 and 160 MB."""
    places = []
    for clips in (128, 1280):
        store = FeatureStore.create(str(tmp_path_factory.mktemp("heavy") / "store"), "wide", 512)
        schema, rng = store.address(Table.CLIPS).schema, np.random.default_rng(0)
        for start in range(0, clips, 128):
            drawn = pa.array(rng.standard_normal(128 * 120 * 512).astype(np.float16))
            tokens = pa.ListArray.from_arrays(
                np.arange(0, 128 * 120 + 1, 120, dtype=np.int32),
                pa.FixedSizeListArray.from_arrays(drawn, 512),
            )
            table = pa.table(
                {
                    "clip_id": [f"c/{start + at}" for at in range(128)],
                    "split": ["train"] * 128,
                    "visual": tokens,
                }
            )
            for field in schema:
                if field.name not in table.column_names:
                    table = table.append_column(field, pa.nulls(128, field.type))
            store.commit(Table.CLIPS, [store.stage(Table.CLIPS, table.select(schema.names))], {})
        places.append(store.uri)
    return places[0], places[1]


def test_memory_does_not_grow_with_the_store(heavy: tuple[str, str], tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from r2scp.jobs.inspect.export import ExportOptions, export\n"
        "from r2scp.jobs.inspect.export_files import Limits\n"
        "from r2scp.store.feature_store import FeatureStore\n"
        "limits = Limits(row_group_bytes=4 << 20, file_bytes=32 << 20)\n"
        "done = export(FeatureStore.open(sys.argv[1]), Path(sys.argv[2]), ExportOptions(limits=limits))\n"
        "print(done['files'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    peaks = []
    for name, uri in zip(("small", "large"), heavy, strict=True):
        words = [sys.executable, "-c", code, uri, str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        files, mib = map(int, done.stdout.split())
        peaks.append(mib)
        assert files == {"small": 1, "large": 5}[name]
    assert peaks[1] - peaks[0] < 72, f"MiB; the larger store has 144 more: {peaks}"
    groups = [pq.ParquetFile(p).metadata for p in (tmp_path / "large").rglob("*.parquet")]
    sizes = [group.row_group(at).total_byte_size for group in groups for at in range(group.num_row_groups)]
    assert len(sizes) > 20
    assert max(sizes) < 8 << 20


def load(folder: Path, config: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(cache))
    datasets = pytest.importorskip("datasets", reason="no `datasets`: pip install datasets")
    datasets.disable_progress_bars()
    return datasets.load_dataset(str(folder), config, cache_dir=str(cache))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_datasets_loads_it(
    own_store: FeatureStore, write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"clip_id": f"odd/{at}", "split": split, "ingested_at": AT} for at, split in enumerate(ODD_SPLITS)
    ]
    write(own_store, Table.CLIPS, rows)
    out = tmp_path / "out"
    export(own_store, out, ExportOptions(limits=SMALL))
    names = json.loads((out / "export.json").read_text())["split_names"]
    for config, expected in tables_of(own_store).items():
        loaded = load(out, config, tmp_path / "cache", monkeypatch)
        tables = [pa.table(split.data.table).combine_chunks() for split in loaded.values()]
        rows = pa.concat_tables(
            table.cast(pa.schema([pa.field(f.name, f.type) for f in table.schema])) for table in tables
        )
        assert rows.num_rows == expected.num_rows
        assert sorted_rows(rows, config).to_pylist() == sorted_rows(expected, config).to_pylist()
        if config == "clips":
            assert set(loaded) == set(names)
            assert all(set(loaded[name]["split"]) == {split} for name, split in names.items())
            tokens = next(
                row for row in loaded["train"].with_format("numpy") if row["visual_key"] is not None
            )
            assert np.asarray(list(tokens["visual"])).shape[1:] == (own_store.dim,)
            assert loaded["train"].features["visual"].feature.feature.dtype == "float16"


def test_pandas_reads_it(question_store: FeatureStore, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="no pandas: pip install pandas")
    export(question_store, tmp_path / "out", ExportOptions())
    frame = pandas.read_parquet(tmp_path / "out" / "data" / "clips")
    assert len(frame) == question_store.clips().num_rows
    assert set(frame["split"]) == {"train", "val", "test"}


def test_a_copy_of_a_store_has_the_same_versions(
    question_store: FeatureStore, own_store: FeatureStore
) -> None:
    assert TableVersions.of(question_store) == TableVersions.of(own_store)
