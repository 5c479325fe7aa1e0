"""The house stays as drawn: imports point down, each outside library has its door, files stay small."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"store": 0, "model": 0, "pipelines": 1, "jobs": 2}
CLI = "jobs/cli/"  # a floor of its own, above the others
MAIN = "jobs/__main__.py"  # runs it
MOST_LINES = 400
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}

#: Outside library, or part of one -> the files that may import it.
DOORS = {
    "ray": {"pipelines/extraction/flow.py", "pipelines/ray_session.py", "jobs/training/run.py"},
    "ray.data": {"pipelines/extraction/flow.py"},
    "ray.train": {"jobs/training/run.py"},
    "tensorboardX": {"jobs/training/log.py"},
    "subprocess": {
        "pipelines/decoding/ffmpeg_command.py",
        "pipelines/decoding/sandbox.py",
        "pipelines/decoding/probe.py",
        "pipelines/demo/corpus.py",
        "jobs/reindex/schedule/loop.py",
        "jobs/faults/full_disk.py",
        "jobs/faults/processes.py",
    },
    "ffmpeg": {"pipelines/decoding/ffmpeg_command.py"},
    "imageio_ffmpeg": {"pipelines/decoding/ffmpeg_command.py", "pipelines/demo/corpus.py"},
    "av": {"pipelines/decoding/probe_child.py"},
    "jinja2": {"jobs/html/render.py"},
    "PIL": {"jobs/html/thumbnails.py"},
}
STORE_ONLY = {"lance", "lancedb"}
NOT_IN_STORE = {"torch", "ray"}
UNSAFE = {"pickle", "cPickle", "dill", "shelve", "marshal"}

#: A path on somebody's machine. `/dev`, `/proc` and `/tmp` in code are none.
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:work|home|root|Users|mnt|tmp/w)/[\w.-]+")


@cache
def sources() -> dict[str, ast.Module]:
    """Our modules, by their path below the root."""
    files = [path for package in FLOORS for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in files}


def module_of(file: str) -> str:
    return "r2scp." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import below `tree`; `from a import b` gives `a.b`, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def floor_of(file: str) -> int:
    return 3 if file.startswith(CLI) else FLOORS[file.split("/")[0]]


def ours(name: str) -> str | None:
    """The file behind an imported name of ours; None for anybody else's."""
    if not name.startswith("r2scp."):
        return None
    parts = name.split(".")[1:]
    for length in (len(parts), len(parts) - 1):
        for file in ("/".join(parts[:length]) + ".py", "/".join([*parts[:length], "__init__.py"])):
            if file in sources():
                return file
    raise AssertionError(f"no module {name}")


FILES = sorted(sources())


@pytest.mark.parametrize("file", FILES)
def test_imports_only_point_down(file: str) -> None:
    for name, line in imports(sources()[file]):
        target = ours(name)
        if target is None:
            assert name.split(".")[0] not in FLOORS, f"{file}:{line}: import r2scp.{name}"
            continue
        package, target_package = file.split("/")[0], target.split("/")[0]
        allowed = package == target_package or floor_of(target) < floor_of(file)
        assert allowed, f"{file}:{line} reaches {target}"
        assert not target.startswith(CLI) or file == MAIN or file.startswith(CLI), (
            f"{file}:{line} imports the CLI"
        )


def test_no_import_goes_in_a_circle() -> None:
    edges = {
        file: {ours(name) for name, _ in imports(tree)} - {None, file} for file, tree in sources().items()
    }
    done: set[str] = set()

    def visit(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, " -> ".join([*path[path.index(file) :], file])
        if file not in done:
            for target in sorted(edges[file]):
                visit(target, (*path, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(CLI)])
def test_no_import_is_deferred(file: str) -> None:
    for node in ast.walk(sources()[file]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found = [name for name, _ in imports(node)]
            assert not found, f"{file}:{node.lineno} imports {found} inside a function"


@pytest.mark.parametrize("file", FILES)
def test_outside_libraries_come_in_by_their_doors(file: str) -> None:
    package = file.split("/")[0]
    for name, line in imports(sources()[file]):
        top = name.split(".")[0]
        where = f"{file}:{line} imports {name}"
        for door, files in DOORS.items():
            assert file in files or not f"{name}.".startswith(f"{door}."), where
        assert top not in STORE_ONLY or package == "store", where
        assert package != "store" or top not in NOT_IN_STORE, where
        assert package != "model" or ours(name) is None or name.startswith("r2scp.model"), where
        assert top not in UNSAFE, where


@pytest.mark.parametrize("file", FILES)
def test_no_shell_and_no_code_from_text(file: str) -> None:
    for node in ast.walk(sources()[file]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{file}:{node.lineno} calls {called}"
        assert called not in {"eval", "exec", "os.system", "os.popen"}, where
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert said.get("shell", "False") == "False", where
        if called.endswith("torch.load"):
            assert said.get("weights_only") == "True", where


@pytest.mark.parametrize("file", FILES)
def test_files_are_small_and_say_what_they_are(file: str) -> None:
    lines = (ROOT / file).read_text().count("\n")
    assert lines <= MOST_LINES
    assert not set(Path(file).stem.split("_")) & FORBIDDEN_NAMES
    if not file.endswith("__init__.py"):
        assert ast.get_docstring(sources()[file])


@pytest.mark.parametrize("file", sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py")))
def test_tests_say_what_they_prove(file: str) -> None:
    assert ast.get_docstring(ast.parse(Path(file).read_text()))


def tracked() -> list[Path]:
    """What a clone brings: git's list, or all that is no build product where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = [*FLOORS, "tests", "benchmarks"]
    found = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts
    ]
    return [path for path in [*found, *ROOT.glob("*")] if path.is_file()]


def test_no_machine_path_is_written_down() -> None:
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for match in MACHINE_PATH.finditer(content.decode("utf-8", "replace")):
            if path != Path(__file__):
                found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not found


def test_the_rule_about_machine_paths_sees_one() -> None:
    assert MACHINE_PATH.search('open("/home/somebody/data")')
    assert not MACHINE_PATH.search("https://example.org/home/page and store/home/x")
