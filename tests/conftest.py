"""What all tests share."""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import boto3
import imageio_ffmpeg
import pytest
import ray
import torch
from factories import (
    WIDTH,
    clip_row,
    picture_and_sound,
    question_row,
    write_rows,
)
from moto.server import ThreadedMotoServer

from r2scp.jobs.ingest.encoders import encoder_spec
from r2scp.jobs.ingest.index import run_index
from r2scp.model.imagebind.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.pipelines.batches.dataset import Dataset, NeighbourRows
from r2scp.pipelines.batches.examples import Clips, Examples, Pins, QuestionFilter
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.pipelines.ray_session import RAY_ENVIRONMENT
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
OBJECT_STORE_BYTES = 256 << 20  # of the Ray that the flow tests share
INDEX = IndexSettings(retrieval=(Retrieval.PAIRED,), n=4)  # of `question_store`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers: one of them has the Ray that tests share, and a file's fixtures are made once."""
    on_ray = {item.path for item in items if "local_ray" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path in on_ray else str(item.path)))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real media, real annotations and reference tensors, kept beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("no real media or reference tensors beside the repository (../shared)")
    return SHARED


@dataclass(frozen=True)
class Place:
    """Where a store may rest."""

    uri: str
    options: dict[str, str]


@pytest.fixture(scope="session")
def object_store() -> Iterator[Callable[[str], Place]]:
    """An S3 of our own on loopback; makes a bucket and gives its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    options = {
        "aws_endpoint": endpoint,
        "allow_http": "true",
        "aws_region": "us-east-1",
        "aws_access_key_id": "testing",
        "aws_secret_access_key": "testing",
    }

    def make(bucket: str) -> Place:
        client.create_bucket(Bucket=bucket)
        return Place(f"s3://{bucket}/deep/store", options)

    yield make
    client.close()
    server.stop()


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ImageBind, small enough to embed hundreds of seconds in one, as a file."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = ImageBind(
            ImageBindConfig(
                vision=TowerConfig(width=64, depth=2, heads=2),
                audio=TowerConfig(width=64, depth=2, heads=2),
                text=TowerConfig(width=48, depth=1, heads=2),
                dim=32,
                patch=14,
            )
        )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def tiny_encoder(tiny_weights: Path) -> EncoderSpec:
    """`tiny_weights` as the flow gets it."""
    return encoder_spec("imagebind-demo", str(tiny_weights), "cpu")


@pytest.fixture(scope="session")
def render() -> Callable[[Path, Sequence[str]], Path]:
    """`render(path, arguments)`: run the packaged ffmpeg to make one media file."""
    program = imageio_ffmpeg.get_ffmpeg_exe()

    def run(path: Path, arguments: Sequence[str]) -> Path:
        command = [program, "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *arguments, str(path)]
        subprocess.run(command, check=True, timeout=120)
        return path

    return run


@pytest.fixture(scope="session")
def clip_arguments() -> Callable[..., list[str]]:
    """`picture_and_sound`, for tests that render clips of their own."""
    return picture_and_sound


@pytest.fixture(scope="session")
def rendered_media(
    tmp_path_factory: pytest.TempPathFactory, render: Callable[[Path, Sequence[str]], Path]
) -> Mapping[str, bytes]:
    """Name -> content of a few real recordings and one impostor."""
    folder = tmp_path_factory.mktemp("rendered")
    render(folder / "both.mp4", picture_and_sound(2.0))
    render(folder / "other.mp4", picture_and_sound(1.0, 880, "testsrc2"))
    silent = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=8:duration=1", "-c:v", "libx264"]
    render(folder / "silent.mp4", [*silent, "-preset", "ultrafast", "-pix_fmt", "yuv420p"])
    render(folder / "sound.wav", ["-f", "lavfi", "-i", "sine=frequency=330:sample_rate=16000:duration=1.5"])
    (folder / "text.mp4").write_text("this is a letter and no film\n" * 40)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def media_folder(tmp_path: Path, rendered_media: Mapping[str, bytes]) -> Path:
    """A folder of one's own with `rendered_media` in it."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name, content in rendered_media.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two cores for all flow tests of this process."""
    os.environ.update(RAY_ENVIRONMENT)
    ray.init(
        num_cpus=2,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def question_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Forty clips, seventy questions of two corpora and an index, in fragments with holes. Only to be read.

    Beside the ordinary questions: an answer that is not in training, a missing clip, no choices, and
    choices without a right one.
    """
    store = FeatureStore.create(str(tmp_path_factory.mktemp("questions") / "store"), "tiny-encoder", WIDTH)
    clips = [clip_row(number, seed=0) for number in range(40)]
    write_rows(store, Table.CLIPS, clips, parts=3)
    write_rows(store, Table.CLIPS, [clip_row(number, seed=1) for number in range(3, 40, 9)])
    questions = [question_row(number, clips[number * 3 % 40]) for number in range(70)]
    write_rows(store, Table.QUESTIONS, questions, parts=2)
    odd = (
        question_row(6, clips[0]),
        question_row(14, clips[2]),
        question_row(7, clips[1]),
        question_row(15, clips[3]),
    )
    odd[0].update(question_id="music-avqa/unheard", answer="bagpipe")
    odd[1].update(question_id="music-avqa/gone", clip_id="music-avqa/999")
    odd[2].update(question_id="avqa/open", choices=[], choice_sentences=None, answer_index=-1)
    odd[3].update(question_id="avqa/untold", answer_index=-1, answer="")
    write_rows(store, Table.QUESTIONS, [*odd, questions[5], questions[50]])
    run_index(store, INDEX, lambda mode, done, total: None)
    return store


@pytest.fixture
def own_store(tmp_path: Path, question_store: FeatureStore) -> FeatureStore:
    """A copy of `question_store` to write into."""
    return FeatureStore.open(shutil.copytree(question_store.uri, tmp_path / "store").as_posix())


@pytest.fixture(scope="session")
def write() -> Callable[[FeatureStore, Table, Sequence[Mapping[str, object]]], None]:
    """`write(store, table, rows)`: in place of rows with the same key."""
    return write_rows


@pytest.fixture(scope="session")
def open_dataset() -> Callable[..., Dataset]:
    """`open_dataset(store, split, answers, n)`: its questions as the store has them now.

    `answers` None: those with choices. `n`: neighbours of each clip, 0 for no retrieval.
    """

    def opened(store: FeatureStore, split: str, answers: Sequence[str] | None = None, n: int = 3) -> Dataset:
        pins = Pins.latest(store)
        clips = Clips.read(store, pins.clips)
        examples = Examples.read(store, pins, clips, QuestionFilter(split=split), answers)
        near = NeighbourRows.read(store, pins, clips, INDEX, Retrieval.PAIRED, n) if n else None
        choices = answers is None
        return Dataset(
            store=store, pins=pins, clips=clips, examples=examples, neighbours=near, choices=choices
        )

    return opened
