"""A Llama checkpoint's config.json, and the refusal of everything that is not computed here."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels.spec import Widths
from model.file_checks import check_file, check_links

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
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


LARGEST = {"num_hidden_layers": 4096}  # layers are looped over; other sizes: at most 2^28


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
    quantised: str = ""  # the method that quantization_config names; the tensors tell if it is true

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the q, k and v weights, in the order they are concatenated."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @property
    def widths(self) -> Widths:
        """The sizes that decide which kernels are compiled for the model."""
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        return Widths(self.hidden_size, self.intermediate_size, *heads, self.vocab_size)

    @classmethod
    def from_dir(cls, path: str | Path) -> LlamaConfig:
        """Read and check `path`/config.json; ValueError names a setting that is not supported.

        `tie_embeddings` and `quantised` are as stated there; the tensors decide
        (model/hf_checkpoint.py).
        """
        file = Path(path) / "config.json"
        check_links(file.parent)
        if not file.exists():
            raise ValueError(
                f"{file} is missing; expected a Hugging Face model directory (config.json, "
                "*.safetensors, tokenizer.json or tokenizer.model)"
            )
        raw = read_json(file)
        _refuse(file, raw)

        def number(key: str, kind: type = int, default: Any = None) -> Any:
            value = raw.get(key)
            if value is None:
                value = default
            if not _positive(value) or not isinstance(value, (int, kind)):
                expected = "a positive integer" if kind is int else "a positive number"
                raise ValueError(f"{file}: {key} is {value!r}, expected {expected}")
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
                "expected whole groups of an even head size"
            )
        theta, scaling = _rope(file, raw)
        longest = number("max_position_embeddings", default=2048)
        if scaling["rope_type"] == "linear":
            longest = _stretched(file, raw, longest, scaling["factor"])
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
            max_position=longest,
            tie_embeddings=_switch(file, raw, "tie_word_embeddings"),
            quantised=_quantised(raw.get("quantization_config")),
        )


def _positive(value: Any) -> bool:
    """Whether a JSON value is a finite number over zero (true is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value <= sys.float_info.max  # an integer of 400 digits is no float


def _switch(file: Path, raw: dict[str, Any], key: str) -> bool:
    """A value that is true or false; absent or null, false."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{file}: {key} is {value!r}, expected true or false")
    return bool(value)


def _quantised(found: Any) -> str:
    """How a quantization_config names its method, "" where there is none."""
    if not found:
        return ""
    method = found.get("quant_method") if isinstance(found, dict) else found
    return str(method or "its method is not named")


def _stretched(file: Path, raw: dict[str, Any], longest: int, factor: float) -> int:
    """The context of a linearly scaled model, in tokens.

    Some config.json keep the length before scaling in max_position_embeddings (vicuna-v1.5-16k) and
    some the one after it (deepseek-coder), so the factor alone tells nothing. A larger length that
    the checkpoint names elsewhere is taken, up to the original one times the factor.
    """
    tokenizer = read_json(file.parent / "tokenizer_config.json", {})
    named = (raw.get("max_sequence_length"), tokenizer.get("model_max_length"))
    sane = [int(n) for n in named if _positive(n) and n <= 1 << 28]  # 1e30: without a limit
    return max(longest, min(max(sane, default=0), int(longest * factor)))


def _refuse(file: Path, raw: dict[str, Any]) -> None:
    """ValueError for a setting with which the model would compute something that we do not."""
    kind, architectures = raw.get("model_type"), raw.get("architectures") or ["LlamaForCausalLM"]
    listed = isinstance(architectures, list) and "LlamaForCausalLM" in architectures
    if kind != "llama" or not listed:
        raise ValueError(
            f"{file}: model_type {kind!r}, architectures {architectures}; only Llama "
            "(LlamaForCausalLM: Llama 2 and 3, TinyLlama, SmolLM2, ...) is supported"
        )
    for key in ("attention_bias", "mlp_bias"):
        if _switch(file, raw, key):
            raise ValueError(f"{file}: {key} is true; Llama models with biases are not supported")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"{file}: hidden_act {activation!r}; only 'silu' is supported")


def _rope(file: Path, raw: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """theta and scaling from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old).

    Exporters write both spellings on purpose; their meanings are compared, not their texts.
    """
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ValueError(f"{file}: {key} is {value!r}, expected an object or null")
    part = {**old, **new}.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(
            f"{file}: partial_rotary_factor {part!r}; only heads rotated whole are supported"
        )
    thetas = {
        "rope_parameters.rope_theta": new.get("rope_theta"),
        "rope_scaling.rope_theta": old.get("rope_theta"),
        "rope_theta": raw.get("rope_theta"),
    }
    thetas = {key: value for key, value in thetas.items() if value is not None}
    for key, value in thetas.items():
        if not _positive(value):
            raise ValueError(f"{file}: {key} is {value!r}, expected a positive number")
    if len(set(map(float, thetas.values()))) > 1:
        raise ValueError(
            f"{file} gives the rotation two bases: "
            + ", ".join(f"{key} {value!r}" for key, value in thetas.items())
            + "; remove the wrong one"
        )
    meanings = [_scaling(file, raw, spelled) for spelled in (new, old) if spelled]
    if len(meanings) == 2 and meanings[0] != meanings[1]:
        raise ValueError(
            f"{file}: rope_parameters {new} and rope_scaling {old} disagree; remove the wrong one"
        )
    theta = next(iter(thetas.values()), 10000.0)
    return float(theta), meanings[0] if meanings else {"rope_type": "default"}


def _scaling(file: Path, raw: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """The meaning of one spelling of the scaling: its kind and the numbers that the kind needs."""
    kinds = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ValueError(
            f"{file}: rope_type {kinds[0]!r} and type {kinds[1]!r} disagree; remove the wrong one"
        )
    kind = kinds[0] if kinds else "default"
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{file}: rope type {kind!r} is not supported; expected one of {', '.join(ROPE_TYPES)}"
        )
    if not kinds and scaling.get("factor") not in (None, 1):
        raise ValueError(
            f"{file}: a rope factor {scaling['factor']!r} without a type; name one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    needed = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}[kind]
    values = {key: scaling.get(key) for key in needed}
    original = "original_max_position_embeddings"
    if original in needed and raw.get(original) is not None:
        values[original] = raw[original]  # where both are given, transformers follows the outer one
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
    return {"rope_type": kind, **values}
