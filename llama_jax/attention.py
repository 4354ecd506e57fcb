"""Causal grouped-query attention over a cache and the positions being added to it."""

import jax
import jax.numpy as jnp

from llama_jax.cache import Entries

MASKED = -1e30  # its weight is exactly 0, as every query sees at least itself


def attend(
    q_BTNH: jax.Array, new: Entries, cached: Entries | None, length_B: jax.Array
) -> jax.Array:
    """Each query sees the cached positions of its row and the new ones up to its own.

    Query heads are in groups of G = N/K beside the KV head that they share. The cache is read
    before the new entries are written to it: XLA can then write in place, where reading after
    the write costs a copy of the whole cache on CPU (docs/LOG.md).

      length 2, S 4, T 2: query 0 sees 1 1 0 0 | 1 0
                          query 1 sees 1 1 0 0 | 1 1

    Args:
      q_BTNH: queries, turned by RoPE.
      new: keys (turned by RoPE) and values of the same T positions, [B, K, T, H].
      cached: those of earlier positions, [B, K, S, H]; None where there are none.
      length_B: how many of the S slots of each row are filled.

    Returns [B, T, N*H] in the dtype of the queries. Softmax is float32, as in Meta's reference.
    """
    B, T, N, H = q_BTNH.shape
    k_BKTH, v_BKTH = new
    K = k_BKTH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)

    def scores(k_BKSH):
        products = jnp.einsum(
            "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
        )
        return products * H**-0.5

    # Results have the batch axes first, as the products compute them: any other order makes XLA
    # transpose the whole cache instead of the small result.
    def mix(weights_BKGTS, v_BKSH):
        return jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)

    causal_TT = jnp.tril(jnp.ones((T, T), bool))
    scores_BKGTS = jnp.where(causal_TT[None, None, None], scores(k_BKTH), MASKED)
    if cached is None:
        out_BKGTH = mix(jax.nn.softmax(scores_BKGTS).astype(q_BTNH.dtype), v_BKTH)
    else:
        k_BKSH, v_BKSH = cached
        S = k_BKSH.shape[2]
        filled_BS = jnp.arange(S)[None] < length_B[:, None]
        past_BKGTS = jnp.where(filled_BS[:, None, None, None], scores(k_BKSH), MASKED)
        weights = jax.nn.softmax(jnp.concatenate([past_BKGTS, scores_BKGTS], axis=-1))
        weights = weights.astype(q_BTNH.dtype)
        out_BKGTH = mix(weights[..., :S], v_BKSH) + mix(weights[..., S:], v_BKTH)
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N * H)
