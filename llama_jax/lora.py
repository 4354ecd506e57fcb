"""Low-rank adapters (LoRA, arXiv 2106.09685): leaves beside the kernels that they change.

A kernel [out, in] with an adapter multiplies as kernel + scale * b a, where a is [rank, in] and b
[out, rank]; b begins as 0, so a new adapter changes nothing. `Lora` is a leaf type named "lora"
beside "kernel": the model applies it where it is there, whatever the kernel is, quantized or not.
Dropping the leaves gives back the base, `merge` a tree of kernels alone.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llama_jax.errors import UserError
from llama_jax.quant import Quantized

Params = Any  # nested dicts of arrays, quantized leaves and `Lora`

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
NAME = "lora"  # of the leaf beside "kernel"


class Lora(struct.PyTreeNode):
    """An adapter of one kernel."""

    a: jax.Array  # [rank, in]
    b: jax.Array  # [out, rank]
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)  # of the input, in training

    def dot(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """What is added to the product of `x` [..., in] and the kernel: [..., out], of its dtype.

        With `key` each element of `x` is dropped with the adapter's rate.
        """
        if key is not None and self.dropout:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        low = jnp.einsum("...i,ri->...r", x, self.a.astype(x.dtype))
        return self.scale * jnp.einsum("...r,or->...o", low, self.b.astype(x.dtype))

    def delta(self) -> jax.Array:
        """scale * b a, float32 [out, in] (and the axis of layers in front, where there is one)."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        return self.scale * jnp.einsum("...or,...ri->...oi", b, a, precision="highest")


@dataclass(frozen=True)
class LoraConfig:
    """Which kernels have adapters, and of what size.

    Raises `UserError` for values that make no adapter.
    """

    rank: int = 16
    alpha: float = 32.0  # the scale is alpha / rank
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    rslora: bool = False  # the scale is alpha / sqrt(rank) (arXiv 2312.03732)

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"the rank of an adapter is {self.rank}, expected at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"alpha of an adapter is {self.alpha}, expected more than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout of an adapter is {self.dropout}, expected 0 to below 1")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(
                f"an adapter's targets are {','.join(self.targets) or 'none'}, expected some of "
                f"{','.join(TARGETS)}, each once, or all"
            )

    @classmethod
    def of(cls, targets: str, **options: Any) -> "LoraConfig":
        """With `targets` as a user writes them: "q,v" or "all"."""
        named = tuple(target.strip() for target in targets.split(","))
        return cls(targets=TARGETS if named == ("all",) else named, **options)

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def to_json(self) -> dict[str, Any]:
        """All fields, as `LoraConfig(**fields)` takes them."""
        return asdict(self) | {"targets": list(self.targets)}


def add(params: Params, config: LoraConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """`params` with new adapters: a is Kaiming-uniform as in PEFT, b is 0.

    The draw for a kernel depends on `key` and its path alone. Works under `jax.eval_shape`.
    """

    def new(path: tuple[str, ...], kernel: Any) -> Lora:
        *stack, out, width = kernel.shape
        bound = width**-0.5  # of Kaiming with a = sqrt(5), PyTorch's default for a linear layer
        own = jax.random.fold_in(key, _hash("/".join(path)))
        shape = (*stack, config.rank, width)
        a = jax.random.uniform(own, shape, dtype, -bound, bound)
        b = jnp.zeros((*stack, out, config.rank), dtype)
        return Lora(a, b, config.scale, config.dropout)

    def walk(tree: Params, path: tuple[str, ...]) -> Params:
        if not isinstance(tree, dict):
            return tree
        tree = {name: walk(node, (*path, name)) for name, node in tree.items() if name != NAME}
        if path and path[-1] in config.targets and "kernel" in tree:
            tree[NAME] = new(path, tree["kernel"])
        return tree

    return walk(params, ())


def _hash(name: str) -> int:
    """32 bits of the name (FNV-1a), the same in every process."""
    value = 2166136261
    for byte in name.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


def is_adapter(path: tuple) -> bool:
    """Whether the leaf at this path of a parameter tree belongs to an adapter."""
    return any(isinstance(key, jax.tree_util.DictKey) and key.key == NAME for key in path)


def everything(path: tuple) -> bool:
    """For `split`, where there are no adapters and all leaves learn."""
    return True


def split(params: Params, chosen: Callable[[tuple], bool] = is_adapter) -> tuple[Params, Params]:
    """The chosen leaves and the others, each tree with None in place of the rest."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    ours = [leaf if chosen(path) else None for path, leaf in leaves]
    others = [None if chosen(path) else leaf for path, leaf in leaves]
    return structure.unflatten(ours), structure.unflatten(others)


def join(chosen: Params, others: Params) -> Params:
    """What `split` divided."""
    return jax.tree.map(
        lambda ours, theirs: theirs if ours is None else ours,
        chosen,
        others,
        is_leaf=lambda leaf: leaf is None,
    )


def adapters(params: Params) -> Params:
    """The `Lora` leaves of a tree, or of what `split` chose of it, and the dicts that hold them."""
    if not isinstance(params, dict):
        return {}
    children = {name: adapters(child) for name, child in params.items() if name != NAME}
    tree = {name: child for name, child in children.items() if child}
    return tree | {NAME: params[NAME]} if NAME in params else tree


def attach(params: Params, adapters: Params) -> Params:
    """`params` with `adapters` in place of its own, wherever there is one."""
    tree = dict(params)
    for name, node in adapters.items():
        tree[name] = node if name == NAME else attach(params[name], node)
    return tree


def drop(params: Params) -> Params:
    """The base: `params` without adapters."""
    return _map_adapted(params, lambda node, _: node)


def merge(params: Params) -> Params:
    """Kernels with their adapters added to them, in the dtype of the kernel.

    Raises `UserError` for a quantized kernel: the sum would have to be quantized once more.
    """

    def merged(node: Params, lora: Lora) -> Params:
        kernel = node["kernel"]
        if isinstance(kernel, Quantized):
            raise UserError(
                "an adapter cannot be merged into quantized weights without loss; merge it into "
                "the unquantized model and quantize that"
            )
        total = kernel.astype(jnp.float32) + lora.delta()
        return node | {"kernel": total.astype(kernel.dtype)}

    return _map_adapted(params, merged)


def _map_adapted(tree: Params, change: Callable[[Params, Lora], Params]) -> Params:
    """`tree` without adapters, each dict that had one being `change(dict, adapter)`."""
    if not isinstance(tree, dict):
        return tree
    node = {name: _map_adapted(child, change) for name, child in tree.items() if name != NAME}
    return change(node, tree[NAME]) if NAME in tree else node
