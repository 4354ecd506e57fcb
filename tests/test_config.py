"""Configs: every released model, both foreign formats and back, and what is refused."""

import dataclasses
import json
import re
from typing import Any

import pytest

from llama_jax.config import PRESETS, LlamaConfig, RopeScaling, get_preset
from llama_jax.errors import UserError

LLAMA_2_7B = {
    "dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05,
    "vocab_size": -1,
}  # fmt: skip
LLAMA_31_8B = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-05, "rope_theta": 500000.0,
    "use_scaled_rope": True,
}  # fmt: skip
LLAMA_32_1B = {
    "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
    "ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0,
    "use_scaled_rope": True,
}  # fmt: skip
HF_31_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def from_meta(params: dict[str, Any], **given: Any) -> LlamaConfig:
    weights = {"vocab_size": 32000, "mlp_dim": 11008, "dtype": "bfloat16", "tied": False}
    return LlamaConfig.from_meta(params, **{**weights, **given})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
    ],
)
def test_presets_have_the_released_number_of_parameters(name: str, parameters: int):
    assert get_preset(name).count_parameters() == parameters


def test_unknown_preset_lists_the_names():
    with pytest.raises(UserError, match=r"'llama-4'.*llama-1-7b.*llama-3\.3-70b"):
        get_preset("llama-4")


@pytest.mark.parametrize("name", PRESETS)
def test_every_format_gives_a_preset_back(name: str):
    config = PRESETS[name]
    indistinct = config
    if config.version == "3.3":  # behaves as 3.1 and cannot be told from it
        indistinct = dataclasses.replace(config, version="3.1")
    dtype = "float16" if config.version == "1" else "bfloat16"
    own, meta, hf = (
        json.loads(json.dumps(d)) for d in (config.to_dict(), config.to_meta(), config.to_hf(dtype))
    )
    assert LlamaConfig.from_dict(own) == config
    assert LlamaConfig.from_hf(hf) == indistinct
    assert indistinct == LlamaConfig.from_meta(
        meta,
        vocab_size=config.vocab_size,
        mlp_dim=config.mlp_dim,
        dtype=dtype,
        tied=config.tie_embeddings,
    )


# --- Meta ---


def test_meta_params_of_released_models():
    assert from_meta(LLAMA_2_7B) == PRESETS["llama-2-7b"]
    llama_1 = {**LLAMA_2_7B, "norm_eps": 1e-06}
    assert from_meta(llama_1, dtype="float16") == PRESETS["llama-1-7b"]
    llama_3 = {k: v for k, v in LLAMA_31_8B.items() if k != "use_scaled_rope"}
    rows = {"vocab_size": 128256, "mlp_dim": 14336}
    assert from_meta(llama_3, **rows) == PRESETS["llama-3-8b"]
    assert from_meta(LLAMA_31_8B, **rows) == PRESETS["llama-3.1-8b"]
    rows = {"vocab_size": 128256, "mlp_dim": 8192}
    assert from_meta(LLAMA_32_1B, **rows, tied=True) == PRESETS["llama-3.2-1b"]


def test_an_untied_fine_tune_of_1b_keeps_its_scaling():
    config = from_meta(LLAMA_32_1B, vocab_size=128256, mlp_dim=8192)
    assert (config.version, config.rope_scaling) == ("3.2", RopeScaling(32.0))


def test_meta_spellings():
    assert from_meta({"model": LLAMA_2_7B}) == from_meta(LLAMA_2_7B)
    guard = {
        k: v for k, v in LLAMA_31_8B.items()
        if k not in ("multiple_of", "ffn_dim_multiplier", "rope_theta")
    } | {"hidden_dim": 14336, "rope_freq_base": 500000.0}  # fmt: skip
    assert from_meta(guard, vocab_size=128256, mlp_dim=14336) == PRESETS["llama-3.1-8b"]
    assert from_meta({**LLAMA_2_7B, "max_seq_len": 512}).context == 512


def test_rope_scale_from_file_and_override():
    rows = {"vocab_size": 128256, "mlp_dim": 14336}
    in_file = {**LLAMA_31_8B, "rope_scale_factor": 16}
    assert from_meta(in_file, **rows).rope_scaling == RopeScaling(16.0)
    assert from_meta(in_file, **rows, rope_scale=4.0).rope_scaling == RopeScaling(4.0)
    with pytest.raises(UserError, match="does not set use_scaled_rope"):
        from_meta(LLAMA_2_7B, rope_scale=8.0)
    with pytest.raises(UserError, match="RoPE scale is -1"):
        from_meta(LLAMA_31_8B, **rows, rope_scale=-1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_args": {"group_size": 32}}, "unknown key quantization_args"),
        ({"lora_args": {"rank": 16}}, "unknown key lora_args"),
        ({"moe_args": {}}, "unknown key moe_args"),
        ({"model": 3}, "model is 3, expected an object"),
        ({"vocab_size": 32016}, "vocab_size is 32016, but the embedding has 32000 rows"),
        ({"multiple_of": 1000}, "feed-forward width of 11000, but w1 has 11008 rows"),
        ({"multiple_of": None}, "multiple_of is null"),
        ({"norm_eps": None}, "norm_eps is null"),
        ({"dim": "4096"}, "dim is '4096', expected a positive whole number"),
        ({"n_layers": 0}, "n_layers is 0, expected a positive whole number"),
        ({"n_heads": 33}, "dim 4096 is not a multiple of n_heads 33"),
        ({"n_kv_heads": 5}, "32 query heads cannot share 5 KV heads"),
        ({"norm_eps": float("nan")}, "norm_eps is nan, expected a positive number"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes', expected true or false"),
        ({"rope_scale_factor": 8}, "does not set use_scaled_rope"),
    ],
)
def test_meta_params_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        from_meta({**LLAMA_2_7B, **change})


