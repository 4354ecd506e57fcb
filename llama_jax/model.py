"""Llama as a pure function of parameters, tokens and cache.

Axis key: B batch, T new positions, S cached positions, D model, N query heads, K KV heads,
G = N/K, H head dimension, F feed-forward, V vocabulary, L layers.

Kernels are [out, in], as Meta and Hugging Face store them: conversion copies bytes, and a tied
head is the embedding itself. Activations have the dtype of the parameters; norms, softmax, angles
and logits are float32. Modules read their leaves from the tree and do not compare them with their
own idea of a shape: `llama_jax.checkpoint` checks the tree once, when it is loaded.

The tree decides more: a kernel may be quantized and have an adapter (`llama_jax.lora`) beside it,
and layers may be stacked (`stack`), which are then walked by one compiled loop.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax import quant, rope
from llama_jax.attention import attend
from llama_jax.cache import Entries, KVCache, append
from llama_jax.config import LlamaConfig
from llama_jax.sharding import GATHERED, constrain, gathered

Params = Any  # nested dicts of arrays, as `Llama.init` makes them, or of quantized leaves

# What of a layer is kept for the backward pass, and not computed again: all of it, the results of
# products with weights, or its input alone. Weights that were gathered for a product never.
REMAT: dict[str, Callable] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def leaf(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> jax.Array:
    """The parameter `name` of `module`: from the tree, or a new one in `init`."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), float32 inside, as in Meta's reference."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scale_D = leaf(self, "scale", nn.initializers.ones, x_BTD.shape[-1:])
        x32 = x_BTD.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x_BTD.dtype) * scale_D[None, None]


class Embedding(nn.Module):
    """A table [V, D]: the rows of tokens, or the kernel of a head."""

    vocab_size: int
    dim: int
    leaf_name: str = "embedding"

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = self.vocab_size, self.dim
        return leaf(self, self.leaf_name, nn.initializers.normal(0.02), shape)


class Linear(nn.Module):
    """A product with a kernel [out, in] and with the adapter beside it, without bias."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        kernel = leaf(self, "kernel", init, (self.features, x.shape[-1]))
        y = quant.dot(x, gathered(kernel, str(self.name), "kernel"))
        if not self.has_variable("params", "lora"):
            return y
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        lora = gathered(self.get_variable("params", "lora"), str(self.name), "lora")
        return y + lora.dot(x, key)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD, rotation, cached: Entries | None, length_B, segments_BT):
        N, K, H = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim

        # Beside a cache, all rows are multiplied where the kernel is, and attend where theirs lie.
        rows, split = ("batch", "heads") if cached is None else ("cache_batch", "kv_heads")

        def heads(name, n):
            y = constrain(Linear(n * H, name=name)(x_BTD), "batch", None, split)
            return y.reshape(*y.shape[:2], n, H)

        q_BTNH = constrain(rope.rotate(heads("q", N), rotation), rows, None, "heads", None)
        k_BTKH = constrain(rope.rotate(heads("k", K), rotation), rows, None, "kv_heads", None)
        v_BTKH = constrain(heads("v", K), rows, None, "kv_heads", None)
        new = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
        out = constrain(attend(q_BTNH, new, cached, length_B, segments_BT), "batch", None, "heads")
        return Linear(self.config.dim, name="o")(out), new


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate = nn.silu(Linear(self.config.mlp_dim, name="gate")(x_BTD))
        up = Linear(self.config.mlp_dim, name="up")(x_BTD)
        return Linear(self.config.dim, name="down")(gate * up)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm and beside its residual."""

    config: LlamaConfig
    dropout: float = 0.0  # of what each half adds, where an rng "dropout" is given

    @nn.compact
    def __call__(self, x_BTD, rotation, cached: Entries | None, length_B, segments_BT=None):
        def norm(name, x_BTD):
            return whole(RMSNorm(self.config.norm_eps, name=name)(x_BTD))

        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        attention = Attention(self.config, name="attention")
        mixed, new = attention(
            norm("attention_norm", x_BTD), rotation, cached, length_B, segments_BT
        )
        x_BTD = whole(x_BTD + drop(mixed))
        return whole(x_BTD + drop(MLP(self.config, name="mlp")(norm("mlp_norm", x_BTD)))), new


def whole(x_BTD: jax.Array) -> jax.Array:
    """Activations between two parts of a layer: every device has all of those of its rows."""
    return constrain(x_BTD, "batch", None, None)


