"""What a Llama checkpoint's config.json says, and the refusal of everything we do not compute."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROPE_TYPES = ("default", "linear", "llama3")
_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_json(path: Path) -> Any:
    """A JSON file; ValueError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; a Hugging Face model directory is wanted (config.json, "
            "*.safetensors, tokenizer.json or tokenizer.model)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama model; names as in the field, values from config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    max_position: int = 2048  # tokens the model was made for; longer rows are refused
    tie_embeddings: bool = False  # lm_head is the embedding matrix

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the q, k and v weights, in the order they are concatenated."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @classmethod
    def from_dir(cls, path: str | Path) -> LlamaConfig:
        """Read and check `path`/config.json; ValueError names what we do not compute."""
        file = Path(path) / "config.json"
        raw = read_json(file)
        if not isinstance(raw, dict):
            raise ValueError(f"{file} holds {type(raw).__name__}, an object was wanted")
        _refuse(file, raw)

        def number(key: str, kind: type = int, default: Any = None) -> Any:
            value = raw.get(key, default)
            if value is None:
                value = default
            good = isinstance(value, (int, kind)) and not isinstance(value, bool) and value > 0
            if not good:
                raise ValueError(f"{file}: {key} is {value!r}, a positive number was wanted")
            return kind(value)

        heads = number("num_attention_heads")
        kv_heads = number("num_key_value_heads", default=heads)
        hidden = number("hidden_size")
        head_dim = number("head_dim", default=hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"{file}: {heads} query heads over {kv_heads} key/value heads of size {head_dim}; "
                "whole groups of an even head size were wanted"
            )
        theta, scaling = _rope(file, raw)
        return cls(
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_layers=number("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=number("rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position=number("max_position_embeddings", default=2048),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )


def _refuse(file: Path, raw: dict[str, Any]) -> None:
    """Everything that would make this model compute something else than ours does."""
    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    if kind != "llama" or (architectures and "LlamaForCausalLM" not in architectures):
        raise ValueError(
            f"{file}: model_type {kind!r}, architectures {architectures}; only Llama "
            "(LlamaForCausalLM: Llama 2 and 3, TinyLlama, SmolLM2, ...) is supported"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{file}: the checkpoint is quantised ({method}); use the original in "
            "F32, F16 or BF16 safetensors"
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(f"{file}: {key} is true; Llama models with biases are not supported")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"{file}: hidden_act {activation!r}; only 'silu' is supported")


def _rope(file: Path, raw: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """theta and scaling from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    parameters = raw.get("rope_parameters") or {}
    scaling = dict(parameters or raw.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{file}: rope type {kind!r} is not supported; one of {', '.join(ROPE_TYPES)} was "
            "wanted"
        )
    wanted = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}[kind]
    for key in wanted:
        if not isinstance(scaling.get(key), (int, float)) or scaling[key] <= 0:
            raise ValueError(f"{file}: rope type {kind!r} needs {key}, got {scaling.get(key)!r}")
    if not isinstance(theta, (int, float)) or theta <= 0:
        raise ValueError(f"{file}: rope_theta is {theta!r}, a positive number was wanted")
    return float(theta), {"rope_type": kind, **{key: scaling[key] for key in wanted}}
