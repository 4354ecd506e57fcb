"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

All settings are arrays with one value a row, so that a changed value never recompiles. Each row
draws from a key of its own. Filters follow the order of Hugging Face's generate: repetition
penalty, temperature, top-k, top-p, min-p, each seeing what the one before has left.

The k-th largest logit and the edge of the nucleus are found by bisection over the 32 bits of a
float instead of by sorting the vocabulary: exact, and several times faster on CPU.
"""

import collections
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

DROPPED = -1e30


class Sampling(struct.PyTreeNode):
    """Settings of B rows. The defaults of `settings` leave the model's distribution as it is."""

    temperature: jax.Array  # float32 [B]; 0 is greedy
    top_k: jax.Array  # int32 [B]; 0 is off
    top_p: jax.Array  # float32 [B]; 1 is off
    min_p: jax.Array  # float32 [B]; 0 is off
    repetition_penalty: jax.Array  # float32 [B]; 1 is off
    seed: jax.Array  # uint32 [B, 2], from `row_seeds`


def settings(
    seeds: Sequence[tuple[int, int]],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Sampling:
    """The same settings for each of the B rows that `seeds` (see `row_seeds`) has."""
    B = len(seeds)
    return Sampling(
        temperature=jnp.asarray(np.full(B, temperature, np.float32)),
        top_k=jnp.asarray(np.full(B, top_k, np.int32)),
        top_p=jnp.asarray(np.full(B, top_p, np.float32)),
        min_p=jnp.asarray(np.full(B, min_p, np.float32)),
        repetition_penalty=jnp.asarray(np.full(B, repetition_penalty, np.float32)),
        seed=jnp.asarray(np.array(seeds, np.uint32).reshape(B, 2)),
    )


def row_seeds(seed: int, prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(seed, stream) of each prompt: a checksum of its ids, and 1 more for each earlier copy of it.

    A prompt so draws the same alone and in any batch, and other prompts and copies of it differ.

      prompts a, b, a -> streams crc(a), crc(b), crc(a) + 1
    """
    seen: collections.Counter[int] = collections.Counter()
    pairs = []
    for prompt in prompts:
        checksum = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        pairs.append((seed, (checksum + seen[checksum]) % 2**32))
        seen[checksum] += 1
    return pairs


def sample(
    logits_BV: jax.Array, seen_BV: jax.Array, step_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: float32.
      seen_BV: bool, tokens that the repetition penalty lowers (prompt and text so far).
      step_B: int32, how many tokens the row has drawn: each draw has a key of its own.
    """
    logits_BV = penalize(logits_BV, seen_BV, sampling.repetition_penalty)
    greedy = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw():
        temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
        kept = keep(logits_BV / temperature[:, None], sampling)
        drawn = jax.vmap(jax.random.categorical)(_keys(sampling, step_B), kept).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def _keys(sampling: Sampling, step_B: jax.Array) -> jax.Array:
    def key(seed, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), step)

    return jax.vmap(key)(sampling.seed, step_B)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty, multiplies negative ones by it.

    Source: CTRL (arXiv 1909.05858), in the form of Hugging Face's generate.
    """
    penalty_B1 = penalty_B[:, None]
    lowered = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lowered, logits_BV)


def keep(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits with those outside of top-k, top-p and min-p at `DROPPED`.

    - top-k: the k largest, and all that equal the k-th.
    - top-p (arXiv 1904.09751): those before which less than or exactly p of the mass lies, as
      in Meta's sampler; equal logits stay or go together.
    - min-p (arXiv 2407.01082): those with at least min_p times the largest probability.
    """

    def top_k(logits):
        k = sampling.top_k[:, None]
        edge = _largest(lambda t: jnp.sum(_ordered(logits) >= t, -1, keepdims=True) >= k, logits)
        return _drop_below(edge, logits, k > 0)

    def top_p(logits):
        probabilities, p = jax.nn.softmax(logits), sampling.top_p[:, None]

        def too_much(t):
            mass = jnp.sum(jnp.where(_ordered(logits) >= t, probabilities, 0), -1, keepdims=True)
            return mass > p

        return _drop_below(_largest(too_much, logits), logits, p < 1)

    logits_BV = jax.lax.cond(jnp.any(sampling.top_k > 0), top_k, lambda x: x, logits_BV)
    logits_BV = jax.lax.cond(jnp.any(sampling.top_p < 1), top_p, lambda x: x, logits_BV)
    lowest = jnp.max(logits_BV, -1, keepdims=True) + jnp.log(sampling.min_p)[:, None]
    return jnp.where(logits_BV >= lowest, logits_BV, DROPPED)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 to uint32 in the same order: 0 and -0 in the middle, negative numbers below."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, -bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[jax.Array], jax.Array], logits_BV: jax.Array) -> jax.Array:
    """The largest uint32 [B, 1] for which `holds`, true up to some value; 0 if for none.

    A bit at a time, which is the least to compute; four on a mesh, where every time the devices
    must exchange their sums.
    """
    bits = 1 if jax.sharding.get_abstract_mesh().empty else 4

    def try_digits(i, edge):
        shift = 32 - bits * (1 + i.astype(jnp.uint32))
        tried = (edge | (jnp.uint32(digit) << shift) for digit in range(1, 1 << bits))
        return edge | (sum(holds(t).astype(jnp.uint32) for t in tried) << shift)

    return jax.lax.fori_loop(0, 32 // bits, try_digits, jnp.zeros((len(logits_BV), 1), jnp.uint32))


def _drop_below(edge_B1: jax.Array, logits_BV: jax.Array, on_B1: jax.Array) -> jax.Array:
    return jnp.where((_ordered(logits_BV) >= edge_B1) | ~on_B1, logits_BV, DROPPED)
