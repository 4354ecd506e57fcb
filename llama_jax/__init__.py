"""Llama 1 to 3.3 as pure functions in JAX.

model = llama_jax.load("out/llama")  # quantize="int8", mesh="tensor=4", lora="out/adapter"
logits, cache = llama_jax.forward(model.config, model.params, tokens)
"""

from llama_jax.checkpoint import Model, load
from llama_jax.config import PRESETS, LlamaConfig, get_preset
from llama_jax.errors import UserError
from llama_jax.model import forward
from llama_jax.quant import Quantization

__all__ = [
    "PRESETS",
    "LlamaConfig",
    "Model",
    "Quantization",
    "UserError",
    "forward",
    "get_preset",
    "load",
]
