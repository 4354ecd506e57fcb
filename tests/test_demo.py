"""The demo model: what is shipped loads, samples, converts, learns, and is as good as its card says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import DEMO
from train import lora
from train.data import in_order, pack, read
from train.losses import token_nats

ROOT = Path(__file__).parents[1]
CARD = DEMO / "README.md"


def test_it_is_small_and_16_bits_wide():
    files = [file for file in Path(DEMO).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6
    model = llama_jax.load(DEMO)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.config.count_parameters() == 4_984_064
    assert model.config.n_kv_heads < model.config.n_heads


def test_it_is_what_is_sampled_from_where_no_checkpoint_is_named():
    command = [sys.executable, "-m", "infer.sample", "--prompt", "ROMEO:", "--temperature", "0"]
    result = subprocess.run(
        [*command, "--max-new-tokens", "60"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = re.findall(r"[a-z]+", result.stdout.lower())
    assert len({"the", "and", "to", "of", "i", "you", "is", "that", "my", "in"} & set(words)) >= 3


def test_it_goes_through_metas_format_and_back_bit_for_bit(tmp_path):
    pytest.importorskip("torch")
    from convert import meta_to_orbax, orbax_to_meta

    orbax_to_meta.main(["--checkpoint", str(DEMO), "--output", str(tmp_path / "meta")])
    meta_to_orbax.main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "back")])
    ours, back = llama_jax.load(DEMO), llama_jax.load(tmp_path / "back")
    assert back.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)


@pytest.mark.external
def test_its_card_gives_its_validation_loss(shared_data, tmp_path):
    """Of the last tenth of the text, in nats a character."""
    text = (shared_data / "tinyshakespeare.txt").read_text()
    held = text[int(0.9 * len(text)) :]
    (tmp_path / "held.txt").write_text(held)
    model = llama_jax.load(DEMO, dtype=jnp.float32)
    samples, _ = read(tmp_path / "held.txt", model.tokenizer, model.config, seq_len=512)
    nats = jax.jit(
        lambda batch: jnp.sum(token_nats(model.config, model.params, batch) * batch["weights"])
    )
    total = sum(float(nats(batch)) for batch in in_order(pack(samples, 512), 8))
    told = float(re.search(r"([\d.]+) nats a character", CARD.read_text()).group(1))
    assert total / len(held) == pytest.approx(told, abs=5e-4)


@pytest.mark.external
def test_qlora_learns_instructions_on_it(shared_data, tmp_path):
    run = tmp_path / "run"
    flags = ["--quantize", "nf4", "--targets", "all", "--steps", "40", "--learning-rate", "0.003"]
    flags += ["--validation", "0.1", "--eval-every", "20", "--seq-len", "256", "--batch", "4"]
    data = str(shared_data / "instruction-data.json")
    lora.main(["--checkpoint", str(DEMO), "--data", data, "--output", str(run), *flags])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:2])
    first, last = (line["validation_loss"] for line in lines if "validation_loss" in line)
    assert last < first
