"""What all tests share."""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zlib import crc32

import boto3
import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer

from r2scp.jobs.ingest.encoders import encoder_spec
from r2scp.jobs.ingest.index import run_index
from r2scp.jobs.training.config import StageConfig, TrainConfig
from r2scp.jobs.training.data import answers_of
from r2scp.jobs.training.run import TrainMeans, TrainPlan
from r2scp.jobs.training.with_baselines import run_together
from r2scp.model.config import ModelConfig
from r2scp.model.imagebind.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.pipelines.batches.dataset import Dataset, NeighbourRows
from r2scp.pipelines.batches.examples import Asked, Clips, Examples, Pins
from r2scp.pipelines.extraction.embed import EncoderSpec, key_of
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.pipelines.ray_session import RAY_ENVIRONMENT
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
OBJECT_STORE_BYTES = 256 << 20  # of the Ray that the flow tests share
WIDTH = 12  # of the embeddings in `asked_store`
INDEX = IndexSettings(retrieval=(Retrieval.PAIRED,), n=4)  # of `asked_store`

LEARNABLE = 16  # width of the embeddings in `learnable_store`
#: Of questions in `judged`, split `odd`.
HOSTILE_TYPES = ("[bold]x[bold]", "a\x1b[2J/b\x1b]0;c\x07", "\u202egpj/exe\r\n", "Audio", "Audio/", "/x", "")
HOSTILE_TYPES += ("Audio/" + 200 * "long ", "Audio/" + 200 * "x", "Ton/字 | 字")


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


def picture_and_sound(seconds: float, hertz: int = 440, picture: str = "testsrc") -> list[str]:
    """ffmpeg's arguments for a clip with both streams."""
    return [
        *("-f", "lavfi", "-i", f"{picture}=size=64x64:rate=8:duration={seconds}"),
        *("-f", "lavfi", "-i", f"sine=frequency={hertz}:sample_rate=16000:duration={seconds}"),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "aac", "-shortest"),
    ]


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


def unit_rows(rng: np.random.Generator, rows: int) -> np.ndarray:
    """float16 (rows, WIDTH) of unit norm."""
    drawn = rng.standard_normal((rows, WIDTH))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


def clip_row(number: int, seed: int) -> dict[str, object]:
    """Every 7th clip is deaf, every 11th blind; two of a source are neighbours; 1 to 7 s."""
    rng = np.random.default_rng((seed, number))
    corpus = ("music-avqa", "avqa")[number % 2]
    row: dict[str, object] = {
        "clip_id": f"{corpus}/{number:03d}",
        "corpus": corpus,
        "source_id": f"youtube{number // 4}" if number else "",
        "split": ("train", "train", "val", "train", "test")[number % 5],
        "ingested_at": datetime(2026, 1, 31, tzinfo=UTC),
    }
    for name, gone in (("audio", number % 7 == 6), ("visual", number % 11 == 10)):
        tokens_TD = unit_rows(rng, int(rng.integers(1, 8)))
        row[name] = None if gone else list(tokens_TD)
        row[f"{name}_key"] = None if gone else key_of(tokens_TD)
    return row


