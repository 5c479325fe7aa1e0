"""Extraction end to end, on real Ray, ffmpeg and towers: what is stored is right, and nothing is done twice.

The oracle of the embeddings is the encoder run directly on what `decode` gives.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from r2scp.jobs.faults.injection import FailingStage, FaultOrder
from r2scp.jobs.ingest.extract import Destination, ExtractReport, Source, run_extract
from r2scp.model.imagebind.imagebind import DTYPE_NAMES, ImageBind, normalise_frames
from r2scp.model.imagebind.melspec import log_mel, windows
from r2scp.pipelines.decoding.decode import decode
from r2scp.pipelines.decoding.ffmpeg_command import find_program
from r2scp.pipelines.extraction import flow
from r2scp.pipelines.extraction.embed import (
    EmbedClips,
    EncoderSpec,
    ImageBindEncoder,
    embedded_schema,
    key_of,
)
from r2scp.pipelines.extraction.stages import SOURCE_SCHEMA, DecodeClips
from r2scp.pipelines.ray_session import Resources
from r2scp.store.errors import StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

pytestmark = pytest.mark.usefixtures("local_ray")


@dataclass
class Bench:
    """One store and one folder of media, and the ways to extract the one into the other."""

    media: Path
    uri: str
    encoder: EncoderSpec

    def extract(self, ffmpeg: str | None = None, **source: object) -> ExtractReport:
        progress: list[tuple[int, int]] = []
        report = run_extract(
            Source(**{"corpus": "folder", "root": self.media} | source),
            Destination(self.uri),
            self.encoder,
            Resources(ffmpeg=ffmpeg),
            lambda report, total: progress.append((report.decoded, total)),
        )
        assert report.inputs == report.stored + report.unchanged + report.failed
        assert progress == sorted(progress), "progress went backwards"
        assert len({total for _, total in progress}) <= 1
        return report

    @property
    def store(self) -> FeatureStore:
        return FeatureStore.open(self.uri, self.encoder.fingerprint)

    def clips(self) -> dict[str, dict]:
        return {row["clip_id"].removeprefix("folder/"): row for row in self.store.clips().to_pylist()}

    def failures(self) -> dict[str, dict]:
        return {row["clip_id"].removeprefix("folder/"): row for row in self.store.failures().to_pylist()}


@pytest.fixture
def bench(media_folder: Path, tmp_path: Path, tiny_encoder: EncoderSpec) -> Bench:
    return Bench(media_folder, str(tmp_path / "store"), tiny_encoder)


def listing(folder: str) -> dict[str, tuple[int, int, bytes]]:
    """Every file and folder below, with its time of change and content."""
    entries = {}
    for path in Path(folder).rglob("*"):
        facts = path.stat()
        entries[str(path)] = (facts.st_mtime_ns, facts.st_size, b"" if path.is_dir() else path.read_bytes())
    return entries


def rewrite(path: Path, content: bytes) -> None:
    """New content at a new time, however coarse the clock."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def test_first_and_second_run(bench: Bench) -> None:
    first = bench.extract()
    assert (first.inputs, first.stored, first.failed, first.unchanged) == (5, 4, 1, 0)
    assert first.reasons == {"not_media": 1}
    clips = bench.clips()
    statuses = {name: (row["visual_status"], row["audio_status"]) for name, row in clips.items()}
    assert statuses == {
        "both.mp4": ("present", "present"),
        "other.mp4": ("present", "present"),
        "silent.mp4": ("present", "absent"),
        "sound.wav": ("absent", "present"),
    }
    assert {name: row["expected_frames"] for name, row in clips.items()}["both.mp4"] == 2
    assert clips["silent.mp4"]["audio"] is clips["silent.mp4"]["audio_key"] is None
    assert clips["sound.wav"]["visual"] is clips["sound.wav"]["visual_key"] is None
    failure = bench.failures()["text.mp4"]
    assert (failure["reason"], failure["stage"], failure["attempts"]) == ("not_media", "decode", 1)
    assert failure["uri"] == str(bench.media / "text.mp4")
    [run] = bench.store.dataset(Table.RUNS).to_table().to_pylist()
    assert run["status"] == "done"
    assert run["run_id"] == first.run_id == failure["run_id"]
    assert json.loads(run["counts"])["stored"] == 4

    before = listing(bench.uri)
    second = bench.extract()
    assert (second.unchanged, second.failed, second.plan.already_failed, second.decoded) == (4, 1, 1, 0)
    assert second.run_id == ""
    assert second.clips_version == first.clips_version
    assert listing(bench.uri) == before, "a run with nothing to do wrote something"


