"""A job's file is read strictly: errors name the key and what is allowed, in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from r2scp.jobs.reindex.config import read_job_file
from r2scp.store.errors import UsageError
from r2scp.store.schema import Retrieval

MINIMAL = {"name": "nightly", "store": "store", "corpora": [{"corpus": "vggsound", "root": "media"}]}


def write(folder: Path, values: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_defaults(tmp_path: Path) -> None:
    config = read_job_file(write(tmp_path, MINIMAL))
    assert config.store == str(tmp_path / "store")
    assert config.corpora[0].root == str(tmp_path / "media")
    assert config.corpora[0].stored_as == "vggsound"
    assert config.index
    assert config.index.retrieval == tuple(Retrieval)
    assert (config.gone, config.attempts, config.retention.days) == ("remove", 3, 7)
    assert config.schedule is None


def test_all_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "s3cret")
    monkeypatch.setenv("DISK", "/data")
    values = MINIMAL | {
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
    config = read_job_file(write(tmp_path, values))
    assert config.store == "s3://bucket/features"
    assert config.storage_options == {"aws_secret_access_key": "s3cret"}
    assert config.weights == "random:7"
    music, porch = config.corpora
    assert (music.root, music.annotations) == ("/data/music", (str(tmp_path / "json"), "/else/where.json"))
    assert porch.root == str(Path.home() / "porch")
    assert config.index
    assert (config.index.bank.corpora, config.index.bank.disjoint, config.index.n) == (("porch",), True, 5)
    assert (config.gate.max_drift, config.gate.min_recall_at_3) == (0.5, None)
    assert "s3cret" not in f"{config}{config.to_record()}", "secrets go into no log and no record"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, r"job.yaml has no nam; known: attempts, corpora, encoder, gate"),
        ({"name": "Nightly!"}, r"name must be lower-case letters, digits and '-'.*got 'Nightly!'"),
        ({"corpora": []}, "corpora must be a list of at least one"),
        ({"corpora": [{"corpus": "folder"}]}, r"corpora\[0\] must have root"),
        ({"corpora": [{"corpus": "folder", "root": "a"}] * 2}, "give `name` for a second one of a kind"),
        ({"gone": "maybe"}, r"gone must be one of remove, keep; got 'maybe'"),
        ({"attempts": "3"}, r"attempts must be a whole number; got '3'"),
        ({"attempts": -1}, r"attempts must be at least 0; got -1"),
        ({"gate": {"max_lost": 0.1}}, r"gate has no max_lost; known: max_dead_share, max_drift"),
        ({"index": {"retrieval": ["near"]}}, r"retrieval\[0\] must be one of cross, paired, hybrid"),
        ({"machine": {"num_workers": 0}}, r"machine: num_workers must be at least 1; got 0"),
        ({"schedule": {"cron": "every day"}}, "schedule.*cron must be five fields"),
        ({"storage_options": {"k": 3}}, r"storage_options.k must be a string; got 3"),
        ({"store": "${NOT_SET_ANYWHERE}/x"}, "store refers to the environment variable NOT_SET_ANYWHERE"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_job_file(write(tmp_path, MINIMAL | change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "duplicate key 'name'"),
        ("name: [", "is not valid YAML"),
        ("- a\n- b\n", "must be a YAML mapping with some of name, store, corpora"),
        (
            "name: !!python/object/apply:os.system ['true']\n",
            "is not valid YAML: could not determine a constructor",
        ),
        ("a: &a [*a]\n", "is not valid YAML|has no a"),
        ("[" * 5000, "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("#" * (1 << 20) + "\n", "must be at most 1048576 bytes"),
    ],
)
def test_files_that_are_not_a_job(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_job_file(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*absent.yaml.*give the YAML file"):
        read_job_file(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(UsageError, match="cannot read"):
        read_job_file(tmp_path / "latin.yaml")
