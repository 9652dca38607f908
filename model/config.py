"""What a Llama checkpoint's config.json says, and the refusal of everything we do not compute."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels.spec import Widths
from model.files import check_file

ROPE_TYPES = ("default", "linear", "llama3")
_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; `default`, where one is given, when the file is absent.

    ValueError naming the file when it is missing, not JSON, or holds something else.
    """
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read") from None
    except FileNotFoundError:
        if default is not None:
            return default
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:  # no JSON, no UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, an object was wanted")
    return value


LARGEST = {"num_hidden_layers": 4096}  # of what is counted through; other sizes: 2^28


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

    @property
    def widths(self) -> Widths:
        """What decides which kernels are compiled for the model."""
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        return Widths(self.hidden_size, self.intermediate_size, *heads, self.vocab_size)

    @classmethod
    def from_dir(cls, path: str | Path) -> LlamaConfig:
        """Read and check `path`/config.json; ValueError names what we do not compute."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ValueError(
                f"{file} is missing; a Hugging Face model directory is wanted (config.json, "
                "*.safetensors, tokenizer.json or tokenizer.model)"
            )
        raw = read_json(file)
        _refuse(file, raw)

        def number(key: str, kind: type = int, default: Any = None) -> Any:
            value = raw.get(key)
            if value is None:
                value = default
            if not _positive(value) or not isinstance(value, (int, kind)):
                wanted = "a positive integer" if kind is int else "a positive number"
                raise ValueError(f"{file}: {key} is {value!r}, {wanted} was wanted")
            if kind is int and value > LARGEST.get(key, 1 << 28):
                raise ValueError(f"{file}: {key} is {value}: no model is that large")
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
        tied = raw.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise ValueError(f"{file}: tie_word_embeddings is {tied!r}, true or false was wanted")
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
            tie_embeddings=tied,
        )


def _positive(value: Any) -> bool:
    """Whether a JSON value is a number over zero (true is none, nor is Infinity)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _refuse(file: Path, raw: dict[str, Any]) -> None:
    """Everything that would make this model compute something else than ours does."""
    kind, architectures = raw.get("model_type"), raw.get("architectures") or ["LlamaForCausalLM"]
    listed = isinstance(architectures, list) and "LlamaForCausalLM" in architectures
    if kind != "llama" or not listed:
        raise ValueError(
            f"{file}: model_type {kind!r}, architectures {architectures}; only Llama "
            "(LlamaForCausalLM: Llama 2 and 3, TinyLlama, SmolLM2, ...) is supported"
        )
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
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
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ValueError(f"{file}: {key} is {value!r}, an object or null was wanted")
    if new and old and new != old:
        raise ValueError(
            f"{file}: rope_parameters {new} and rope_scaling {old} disagree; remove the wrong one"
        )
    scaling = new or old
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{file}: rope type {kind!r} is not supported; one of {', '.join(ROPE_TYPES)} was "
            "wanted"
        )
    part = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(
            f"{file}: partial_rotary_factor {part!r}; only heads rotated whole are supported"
        )
    theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
    if not _positive(theta):
        raise ValueError(f"{file}: rope_theta is {theta!r}, a positive number was wanted")
    wanted = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}[kind]
    # where both say how long the original context was, transformers follows the outer one
    outer = {key: raw[key] for key in wanted[3:] if raw.get(key) is not None}
    values = {key: {**scaling, **outer}.get(key) for key in wanted}
    for key, value in values.items():
        if not _positive(value):
            raise ValueError(
                f"{file}: rope type {kind!r} needs {key}, a positive number; got {value!r}"
            )
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ValueError(
            f"{file}: low_freq_factor {values['low_freq_factor']} is not below high_freq_factor "
            f"{values['high_freq_factor']}"
        )
    return float(theta), {"rope_type": kind, **values}
