"""Adapters of every PEFT version since 0.6, unsloth and LLaMA-Factory: loaded, or refused by key.

A version is told here by the keys that it added to adapter_config.json (those of its LoraConfig at
huggingface/peft's tags v0.6.0 to v0.20.0; versions that are not listed added none), each with the
value that it writes where the setting is not used. peft 0.21.2 itself wrote tests/golden/peft.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from model.peft_format import load_lora

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "peft"

SINCE_0_6 = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 7,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 3,
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
}
# version -> the keys that it added, in order
ADDED = {
    "0.6": {},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.16": {"qalora_group_size": 16, "use_qalora": False},
    "0.17": {"target_parameters": None},
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.0",
    },
    "0.19": {"lora_ga_config": None, "peft_version": "0.19.1", "use_bdlora": None},
    "0.20": {"monteclora_config": None, "peft_version": "0.20.0", "velora_config": None},
    "0.21": {"kasa_config": None, "peft_version": "0.21.2"},
}
ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def settings_of(version: str) -> dict:
    """adapter_config.json as that version writes it for a plain LoRA of all linear layers."""
    settings = dict(SINCE_0_6)
    for name, added in ADDED.items():
        settings |= added
        if name == version:
            return settings | {"target_modules": ATTENTION_AND_MLP}
    raise AssertionError(version)


def adapter(path: Path, settings: dict) -> Path:
    """A copy of peft's adapter (r 3, alpha 7, all linear layers) with these settings instead."""
    shutil.copytree(GOLDEN, path)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("version", ADDED)
def test_an_adapter_of_this_version_is_loaded_whole(tmp_path, version):
    found = load_lora(adapter(tmp_path / "adapter", settings_of(version)))
    expected = load_lora(GOLDEN)
    assert torch.equal(found.params, expected.params) and found.slots == expected.slots
    assert found.config.scale == expected.config.scale == 7 / 3


def test_the_newest_version_here_is_the_one_that_wrote_the_golden_adapter():
    """A new peft writes new keys: they belong into ADDED, and the refusals into REFUSED."""
    golden = json.loads((GOLDEN / "adapter_config.json").read_text())
    newest = settings_of(list(ADDED)[-1])
    assert set(golden) == set(newest)
    assert golden["peft_version"] == newest["peft_version"]
    for key in set(golden) - {"base_model_name_or_path", "init_lora_weights", "target_modules"}:
        assert golden[key] == newest[key], key


# version -> settings that change what is computed, by the key that says so
REFUSED = {
    "0.6": [
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    "0.7": [{"init_lora_weights": "loftq"}, {"megatron_config": {"hidden_size": 64}}],
    "0.9": [{"use_dora": True}, {"init_lora_weights": "pissa"}],
    "0.10": [{"layer_replication": [[0, 1], [0, 2]]}],
    "0.14": [{"lora_bias": True}, {"init_lora_weights": "olora"}],
    "0.15": [{"trainable_token_indices": [5]}, {"init_lora_weights": "corda"}],
    "0.16": [{"use_qalora": True}],
    "0.17": [{"target_parameters": ["feed_forward.experts"]}],
    "0.18": [{"alora_invocation_tokens": [1, 2]}, {"arrow_config": {"top_k": 2}}],
    "0.19": [{"use_bdlora": {"nblocks": 2}}, {"init_lora_weights": "lora_ga"}],
    "0.20": [{"monteclora_config": {"mc_samples": 2}}],
    "0.21": [{"kasa_config": {"beta": 1e-4}}],
}
CASES = [(version, setting) for version, settings in REFUSED.items() for setting in settings]


@pytest.mark.parametrize(("version", "setting"), CASES)
def test_what_it_would_change_is_refused_by_its_key(tmp_path, version, setting):
    (key,) = setting
    path = adapter(tmp_path / "adapter", settings_of(version) | setting)
    with pytest.raises(ValueError, match=rf"adapter_config.json: {key} = "):
        load_lora(path)


# what tools write beside peft's own values
TOOLS = {
    "unsloth, 2024": (
        "0.10",
        {
            "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
            "lora_dropout": 0,
            "revision": "unsloth",
        },
    ),
    "unsloth, 2025": (
        "0.17",
        {
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
            "base_model_name_or_path": "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
            "lora_dropout": 0,
        },
    ),
    "LLaMA-Factory, all": (
        "0.10",
        {"base_model_name_or_path": "/models/Meta-Llama-3-8B", "lora_dropout": 0.0},
    ),
    "LLaMA-Factory, without vision": (
        "0.14",
        {"target_modules": r"^(?!.*patch_embed).*(?:q_proj|o_proj|k_proj|v_proj|_proj).*"},
    ),
    "LoftQ's settings beside another init": (
        "0.10",
        {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    ),
    "all-linear": ("0.9", {"target_modules": "all-linear"}),
    "alpaca-lora": ("0.6", {"enable_lora": None, "merge_weights": False}),
    "a fraction for alpha": ("0.21", {"lora_alpha": 7.0}),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_an_adapter_of_this_tool_is_loaded_whole(tmp_path, tool):
    version, changes = TOOLS[tool]
    found = load_lora(adapter(tmp_path / "adapter", settings_of(version) | changes))
    expected = load_lora(GOLDEN)
    assert torch.equal(found.params, expected.params)
    assert found.config.scale == expected.config.scale


def test_embeddings_that_unsloth_trained_are_refused_by_their_key(tmp_path):
    """Continued pretraining with embed_tokens and lm_head, which its notebooks propose."""
    settings = settings_of("0.17") | {
        "modules_to_save": ["lm_head", "embed_tokens"],
        "use_rslora": True,
    }
    with pytest.raises(ValueError, match="modules_to_save = .*expected a plain LoRA adapter"):
        load_lora(adapter(tmp_path / "adapter", settings))
