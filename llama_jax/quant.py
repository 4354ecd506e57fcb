"""Quantized weights: leaves of the parameter tree that know how to multiply.

A quantized leaf stands for a kernel [out, in] or a table [V, D] and has its `shape` and `dtype`.
`dot` and `rows` take plain arrays and quantized leaves alike, so the model never asks which it
holds. Scales are applied after the product, where the kind permits. Quantized weights are
constants: `dot` has a gradient with respect to `x` alone.

  int8      weights of int8, a scale for each row
  w8a8      these, times activations that become int8 token by token
  llm_int8  w8a8, but features of the activations with outliers stay as they are (arXiv 2208.07339)
  int4      weights of 16 steps, a scale for each group along a row
  nf4       weights of 16 levels that suit a normal distribution, by groups (arXiv 2305.14314)

Quantizing uses products, comparisons and reciprocals only, because XLA rewrites other divisions:
the result is the same bit for bit under `jit`, outside of it, and in NumPy.
"""

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from llama_jax.errors import UserError
from llama_jax.sharding import named, spec

Params = Any  # nested dicts of arrays and quantized leaves

GROUP_SIZE = 64  # of int4 and nf4
DOUBLE_BLOCK = 256  # scales of nf4 that share a mean and a scale, at most
FEW_TOKENS = 32  # so many as a step of decoding has
OUTLIER = 6.0  # magnitude from which llm_int8 keeps a feature
SMALLEST_SCALE = 2.0**-100  # less is 0: processors differ in what they do with subnormal numbers