@pytest.mark.parametrize("mlp_dim", [1, 100, 170, 171, 172, 173, 683, 8192, 99991])
@pytest.mark.parametrize("dim", [8, 64, 4096])
def test_any_width_can_be_said_in_metas_format(dim: int, mlp_dim: int):
    config = dataclasses.replace(
        PRESETS["llama-2-7b"], dim=dim, n_heads=4, n_kv_heads=4, head_dim=dim // 4, mlp_dim=mlp_dim
    )
    again = LlamaConfig.from_meta(
        config.to_meta(), vocab_size=32000, mlp_dim=mlp_dim, dtype="bfloat16", tied=False
    )
    assert again == config


def test_context_and_scale_that_are_not_the_versions_own_survive_metas_format():
    config = dataclasses.replace(
        PRESETS["llama-3.1-8b"], context=65536, rope_scaling=RopeScaling(16.0)
    )
    assert from_meta(config.to_meta(), vocab_size=128256, mlp_dim=14336) == config


def test_what_metas_format_cannot_say():
    config = PRESETS["llama-3.1-8b"]
    with pytest.raises(UserError, match="head_dim is 64"):
        dataclasses.replace(config, head_dim=64).to_meta()
    with pytest.raises(UserError, match="low_freq_factor=2"):
        dataclasses.replace(config, rope_scaling=RopeScaling(8.0, low_freq_factor=2.0)).to_meta()


# --- Hugging Face ---


def test_hf_config_in_both_spellings():
    assert LlamaConfig.from_hf(HF_31_8B) == PRESETS["llama-3.1-8b"]
    old = {k: v for k, v in HF_31_8B.items() if k not in ("rope_scaling", "rope_theta")}
    new = {**old, "rope_parameters": {**HF_31_8B["rope_scaling"], "rope_theta": 500000.0}}
    assert LlamaConfig.from_hf(new) == PRESETS["llama-3.1-8b"]
    rope_type = {**HF_31_8B["rope_scaling"], "type": "llama3"}
    del rope_type["rope_type"]
    assert LlamaConfig.from_hf({**HF_31_8B, "rope_scaling": rope_type}) == PRESETS["llama-3.1-8b"]
    plain = LlamaConfig.from_hf({**old, "rope_parameters": {"rope_type": "default"}})
    assert (plain.rope_theta, plain.rope_scaling) == (10000.0, None)


def test_hf_defaults_are_those_of_transformers():
    minimal = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "torch_dtype": "float16",
    }  # fmt: skip
    assert LlamaConfig.from_hf(minimal) == PRESETS["llama-1-7b"]
    assert LlamaConfig.from_hf({**minimal, "head_dim": 64}).head_dim == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"sliding_window": 4096}, "unknown key sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE type 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "RoPE type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (
            {"rope_parameters": {**HF_31_8B["rope_scaling"], "attention_factor": 1.0}},
            "unknown key attention_factor",
        ),
        ({"rope_scaling": [8.0]}, "expected an object"),
        ({"vocab_size": None}, "vocab_size is null"),
        ({"rms_norm_eps": None}, "rms_norm_eps is null"),
        ({"num_attention_heads": 33}, "not a multiple of 33 heads"),
    ],
)
def test_hf_config_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf({**HF_31_8B, **change})


# --- our own ---


def test_own_config_is_strict():
    fields = PRESETS["llama-3.1-8b"].to_dict()
    with pytest.raises(UserError, match="unknown key n_experts"):
        LlamaConfig.from_dict({**fields, "n_experts": 8})
    with pytest.raises(UserError, match="n_layers"):
        LlamaConfig.from_dict({k: v for k, v in fields.items() if k != "n_layers"})
    with pytest.raises(UserError, match="version is '4'"):
        LlamaConfig.from_dict({**fields, "version": "4"})
    with pytest.raises(UserError, match="head_dim is 7"):
        LlamaConfig.from_dict({**fields, "head_dim": 7})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": "x"}, "dim is 'x', expected a positive whole number"),
        ({"n_layers": 2.5}, "n_layers is 2.5, expected a positive whole number"),
        ({"rope_theta": "x"}, "rope_theta is 'x', expected a number more than 0"),
        ({"norm_eps": 0}, "norm_eps is 0, expected a number more than 0"),
    ],
)
def test_a_value_of_another_kind_is_told(fields, words):
    whole = PRESETS["llama-3.2-1b"].to_dict()
    with pytest.raises(UserError, match=re.escape(words)):
        LlamaConfig.from_dict(whole | fields)
