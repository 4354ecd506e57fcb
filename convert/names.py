"""The one table of weights: what Meta, Hugging Face and this project call each of them.

All three store a weight matrix as [out, in], so conversion copies arrays, with one exception:
Meta rotates adjacent pairs of a head's rows (RoPE), Hugging Face and this project rotate its two
halves, so the rows of wq and wk are permuted on the way (`halves_from_pairs` and its inverse).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llama_jax.config import LlamaConfig

# Meta splits the embedding over the model dimension in Llama 1 and 2, over the vocabulary since 3.
BY_VERSION = -1


@dataclass(frozen=True)
class Weight:
    """One weight under its three names. Names of a layer's weights hold "{i}"."""

    path: str  # in our tree, joined by "/"
    meta: str
    hf: str
    axes: str  # V vocab_size, D dim, F mlp_dim, Q n_heads * head_dim, K n_kv_heads * head_dim
    meta_axis: int | None  # along which Meta's ranks are concatenated; None: all hold the same
    rope: bool = False  # rows are permuted between Meta and the others

    def shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """In our tree, in Hugging Face's files and over all of Meta's ranks together."""
        sizes = {
            "V": config.vocab_size,
            "D": config.dim,
            "F": config.mlp_dim,
            "Q": config.n_heads * config.head_dim,
            "K": config.n_kv_heads * config.head_dim,
        }
        return tuple(sizes[axis] for axis in self.axes)

    def rope_heads(self, config: LlamaConfig) -> int:
        """How many heads the rows of a `rope` weight are made of."""
        return config.n_heads if self.axes[0] == "Q" else config.n_kv_heads


EMBED = Weight(
    "embed/embedding", "tok_embeddings.weight", "model.embed_tokens.weight", "VD", BY_VERSION
)
NORM = Weight("norm/scale", "norm.weight", "model.norm.weight", "D", None)
HEAD = Weight("head/kernel", "output.weight", "lm_head.weight", "VD", 0)

_M, _H = "layers.{i}.", "model.layers.{i}."
LAYER = (
    Weight("attention_norm/scale", _M + "attention_norm.weight", _H + "input_layernorm.weight", "D", None),
    Weight("attention/q/kernel", _M + "attention.wq.weight", _H + "self_attn.q_proj.weight", "QD", 0, rope=True),
    Weight("attention/k/kernel", _M + "attention.wk.weight", _H + "self_attn.k_proj.weight", "KD", 0, rope=True),
    Weight("attention/v/kernel", _M + "attention.wv.weight", _H + "self_attn.v_proj.weight", "KD", 0),
    Weight("attention/o/kernel", _M + "attention.wo.weight", _H + "self_attn.o_proj.weight", "DQ", 1),
    Weight("mlp_norm/scale", _M + "ffn_norm.weight", _H + "post_attention_layernorm.weight", "D", None),
    Weight("mlp/gate/kernel", _M + "feed_forward.w1.weight", _H + "mlp.gate_proj.weight", "FD", 0),
    Weight("mlp/up/kernel", _M + "feed_forward.w3.weight", _H + "mlp.up_proj.weight", "FD", 0),
    Weight("mlp/down/kernel", _M + "feed_forward.w2.weight", _H + "mlp.down_proj.weight", "DF", 1),
)  # fmt: skip


def weights(config: LlamaConfig) -> Iterator[Weight]:
    """Every weight of the model in the order of computation; a tied head is left out."""
    yield EMBED
    for i in range(config.n_layers):
        for weight in LAYER:
            yield replace(
                weight,
                path=f"layers_{i}/{weight.path}",
                meta=weight.meta.format(i=i),
                hf=weight.hf.format(i=i),
            )
    yield NORM
    if not config.tie_embeddings:
        yield HEAD


def adapted(config: LlamaConfig) -> Iterator[tuple[str, str]]:
    """Every kernel that may have an adapter: the path of what holds it, and Hugging Face's name.

    ("layers_0/attention/q", "model.layers.0.self_attn.q_proj"), and so on.
    """
    for weight in weights(config):
        holder, _, leaf = weight.path.rpartition("/")
        if leaf == "kernel" and weight.path != HEAD.path:
            yield holder, weight.hf.removesuffix(".weight")


def peft_name(module: str, matrix: str) -> str:
    """What PEFT calls "A" or "B" of the adapter of Hugging Face's `module`."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


def is_derived(name: str) -> bool:
    """Whether an old file's tensor holds the RoPE frequencies, which the config gives as well."""
    return name.endswith(("rope.freqs", "rotary_emb.inv_freq"))


def meta_embedding_axis(version: str) -> int:
    """Along which axis Meta splits the embedding over the ranks of a model of this version."""
    return 1 if version in ("1", "2") else 0


def halves_from_pairs(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorders each head's rows from Meta's RoPE layout to the half-split one: one copy.

    A head of 4 rows 0 1 2 3, rotated as (0, 1) (2, 3), becomes 0 2 1 3, rotated as (0, 1) (2, 3)
    again, which are now the places (first, third) and (second, fourth).
    """
    return np.ascontiguousarray(
        rows.reshape(n_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2)
    ).reshape(rows.shape)


def pairs_from_halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """The exact inverse of `halves_from_pairs`."""
    return np.ascontiguousarray(
        rows.reshape(n_heads, 2, -1, rows.shape[-1]).swapaxes(1, 2)
    ).reshape(rows.shape)
