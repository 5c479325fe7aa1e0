"""The `answer` command: for a person, and as JSON lines for a program."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from r2scp.jobs.answer.answerer import Answerer
from r2scp.jobs.cli.main import app

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "How many instruments are sounding in the video?"
STEERING = "\x1b[2J\x1b]0;owned\x07\u202egpj.exe\r[red]"


def call(*words: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["answer", *map(str, words)], input=stdin, env={"COLUMNS": "200"})


def test_the_command_prints_the_finding_and_the_retrieved_clips(
    world, damaged: dict[str, Path], answerer: Answerer
) -> None:
    result = call("--run", world.run, damaged["deaf"], QUESTION, "--explain")
    assert result.exit_code == 0, result.output
    expected = answerer.answer(damaged["deaf"], QUESTION)
    assert (
        "The sound is missing (the file has no sound): the sound of 3 clips from the memory bank was used"
        in result.stdout
    )
    for each in expected.neighbours:
        assert each.clip_id in result.stdout
        assert each.content_sha256 in result.stdout
    plain = json.loads(call("--run", world.run, damaged["deaf"], QUESTION, "--json", "--top", 0).stdout)
    assert plain["missing"] == "audio"
    logits = {each.answer: each.logit for each in expected.answers}
    assert {each["answer"]: each["logit"] for each in plain["answers"]} == pytest.approx(logits, abs=0.05)


def test_control_characters_are_not_printed(world, tmp_path: Path, answerer: Answerer) -> None:
    video = tmp_path / "\x1b[2Jé [red]x.mp4"
    shutil.copy(world.video(world.whole()[0]), video)
    result = call("--run", world.run, video, f"Is it {STEERING}?", "--missing", "audio", "--explain")
    assert result.exit_code == 0, result.output
    assert not set("\x1b\x07\u202e\r") & set(result.stdout)
    assert "[red]" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["no.mp4", QUESTION], 1, "no.mp4"),
        ([], 2, "give a video and a question"),
        (["--batch", "a.mp4"], 2, "leave out VIDEO"),
        (["--batch", "--explain"], 2, "leave out VIDEO"),
        (["--batch", "--missing", "audio"], 2, "leave out VIDEO"),
    ],
)
def test_usage_errors_are_one_line(world, words: list[str], code: int, says: str) -> None:
    result = call("--run", world.run, *words)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def command(world) -> list[str]:
    program = Path(sys.executable).with_name("r2scp-pipe")
    return [str(program), "answer", "--run", str(world.run), "--batch"]


def test_json_lines(world, damaged: dict[str, Path]) -> None:
    lines = [
        json.dumps({"id": 7, "video": str(damaged["deaf"]), "question": QUESTION}),
        "{not json",
        "",
        json.dumps(["a", "list"]),
        json.dumps({"video": str(damaged["deaf"]), "question": QUESTION, "mising": "audio"}),
        json.dumps({"id": "x", "video": "/etc/passwd", "question": QUESTION}),
        json.dumps({"id": "y", "video": "http://127.0.0.1/a.mp4", "question": QUESTION}),
        json.dumps({"id": "long", "video": "a" * (2 << 20), "question": QUESTION}),
        json.dumps({"id": "last", "video": str(damaged["blind"]), "question": QUESTION, "missing": "none"}),
    ]
    ran = subprocess.run(
        command(world), input="\n".join(lines).encode() + b"\n\xff\xfe\n", capture_output=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"Traceback" not in ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [one["id"] for one in results] == ["7", "", "", "", "x", "y", "", "last", ""]
    assert [one.get("error", {}).get("reason") for one in results] == [
        *(None, "usage", "usage", "usage", "not_media", "unreadable", "usage", None, "usage")
    ]
    assert "mising" in results[3]["error"]["message"]
    assert results[0]["missing"] == "audio"
    assert len(results[0]["answers"]) == 5
    assert "2 answered" in ran.stderr.decode()


def test_each_line_is_answered_before_the_next(world, damaged: dict[str, Path]) -> None:
    line = json.dumps({"video": str(damaged["deaf"]), "question": QUESTION}) + "\n"
    with subprocess.Popen(
        command(world), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin
        assert process.stdout
        killer = threading.Timer(180, process.kill)
        killer.start()
        for _ in range(3):
            process.stdin.write(line.encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["missing"] == "audio"
        process.stdin.close()
        assert process.wait() == 0
        killer.cancel()


@pytest.mark.parametrize(
    ("plumbing", "code", "says"),
    [
        ("<&-", 2, "is closed"),
        (">&- </dev/null", 2, "is closed"),
        ("0> written", 2, "cannot read standard input: Bad file descriptor"),
        ("< asked.jsonl > /dev/full", 1, "cannot write to standard output: No space left"),
    ],
)
def test_broken_pipes_are_one_line(world, tmp_path: Path, plumbing: str, code: int, says: str) -> None:
    request = {"video": "no.mp4", "question": QUESTION}
    (tmp_path / "asked.jsonl").write_text(json.dumps(request) + "\n")
    shell = ["bash", "-c", f'"$@" {plumbing}', "bash", *command(world)]
    ran = subprocess.run(shell, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=tmp_path, timeout=240)
    assert ran.returncode == code, ran.stderr.decode()
    assert says in ran.stderr.decode()
    assert ran.stderr.count(b"\n") == 1


def test_exit_3_if_all_lines_are_rejected(world) -> None:
    ran = subprocess.run(command(world), input=b'{"video": "no.mp4", "question": "a"}\n', capture_output=True)
    assert ran.returncode == 3
