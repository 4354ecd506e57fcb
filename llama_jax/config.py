"""What distinguishes one Llama from another: shapes, constants, and every released text model.

`LlamaConfig` holds all that the model needs beside its weights. It is read from Meta's
`params.json` (`from_meta`), from Hugging Face's `config.json` (`from_hf`) and from this
project's own `config.json` (`from_dict`), each strictly: an unknown key is an error, because a
key passed over in silence is how RoPE scaling and norm epsilons get lost.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_jax.errors import UserError

VERSIONS = ("1", "2", "3", "3.1", "3.2", "3.3")
CONTEXT = {"1": 2048, "2": 4096, "3": 8192, "3.1": 131072, "3.2": 131072, "3.3": 131072}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low RoPE frequencies (`llama_jax.rope`).

    Wavelengths above `original_context / low_freq_factor` are divided by `factor`, those below
    `original_context / high_freq_factor` are kept, and those between are blended.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of one model. The letters are the axis key of `llama_jax.model`."""

    vocab_size: int  # V
    dim: int  # D
    n_layers: int  # L
    n_heads: int  # N
    n_kv_heads: int  # K
    head_dim: int  # H
    mlp_dim: int  # F
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    context: int  # most positions that the model was made for
    tie_embeddings: bool  # the head is the embedding
    version: str  # one of VERSIONS: decides chat format and stop ids

    def __post_init__(self):
        for name in (
            "vocab_size",
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "mlp_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}, expected a positive whole number")
        for name in ("norm_eps", "rope_theta", "context"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise UserError(f"{name} is {value!r}, expected a number more than 0")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim is {self.head_dim}, RoPE rotates pairs and needs an even one"
            )
        if self.version not in VERSIONS:
            raise UserError(f"version is {self.version!r}, expected one of {', '.join(VERSIONS)}")

    def count_parameters(self) -> int:
        """How many weights the model has; a tied head counts once."""
        attention = 2 * (self.n_heads + self.n_kv_heads) * self.head_dim * self.dim
        block = attention + 3 * self.mlp_dim * self.dim + 2 * self.dim
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.dim
        return tables + self.n_layers * block + self.dim

    def to_dict(self) -> dict[str, Any]:
        """This config as JSON types; `from_dict` is the exact inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """Raises `UserError` naming any missing or unknown key."""
        fields = dict(fields)
        _refuse_unknown(fields, {f.name for f in dataclasses.fields(cls)}, "config.json")
        scaling = fields.get("rope_scaling")
        try:
            return cls(**{**fields, "rope_scaling": scaling and RopeScaling(**scaling)})
        except TypeError as error:
            raise UserError(f"config.json: {error}") from None

    @classmethod
    def from_meta(
        cls,
        params: Mapping[str, Any],
        *,
        vocab_size: int,
        mlp_dim: int,
        dtype: str,
        tied: bool,
        rope_scale: float | None = None,
    ) -> "LlamaConfig":
        """Reads Meta's `params.json`, completed by what only the weights tell.

        Args:
          params: the parsed file; all may be nested under "model".
          vocab_size: rows of the embedding.
          mlp_dim: rows of `feed_forward.w1`.
          dtype: of the weights; Llama 1 was released in "float16", Llama 2 in "bfloat16".
          tied: whether `output.weight` equals `tok_embeddings.weight`.
          rope_scale: overrides the factor of the RoPE scaling. No released `params.json` holds
            it; without it 32 is taken for 3.2 1B and 3B (by their tied head or their shape) and 8
            for the others.

        Raises `UserError` for an unknown, missing or wrong key, and where file and weights
        contradict each other. 3.3 70B cannot be told from 3.1, and behaves the same.
        """
        where = "params.json"
        params = flatten_meta_params(params)
        dim = _integer(params, "dim", where)
        n_heads = _integer(params, "n_heads", where)
        if dim % n_heads:
            raise UserError(f"{where}: dim {dim} is not a multiple of n_heads {n_heads}")
        if params.get("vocab_size", -1) not in (-1, vocab_size):
            raise UserError(
                f"{where}: vocab_size is {params['vocab_size']}, but the embedding has {vocab_size}"
                " rows; the weights and params.json are of different models"
            )
        if (width := _meta_mlp_dim(params, dim)) != mlp_dim:
            raise UserError(
                f"{where} asks for a feed-forward width of {width}, but w1 has {mlp_dim} rows; "
                "the weights and params.json are of different models"
            )
        theta_key = "rope_freq_base" if "rope_freq_base" in params else "rope_theta"
        theta = _number(params, theta_key, where, 10000.0)
        scaled = _boolean(params, "use_scaled_rope", where, False)
        n_layers = _integer(params, "n_layers", where)
        small = _is_llama_3_2(dim, n_layers, tied)
        if scaled:
            version = "3.2" if small else "3.1"
        elif vocab_size >= _LLAMA_3_MERGES or theta == 500000.0:
            version = "3"
        else:
            version = "1" if dtype == "float16" else "2"
        if not scaled and (rope_scale is not None or "rope_scale_factor" in params):
            raise UserError(f"a RoPE scale was given, but {where} does not set use_scaled_rope")
        if rope_scale is not None and not 0 < rope_scale < math.inf:
            raise UserError(f"the RoPE scale is {rope_scale}, expected a positive number")
        factor = rope_scale or _number(params, "rope_scale_factor", where, 32.0 if small else 8.0)
        return cls(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=_integer(params, "n_kv_heads", where, n_heads),
            head_dim=dim // n_heads,
            mlp_dim=mlp_dim,
            norm_eps=_number(params, "norm_eps", where),
            rope_theta=theta,
            rope_scaling=RopeScaling(factor) if scaled else None,
            context=_integer(params, "max_seq_len", where, CONTEXT[version]),
            tie_embeddings=tied,
            version=version,
        )

    def to_meta(self) -> dict[str, Any]:
        """Meta's `params.json` for this model, such that `from_meta` gives the same back.

        `max_seq_len` and `rope_scale_factor` are written only where they differ from what the
        version implies, because Meta's own loader does not expect them.

        Raises `UserError` for what the format cannot say: a head dimension apart from
        dim / n_heads, or RoPE scaling with other constants than Meta's.
        """
        if self.head_dim * self.n_heads != self.dim:
            raise UserError(
                f"head_dim is {self.head_dim}, but Meta's format can only say dim / n_heads = "
                f"{self.dim}/{self.n_heads}; convert to Hugging Face's instead"
            )
        params: dict[str, Any] = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "vocab_size": self.vocab_size,
            **_meta_mlp_rule(self.dim, self.mlp_dim),
            "norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
        }
        if self.rope_scaling:
            if self.rope_scaling != RopeScaling(self.rope_scaling.factor):
                raise UserError(
                    f"Meta's format cannot say {self.rope_scaling}: it knows only low 1, high 4 "
                    "and an original context of 8192; convert to Hugging Face's instead"
                )
            params["use_scaled_rope"] = True
            small = _is_llama_3_2(self.dim, self.n_layers, self.tie_embeddings)
            if self.rope_scaling.factor != (32.0 if small else 8.0):
                params["rope_scale_factor"] = self.rope_scaling.factor
        if self.context != CONTEXT[self.version]:
            params["max_seq_len"] = self.context
        return params

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the `config.json` of a Hugging Face `LlamaForCausalLM`, of transformers 4 or 5.

        Raises `UserError` for another architecture, an unknown key, and every option that this
        model does not have (biases, other activations, other RoPE types, quantization).
        """
        where = "config.json"
        if config.get("model_type") != "llama":
            raise UserError(
                f"{where}: model_type is {config.get('model_type')!r}, expected 'llama'"
            )
        if config.get("architectures") not in (None, ["LlamaForCausalLM"]):
            raise UserError(
                f"{where}: architectures is {config['architectures']}, expected LlamaForCausalLM"
            )
        for key, only in _HF_ONLY.items():
            if config.get(key, only) != only:
                raise UserError(f"{where}: {key} is {config[key]!r}, only {only!r} is supported")
        if config.get("quantization_config"):
            raise UserError(
                f"{where}: quantization_config is set, expected unquantized weights; convert "
                "the original model"
            )
        _refuse_unknown(config, _HF_READ | _HF_HARMLESS | set(_HF_ONLY), where)
        dim = _integer(config, "hidden_size", where)
        n_heads = _integer(config, "num_attention_heads", where)
        if config.get("head_dim") is None and dim % n_heads:
            raise UserError(f"{where}: hidden_size {dim} is not a multiple of {n_heads} heads")
        vocab_size = _integer(config, "vocab_size", where)
        theta, scaling = _hf_rope(config, where)
        tied = _boolean(config, "tie_word_embeddings", where, False)
        context = _integer(config, "max_position_embeddings", where, 2048)
        dtype = config.get("dtype") or config.get("torch_dtype")
        if scaling:
            version = "3.2" if tied else "3.1"
        elif vocab_size >= _LLAMA_3_MERGES or theta == 500000.0:
            version = "3"
        else:
            version = "1" if context == CONTEXT["1"] and dtype == "float16" else "2"
        return cls(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=_integer(config, "num_hidden_layers", where),
            n_heads=n_heads,
            n_kv_heads=_integer(config, "num_key_value_heads", where, n_heads),
            head_dim=_integer(config, "head_dim", where, dim // n_heads),
            mlp_dim=_integer(config, "intermediate_size", where),
            norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            context=context,
            tie_embeddings=tied,
            version=version,
        )

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """Hugging Face's `config.json` for this model with weights of `dtype`.

        In the spelling of transformers 4, which 5 reads as well. `from_hf` gives the same back,
        except that it takes 3.3 for 3.1.
        """
        scaling = self.rope_scaling
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.dim,
            "intermediate_size": self.mlp_dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling
            and {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            },
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": dtype,
        }


