"""PEFT's adapter_config.json, and the refusal of settings that are not computed here.

Which modules of which layers have an adapter is read from the tensors (model/peft_format.py), not
from these settings.
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
    "loftq_config",  # read by init_lora_weights "loftq" alone, which is refused
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
EMPTY = (None, {}, [], "")  # values of a setting that is not used
SETTING_TYPES = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
}


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
    layers: Sequence[int] = ()  # the adapted layers, where `targets` are ends; empty: all
    stated: Mapping[str, Any] = field(default_factory=dict)  # the settings as they are in the file

    def rank(self, module: str, otherwise: int) -> int:
        """The rank of a module: that of the first pattern that matches, as in PEFT."""
        return _first_match(self.ranks, module, otherwise)

    def alpha(self, module: str, otherwise: float) -> float:
        """The alpha of a module: that of the first pattern that matches."""
        return _first_match(self.alphas, module, otherwise)

    def leaves_out(self, module: str) -> bool:
        """Whether these settings exclude a module of this layer that other layers adapt."""
        if self.targets is None:
            return False
        if not _is_named(module, self.targets) or _is_named(module, self.excluded):
            return True
        if isinstance(self.targets, str) or not self.layers:
            return False
        layer = int(module.split(".")[2])
        return layer not in self.layers


def _first_match(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _is_named(module: str, targets: str | Sequence[str]) -> bool:
    """Whether a regular expression, or one of a list of ends of names, matches a module."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in targets)


def read_peft_config(file: Path) -> tuple[dict[str, Any], Patterns]:
    """Read an adapter_config.json; ValueError naming a setting that is not supported.

    Returns r, lora_alpha, lora_dropout and use_rslora by name, and the settings of single modules.
    """
    raw = read_json(file)
    _check_plain_lora(file, raw)
    values = {"lora_dropout": 0.0, "use_rslora": False} | raw
    settings: dict[str, Any] = {}
    for key, kinds in SETTING_TYPES.items():
        value = values.get(key)
        if type(value) not in kinds:  # not isinstance: true would be an int
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{file}: {key} is {value!r}, expected {expected}")
        settings[key] = value
    for key in ("r", "lora_alpha"):
        if not 0 < settings[key] <= LARGEST:  # false for NaN
            raise ValueError(f"{file}: {key} is {settings[key]}, expected a positive number")
    dropout = settings["lora_dropout"]
    if not 0 <= dropout < 1:
        raise ValueError(f"{file}: lora_dropout is {dropout}, expected a share from 0 to below 1")
    stated = {key: raw[key] for key in sorted(PATTERNS) if raw.get(key) not in EMPTY}
    return settings, _patterns(file, stated)


def _check_plain_lora(file: Path, raw: dict[str, Any]) -> None:
    """ValueError for a setting that would change the result in a way that we do not compute."""

    def unsupported(key: str) -> ValueError:
        return ValueError(
            f"{file}: {key} = {raw.get(key)!r} is not supported; expected a plain LoRA adapter "
            "(no DoRA, biases or saved modules)"
        )

    if raw.get("peft_type") != "LORA":
        raise unsupported("peft_type")
    if raw.get("bias", "none") != "none":
        raise unsupported("bias")
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        raise unsupported("init_lora_weights")  # PiSSA and similar inits change the base weights
    known = HARMLESS | READ | PATTERNS
    for key, value in raw.items():
        if key not in known and not _is_off(value):
            raise unsupported(key)


def _is_off(value: Any) -> bool:
    """Whether a setting of this value is not used.

    0 is a value, though it equals False: of a setting that is not known it may change the result.
    """
    return value is False or value in EMPTY


def _patterns(file: Path, stated: dict[str, Any]) -> Patterns:
    """The settings of single modules in adapter_config.json, checked."""

    def unexpected(key: str, expected: str) -> ValueError:
        return ValueError(f"{file}: {key} is {stated[key]!r}, expected {expected}")

    expressions: list[str] = []  # regular expressions, to be checked
    for key, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        patterns = stated.get(key, {})
        if not isinstance(patterns, dict):
            raise unexpected(key, "an object of patterns and positive numbers")
        for value in patterns.values():
            if type(value) not in kinds or not 0 < value <= LARGEST:
                raise unexpected(key, "an object of patterns and positive numbers")
        expressions.extend(patterns)
    for key in ("target_modules", "exclude_modules"):
        modules = stated.get(key, [])
        if isinstance(modules, str):
            expressions.append(modules)
        elif not _is_list_of(str, modules):
            raise unexpected(key, "a regular expression or a list of names")
    layers = stated.get("layers_to_transform", [])
    if type(layers) is int:
        layers = [layers]
    if not _is_list_of(int, layers):
        raise unexpected("layers_to_transform", "a number or a list of numbers")
    for expression in expressions:
        try:
            re.compile(f"({expression})")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{file}: {expression!r} is not a regular expression: {error}"
            ) from None
    return Patterns(
        ranks=stated.get("rank_pattern", {}),
        alphas=stated.get("alpha_pattern", {}),
        targets=stated.get("target_modules"),
        excluded=stated.get("exclude_modules", ()),
        layers=layers,
        stated=stated,
    )


def _is_list_of(kind: type, value: Any) -> bool:
    """Whether a JSON value is a list whose items are all of type `kind`."""
    return isinstance(value, list) and all(type(item) is kind for item in value)
