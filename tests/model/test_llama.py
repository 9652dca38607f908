"""The model computes the same as transformers: logits and greedy text.

`peers` tests run transformers itself; the others compare with the results that it gave when
tests/golden was made. Both judge by the fp64 truth: our fp32 logits may be no further from it than
twice transformers' own. To make the golden files anew:

    UPDATE_GOLDEN=1 python -m pytest tests/model/test_llama.py -m peers
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernels.cached import Cached
from kernels.cpu import native
from kernels.cpu.panels import Panels
from kernels.cpu.prepack import Prepacked
from kernels.integers import cdiv
from kernels.packed import Packed
from model.kv_cache import KVCache
from model.layout import GROUPS
from model.llama import Llama
from model.rope import inverse_frequencies
from model.sampling_weights import for_sampling
from tests.helpers.shards import split

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "logits.safetensors"
SMOLLM2 = ROOT / "tests" / "golden" / "smollm2.json"
UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass
class Case:
    """A random small Llama: arguments of tiny_llama_dir, and what to remove from its config."""

    arguments: dict
    tokens: int = 40
    shards: int = 0
    removed: tuple[str, ...] = field(default=())


TINY = {
    "mha-untied": Case({"kv_heads": 4, "tied": False}),
    "gqa-tied": Case({"heads": 6, "kv_heads": 2, "layers": 3, "rms_norm_eps": 1e-2}),
    "mqa-head_dim": Case({"kv_heads": 1, "head_dim": 32, "hidden": 80, "tied": False}),
    "as-llama1-wrote-it": Case(
        {"kv_heads": 4, "dtype": torch.float16},
        removed=("num_key_value_heads", "head_dim", "rope_theta", "attention_bias", "mlp_bias"),
    ),
    "linear-old": Case(
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e4, "tied": False},
        tokens=150,
    ),
    "linear-new-f16": Case(
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 2e4},
            "dtype": torch.float16,
        },
        tokens=150,
        removed=("rope_theta",),
    ),
    "llama3-old": Case(
        {"rope_scaling": LLAMA3, "rope_theta": 5e5, "heads": 8, "kv_heads": 2}, tokens=200
    ),
    "llama3-new-bf16-sharded": Case(
        {
            "rope_parameters": {"rope_theta": 5e5, **LLAMA3},
            "dtype": torch.bfloat16,
            "head_dim": 32,
            "tied": False,
        },
        tokens=200,
        shards=3,
        removed=("rope_theta",),
    ),
}

# Text with parts that are hard for tokenizers and models: turns, digits, code, accents, an emoji.
CONVERSATION = """<|im_start|>system
You are a helpful AI assistant.<|im_end|>
<|im_start|>user
My café sold 1,347 cups in March and 1,529 in April. By how many percent did sales grow?<|im_end|>
<|im_start|>assistant
The increase is 1,529 - 1,347 = 182 cups. Divided by March's 1,347 cups that is 0.1351, so sales \
grew by about 13.5 percent. In Python:

```python
march, april = 1347, 1529
print(f"{(april - march) / march:.1%}")  # 13.5%
```
<|im_end|>
<|im_start|>user
Schön 🙂 Now write one sentence about it for the newsletter, and one in French.<|im_end|>
<|im_start|>assistant
April was our best month yet: sales rose by 13.5 percent, thank you! En français : « Avril a été \
notre meilleur mois, avec des ventes en hausse de 13,5 %. Merci à toutes et à tous ! »<|im_end|>
"""
PROMPTS = [
    "What is the capital of France?",
    "Explain photosynthesis in two sentences.",
    "Write a haiku about autumn.",
    "List three uses of baking soda.",
    "Tom has 12 apples and gives 5 to Ann. How many does he have left?",
    "Translate 'good morning' into Spanish.",
    "Give me a recipe for pancakes.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that reverses a string.",
    "Summarise the plot of Romeo and Juliet.",
    "Why is the sky blue?",
    "Name five countries in Africa.",
    "How do I remove a coffee stain from a shirt?",
    "Write a short email asking my boss for a day off.",
    "What are prime numbers?",
    "Who painted the Mona Lisa, and when?",
    "Convert 25 degrees Celsius to Fahrenheit.",
    "Give three tips for sleeping better.",
    "What does HTTP stand for?",
    "Write the opening line of a mystery novel.",
    "How many minutes are there in a week?",
    "Describe the taste of a lemon to someone who never had one.",
    "What is compound interest?",
    "Suggest a name for a small bakery by the sea.",
    "Rewrite this politely: send me the report now.",
    "What is the largest planet in the solar system?",
    "A train travels 180 km in 2 hours. What is its average speed?",
    "Explain recursion to a ten-year-old.",
    "What should I pack for a weekend in the mountains?",
    "Write a SQL query that counts the rows of a table named orders.",
    "Is a tomato a fruit or a vegetable?",
    "Give an example of irony.",
]
NEW_TOKENS = 64
FEW_PROMPTS = 8  # of the 32, where transformers is not asked
FOLLOWED = 4  # every so many-th of the 32 is scored by transformers
TOP = 16  # logits kept per position of SmolLM2


def tiny(name, tiny_llama_dir, tmp_path):
    """Directory, tokens, and the positions to compare (the last 8: beyond any old context)."""
    case = TINY[name]
    path = tiny_llama_dir(seed=len(name), **case.arguments)
    config = json.loads((path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in case.removed}
    (path / "config.json").write_text(json.dumps(kept))
    if case.shards:
        path = split(path, tmp_path / name, case.shards)
    generator = torch.Generator().manual_seed(len(name))
    tokens = torch.randint(320, (case.tokens,), generator=generator).tolist()
    return path, tokens, list(range(case.tokens - 8, case.tokens))


def conversation_ids(path):
    tokenizers = pytest.importorskip("tokenizers", reason="extra `bpe`")
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    return tokenizer.encode(CONVERSATION).ids


def logits_at(model, tokens, keep):
    """Our logits (len(keep), V) in fp64."""
    hidden = model.forward(torch.tensor(tokens), Packed.from_lengths([len(tokens)]))
    return model.head(hidden[keep]).double()


def distance(a, b):
    return (a.double() - b.double()).abs().max().item()


def greedy(model, prompts, new):
    """`new` tokens after each prompt, all rows at once over the paged cache; none ends a row."""
    model, _ = for_sampling(model)
    page_size = 16
    pages = [cdiv(len(prompt) + new, page_size) for prompt in prompts]
    cache = KVCache(model.config, sum(pages), page_size, model.device, model.dtype)
    tables = [cache.take(count) for count in pages]
    lengths = [len(prompt) for prompt in prompts]
    cached = Cached.build(lengths, [0] * len(prompts), tables, page_size)
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    chosen = []  # a tensor (rows,) per step
    while True:
        hidden = model.forward(tokens, cached, cache=cache)
        tokens = model.head(hidden[cached.last]).argmax(-1)
        chosen.append(tokens)
        if len(chosen) == new:
            return torch.stack(chosen, dim=1).tolist()
        cached = Cached.build([1] * len(prompts), lengths, tables, page_size)
        lengths = [n + 1 for n in lengths]


def first_difference(one, other):
    """The index of the first token in which two texts of the same length differ."""
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return i
    raise AssertionError("the texts are equal")


def assert_same_text(model, prompts, ours, theirs, tolerance):
    """Equal tokens; where not, the two choices must tie within `tolerance`, and are listed."""
    for row, (prompt, mine, expected) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if mine == expected:
            continue
        step = first_difference(mine, expected)
        got, wanted = mine[step], expected[step]
        context = prompt + expected[:step]
        logits = logits_at(model, context, [len(context) - 1])[0]  # (V,)
        gap = abs(logits[got] - logits[wanted]).item()
        where = f"row {row}, token {step}: {got} for {wanted}, logits {gap:.2g} apart"
        assert gap <= tolerance, where
        warnings.warn(f"a tie broken otherwise (tolerance {tolerance:.2g}): {where}", stacklevel=1)


# ---- against transformers itself


@pytest.mark.peers
def test_logits_of_small_models_against_transformers(tiny_llama_dir, run_peer, tmp_path):
    """fp32 within twice transformers' own error; in fp64 the same function to rounding."""
    made = {name: tiny(name, tiny_llama_dir, tmp_path) for name in TINY}
    jobs = {}
    for name, (path, tokens, keep) in made.items():
        jobs[name] = {"dir": str(path), "tokens": tokens, "keep": keep}
    (tmp_path / "jobs.json").write_text(json.dumps({"logits": jobs}))
    run_peer("logits_peer.py", tmp_path / "jobs.json", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")
    golden = {}
    units = {}
    for name, (path, tokens, keep) in made.items():
        truth = theirs[f"{name}/fp64"]
        unit = distance(theirs[f"{name}/fp32"], truth)
        model = Llama.from_pretrained(path)
        assert torch.equal(inverse_frequencies(model.config), theirs[f"{name}/inv_freq"]), name
        error = distance(logits_at(model, tokens, keep), truth)
        exact = Llama.from_pretrained(path, dtype=torch.float64)
        error64 = distance(logits_at(exact, tokens, keep), truth)
        print(f"{name}: error {error:.3g}, transformers' {unit:.3g}, in fp64 {error64:.3g}")
        assert error <= 2 * unit, f"{name}: error {error:.3g}, transformers' own {unit:.3g}"
        assert error64 < 1e-12, f"{name}: fp64 differs by {error64:.3g}"
        golden[name] = truth.float()
        units[name] = f"{unit:.3g}"
    if UPDATE:
        save_file(golden, GOLDEN, metadata=units)


@pytest.mark.peers
def test_smollm2_against_transformers(smollm2_dir, run_peer, tmp_path):
    """Logits of a conversation; greedy continuations of 64 tokens for 32 prompts.

    The golden continuations are those of transformers' `generate`, all 32. The transformers that is
    installed only scores our tokens in one forward, to tell whether it would choose each of them,
    and does so for every fourth prompt: decoding 32 rows would take it minutes.
    """
    golden = None if UPDATE else json.loads(SMOLLM2.read_text())
    model = Llama.from_pretrained(smollm2_dir)
    tokens = conversation_ids(smollm2_dir)
    keep = list(range(0, len(tokens), 8))
    ours = None if UPDATE else greedy(model, golden["prompts"], NEW_TOKENS)
    place = {"dir": str(smollm2_dir)}
    asked = {"prompts": PROMPTS, "follow": None}
    if not UPDATE:
        asked = {"prompts": PROMPTS[::FOLLOWED], "follow": ours[::FOLLOWED]}
    text = {**place, **asked, "new": NEW_TOKENS}
    jobs = {"logits": {"smollm2": {**place, "tokens": tokens, "keep": keep}}, "greedy": {"": text}}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    out = tmp_path / "out.safetensors"
    text = run_peer("logits_peer.py", tmp_path / "jobs.json", out, timeout=1200)[""]
    theirs = load_file(out)
    truth = theirs["smollm2/fp64"]
    unit = distance(theirs["smollm2/fp32"], truth)

    error = distance(logits_at(model, tokens, keep), truth)
    sampling, _ = for_sampling(model)
    error_prepacked = distance(logits_at(sampling, tokens, keep), truth)
    print(f"error {error:.3g}, prepacked {error_prepacked:.3g}, transformers' own {unit:.3g}")
    assert max(error, error_prepacked) <= 2 * unit

    if UPDATE:
        top = truth.topk(TOP)
        golden = {
            "unit": unit,
            "tokens": tokens,
            "keep": keep,
            "top": top.indices.tolist(),
            "logits": [[round(z, 6) for z in row] for row in top.values.tolist()],
            "logsumexp": [round(z, 6) for z in truth.logsumexp(-1).tolist()],
            **text,
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
        SMOLLM2.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    assert text["prompts"] == golden["prompts"][::FOLLOWED]
    assert_same_text(model, golden["prompts"], ours, golden["continuations"], 2 * unit)
    followed = ours[::FOLLOWED]
    assert_same_text(model, text["prompts"], followed, text["continuations"], 2 * unit)


# ---- against results that transformers gave


@pytest.mark.parametrize("name", TINY)
def test_logits_of_small_models_equal_the_golden_ones(name, tiny_llama_dir, tmp_path):
    """The floor allows for a torch.randn whose last bit differs on another CPU."""
    path, tokens, keep = tiny(name, tiny_llama_dir, tmp_path)
    with safe_open(GOLDEN, framework="pt") as golden:
        expected = golden.get_tensor(name)
        unit = float(golden.metadata()[name])
    error = distance(logits_at(Llama.from_pretrained(path), tokens, keep), expected)
    assert error <= 2 * unit + 1e-5 * expected.abs().max().item()


def test_smollm2_logits_and_greedy_text_equal_the_golden_ones(smollm2_dir):
    golden = json.loads(SMOLLM2.read_text())
    model = Llama.from_pretrained(smollm2_dir)
    logits = logits_at(model, golden["tokens"], golden["keep"])  # (positions, V)
    tolerance = 2 * golden["unit"]
    at_top = logits.gather(1, torch.tensor(golden["top"]))  # (positions, TOP)
    assert distance(at_top, torch.tensor(golden["logits"], dtype=torch.float64)) <= tolerance
    logsumexp = torch.tensor(golden["logsumexp"], dtype=torch.float64)  # (positions,)
    assert distance(logits.logsumexp(-1), logsumexp) <= tolerance
    prompts = golden["prompts"][:FEW_PROMPTS]
    theirs = golden["continuations"][:FEW_PROMPTS]
    ours = greedy(model, prompts, NEW_TOKENS)
    assert_same_text(model, prompts, ours, theirs, tolerance)


# ---- products whose rows do not depend on each other


@pytest.mark.parametrize("form", [Prepacked, Panels])
@pytest.mark.parametrize("threads", [1, 2])
def test_packed_products_are_batch_invariant(smollm2_dir, threads, form):
    """Bitwise, for every number of rows and in any order, on the real matrices of three layers."""
    model = Llama.from_pretrained(smollm2_dir)
    if not form.available(model.weights["embed"]):
        pytest.skip(f"no {form.__name__} here: {native.why_unavailable() or 'torch has no oneDNN'}")
    names = ["head"]
    for layer in (0, 14, 29):
        names += [f"{layer}.{group}" for group in GROUPS]
    few_counts = {*range(1, 18), 31, 32, 33, 47}
    many_counts = few_counts | {*range(18, 41), 63, 64, 65, 127, 200, 257}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in names:
            weight = model.weights[name]
            packed = form(weight)
            if name == "head":  # 28 million weights: a few rows are enough
                most, counts = 48, few_counts
            else:
                most, counts = 300, many_counts
            x = torch.randn(most, weight.shape[1])
            whole = packed(x)
            assert distance(whole, x @ weight.T) < 1e-4 * whole.abs().max().item()
            for count in sorted(counts):
                rows = torch.randperm(most)[:count]
                assert torch.equal(packed(x[rows]), whole[rows]), f"{name}: {count} rows"
    finally:
        torch.set_num_threads(before)