def test_embeddings_are_those_of_the_encoder(bench: Bench, tiny_weights: Path) -> None:
    bench.extract()
    dtype = {name: dtype for dtype, name in DTYPE_NAMES.items()}[bench.encoder.dtype]
    model = ImageBind.load(str(tiny_weights), "cpu", dtype)
    clips = bench.clips()
    for name in ("both.mp4", "other.mp4"):
        clip = decode(bench.media / name)
        with torch.inference_mode():
            seen = model.vision(normalise_frames(torch.from_numpy(clip.frames.copy()))).numpy()
            heard = model.audio(log_mel(windows(clip.waveform.copy()))).numpy()
        for column, sequence in (("visual", seen), ("audio", heard)):
            stored = np.array(clips[name][column], np.float32)
            assert stored.shape == sequence.shape
            # bf16 towers: the order of sums differs with the size of a batch
            assert np.abs(stored - sequence).max() < (2e-3 if dtype == torch.float32 else 2e-2)
            assert np.allclose(np.linalg.norm(stored, axis=1), 1, atol=2e-3)
            key = np.array(clips[name][f"{column}_key"], np.float32)
            mean = stored.mean(axis=0)
            assert np.linalg.norm(key) == pytest.approx(1, abs=1e-5)
            assert key @ (mean / np.linalg.norm(mean)) == pytest.approx(1, abs=1e-4)
    assert not np.allclose(clips["both.mp4"]["visual_key"], clips["other.mp4"]["visual_key"], atol=1e-3)


def test_decoding_has_every_core(bench: Bench, rendered_media: Mapping[str, bytes], tmp_path: Path) -> None:
    """Two cores, two runs of ffmpeg at a time, one for each file: what is embedded and written takes none."""
    for number in range(40):
        (bench.media / f"more{number}.mp4").write_bytes(rendered_media["both.mp4"])
    now, seen, spy = tmp_path / "now", tmp_path / "seen", tmp_path / "ffmpeg"
    now.mkdir()
    seen.mkdir()
    program = find_program(None).path
    lines = (  # it may write no byte into any file, but make empty ones
        "#!/bin/sh",
        f'case "$*" in *pipe:*) ;; *) exec \'{program}\' "$@";; esac',
        f"mkdir '{now}'/$$",
        f": > '{seen}'/$$-$(ls '{now}' | wc -l)",
        f"'{program}' \"$@\"",
        f"code=$?; rmdir '{now}'/$$; exit $code",
    )
    spy.write_text("\n".join(lines) + "\n")
    spy.chmod(0o755)
    assert bench.extract(ffmpeg=str(spy)).stored == 44
    beside = [int(path.name.partition("-")[2]) for path in seen.iterdir()]
    assert len(beside) == 44
    assert max(beside) == 2


def test_only_files_whose_content_changed_are_decoded(
    bench: Bench, rendered_media: Mapping[str, bytes]
) -> None:
    """One file is touched, replaced, broken, repaired and removed, with a run after each."""
    version = bench.extract().clips_version
    before = bench.clips()
    os.utime(bench.media / "both.mp4", ns=(10**18, 10**18))
    touched = bench.extract()
    assert (touched.unchanged, touched.decoded, touched.stored) == (4, 0, 0)
    assert touched.clips_version == version

    rewrite(bench.media / "both.mp4", rendered_media["other.mp4"])
    replaced = bench.extract()
    assert (replaced.decoded, replaced.stored, replaced.unchanged) == (1, 1, 3)
    assert replaced.plan.already_failed == 1
    after = bench.clips()
    assert len(after) == len(before) == bench.store.clips().num_rows
    assert after["both.mp4"]["visual"] == before["other.mp4"]["visual"]
    assert {name for name in after if after[name] != before[name]} == {"both.mp4"}

    rewrite(bench.media / "both.mp4", b"overwritten by mistake\n" * 30)
    broken = bench.extract()
    assert (broken.failed, broken.plan.already_failed, broken.decoded) == (2, 1, 1)
    assert "both.mp4" not in bench.clips()
    assert bench.failures().keys() == {"both.mp4", "text.mp4"}

    rewrite(bench.media / "both.mp4", rendered_media["both.mp4"])
    repaired = bench.extract()
    assert (repaired.stored, repaired.unchanged, repaired.failed) == (1, 3, 1)
    assert "both.mp4" in bench.clips()
    assert bench.failures().keys() == {"text.mp4"}

    (bench.media / "both.mp4").unlink()
    removed = bench.extract()
    assert (removed.plan.gone, removed.inputs, removed.decoded) == (["folder/both.mp4"], 4, 0)
    assert "both.mp4" in bench.clips(), "features are not thrown away with the file"


