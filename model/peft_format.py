"""PEFT's adapter_config.json: what of it a plain LoRA of Llama's linear layers may say.

Which modules of which layers are adapted, the tensors tell (model/lora.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.config import read_json

LARGEST = 1e6  # of a rank or an alpha
# settings that do not change what a finished adapter computes
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "ensure_weight_tying", "runtime_config"),
    *("megatron_core", "eva_config", "lora_ga_config", "velora_config", "qalora_group_size"),
}
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
PATTERNS = {
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("target_modules", "exclude_modules"),
}
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Patterns:
    """What is said of single modules.

    A module is named as in "model.layers.3.self_attn.q_proj"; a pattern of `ranks` and `alphas` is
    a regular expression for the end of a name, from a dot on.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)  # pattern -> rank
    alphas: Mapping[str, float] = field(default_factory=dict)  # pattern -> alpha
    targets: str | Sequence[str] | None = None  # a regular expression, or ends of names
    excluded: str | Sequence[str] = ()  # likewise
    layers: Sequence[int] = ()  # of the targets, where these are ends; empty: all
    said: Mapping[str, Any] = field(default_factory=dict)  # all this as the file has it

    def rank(self, module: str, otherwise: int) -> int:
        """The rank of a module: the first pattern's that matches, as PEFT takes it."""
        return _first(self.ranks, module, otherwise)

    def alpha(self, module: str, otherwise: float) -> float:
        """The alpha of a module, likewise."""
        return _first(self.alphas, module, otherwise)

    def leaves_out(self, module: str) -> bool:
        """Whether a module may lack its tensors, though its like in other layers has them."""
        if self.targets is None:
            return False
        if not _names(self.targets, module) or _names(self.excluded, module):
            return True
        layer = int(module.split(".")[2])
        return bool(self.layers) and not isinstance(self.targets, str) and layer not in self.layers


def _first(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
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
    """The numbers r, lora_alpha, lora_dropout and use_rslora of an adapter_config.json, and what
    it says of single modules; ValueError naming what is not supported."""
    raw = read_json(file)

    def refuse(key: str) -> ValueError:
        return ValueError(
            f"{file}: {key} = {raw.get(key)!r} is not supported; a plain LoRA adapter is wanted "
            "(no DoRA, biases or saved modules)"
        )

    if raw.get("peft_type") != "LORA":
        raise refuse("peft_type")
    if raw.get("bias", "none") != "none":
        raise refuse("bias")
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        raise refuse("init_lora_weights")  # PiSSA and its kin change the base weights as well
    for key, value in raw.items():
        if key not in HARMLESS | READ | PATTERNS and value not in (None, False, {}, [], ""):
            raise refuse(key)
    kinds = {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float)}
    values = {"lora_dropout": 0.0, "use_rslora": False, **raw}
    for key, wanted in {**kinds, "use_rslora": (bool,)}.items():
        if type(values.get(key)) not in wanted:  # true is an int to isinstance
            names = " or ".join(kind.__name__ for kind in wanted)
            raise ValueError(f"{file}: {key} is {values.get(key)!r}, {names} was wanted")
    for key in ("r", "lora_alpha"):
        if not 0 < values[key] <= LARGEST:  # NaN is not
            raise ValueError(f"{file}: {key} is {values[key]}, a positive number was wanted")
    if not 0 <= values["lora_dropout"] < 1:
        raise ValueError(
            f"{file}: lora_dropout is {values['lora_dropout']}, a share from 0 to below 1 was "
            "wanted"
        )
    said = {key: raw[key] for key in sorted(PATTERNS) if raw.get(key) not in (None, {}, [], "")}
    return {key: values[key] for key in (*kinds, "use_rslora")}, _patterns(file, said)


def _patterns(file: Path, said: dict[str, Any]) -> Patterns:
    """What adapter_config.json says of single modules, checked."""

    def wanted(key: str, words: str) -> ValueError:
        return ValueError(f"{file}: {key} is {said[key]!r}, {words} was wanted")

    expressions: list[str] = []
    for key, kinds in {"rank_pattern": (int,), "alpha_pattern": (int, float)}.items():
        found = said.get(key, {})
        values = found.values() if isinstance(found, dict) else [None]
        if not all(type(value) in kinds and 0 < value <= LARGEST for value in values):
            raise wanted(key, "an object of patterns and positive numbers")
        expressions += found
    for key in ("target_modules", "exclude_modules"):
        found = said.get(key, [])
        if isinstance(found, str):
            expressions.append(found)
        elif not _all(found, str):
            raise wanted(key, "a regular expression or a list of names")
    layers = said.get("layers_to_transform", [])
    layers = [layers] if type(layers) is int else layers
    if not _all(layers, int):
        raise wanted("layers_to_transform", "a number or a list of numbers")
    for expression in expressions:
        try:
            re.compile(f"({expression})")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{file}: {expression!r} is no regular expression: {error}") from None
    return Patterns(
        ranks=said.get("rank_pattern", {}),
        alphas=said.get("alpha_pattern", {}),
        targets=said.get("target_modules"),
        excluded=said.get("exclude_modules", ()),
        layers=layers,
        said=said,
    )


def _all(found: Any, kind: type) -> bool:
    """Whether a JSON value is a list of `kind` alone."""
    return isinstance(found, list) and all(type(item) is kind for item in found)
