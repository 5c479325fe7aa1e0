"""Proves what carrying clips from one stage to the next costs, in counts: bytes copied, calls of the encoder.

Oracles: the addresses of the arrays that `decode` gave; the memory that Arrow's pool holds; the calls that an
encoder notes down itself.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.data

from r2scp.jobs.ingest.extract import Destination, Source, run_extract
from r2scp.pipelines.decoding.decode import Clip, decode
from r2scp.pipelines.extraction import stages
from r2scp.pipelines.extraction.embed import EmbedClips, Encoder, EncoderSpec
from r2scp.pipelines.extraction.flow import TASKS_PER_CORE, clips_per_task
from r2scp.pipelines.extraction.stages import DECODED_SCHEMA, SOURCE_SCHEMA, DecodeClips
from r2scp.pipelines.ray_session import Resources

BATCH = Resources().clips_per_batch
SMALL = 1 << 16  # bytes: more than the columns of a clip without its frames and sound


def decoded(paths: list[Path]) -> Iterator[pa.Table]:
    """One table a clip, as the decode stage gives them."""
    same = {"corpus": "folder", "labels": [], "known_sha256": "", "attempts": 0}
    rows = [same | {"clip_id": f"{at}", "uri": str(path)} for at, path in enumerate(paths)]
    return DecodeClips(Resources().limits, None)(pa.Table.from_pylist(rows, schema=SOURCE_SCHEMA))


def test_a_decoded_clip_is_carried_in_the_memory_it_was_decoded_into(
    media_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips: list[Clip] = []

    def kept(*given: Any) -> Clip:
        clips.append(decode(*given))
        return clips[-1]

    monkeypatch.setattr(stages, "decode", kept)
    before = pa.total_allocated_bytes()
    names = ("both.mp4", "silent.mp4", "sound.wav")
    tables = list(decoded([media_folder / name for name in names]))
    assert pa.total_allocated_bytes() - before < SMALL
    assert all(table.schema == DECODED_SCHEMA for table in tables)
    for clip, table in zip(clips, tables, strict=True):
        for name, array in (("frames", clip.frames), ("waveform", clip.waveform)):
            chunk = table[name].chunk(0)
            if array is None:
                assert chunk.null_count == 1
            else:
                assert chunk.buffers()[2].address == array.ctypes.data, f"{name} was copied"
                assert chunk[0].as_py() == array.tobytes()
    assert [clip.frames is None for clip in clips] == [False, False, True]


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 8, 12])
def test_whole_tasks_make_up_a_batch(batch: int) -> None:
    """And there are enough of them for all cores, where there are enough clips."""
    for cores in (1, 2, 16, 128):
        for rows in (1, 2, 47, 48, 192, 10_000):
            count = clips_per_task(rows, cores, batch)
            assert batch % count == 0
            assert count == 1 or rows // count >= TASKS_PER_CORE * cores
        assert clips_per_task(10**6, cores, batch) == batch


@pytest.mark.usefixtures("local_ray")
def test_ray_copies_no_frames_on_the_way_into_a_batch(media_folder: Path) -> None:
    """It does of a block that must be cut, which is why the clips of a task divide a batch."""
    clip = next(decoded([media_folder / "both.mp4"]))

    def batches(rows_a_block: int) -> list[dict[str, int]]:
        def open_page(batch: pa.Table) -> pa.Table:
            chunks, allocated = batch["frames"].num_chunks, pa.total_allocated_bytes()
            return pa.table({"rows": [len(batch)], "chunks": [chunks], "allocated": [allocated]})

        blocks = [pa.concat_tables([clip] * rows_a_block)] * (2 * BATCH // rows_a_block)
        batches = ray.data.from_arrow(blocks).map_batches(
            open_page, batch_size=BATCH, batch_format="pyarrow", num_cpus=1
        )
        return batches.take_all()

    frames = clip["frames"][0].as_buffer().size
    for rows_a_block in (1, BATCH // 2, BATCH):
        for batch in batches(rows_a_block):
            assert (batch["rows"], batch["chunks"]) == (BATCH, BATCH)
            assert batch["allocated"] < frames
    assert max(batch["allocated"] for batch in batches(2 * BATCH)) > 2 * BATCH * frames


@pytest.mark.usefixtures("local_ray")
def test_the_encoder_gets_full_batches(media_folder: Path, tmp_path: Path) -> None:
    """48 clips on 2 cores: three for each task would be even, and would not fit into batches of eight."""
    for name in ("text.mp4", "silent.mp4", "sound.wav", "other.mp4"):
        (media_folder / name).unlink()
    for number in range(47):
        (media_folder / f"more{number}.mp4").symlink_to(media_folder / "both.mp4")
    notes = tmp_path / "calls"

    class Noting:
        dim = 8

        def visual(self, frames: np.ndarray) -> np.ndarray:
            with notes.open("a") as stream:
                stream.write(f"{len(frames)}\n")
            return np.eye(8, dtype=np.float32)[np.zeros(len(frames), int)]

        def audio(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
            return [np.eye(8, dtype=np.float32)[:1] for _ in waveforms]

    class NotingSpec(EncoderSpec):
        def load(self) -> Encoder:
            return Noting()  # pyright: ignore[reportReturnType]  # no questions here

    spec = NotingSpec(source="", fingerprint="noting", dim=8, dtype="fp32", device="cpu", sha256=None)
    report = run_extract(
        Source("folder", media_folder),
        Destination(str(tmp_path / "store")),
        spec,
        Resources(),
        lambda *_: None,
    )
    assert report.stored == 48
    assert notes.read_text().split() == ["16"] * 6, "two frames of each of eight clips"


def test_the_actor_reads_frames_where_they_lie(media_folder: Path, tiny_encoder: EncoderSpec) -> None:
    """Of a batch it copies what goes through the towers together, once, and nothing in Arrow's memory."""
    embed = EmbedClips(tiny_encoder, threads=1)
    batch = pa.concat_tables(decoded([media_folder / "both.mp4"] * BATCH))
    before = pa.total_allocated_bytes()
    embedded = embed(batch)
    assert pa.total_allocated_bytes() - before < SMALL * BATCH
    assert len(embedded) == BATCH
