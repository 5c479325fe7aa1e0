"""The stages of extraction, each `Arrow table -> Arrow table(s)` and unaware of what runs it.

`DecodeClips` -> `embed.EmbedClips` -> `StageRows`. A row that fails at one stage travels on as a dead letter;
it is never dropped and never stops its neighbours. No torch here: workers that only decode or write do not
need it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r2scp.pipelines.decoding.decode import Clip, DecodeLimits, decode, decode_fingerprint
from r2scp.store.commits import TableAddress, stage
from r2scp.store.errors import FailureReason, MediaError
from r2scp.store.lease import now
from r2scp.store.schema import ModalityStatus

HASH_CHUNK = 1 << 20  # bytes
FRAME_SHAPE = (224, 224, 3)

#: What the flow starts from: one row a clip whose file is on the disk.
SOURCE_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("corpus", pa.string()),
        pa.field("video_id", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("uri", pa.string()),
        pa.field("known_sha256", pa.string()),  # of what the store holds under this id, "" for none
        pa.field("attempts", pa.int32()),  # failures so far
    ]
)

#: After decoding. `outcome`: decoded | unchanged | dead.
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
    """Source rows to decoded rows, one table a clip so that few frames are in memory at once."""

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
        """The columns that come of one file, and the arrays of those that are large."""
        facts: dict[str, object] = {}
        try:
            facts = file_facts(row["uri"])
            if facts["content_sha256"] == row["known_sha256"]:
                return facts | {"outcome": "unchanged"}, {}
            clip = decode(row["uri"], self._limits, self._ffmpeg)
        except MediaError as error:
            return facts | failure_columns("decode", error.reason, error.detail), {}
        raw = {"frames": clip.frames, "waveform": clip.waveform}
        return facts | {"outcome": "decoded"} | _columns(clip), {
            name: array for name, array in raw.items() if array is not None
        }


def binary_cell(array: np.ndarray) -> pa.LargeBinaryArray:
    """The bytes of one C-contiguous array as the one cell of a column, in the array's own memory: no copy."""
    data = pa.py_buffer(array)
    ends = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, data])


def file_facts(path: str) -> dict[str, object]:
    """Digest, size and time of change of one regular file. Raises `MediaError` where it cannot be read."""
    digest = hashlib.sha256()
    try:
        if not Path(path).is_file():
            raise MediaError(FailureReason.UNREADABLE, "not a regular file, or gone since it was listed")
        with open(path, "rb") as stream:
            facts = os.fstat(stream.fileno())
            while chunk := stream.read(HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise MediaError(FailureReason.UNREADABLE, error.strerror or str(error)) from error
    return {"content_sha256": digest.hexdigest(), "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def failure_columns(stage_name: str, reason: FailureReason, detail: str) -> dict[str, object]:
    """The columns that make a row a dead letter."""
    return {"outcome": "dead", "stage": stage_name, "reason": reason.value, "detail": detail}


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
    """What every row of one run carries."""

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
    """Embedded rows to data files of `clips` and `failures`; gives one row that says what was staged.

    Columns: `stored`, `dead` (JSON of `Staged`), `unchanged` (ids), `partial` (a count), `reasons` (JSON).
    """

    def __init__(self, clips: TableAddress, failures: TableAddress, provenance: Provenance) -> None:
        self._clips = clips
        self._failures = failures
        self._provenance = asdict(provenance)

    def __call__(self, batch: pa.Table) -> pa.Table:
        decoded, failed, unchanged = (
            batch.filter(pc.field("outcome") == outcome) for outcome in ("decoded", "dead", "unchanged")
        )
        attempts = pa.array([(before or 0) + 1 for before in failed["attempts"].to_pylist()], pa.int32())
        failed = failed.set_column(failed.schema.get_field_index("attempts"), "attempts", attempts)
        clips = _conform(decoded, self._clips.schema, self._provenance | {"ingested_at": now()})
        failures = _conform(failed, self._failures.schema, self._provenance | {"at": now()})
        statuses = zip(*(clips[name].to_pylist() for name in ("visual_status", "audio_status")), strict=True)
        return pa.table(
            {
                "stored": [stage(self._clips, clips).to_json()],
                "dead": [stage(self._failures, failures).to_json()],
                "unchanged": [unchanged["clip_id"].to_pylist()],
                "partial": [sum(ModalityStatus.PARTIAL in pair for pair in statuses)],
                "reasons": [json.dumps(failures["reason"].to_pylist())],
            }
        )


def _conform(rows: pa.Table, schema: pa.Schema, same: Mapping[str, object]) -> pa.Table:
    """`rows` in the columns of `schema`, with the values of `same` in every row; embeddings stay in Arrow."""

    def column(field: pa.Field) -> pa.Array | pa.ChunkedArray:
        if field.name in same:
            return pa.array([same[field.name]] * len(rows), type=field.type)
        return rows[field.name]

    return pa.table([column(field) for field in schema], schema=schema)
