"""Norms of the q and k heads (Qwen3) and layers without rotation (SmolLM3) in every form of a step.

That they are what transformers computes is shown in test_families.py.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.encode import Example
from engine.data.pack import MicroBatch
from engine.train.memory_plan import StepSize, predict, saved_per_token
from engine.train.step import micro_step
from kernels.cached import Cached
from kernels.cpu import native
from kernels.launch import triton_launch
from kernels.packed import Packed
from kernels.registry import NATIVE, REFERENCE, SPECS, TORCH, TRITON, functions
from kernels.select_ops import with_fallback
from model.config import LlamaConfig
from model.kv_cache import KVCache
from model.layout import checkpoint_shapes, place_of, weight_shapes
from model.llama import Llama
from model.sampling_weights import for_sampling, restore_weights
from model.tape import POLICIES, Tape
from tests.helpers import interpreter
from tests.helpers.adapters import new_lora

if triton_launch.INTERPRETED:
    interpreter.install()

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
QWEN3 = {"model_type": "qwen3", "head_dim": 24, "hidden": 64, "heads": 4, "kv_heads": 2}
QWEN2 = {"model_type": "qwen2"}
SMOLLM3 = {"model_type": "smollm3", "layers": 3, "no_rope_layers": [1, 0, 1]}
FAMILIES = [pytest.param(QWEN3, id="qwen3"), pytest.param(SMOLLM3, id="smollm3")]


def ids(count, seed=0):
    return torch.randint(320, (count,), generator=torch.Generator().manual_seed(seed))


# ---- every form of a step


@pytest.mark.skipif(native.why_unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_in_one_c_call_equal_the_calls_one_by_one(tiny_llama_dir, family):
    """Bit for bit; torch's form and the definition to rounding. Prompts, then a decode step."""
    path = tiny_llama_dir(**family)
    results = {}
    for name, ops in {"reference": REFERENCE, "torch": TORCH, "native": NATIVE}.items():
        model, _ = for_sampling(Llama.from_pretrained(path, ops=ops))
        forms = {name: model.fused_layers}
        if name == "native":
            assert model.fused_layers is not None
            forms["one by one"] = None
        for form, fused_layers in forms.items():
            model.fused_layers = fused_layers
            cache = KVCache(model.config, 4, 16, "cpu", torch.float32)
            prompts = Cached.build([9, 1, 14], [0, 0, 0], [[3], [1], [2]], 16)
            hidden = model.forward(ids(24), prompts, cache=cache)
            step = Cached.build([1, 2, 1], [9, 1, 14], [[3], [1], [2]], 16)
            next_hidden = model.forward(ids(4, 1), step, cache=cache)
            results[form] = torch.cat((hidden, next_hidden))
    assert torch.equal(results["native"], results["one by one"])
    for name in ("torch", "native"):
        assert (results[name] - results["reference"]).abs().max() < 1e-5


def test_each_norm_acts_on_its_own_heads(tiny_llama_dir):
    """Another weight of q's or of k's norm gives other logits; so do their values swapped."""
    path = tiny_llama_dir(**QWEN3)
    model = Llama.from_pretrained(path, ops=REFERENCE)
    tokens = ids(12)
    seen = [model.logits(tokens)]
    original = model.weights["0.qk_norm"].clone()  # (2d,)
    d = model.config.head_dim
    stored = load_file(path / "model.safetensors")
    prefix = "model.layers.0.self_attn"
    assert torch.equal(original[:d], stored[f"{prefix}.q_norm.weight"])
    assert torch.equal(original[d:], stored[f"{prefix}.k_norm.weight"])
    for changed in (original.roll(d), original[:d].repeat(2), original[d:].repeat(2)):
        model.weights["0.qk_norm"].copy_(changed)
        seen.append(model.logits(tokens))
    for i, logits in enumerate(seen):
        for other in seen[:i]:
            assert (logits - other).abs().max() > 1e-3


def test_a_layer_without_rotation_knows_no_order(tiny_llama_dir):
    """Without any rotation the last token's logits do not depend on the order of those before."""
    tokens = ids(12)
    shuffled = torch.cat((tokens[:11].flip(0), tokens[11:]))
    differences = []
    for rotated in (0, 1):
        path = tiny_llama_dir(model_type="smollm3", layers=1, no_rope_layers=[rotated])
        model = Llama.from_pretrained(path, dtype=torch.float64)
        difference = model.logits(tokens)[-1] - model.logits(shuffled)[-1]
        differences.append(difference.abs().max().item())
    assert differences[0] < 1e-12 and differences[1] > 1e-2