def get_preset(name: str) -> LlamaConfig:
    """The config of a released model; raises `UserError` listing the names."""
    if name not in PRESETS:
        raise UserError(f"no preset is called {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def flatten_meta_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Meta's `params.json` without the "model" level that some files have.

    Raises `UserError` naming a key that this toolkit does not handle.
    """
    nested = params.get("model", {})
    if not isinstance(nested, Mapping):
        raise UserError(f"params.json: model is {nested!r}, expected an object")
    flat = {**{k: v for k, v in params.items() if k != "model"}, **nested}
    _refuse_unknown(flat, _META_READ, "params.json")
    return flat


def _is_llama_3_2(dim: int, n_layers: int, tied: bool) -> bool:
    """Given scaled RoPE, whether this is 3.2; by the shape too, as a fine-tune may untie it."""
    return tied or (dim, n_layers) in ((2048, 16), (3072, 28))


# --- Meta's feed-forward width ---

# Every (multiple_of, ffn_dim_multiplier) that Meta released.
_META_MLP_RULES = (
    (256, None), (4096, 1.3), (1024, 1.3), (4096, 1.2), (256, 1.5), (256, 1.0),
)  # fmt: skip


def _meta_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _meta_mlp_dim(params: Mapping[str, Any], dim: int) -> int:
    if "hidden_dim" in params:
        return _integer(params, "hidden_dim", "params.json")
    multiplier = params.get("ffn_dim_multiplier")
    if multiplier is not None:
        multiplier = _number(params, "ffn_dim_multiplier", "params.json")
    return _meta_width(dim, _integer(params, "multiple_of", "params.json"), multiplier)


def _meta_mlp_rule(dim: int, mlp_dim: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` that give `mlp_dim`: Meta's own where they do."""
    fitted = (mlp_dim, mlp_dim / int(2 * 4 * dim / 3))  # rounds up to one whole mlp_dim
    for multiple_of, multiplier in (*_META_MLP_RULES, fitted):
        if _meta_width(dim, multiple_of, multiplier) == mlp_dim:
            rule = {"multiple_of": multiple_of}
            return rule if multiplier is None else {**rule, "ffn_dim_multiplier": multiplier}
    raise AssertionError(f"no rule gives a feed-forward width of {mlp_dim} for dim {dim}")


# --- Hugging Face's RoPE, in the spellings of transformers 4 and 5 ---


def _hf_rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{where}: the RoPE parameters are {rope!r}, expected an object")
    theta = _number(rope, "rope_theta", where, _number(config, "rope_theta", where, 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        _refuse_unknown(rope, {"rope_type", "type", "rope_theta"}, f"{where}: rope_parameters")
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"{where}: RoPE type {kind!r} is not supported, only 'default' and 'llama3'"
        )
    _refuse_unknown(
        rope, {"rope_type", "type", "rope_theta", *_HF_LLAMA3}, f"{where}: rope_parameters"
    )
    scaling = RopeScaling(
        factor=_number(rope, "factor", where),
        low_freq_factor=_number(rope, "low_freq_factor", where),
        high_freq_factor=_number(rope, "high_freq_factor", where),
        original_context=_integer(rope, "original_max_position_embeddings", where),
    )
    return theta, scaling


# --- which keys are read, and the strict reading of one ---

_LLAMA_3_MERGES = 128000  # the tiktoken vocabulary without its special tokens

_META_READ = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "vocab_size", "rope_theta", "use_scaled_rope", "rope_scale_factor", "max_seq_len",
    "hidden_dim", "rope_freq_base",  # Llama Guard's spellings of the width and of rope_theta
}  # fmt: skip

_HF_READ = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "quantization_config",
}  # fmt: skip
_HF_LLAMA3 = {
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip
# Options of transformers' Llama that this model has in one setting only.
_HF_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
# Training, generation and bookkeeping: no effect on the logits.
_HF_HARMLESS = {
    "torch_dtype", "dtype", "transformers_version", "_name_or_path", "initializer_range",
    "use_cache", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    "max_sequence_length", "_attn_implementation_autoset",
}  # fmt: skip


_MAY_BE_NULL = {"head_dim", "num_key_value_heads", "n_kv_heads"}  # null: from the other shapes


def _refuse_unknown(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(fields) - known):
        raise UserError(
            f"{where}: unknown key {', '.join(unknown)}; expected only {', '.join(sorted(known))}"
        )


def _value(fields: Mapping[str, Any], key: str, where: str, default: Any) -> Any:
    value = fields.get(key)
    if value is None and key in fields and key not in _MAY_BE_NULL:
        raise UserError(f"{where}: {key} is null, expected a value")
    if value is None:
        value = default
    if value is None:
        raise UserError(f"{where}: {key} is missing")
    return value


def _integer(fields: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = _value(fields, key, where, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} is {value!r}, expected a positive whole number")
    return value


def _number(fields: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = _value(fields, key, where, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {key} is {value!r}, expected a number")
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{where}: {key} is {value!r}, expected a positive number")
    return float(value)


def _boolean(fields: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = _value(fields, key, where, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}, expected true or false")
    return value


# --- the released text models ---

_EIGHT, _THIRTY_TWO = RopeScaling(8.0), RopeScaling(32.0)


def _llama(version, dim, n_layers, n_heads, n_kv_heads, mlp_dim, eps, scaling=None, tied=False):
    llama_3 = version >= "3"
    return LlamaConfig(
        vocab_size=128256 if llama_3 else 32000,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        mlp_dim=mlp_dim,
        norm_eps=eps,
        rope_theta=500000.0 if llama_3 else 10000.0,
        rope_scaling=scaling,
        context=CONTEXT[version],
        tie_embeddings=tied,
        version=version,
    )


PRESETS: dict[str, LlamaConfig] = {
    # version, dim, n_layers, n_heads, n_kv_heads, mlp_dim, norm_eps, RoPE scaling, tied
    "llama-1-7b": _llama("1", 4096, 32, 32, 32, 11008, 1e-6),
    "llama-1-13b": _llama("1", 5120, 40, 40, 40, 13824, 1e-6),
    "llama-1-30b": _llama("1", 6656, 60, 52, 52, 17920, 1e-6),
    "llama-1-65b": _llama("1", 8192, 80, 64, 64, 22016, 1e-5),
    "llama-2-7b": _llama("2", 4096, 32, 32, 32, 11008, 1e-5),
    "llama-2-13b": _llama("2", 5120, 40, 40, 40, 13824, 1e-5),
    "llama-2-70b": _llama("2", 8192, 80, 64, 8, 28672, 1e-5),
    "llama-3-8b": _llama("3", 4096, 32, 32, 8, 14336, 1e-5),
    "llama-3-70b": _llama("3", 8192, 80, 64, 8, 28672, 1e-5),
    "llama-3.1-8b": _llama("3.1", 4096, 32, 32, 8, 14336, 1e-5, _EIGHT),
    "llama-3.1-70b": _llama("3.1", 8192, 80, 64, 8, 28672, 1e-5, _EIGHT),
    "llama-3.1-405b": _llama("3.1", 16384, 126, 128, 8, 53248, 1e-5, _EIGHT),
    "llama-3.2-1b": _llama("3.2", 2048, 16, 32, 8, 8192, 1e-5, _THIRTY_TWO, tied=True),
    "llama-3.2-3b": _llama("3.2", 3072, 28, 24, 8, 8192, 1e-5, _THIRTY_TWO, tied=True),
    "llama-3.3-70b": _llama("3.3", 8192, 80, 64, 8, 28672, 1e-5, _EIGHT),
}
