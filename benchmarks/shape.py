"""The model that all benchmarks on CPU have: the 110M parameters of llama2.c's largest."""

from llama_jax.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32000,
    dim=768,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    head_dim=64,
    mlp_dim=2048,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    context=2048,
    tie_embeddings=True,
    version="2",
)
