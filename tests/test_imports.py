"""Who may import whom, so that the model stays usable alone and without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "llama_jax": {"convert", "infer", "train", "torch", "safetensors", "transformers"},
    "convert": {"infer", "train", "transformers"},
    "infer": {"convert", "train", "torch", "safetensors", "transformers"},
    "train": {"convert", "torch", "safetensors", "transformers"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_what_is_below_them(package):
    files = list((ROOT / package).glob("*.py"))
    assert files
    for file in files:
        assert not set(imported(file)) & FORBIDDEN[package], file


def test_importing_the_package_loads_neither_torch_nor_orbax():
    code = (
        "import sys, llama_jax, infer.sample; "
        "print([m for m in ('torch', 'orbax', 'transformers', 'flax.nnx') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
