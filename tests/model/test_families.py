"""Every family of model/families.py computes what transformers computes for it.

`peers` tests ask transformers and peft; the others hold the family to autograd of the definitions.
A new family is an entry of FAMILIES and three models in MODELS here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from kernels.cached import Cached
from kernels.cpu import native
from kernels.integers import cdiv
from kernels.packed import Packed
from kernels.registry import NATIVE, REFERENCE, TORCH
from model.config import LlamaConfig
from model.families import FAMILIES, REFUSED
from model.kv_cache import KVCache
from model.llama import Llama
from model.merge import merge
from model.peft_format import load_lora, save_lora
from model.sampling_weights import for_sampling, restore_weights
from model.tape import POLICIES, Tape
from tests.helpers.adapters import new_lora
from tests.model.test_llama import TINY

ROOT = Path(__file__).resolve().parents[2]
# model_type -> three random models: arguments of tiny_llama_dir. Tied and untied embeddings,
# grouped and whole heads, a head size of its own, another epsilon and base, 16-bit weights.
MODELS = {
    "mistral": (
        {"sliding_window": None, "tied": False, "rope_theta": 1e6},
        {"sliding_window": 48, "heads": 6, "kv_heads": 3, "rms_norm_eps": 1e-2},
        {"sliding_window": None, "head_dim": 32, "hidden": 80, "tied": False, "layers": 3},
    ),
    "ministral": (
        {"sliding_window": None, "tied": False, "rope_theta": 1e6},
        {"sliding_window": 48, "heads": 6, "kv_heads": 3},
        {"sliding_window": 64, "head_dim": 32, "hidden": 80, "tied": False},
    ),
    "qwen2": (
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1, "tied": False},
        {"heads": 6, "kv_heads": 3, "rms_norm_eps": 1e-2, "rope_theta": 1e6, "layers": 3},
        {
            "use_sliding_window": True,
            "sliding_window": 64,
            "max_window_layers": 1,
            "kv_heads": 4,
            "dtype": torch.bfloat16,
        },
    ),
    "qwen3": (
        {"head_dim": 24, "hidden": 64, "tied": False, "rope_theta": 1e6},
        {"heads": 6, "kv_heads": 3, "rms_norm_eps": 1e-2, "layers": 3, "sliding_window": 8},
        {"head_dim": 32, "hidden": 80, "kv_heads": 1, "dtype": torch.bfloat16},
    ),
    "smollm3": (
        {"layers": 5, "rope_theta": 5e6, "tied": False, "pad_token_id": 256},
        {"layers": 3, "no_rope_layers": [0, 1, 0], "heads": 6, "kv_heads": 3, "pad_token_id": 256},
        {
            "layers": 4,
            "no_rope_layer_interval": 2,
            "rope_theta": None,
            "dtype": torch.bfloat16,
            "pad_token_id": 256,
        },
    ),
}
CASES = [(family, number) for family, models in MODELS.items() for number in range(len(models))]
LENGTH = 40  # tokens whose logits are compared
PROMPTS = (9, 1, 14)  # tokens
NEW = 16  # greedy tokens after each prompt


def write(tiny_llama_dir, family, number):
    return tiny_llama_dir(model_type=family, seed=number, **MODELS[family][number])


def ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(320, (count,), generator=generator).tolist()


def distance(a, b):
    return (a.double() - b.double()).abs().max().item()


def random_lora(model, modules="all"):
    """A bound adapter that changes every adapted output."""
    lora = new_lora(model, rank=3, alpha=5.0, modules=modules, seed=1)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(lora.params.shape, generator=generator)  # fp32, as files hold them
    lora.params.copy_(0.1 * values)
    model.bind(lora)
    return lora


def greedy(model, prompts, new):
    """`new` greedy tokens after each prompt, all rows at once over the paged cache."""
    model, _ = for_sampling(model)
    page_size = 16
    pages = [cdiv(len(prompt) + new, page_size) for prompt in prompts]
    cache = KVCache(model.config, sum(pages), page_size, model.device, model.dtype)
    tables = [cache.take(count) for count in pages]
    lengths = [len(prompt) for prompt in prompts]
    cached = Cached.build(lengths, [0] * len(prompts), tables, page_size)
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    chosen = []
    while True:
        hidden = model.forward(tokens, cached, cache=cache)
        tokens = model.head(hidden[cached.last]).argmax(-1)  # (rows,)
        chosen.append(tokens)
        if len(chosen) == new:
            return torch.stack(chosen, dim=1).tolist()
        cached = Cached.build([1] * len(prompts), lengths, tables, page_size)
        lengths = [length + 1 for length in lengths]


# ---- against transformers and peft themselves


@pytest.mark.peers
def test_logits_and_greedy_text_equal_transformers(tiny_llama_dir, run_peer, tmp_path):
    """fp32 within twice transformers' own error, fp64 to rounding; greedy tokens over the cache."""
    paths = {}
    logits_jobs = {}
    greedy_jobs = {}
    prompts = [ids(count, count) for count in PROMPTS]
    tokens = ids(LENGTH, 0)
    for family, number in CASES:
        name = f"{family} {number}"
        paths[name] = write(tiny_llama_dir, family, number)
        place = {"dir": str(paths[name])}
        logits_jobs[name] = {**place, "tokens": tokens, "keep": list(range(0, LENGTH, 3))}
        greedy_jobs[name] = {**place, "prompts": prompts, "new": NEW}
    jobs = {"logits": logits_jobs, "continue": greedy_jobs}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    texts = run_peer("logits_peer.py", tmp_path / "jobs.json", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")
    for name, path in paths.items():
        truth = theirs[f"{name}/fp64"]
        unit = distance(theirs[f"{name}/fp32"], truth)
        model = Llama.from_pretrained(path)
        error = distance(model.logits(torch.tensor(tokens))[::3], truth)
        exact = Llama.from_pretrained(path, dtype=torch.float64)
        error64 = distance(exact.logits(torch.tensor(tokens))[::3], truth)
        print(f"{name}: error {error:.3g}, transformers' {unit:.3g}, in fp64 {error64:.3g}")
        assert error <= 2 * unit, f"{name}: error {error:.3g}, transformers' own {unit:.3g}"
        assert error64 < 1e-12, f"{name}: fp64 differs by {error64:.3g}"
        assert greedy(model, prompts, NEW) == texts[name], f"{name}: other greedy tokens"


@pytest.mark.peers
def test_gradients_equal_pefts_and_adapters_of_peft_load(tiny_llama_dir, run_peer, tmp_path):
    """fp64 gradients of our adapter in peft to 1e-9; peft's adapter gives peft's logits here."""
    jobs = {"make": {}, "logits": {}, "gradients": {}}
    rows = [(ids(12, 1), 4), (ids(25, 2), 9)]
    tokens = ids(LENGTH, 0)
    paths = {}
    ours = {}
    for family, number in CASES:
        name = f"{family} {number}"
        path = paths[name] = write(tiny_llama_dir, family, number)
        model = Llama.from_pretrained(path, dtype=torch.float64)
        lora = random_lora(model)
        for row, prompt in rows:
            add_gradient(model, lora, row, prompt)
        ours[name] = lora.views(lora.grads)
        save_lora(lora, tmp_path / f"{name} ours", base=path)
        place = {"dir": str(path)}
        made = str(tmp_path / f"{name} theirs")
        settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
        settings["target_modules"] = ["q_proj", "k_proj", "v_proj", "up_proj"]
        jobs["make"][name] = {**place, "out": made, "config": settings}
        jobs["logits"][name] = {**place, "adapter": made, "tokens": tokens}
        adapter = str(tmp_path / f"{name} ours")
        gradients = {**place, "adapter": adapter, "rows": rows, "dtype": "float64"}
        jobs["gradients"][name] = gradients
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_peer("lora_peer.py", tmp_path / "jobs.json", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")
    for name, path in paths.items():
        prefix = f"{name}/grad/base_model.model."
        expected = {n.removeprefix(prefix): t for n, t in theirs.items() if n.startswith(prefix)}
        assert_same_gradients(ours[name], expected)
        model = Llama.from_pretrained(path)
        got = model.logits(torch.tensor(tokens), load_lora(tmp_path / f"{name} theirs"))
        truth = theirs[f"{name}/fp64"]
        unit = distance(theirs[f"{name}/fp32"], truth)
        assert distance(got, truth) <= 2 * unit, f"{name}: peft's adapter gives other logits"


def add_gradient(model, lora, row, prompt, policy="none"):
    """Add the gradient of the response's summed loss; returns that loss."""
    tokens = torch.tensor(row)
    tape = Tape(policy)
    hidden = model.forward(tokens, Packed.from_lengths([len(row)]), lora=lora, tape=tape)
    select = torch.arange(prompt - 1, len(row) - 1)
    nll, dselected = model.ops.linear_cross_entropy(
        hidden[select], model.weights["head"], tokens[prompt:]
    )
    model.backward(torch.zeros_like(hidden).index_copy_(0, select, dselected), tape)
    return nll.sum()


def assert_same_gradients(ours, expected):
    assert ours.keys() == expected.keys()
    for tensor, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 0, f"{tensor} has no gradient: the test would prove nothing"
        assert distance(ours[tensor], gradient) < 1e-9 * largest, tensor


# ---- without them


@pytest.mark.parametrize(("family", "number"), CASES)
def test_gradients_equal_autograd_under_every_policy(tiny_llama_dir, family, number):
    path = write(tiny_llama_dir, family, number)
    model = Llama.from_pretrained(path, dtype=torch.float64, ops=TORCH)
    lora = random_lora(model)
    row = ids(17, 3)
    reference = Llama(model.config, model.weights, REFERENCE)
    lora.params.requires_grad_()
    lora.compute = lora.params
    lora.make_groups(model.config)
    logits = reference.logits(torch.tensor(row), lora)  # (T, V)
    targets = torch.tensor(row[5:])
    loss = torch.nn.functional.cross_entropy(logits[4:-1], targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, lora.params)
    lora.params.requires_grad_(False)
    lora.make_groups(model.config)
    for policy in POLICIES:
        lora.grads.zero_()
        ours = add_gradient(model, lora, row, 5, policy)
        assert abs(ours - loss.detach()) < 1e-9 * loss.detach()
        assert_same_gradients(lora.views(lora.grads), lora.views(gradient))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("ops", [TORCH, NATIVE], ids=["torch", "native"])
def test_texts_do_not_depend_on_the_batch_or_on_drafts(tiny_llama_dir, family, ops):
    """Tokens and log-probabilities, bit for bit; with an adapter merged into packed weights too."""
    if ops is NATIVE and native.why_unavailable() is not None:
        pytest.skip(native.why_unavailable())
    model = Llama.from_pretrained(write(tiny_llama_dir, family, 1), ops=ops)
    requests = [Request(f"r{i}", ids(5 + i, i) * 3, 12) for i in range(5)]
    for lora in (None, random_lora(model, "qv")):
        texts = []
        for rows, draft in ((1, "off"), (5, "off"), (3, "auto")):
            config = SamplerConfig(rows=rows, draft=draft, page_size=8)
            with Sampler(model, str, (), config, lora=lora) as sampler:
                texts.append({c.id: (c.ids, c.logprobs) for c in sampler.run(requests)})
        assert texts[0] == texts[1] == texts[2]


@pytest.mark.skipif(native.why_unavailable() is not None, reason="no native kernels")
def test_the_bias_takes_part_in_every_form_of_a_decode_step(tiny_llama_dir):
    """All layers in one C call equal the calls one by one, bit for bit, and the definition."""
    path = write(tiny_llama_dir, "qwen2", 1)
    prompts = [ids(count, count) for count in PROMPTS]
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    results = {}
    for name, ops in {"reference": REFERENCE, "torch": TORCH, "native": NATIVE}.items():
        model = Llama.from_pretrained(path, ops=ops)
        model, _ = for_sampling(model)
        forms = [name]
        if name == "native":
            assert model.fused_layers is not None
            forms.append("one by one")
        for form in forms:
            if form == "one by one":
                model.fused_layers = None
            cache = KVCache(model.config, 4, 16, "cpu", torch.float32)
            cached = Cached.build(list(PROMPTS), [0, 0, 0], [[3], [1], [2]], 16)
            results[form] = model.forward(tokens, cached, cache=cache)
    assert torch.equal(results["native"], results["one by one"])
    for name in ("torch", "native"):
        assert distance(results[name], results["reference"]) < 1e-5
    without = Llama.from_pretrained(path, ops=REFERENCE)
    for layer in range(without.config.num_layers):
        without.weights[f"{layer}.qkv_bias"].zero_()
    cache = KVCache(without.config, 4, 16, "cpu", torch.float32)
    hidden = without.forward(tokens, cached, cache=cache)
    assert distance(hidden, results["reference"]) > 0.1, "the bias did nothing"


def test_packing_and_restoring_leave_a_bias_as_it_is(tiny_llama_dir):
    model = Llama.from_pretrained(write(tiny_llama_dir, "qwen2", 0))
    before = {name: weight.clone() for name, weight in model.weights.items()}
    for_sampling(model, release=True)
    restore_weights(model)
    assert before.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("family", MODELS)
def test_merged_and_saved_adapters_give_the_same_logits(tiny_llama_dir, tmp_path, family):
    path = write(tiny_llama_dir, family, 0)
    model = Llama.from_pretrained(path, dtype=torch.float64)
    lora = random_lora(model)
    save_lora(lora, tmp_path / "adapter", base=path)
    merge(path, load_lora(tmp_path / "adapter"), tmp_path / "merged")
    tokens = torch.tensor(ids(LENGTH, 0))
    merged = Llama.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    wanted = model.logits(tokens, lora)
    assert distance(model.logits(tokens), wanted) > 0.1
    assert distance(merged.logits(tokens), wanted) < 1e-5, "rounded once to fp32"
    seed = load_file(path / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name in seed:
        assert name in after
        if name.endswith(".bias"):
            assert torch.equal(seed[name], after[name])


# ---- what is read, and what is refused


def edit(path, **changes):
    """Rewrite config.json; a change to `...` removes the key."""
    file = path / "config.json"
    settings = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in settings.items() if value is not ...}
    file.write_text(json.dumps(kept))
    return LlamaConfig.from_dir(path)


def test_a_row_longer_than_the_window_is_refused(tiny_llama_dir, capsys):
    path = tiny_llama_dir(model_type="mistral", sliding_window=32)
    model = Llama.from_pretrained(path)
    assert (model.config.max_position, model.config.window) == (32, 32)
    assert "a sliding window of 32 tokens: rows up to that length" in capsys.readouterr().out
    model.logits(torch.tensor(ids(32, 0)))
    with pytest.raises(ValueError, match="at most 32"):
        model.logits(torch.tensor(ids(33, 0)))


def test_a_window_counts_where_a_layer_slides(tiny_llama_dir):
    """Absent keys have the values that transformers gives them."""
    mistral = tiny_llama_dir(model_type="mistral", max_position_embeddings=8192)
    assert edit(mistral).max_position == 4096, "transformers' own default"
    assert edit(mistral, sliding_window=None).max_position == 8192
    assert edit(mistral, sliding_window=8192).window == 0
    qwen = tiny_llama_dir(model_type="qwen2", sliding_window=100, max_window_layers=1)
    assert edit(qwen, use_sliding_window=False).max_position == 512
    assert edit(qwen, use_sliding_window=True).max_position == 100
    for first in (2, 28):
        assert edit(qwen, max_window_layers=first).max_position == 512, "no layer is left to slide"
    assert edit(qwen, max_window_layers=0).max_position == 100
    types = ["full_attention", "sliding_attention"]
    assert edit(qwen, layer_types=types).max_position == 100
    assert edit(qwen, layer_types=["full_attention"] * 2).max_position == 512
    with pytest.raises(ValueError, match="use_sliding_window is not true"):
        edit(qwen, layer_types=types, use_sliding_window=False)
    with pytest.raises(ValueError, match="attention of type 'chunked_attention'"):
        edit(qwen, layer_types=["chunked_attention"] * 2)
    llama = tiny_llama_dir(sliding_window=100)
    assert LlamaConfig.from_dir(llama).max_position == 512, "a Llama has no such key"


def test_absent_heads_are_what_transformers_assumes(tiny_llama_dir):
    path = tiny_llama_dir(model_type="mistral", heads=16, kv_heads=8)
    assert edit(path, num_key_value_heads=...).num_kv_heads == 8
    assert edit(path, num_key_value_heads=None).num_kv_heads == 16


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_families_are_refused_with_the_reason(tiny_llama_dir, model_type):
    assert model_type not in FAMILIES
    path = tiny_llama_dir(model_type=model_type)
    with pytest.raises(ValueError) as refusal:
        LlamaConfig.from_dir(path)
    assert f"model_type {model_type!r}" in str(refusal.value)
    assert REFUSED[model_type] in str(refusal.value)
    assert "qwen2 (Qwen2, Qwen2.5)" in str(refusal.value), "what is computed is named"


@pytest.mark.parametrize("suffix", ["ForSequenceClassification", "Model"])
@pytest.mark.parametrize("family", MODELS)
def test_other_heads_of_a_family_are_refused(tiny_llama_dir, family, suffix):
    causal = FAMILIES[family].architecture
    path = tiny_llama_dir(model_type=family)
    with pytest.raises(ValueError, match=f"expected {causal}"):
        edit(path, architectures=[causal.replace("ForCausalLM", suffix)])


def test_a_missing_or_unexpected_bias_is_refused(tiny_llama_dir):
    qwen = tiny_llama_dir(model_type="qwen2")
    llama = tiny_llama_dir()
    (qwen / "model.safetensors").rename(qwen / "with.bias")
    (llama / "model.safetensors").rename(qwen / "model.safetensors")
    with pytest.raises(ValueError, match=r"first model.layers.0.self_attn.q_proj.bias \(64,\)"):
        Llama.from_pretrained(qwen)
    (qwen / "with.bias").rename(llama / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds .*_proj.bias .* does not have"):
        Llama.from_pretrained(llama)


def test_every_family_has_three_models_and_its_row_in_the_table():
    """model/README.md says how many are compared with transformers; README names them all."""
    compared = {"llama": len(TINY)}
    for family, models in MODELS.items():
        compared[family] = len(models)
    assert compared.keys() == FAMILIES.keys()
    page = (ROOT / "model" / "README.md").read_text()
    table = page[page.index("| models | `model_type` |") :].split("\n\n")[0].splitlines()
    rows = []
    for model_type, family in FAMILIES.items():
        count = compared[model_type]
        assert count >= 3
        rows.append(f"| {family.models} | `{model_type}` | {family.adds} | {count} |")
    assert table[2:] == rows
    first_page = " ".join((ROOT / "README.md").read_text().split())
    assert ", ".join(family.models for family in FAMILIES.values()) in first_page


def test_a_llama_has_no_fact_of_another_family(tiny_llama_dir):
    """Its default path: no bias is read, none is passed on."""
    config = LlamaConfig.from_dir(tiny_llama_dir())
    plain = dataclasses.replace(config, qkv_bias=False, qk_norm=False, unrotated_layers=())
    assert config == plain and config.window == 0
    passed = []

    def watched(x, weight, group, dropout, bias):
        passed.append(bias)
        return TORCH.lora_linear_forward(x, weight, group, dropout, bias)

    ops = dataclasses.replace(TORCH, lora_linear_forward=watched)
    Llama.from_pretrained(tiny_llama_dir(), ops=ops).logits(torch.tensor([1, 2, 3]))
    assert passed == [None] * 8
