"""The job on S3 (a server on loopback), and on a Ray cluster that loses a node."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from ray.cluster_utils import Cluster

from r2scp.jobs.reindex.config import read_job_file
from r2scp.jobs.reindex.job import run_reindex
from r2scp.pipelines.ray_session import RAY_ENVIRONMENT
from r2scp.store.errors import LeaseHeld
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.snapshots import PREVIOUS, SERVING

TIMEOUT_S = 180.0
OBJECT_STORE_BYTES = 100 << 20  # of one node


@pytest.fixture
def job(tmp_path: Path, tiny_weights: Path, media_folder: Path) -> Callable[..., Path]:
    """`job(**changes)`: the file of a job on `media_folder`."""

    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "name": "nightly",
            "store": "store",
            "encoder": "imagebind-demo",
            "weights": str(tiny_weights),
            "corpora": [{"corpus": "folder", "root": str(media_folder)}],
            "index": {"retrieval": ["paired"], "n": 3},
            "gate": {"max_dead_share": 0.5, "max_lost_share": 0.5},
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


@pytest.mark.usefixtures("local_ray")
def test_the_whole_path_on_s3(
    job: Callable[..., Path], object_store: Callable[[str], Any], media_folder: Path
) -> None:
    place = object_store("reindex")
    path = job(store=place.uri, storage_options=place.options)
    first = run_reindex(read_job_file(path), print)
    assert (first.outcome, first.corpora["folder"]["stored"]) == ("published", 4)
    before = _objects(place)
    assert run_reindex(read_job_file(path), print).outcome == "nothing to do"
    assert _objects(place) == before, "a run with nothing to do writes nothing"
    (media_folder / "copy.mp4").write_bytes((media_folder / "both.mp4").read_bytes())
    (media_folder / "silent.mp4").unlink()
    store = FeatureStore.open(place.uri, storage_options=place.options)
    with store.lease("another").hold(), pytest.raises(LeaseHeld, match="another on "):
        run_reindex(read_job_file(path), print)
    assert run_reindex(read_job_file(path), print).outcome == "published"
    names = {name: set(store.at(name).clips()["clip_id"].to_pylist()) for name in (SERVING, PREVIOUS)}
    assert names[SERVING] ^ names[PREVIOUS] == {"folder/copy.mp4", "folder/silent.mp4"}
    store.rollback()
    assert store.at(SERVING).clips().num_rows == len(names[PREVIOUS])


def _objects(place: Any) -> dict[str, str]:
    """Key -> content hash of everything in the bucket."""
    options = place.options
    client = boto3.client(
        "s3",
        endpoint_url=options["aws_endpoint"],
        region_name=options["aws_region"],
        aws_access_key_id=options["aws_access_key_id"],
        aws_secret_access_key=options["aws_secret_access_key"],
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=place.uri.split("/")[2])
    objects = {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", ())}
    client.close()
    return objects


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A Ray of two nodes with one core each, on this machine."""
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_cluster_that_loses_a_node(
    job: Callable[..., Path], cluster: Cluster, rendered_media: Mapping[str, bytes], tmp_path: Path
) -> None:
    """A node dies once the first clips are stored; the job still stores every clip once."""
    names = {f"{number:03}.mp4" for number in range(60)}
    (tmp_path / "many").mkdir()
    for name in names:
        (tmp_path / "many" / name).write_bytes(rendered_media["both.mp4"])
    path = job(
        corpora=[{"corpus": "folder", "root": str(tmp_path / "many")}],
        machine={"ray_address": cluster.address},
        index=None,
    )
    driver = subprocess.Popen(
        [sys.executable, "-m", "r2scp.jobs", "jobs", "run", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not _rows(str(tmp_path / "store")):
            assert driver.poll() is None, driver.stderr.read().decode()  # pyright: ignore
            assert time.monotonic() < deadline, "nothing was ever stored"
            time.sleep(0.05)
        [worker] = cluster.worker_nodes
        cluster.remove_node(worker, allow_graceful=False)
        out, err = driver.communicate(timeout=TIMEOUT_S)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 0, err.decode()
    report = json.loads(out)
    assert (report["outcome"], report["corpora"]["folder"]["stored"]) == ("published", len(names))
    store = FeatureStore.open(str(tmp_path / "store"))
    stored = store.at(SERVING).clips()["clip_id"].to_pylist()
    assert sorted(stored) == sorted(f"folder/{name}" for name in names)


def _rows(uri: str) -> int:
    if not FeatureStore.encoders(uri):
        return 0
    return FeatureStore.open(uri).dataset(Table.CLIPS).count_rows()