class Llama(nn.Module):
    """The whole network. Unrolled layers run faster, a scan over stacked ones compiles faster."""

    config: LlamaConfig
    remat: str = "none"  # one of `REMAT`
    dropout: float = 0.0  # of the residual stream, where an rng "dropout" is given

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        lengths_B: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        head: bool = True,
    ) -> tuple[jax.Array, tuple[Entries, ...]]:
        """Logits, and the keys and values of the new positions for `append`.

        Args:
          tokens_BT: int32; each row continues what `cache` holds of it.
          cache: earlier positions; None where there are none, or layers are stacked.
          lengths_B: if given, each row has only so many tokens, padded on the right, and only
            the logits of its last one are computed.
          segments_BT: if given, each row is several texts packed together: positions of one text
            have the same number, count from its first, and see no other text. No cache then.
          head: whether to return logits; otherwise what `head_kernel` is to be multiplied with.

        Returns float32 [B, T, V], or [B, 1, V] if `lengths_B` is given, or [B, T, D], and L entries
        (none where layers are stacked).
        """
        config = self.config
        B, T = tokens_BT.shape
        past_B = jnp.zeros(B, jnp.int32) if cache is None else cache.length
        if segments_BT is None:
            positions_BT = past_B[:, None] + jnp.arange(T)[None]
        else:
            positions_BT = segment_positions(segments_BT)
        rotation = rope.rotations(config, positions_BT)
        table_VD = Embedding(config.vocab_size, config.dim, name="embed")()
        x_BTD = quant.rows(table_VD, tokens_BT)
        x_BTD = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x_BTD)
        mesh = jax.sharding.get_abstract_mesh()
        keeps = self.remat == "none" and (mesh.empty or mesh.shape["fsdp"] == 1)
        block = Block if keeps else nn.remat(Block, policy=REMAT[self.remat])
        new = []
        if self.has_variable("params", "layers"):
            broadcast: Any = nn.broadcast
            scan = nn.scan(
                lambda layer, x_BTD, *rest: (layer(x_BTD, *rest)[0], None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=broadcast,
                length=config.n_layers,
            )
            layer = block(config, self.dropout, name="layers")
            x_BTD, _ = scan(layer, x_BTD, rotation, None, past_B, segments_BT)
        else:
            for i in range(config.n_layers):
                cached = None if cache is None else cache.layers[i]
                layer = block(config, self.dropout, name=f"layers_{i}")
                x_BTD, entries = layer(x_BTD, rotation, cached, past_B, segments_BT)
                new.append(entries)
        if lengths_B is not None:
            last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
            x_BTD = jnp.take_along_axis(x_BTD, last_B11, axis=1)
        x_BTD = RMSNorm(config.norm_eps, name="norm")(x_BTD)
        head_VD = (
            table_VD
            if config.tie_embeddings
            else Embedding(config.vocab_size, config.dim, leaf_name="kernel", name="head")()
        )
        if not head:
            return x_BTD, tuple(new)
        logits_BTV = quant.dot(x_BTD, gathered(head_VD, "head", "kernel"), jnp.float32)
        return constrain(logits_BTV, "batch", None, "vocab"), tuple(new)


def segment_positions(segments_BT: jax.Array) -> jax.Array:
    """Positions that begin at 0 where the segment changes.

    segments   1 1 1 2 2 0 0
    positions  0 1 2 0 1 0 1
    """
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1])[None], segments_BT.shape)
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    return index_BT - jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)


def head_kernel(config: LlamaConfig, params: Params) -> Any:
    """The kernel [V, D] that makes logits of the last activations, gathered."""
    tied = config.tie_embeddings
    head_VD = params["embed"]["embedding"] if tied else params["head"]["kernel"]
    return gathered(head_VD, "head", "kernel")


def logits_and_entries(
    config: LlamaConfig,
    params: Params,
    tokens_BT: jax.Array,
    cache: KVCache | None = None,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Entries, ...]]:
    """Logits, and the keys and values of the new positions for `append`.

    Args:
      params, tokens_BT, cache: as in `forward`.
      lengths_B: int32; if given, each row has only so many tokens, padded on the right, and only
        the logits of its last one are computed.

    Returns float32 [B, T, V], or [B, 1, V] if `lengths_B` is given, and L entries (none where
    layers are stacked).
    """
    result: Any = Llama(config).apply({"params": params}, tokens_BT, cache, lengths_B)
    return result


def forward(
    config: LlamaConfig, params: Params, tokens_BT: jax.Array, cache: KVCache | None = None
) -> tuple[jax.Array, KVCache | None]:
    """Logits of every position, and the cache with these tokens appended.

    Args:
      params: the tree that `Llama(config).init` makes and `llama_jax.load` reads.
      tokens_BT: int32; each row continues what `cache` holds of it.
      cache: from `init_cache` or an earlier call, with room for T more; None for no cache.

    Returns float32 [B, T, V], and None if `cache` is None.
    """
    logits_BTV, new = logits_and_entries(config, params, tokens_BT, cache)
    if cache is None:
        return logits_BTV, None
    B, T = tokens_BT.shape
    return logits_BTV, append(cache, new, jnp.full(B, T, jnp.int32))


def stack(params: Params) -> Params:
    """`params` with the layers "layers_0" ... as one tree "layers" whose arrays have them in front.

    `Llama` walks such a tree by a compiled loop: compiling takes the time of one layer.
    """
    layers = sorted((n for n in params if re.fullmatch(r"layers_\d+", n)), key=_number)
    rest = {name: node for name, node in params.items() if name not in layers}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *map(params.get, layers))}


def unstack(params: Params) -> Params:
    """The reverse of `stack`."""
    rest = {name: node for name, node in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    for i in range(count):
        rest[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["layers"])
    return rest


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])