def test_limit_and_retry_failed(bench: Bench) -> None:
    limited = bench.extract(limit=2)
    assert (limited.inputs, limited.stored) == (2, 2)
    assert limited.plan.gone == []
    whole = bench.extract()
    assert (whole.inputs, whole.unchanged, whole.stored, whole.failed) == (5, 2, 2, 1)
    assert bench.extract(limit=2).plan.gone == [], "what lies beyond the limit is not gone"
    retried = bench.extract(retry_failed=True)
    assert (retried.decoded, retried.failed, retried.plan.already_failed, retried.unchanged) == (1, 1, 0, 4)
    assert bench.failures()["text.mp4"]["attempts"] == 2


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., Path]:
    """Write a MUSIC-AVQA file of (id, video, question, answer)."""

    def write(*questions: tuple[int, str, str, str]) -> Path:
        rows = [
            {
                "video_id": video,
                "question_id": number,
                "type": '["Audio", "Counting"]',
                "question_content": text,
                "templ_values": "[]",
                "anser": answer,
            }
            for number, video, text, answer in questions
        ]
        path = tmp_path / "avqa-train.json"
        path.write_text(json.dumps(rows))
        return path

    return write


def test_questions_are_stored_once_and_replaced_when_changed(
    bench: Bench, asked: Callable[..., Path]
) -> None:
    how_many, loudest = "How many instruments are sounding ?", "Is the flute louder than the violin ?"
    first = [(1, "both", how_many, "two"), (2, "both", loudest, "flute"), (3, "other", how_many, "one")]
    path = asked(*first, (4, "nowhere", how_many, "one"), (5, "text", how_many, "one"))
    report = bench.extract(corpus="music-avqa", annotations=(path,))
    assert (report.inputs, report.stored, report.failed, report.plan.missing_files) == (3, 2, 1, 1)
    counts = {"inputs": 5, "stored": 3, "unchanged": 0, "without_clip": 2, "rejects": 0, "duplicates": 0}
    counts |= {"dropped": 0}
    assert report.questions.counts == counts
    rows = {row["question_id"]: row for row in bench.store.questions().to_pylist()}
    assert rows["music-avqa/2"]["answer"] == "flute"
    assert rows["music-avqa/1"]["words"] == rows["music-avqa/3"]["words"]
    assert len(rows["music-avqa/1"]["words"]) != len(rows["music-avqa/2"]["words"])
    words, sentences = bench.encoder.load().questions([how_many, loudest])
    assert np.abs(np.array(rows["music-avqa/1"]["words"]) - words[0]).max() < 2e-2
    assert np.abs(np.array(rows["music-avqa/2"]["sentence"]) - sentences[1]).max() < 2e-2
    assert np.linalg.norm(rows["music-avqa/2"]["sentence"]) == pytest.approx(1, abs=1e-3)

    before = listing(bench.uri)
    again = bench.extract(corpus="music-avqa", annotations=(path,))
    assert again.questions.counts == counts | {"stored": 0, "unchanged": 3}
    assert listing(bench.uri) == before

    path = asked(first[0], (2, "both", loudest, "violin"), first[2])
    changed = bench.extract(corpus="music-avqa", annotations=(path,))
    assert changed.questions.counts == counts | {"inputs": 3, "stored": 1, "unchanged": 2, "without_clip": 0}
    rows = bench.store.questions(columns=["question_id", "answer"]).to_pylist()
    assert sorted(row["answer"] for row in rows) == ["one", "two", "violin"]


