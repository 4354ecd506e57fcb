"""What training minimizes, as sums and what they are sums over: the caller divides.

A batch is a dict of arrays [B, T]:
  tokens    int32, inputs
  targets   int32, the token that follows each in the same text
  weights   float32, 1 where the loss of the target counts, else 0
  segments  int32, 1, 2, ... for the texts packed in a row, 0 for padding
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import quant
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama, Params, head_kernel
from llama_jax.sharding import constrain

Batch = dict[str, jax.Array]
# (parameters, batch, key for dropout or None) -> (sum of losses, sum of weights), float32 scalars
Loss = Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]

LOGITS = 1 << 26  # most logits that are in memory at once: 256 MiB


def next_token(config: LlamaConfig, *, remat: str = "none", dropout: float = 0.0) -> Loss:
    """Cross-entropy of the next token in nats, over the targets that count.

    Args:
      remat: what of a layer is kept for the backward pass, see `llama_jax.model.REMAT`.
      dropout: of the residual stream, where the loss is called with a key.
    """

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        nats_BT = token_nats(config, params, batch, key, remat=remat, dropout=dropout)
        return jnp.sum(nats_BT * batch["weights"]), jnp.sum(batch["weights"])

    return loss


def token_nats(
    config: LlamaConfig,
    params: Params,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    remat: str = "none",
    dropout: float = 0.0,
) -> jax.Array:
    """-log p(target) of every position, float32 [B, T].

    Logits are never all in memory: a block of positions at a time, once more for the gradient.
    """
    model = Llama(config, remat, dropout)
    rngs = {} if key is None else {"dropout": key}
    result: Any = model.apply(
        {"params": params}, batch["tokens"], None, None, batch["segments"], head=False, rngs=rngs
    )
    x_BTD, _ = result
    B, T, D = x_BTD.shape
    head_VD = head_kernel(config, params)

    def nats(x_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        logits_BTV = quant.dot(x_BTD, head_VD, jnp.float32)
        logits_BTV = constrain(logits_BTV, "batch", None, "vocab")
        # A sum and no lookup, which would gather a vocabulary that is split.
        is_target = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
        target_BT = jnp.sum(jnp.where(is_target, logits_BTV, 0), axis=-1)
        return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT

    blocks = _blocks(T, B * config.vocab_size)
    if blocks == 1:
        return nats(x_BTD, batch["targets"])
    x_nBtD = jnp.swapaxes(x_BTD.reshape(B, blocks, -1, D), 0, 1)
    targets_nBt = jnp.swapaxes(batch["targets"].reshape(B, blocks, -1), 0, 1)
    nats_nBt = jax.lax.map(lambda block: jax.checkpoint(nats)(*block), (x_nBtD, targets_nBt))
    return jnp.swapaxes(nats_nBt, 0, 1).reshape(B, T)


def _blocks(T: int, logits: int) -> int:
    """How many equal parts to make of T positions with so many logits each."""
    least = math.ceil(T * logits / LOGITS)
    return next(n for n in range(max(1, min(least, T)), T + 1) if T % n == 0)
