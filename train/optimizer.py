"""Optimizers and learning rates: small chains of Optax, for the leaves that learn alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from llama_jax.errors import UserError
from llama_jax.model import Params

OPTIMIZERS = ("adamw", "lion", "sgd", "adafactor")
SCHEDULES = ("cosine", "linear", "constant")
MOMENTUM = 0.9  # of sgd


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow the gradient. Raises `UserError` for values that make no sense."""

    name: str = "adamw"
    learning_rate: float = 2e-4  # the largest
    schedule: str = "cosine"  # how it falls after warm-up; to `final` times the largest
    warmup: int = 0  # steps in which it rises from 0
    final: float = 0.1
    weight_decay: float = 0.0  # of all but norms
    clip: float = 1.0  # largest global norm of the gradient; 0 for any
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self):
        for what, name, known in (
            ("optimizer", self.name, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if name not in known:
                raise UserError(f"the {what} {name!r} is unknown; choose from {', '.join(known)}")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(
                f"the learning rate is {self.learning_rate}, expected more than 0 and finite"
            )
        for what, number in (
            ("weight decay", self.weight_decay),
            ("clip norm", self.clip),
            ("warm-up", self.warmup),
        ):
            if not 0 <= number < math.inf:
                raise UserError(f"the {what} is {number}, expected 0 or more and finite")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step, 0 to `steps`."""
    peak, falling = config.learning_rate, max(1, steps - config.warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, falling, config.final),
        "linear": optax.linear_schedule(peak, peak * config.final, falling),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not config.warmup:
        return after
    # The first step is not wasted on a rate of 0.
    rising = optax.linear_schedule(peak / config.warmup, peak, max(1, config.warmup - 1))
    return optax.join_schedules([rising, after], [config.warmup])


def make_optimizer(
    config: OptimizerConfig, steps: int, chosen: Callable[[tuple], bool]
) -> optax.GradientTransformation:
    """The optimizer of the leaves whose path is `chosen`.

    All others are frozen: they have no state, no update and no part in the norm that is clipped.
    It takes whole parameter trees, and those of `llama_jax.lora.split` alike.
    """
    rate = learning_rate(config, steps)
    decay, b1, b2 = config.weight_decay, config.b1, config.b2
    rule = {
        "adamw": lambda: optax.adamw(rate, b1, b2, weight_decay=decay, mask=_is_matrix),
        "lion": lambda: optax.lion(rate, b1, b2, weight_decay=decay, mask=_is_matrix),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay, _is_matrix), optax.sgd(rate, MOMENTUM)
        ),
        # Optax's own decay is not multiplied by the rate; its last step changes the sign.
        "adafactor": lambda: optax.chain(
            optax.adafactor(None),
            optax.scale(-1.0),
            optax.add_decayed_weights(decay, _is_matrix),
            optax.scale_by_learning_rate(rate),
        ),
    }[config.name]()
    if config.clip:
        rule = optax.chain(optax.clip_by_global_norm(config.clip), rule)

    def labels(params: Params) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "trained" if chosen(path) else "frozen", params
        )

    return optax.partition({"trained": rule, "frozen": optax.set_to_zero()}, labels)


def _is_matrix(params: Params) -> Any:
    """Whether each leaf is decayed: norms, whose leaves are named "scale", are not."""

    def is_matrix(path: tuple, _: Any) -> bool:
        return not (isinstance(path[-1], jax.tree_util.DictKey) and path[-1].key == "scale")

    return jax.tree.map_with_path(is_matrix, params)