# Quantiles of the normal distribution, 0 exactly (arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Quantized(struct.PyTreeNode):
    """What all kinds share. Their arrays have the leading axes of the array they stand for.

    Or a divisor of them: an element stands for as many neighbours.
    """

    @classmethod
    def quantize(cls, array: jax.Array) -> Self:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The array that this stands for, in `dtype`."""
        raise NotImplementedError

    def dot(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """`x` [..., in] times the transposed kernel: [..., out] in `dtype`."""
        raise NotImplementedError

    def dot_transposed(self, y: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """`y` [..., out] times the kernel: [..., in] in `dtype`."""
        product = jnp.einsum(
            "...o,oi->...i", y, self.dequantize(y.dtype), preferred_element_type=jnp.float32
        )
        return product.astype(dtype)


class Int8(Quantized):
    """Symmetric int8, one scale for each vector along the last axis: x = values * scale.

    The scale is the largest magnitude / 127, so -128 is never used and nothing is clipped.
    """

    values: jax.Array  # int8 [..., n]
    scale: jax.Array  # float32 [...]
    dtype: Any = struct.field(pytree_node=False)  # of the array that it stands for

    @classmethod
    def quantize(cls, array: jax.Array) -> Self:
        values, scale = quantize_int8(array)
        return cls(values, scale, jnp.dtype(array.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        return (self.values.astype(jnp.float32) * self.scale[..., None]).astype(dtype)

    def dot(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        forms = {} if _is_split() else {"cpu": _dot_digits}
        y = jax.lax.platform_dependent(x, self.values, default=_dot_converted, **forms)
        return (y * _like(self.scale, y)).astype(dtype)

    def dot_transposed(self, y: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        scaled = (y.astype(jnp.float32) * _like(self.scale, y)).astype(y.dtype)
        product = jnp.einsum(
            "...o,oi->...i", scaled, self.values.astype(y.dtype), preferred_element_type=jnp.float32
        )
        return product.astype(dtype)


class W8A8(Int8):
    """int8 weights times activations that are quantized for each token as they come."""

    def dot(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        values, scale = quantize_int8(x)
        y = _dot_int8(values, self.values) * scale[..., None]
        return (y * _like(self.scale, y)).astype(dtype)


class LLMInt8(W8A8):
    """W8A8, except for the features in which any token has an outlier (arXiv 2208.07339).

    Those are multiplied in the dtype of the activations. Which they are changes with every token
    while shapes are static, so they are masked; without outliers there is no second product.
    """

    def dot(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        has_outlier = jnp.any(jnp.abs(x) >= OUTLIER, axis=tuple(range(x.ndim - 1)))
        mask = _like(has_outlier, x)
        y = super().dot(jnp.where(mask, 0, x), jnp.float32)

        def outliers() -> jax.Array:
            return Int8.dot(self, jnp.where(mask, x, 0), jnp.float32)

        rest = jax.lax.cond(jnp.any(has_outlier), outliers, lambda: jnp.zeros_like(y))
        return (y + rest).astype(dtype)


class Int4(Quantized):
    """int4, one scale for each group of neighbours along the last axis: x = values * scale.

    The scale has the sign that makes -8 of the value with the largest magnitude, as in GGUF's Q4_0:
    with 7 for it the error is a tenth larger. It is rounded to bfloat16.
    """

    values: jax.Array  # int4 [out, in]
    scale: Any  # bfloat16 [out, in / group]
    dtype: Any = struct.field(pytree_node=False)  # of the array that it stands for
    # Until when a form is the fastest, by what the compilers estimate (docs/LOG.md)
    tokens_in_one_loop: ClassVar[int] = 8
    most_blocks: ClassVar[int] = 512  # tokens times groups

    @classmethod
    def quantize(cls, array: jax.Array, group_size: int | None = None) -> Self:
        groups = _grouped(array.astype(jnp.float32), group_size)
        most, least = jnp.max(groups, axis=-1), jnp.min(groups, axis=-1)
        scale = _without_small(jnp.where(most >= -least, most, least) * np.float32(-1 / 8))
        scale = jax.lax.reduce_precision(scale, 8, 7)  # XLA may leave out a cast there and back
        values = jnp.clip(jnp.round(groups * _inverse(scale)[..., None]), -8, 7)
        values = values.reshape(array.shape).astype(jnp.int4)
        return cls(values, scale.astype(jnp.bfloat16), jnp.dtype(array.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def levels(self, values: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """What stored values stand for, before they are scaled."""
        return values.astype(dtype)

    def scales(self) -> jax.Array:
        """As float32."""
        return self.scale.astype(jnp.float32)

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        scales = self.scales()
        groups = self.levels(self.values, jnp.float32).reshape(*scales.shape, -1)
        return (groups * scales[..., None]).reshape(self.shape).astype(dtype)

    def dot(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """See the base class.

        Scales differ along the sum, so no compiler takes them out of it. The product with the
        dequantized kernel writes that to memory, which is no matter where there are many tokens;
        for few there is a form for each platform that reads the values as they are.
        """
        tokens = math.prod(x.shape[:-1])
        forms = {}
        if tokens <= FEW_TOKENS:
            blocks = tokens * self.scale.shape[-1] <= self.most_blocks
            blocks &= not _is_split()  # the sums of all groups would travel between devices
            forms["tpu"] = type(self)._dot_blocks if blocks else type(self)._dot_groups
        if tokens <= self.tokens_in_one_loop:
            forms["cuda"] = type(self)._dot_loop
        y = jax.lax.platform_dependent(self, x, default=type(self)._dot_dequantized, **forms)
        return y.astype(dtype)

    def _dot_dequantized(self, x: jax.Array) -> jax.Array:
        kernel = self.dequantize(x.dtype)
        return jnp.einsum("...i,oi->...o", x, kernel, preferred_element_type=jnp.float32)

    def _dot_loop(self, x: jax.Array) -> jax.Array:
        """A product and a sum, which compilers for GPUs make one loop."""
        kernel = jnp.expand_dims(self.dequantize(jnp.float32), range(x.ndim - 1))
        return jnp.sum(kernel * x[..., None, :].astype(jnp.float32), axis=-1)

    def _dot_groups(self, x: jax.Array) -> jax.Array:
        """One product for each group, then the scales."""
        flat = _at_least_8(x.reshape(-1, x.shape[-1]))
        kernel = self.levels(self.values, x.dtype).reshape(*self.scale.shape, -1)
        groups = flat.reshape(len(flat), self.scale.shape[-1], -1)
        sums = jnp.einsum("bgi,ogi->bgo", groups, kernel, preferred_element_type=jnp.float32)
        return self._sum_groups(sums, x)

    def _dot_blocks(self, x: jax.Array) -> jax.Array:
        """`_dot_groups` as one product: a row for each token and group, 0 outside of the group."""
        flat, n = x.reshape(-1, x.shape[-1]), self.scale.shape[-1]
        own = jnp.repeat(jnp.eye(n, dtype=x.dtype), x.shape[-1] // n, axis=1)
        blocks = (flat[:, None] * own[None]).reshape(-1, x.shape[-1])
        kernel = self.levels(self.values, x.dtype)
        sums = jnp.einsum("bi,oi->bo", blocks, kernel, preferred_element_type=jnp.float32)
        return self._sum_groups(sums.reshape(len(flat), n, -1), x)

    def _sum_groups(self, sums: jax.Array, x: jax.Array) -> jax.Array:
        """[tokens, groups, out] as [..., out]."""
        y = jnp.einsum("bgo,og->bo", sums, self.scales())
        return y[: math.prod(x.shape[:-1])].reshape(*x.shape[:-1], -1)


class Scales(struct.PyTreeNode):
    """Scales [out, n] as int8, by blocks of at most 256 rows of a column, less their mean.

    The blocks go down the columns because one along a row would be longer than the row. Their
    length is a power of two, by which the mean is exact in any order of operations but the sum's.
    """

    values: jax.Array  # int8 [out, n]
    step: jax.Array  # float32 [out / block, n]
    mean: jax.Array  # float32 [out / block, n]

    @classmethod
    def quantize(cls, scale: jax.Array) -> Self:
        out, n = scale.shape
        blocks = scale.reshape(-1, math.gcd(out, DOUBLE_BLOCK), n)
        mean = _sum(blocks, axis=1) * np.float32(1 / blocks.shape[1])
        centred = blocks - mean[:, None]
        step = _scale(jnp.swapaxes(centred, 1, 2), 127)
        values = jnp.round(centred * _inverse(step)[:, None])
        return cls(values.reshape(out, n).astype(jnp.int8), step, mean)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> jax.Array:
        """float32 [out, n]"""
        block = len(self.values) // len(self.step)
        step, mean = (jnp.repeat(x, block, axis=0) for x in (self.step, self.mean))
        return self.values.astype(jnp.float32) * step + mean


class NF4(Int4):
    """NormalFloat of 4 bits: the nearest of `NF4_LEVELS` times the largest magnitude of a group.

    `double` quantizes the scales in turn (`Scales`), which saves 0.37 bits a weight.
    """

    values: jax.Array  # uint4 [out, in], indices of levels
    scale: Any  # float32 [out, in / group], or `Scales`
    tokens_in_one_loop: ClassVar[int] = 1
    most_blocks: ClassVar[int] = 2048

    @classmethod
    def quantize(
        cls, array: jax.Array, group_size: int | None = None, double: bool = False
    ) -> Self:
        groups = _grouped(array.astype(jnp.float32), group_size)
        scale = _scale(groups, 1)
        relative = (groups * _inverse(scale)[..., None]).reshape(array.shape)
        levels = np.array(NF4_LEVELS, np.float32)
        between = (levels[1:] + levels[:-1]) / 2
        values = sum((relative > edge).astype(jnp.uint8) for edge in between)
        values = jnp.asarray(values).astype(jnp.uint4)
        return cls(values, Scales.quantize(scale) if double else scale, jnp.dtype(array.dtype))

    def levels(self, values: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        # Selecting by bits rather than a lookup: TPUs have no fast gather.
        values = values.astype(jnp.uint8)
        levels: list[Any] = [jnp.asarray(level, dtype) for level in NF4_LEVELS]
        for bit in range(4):
            is_set = (values >> bit) & 1 == 1
            levels = [
                jnp.where(is_set, odd, even)
                for even, odd in zip(levels[::2], levels[1::2], strict=True)
            ]
        return levels[0]

    def scales(self) -> jax.Array:
        return self.scale.dequantize() if isinstance(self.scale, Scales) else self.scale


KINDS: dict[str, type[Quantized]] = {
    "int8": Int8,
    "w8a8": W8A8,
    "llm_int8": LLMInt8,
    "int4": Int4,
    "nf4": NF4,
}
GROUPED = ("int4", "nf4")  # kinds that have a group size


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantized. Raises `UserError` for what no kind knows."""

    kind: str  # one of KINDS
    embeddings: bool = False  # the embedding and the head as well
    group_size: int | None = None  # of int4 and nf4; None is 64 or, where needed, a bit less
    double_quantization: bool = False  # of nf4

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(
                f"quantization {self.kind!r} is unknown; choose from {', '.join(KINDS)}"
            )
        if self.group_size is not None and self.kind not in GROUPED:
            raise UserError(f"{self.kind} has no group size; leave it out, or take int4 or nf4")
        if self.group_size is not None and self.group_size < 2:
            raise UserError(f"group size is {self.group_size}, expected one such as 32, 64 or 128")
        if self.double_quantization and self.kind != "nf4":
            raise UserError(f"{self.kind} has no double quantization; leave it out, or take nf4")

    def __call__(self, params: Params) -> Params:
        """`params` with the kernels (and tables) quantized; runs under `jit` and `eval_shape`."""

        def leaf(path: tuple, array: Any) -> Any:
            if not self.covers(path):
                return array
            if self.group_size and array.shape[-1] % self.group_size:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise UserError(
                    f"group size {self.group_size} does not divide the {array.shape[-1]} inputs "
                    f"of {name}; {_divisor(array.shape[-1], self.group_size)} does"
                )
            return self.quantize(array)

        return jax.tree.map_with_path(leaf, params)

    def covers(self, path: tuple) -> bool:
        """Whether the leaf at this path of the tree is quantized."""
        parent, name = (key.key for key in path[-2:])
        if parent in ("embed", "head"):
            return self.embeddings
        return name == "kernel"

    def quantize(self, array: jax.Array) -> Quantized:
        """One leaf."""
        kind: Any = KINDS[self.kind]
        if kind is Int4:
            return Int4.quantize(array, self.group_size)
        if kind is NF4:
            return NF4.quantize(array, self.group_size, self.double_quantization)
        return kind.quantize(array)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., n] and float32 scales [...] such that values * scale is nearest to x.

    A vector of zeros has scale 0. Rounds to the nearest, ties to even.
    """
    x = x.astype(jnp.float32)
    scale = _scale(x, 127)
    return jnp.round(x * _inverse(scale)[..., None]).astype(jnp.int8), scale


def dot(
    x: jax.Array, kernel: jax.Array | Quantized, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """`x` [..., in] times the transposed `kernel` [out, in]: [..., out] in `dtype` (that of x)."""
    if math.prod(x.shape[:-1]) > 1 or isinstance(kernel, Int4):
        return _product(x, kernel, dtype)

    # XLA for TPUs multiplies a single row without their matrix unit, 20 times slower (docs/LOG.md)
    def padded(x: jax.Array, kernel: jax.Array | Quantized) -> jax.Array:
        two = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
        return _product(two, kernel, dtype)[0].reshape(*x.shape[:-1], -1)

    plain = functools.partial(_product, dtype=dtype)
    return jax.lax.platform_dependent(x, kernel, tpu=padded, default=plain)


def _product(x: jax.Array, kernel: jax.Array | Quantized, dtype: Any) -> jax.Array:
    if isinstance(kernel, Quantized):
        return _dot(x, kernel, jnp.dtype(dtype or x.dtype), x.dtype)
    return jnp.einsum("...i,oi->...o", x, kernel, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(x: jax.Array, kernel: Quantized, dtype: Any, x_dtype: Any) -> jax.Array:
    """`kernel.dot`, whose gradient is that of the product with the dequantized kernel.

    Written down because the derivative of rounding is 0 (w8a8), and so that what is kept for the
    gradient is the kernel as it is, not a dequantized one.
    """
    return kernel.dot(x, dtype)


def _dot_forward(x: jax.Array, kernel: Quantized, dtype: Any, x_dtype: Any) -> tuple:
    return kernel.dot(x, dtype), kernel


def _dot_backward(dtype: Any, x_dtype: Any, kernel: Quantized, gradient: jax.Array) -> tuple:
    return kernel.dot_transposed(gradient, x_dtype), None


_dot.defvjp(_dot_forward, _dot_backward)


def whole_bytes(params: Params) -> Params:
    """`params` with 4-bit arrays that lie on CPUs as int8 or uint8, of the same values.

    On a CPU each takes a byte in any case, and jax 0.10 refuses them as arguments of programs that
    were compiled ahead.
    """

    def whole(x: jax.Array) -> jax.Array:
        dtype = {jnp.dtype(jnp.int4): jnp.int8, jnp.dtype(jnp.uint4): jnp.uint8}.get(x.dtype)
        on_cpu = dtype and next(iter(x.sharding.device_set)).platform == "cpu"
        return x.astype(dtype) if on_cpu else x

    return jax.tree.map(whole, params)


def rows(table: jax.Array | Quantized, index: jax.Array) -> jax.Array:
    """Rows [*index.shape, D] of a `table` [V, D], in its dtype.

    Where the vocabulary is split, each device looks up the tokens that it has, and has 0 of others
    in the sum. Left to itself XLA for GPUs gathers a whole table that is the head as well.
    """
    V = table.shape[0]
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or named((V,), ("vocab",), mesh).is_fully_replicated:
        return _whole(jax.tree.map(lambda x: x[index // (V // len(x))], table))
    specs = jax.tree.map(lambda x: spec(x.shape[:1], ("vocab",), mesh), table)
    (axes,) = spec((V,), ("vocab",), mesh)

    def look_up(part: jax.Array | Quantized, index: jax.Array) -> jax.Array:
        def rows_of(x: jax.Array, whole: jax.Array, split: PartitionSpec) -> jax.Array:
            begin = jax.lax.axis_index(split[0]) * len(x) if split[0] else 0
            return x.at[index // (V // len(whole)) - begin].get(mode="clip")

        found = _whole(jax.tree.map(rows_of, part, table, specs))
        has = index // part.shape[0] == jax.lax.axis_index(axes)
        return jax.lax.psum(jnp.where(has[..., None], found, 0), axes)

    tokens = spec(index.shape[:1], ("batch",), mesh)
    return jax.shard_map(look_up, in_specs=(specs, tokens), out_specs=tokens)(table, index)


def _whole(x: jax.Array | Quantized) -> jax.Array:
    """The array that `x` stands for, in its dtype."""
    leaf: Any = x
    return leaf.dequantize(leaf.dtype) if isinstance(x, Quantized) else x


def _dot_converted(x: jax.Array, values: jax.Array) -> jax.Array:
    """`x` [..., in] times int8 `values` [out, in] in float32. TPUs and GPUs convert as they read."""
    converted = values.astype(x.dtype)
    return jnp.einsum("...i,oi->...o", x, converted, preferred_element_type=jnp.float32)


def _dot_digits(x: jax.Array, values: jax.Array) -> jax.Array:
    """The same on CPU, where only int8 times int8 is fast: `x` as digits of 7 bits (docs/LOG.md).

    Three digits and the scale of each token say as much as float32, two more than 16-bit floats.
    """
    n = 3 if x.dtype == jnp.float32 else 2
    x = x.astype(jnp.float32)
    scale = _scale(x, 127 << 7 * (n - 1))
    rest = jnp.round(x * _inverse(scale)[..., None]).astype(jnp.int32)
    y = jnp.zeros((), jnp.float32)
    digits = []
    for place in reversed(range(n)):
        digit = (rest + (1 << 7 * place >> 1)) >> 7 * place  # to the nearest: it fits int8
        rest -= digit << 7 * place
        digits.append(digit.astype(jnp.int8))
    for place, product in zip(
        reversed(range(n)), _dot_int8(jnp.stack(digits), values), strict=True
    ):
        y += product * (1 << 7 * place)
    return y * scale[..., None]


def _dot_int8(x: jax.Array, values: jax.Array) -> jax.Array:
    """int8 [..., in] times int8 [out, in] in int32, as float32.

    XLA on CPU needs four rows for a fast product; others fill that many in any case.
    """
    lead = x.shape[:-1]
    tokens = math.prod(lead)
    if tokens < 4:
        x = jnp.pad(x.reshape(tokens, -1), ((0, 4 - tokens), (0, 0)))
    y = jnp.einsum("...i,oi->...o", x, values, preferred_element_type=jnp.int32)
    if tokens < 4:
        y = y[:tokens].reshape(*lead, -1)
    return y.astype(jnp.float32)


def _like(vector: jax.Array, y: jax.Array) -> jax.Array:
    """[out] as [1, ..., out] with the rank of y."""
    return jnp.expand_dims(vector, range(y.ndim - 1))


def _at_least_8(x: jax.Array) -> jax.Array:
    """[tokens, in], padded to 8 rows: TPUs multiply fewer without their matrix unit."""
    return jnp.pad(x, ((0, max(0, 8 - len(x))), (0, 0)))


def _is_split() -> bool:
    """Whether weights may lie on several devices (`llama_jax.sharding.use`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def _scale(x: jax.Array, most: int) -> jax.Array:
    """The scale of each vector along the last axis at which its largest magnitude is `most`."""
    return _without_small(jnp.max(jnp.abs(x), axis=-1) * np.float32(1 / most))


def _without_small(scale: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(scale) < SMALLEST_SCALE, 0, scale)


def _inverse(scale: jax.Array) -> jax.Array:
    """1 / scale, and 0 of 0."""
    return jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))


def _grouped(x: jax.Array, group_size: int | None) -> jax.Array:
    """[out, in] as [out, in / group, group]."""
    size = _divisor(x.shape[-1], GROUP_SIZE) if group_size is None else group_size
    return x.reshape(*x.shape[:-1], -1, size)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`."""
    return max(size for size in range(1, min(n, most) + 1) if n % size == 0)


def _sum(x: jax.Array, axis: int) -> jax.Array:
    """The sum along an axis whose length is a power of two, in one order: halves are added."""
    while x.shape[axis] > 1:
        low, high = jnp.split(x, 2, axis)
        x = low + high
    return x.squeeze(axis)
