"""The house stays as drawn: imports point down, libraries have their doors, folders and files stay small."""

import ast
import re
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"store": 0, "model": 0, "pipelines": 1, "jobs": 2}
CLI = "jobs/cli/"  # a floor of its own, above the others
MAIN = "jobs/__main__.py"  # runs it
MAX_LINES = 400
MAX_FUNCTION_LINES = 45
MAX_ENTRIES = 12  # of a folder, without __init__.py and __main__.py
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
#: A test, or a file of tests, that a document names.
NAMED_TEST = re.compile(r"\b(?:tests/)?(?:[\w/]+/)?test_\w+(?:\.py)?\b")


@cache
def sources() -> dict[str, ast.Module]:
    """Our modules, by their path below the root."""
    files = [path for package in FLOORS for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in files}


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


def file_of(name: str) -> str | None:
    """The file behind an imported name of ours; None for anybody else's."""
    if not name.startswith("r2scp."):
        return None
    parts = name.split(".")[1:]
    for length in (len(parts), len(parts) - 1):
        for file in ("/".join(parts[:length]) + ".py", "/".join([*parts[:length], "__init__.py"])):
            if file in sources():
                return file
    raise AssertionError(f"no module {name}")


@cache
def edges() -> list[tuple[str, str, str]]:
    """(file, file it imports, where) of every import of ours."""
    pairs = []
    for file, tree in sources().items():
        for name, line in imports(tree):
            if (target := file_of(name)) not in (None, file):
                pairs.append((file, target, f"{file}:{line} imports {target}"))
    return pairs


def cycle_of(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_only_point_down() -> None:
    bare = [
        f"{file}:{line}: import r2scp.{name}"
        for file, tree in sources().items()
        for name, line in imports(tree)
        if name.split(".")[0] in FLOORS
    ]
    up = [
        where
        for file, target, where in edges()
        if file.split("/")[0] != target.split("/")[0] and floor_of(target) >= floor_of(file)
    ]
    reach_cli = [
        where
        for file, target, where in edges()
        if target.startswith(CLI) and file != MAIN and not file.startswith(CLI)
    ]
    assert not bare + up + reach_cli


def test_no_import_of_files_or_folders_goes_in_a_circle() -> None:
    """Of files, and at each level of the tree of the folders side by side there."""
    files: dict[str, set[str]] = defaultdict(set)
    rooms: dict[str, set[str]] = defaultdict(set)
    for file, target, _ in edges():
        files[file].add(target)
        a, b = file.split("/"), target.split("/")
        shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if shared is not None:
            rooms["/".join(a[: shared + 1])].add("/".join(b[: shared + 1]))
    assert not cycle_of(files)
    assert not cycle_of(rooms)


def test_no_import_is_deferred() -> None:
    """Outside the command line, which imports a command's module inside the command."""
    deferred = [
        f"{file}:{node.lineno} imports {name}"
        for file, tree in sources().items()
        if not file.startswith(CLI)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for name, _ in imports(node)
    ]
    assert not deferred


def test_outside_libraries_come_in_by_their_doors() -> None:
    wrong = []
    for file, tree in sources().items():
        package = file.split("/")[0]
        for name, line in imports(tree):
            top, target = name.split(".")[0], file_of(name)
            by_the_wall = any(
                f"{name}.".startswith(f"{door}.") and file not in files for door, files in DOORS.items()
            )
            if (
                by_the_wall
                or (top in STORE_ONLY and package != "store")
                or (top in NOT_IN_STORE and package == "store")
                or (package == "model" and target is not None and not target.startswith("model/"))
                or top in UNSAFE
            ):
                wrong.append(f"{file}:{line} imports {name}")
    assert not wrong


def test_no_shell_and_no_code_from_text() -> None:
    unsafe = []
    for file, tree in sources().items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                function in {"eval", "exec", "os.system", "os.popen"}
                or keywords.get("shell", "False") != "False"
                or (function.endswith("torch.load") and keywords.get("weights_only") != "True")
            ):
                unsafe.append(f"{file}:{node.lineno} calls {function}")
    assert not unsafe


def test_files_and_functions_are_small_and_say_what_they_are() -> None:
    wrong = []
    for file, tree in sources().items():
        if (lines := (ROOT / file).read_text().count("\n")) > MAX_LINES:
            wrong.append(f"{file} has {lines} lines")
        if set(Path(file).stem.split("_")) & FORBIDDEN_NAMES:
            wrong.append(f"{file} does not say what is in it")
        if not ast.get_docstring(tree):
            wrong.append(f"{file} has no docstring")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{file}:{node.lineno} {node.name} has {length} lines")
    silent = [path.name for path in (ROOT / "tests").rglob("test_*.py") if not docstring_of(path)]
    assert not wrong + silent


def docstring_of(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text()))


def test_folders_are_small() -> None:
    entries: dict[Path, set[str]] = defaultdict(set)
    for path in tracked():
        below = path.relative_to(ROOT)
        if below.suffix == ".py" and below.name not in ("__init__.py", "__main__.py"):
            for folder in list(below.parents)[:-1]:
                entries[folder].add(below.relative_to(folder).parts[0])
    crowded = {str(folder): len(names) for folder, names in entries.items() if len(names) > MAX_ENTRIES}
    assert not crowded


def test_every_package_is_in_the_wheel() -> None:
    """setuptools takes the packages that pyproject lists, and data that it names."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {
        "r2scp." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FLOORS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == packages
    without_init = {path.parent for folder in FLOORS for path in (ROOT / folder).rglob("*.py")}
    assert not [folder for folder in without_init if not (folder / "__init__.py").exists()]
    data = {
        path.relative_to(ROOT)
        for path in tracked()
        if path.relative_to(ROOT).parts[0] in FLOORS and path.suffix != ".py"
    }
    covered = {
        file.relative_to(ROOT)
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for file in (ROOT / Path(*package.split(".")[1:])).glob(pattern)
    }
    assert data <= covered


def test_tests_that_documents_name_are_there() -> None:
    """Each promise in the documents stands beside the test that holds it."""
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    paths = [path.relative_to(ROOT).as_posix() for path in texts]
    functions = {
        node.name
        for text in texts.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }
    gone = [
        f"{document.name}: {name}"
        for document in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
        for name in NAMED_TEST.findall(document.read_text())
        if name not in functions and not any(f"/{path}".endswith(f"/{name}") for path in paths)
    ]
    assert not gone


def tracked() -> list[Path]:
    """What a clone brings: git's list, or all that is no build product where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = [*FLOORS, "tests", "benchmarks"]
    below = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts
    ]
    return [path for path in [*below, *ROOT.glob("*")] if path.is_file()]


def test_no_machine_path_is_written_down() -> None:
    places = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content[:8192] or path == Path(__file__):
            continue
        for match in MACHINE_PATH.finditer(content.decode("utf-8", "replace")):
            places.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not places
    assert MACHINE_PATH.search('open("/home/somebody/data")'), "the rule sees one"
    assert not MACHINE_PATH.search("https://example.org/home/page and store/home/x")
