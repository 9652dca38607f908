"""A checkpoint's config.json, and the refusal of everything that is not computed here."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels.spec import Widths
from model.families import Family, family_of
from model.file_checks import check_file, check_links

ORIGINAL_CONTEXT = "original_max_position_embeddings"
ROPE_TYPES = {  # the numbers that each kind of scaling needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_CONTEXT),
}
LARGEST_SIZE = 1 << 28  # of a number in config.json
LARGEST_LAYERS = 4096  # layers are looped over


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
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model, from its config.json, and what its family adds to a Llama."""

    vocab_size: int  # V
    hidden_size: int  # D, model width
    intermediate_size: int  # F, feed-forward width
    num_layers: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # G, key/value heads
    head_dim: int  # d, head size
    rms_norm_eps: float
    rope_theta: float  # base of the rotary frequencies
    # "rope_type" (a key of ROPE_TYPES) and the numbers that it needs
    rope_scaling: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    max_position: int = 2048  # tokens the model was made for; longer rows are refused
    tie_embeddings: bool = False  # lm_head is the embedding matrix
    quantised: str = ""  # the method that quantization_config names; the tensors tell if it is true
    # facts of the family (model/families.py); a Llama has none of them
    qkv_bias: bool = False  # q, k and v = W x + b
    qk_norm: bool = False  # each head of q and k is normalised before the rotation
    unrotated_layers: tuple[int, ...] = ()  # layers whose q and k are not rotated
    window: int = 0  # the sliding window, in tokens, that max_position was cut to; 0: it was not

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the q, k and v weights, in the order they are concatenated."""
        query_size = self.num_heads * self.head_dim  # H d
        kv_size = self.num_kv_heads * self.head_dim  # G d
        return query_size, kv_size, kv_size

    @property
    def widths(self) -> Widths:
        """The sizes that decide which kernels are compiled for the model."""
        return Widths(
            D=self.hidden_size,
            F=self.intermediate_size,
            H=self.num_heads,
            G=self.num_kv_heads,
            d=self.head_dim,
            V=self.vocab_size,
            qk_norm=self.qk_norm,
        )

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
        family = _check_architecture(file, raw)
        raw = family.assumed | raw
        heads = _integer(file, raw, "num_attention_heads")
        kv_heads = _integer(file, raw, "num_key_value_heads", default=heads)
        hidden = _integer(file, raw, "hidden_size")
        head_dim = _integer(file, raw, "head_dim", default=hidden // heads)
        if heads % kv_heads != 0 or head_dim % 2 != 0:
            raise ValueError(
                f"{file}: {heads} query heads over {kv_heads} key/value heads of size {head_dim}; "
                "expected whole groups of an even head size"
            )
        theta, scaling = _rope(file, raw, family.rope_theta)
        eps = raw.get("rms_norm_eps")
        if eps is None:
            eps = 1e-6
        longest = _integer(file, raw, "max_position_embeddings", default=2048)
        if scaling["rope_type"] == "linear":
            longest = _scaled_context(file, raw, longest, scaling["factor"])
        window = _window(file, raw, family)
        if window >= longest:
            window = 0  # no row is as long as that
        return cls(
            vocab_size=_integer(file, raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(file, raw, "intermediate_size"),
            num_layers=_integer(file, raw, "num_hidden_layers", largest=LARGEST_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive_number(file, "rms_norm_eps", eps),
            rope_theta=theta,
            rope_scaling=scaling,
            # rows within the window are those of a model without it; longer ones are refused
            max_position=window or longest,
            tie_embeddings=_boolean(file, raw, "tie_word_embeddings"),
            quantised=_quantisation(raw.get("quantization_config")),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            unrotated_layers=_unrotated_layers(file, raw, family),
            window=window,
        )


# ---- single values; `raw` is the object in config.json


def _is_positive(value: Any) -> bool:
    """Whether a JSON value is a finite number over zero (true is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value <= sys.float_info.max  # an integer of 400 digits exceeds every float


def _integer(
    file: Path,
    raw: dict[str, Any],
    key: str,
    default: int | None = None,  # where the key is absent or null; None: it must be there
    largest: int = LARGEST_SIZE,
) -> int:
    """A positive integer; ValueError where it is something else, or over `largest`."""
    value = raw.get(key)
    if value is None:
        value = default
    if not _is_positive(value) or not isinstance(value, int):
        raise ValueError(f"{file}: {key} is {value!r}, expected a positive integer")
    if value > largest:
        raise ValueError(f"{file}: {key} is {value}: no model is that large")
    return value


def _positive_number(file: Path, key: str, value: Any) -> float:
    """The value as a float; ValueError naming the key unless it is a positive number."""
    if not _is_positive(value):
        raise ValueError(f"{file}: {key} is {value!r}, expected a positive number")
    return float(value)


def _boolean(file: Path, raw: dict[str, Any], key: str) -> bool:
    """A value that is true or false; false where it is absent or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{file}: {key} is {value!r}, expected true or false")
    return bool(value)


def _quantisation(found: Any) -> str:
    """The method that a quantization_config names, "" where there is none."""
    if not found:
        return ""
    method = found.get("quant_method") if isinstance(found, dict) else found
    return str(method or "its method is not named")


# ---- the parts of config.json


def _scaled_context(file: Path, raw: dict[str, Any], longest: int, factor: float) -> int:
    """The context of a linearly scaled model, in tokens.

    Some config.json keep the length before scaling in max_position_embeddings (vicuna-v1.5-16k) and
    some the one after it (deepseek-coder), so the factor alone does not decide. A larger length
    that the checkpoint names elsewhere is taken, up to `longest` times the factor.
    """
    tokenizer = read_json(file.parent / "tokenizer_config.json", {})
    longest_named = 0
    for length in (raw.get("max_sequence_length"), tokenizer.get("model_max_length")):
        if _is_positive(length) and length <= LARGEST_SIZE:  # 1e30 stands for "no limit"
            longest_named = max(longest_named, int(length))
    longest_scaled = int(longest * factor)
    return max(longest, min(longest_named, longest_scaled))


def _check_architecture(file: Path, raw: dict[str, Any]) -> Family:
    """The family; ValueError for what the model would compute and we do not."""
    try:
        family = family_of(raw.get("model_type"), raw.get("architectures"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    for key in ("attention_bias", "mlp_bias"):
        # a family that always has q, k and v biases has no such key: transformers ignores it there
        is_read = not (key == "attention_bias" and family.qkv_bias)
        if is_read and _boolean(file, raw, key):
            raise ValueError(
                f"{file}: {key} is true; biases on o_proj and on the feed-forward are not "
                "supported (those on q_proj, k_proj and v_proj alone are: Qwen2)"
            )
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"{file}: hidden_act {activation!r}; only 'silu' is supported")
    return family


def _window(file: Path, raw: dict[str, Any], family: Family) -> int:
    """Tokens of the sliding window: a token attends to that many, itself included; 0: to all.

    It counts as every layer's where it is that of some (`max_window_layers`, `layer_types`): rows
    within the window do not depend on it.
    """
    if family.window == "ignored" or raw.get("sliding_window") is None:
        return 0
    window = _integer(file, raw, "sliding_window")
    if family.window == "always":
        return window
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"{file}: layer_types is {layer_types!r}, expected a list of names")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(f"{file}: attention of type {layer_type!r} is not supported")
    has_sliding_layers = "sliding_attention" in layer_types
    if not _boolean(file, raw, "use_sliding_window"):
        if has_sliding_layers:
            raise ValueError(
                f"{file}: layer_types has sliding_attention, but use_sliding_window is not true; "
                "correct the wrong one"
            )
        return 0
    if layer_types:
        return window if has_sliding_layers else 0
    layers = _integer(file, raw, "num_hidden_layers", largest=LARGEST_LAYERS)
    first_sliding_layer = raw.get("max_window_layers")
    # a family that skips rotations slides in those layers, and reads no such key
    is_read = isinstance(first_sliding_layer, int) and not family.skips_rotation
    if is_read and first_sliding_layer >= layers:
        return 0
    return window


def _unrotated_layers(file: Path, raw: dict[str, Any], family: Family) -> tuple[int, ...]:
    """The layers whose q and k are not rotated.

    An entry 1 of `no_rope_layers` means, whatever its name says, that its layer is rotated, and 0
    that it is not. Without the list it is every `no_rope_layer_interval`-th layer that is not.
    """
    if not family.skips_rotation:
        return ()
    layers = _integer(file, raw, "num_hidden_layers", largest=LARGEST_LAYERS)
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        interval = _integer(file, raw, "no_rope_layer_interval")
        return tuple(range(interval - 1, layers, interval))
    is_list = isinstance(rotated, list) and len(rotated) >= layers
    if not is_list or any(entry not in (0, 1) for entry in rotated):
        raise ValueError(
            f"{file}: no_rope_layers is {rotated!r}, expected a list of 1 (rotated) and 0 (not "
            f"rotated) for each of {layers} layers"
        )
    return tuple(i for i in range(layers) if rotated[i] == 0)


def _rope(file: Path, raw: dict[str, Any], default_theta: float) -> tuple[float, dict[str, Any]]:
    """theta and scaling, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old).

    Exporters write both spellings on purpose: where both are there, their meanings must be equal.
    """
    new = raw.get("rope_parameters") or {}
    old = raw.get("rope_scaling") or {}
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ValueError(f"{file}: {key} is {value!r}, expected an object or null")
    rotated = (old | new).get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise ValueError(
            f"{file}: partial_rotary_factor {rotated!r}; only heads rotated whole are supported"
        )
    theta = _rope_theta(file, raw, new, old) or default_theta
    meanings = [_scaling(file, raw, spelling) for spelling in (new, old) if spelling]
    if not meanings:
        return theta, {"rope_type": "default"}
    if meanings[0] != meanings[-1]:
        raise ValueError(
            f"{file}: rope_parameters {new} and rope_scaling {old} disagree; remove the wrong one"
        )
    return theta, meanings[0]


def _rope_theta(
    file: Path,
    raw: dict[str, Any],
    new: dict[str, Any],  # rope_parameters
    old: dict[str, Any],  # rope_scaling
) -> float:
    """The base of the rotary frequencies, 0 where none is stated; ValueError for two bases."""
    places = {
        "rope_parameters.rope_theta": new.get("rope_theta"),
        "rope_scaling.rope_theta": old.get("rope_theta"),
        "rope_theta": raw.get("rope_theta"),
    }
    stated = {key: value for key, value in places.items() if value is not None}
    thetas = [_positive_number(file, key, value) for key, value in stated.items()]
    if not thetas:
        return 0.0
    if any(theta != thetas[0] for theta in thetas):
        statements = ", ".join(f"{key} {value!r}" for key, value in stated.items())
        raise ValueError(f"{file} gives the rotation two bases: {statements}; remove the wrong one")
    return thetas[0]


def _scaling(file: Path, raw: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """The meaning of one spelling of the scaling: its kind and the numbers that the kind needs."""
    kinds = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ValueError(
            f"{file}: rope_type {kinds[0]!r} and type {kinds[1]!r} disagree; remove the wrong one"
        )
    kind = kinds[0] if kinds else "default"
    known = ", ".join(ROPE_TYPES)
    if kind not in tuple(ROPE_TYPES):  # a tuple, for the kind may be any JSON value
        raise ValueError(f"{file}: rope type {kind!r} is not supported; expected one of {known}")
    factor = scaling.get("factor")
    if not kinds and factor not in (None, 1):
        raise ValueError(f"{file}: a rope factor {factor!r} without a type; name one of {known}")
    needed = ROPE_TYPES[kind]
    values = {key: scaling.get(key) for key in needed}
    if ORIGINAL_CONTEXT in needed and raw.get(ORIGINAL_CONTEXT) is not None:
        # where both are given, transformers follows the outer one
        values[ORIGINAL_CONTEXT] = raw[ORIGINAL_CONTEXT]
    for key, value in values.items():
        if not _is_positive(value):
            raise ValueError(
                f"{file}: rope type {kind!r} needs {key}, a positive number; got {value!r}"
            )
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ValueError(
            f"{file}: low_freq_factor {values['low_freq_factor']} is not below high_freq_factor "
            f"{values['high_freq_factor']}"
        )
    return {"rope_type": kind, **values}
