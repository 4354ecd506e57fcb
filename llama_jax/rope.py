"""Rotary position embedding (arXiv 2104.09864) with Llama 3.1's frequency scaling.

Heads are rotated by halves: dimension h turns with dimension h + H/2. Meta's files rotate
adjacent pairs instead; the converter permutes the rows of q and k, so that the model never has to.
Angles are float32: bfloat16 would round position 257 to 256.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a position for each pair of dimensions, float32 [H/2].

    To the last bit those of Meta's and Hugging Face's code for every released model: at position
    8000, one unit in the last place of a frequency turns its pair by half a thousandth.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # The power in float64: NumPy's in float32 is off in the last place, PyTorch's is not.
    powers = (np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    f = np.float32(1) / powers
    return f if config.rope_scaling is None else _scale(f, config.rope_scaling)


def _scale(f: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divides low frequencies by `factor`, keeps high ones, blends between (Llama 3.1).

    With the released constants a wavelength of 2048 positions or less is kept and one of 8192
    or more is stretched; source: `apply_scaling` in Meta's llama-models.
    """
    wavelengths = 2 * np.pi / f
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0, 1)
    return ((1 - kept) * f / scaling.factor + kept * f).astype(np.float32)


def rotations(config: LlamaConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every angle, each float32 [B, T, 1, H/2] (1 for the heads).

    On CPU by a loop over the rows: XLA would take what is no loop into the fusions of all layers,
    and compute it for every head anew.
    """
    f = frequencies(config)[None, None]

    def row(positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        angles = positions_T[:, None, None].astype(jnp.float32) * f
        return jnp.cos(angles), jnp.sin(angles)

    if positions_BT.shape[1] == 1:
        return jax.vmap(row)(positions_BT)
    by_row = functools.partial(jax.lax.map, row)
    return jax.lax.platform_dependent(positions_BT, cpu=by_row, default=jax.vmap(row))


def rotate(x_BTNH: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each head by its position's angles; the result has the dtype of `x_BTNH`."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
