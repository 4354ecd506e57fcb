"""Tiny random models, and the same weights in transformers' LlamaForCausalLM as their oracle."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert.names import weights
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.model import Params

V = 96


def tiny(
    n_heads: int,
    n_kv_heads: int,
    *,
    dim: int = 48,
    head_dim: int = 8,
    theta: float = 1e4,
    factor: float | None = None,
    tied: bool = False,
    context: int = 64,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=V,
        dim=dim,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        mlp_dim=80,
        norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=None if factor is None else RopeScaling(factor),
        context=context,
        tie_embeddings=tied,
        version="2" if factor is None else "3.1",
    )


CONFIGS = {
    "llama 2, every head its own": tiny(6, 6),
    "6 heads on 2": tiny(6, 2),
    "8 heads on 1": tiny(8, 1, dim=64),
    "tied head": tiny(4, 2, tied=True),
    "head_dim apart from dim": tiny(2, 1, head_dim=64),
    "llama 3.1": tiny(2, 1, head_dim=128, theta=500000.0, factor=8.0, context=131072),
    "llama 3.2": tiny(2, 1, head_dim=64, theta=500000.0, factor=32.0, context=131072, tied=True),
}


def random_params(config: LlamaConfig, seed: int = 0) -> Params:
    """Weights at which every part matters: hidden values of order 1, attention far from even."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for weight in weights(config):
        shape = weight.shape(config)
        if len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape)
        elif weight.path == "embed/embedding":
            # A tied head finds its own input again, unless the layers outweigh the embedding.
            values = rng.normal(0, 0.3 if config.tie_embeddings else 1, shape)
        else:
            values = rng.normal(0, 1.5 * shape[1] ** -0.5, shape)
        *parents, name = weight.path.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, params)
        node[name] = jnp.asarray(values, jnp.float32)
    return params


def at(params: Params, path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), params)


def transformers_model(config: LlamaConfig, params: Params) -> Any:
    """LlamaForCausalLM in float32 with these weights; skips the test where it is not installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # arrays this small only wait for a second thread
    hf_config = transformers.LlamaConfig.from_dict(config.to_hf("float32"))
    hf_config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(hf_config).eval()
    loaded = model.load_state_dict(
        {w.hf: torch.from_numpy(np.array(at(params, w.path))) for w in weights(config)},
        strict=False,
    )
    assert loaded.missing_keys == (["lm_head.weight"] if config.tie_embeddings else [])
    assert not loaded.unexpected_keys
    assert model.dtype == torch.float32
    return model
