"""Stores that a model can learn from, trainings of a second, and a browser."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, Page
from factories import LEARNABLE, learnable_clip, learnable_question, odd_questions, write_rows

from r2scp.jobs.ingest.index import run_index
from r2scp.jobs.training.config import StageConfig, TrainConfig
from r2scp.jobs.training.data import answers_of
from r2scp.jobs.training.run import TrainOptions, TrainPlan
from r2scp.jobs.training.with_baselines import train_with_baselines
from r2scp.model.config import ModelConfig
from r2scp.pipelines.batches.examples import Pins
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Retrieval, Table


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
    clips = [learnable_clip(number, split, rng) for number, split in enumerate(splits)]
    clips[16] |= {"audio": None, "audio_key": None}
    clips[17] |= {"visual": None, "visual_key": None}
    questions = [learnable_question(clip, kind, rng) for clip in clips[:26] for kind in (0, 1)]
    questions += [learnable_question(clip, 2, rng) for clip in clips[26:]]
    write_rows(store, Table.CLIPS, clips)
    write_rows(store, Table.QUESTIONS, questions)
    run_index(store, IndexSettings(retrieval=(Retrieval.PAIRED,), n=4), lambda mode, done, total: None)
    return store


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


@pytest.fixture(scope="session")
def evaluated_run(
    learnable_store: FeatureStore,
    quick_plan: Callable[..., TrainPlan],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[FeatureStore, Path]:
    """`learnable_store` with `odd_questions`, and a run on it with its baselines. Only to be read."""
    folder = tmp_path_factory.mktemp("evaluated_run")
    store = FeatureStore.open(shutil.copytree(learnable_store.uri, folder / "store").as_posix())
    clips = {row["clip_id"]: row for row in store.clips(["clip_id", "corpus", "split", "labels"]).to_pylist()}
    write_rows(store, Table.QUESTIONS, odd_questions([clips[f"music-avqa/{at}"] for at in range(26)]))
    train_with_baselines(
        quick_plan(folder / "run", store, evaluate_rows=7), TrainOptions(threads=1), lambda *_: None
    )
    return store, folder / "run"


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[FeatureStore], FeatureStore]:
    """`copy(store)`: one of one's own, to write into."""

    def copied(store: FeatureStore) -> FeatureStore:
        return FeatureStore.open(shutil.copytree(store.uri, tmp_path / "copied-store").as_posix())

    return copied


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


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`open_page(html_path, width=1280, scheme="light")`: the file, opened and laid out."""
    contexts = []

    def look(html: Path, width: int = 1280, scheme: str = "light") -> Page:
        def opened() -> Page:
            context = browser.chromium.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, locale="en-GB"
            )
            contexts.append(context)
            shown = Page(browser, context.new_page())
            loud = ("error", "warning")
            page, itself = shown.page, html.resolve().as_uri()
            page.on("console", lambda message: message.type in loud and shown.errors.append(message.text))
            page.on("pageerror", lambda error: shown.page_errors.append(str(error)))
            page.on("dialog", lambda dialog: (shown.dialogs.append(dialog.message), dialog.dismiss()))
            page.on(
                "request",
                lambda request: (
                    request.url == itself
                    or request.url.startswith("data:")
                    or shown.requests.append(request.url)
                ),
            )
            page.goto(itself, wait_until="load")
            return shown

        return browser.do(opened)

    yield look
    browser.do(lambda: [context.close() for context in contexts])
