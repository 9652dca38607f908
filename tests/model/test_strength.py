"""An adapter at another strength: at 0 the seed and at 1 the adapter, bit for bit, everywhere."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.sampling.requests import SamplerConfig
from engine.sampling.sampler import Sampler
from kernels.launch import triton_launch
from kernels.registry import TORCH, TRITON
from model.llama import Llama
from model.merge import merge
from model.peft_format import load_lora, save_lora
from model.sampling_weights import merged_weight
from tests.helpers import interpreter
from tests.helpers.adapters import TOKENS, distance, random_lora
from tests.helpers.sampling import random_requests, text

if triton_launch.INTERPRETED:
    interpreter.install()

ON_GPU = torch.cuda.is_available()
OPS = {"torch": TORCH, "triton": TRITON}


@pytest.fixture
def place(tiny_llama_dir):
    return tiny_llama_dir(tied=False)


@pytest.fixture
def tiny(place):
    return Llama.from_pretrained(place)


def answers(model, lora, invariant=False):
    """Sampled ids and log-probabilities of a few prompts."""
    config = SamplerConfig(rows=4, max_new_tokens=12, temperature=0.8, invariant=invariant)
    with Sampler(model, text, [2], config, lora) as sampler:
        found = {c.id: (c.ids, c.logprobs) for c in sampler.run(random_requests(model, 5))}
    assert any(ids for ids, _ in found.values())
    return found


@pytest.mark.parametrize("name", OPS)
def test_logits_at_0_are_the_seeds_and_at_1_the_adapters(tiny_llama_dir, name):
    place = tiny_llama_dir(layers=1, heads=2, kv_heads=1, vocab=300, intermediate=32)
    device = "cuda" if ON_GPU and name == "triton" else "cpu"
    model = Llama.from_pretrained(place, device=device, dtype=torch.float32, ops=OPS[name])
    lora = random_lora(model, "qv", rslora=True)
    tokens = TOKENS[:3]
    seed, tuned = model.logits(tokens), model.logits(tokens, lora)
    assert not torch.equal(seed, tuned)
    assert torch.equal(model.logits(tokens, lora.scaled(0)), seed)
    assert torch.equal(model.logits(tokens, lora.scaled(1)), tuned)
    half = model.logits(tokens, lora.scaled(0.5))
    assert not torch.equal(half, seed) and not torch.equal(half, tuned)


def test_between_0_and_1_it_is_that_share_of_the_update(place):
    """In fp64 against weights to which strength s B A was added by hand."""
    model = Llama.from_pretrained(place, dtype=torch.float64)
    lora = random_lora(model, "all")
    for strength in (0.25, 0.75, 1.5):
        by_hand = Llama.from_pretrained(place, dtype=torch.float64)
        for name, weight in model.weights.items():
            update = merged_weight(weight, lora, name) - weight
            by_hand.weights[name] = weight + strength * update
        apart = model.logits(TOKENS, lora.scaled(strength))
        assert distance(apart, by_hand.logits(TOKENS)) < 1e-9
        assert distance(apart, model.logits(TOKENS, lora)) > 1e-4


@pytest.mark.parametrize("invariant", [False, True])
def test_sampled_texts_at_0_are_the_seeds_and_at_1_the_adapters(tiny, invariant):
    """Through the packed weights of a CPU, into which the adapter is merged."""
    lora = random_lora(tiny, "all")
    lora.params.mul_(3)
    seed, tuned = answers(tiny, None, invariant), answers(tiny, lora, invariant)
    assert seed != tuned
    assert answers(tiny, lora.scaled(0.0), invariant) == seed
    assert answers(tiny, lora.scaled(1.0), invariant) == tuned
    assert answers(tiny, lora.scaled(0.5), invariant) not in (seed, tuned)


def test_merged_at_0_no_bit_of_the_weights_changes_and_at_1_they_are_as_without_a_scale(
    place, tiny, tmp_path
):
    """Negative zeros too, which a sum with a zero would turn into positive ones."""
    tensors = load_file(place / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][0, :3] = -0.0
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    save_lora(random_lora(tiny, "qv"), tmp_path / "adapter")
    lora = load_lora(tmp_path / "adapter")
    merge(place, lora, tmp_path / "plain")
    found = {}
    for strength in (0, 0.5, 1):
        out = tmp_path / f"at{strength}"
        merge(place, lora.scaled(strength), out, adapter="abc")
        found[strength] = load_file(out / "model.safetensors")
        noted = json.loads((out / "merge.json").read_text())
        assert noted == {"merged_from": str(place), "adapter": "abc", "scale": strength}
    seed = (place / "model.safetensors").read_bytes()
    assert (tmp_path / "at0" / "model.safetensors").read_bytes() == seed
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "at1" / "model.safetensors").read_bytes() == plain != seed
    halfway = (found[0][name].double() + found[1][name].double()) / 2
    assert distance(found[0.5][name], halfway) < 1e-7
    assert not torch.equal(found[0.5][name], found[1][name])


def test_scaled_adapters_share_their_numbers_and_multiply(tiny):
    lora = random_lora(tiny, "qv")
    half = lora.scaled(0.5)
    assert half.params is lora.params and half.compute is lora.compute
    assert (lora.strength, half.strength, half.scaled(0.5).strength) == (1, 0.5, 0.25)
    before = tiny.logits(TOKENS, half)
    lora.params.mul_(2)  # as a training step changes them
    assert torch.equal(tiny.logits(TOKENS, half), tiny.logits(TOKENS, lora.scaled(0.5)))
    assert not torch.equal(tiny.logits(TOKENS, half), before)
    unbound = load_lora_copy(lora).scaled(0.5)
    assert torch.equal(tiny.logits(TOKENS, unbound), tiny.logits(TOKENS, half))


def load_lora_copy(lora):
    """The same adapter without a model, as `load_lora` gives it."""
    other = type(lora)(lora.config, {name: slot.shape for name, slot in lora.slots.items()})
    other.params.copy_(lora.params)
    return other


@pytest.mark.parametrize("strength", [-0.5, float("nan"), float("inf"), 10.5])
def test_strengths_out_of_range_are_refused(tiny, strength):
    with pytest.raises(ValueError, match=r"scale \S+: expected a number from 0 .* to 10"):
        random_lora(tiny, "qv").scaled(strength)


def test_a_scaled_adapter_is_not_stored_as_if_it_were_trained_so(tiny, tmp_path):
    with pytest.raises(AssertionError, match="stored as it was trained"):
        save_lora(random_lora(tiny, "qv").scaled(0.5), tmp_path / "x")
    assert not (tmp_path / "x").exists()
