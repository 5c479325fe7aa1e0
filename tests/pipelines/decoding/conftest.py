"""What the tests of decoding share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, render: Callable[[Path, Sequence[str]], Path]):
    """make(name, *ffmpeg arguments) -> path of the file that ffmpeg wrote."""
    folder = tmp_path_factory.mktemp("media")
    return lambda name, *arguments: render(folder / name, [str(argument) for argument in arguments])