@pytest.mark.parametrize("family", [QWEN3, QWEN2], ids=lambda family: family["model_type"])
def test_a_training_step_on_triton_equals_torchs(tiny_llama_dir, family):
    """Everything that can be is computed again in the backward. A bias is added in the products."""
    path = tiny_llama_dir(**family, intermediate=40)
    model = Llama.from_pretrained(path, device=DEVICE, dtype=torch.float32, ops=TORCH)
    lora = new_lora(model, rank=4, alpha=8, modules="all", seed=3)
    generator = torch.Generator().manual_seed(0)
    lora.params.add_(0.1 * torch.randn(lora.params.shape, generator=generator).to(DEVICE))
    rows = [Example("a", ids(9).tolist(), 4), Example("b", ids(5, 1).tolist(), 2)]
    batch = MicroBatch.build(rows, 1, model.device)
    found = []
    for ops in (TORCH, TRITON):
        lora.grads.zero_()
        with interpreter.poisoned():
            nll = micro_step(Llama(model.config, model.weights, ops), lora, batch, "full")
        found.append((nll.clone(), lora.grads.clone()))
    for torchs, tritons in zip(*found, strict=True):
        assert (torchs - tritons).abs().max() < 1e-4 * torchs.abs().max()


def test_the_tape_keeps_no_more_for_a_norm_of_heads(tiny_llama_dir):
    """q and k before their norm, in place of the rotated ones."""
    saved = []
    for family in ({"model_type": "llama"}, {"model_type": "qwen3"}):
        path = tiny_llama_dir(**{**QWEN3, **family})
        model = Llama.from_pretrained(path, ops=TORCH)
        lora = new_lora(model, rank=2, modules="all")
        tape = Tape("none")
        model.forward(ids(10), Packed.from_lengths([10]), lora=lora, tape=tape)
        layer = tape.layers[0]
        tensors = [getattr(layer, f.name) for f in dataclasses.fields(layer)]
        kept = [t for t in [*tensors, *layer.s.values()] if isinstance(t, torch.Tensor)]
        saved.append(sum(t.untyped_storage().nbytes() for t in kept))
        per_token = saved_per_token(model.config, "none", torch.float32, ranks=2 * 7)
        assert saved[-1] == 10 * per_token
    assert saved[0] == saved[1]


def test_the_memory_plan_counts_the_second_rotation(tiny_llama_dir):
    size = StepSize(tokens=1024, longest=256, response=1, dtype=torch.bfloat16)
    configs = [LlamaConfig.from_dir(tiny_llama_dir(**{**QWEN3, "model_type": "qwen3"}))]
    configs.append(dataclasses.replace(configs[0], qk_norm=False))
    lora = new_lora(Llama.from_pretrained(tiny_llama_dir()), rank=2).config
    for policy in POLICIES:
        normed = predict(configs[0], lora, policy, size, "cuda")
        plain = predict(configs[1], lora, policy, size, "cuda")
        assert normed.saved == plain.saved
        qkv = sum(configs[0].qkv_sizes)
        assert normed.work - plain.work in range(2 * 1024 * qkv + 1)


# ---- weights


def test_packing_and_restoring_leave_the_norms_as_they_are(tiny_llama_dir):
    model = Llama.from_pretrained(tiny_llama_dir(**QWEN3))
    before = {name: weight.clone() for name, weight in model.weights.items()}
    packed, _ = for_sampling(model, release=True)
    assert torch.equal(packed.weights["1.qk_norm"], before["1.qk_norm"])
    restore_weights(model)
    for name, weight in model.weights.items():
        assert torch.equal(weight, before[name]), name


def test_every_tensor_of_a_checkpoint_has_a_place_of_its_own(tiny_llama_dir):
    config = LlamaConfig.from_dir(tiny_llama_dir(**QWEN3, tied=False))
    ours = weight_shapes(config)
    rows = {name: [0] * shape[0] for name, shape in ours.items()}
    for name, shape in checkpoint_shapes(config).items():
        place = place_of(name, config)
        for row in range(place.first_row, place.first_row + shape[0]):
            rows[place.name][row] += 1
    assert all(count == 1 for counts in rows.values() for count in counts)


