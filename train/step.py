"""One update of the parameters, as a pure function that is compiled once.

A step takes a window of K micro-batches, adds up gradients and divides by the weight of the whole
window (the tokens, or pairs, that count), so K micro-batches are one large batch whatever their
padding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from llama_jax.lora import Lora, join
from llama_jax.model import Params
from llama_jax.quant import Quantized
from train.losses import Batch, Loss, Sums

Metrics = dict[str, jax.Array]  # float32 scalars


class LossScale(struct.PyTreeNode):
    """What a float16 loss is multiplied by, so that small gradients do not become 0.

    It is halved where a gradient overflows and doubled after `INTERVAL` steps without (mixed
    precision training, arXiv 1710.03740).
    """

    scale: jax.Array  # float32
    good_steps: jax.Array  # int32, since it changed last

    INTERVAL = 2000
    SMALLEST = 1.0  # where even that overflows nothing helps

    @classmethod
    def new(cls) -> "LossScale":
        return cls(jnp.float32(2.0**16), jnp.int32(0))

    def update(self, finite: jax.Array) -> "LossScale":
        grows = finite & (self.good_steps + 1 >= self.INTERVAL)
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return LossScale(
            jnp.maximum(self.scale * factor, self.SMALLEST),
            jnp.where(finite & ~grows, self.good_steps + 1, 0),
        )


class State(struct.PyTreeNode):
    """All that an update changes, and all of the computation that a checkpoint holds."""

    step: jax.Array  # int32, windows seen
    trained: Params  # the leaves that learn, None in place of the others (`llama_jax.lora.split`)
    optimizer: Any
    loss_scale: LossScale | None  # for float16


def init_state(trained: Params, optimizer: optax.GradientTransformation, dtype: Any) -> State:
    """The state before the first step. Works under `jax.eval_shape`."""
    scale = LossScale.new() if jnp.dtype(dtype) == jnp.float16 else None
    return State(jnp.int32(0), trained, optimizer.init(trained), scale)


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, dtype: Any, seed: int | None = None
) -> Callable[[State, Params, Batch], tuple[State, Metrics]]:
    """The function (state, frozen parameters, window) -> (next state, metrics), to be compiled.

    A window is a batch of [K, B, T]. Gradients are of `state.trained` alone and float32.
    Where a float16 gradient overflows, only `step` and the loss scale change.

    Args:
      dtype: what is computed in; parameters that learn keep their own.
      seed: of dropout; the key of a micro-batch depends on it, the step and its index alone. None
        for no dropout.

    Metrics: the loss and what else `loss` sums up, over the weight; that weight;
    grad_norm (before it is clipped); and with float16 skipped (1 or 0) and loss_scale.
    """

    def gradient(
        state: State, frozen: Params, batch: Batch, index: jax.Array
    ) -> tuple[Params, Sums]:
        key = None
        if seed is not None:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), index)

        def scaled(trained: Params) -> tuple[jax.Array, Sums]:
            sums = loss(cast(join(trained, frozen), dtype), batch, key)
            if state.loss_scale is None:
                return sums[0], sums
            return sums[0] * (state.loss_scale.scale / batch["tokens"].size), sums

        gradients, sums = jax.grad(scaled, has_aux=True)(state.trained)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    def step(state: State, frozen: Params, window: Batch) -> tuple[State, Metrics]:
        def add(sums: Any, micro: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, batch = micro
            return jax.tree.map(jnp.add, sums, gradient(state, frozen, batch, index)), None

        count = window["tokens"].shape[0]
        index, first = jnp.int32(0), jax.tree.map(lambda x: x[0], window)
        if count == 1:
            sums = gradient(state, frozen, first, index)
        else:
            shapes = jax.eval_shape(gradient, state, frozen, first, index)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            sums, _ = jax.lax.scan(add, zeros, (jnp.arange(count), window))
        gradients, (total, weight, seen) = sums
        divisor = counted = jnp.maximum(weight, 1)
        if state.loss_scale is not None:
            divisor *= state.loss_scale.scale / window["tokens"][0].size
        gradients = jax.tree.map(lambda g: g / divisor, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        norm = optax.tree.norm(gradients)
        metrics = {name: value / counted for name, value in seen.items()}
        metrics |= {"loss": total / counted, "weight": weight, "grad_norm": norm}
        new = State(state.step + 1, trained, optimizer_state, None)
        if state.loss_scale is None:
            return new, metrics
        finite = jnp.isfinite(norm)
        kept = state.replace(step=new.step, loss_scale=None)
        new = jax.tree.map(lambda ours, old: jnp.where(finite, ours, old), new, kept)
        metrics |= {"skipped": 1.0 - finite, "loss_scale": state.loss_scale.scale}
        return new.replace(loss_scale=state.loss_scale.update(finite)), metrics

    return step


def cast(params: Params, dtype: Any) -> Params:
    """`params` to compute with in `dtype`; adapters cast themselves, quantized arrays stay."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Lora):
            return x
        if isinstance(x, Quantized):
            return x.replace(dtype=jnp.dtype(dtype))  # what it computes in
        return x.astype(dtype)

    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, Lora | Quantized))
