"""`doctor`: what is installed, what works, what is missing and how to fix it."""

import os
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from r2scp.jobs.ingest.weights import COMMAND, default_weights_path, resolve_encoder
from r2scp.model.imagebind.imagebind import DTYPE_NAMES, best_dtype
from r2scp.pipelines.decoding.ffmpeg_command import find_program
from r2scp.store.errors import R2SCPError
from r2scp.store.feature_store import FeatureStore

PACKAGES = (
    "torch",
    "ray",
    "pyarrow",
    "pylance",
    "lancedb",
    "av",
    "ffmpeg-python",
    "imageio-ffmpeg",
    "tokenizers",
)


def examine(
    store: str, storage_options: Mapping[str, str], ffmpeg: str | None
) -> tuple[dict[str, object], bool]:
    """Results by topic, and whether everything essential is available (weights and a store are optional)."""
    encoder, has_encoder = _demo_encoder()
    program, has_ffmpeg = _ffmpeg(ffmpeg)
    complete = has_encoder and has_ffmpeg
    results = {
        "r2scp_pipe": metadata.version("r2scp-pipe"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "ffmpeg": program,
        "devices": _devices(),
        "imagebind_demo": encoder,
        "imagebind_huge": _huge_weights(),
        "store": _store(store, storage_options),
        "verdict": "everything needed is available" if complete else "something essential is missing",
    }
    return results, complete


def _ffmpeg(path: str | None) -> tuple[str, bool]:
    try:
        program = find_program(path)
    except R2SCPError as error:
        return str(error), False
    return f"{program.version} at {program.path}", True


def _devices() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = {"cpu": f"{cores} cores, computes in {DTYPE_NAMES[best_dtype('cpu')]}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return devices


def _demo_encoder() -> tuple[str, bool]:
    try:
        return resolve_encoder("imagebind-demo"), True
    except R2SCPError as error:
        return str(error), False


def _huge_weights() -> str:
    path = default_weights_path()
    return str(path) if path.is_file() else f"not downloaded; {COMMAND}"


def _store(uri: str, storage_options: Mapping[str, str]) -> str:
    try:
        encoders = FeatureStore.encoders(uri, storage_options)
    except (R2SCPError, OSError, ValueError) as error:
        return f"{uri} cannot be reached: {error}"
    if not encoders:
        local = "://" not in uri
        free = f", {shutil.disk_usage(_existing(Path(uri))).free / 2**30:.0f} GiB free" if local else ""
        return f"{uri}: no store yet{free}"
    return f"{uri}: {', '.join(encoders)}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
