"""The command line for people and scripts: help, exit codes, one JSON object, one-line errors.

Commands without Ray run in this process through typer's runner; those whose streams matter run in their own.
"""

import json
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from r2scp.jobs.cli.main import app
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.store.errors import FailureReason
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table

ROOT = Path(__file__).resolve().parents[3]
TOP_LEVEL: dict[str, Any] = vars(get_command(app))["commands"]
GROUPS = {name: command for name, command in TOP_LEVEL.items() if hasattr(command, "commands")}
COMMANDS = sorted(
    [name for name in TOP_LEVEL if name not in GROUPS]
    + [f"{name} {each}" for name, group in GROUPS.items() for each in group.commands]
)
STEERING = "\x1b[2J\x1b]0;owned\x07\u202egpj.exe\r"


def call(*words: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", **environment})


def one_line_error(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), "an exception came through"
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture
def full_store(tmp_path: Path) -> FeatureStore:
    """A store with one clip, and two dead letters of which one has a hostile name."""
    store = FeatureStore.create(str(tmp_path / "store"), "encoder-a", 4)
    at = datetime(2026, 1, 31, tzinfo=UTC)
    clip = {"clip_id": "folder/a", "corpus": "folder", "split": "train", "visual_status": "present"}
    failed = {"corpus": "folder", "stage": "decode", "attempts": 1, "at": at}
    rows = {
        Table.CLIPS: [clip | {"audio_status": "absent", "ingested_at": at}],
        Table.FAILURES: [
            failed
            | {"clip_id": f"folder/{STEERING}", "reason": "corrupt", "detail": STEERING, "uri": STEERING},
            failed | {"clip_id": "folder/[red]x[/red]", "reason": "timeout", "detail": "slow", "uri": "/x"},
        ],
    }
    for table, given in rows.items():
        staged = store.stage(table, pa.Table.from_pylist(given, schema=store.address(table).schema))
        store.commit(table, [staged], {})
    return store


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_is_in_the_readme(command: str) -> None:
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout or command == "jobs schedule"  # it prints other programs' formats
    assert len(result.stdout.split("Options:")[0].splitlines()) > 3, "it says what it does"
    assert f"r2scp-pipe {command}" in (ROOT / "README.md").read_text()


def test_the_readme_names_no_unknown_command() -> None:
    code = re.findall(r"```.*?```|`[^`]+`", (ROOT / "README.md").read_text(), re.DOTALL)
    named = set(re.findall(r"\br2scp-pipe ((?:(?:jobs|store) )?[a-z]+)\b", "\n".join(code)))
    assert named - set(GROUPS) == set(COMMANDS)


def loaded(*words: str) -> set[str]:
    """Which heavy packages a command imports."""
    code = (
        "import sys\nfrom r2scp.jobs.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'av', 'transformers', 'lance', 'pyarrow'}\n"
        "print(*heavy & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return set(result.stderr.split())


def test_commands_import_only_what_they_need(tmp_path: Path) -> None:
    """Which keeps --help and --version quick."""
    FeatureStore.create(str(tmp_path / "store"), "f", 8)
    assert loaded("--help") == loaded("--version") == set()
    for words in (["status"], ["failures"], ["jobs", "list"]):
        assert not loaded(*words, "--store", str(tmp_path / "store")) & {"torch", "ray", "av", "transformers"}


def test_version_and_completion() -> None:
    version = call("--version")
    assert version.exit_code == 0
    assert re.fullmatch(r"r2scp-pipe \S+ \(python \S+, torch \S+, pylance \S+\)\n", version.stdout)
    words = {"COMP_WORDS": "r2scp-pipe eva", "COMP_CWORD": "1"}
    completed = call(_R2SCP_PIPE_COMPLETE="complete_bash", **words)
    assert completed.stdout.split() == ["evaluate"]


@pytest.mark.parametrize(
    "words",
    [
        ["extract"],
        ["extract", "--corpus", "folder", "--root", ".", "--limit", "0"],
        ["extract", "--corpus", "folder", "--root", ".", "--encoder", "other"],
        ["extract", "--no-such-option"],
        ["no-such-command"],
        ["failures", "--limit", "many"],
        ["weights"],
    ],
)
def test_wrong_usage_is_2(words: list[str]) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_invalid_settings_are_2(media_folder: Path, tmp_path: Path, tiny_weights: Path) -> None:
    common = ["--root", media_folder, "--store", tmp_path / "s", "--encoder", "imagebind-demo"]
    common += ["--weights", tiny_weights]
    extract = ["extract", "--corpus", "folder", *common]
    assert "corpus must be one of" in one_line_error(call("extract", "--corpus", "nope", *common), 2)
    assert "KEY=VALUE" in one_line_error(call(*extract, "--storage-option", "novalue"), 2)
    assert "--device must be cpu" in one_line_error(call(*extract, "--device", "abacus"), 2)
    assert "no usable ffmpeg" in one_line_error(call(*extract, "--ffmpeg", "/no/ffmpeg"), 2)
    message = one_line_error(call("failures", "--store", tmp_path, "--reason", "weather"), 1)
    assert "no store" in message
    assert not (tmp_path / "s").exists(), "a wrong option must not create a store"


def test_errors_are_one_line_and_1(media_folder: Path, tmp_path: Path, tiny_weights: Path) -> None:
    assert "r2scp-pipe extract" in one_line_error(call("status", "--store", tmp_path / "none"), 1)
    (tmp_path / "file").write_text("x")
    assert "cannot open" in one_line_error(call("status", "--store", "nosuch://place"), 1)
    encoder = ["--encoder", "imagebind-demo", "--weights"]
    here = ["extract", "--corpus", "folder", "--store", tmp_path / "s", "--root"]
    gone = one_line_error(call(*here, media_folder, *encoder, tmp_path / "gone.pth"), 1)
    assert "gone.pth does not exist" in gone
    one_line_error(call(*here, media_folder, *encoder, tmp_path / "file"), 1)
    nothing = one_line_error(call(*here, tmp_path / "nowhere", *encoder, tiny_weights), 1)
    assert "must be a folder" in nothing


def test_missing_weights_name_the_command_and_the_licence(media_folder: Path, tmp_path: Path) -> None:
    words = ["extract", "--corpus", "folder", "--root", media_folder, "--store", tmp_path / "s"]
    message = one_line_error(call(*words, R2SCP_HOME=str(tmp_path)), 1)
    assert "r2scp-pipe weights imagebind-huge --accept-license" in message
    assert "CC BY-NC-SA" in message
    refused = one_line_error(call("weights", "imagebind-huge", R2SCP_HOME=str(tmp_path)), 1)
    assert "CC BY-NC-SA" in refused


def test_status_for_people_and_for_programs(full_store: FeatureStore) -> None:
    machine = call("status", "--store", full_store.uri, "--json")
    assert machine.exit_code == 0
    assert json.loads(machine.stdout) == full_store.status()
    assert machine.stdout.count("\n") == 1
    by_environment = call("status", "--json", R2SCP_STORE=full_store.uri)
    assert by_environment.stdout == machine.stdout
    person = call("status", "--store", full_store.uri)
    assert "encoder-a" in person.stdout
    assert "by corpus" in person.stdout


def test_failures_are_filtered_and_counted(full_store: FeatureStore) -> None:
    def ask(*words: object) -> dict:
        return json.loads(call("failures", "--store", full_store.uri, "--json", *words).stdout)

    assert ask()["total"] == 2
    assert len(ask("--limit", 1)["rows"]) == 1
    assert ask("--limit", 1)["total"] == 2
    [slow] = ask("--reason", "timeout")["rows"]
    assert slow["clip_id"] == "folder/[red]x[/red]"
    wrong = one_line_error(call("failures", "--store", full_store.uri, "--reason", "weather"), 2)
    assert all(reason in wrong for reason in FailureReason)


def test_outside_text_cannot_steer_the_terminal(full_store: FeatureStore, tmp_path: Path) -> None:
    outputs = [
        call("failures", "--store", full_store.uri),
        call("failures", "--store", full_store.uri, "--json"),
        call("status", "--store", f"{tmp_path}/{STEERING}"),
        call("extract", "--corpus", STEERING, "--root", STEERING, "--encoder", "imagebind-demo"),
        call("failures", "--store", full_store.uri, "--reason", STEERING),
    ]
    for result in outputs:
        for stream in (result.stdout, result.stderr):
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", stream)
    assert "[red]x[/red]" in outputs[0].stdout, "outside text is not markup"


def test_doctor_reports_what_is_available(full_store: FeatureStore, tmp_path: Path) -> None:
    result = call("doctor", "--store", full_store.uri, "--json")
    checks = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert result.exit_code == (0 if checks["verdict"] == "everything needed is available" else 1)
    assert "encoder-a" in checks["store"]
    assert set(checks["packages"]) >= {"torch", "ray", "pylance", "lancedb"}
    assert "cpu" in checks["devices"]
    missing = call("doctor", "--store", tmp_path / "none", "--ffmpeg", "/no/ffmpeg", "--json")
    assert missing.exit_code == 1
    checks = json.loads(missing.stdout)
    assert "no usable ffmpeg" in checks["ffmpeg"]
    assert "no store yet" in checks["store"]
    unreachable = json.loads(call("doctor", "--store", "nosuch://x", "--json").stdout)
    assert "cannot be reached" in unreachable["store"]


def test_a_progress_bar_on_a_terminal() -> None:
    """A bar without a total yet is drawn as well; without a terminal nothing is drawn."""
    code = (
        "from r2scp.jobs.console import progress_bar\n"
        "with progress_bar() as bar:\n"
        "    task = bar.add_task('extract', total=None, note='')\n"
        "    bar.refresh()\n"
        "    bar.update(task, total=40, completed=8, note='2.0 clips/s')\n"
    )
    outer, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=inner, stdout=inner, stderr=inner, env=environment) as process:
        os.close(inner)
        output = b""
        try:
            while chunk := os.read(outer, 4096):
                output += chunk
        except OSError:  # closed by the process
            pass
        os.close(outer)
    assert process.returncode == 0, output.decode()
    assert b"8/40" in output
    silent = subprocess.run(words, capture_output=True, check=True)
    assert silent.stdout == silent.stderr == b""


def extract_words(media: Path, store: Path, weights: Path) -> list[str]:
    words = ["extract", "--corpus", "folder", "--root", media, "--store", store, "--device", "cpu"]
    words += ["--encoder", "imagebind-demo", "--weights", weights, "--num-workers", 2, "--json"]
    return [str(word) for word in words]


@pytest.mark.usefixtures("local_ray")
def test_extract_gives_one_json_object_and_0(
    media_folder: Path, tmp_path: Path, tiny_weights: Path, tiny_encoder: EncoderSpec
) -> None:
    words = extract_words(media_folder, tmp_path / "store", tiny_weights)
    first = call(*words)
    assert first.exit_code == 0, first.output
    assert first.stdout.count("\n") == 1
    report = json.loads(first.stdout)
    keys = {"inputs", "stored", "unchanged", "dead", "missing_files", "partial", "seconds"}
    assert keys | {"clips_per_second", "clips_version"} <= report.keys()
    assert report["inputs"] == report["stored"] + report["unchanged"] + report["dead"] == 5
    assert "clips/s" in first.stderr
    second = call(*words)
    assert (second.exit_code, json.loads(second.stdout)["decoded"]) == (0, 0)
    (media_folder / "both.mp4").unlink()
    gone = call(*words)
    assert gone.exit_code == 0
    assert "folder/both.mp4" in gone.stderr
    with FeatureStore.open(str(tmp_path / "store")).lease("a test").hold():
        assert call(*words).exit_code == 0, "nothing to do needs no lease"
        (media_folder / "new.wav").write_bytes((media_folder / "sound.wav").read_bytes())
        locked = call(*words)
    assert locked.exit_code == 1
    assert "another writer holds this store: a test" in locked.stderr
    assert "Traceback" not in locked.stderr


@pytest.mark.usefixtures("local_ray")
def test_extract_of_nothing_but_broken_files_is_3(
    media_folder: Path, tmp_path: Path, tiny_weights: Path
) -> None:
    for path in media_folder.iterdir():
        if path.name != "text.mp4":
            path.unlink()
    for _ in range(2):  # tried, then already failed
        result = call(*extract_words(media_folder, tmp_path / "store", tiny_weights))
        assert result.exit_code == 3
        assert json.loads(result.stdout)["dead"] == 1
        assert "r2scp-pipe failures" in result.stderr
