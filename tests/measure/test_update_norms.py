"""The norms of an adapter's update: equal to those of the dense products, module by module."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.measure.update_norms import update_norms
from model.llama import Llama
from model.peft_format import load_lora, save_lora
from tests.helpers.adapters import random_lora

PREFIX = "base_model.model."  # of PEFT's names


def dense_norms(base, adapter):
    """(||s B A||_F, ||W||_F) of every module, from the files and the whole matrices in fp64."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    found = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        b = tensors[name.replace("lora_A", "lora_B")]
        module = name.removeprefix(PREFIX).partition(".lora_A")[0]
        short = module.rpartition(".")[2]
        rank = (settings.get("rank_pattern") or {}).get(short, settings["r"])
        alpha = (settings.get("alpha_pattern") or {}).get(short, settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        update = scale * (b.double() @ a.double())  # (N, K)
        weight = weights[f"{module}.weight"].double()  # (N, K)
        found[module] = (update.norm().item(), weight.norm().item())
    return found


def check(base, adapter):
    """Every figure of `update_norms` against the dense products."""
    expected = dense_norms(base, adapter)
    model = Llama.from_pretrained(base)
    found = update_norms(model, load_lora(adapter))
    assert found["modules"].keys() == expected.keys()
    exactly = {"rel": 1e-12, "abs": 0}
    for module, (update, weight) in expected.items():
        of_module = found["modules"][module]
        assert of_module["norm"] == pytest.approx(update, **exactly), module
        assert of_module["weight_norm"] == pytest.approx(weight, **exactly), module
        assert of_module["relative"] == pytest.approx(update / weight, **exactly), module

    def together(part):
        chosen = [norms for module, norms in expected.items() if part in f"{module}."]
        return [math.hypot(*column) for column in zip(*chosen, strict=True)]

    parts = {part: found["kinds"][part] for part in found["kinds"]}
    parts |= {f".layers.{layer}.": norms for layer, norms in found["layers"].items()}
    parts[""] = found
    for part, norms in parts.items():
        update, weight = together(part)
        assert norms["norm"] == pytest.approx(update, **exactly), part
        assert norms["weight_norm"] == pytest.approx(weight, **exactly), part
    return found


@pytest.mark.parametrize(("modules", "rslora"), [("qv", False), ("all", False), ("all", True)])
def test_norms_equal_those_of_the_dense_products(tiny_llama_dir, tmp_path, modules, rslora):
    base = tiny_llama_dir()
    save_lora(random_lora(Llama.from_pretrained(base), modules, rslora), tmp_path / "a")
    found = check(base, tmp_path / "a")
    kinds = {"qv": 2, "all": 7}[modules]
    assert len(found["kinds"]) == kinds and len(found["modules"]) == 2 * kinds
    assert list(found["layers"]) == ["0", "1"]


def test_modules_with_ranks_and_alphas_of_their_own_have_their_own_scale(tiny_llama_dir, tmp_path):
    base, adapter = tiny_llama_dir(), tmp_path / "a"
    save_lora(random_lora(Llama.from_pretrained(base), "attention"), adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings |= {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"v_proj": 5, "o_proj": 40}}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj.lora_A" in name:
            tensors[name] = tensor[:3].contiguous()
        if "k_proj.lora_B" in name:
            tensors[name] = tensor[:, :3].contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    check(base, adapter)


def test_a_norm_is_linear_in_strength_and_zero_before_training(tiny_llama_dir):
    model = Llama.from_pretrained(tiny_llama_dir())
    lora = random_lora(model, "qv")
    whole = update_norms(model, lora)
    weaker = update_norms(model, lora.scaled(0.25))
    assert weaker["norm"] == pytest.approx(0.25 * whole["norm"], rel=1e-12) and whole["norm"] > 0
    assert weaker["weight_norm"] == whole["weight_norm"]
    lora.params.mul_(0)
    none = update_norms(model, lora)
    assert none["norm"] == none["relative"] == 0 and none["weight_norm"] == whole["weight_norm"]


def test_weights_in_bf16_are_summed_in_fp64(tiny_llama_dir):
    """A bf16 sum of 4,096 squares would be off by percents."""
    model = Llama.from_pretrained(tiny_llama_dir(), dtype=torch.bfloat16)
    lora = random_lora(model, "qv")
    found = update_norms(model, lora)
    q = model.weights["0.qkv"][:64].double()  # (64, 64), the rows of q_proj
    norm = found["modules"]["model.layers.0.self_attn.q_proj"]["weight_norm"]
    assert norm == pytest.approx(q.norm().item(), rel=1e-12)
