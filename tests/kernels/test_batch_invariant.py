"""The Triton kernels are batch-invariant, from their products to a sampled text.

In the interpreter without a GPU, on the GPU with one.
"""

import dataclasses
import math

import pytest
import torch

from engine.sampling.batch_invariance import batch_dependences
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from kernels.cpu.prepack import Prepacked
from kernels.launch import tile_config, triton_launch
from kernels.lora_linear.group import LoraGroup
from kernels.registry import REFERENCE, TORCH, TRITON, VARIANTS, invariant
from model.llama import Llama
from model.sampling_weights import for_sampling
from tests.helpers import interpreter
from tests.helpers.adapters import new_lora

if triton_launch.INTERPRETED:
    interpreter.install()

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
OPS = VARIANTS["invariant"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COUNTS = (1, 3, 17, 64, 300)


def normal(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(DEVICE, dtype)


def adapters(k, sizes, rank, dtype):
    """Adapters on all modules of a group but the one with index 1."""
    b = [normal(n, rank, seed=n, dtype=dtype) for n in sizes]
    b[1] = None
    adapted = len(sizes) - 1
    a = normal(rank * adapted, k, seed=9, dtype=dtype)
    return LoraGroup(a, tuple(b), torch.zeros_like(a), tuple(b), sizes, rank, 0.75)


def product_of(form, k, sizes, dtype):
    """x (rows, k) -> x W^T with W (sum of sizes, k): of the head, plain, or with adapters; with a
    bias, plain or adapted."""
    weight = normal(sum(sizes), k, seed=1, dtype=dtype)
    if form == "head":
        return lambda x: OPS.linear(x, weight)
    group = adapters(k, sizes, 20, dtype) if "adapted" in form else None
    bias = normal(sum(sizes), seed=4, dtype=dtype) if "biased" in form else None
    return lambda x: OPS.lora_linear_forward(x, weight, group, None, bias)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["head", "plain", "adapted", "biased", "biased adapted"])
def test_products_are_batch_invariant(form, dtype):
    """One row alone, and at the first, the last and any place among large and small rows."""
    if ON_GPU:
        k, sizes = 4096, (4096, 1024, 1000)
    else:
        k, sizes = 40, (24, 8, 9)
    product = product_of(form, k, sizes, dtype)
    row = normal(1, k, seed=2, dtype=dtype)
    others = normal(300, k, seed=3, dtype=dtype)
    others[::3] *= 300
    want = product(row)[0]
    assert want.isfinite().all() and want.abs().max() > 0
    for count in COUNTS:
        x = others[:count].clone()
        places = sorted({0, count // 5, count // 2, count - 1})
        x[places] = row
        got = product(x)[places]
        assert torch.equal(got, want.expand_as(got)), f"one of {places} of {count}"


def test_a_product_does_not_depend_on_alignment_or_strides():
    """Rows not on 16 bytes, and with a gap after each row."""
    product = product_of("plain", 40, (41,), torch.float32)
    x = normal(5, 40)
    buffer = normal(300)
    misaligned = buffer.as_strided((5, 40), (40, 1), 3)
    with_gaps = buffer.as_strided((5, 40), (48, 1))
    for strided in (misaligned, with_gaps):
        assert torch.equal(product(strided.copy_(x)), product(x))


@pytest.mark.skipif(ON_GPU, reason="an H100 adds up along K one by one, whatever BK")
def test_another_tile_gives_other_bits():
    """Otherwise there would be no reason to fix the tile."""
    x = normal(64, 96)
    fixed = tile_config.tile_config("lora_linear_kernel", torch.device(DEVICE), "fixed fp32")
    product = product_of("head", 96, (64,), torch.float32)
    want = product(x)
    narrower = fixed | {"BK": fixed["BK"] // 2}
    with tile_config.overriding({("lora_linear_kernel", ""): narrower}):
        other = product(x)
    assert not torch.equal(other, want)
    torch.testing.assert_close(other, want)


# ---- a whole model


@pytest.fixture
def model(tiny_llama_dir):
    """Three query heads to a key head, so that a tile decodes 5 of 13 draft tokens."""
    return made(tiny_llama_dir)


def made(tiny_llama_dir, layers=2, **family):
    sizes = {"heads": 3, "kv_heads": 1, "head_dim": 16, "intermediate": 24, "vocab": 70}
    special = {"bos_token_id": 68, "eos_token_id": 69}
    path = tiny_llama_dir(layers=layers, tied=False, **sizes, **special, **family)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    return Llama.from_pretrained(path, device=DEVICE, dtype=dtype, ops=TRITON)


def adapter(model):
    """A bound adapter that changes the model's outputs."""
    lora = new_lora(model, rank=4, alpha=8, modules="qv", seed=3)
    with torch.no_grad():
        lora.params.add_(0.1 * normal(*lora.params.shape))
    model.bind(lora)
    return lora


def requests():
    """Two samples of one row, and prompts with a common beginning."""
    g = torch.Generator().manual_seed(1)

    def random_ids(count):
        return torch.randint(68, (count,), generator=g).tolist()

    common = random_ids(9)
    prompts = [common + random_ids(count) for count in (1, 6, 9)]
    prompts.append(common[5:9])
    first_samples = [Request(f"q{i}", prompt, 4) for i, prompt in enumerate(prompts)]
    second_sample = dataclasses.replace(first_samples[2], sample=1)
    return [*first_samples, second_sample]


def texts(model, order, lora=None, drafts=None, **settings):
    """((id, sample) -> tokens and log-probabilities, statistics of the sampler)."""
    config = SamplerConfig(page_size=8, temperature=0.8, top_p=0.95, invariant=True, **settings)
    drafts = drafts or {}
    batch = []
    for request in order:
        draft = drafts.get((request.id, request.sample), ())
        batch.append(dataclasses.replace(request, draft_source=draft))
    done = {}
    with Sampler(model, lambda ids: "", (), config, lora) as sampler:
        for completion in sampler.run(batch):
            assert all(math.isfinite(p) for p in completion.logprobs)
            done[completion.id, completion.sample] = (completion.ids, completion.logprobs)
    return done, sampler.stats


def test_sampled_texts_are_batch_invariant(model):
    """Tokens and log-probabilities, bitwise: batch size, order, drafts, chunks, an adapter."""
    lora = adapter(model)
    batch = requests()
    before = dict(model.weights)
    together, _ = texts(model, batch, lora, rows=5, draft="off")
    distinct = {tuple(ids) for ids, _ in together.values()}
    assert len(distinct) == 5
    # references that hold for some tokens and then fail
    drafts = {key: [*ids[:2], 7, 7] for key, (ids, _) in together.items()}
    drafted, stats = texts(model, batch[::-1], lora, drafts, rows=2, draft="always")
    assert drafted == together
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    chunked, _ = texts(model, batch[1:], lora, rows=3, draft="off", prefill_tokens=8, steps=2)
    assert len(chunked) == 4
    assert chunked == {key: together[key] for key in chunked}
    for request in batch[2:4]:
        alone, _ = texts(model, [request], lora, rows=1, draft="off")
        assert alone == {key: together[key] for key in alone}
    plain, _ = texts(model, batch[:1], None, rows=1)
    assert plain != {("q0", 0): together["q0", 0]}, "the adapter changes nothing"
    assert all(model.weights[name] is weight for name, weight in before.items())


def test_sampled_texts_of_a_qwen3_are_batch_invariant(tiny_llama_dir):
    """Its norm of heads and their rotation are one kernel."""
    model = made(tiny_llama_dir, layers=1, model_type="qwen3")
    lora = adapter(model)
    batch = [dataclasses.replace(request, max_new_tokens=3) for request in requests()[2:4]]
    together, _ = texts(model, batch, lora, rows=2, draft="off")
    drafts = {key: ids[:2] for key, (ids, _) in together.items()}
    drafted, stats = texts(model, batch[::-1], lora, drafts, rows=1, draft="always")
    assert drafted == together and stats.accepted_tokens > 0


def test_the_check_on_a_card_finds_a_product_that_depends_on_the_batch(model):
    """`batch_dependences` runs before the first row is sampled: it finds nothing here, and must not
    miss a product that depends on the number of rows."""
    ours, lora = for_sampling(model, adapter(model), invariant=True)
    ops = dataclasses.replace(ours.ops, sample=TORCH.sample)  # much faster in the interpreter

    def dependent(x, weight):
        factor = 1 + 2.0**-7 if x.shape[0] > 1 else 1.0
        return OPS.linear(x, weight) * factor

    differences = ["sequences beside one of 1 ", "sequences beside one of 11 ", "a prompt is cut"]
    for linear, expected in ((OPS.linear, []), (dependent, differences)):
        probed = Llama(model.config, model.weights, dataclasses.replace(ops, linear=linear))
        found = batch_dependences(probed, lora, 8, prompt_lengths=(1, 11), decoded=6)
        assert len(found) == len(expected), found
        for finding, part in zip(found, expected, strict=True):
            assert part in finding, found


def test_invariant_is_refused_where_it_does_not_hold(tiny_llama_dir):
    path = tiny_llama_dir()
    for dtype, ops in ((torch.bfloat16, TORCH), (torch.float32, REFERENCE)):
        model = Llama.from_pretrained(path, dtype=dtype, ops=ops)
        with pytest.raises(ValueError, match="invariant: rms_norm, rope, .*float32"):
            for_sampling(model, invariant=True)
    with_torchs_swiglu = dataclasses.replace(TRITON, swiglu_forward=TORCH.swiglu_forward)
    with pytest.raises(ValueError, match="invariant: swiglu would run"):
        invariant(with_torchs_swiglu)


def test_fp32_on_a_cpu_is_batch_invariant_without_the_flag(tiny_llama_dir, capsys):
    model = Llama.from_pretrained(tiny_llama_dir(tied=False), device="cpu", ops=TORCH)
    if not Prepacked.available(model.weights["embed"]):
        pytest.skip("this CPU's torch has no oneDNN")
    done, _ = texts(model, requests(), rows=5)
    output = capsys.readouterr().out
    assert done == texts(model, requests(), rows=2)[0]
    expected = "batch-invariant: on a CPU in float32 texts are so, with and without the flag\n"
    assert output == expected
