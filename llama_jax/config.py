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
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}, RoPE rotates pairs and needs an even one")
        if self.version not in VERSIONS:
            raise UserError(f"version is {self.version!r}, expected one of {', '.join(VERSIONS)}")

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
