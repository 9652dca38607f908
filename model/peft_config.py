"""PEFT's adapter_config.json, and the refusal of settings that are not computed here.

Which modules of which layers are adapted is read from the tensors (model/peft_format.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.config import read_json

LARGEST = 1e6  # of a rank or an alpha
# settings that do not change the result of a finished adapter
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
PATTERNS = {
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "rank_pattern",
    "target_modules",
}
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Patterns:
    """Settings of single modules.

    A module is named as in "model.layers.3.self_attn.q_proj"; a pattern of `ranks` and `alphas` is
    a regular expression for the end of a name, from a dot on.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)  # pattern -> rank
    alphas: Mapping[str, float] = field(default_factory=dict)  # pattern -> alpha
    targets: str | Sequence[str] | None = None  # a regular expression, or ends of names
    excluded: str | Sequence[str] = ()  # the same
    layers: Sequence[int] = ()  # of the targets, where these are ends; empty: all
    stated: Mapping[str, Any] = field(default_factory=dict)  # all these as the file has them

    def rank(self, module: str, otherwise: int) -> int:
        """The rank of a module: that of the first pattern that matches, as in PEFT."""
        return _first_match(self.ranks, module, otherwise)

    def alpha(self, module: str, otherwise: float) -> float:
        """The alpha of a module: that of the first pattern that matches."""
        return _first_match(self.alphas, module, otherwise)

    def leaves_out(self, module: str) -> bool:
        """Whether these settings leave a module out that is adapted in other layers."""
        if self.targets is None:
            return False
        if not _names(self.targets, module) or _names(self.excluded, module):
            return True
        layer = int(module.split(".")[2])
        return bool(self.layers) and not isinstance(self.targets, str) and layer not in self.layers


def _first_match(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _names(targets: str | Sequence[str], module: str) -> bool:
    """Whether a regular expression, or a list of ends, names a module."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in targets)


def read_peft_config(file: Path) -> tuple[dict[str, Any], Patterns]:
    """The values of r, lora_alpha, lora_dropout and use_rslora in an adapter_config.json, and its
    settings of single modules; ValueError naming a setting that is not supported."""
    raw = read_json(file)

    def refuse(key: str) -> ValueError:
        return ValueError(
            f"{file}: {key} = {raw.get(key)!r} is not supported; expected a plain LoRA adapter "
            "(no DoRA, biases or saved modules)"
        )

    if raw.get("peft_type") != "LORA":
        raise refuse("peft_type")
    if raw.get("bias", "none") != "none":
        raise refuse("bias")
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        raise refuse("init_lora_weights")  # PiSSA and similar inits change the base weights
    for key, value in raw.items():
        if key not in HARMLESS | READ | PATTERNS and value not in (None, False, {}, [], ""):
            raise refuse(key)
    kinds = {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float)}
    values = {"lora_dropout": 0.0, "use_rslora": False, **raw}
    for key, types in {**kinds, "use_rslora": (bool,)}.items():
        if type(values.get(key)) not in types:  # not isinstance: true would be an int
            names = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{file}: {key} is {values.get(key)!r}, expected {names}")
    for key in ("r", "lora_alpha"):
        if not 0 < values[key] <= LARGEST:  # NaN is not
            raise ValueError(f"{file}: {key} is {values[key]}, expected a positive number")
    if not 0 <= values["lora_dropout"] < 1:
        raise ValueError(
            f"{file}: lora_dropout is {values['lora_dropout']}, expected a share from 0 to below 1"
        )
    stated = {key: raw[key] for key in sorted(PATTERNS) if raw.get(key) not in (None, {}, [], "")}
    return {key: values[key] for key in (*kinds, "use_rslora")}, _patterns(file, stated)


def _patterns(file: Path, stated: dict[str, Any]) -> Patterns:
    """The settings of single modules in adapter_config.json, checked."""

    def unexpected(key: str, expected: str) -> ValueError:
        return ValueError(f"{file}: {key} is {stated[key]!r}, expected {expected}")

    expressions: list[str] = []
    for key, kinds in {"rank_pattern": (int,), "alpha_pattern": (int, float)}.items():
        patterns = stated.get(key, {})
        values = patterns.values() if isinstance(patterns, dict) else [None]
        if not all(type(value) in kinds and 0 < value <= LARGEST for value in values):
            raise unexpected(key, "an object of patterns and positive numbers")
        expressions += patterns
    for key in ("target_modules", "exclude_modules"):
        modules = stated.get(key, [])
        if isinstance(modules, str):
            expressions.append(modules)
        elif not _is_list_of(str, modules):
            raise unexpected(key, "a regular expression or a list of names")
    layers = stated.get("layers_to_transform", [])
    layers = [layers] if type(layers) is int else layers
    if not _is_list_of(int, layers):
        raise unexpected("layers_to_transform", "a number or a list of numbers")
    for expression in expressions:
        try:
            re.compile(f"({expression})")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{file}: {expression!r} is no regular expression: {error}") from None
    return Patterns(
        ranks=stated.get("rank_pattern", {}),
        alphas=stated.get("alpha_pattern", {}),
        targets=stated.get("target_modules"),
        excluded=stated.get("exclude_modules", ()),
        layers=layers,
        stated=stated,
    )


def _is_list_of(kind: type, value: Any) -> bool:
    """Whether a JSON value is a list of `kind` alone."""
    return isinstance(value, list) and all(type(item) is kind for item in value)