def question_row(number: int, clip: Mapping[str, object]) -> dict[str, object]:
    """MUSIC-AVQA's have one of four answers, AVQA's four choices, of which one may be null."""
    rng = np.random.default_rng((7, number))
    text = f"What is sound {number % 9} ?"
    words_WD = unit_rows(np.random.default_rng(crc32(text.encode())), 2 + number % 9 % 4)
    row: dict[str, object] = {
        "question_id": f"{clip['corpus']}/{number * 37 % 101:03d}",
        "clip_id": clip["clip_id"],
        "corpus": clip["corpus"],
        "split": ("train", "val", "train", "test")[number // 2 % 4],
        "question": text,
        "type": f"type {number % 3}",
        "answer": ("two", "flute", "yes", "no")[int(rng.integers(4))],
        "choices": [],
        "answer_index": -1,
        "words": list(words_WD),
        "sentence": key_of(words_WD),
    }
    if clip["corpus"] == "avqa":
        right = int(rng.integers(4))
        choices = [None if number % 3 == 0 and at == right - 1 else f"choice {at}" for at in range(4)]
        sentences_KD = [np.zeros(WIDTH, np.float16) if c is None else unit_rows(rng, 1)[0] for c in choices]
        row |= {"choices": choices, "choice_sentences": sentences_KD}
        row |= {"answer_index": right, "answer": choices[right]}
    return row


def write_rows(
    store: FeatureStore, table: Table, rows: Sequence[Mapping[str, object]], parts: int = 1
) -> None:
    """In one commit of several fragments."""
    schema, size = store.address(table).schema, -(-len(rows) // parts)
    cut = [list(rows[at : at + size]) for at in range(0, len(rows), size)]
    store.commit(table, [store.stage(table, pa.Table.from_pylist(part, schema)) for part in cut], {})


@pytest.fixture(scope="session")
def asked_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Forty clips, seventy questions of two corpora and an index, in fragments with holes. Only to be read.

    Beside the ordinary questions: an answer that training has not, a clip that is not there, no choices, and
    choices of which none is said to be right.
    """
    store = FeatureStore.create(str(tmp_path_factory.mktemp("asked") / "store"), "tiny-encoder", WIDTH)
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
def own_store(tmp_path: Path, asked_store: FeatureStore) -> FeatureStore:
    """A copy of `asked_store` to write into."""
    return FeatureStore.open(shutil.copytree(asked_store.uri, tmp_path / "store").as_posix())


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
        examples = Examples.read(store, pins, clips, Asked(split=split), answers)
        near = NeighbourRows.read(store, pins, clips, INDEX, Retrieval.PAIRED, n) if n else None
        choices = answers is None
        return Dataset(
            store=store, pins=pins, clips=clips, examples=examples, neighbours=near, choices=choices
        )

    return opened


@pytest.fixture(scope="session")
def learnable_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Clips of four kinds that sound and picture both tell, and questions about them. Only to be read.

    Corpus `music-avqa`: 34 train questions (two about a deaf clip), 16 val questions (two about a blind one)
    and two test questions, six answers in all. Corpus `avqa`: 24 train questions of four choices and no
    validation split. No clip's file exists.
    """
    store = FeatureStore.create(str(tmp_path_factory.mktemp("learnable") / "store"), "learnable", LEARNABLE)
    rng = np.random.default_rng(9)
    splits = ["train"] * 17 + ["val"] * 8 + ["test"] + ["train"] * 24
    clips = [telling_clip(number, split, rng) for number, split in enumerate(splits)]
    clips[16] |= {"audio": None, "audio_key": None}
    clips[17] |= {"visual": None, "visual_key": None}
    questions = [telling_question(clip, kind, rng) for clip in clips[:26] for kind in (0, 1)]
    questions += [telling_question(clip, 2, rng) for clip in clips[26:]]
    write_rows(store, Table.CLIPS, clips)
    write_rows(store, Table.QUESTIONS, questions)
    run_index(store, IndexSettings(retrieval=(Retrieval.PAIRED,), n=4), lambda mode, done, total: None)
    return store


def telling_clip(number: int, split: str, rng: np.random.Generator) -> dict[str, object]:
    """3 to 6 s, of kind `number % 4`."""
    corpus, kind = "music-avqa" if number < 26 else "avqa", number % 4
    row: dict[str, object] = {"clip_id": f"{corpus}/{number}", "corpus": corpus, "split": split}
    row |= {"source_id": f"video{number}", "uri": f"/nowhere/{number}.mp4", "labels": [str(kind)]}
    for name, direction in (("audio", kind), ("visual", 4 + kind)):
        tokens_TD = around(direction, int(rng.integers(3, 7)), rng)
        row |= {name: list(tokens_TD), f"{name}_key": key_of(tokens_TD)}
    return row


def telling_question(clip: Mapping[str, Any], asked: int, rng: np.random.Generator) -> dict[str, object]:
    """0: what kind; 1: whether it is an even one; 2: which of four choices."""
    kind = int(clip["labels"][0])
    answer = ("yes", "no")[kind % 2] if asked == 1 else f"kind {kind}"
    row: dict[str, object] = {name: clip[name] for name in ("clip_id", "corpus", "split")}
    row |= {"question_id": f"{clip['clip_id']}/{asked}", "question": f"question {asked} ?", "answer": answer}
    words_WD = around(8 + asked, 2 + asked, np.random.default_rng(asked))
    row |= {"type": f"type {asked}", "choices": [], "answer_index": -1, "words": list(words_WD)}
    row["sentence"] = key_of(words_WD)
    if asked == 2:
        order = rng.permutation(4).tolist()
        sentences_KD = [around(12 + kind, 1, np.random.default_rng(kind))[0] for kind in order]
        row |= {"choices": [f"kind {kind}" for kind in order], "choice_sentences": sentences_KD}
        row["answer_index"] = order.index(kind)
    return row


def around(direction: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    """float16 (rows, LEARNABLE), unit vectors near one axis."""
    drawn = np.eye(LEARNABLE)[direction] + 0.1 * rng.standard_normal((rows, LEARNABLE))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="session")
def quick_plan(learnable_store: FeatureStore) -> Callable[..., TrainPlan]:
    """`quick_plan(folder, store, **changes)`: a training of a second; `changes` are of its config."""

    def plan(folder: Path, store: FeatureStore = learnable_store, **changes: Any) -> TrainPlan:
        pins = Pins.latest(store)
        config = TrainConfig(
            model=ModelConfig(encoder_dim=store.dim, classes=6, dim=16, heads=2),
            stage_one=StageConfig(epochs=3, lr=1e-2, schedule="constant"),
            stage_two=StageConfig(epochs=3, lr=5e-3, schedule="cosine", warmup_steps=2),
            index=IndexSettings(n=4),
            retrieval=Retrieval.PAIRED,
            corpora=("music-avqa",),
            batch_size=8,
        )
        config = replace(config, **changes)
        answers = answers_of(store, pins, config)
        places: dict[str, Any] = {"uri": store.uri, "fingerprint": store.fingerprint, "folder": folder}
        return TrainPlan(pins=pins, config=config, answers=answers, **places)

    return plan


def odd_questions(clips: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Train and test questions of other types than `telling_question` gives, on its 26 clips of MUSIC-AVQA.

    Split `test`: 30 about clips 16 (deaf) to 25, some of types that training has not, and 3 of them with an
    answer that it never saw; 2 about clips that are not there. Split `odd`: hostile types.
    """
    rng, asked = np.random.default_rng(10), []
    counting, place = "Audio-Visual/Counting", "Visual/Location"
    for at in range(6):  # the most frequent of `place` is none: it must not count as an answer
        asked.append(telling_question(clips[at], at % 2, rng) | {"type": ("type 0", place)[at % 2]})
        asked[-1] |= {"question_id": f"more/{at}", "answer": ("no", "")[at in (1, 3)]}
    for at in range(30):
        kind = ("type 0", "type 1", counting, place, "Audio-Visual/Existential")[at % 5]
        asked.append(telling_question(clips[16 + at // 3], at % 2, rng) | {"type": kind, "split": "test"})
        asked[-1] |= {"question_id": f"test/{at}"} | ({"answer": "bagpipe"} if at in (3, 7, 13) else {})
    asked += [asked[-1] | {"question_id": f"gone/{at}", "clip_id": "gone"} for at in range(2)]
    for at, kind in enumerate(HOSTILE_TYPES):
        asked.append(telling_question(clips[18 + at % 8], 0, rng) | {"type": kind, "split": "odd"})
        asked[-1] |= {"question_id": f"odd/{at}"}
    return asked


@pytest.fixture(scope="session")
def judged(
    learnable_store: FeatureStore,
    quick_plan: Callable[..., TrainPlan],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[FeatureStore, Path]:
    """`learnable_store` with `odd_questions`, and a run on it with its baselines. Only to be read."""
    folder = tmp_path_factory.mktemp("judged")
    store = FeatureStore.open(shutil.copytree(learnable_store.uri, folder / "store").as_posix())
    clips = {row["clip_id"]: row for row in store.clips(["clip_id", "corpus", "split", "labels"]).to_pylist()}
    write_rows(store, Table.QUESTIONS, odd_questions([clips[f"music-avqa/{at}"] for at in range(26)]))
    run_together(quick_plan(folder / "run", store, evaluate_rows=7), TrainMeans(threads=1), lambda *_: None)
    return store, folder / "run"


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[FeatureStore], FeatureStore]:
    """`copy(store)`: one of one's own, to write into."""

    def copied(store: FeatureStore) -> FeatureStore:
        return FeatureStore.open(shutil.copytree(store.uri, tmp_path / "copied-store").as_posix())

    return copied


#: Chromium asks its makers for this and that unless told not to.
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
CHROMIUM += ("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")


class Browser:
    """Debian's or anybody's Chromium without a window, in a thread of its own.

    Playwright keeps an event loop in its thread, where `asyncio.run` of other tests would meet it.
    """

    def __init__(self, program: str, start: Callable[[], Any]) -> None:
        self.program, self.start = program, start
        self._thread = ThreadPoolExecutor(1, "browser")
        self._playwright = self.do(lambda: start().start())
        self.chromium = self.do(
            lambda: self._playwright.chromium.launch(executable_path=program, args=list(CHROMIUM))
        )

    def do(self, what: Callable[[], Any]) -> Any:
        """Have something done where the browser may be spoken to."""
        return self._thread.submit(what).result(timeout=120)

    def close(self) -> None:
        """End it, with its processes."""
        self.do(self.chromium.close)
        self.do(self._playwright.stop)
        self._thread.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium for all tests that look at pages."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on the path: apt-get install chromium")
    started = Browser(program, api.sync_playwright)
    try:
        yield started
    finally:
        started.close()


@dataclass
class Looked:
    """A page as a browser shows it. `do(lambda page: ...)` gets playwright's own page."""

    browser: Browser
    page: Any
    errors: list[str] = field(default_factory=list)  # of the console: errors and warnings
    page_errors: list[str] = field(default_factory=list)  # exceptions that nobody caught
    requests: list[str] = field(default_factory=list)  # other than the file itself and data: addresses
    dialogs: list[str] = field(default_factory=list)

    def do(self, what: Callable[[Any], Any]) -> Any:
        """`what(page)`, in the browser's thread."""
        return self.browser.do(lambda: what(self.page))

    def ask(self, script: str, value: object = None) -> Any:
        """What a JavaScript expression, or a function of `value`, gives in the page."""
        return self.do(lambda page: page.evaluate(script, value))

    def screenshot(self, path: Path) -> Path:
        """A PNG of the whole page."""
        self.do(lambda page: page.screenshot(path=path, full_page=True))
        return path


@pytest.fixture
def looked_at(browser: Browser) -> Iterator[Callable[..., Looked]]:
    """`looked_at(html_path, width=1280, scheme="light")`: the file, opened and laid out."""
    contexts = []

    def look(html: Path, width: int = 1280, scheme: str = "light") -> Looked:
        def opened() -> Looked:
            context = browser.chromium.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, locale="en-GB"
            )
            contexts.append(context)
            looked = Looked(browser, context.new_page())
            loud = ("error", "warning")
            page, itself = looked.page, html.resolve().as_uri()
            page.on("console", lambda said: said.type in loud and looked.errors.append(said.text))
            page.on("pageerror", lambda error: looked.page_errors.append(str(error)))
            page.on("dialog", lambda dialog: (looked.dialogs.append(dialog.message), dialog.dismiss()))
            page.on(
                "request",
                lambda asked: (
                    asked.url == itself or asked.url.startswith("data:") or looked.requests.append(asked.url)
                ),
            )
            page.goto(itself, wait_until="load")
            return looked

        return browser.do(opened)

    yield look
    browser.do(lambda: [context.close() for context in contexts])
