"""Adapters: the identity when new, a low-rank sum once trained, and gone without a trace.

Sizes, bounds and scales are compared with PEFT's for the same numbers.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_params, tiny, transformers_model

from llama_jax import lora
from llama_jax.errors import UserError
from llama_jax.lora import Lora, LoraConfig
from llama_jax.model import Llama, forward, stack, unstack
from llama_jax.quant import Int8, Quantization

CONFIG = tiny(4, 2, dim=32)
PARAMS = random_params(CONFIG)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12)))
ALL = LoraConfig.of("all", rank=4, alpha=6.0)


@functools.cache
def _compiled():
    return jax.jit(lambda params: forward(CONFIG, params, TOKENS)[0])


def logits(params):
    return np.asarray(_compiled()(params))


def adapted(config=ALL, params=None, dtype=jnp.float32):
    """With adapters that change the logits about as much as the weights make them."""
    params = lora.add(PARAMS if params is None else params, config, jax.random.key(0), dtype)

    def trained(path, leaf):
        if path[-1] != jax.tree_util.GetAttrKey("b"):
            return leaf
        key = jax.random.key(math.prod(leaf.shape) + len(str(path)))
        return (0.3 * jax.random.normal(key, leaf.shape)).astype(dtype)

    return jax.tree.map_with_path(lambda p, x: trained(p, x) if lora.is_adapter(p) else x, params)


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def base_of(kind):
    return PARAMS if kind == "float32" else jax.jit(Quantization(kind))(PARAMS)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4", "nf4"])
def test_a_new_adapter_changes_nothing_and_dropping_one_gives_the_base_back(kind):
    """Tolerance of the first 2e-5: XLA fuses another program in another order."""
    base = base_of(kind)
    expected = logits(base)
    new = logits(lora.add(base, ALL, jax.random.key(3)))
    np.testing.assert_allclose(new, expected, rtol=0, atol=2e-5)
    trained = adapted(params=base)
    assert np.abs(logits(trained) - expected).max() > 0.1
    assert_same(lora.drop(trained), base)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_on_a_quantized_base_it_adds_what_it_adds_to_the_weights_it_stands_for(kind):
    """Tolerance 1e-4 of the logits, which are of order 1: the product is summed in another order."""
    base = base_of(kind)
    plain = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else leaf.dequantize(jnp.float32),
        base,
        is_leaf=lambda leaf: hasattr(leaf, "dequantize"),
    )
    np.testing.assert_allclose(
        logits(adapted(params=base)), logits(lora.merge(adapted(params=plain))), atol=1e-4
    )
    with pytest.raises(UserError, match="merge it into the unquantized model"):
        lora.merge(adapted(params=base))


def test_merged_equals_unmerged():
    """float32 within 1e-4; the merged weights against NumPy in float64 within 1e-6."""
    params = adapted()
    merged = lora.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(logits(merged), logits(params), atol=1e-4)
    q = params["layers_1"]["attention"]["q"]
    a, b = (np.asarray(x, np.float64) for x in (q["lora"].a, q["lora"].b))
    expected = np.asarray(q["kernel"], np.float64) + 6 / 4 * b @ a
    np.testing.assert_allclose(merged["layers_1"]["attention"]["q"]["kernel"], expected, atol=1e-6)


def test_merged_equals_unmerged_in_bfloat16():
    """Both within 2% of the logits in float32, root mean square: bfloat16 has 3 digits."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    params = adapted(params=base)
    merged = lora.merge(params)
    kernel = merged["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    exact = base["layers_0"]["mlp"]["up"]["kernel"].astype(jnp.float32)
    exact += params["layers_0"]["mlp"]["up"]["lora"].delta()
    np.testing.assert_array_equal(kernel, exact.astype(jnp.bfloat16))
    exact = logits(jax.tree.map(lambda x: x.astype(jnp.float32), params))
    for form in (params, merged):
        error = np.linalg.norm(logits(form) - exact) / np.linalg.norm(exact)
        assert error < 0.02


def test_what_is_drawn_depends_on_the_key_and_the_path_alone():
    def a(config, params=PARAMS, key=0):
        tree = lora.add(params, config, jax.random.key(key))
        return np.asarray(tree["layers_1"]["attention"]["q"]["lora"].a)

    alone = a(LoraConfig(rank=4, targets=("q",)))
    np.testing.assert_array_equal(a(ALL), alone)
    np.testing.assert_array_equal(a(ALL, base_of("int8")), alone)
    np.testing.assert_array_equal(a(ALL, lora.add(PARAMS, ALL, jax.random.key(5))), alone)
    assert not np.array_equal(a(ALL, key=1), alone)
    drawn = [
        leaf.tobytes()
        for leaf in map(
            np.asarray, jax.tree.leaves(lora.adapters(lora.add(PARAMS, ALL, jax.random.key(0))))
        )
        if leaf.any()
    ]
    assert len(set(drawn)) == len(drawn) == 2 * len(lora.TARGETS)


def test_stacked_layers_agree():
    """Tolerance 1e-5: the loop over layers is another program."""
    params = adapted()
    stacked = stack(params)
    assert stacked["layers"]["mlp"]["up"]["lora"].a.shape == (2, 4, 32)
    np.testing.assert_allclose(
        jax.jit(lambda p: Llama(CONFIG).apply({"params": p}, TOKENS)[0])(stacked),
        logits(params),
        atol=1e-5,
    )
    assert_same(unstack(stacked), params)
    assert_same(unstack(lora.adapters(stacked)), lora.adapters(params))
    assert_same(unstack(lora.merge(stacked)), lora.merge(params))
    new = lora.add(stack(PARAMS), ALL, jax.random.key(0))["layers"]["mlp"]["up"]["lora"]
    assert (new.a.shape, new.b.shape) == ((2, 4, 32), (2, 80, 4))


def test_only_adapters_have_a_gradient_and_split_trees_join_again():
    params = adapted(params=base_of("int8"))
    trained, frozen = lora.split(params)
    assert_same(lora.join(trained, frozen), params)
    count = 2 * 2 * len(lora.TARGETS)  # a and b of each target in two layers
    assert len(jax.tree.leaves(trained)) == count
    assert len(jax.tree.leaves(trained)) + len(jax.tree.leaves(frozen)) == len(
        jax.tree.leaves(params)
    )
    assert_same(lora.adapters(trained), lora.adapters(params))

    @jax.jit
    @jax.grad
    def gradient(trained):
        return jnp.square(forward(CONFIG, lora.join(trained, frozen), TOKENS)[0]).mean()

    gradients = gradient(trained)
    assert jax.tree.structure(gradients) == jax.tree.structure(trained)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_attached_adapters_take_the_place_of_others():
    params = adapted()
    tree = lora.adapters(params)
    assert set(tree) == {"layers_0", "layers_1"}
    assert_same(lora.attach(PARAMS, tree), params)
    assert_same(lora.attach(lora.add(PARAMS, ALL, jax.random.key(9)), tree), params)
    assert lora.adapters(PARAMS) == {}
    few = lora.attach(PARAMS, lora.adapters(adapted(LoraConfig(rank=2, targets=("v",)))))
    assert "lora" not in few["layers_0"]["attention"]["q"]


def test_dropout_drops_inputs_at_its_rate_and_keeps_their_mean():
    """Of 10^6 draws the share is within 5 standard deviations, 0.0023."""
    width = 1000
    ones = Lora(jnp.eye(width), jnp.eye(width), scale=2.0, dropout=0.3)
    x = jnp.ones((1000, width))
    y = np.asarray(ones.dot(x, jax.random.key(0)))
    assert set(np.unique(y)) == {0, np.float32(2 / 0.7)}
    assert abs(np.mean(y == 0) - 0.3) < 0.0023
    np.testing.assert_array_equal(ones.dot(x), 2 * x)  # without a key nothing is dropped
    np.testing.assert_array_equal(ones.replace(dropout=0.0).dot(x, jax.random.key(0)), 2 * x)


def test_dropout_in_the_model_needs_a_key_and_touches_adapters_alone():
    config = LoraConfig.of("all", rank=4, dropout=0.5)
    params = adapted(config)

    @jax.jit
    def run(params, key):
        return Llama(CONFIG).apply({"params": params}, TOKENS, rngs={"dropout": key})[0]

    one, same, other = (np.asarray(run(params, jax.random.key(n))) for n in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - logits(params)).max() > 0.1
    new = lora.add(PARAMS, config, jax.random.key(0))
    np.testing.assert_allclose(run(new, jax.random.key(0)), logits(PARAMS), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("rslora", [False, True])
def test_scale_shapes_and_draws_are_those_of_peft(rslora):
    peft = pytest.importorskip("peft")
    config = LoraConfig(rank=8, alpha=12.0, targets=("q", "down"), dropout=0.1, rslora=rslora)
    theirs = peft.get_peft_model(
        transformers_model(CONFIG, PARAMS),
        peft.LoraConfig(
            r=8,
            lora_alpha=12,
            lora_dropout=0.1,
            use_rslora=rslora,
            target_modules=["q_proj", "down_proj"],
        ),
    )
    layers = theirs.base_model.model.model.layers
    params = lora.add(PARAMS, config, jax.random.key(0))
    for ours, module in (
        (params["layers_0"]["attention"]["q"]["lora"], layers[0].self_attn.q_proj),
        (params["layers_1"]["mlp"]["down"]["lora"], layers[1].mlp.down_proj),
    ):
        assert ours.scale == module.scaling["default"]
        assert ours.dropout == module.lora_dropout["default"].p
        a = module.lora_A["default"].weight.detach().numpy()
        b = module.lora_B["default"].weight.detach().numpy()
        assert (ours.a.shape, ours.b.shape) == (a.shape, b.shape)
        assert not b.any()
        assert not np.asarray(ours.b).any()
        # Uniform to the same bound: with n draws, the largest misses it by 10/n once in 20,000
        # times, and the mean square of both is within 5 standard deviations of bound^2 / 3.
        bound = a.shape[1] ** -0.5
        for drawn in (np.asarray(ours.a), a):
            assert bound * (1 - 10 / drawn.size) < np.abs(drawn).max() <= bound
            spread = 5 * (4 / 45 / drawn.size) ** 0.5
            assert abs(np.mean((drawn / bound) ** 2) - 1 / 3) < spread
    assert config.scale == (12 / 8**0.5 if rslora else 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of an adapter is 0, expected at least 1"),
        ({"alpha": 0.0}, "alpha of an adapter is 0.0, expected more than 0"),
        ({"alpha": math.nan}, "alpha of an adapter is nan"),
        ({"alpha": math.inf}, "alpha of an adapter is inf"),
        ({"dropout": 1.0}, "dropout of an adapter is 1.0, expected 0 to below 1"),
        ({"dropout": -0.1}, "dropout of an adapter is -0.1"),
        ({"targets": ()}, "targets are none, expected some of q,k,v,o,gate,up,down"),
        ({"targets": ("q", "w1")}, "targets are q,w1"),
        ({"targets": ("q", "q")}, "targets are q,q"),
    ],
)
def test_values_that_make_no_adapter(options, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**options)


def test_targets_as_users_write_them():
    assert LoraConfig.of("q, v", rank=2) == LoraConfig(rank=2, targets=("q", "v"))
    assert LoraConfig.of("all").targets == lora.TARGETS
    with pytest.raises(UserError, match="targets are q,,v"):
        LoraConfig.of("q,,v")
    config = LoraConfig.of("k,up", alpha=3, rslora=True)
    assert LoraConfig(**config.to_json() | {"targets": ("k", "up")}) == config


def test_adapters_of_an_int8_leaf_are_of_its_shape():
    kernel = Int8.quantize(jnp.ones((6, 10)))
    made = lora.add({"q": {"kernel": kernel}}, LoraConfig(rank=3), jax.random.key(0))["q"]["lora"]
    assert (made.a.shape, made.b.shape) == ((3, 10), (6, 3))
