"""Fixtures for all tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of released tokenizers and data sets beside the repository."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.exists():
        pytest.skip(f"{path} is absent: it holds the released tokenizers and data sets")
    return path
