"""The stages of extraction, each `Arrow table -> Arrow table(s)` and unaware of what runs it.

`DecodeClips` -> `embed.EmbedClips` -> `StageRows`. A row that fails at one stage is passed on with its
failure; it is never dropped and never stops the rows beside it. No torch here: workers that only decode or
write do not need it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r2scp.pipelines.decoding.decode import Clip, DecodeLimits, decode, decode_fingerprint
from r2scp.pipelines.media_file import file_digest
from r2scp.store.commits import TableAddress, stage
from r2scp.store.errors import FailureReason, MediaError
from r2scp.store.lease import now
from r2scp.store.schema import ModalityStatus

FRAME_SHAPE = (224, 224, 3)

#: Input of the flow: one row per clip whose file is on the disk.
SOURCE_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("corpus", pa.string()),
        pa.field("video_id", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("uri", pa.string()),
        pa.field("known_sha256", pa.string()),  # of the stored clip with this id, "" for none
        pa.field("attempts", pa.int32()),  # failures so far
    ]
)

#: After decoding. `outcome`: decoded | unchanged | failed.
DECODED_SCHEMA = pa.schema(
    [
        *SOURCE_SCHEMA,
        pa.field("outcome", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("content_sha256", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("frames", pa.large_binary()),  # uint8 (T, 224, 224, 3)
        pa.field("waveform", pa.large_binary()),  # float32 (S,)
        pa.field("duration_s", pa.float64()),
        pa.field("visual_status", pa.string()),
        pa.field("audio_status", pa.string()),
        pa.field("expected_frames", pa.int32()),
        pa.field("decoded_frames", pa.int32()),
        pa.field("expected_audio_s", pa.float64()),
        pa.field("decoded_audio_s", pa.float64()),
        pa.field("decode_errors", pa.string()),
    ]
)


class DecodeClips:
    """Source rows to decoded rows, one table per clip so that few frames are in memory at once."""

    def __init__(self, limits: DecodeLimits, ffmpeg: str | None) -> None:
        self._limits = limits
        self._ffmpeg = ffmpeg

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.select(SOURCE_SCHEMA.names).to_pylist():
            values, raw = self._decoded(row)
            table = pa.Table.from_pylist([row | values], schema=DECODED_SCHEMA)
            for name, array in raw.items():
                table = table.set_column(DECODED_SCHEMA.get_field_index(name), name, binary_cell(array))
            yield table

    def _decoded(self, row: Mapping[str, str]) -> tuple[dict[str, object], dict[str, np.ndarray]]:
        """The columns of one decoded file, and the arrays of the large ones."""
        facts: dict[str, object] = {}
        try:
            digest = file_digest(row["uri"])
            facts = {"content_sha256": digest.sha256, "bytes": digest.bytes, "mtime_ns": digest.mtime_ns}
            if digest.sha256 == row["known_sha256"]:
                return facts | {"outcome": "unchanged"}, {}
            clip = decode(row["uri"], self._limits, self._ffmpeg)
        except MediaError as error:
            return facts | failure_columns("decode", error.reason, error.detail), {}
        raw = {"frames": clip.frames, "waveform": clip.waveform}
        return facts | {"outcome": "decoded"} | _columns(clip), {
            name: array for name, array in raw.items() if array is not None
        }


def binary_cell(array: np.ndarray) -> pa.LargeBinaryArray:
    """The bytes of one C-contiguous array as a column with one cell, in the array's own memory: no copy."""
    data = pa.py_buffer(array)
    ends = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, data])


def failure_columns(stage_name: str, reason: FailureReason, detail: str) -> dict[str, object]:
    """The columns of a row that failed at a stage."""
    return {"outcome": "failed", "stage": stage_name, "reason": reason.value, "detail": detail}


def _columns(clip: Clip) -> dict[str, object]:
    return {
        "duration_s": clip.duration_s,
        "visual_status": clip.visual.status.value,
        "audio_status": clip.audio.status.value,
        "expected_frames": round(clip.visual.expected),
        "decoded_frames": round(clip.visual.decoded),
        "expected_audio_s": clip.audio.expected,
        "decoded_audio_s": clip.audio.decoded,
        "decode_errors": clip.errors,
    }


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Columns that are the same in every row of one run."""

    run_id: str
    decode_fingerprint: str
    encoder_fingerprint: str

    @classmethod
    def of(cls, run_id: str, encoder_fingerprint: str, ffmpeg: str | None) -> "Provenance":
        return cls(
            run_id=run_id,
            decode_fingerprint=decode_fingerprint(ffmpeg),
            encoder_fingerprint=encoder_fingerprint,
        )


class StageRows:
    """Embedded rows to data files of `clips` and `failures`; returns one row that lists what was staged.

    Columns: `stored`, `failed` (JSON of `Staged`), `unchanged` (ids), `partial` (a count), `reasons` (JSON).
    """

    def __init__(self, clips: TableAddress, failures: TableAddress, provenance: Provenance) -> None:
        self._clips = clips
        self._failures = failures
        self._provenance = asdict(provenance)

    def __call__(self, batch: pa.Table) -> pa.Table:
        decoded, failed, unchanged = (
            batch.filter(pc.field("outcome") == outcome) for outcome in ("decoded", "failed", "unchanged")
        )
        attempts = pa.array([(count or 0) + 1 for count in failed["attempts"].to_pylist()], pa.int32())
        failed = failed.set_column(failed.schema.get_field_index("attempts"), "attempts", attempts)
        clips = _conform(decoded, self._clips.schema, self._provenance | {"ingested_at": now()})
        failures = _conform(failed, self._failures.schema, self._provenance | {"at": now()})
        statuses = zip(*(clips[name].to_pylist() for name in ("visual_status", "audio_status")), strict=True)
        return pa.table(
            {
                "stored": [stage(self._clips, clips).to_json()],
                "failed": [stage(self._failures, failures).to_json()],
                "unchanged": [unchanged["clip_id"].to_pylist()],
                "partial": [sum(ModalityStatus.PARTIAL in pair for pair in statuses)],
                "reasons": [json.dumps(failures["reason"].to_pylist())],
            }
        )


def _conform(rows: pa.Table, schema: pa.Schema, constants: Mapping[str, object]) -> pa.Table:
    """`rows` with the columns of `schema`, `constants` in every row; embeddings stay in Arrow."""

    def column(field: pa.Field) -> pa.Array | pa.ChunkedArray:
        if field.name in constants:
            return pa.array([constants[field.name]] * len(rows), type=field.type)
        return rows[field.name]

    return pa.table([column(field) for field in schema], schema=schema)
