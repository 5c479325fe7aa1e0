"""The metrics log of a training: `metrics.jsonl`, and the same numbers as TensorBoard scalars."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from r2scp.store.atomic_file import replace_file


class TrainLog:
    """Appends a line per call. Opened at the step a run starts or resumes from; later lines are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if _step(line) <= step]
        replace_file(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """`kind` is step or epoch; numbers in `values` become scalars, nested ones named a/b."""
        line = {"kind": kind, "step": step, **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in _scalars(values, ""):
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a `metrics.jsonl`; none if there is no such file."""
    if not path.exists():
        return []
    parsed = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            parsed.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill
    return parsed


def _step(line: Mapping[str, object]) -> int:
    step = line.get("step")
    return step if isinstance(step, int) else 0


def _scalars(values: Mapping[str, object], prefix: str) -> list[tuple[str, float]]:
    scalars: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            scalars.append((prefix + name, float(value)))
    return scalars
