"""What all tests share."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real media, real annotations and reference tensors, kept beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("no real media or reference tensors beside the repository (../shared)")
    return SHARED