def test_an_encoder_that_gives_no_numbers(bench: Bench) -> None:
    """NaN for one clip makes that clip fail, and the others in the batch are stored."""

    class Broken:
        dim = 8

        def visual(self, frames: np.ndarray) -> np.ndarray:
            unit = np.eye(8, dtype=np.float32)[np.zeros(len(frames), int)]
            unit[0] = np.nan
            return unit

        def audio(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
            return [np.eye(8, dtype=np.float32)[:1] for _ in waveforms]

    class BrokenSpec(EncoderSpec):
        def load(self) -> Broken:
            return Broken()

    spec = BrokenSpec(source="", fingerprint="broken", dim=8, dtype="fp32", device="cpu", sha256=None)
    bench = replace(bench, encoder=spec)
    report = bench.extract()
    assert report.reasons["embed_failed"] >= 1
    assert report.reasons["not_media"] == 1
    assert "sound.wav" in bench.clips(), "sound has no picture, so nothing of it is NaN"
    failed = [row for row in bench.failures().values() if row["reason"] == "embed_failed"]
    assert {row["stage"] for row in failed} == {"embed"}
    assert report.stored + len(failed) + 1 == 5
    assert all(np.isfinite(row["visual_key"]).all() for row in bench.clips().values() if row["visual_key"])


def test_stages_keep_order_and_failures(bench: Bench) -> None:
    """Without Ray: every row that goes in comes out, in its place, decoded or failed."""
    names = ["text.mp4", "both.mp4", "gone.mp4", "sound.wav", "silent.mp4"]
    source = {"corpus": "folder", "labels": [], "known_sha256": "", "attempts": 2}
    rows = [source | {"clip_id": name, "uri": str(bench.media / name)} for name in names]
    decoded = pa.concat_tables(
        DecodeClips(Resources().limits, None)(pa.Table.from_pylist(rows, schema=SOURCE_SCHEMA))
    )
    embedded = EmbedClips(bench.encoder, threads=1)(decoded)
    assert embedded.schema == embedded_schema(bench.encoder.dim)
    assert embedded["clip_id"].to_pylist() == names
    assert embedded["outcome"].to_pylist() == ["failed", "decoded", "failed", "decoded", "decoded"]
    assert embedded["reason"].to_pylist()[2] == "unreadable"
    assert [row is not None for row in embedded["visual"].to_pylist()] == [False, True, False, False, True]
    assert [row is not None for row in embedded["audio"].to_pylist()] == [False, True, False, True, False]


def test_the_key_is_the_unit_mean() -> None:
    sequence = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    assert key_of(sequence) == pytest.approx(np.array([1, 1, 0]) / np.sqrt(2))
    assert key_of(sequence.astype(np.float16)).dtype == np.float32


def test_batches_of_frames_do_not_change_the_embedding(tiny_weights: Path) -> None:
    encoder = ImageBindEncoder(ImageBind.load(str(tiny_weights), "cpu", torch.float32))
    frames = np.random.default_rng(0).integers(0, 256, (20, 224, 224, 3), np.uint8)  # more than one forward
    together = encoder.visual(frames)
    assert np.abs(together[17:] - encoder.visual(frames[17:])).max() < 1e-4
    sounds = [np.sin(np.arange(16_000 * s) / 7).astype(np.float32) for s in (1, 3)]
    alone = [encoder.audio([sound])[0] for sound in sounds]
    for one, two in zip(encoder.audio(sounds), alone, strict=True):
        assert np.abs(one - two).max() < 1e-4


def test_a_store_that_takes_nothing_is_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers meet it, and try again; what arrives here is the store's error and no traceback of Ray's."""
    monkeypatch.setattr(FailingStage, "order", FaultOrder(file="", chance=1.0))
    monkeypatch.setattr(flow, "StageRows", FailingStage)
    with pytest.raises(StoreError, match=r"^cannot write to .*clips\.lance: .*Input/output error$"):
        bench.extract()
    assert bench.store.clips().num_rows == 0
    [run] = bench.store.dataset(Table.RUNS).to_table().to_pylist()
    assert run["status"] == "failed"
    monkeypatch.undo()
    assert bench.extract().stored == 4