def test_missing_and_unexpected_norms_are_refused(tiny_llama_dir):
    path = tiny_llama_dir(**QWEN3)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.self_attn.k_norm.weight"]
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"first model.layers.1.self_attn.k_norm.weight \(24,\)"):
        Llama.from_pretrained(path)
    settings = json.loads((path / "config.json").read_text())
    settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"self_attn.\w_norm.weight .*does not have"):
        Llama.from_pretrained(path)


# ---- config.json


def config_of(tiny_llama_dir, **settings):
    return LlamaConfig.from_dir(tiny_llama_dir(**settings))


def test_no_rope_layers_of_smollm3_names_the_rotated_ones(tiny_llama_dir):
    """As transformers reads it: 1 is rotated; without the list every fourth layer is not."""

    def unrotated(layers, **settings):
        made = config_of(tiny_llama_dir, model_type="smollm3", layers=layers, **settings)
        return made.unrotated_layers

    assert unrotated(9) == (3, 7)
    assert unrotated(3) == ()
    assert unrotated(5, no_rope_layer_interval=2) == (1, 3)
    assert unrotated(3, no_rope_layers=[1, 0, 1], no_rope_layer_interval=1) == (1,)
    assert unrotated(3, no_rope_layers=[0, 1, 1, 0, 0]) == (0,), "more entries than layers"
    for wrong in ([1, 1], [1, 2, 1], "1", [1, None, 1]):
        with pytest.raises(
            ValueError, match=r"no_rope_layers is .*expected a list of 1 \(rotated\)"
        ):
            unrotated(3, no_rope_layers=wrong)
    with pytest.raises(ValueError, match="no_rope_layer_interval is 0"):
        unrotated(3, no_rope_layer_interval=0)
    llama = config_of(tiny_llama_dir, no_rope_layers=[0, 0])
    assert llama.unrotated_layers == (), "a Llama has no such key"


def test_absent_keys_are_what_transformers_assumes(tiny_llama_dir):
    smollm3 = config_of(tiny_llama_dir, model_type="smollm3", rope_theta=None)
    assert smollm3.rope_theta == 2e6
    other = config_of(tiny_llama_dir, rope_theta=None)
    assert other.rope_theta == 1e4
    new = {"rope_type": "default", "rope_theta": 5e6}
    stated = config_of(tiny_llama_dir, model_type="smollm3", rope_theta=None, rope_parameters=new)
    assert stated.rope_theta == 5e6
    path = tiny_llama_dir(model_type="qwen3")
    settings = json.loads((path / "config.json").read_text())
    del settings["head_dim"]
    (path / "config.json").write_text(json.dumps(settings))
    assert LlamaConfig.from_dir(path).head_dim == 128, "not the width over the heads"


def test_what_these_families_may_have_beside_is_refused(tiny_llama_dir):
    for family in ("qwen3", "smollm3"):
        with pytest.raises(ValueError, match="attention_bias is true"):
            config_of(tiny_llama_dir, model_type=family, attention_bias=True)
    window = {"use_sliding_window": True, "sliding_window": 100}
    assert config_of(tiny_llama_dir, model_type="smollm3", **window).window == 100
    ignored = config_of(tiny_llama_dir, model_type="smollm3", max_window_layers=2, **window)
    assert ignored.window == 100, "transformers reads no such key for it"
    qwen = config_of(tiny_llama_dir, model_type="qwen3", max_window_layers=1, **window)
    assert qwen.max_position == 100


# ---- the checks of --ops auto


def test_auto_checks_the_norm_of_heads_only_for_models_that_have_one(tiny_llama_dir, monkeypatch):
    checked = []

    def results_of(wanted, operations, say):
        checked.append(set(operations))
        return {}

    monkeypatch.setattr("kernels.select_ops.results_of", results_of)
    for family in ("llama", "qwen3"):
        widths = config_of(tiny_llama_dir, model_type=family).widths
        with_fallback(TRITON, TORCH, torch.device("cpu"), torch.float32, widths)
    different = {n for n, s in SPECS.items() if functions(TRITON, s) != functions(TORCH, s)}
    assert checked == [different - {"norm_rope"}, different]
