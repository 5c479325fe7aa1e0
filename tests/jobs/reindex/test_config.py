"""A job's file is read strictly: what is wrong is said in one line that names the key and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from r2scp.jobs.reindex.config import read_config
from r2scp.store.errors import UsageError
from r2scp.store.schema import Retrieval

LEAST = {"name": "nightly", "store": "store", "corpora": [{"corpus": "vggsound", "root": "media"}]}


def write(folder: Path, said: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(said if isinstance(said, str) else yaml.safe_dump(said))
    return path


def test_what_need_not_be_said(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, LEAST))
    assert config.store == str(tmp_path / "store")
    assert config.corpora[0].root == str(tmp_path / "media")
    assert config.corpora[0].stored_as == "vggsound"
    assert config.index
    assert config.index.retrieval == tuple(Retrieval)
    assert (config.gone, config.attempts, config.kept.days) == ("remove", 3, 7)
    assert config.schedule is None


def test_everything_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "s3cret")
    monkeypatch.setenv("DISK", "/data")
    said = LEAST | {
        "store": "s3://bucket/features",
        "storage_options": {"aws_secret_access_key": "${THE_KEY}"},
        "weights": "random:7",
        "corpora": [
            {"corpus": "music-avqa", "root": "${DISK}/music", "annotations": ["json", "/else/where.json"]},
            {"corpus": "folder", "root": "~/porch", "name": "porch", "split": "test"},
        ],
        "gone": "keep",
        "index": {"retrieval": ["paired"], "bank": {"corpora": ["porch"], "disjoint": True}, "n": 5},
        "gate": {"max_drift": 0.5, "min_recall_at_3": None},
        "machine": {"num_workers": 2, "gpus_per_actor": 0.5},
        "keep_days": 0.5,
        "schedule": {"cron": "0 3 * * *", "timezone": "Europe/Berlin"},
    }
    config = read_config(write(tmp_path, said))
    assert config.store == "s3://bucket/features"
    assert config.storage_options == {"aws_secret_access_key": "s3cret"}
    assert config.weights == "random:7"
    music, porch = config.corpora
    assert (music.root, music.annotations) == ("/data/music", (str(tmp_path / "json"), "/else/where.json"))
    assert porch.root == str(Path.home() / "porch")
    assert config.index
    assert (config.index.bank.corpora, config.index.bank.disjoint, config.index.n) == (("porch",), True, 5)
    assert (config.gate.max_drift, config.gate.min_recall_at_3) == (0.5, None)
    assert "s3cret" not in f"{config}{config.told()}", "a secret goes into no log and no record"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"nam": "x"}, r"job.yaml has no nam; known: attempts, corpora, encoder, gate"),
        ({"name": "Nightly!"}, r"name must be lower-case letters, digits and '-'.*got 'Nightly!'"),
        ({"corpora": []}, "corpora must be a list of at least one"),
        ({"corpora": [{"corpus": "folder"}]}, r"corpora\[0\] must have root"),
        ({"corpora": [{"corpus": "folder", "root": "a"}] * 2}, "give `name` where two are of one kind"),
        ({"corpora": {"corpus": "folder"}}, "corpora must be a list; got"),
        ({"gone": "maybe"}, r"gone must be one of remove, keep; got 'maybe'"),
        ({"attempts": "3"}, r"attempts must be a whole number; got '3'"),
        ({"attempts": -1}, r"attempts must be at least 0; got -1"),
        ({"gate": {"max_lost": 0.1}}, r"gate has no max_lost; known: max_dead_share, max_drift"),
        ({"gate": {"max_dead_share": 1.5}}, r"gate: max_dead_share must be in \[0, 1\]; got 1.5"),
        ({"gate": {"recall_queries": 0}}, r"recall_queries must be at least 1; got 0"),
        (
            {"index": {"retrieval": ["near"]}},
            r"retrieval\[0\] must be one of cross, paired, hybrid",
        ),
        ({"index": {"n": 0}}, "index: the number of neighbours must be at least 1"),
        (
            {"serving": {"kind": "hnsw"}},
            r"serving.kind must be one of auto, exact, ivf_rq, ivf_sq",
        ),
        ({"machine": {"num_workers": 0}}, r"machine: num_workers must be at least 1; got 0"),
        ({"schedule": {"cron": "every day"}}, "schedule.*cron must be five fields"),
        ({"schedule": {"cron": "0 3 * * *", "timezone": "Moon"}}, "timezone"),
        ({"storage_options": {"k": 3}}, r"storage_options.k must be a string; got 3"),
        ({"store": "${NOT_SET_ANYWHERE}/x"}, "store names the environment variable NOT_SET_ANYWHERE"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_config(write(tmp_path, LEAST | change))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", "the key 'name' is given twice"),
        ("name: [", "is no YAML"),
        ("- a\n- b\n", "must be a YAML mapping with some of name, store, corpora"),
        ("name: !!python/object/apply:os.system ['true']\n", "is no YAML: could not determine a constructor"),
        ("a: &a [*a]\n", "is no YAML|has no a"),
        ("[" * 5000, "is no YAML"),
        ("\x00", "is no YAML"),
        ("#" * (1 << 20) + "\n", "must be at most 1048576 bytes"),
    ],
)
def test_what_is_no_job(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_config(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*absent.yaml.*give the YAML file"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(UsageError, match="cannot read"):
        read_config(tmp_path / "latin.yaml")
