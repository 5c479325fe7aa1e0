"""`metrics.jsonl` and TensorBoard say the same numbers, each once, however often a training was stopped."""

import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2

from r2scp.jobs.training.log import TrainLog, read_metrics

PROTO: Any = event_pb2  # protobuf makes its names where no type checker sees them
HEADER = 12  # bytes before a record of an event file: its length and a checksum; four more follow it


def events(folder: Path) -> list[Any]:
    """All of the event files of a run, oldest file first."""
    records = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            [length] = struct.unpack("<Q", data[:8])
            records.append(PROTO.Event.FromString(data[HEADER : HEADER + length]))
            data = data[HEADER + length + 4 :]
    return records


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every scalar."""
    values = [(event.step, value) for event in events(folder) for value in event.summary.value]
    return [(value.tag, step, value.simple_value) for step, value in values]


def test_numbers_are_said_in_both_places(tmp_path: Path) -> None:
    log = TrainLog(tmp_path, 0)
    log.write("step", 20, {"stage": "experts", "lr": 0.5, "router/AV/audio": 0.25, "frozen": True})
    log.write("epoch", 23, {"validation": {"A": 0.125, "mean": 1}, "of": 3, "of what": None})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"kind": "step", "step": 20, "stage": "experts", "lr": 0.5, "router/AV/audio": 0.25, "frozen": True},
        {"kind": "epoch", "step": 23, "validation": {"A": 0.125, "mean": 1}, "of": 3, "of what": None},
    ]
    assert scalars(tmp_path) == [
        ("step/lr", 20, 0.5),
        ("step/router/AV/audio", 20, 0.25),
        ("epoch/validation/A", 23, 0.125),
        ("epoch/validation/mean", 23, 1.0),
        ("epoch/of", 23, 3.0),
    ]


def test_going_on_drops_what_was_lost_and_half_a_line(tmp_path: Path) -> None:
    log = TrainLog(tmp_path, 0)
    for step in (2, 4, 6):
        log.write("step", step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6]
    log = TrainLog(tmp_path, 4)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4]
    log.write("step", 6, {"loss": 0.5})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.5, 0.25, 0.5]
    starts = [event.step for event in events(tmp_path) if event.session_log.status == PROTO.SessionLog.START]
    assert starts == [5], "TensorBoard forgets what it heard from that step on"


def test_a_new_run_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    TrainLog(tmp_path, 0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
