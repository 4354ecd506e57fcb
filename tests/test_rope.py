"""Frequencies to the last bit, and what a rotation must satisfy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from llama_jax import rope
from llama_jax.config import PRESETS

BF16 = np.dtype(jnp.bfloat16)
# Sums of 32 to 64 float32 frequencies against six published decimals.
SUM_ATOL = 1e-6
# A handful of float32 roundings on values of order 1 to 10.
ROTATION_ATOL = 1e-5


def unscaled(config):
    """Frequencies before scaling, float64."""
    return config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)


@pytest.mark.parametrize(
    ("preset", "bands", "total"),
    [
        ("llama-3.1-8b", (29, 6, 29), 5.386058),  # head 128, factor 8
        ("llama-3.2-1b", (15, 3, 14), 2.968202),  # head 64, factor 32
        ("llama-3.2-3b", (29, 6, 29), 5.385182),  # head 128, factor 32
    ],
)
def test_kept_blended_and_scaled_bands(preset, bands, total):
    config = PRESETS[preset]
    f, plain = rope.frequencies(config), unscaled(config)
    assert f.dtype == np.float32
    assert f.shape == (config.head_dim // 2,)
    kept = np.isclose(f, plain, rtol=1e-6)
    scaled = np.isclose(f, plain / config.rope_scaling.factor, rtol=1e-6)
    assert (kept.sum(), (~kept & ~scaled).sum(), scaled.sum()) == bands
    assert (np.diff(f) < 0).all()
    assert kept[: bands[0]].all()
    assert scaled[-bands[2] :].all()
    assert f.astype(np.float64).sum() == pytest.approx(total, abs=SUM_ATOL)


@pytest.mark.parametrize("preset", PRESETS)
def test_frequencies_are_those_of_transformers_to_the_last_bit(preset):
    config = PRESETS[preset]
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_scaling is None:  # not in the table of every version: as in Meta's code
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        expected = 1.0 / (config.rope_theta**exponents)
    else:
        hf_config = transformers.LlamaConfig.from_dict(config.to_hf("bfloat16"))
        expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](hf_config, "cpu")
        assert attention_factor == 1.0
    assert (rope.frequencies(config) == expected.numpy()).all()


@pytest.mark.parametrize("preset", ["llama-2-7b", "llama-3.2-1b"])
def test_frequencies_are_right_without_an_oracle(preset):
    """In float64 by the formula of the paper and Meta's `apply_scaling`."""
    config = PRESETS[preset]
    expected = unscaled(config)
    if config.rope_scaling:
        wavelengths, factor = 2 * np.pi / expected, config.rope_scaling.factor
        t = (8192 / wavelengths - 1) / 3
        blended = (1 - t) * expected / factor + t * expected
        expected = np.select(
            [wavelengths < 2048, wavelengths > 8192], [expected, expected / factor], blended
        )
    np.testing.assert_allclose(rope.frequencies(config), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def config():
    return oracle.CONFIGS["llama 3.2"]


@functools.partial(jax.jit, static_argnums=0)
def turn(config, x_BTNH, positions_BT):
    return rope.rotate(x_BTNH, rope.rotations(config, positions_BT))


def test_rotation_is_an_isometry_and_position_0_is_the_identity(config):
    x = np.random.default_rng(0).normal(size=(1, 6, 3, config.head_dim)).astype(np.float32)
    turned = turn(config, x, jnp.asarray([[0, 1, 2, 100, 8192, 131071]]))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    assert (np.abs(turned - x)[:, 1:].max(axis=-1) > 0.1).all()
    half = config.head_dim // 2
    for vectors in (x, turned):
        norms = np.hypot(vectors[..., :half], vectors[..., half:])
        if vectors is x:
            expected = norms
    np.testing.assert_allclose(norms, expected, rtol=0, atol=ROTATION_ATOL)


def test_scores_depend_on_the_distance_of_positions_alone(config):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, config.head_dim)).astype(np.float32)

    def score(at_q, at_k):
        return float(
            jnp.vdot(turn(config, q, jnp.asarray([[at_q]])), turn(config, k, jnp.asarray([[at_k]])))
        )

    for distance in (0, 1, 7, 50):
        expected = score(distance, 0)
        for start in (1, 13, 64):
            # The angle at 114 is rounded to 4e-6, so a score of 64 products of order 1 to 1e-4.
            assert score(start + distance, start) == pytest.approx(expected, abs=1e-4)
    assert abs(score(7, 0) - score(0, 7)) > 0.1  # order matters
    assert abs(score(7, 0) - score(8, 0)) > 0.1


def test_rotation_turns_dimension_h_with_h_plus_half_counterclockwise(config):
    half = config.head_dim // 2
    x = np.zeros((1, 1, 1, config.head_dim), np.float32)
    x[..., 3] = 1
    turned = np.asarray(turn(config, x, jnp.asarray([[5]])))[0, 0, 0]
    angle = 5 * rope.frequencies(config)[3]
    assert turned[3] == pytest.approx(np.cos(angle), abs=1e-6)
    assert turned[3 + half] == pytest.approx(np.sin(angle), abs=1e-6)
    assert np.count_nonzero(turned) == 2


def test_angles_are_float32_for_bfloat16_heads(config):
    """bfloat16 has 8 bits: position 257 would be 256, and turn by one radian less."""
    cos, sin = rope.rotations(config, jnp.asarray([[257]]))
    assert cos.dtype == sin.dtype == jnp.float32
    assert float(cos[0, 0, 0, 0]) == pytest.approx(np.cos(257), abs=1e-6)
    assert float(sin[0, 0, 0, 0]) == pytest.approx(np.sin(257), abs=1e-6)
    ones = jnp.ones((1, 1, 1, config.head_dim), jnp.bfloat16)
    turned = turn(config, ones, jnp.asarray([[257]]))
    assert turned.dtype == BF16
    # Rounded once, at the end: half a unit in the last of bfloat16's 8 bits, on a value below 2.
    assert float(turned[0, 0, 0, 0]) == pytest.approx(np.cos(257) - np.sin(257), abs=2**-8)
