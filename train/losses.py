"""What training minimizes.

A loss takes parameters, a batch, and a key for dropout or None. It returns the sum of the losses,
the sum of the weights that the caller divides by, and sums of what else there is to see, by name:
all of them float32 scalars.

A batch is a dict of arrays [B, T], of the types in `train.data.BATCH`:
  tokens    inputs
  targets   the token that follows each in the same text
  weights   1 where the loss of the target counts, else 0
  segments  1, 2, ... for the texts packed in a row, 0 for padding
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import quant
from llama_jax.config import LlamaConfig
from llama_jax.lora import drop
from llama_jax.model import Llama, Params, head_kernel
from llama_jax.sharding import constrain, part

Batch = dict[str, jax.Array]
Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]
Loss = Callable[[Params, Batch, jax.Array | None], Sums]

LOGITS = 1 << 26  # most logits that are in the memory of a device at once: 256 MiB


def next_token(config: LlamaConfig, *, remat: str = "none", dropout: float = 0.0) -> Loss:
    """Cross-entropy of the next token in nats, over the targets that count.

    Args:
      remat: what of a layer is kept for the backward pass, see `llama_jax.model.REMAT`.
      dropout: of the residual stream, where the loss is called with a key.
    """

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> Sums:
        nats_BT = token_nats(config, params, batch, key, remat=remat, dropout=dropout)
        return jnp.sum(nats_BT * batch["weights"]), jnp.sum(batch["weights"]), {}

    return loss


def preference(
    config: LlamaConfig, beta: float, *, label_smoothing: float = 0.0, remat: str = "none"
) -> Loss:
    """Direct preference optimization of adapters (DPO, arXiv 2305.18290), per pair of answers.

    Rows 2i and 2i+1 of a batch are the chosen and the rejected answer to one prompt, one to a row;
    a pair without a target that counts is padding. The reference is the same tree without its
    adapters. Beside the loss: the implicit rewards of both answers, the margin between them, and
    how often the chosen one has the larger.

    Args:
      beta: how dear it is to leave the reference.
      label_smoothing: the share of pairs that are taken to be the wrong way round (conservative DPO).
    """

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> Sums:
        chosen, rejected = rewards(config, params, batch, beta, key, remat=remat)
        is_pair = jnp.sum(batch["weights"], axis=1).reshape(-1, 2).min(axis=1) > 0
        margin = chosen - rejected
        losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
        losses -= label_smoothing * jax.nn.log_sigmoid(-margin)

        def total(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(is_pair, values, 0.0))

        seen = {"reward_chosen": chosen, "reward_rejected": rejected, "margin": margin}
        seen["accuracy"] = (margin > 0).astype(jnp.float32)
        return total(losses), total(jnp.ones_like(margin)), jax.tree.map(total, seen)

    return loss


def rewards(
    config: LlamaConfig,
    params: Params,
    batch: Batch,
    beta: float,
    key: jax.Array | None = None,
    *,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Implicit rewards of chosen and rejected answers, float32 [B/2] each.

    beta * (log p(answer) - log p of the reference), summed over the tokens that count.
    """

    def log_p(params: Params, key: jax.Array | None) -> jax.Array:
        nats_BT = token_nats(config, params, batch, key, remat=remat)
        return -jnp.sum(nats_BT * batch["weights"], axis=1)

    reference = jax.lax.stop_gradient(log_p(drop(params), None))
    rewards_P2 = (beta * (log_p(params, key) - reference)).reshape(-1, 2)
    return rewards_P2[:, 0], rewards_P2[:, 1]


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

    each = math.prod(part((B, config.vocab_size), "batch", "vocab"))  # logits of a position
    blocks = math.ceil(T / max(1, LOGITS // each))
    if blocks == 1:
        return nats(x_BTD, batch["targets"])
    width = math.ceil(T / blocks)
    more = blocks * width - T  # cut off again
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, more), (0, 0)))
    targets_BT = jnp.pad(batch["targets"], ((0, 0), (0, more)))
    x_nBtD = jnp.swapaxes(x_BTD.reshape(B, blocks, width, D), 0, 1)
    targets_nBt = jnp.swapaxes(targets_BT.reshape(B, blocks, width), 0, 1)
    nats_nBt = jax.lax.map(lambda block: jax.checkpoint(nats)(*block), (x_nBtD, targets_nBt))
    return jnp.swapaxes(nats_nBt, 0, 1).reshape(B, -1)[:, :T]
