"""A built wheel, installed where no checkout is, has the command, its data and its type hints."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("store", "model", "pipelines", "jobs", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


def run(words: Sequence[str | Path], cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it; dependencies, but nothing of the checkout, come from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source, tree / name, ignore=ignored) if source.is_dir() else shutil.copy(source, tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, tree]
    run([*pip, *build], folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched; its own .pth files, the checkout among them, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "env" / "bin" / "python"
    run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], folder)
    return folder / "env"


def test_the_command_works_outside_a_checkout(
    environment: Path, tmp_path: Path, render: Callable[..., Path], clip_arguments: Callable[..., list[str]]
) -> None:
    program = environment / "bin" / "r2scp-pipe"
    assert "extract" in run([program, "--help"], tmp_path)
    where = "import r2scp.jobs.html.render as module; print(module.__file__)"
    assert run([environment / "bin" / "python", "-c", where], tmp_path).startswith(str(environment))
    (tmp_path / "media").mkdir()
    render(tmp_path / "media" / "one.mp4", clip_arguments(1.0))
    words = ["extract", "--corpus", "folder", "--root", "media", "--store", "store", "--json"]
    printed = run([program, *words, "--encoder", "imagebind-demo", "--num-workers", "1"], tmp_path)
    assert '"stored": 1' in printed, "with the packaged encoder"


def test_type_checkers_of_users_see_our_hints(environment: Path) -> None:
    (package,) = environment.glob("lib/python*/site-packages/r2scp")
    assert {path.parent.name for path in package.glob("*/py.typed")} == {
        "store",
        "model",
        "pipelines",
        "jobs",
    }
