"""The driver's memory does not grow with the corpus: rows stream through the flow in bounded pieces.

Each measurement is a process of its own that plans and runs an extraction over hard links to one file, and
reports its own peak. Stubs stand for decoder and encoder: they give what a second of video gives, at once, so
that the flow is as full as it can be.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2scp.pipelines.ray_session import RAY_ENVIRONMENT

MOST_GROWTH = 200 << 20  # bytes
LINKS_PER_FOLDER = 1_000

#: An extraction whose encoder answers with unit vectors. argv: root, store.
DRIVER = """
import json, resource, sys
from pathlib import Path

import numpy as np

from r2scp.jobs.ingest.extract import Destination, Source, run_extract
from r2scp.pipelines.extraction import flow, stages
from r2scp.pipelines.decoding.decode import Clip, StreamReport
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.pipelines.ray_session import Resources
from r2scp.store.schema import ModalityStatus

DIM = 1024  # as wide as the published encoder


WHOLE = StreamReport(ModalityStatus.PRESENT, 1, 1)
CLIP = Clip(np.zeros((1, 224, 224, 3), np.uint8), np.zeros(16_000, np.float32), WHOLE, WHOLE, 1.0, "")


class Decode(stages.DecodeClips):
    # the real stage, in the worker it runs in, but for ffmpeg
    def __call__(self, batch):
        stages.decode = lambda *_: CLIP
        yield from super().__call__(batch)


flow.DecodeClips = Decode


class Stub:
    dim = DIM

    def visual(self, frames):
        return np.eye(DIM, dtype=np.float32)[: len(frames)]

    def audio(self, waveforms):
        return [np.eye(DIM, dtype=np.float32)[:1] for _ in waveforms]


class Spec(EncoderSpec):
    def load(self):
        return Stub()


spec = Spec(source="", fingerprint="stub", dim=DIM, dtype="fp32", device="cpu", sha256=None)
root, store = sys.argv[1:]
report = run_extract(
    Source("folder", Path(root)), Destination(store), spec, Resources(num_workers=2), lambda *_: None
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "stored": report.stored, "inputs": report.inputs}))
"""


def corpus_of(folder: Path, recording: Path, clips: int) -> Path:
    """`clips` hard links to one recording, as one finds them: in folders."""
    for number in range(clips):
        below = folder / f"{number // LINKS_PER_FOLDER:03}"
        below.mkdir(parents=True, exist_ok=True)
        os.link(recording, below / f"{number:06}{recording.suffix}")
    return folder


def peak_of(tmp_path: Path, recording: Path, clips: int, patience_s: int) -> int:
    """Peak resident bytes of a driver that extracts `clips` clips."""
    root = corpus_of(tmp_path / f"media{clips}", recording, clips)
    words = [sys.executable, "-c", DRIVER, str(root), str(tmp_path / f"store{clips}")]
    environment = os.environ | RAY_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=patience_s, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["stored"] == report["inputs"] == clips
    return report["peak"]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """What all clips link to; nobody decodes it."""
    path = tmp_path / "tick.wav"
    path.write_bytes(b"RIFF" * 100)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("few", "many"), [(50, 1_000), (200, 5_000)])
def test_driver_memory_is_flat(tmp_path: Path, recording: Path, few: int, many: int) -> None:
    small = peak_of(tmp_path, recording, few, 600)
    large = peak_of(tmp_path, recording, many, 600 + many // 2)
    print(f"peak of the driver: {small / 2**20:.0f} MiB at {few} clips, {large / 2**20:.0f} MiB at {many}")
    assert large - small < MOST_GROWTH
