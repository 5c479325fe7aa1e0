"""Extraction with Pixeltable, whose functions must stand at the top of a module. Not imported without it.

Its folder is named by PIXELTABLE_HOME before this module is imported.
"""

import asyncio
import json
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pixeltable as pxt
from pixeltable.func import Batch

from benchmarks.extract.peers import Extraction, decoded, embedded
from benchmarks.machine import cores
from r2scp.pipelines.extraction.embed import EncoderSpec

CLIPS_PER_BATCH = 8  # as the flow's


@cache
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores())


@pxt.udf
async def decode_file(path: str) -> bytes:
    return await asyncio.get_running_loop().run_in_executor(threads(), decoded, path)


@pxt.udf(batch_size=CLIPS_PER_BATCH)
def features(clips: Batch[bytes], spec: str) -> Batch[bytes]:
    return embedded(EncoderSpec(**json.loads(spec)), clips)


def with_pixeltable(spec: EncoderSpec) -> Extraction:
    """Decoding in a thread for each core, one encoder, a computed column; frames are not stored."""

    def extract(files: Sequence[Path], folder: Path) -> int:
        table = pxt.create_table(f"clips_{uuid.uuid4().hex}", {"path": pxt.String})
        table.add_computed_column(
            features=features(decode_file(table.path), spec=json.dumps(asdict(spec), sort_keys=True))
        )
        table.insert([{"path": str(file)} for file in files])
        return sum(row["features"] != b"" for row in table.select(table.features).collect())

    return extract
