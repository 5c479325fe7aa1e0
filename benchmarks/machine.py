"""Which machine and which versions a figure was measured on."""

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import torch

from r2scp.pipelines.decoding.ffmpeg_command import find_program

PACKAGES = ("torch", "ray", "pyarrow", "pylance", "lancedb", "av", "numpy")
PEERS = ("daft", "pixeltable", "decord2", "torchcodec", "faiss-cpu", "hnswlib", "transformers")
GIB = 1 << 30  # bytes


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, object]:
    """Processor, cores, memory in GiB, GPUs and the current load (runnable processes, last minute)."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Of Python, ffmpeg, the packages that matter for speed, and the peers that are installed."""
    result = {"python": platform.python_version(), "ffmpeg": find_program(None).version}
    installed = {str(package.metadata["Name"]).lower() for package in metadata.distributions()}
    return result | {name: metadata.version(name) for name in (*PACKAGES, *PEERS) if name in installed}


def _processor() -> str:
    """The model as Linux reports it, elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
