"""Strict settings and fixtures for all tests: CPU with eight fake devices, no rank promotion.

Warnings are errors by pyproject.toml. Nothing here needs torch or transformers.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

# [B, T, D] * [D] raises: a shape that is wrong by an axis must not broadcast to a wrong answer.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of released tokenizers and data sets beside the repository."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.exists():
        pytest.skip(f"{path} is absent: it holds the released tokenizers and data sets")
    return path
