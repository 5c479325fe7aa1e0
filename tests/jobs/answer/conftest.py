"""A corpus of real mp4 files in a store, with an untrained model that answers questions about them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from r2scp.jobs.answer.answerer import Answerer, AnswerOptions
from r2scp.jobs.ingest.encoders import encoder_spec
from r2scp.jobs.ingest.index import run_index
from r2scp.jobs.training.checkpoints import BEST, Checkpoint, write_checkpoint
from r2scp.jobs.training.config import demo
from r2scp.model.config import Stage
from r2scp.model.r2scp import R2SCP
from r2scp.pipelines.corpora.formats import open_corpus
from r2scp.pipelines.decoding.decode import DEFAULT_LIMITS, decode_fingerprint
from r2scp.pipelines.demo.corpus import generate
from r2scp.pipelines.extraction.embed import EmbedClips, EncoderSpec
from r2scp.pipelines.extraction.plan import PlanOptions, plan_clips
from r2scp.pipelines.extraction.questions import plan_questions, write_questions
from r2scp.pipelines.extraction.stages import DecodeClips, Provenance, StageRows
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.commits import Staged
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

CLIPS = 16


@dataclass(frozen=True)
class World:
    """A corpus of real mp4 files in a store, with an untrained model for it."""

    store: FeatureStore
    run: Path
    spec: EncoderSpec

    def video(self, clip_id: str) -> str:
        return self.rows()[clip_id]["uri"]

    def rows(self) -> dict[str, dict]:
        columns = ["clip_id", "uri", "content_sha256", "source_id", "split", "visual_status", "audio_status"]
        return {row["clip_id"]: row for row in self.store.clips(columns).to_pylist()}

    def whole(self) -> list[str]:
        """Clips with both modalities."""
        return sorted(
            clip_id
            for clip_id, row in self.rows().items()
            if row["visual_status"] == row["audio_status"] == "present"
        )

    def sequence(self, clip_id: str, modality: str) -> np.ndarray:
        table = self.store.clips([modality], f"clip_id = '{clip_id}'")
        return np.array(table[modality][0].as_py(), dtype=np.float16)

    def checkpoint(
        self,
        folder: Path,
        answers: list[str] | None,
        stage: Stage = Stage.MIXING,
        store: FeatureStore | None = None,
        **changes: object,
    ) -> Path:
        """The folder of a run with an untrained model."""
        store = store or self.store
        config = demo(store.dim, None if answers is None else len(answers))
        config = replace(config, model=replace(config.model, k=2, dropout=0.0), **changes)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = R2SCP(config.model).set_stage(stage)
        versions = {name: store.versions()[name] for name in ("clips", "questions", "neighbours")}
        checkpoint = Checkpoint(
            stage=stage,
            epoch=1,
            step=1,
            config=config,
            answers=answers,
            store={
                "uri": store.uri,
                "fingerprint": store.fingerprint,
                "dim": store.dim,
                "versions": versions,
            },
            metrics={},
            best={},
            code="",
        )
        folder.mkdir(parents=True)
        write_checkpoint(folder, [BEST], checkpoint, model, {})
        return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("answer")
    generate(folder / "corpus", clips=CLIPS, seed=3)
    spec = encoder_spec("imagebind-demo", None, "cpu")
    store = FeatureStore.create(str(folder / "store"), spec.fingerprint, spec.dim)
    corpus = open_corpus("demo", folder / "corpus")
    plan = plan_clips(corpus, {}, PlanOptions(decode_fingerprint=decode_fingerprint()))
    stage = StageRows(
        store.address(Table.CLIPS),
        store.address(Table.FAILURES),
        Provenance.of("run", spec.fingerprint, None),
    )
    embed = EmbedClips(spec, threads=1)
    for part in DecodeClips(DEFAULT_LIMITS, None)(plan.sources):
        staged = stage(embed(part))["stored"][0].as_py()
        store.commit(Table.CLIPS, [Staged.from_json(staged)], {})
    write_questions(plan_questions(corpus, store), store, spec, "run")
    run_index(store, IndexSettings(), lambda *_: None)
    answers = sorted(set(store.questions(["answer"])["answer"].to_pylist()))
    world = World(store, folder / "run", spec)
    world.checkpoint(world.run, answers)
    return world


@pytest.fixture(scope="session")
def answerer(world: World) -> Answerer:
    return Answerer.open(world.store, world.run, AnswerOptions(workers=2))


@pytest.fixture(scope="session")
def damaged(world: World, tmp_path_factory: pytest.TempPathFactory, render: Callable) -> dict[str, Path]:
    """One clip of the store in several states of damage."""
    folder, whole = tmp_path_factory.mktemp("damaged"), world.video(world.whole()[0])
    return {
        name: render(folder / f"{name}.{'mkv' if name == 'unplugged' else 'mp4'}", ["-i", whole, *arguments])
        for name, arguments in {
            "deaf": ["-an", "-c", "copy"],
            "blind": ["-vn", "-c", "copy"],
            "silent": ["-af", "volume=0", "-c:v", "copy"],
            "blank": ["-vf", "drawbox=color=black:t=fill", "-c:a", "copy"],
            "nothing": ["-vf", "drawbox=color=gray:t=fill", "-af", "volume=0"],
            "quiet": ["-af", "volume=-60dB", "-c:v", "copy"],
            "unplugged": ["-af", "volume=-90dB", "-c:v", "copy", "-c:a", "pcm_s16le"],  # last bits alone
        }.items()
    }
