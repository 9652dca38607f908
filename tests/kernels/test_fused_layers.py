"""All layers for new tokens in one C call: bitwise equal to the calls one by one; used by the
sampler; profiled by a benchmark."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks import sampler_profile
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from kernels.cached import Cached
from kernels.cpu import native
from kernels.integers import cdiv
from kernels.registry import NATIVE, TORCH
from model.kv_cache import KVCache
from model.llama import Llama
from model.sampling_weights import for_sampling

REASON = native.why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")


def sampling_model(path) -> Llama:
    return for_sampling(Llama.from_pretrained(path, device="cpu", ops=NATIVE))[0]


def forward(
    model: Llama, new: list[int], contexts: list[int], at_once: bool, wanted: list[int] | None
) -> tuple:
    """Hidden states and the cache after rows with these contexts brought so many new tokens.

    at_once: in one C call for all layers, else layer by layer. wanted: as logits_indices.
    """
    page_size = 8
    generator = torch.Generator().manual_seed(0)
    need = [cdiv(c + n, page_size) for c, n in zip(contexts, new, strict=True)]
    pages = sum(need) + 2
    order = list(range(pages))
    random.Random(1).shuffle(order)
    tables = []
    for count in need:
        tables.append([order.pop() for _ in range(count)])
    cache = KVCache(model.config, pages, page_size, "cpu", torch.float32)
    cache.k.normal_(generator=generator)
    cache.v.normal_(generator=generator)
    tokens = torch.randint(model.config.vocab_size, (sum(new),), generator=generator)
    cached = Cached.build(new, contexts, tables, page_size, decode=True)
    indices = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
    fused_layers = model.fused_layers
    if not at_once:
        model.fused_layers = None
    hidden = model.forward(tokens, cached, cache=cache, logits_indices=indices)
    model.fused_layers = fused_layers
    return hidden, cache.k, cache.v


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("new", "contexts", "wanted"),
    [
        ([1], [0], None),
        ([1, 1, 1], [3, 40, 8], None),
        ([4, 1, 2, 7], [15, 0, 9, 30], None),
        ([1] * 30, [5] * 30, None),
        ([4, 1, 2, 7], [15, 0, 9, 30], [3, 4, 6, 13]),
        ([90, 33], [0, 8], [89]),
        ([90, 33], [0, 8], []),
        ([5, 2], [0, 8], [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_one_call_equals_the_calls_one_by_one(tiny_llama_dir, tied, new, contexts, wanted):
    path = tiny_llama_dir(layers=3, heads=4, kv_heads=2, hidden=48, tied=tied)
    model = sampling_model(path)
    assert model.fused_layers is not None
    at_once = forward(model, new, contexts, True, wanted)
    one_by_one = forward(model, new, contexts, False, wanted)
    assert len(at_once[0]) == (sum(new) if wanted is None else len(wanted))
    for a, b in zip(at_once, one_by_one, strict=True):
        assert torch.equal(a, b)


def test_the_workspace_leaks_nothing_into_the_next_forward(tiny_llama_dir):
    """It is kept: numbers that a forward of more tokens left there change nothing."""
    model = sampling_model(tiny_llama_dir(layers=2))
    before = forward(model, [3, 1], [4, 9], True, None)[0]
    size = len(model.fused_layers.workspace)
    forward(model, [50, 60], [0, 3], True, [109])
    assert len(model.fused_layers.workspace) > size
    model.fused_layers.workspace.fill_(float("nan"))
    assert torch.equal(forward(model, [3, 1], [4, 9], True, None)[0], before)


def test_arguments_that_do_not_fit_are_refused(tiny_llama_dir):
    model = sampling_model(tiny_llama_dir(layers=2))
    c = model.config
    cache = KVCache(c, 4, 8, "cpu", torch.float32)
    cached = Cached.build([1, 1], [3, 0], [[0], [1]], 8)
    h, cos_sin = torch.zeros(2, c.hidden_size), torch.zeros(16, c.head_dim)
    for k, tokens in ((cache.k[:1], h), (cache.k, h[:1])):
        with pytest.raises(AssertionError, match="2 layers"):
            model.fused_layers(tokens, cached, cos_sin, k, k, 1e-5)
    for wanted in ([1, 0], [0, 0], [2], [-1]):  # must increase, and be there
        with pytest.raises(AssertionError, match="of 2 tokens"):
            model.fused_layers(h, cached, cos_sin, cache.k, cache.v, 1e-5, torch.tensor(wanted))


def test_the_sampler_runs_all_layers_in_one_call(tiny_llama_dir):
    """Prompts and decoding do; texts are those of the calls one by one."""
    model = Llama.from_pretrained(tiny_llama_dir(layers=2), device="cpu", ops=NATIVE)
    requests = [Request(f"r{i}", [5, 6, 7 + i], 6) for i in range(5)]
    texts, calls = [], []
    for one_by_one in (False, True):
        config = SamplerConfig(rows=3, draft="off", page_size=8)
        with Sampler(model, str, (), config) as sampler:
            at_once = sampler.model.fused_layers
            sampler.model.fused_layers = None
            if not one_by_one:

                def counted(*args, run=at_once):
                    calls.append(len(args[0]))
                    return run(*args)

                sampler.model.fused_layers = counted
            texts.append({c.id: (c.ids, c.logprobs) for c in sampler.run(requests)})
            steps = sampler.stats.steps
    assert texts[0] == texts[1]
    assert calls.count(9) == 1 and len(calls) > steps, "three prompts of three tokens, then steps"


def test_plain_weights_run_layer_by_layer(tiny_llama_dir):
    path = tiny_llama_dir(layers=2)
    plain_native = Llama.from_pretrained(path, device="cpu", ops=NATIVE)
    plain = Llama.from_pretrained(path, device="cpu", ops=TORCH)
    assert plain_native.fused_layers is None
    assert for_sampling(plain)[0].fused_layers is None


def test_the_profile_has_a_time_for_every_operation_and_python(tiny_llama_dir):
    class Session:
        model = Llama.from_pretrained(tiny_llama_dir(layers=2), device="cpu", ops=NATIVE)

        class chat:
            class tokenizer:
                decode = staticmethod(str)

    requests = [Request(f"r{i}", [5, 6, 7 + i], 6) for i in range(3)]
    before = native.library().linear
    found = sampler_profile.profile(Session, requests, 2, [])
    assert native.library().linear is before, "the clocks are taken off again"
    assert {"linear", "head", "cached_attention", "rms_norm", "python"} <= found["decode"].keys()
    assert "layers" not in found["decode"] and 0 < found["share"]["python"] < 1
    for phase in ("prefill", "decode"):
        assert all(seconds > 0 for seconds in found[phase].values())
