"""Decode steps over static buffers: on a GPU captured and replayed, here called as they are.

The same tests in both places. On a CPU products are packed ones, and attention goes token by token,
reading the device's tensors of a `Cached` and not the host's lists (Triton's attention does that
too, very slowly in the interpreter: it has tests of its own). All these forms are batch-invariant,
so texts and log-probabilities must be equal.
"""

import dataclasses
import gc
import random
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.sampling import cuda_graphs
from engine.sampling.decode_step import Bucket, DecodeStep
from engine.sampling.page_pool import PagePool
from engine.sampling.requests import Request, SamplerConfig, SamplerStats
from engine.sampling.sampler import Sampler
from engine.sampling.speculation import DraftController
from kernels.cpu.prepack import Prepacked
from kernels.integers import cdiv
from kernels.launch import triton_launch
from kernels.registry import REFERENCE, TORCH, TRITON, VARIANTS
from model.kv_cache import KVCache
from model.llama import Llama
from model.weights import PlainWeights
from tests.helpers import interpreter
from tests.helpers.adapters import new_lora
from tests.helpers.sampling import SAMPLED, random_ids, text

if triton_launch.INTERPRETED:
    interpreter.install()

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def mirrored_attention(qkv, k, v, cached):
    """Attention of decoded tokens, from the device mirrors of a `Cached` only."""
    if not cached.decode:
        return TORCH.cached_attention(qkv, k, v, cached)
    _, G, page_size, d = k.shape
    n = qkv.shape[1] // (G * d) - 2  # query heads per key head
    starts = cached.cu_queries.tolist()
    outputs = []
    for i in range(len(starts) - 1):
        for t in range(starts[i], starts[i + 1]):
            seen = int(cached.contexts[i]) + t - starts[i] + 1
            pages = cached.block_table[i, : cdiv(seen, page_size)]
            keys = k[pages].transpose(0, 1).flatten(1, 2)[:, :seen]  # (G, seen, d)
            values = v[pages].transpose(0, 1).flatten(1, 2)[:, :seen]  # (G, seen, d)
            q = qkv[t, : G * n * d].view(G, n, d)
            scores = q @ keys.transpose(1, 2) * d**-0.5  # (G, n, seen)
            p = torch.softmax(scores, dim=-1)
            outputs.append((p @ values).flatten())
    return torch.stack(outputs)


MIRRORED = dataclasses.replace(TORCH, name="mirrored", cached_attention=mirrored_attention)
MIXED = dataclasses.replace(
    TORCH, name="mixed", kv_write_=TRITON.kv_write_, cached_attention=TRITON.cached_attention
)
PENALISED = {"temperature": 1.2, "top_k": 60, "min_p": 0.1, "repetition_penalty": 1.3}
END = 7
QWEN2 = {"model_type": "qwen2"}
QWEN3 = {"model_type": "qwen3"}
SMOLLM3 = {"model_type": "smollm3", "no_rope_layers": [1, 0]}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    if not ON_GPU:
        why_not = cuda_graphs.why_not_captured
        monkeypatch.setattr(cuda_graphs, "DEVICE_TYPES", ("cuda", "cpu"))
        monkeypatch.setattr(
            cuda_graphs, "why_not_captured", lambda ops: None if ops is MIRRORED else why_not(ops)
        )


def made(tiny_llama_dir, **family):
    """A random model of two layers, of a family that its settings name."""
    sizes = {"heads": 3, "kv_heads": 1, "head_dim": 16, "intermediate": 24, "vocab": 70}
    special = {"bos_token_id": 68, "eos_token_id": 69}
    path = tiny_llama_dir(layers=2, tied=False, max_position=128, **sizes, **special, **family)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = Llama.from_pretrained(
        path, device=DEVICE, dtype=dtype, ops=TRITON if ON_GPU else MIRRORED
    )
    if not ON_GPU and not Prepacked.available(model.weights["embed"]):
        pytest.skip("this CPU's torch has no oneDNN")
    return model


@pytest.fixture
def model(tiny_llama_dir):
    return made(tiny_llama_dir)


def adapter(model):
    lora = new_lora(model, rank=4, alpha=8, modules="qv", seed=3)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        lora.params.add_(0.1 * torch.randn(lora.params.shape, generator=g).to(DEVICE))
    model.bind(lora)
    return lora


def requests(count=9, longest=20, most=22, seed=0):
    """Random requests, a second sample of one of them, and one with a seed of its own."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        prompt = random_ids(rng, rng.randint(1, longest), 68)
        made.append(Request(f"row-{i}", prompt, rng.randint(1, most)))
    second_sample = dataclasses.replace(made[1], sample=1)
    own_seed = dataclasses.replace(made[2], seed=5)
    return [*made, second_sample, own_seed]


def write(model, wanted, lora=None, end_ids=(END,), late=(), invariant=ON_GPU, **settings):
    """(id, sample, seed) -> completion, and the stats.

    Requests in `late` are submitted when the first sequence has ended.
    Pages that nothing holds (padding pages are held) are filled with NaN.
    """
    settings = {"draft": "off", **settings}
    config = SamplerConfig(page_size=8, invariant=invariant, **settings)
    seeds = {request.id: request.seed for request in (*wanted, *late)}
    late = list(late)
    done = {}
    with Sampler(model, text, end_ids, config, lora) as sampler:
        for completion in sampler.run(wanted):
            key = (completion.id, completion.sample, seeds[completion.id])
            done[key] = completion
            while late:
                sampler.submit(late.pop())
            cache = sampler.pool.cache
            for page in cache.free:
                cache.k[:, page] = torch.nan
                cache.v[:, page] = torch.nan
        assert sorted(cache.free) == list(range(cache.pages)), "pages were lost"
    return done, sampler.stats


def unique(wanted):
    """The requests with different ids."""
    return [dataclasses.replace(r, id=f"{r.id}/{r.sample}/{r.seed}") for r in wanted]


@pytest.mark.parametrize("decoding", [{}, SAMPLED, PENALISED], ids=["greedy", "top-p", "penalised"])
def test_captured_steps_write_the_same_texts(model, decoding):
    """Sequences end and others follow, over the borders of pages and of buckets."""
    wanted = unique(requests(16))
    base, stats = write(model, wanted, rows=10, graphs=False, **decoding)
    assert stats.replayed == stats.captured == 0 and stats.why_not_captured is None
    got, stats = write(model, wanted, rows=10, **decoding)
    assert got == base and stats.why_not_captured is None, stats.why_not_captured
    assert stats.replayed == stats.steps > 8 and stats.captured > 2
    assert f"of {stats.captured} graphs captured" in stats.text()
    again, stats = write(model, wanted[::-1], rows=18, steps=3, **decoding)
    assert again == base and stats.replayed == stats.steps and stats.captured > 3


@pytest.mark.parametrize("family", [QWEN2, QWEN3, SMOLLM3], ids=lambda f: f["model_type"])
def test_captured_steps_of_other_families_write_the_same_texts(tiny_llama_dir, family):
    """With a bias, norms of heads, and a layer without rotation; with and without an adapter."""
    model = made(tiny_llama_dir, **family)
    wanted = unique(requests(7))
    written = []
    for lora in (None, adapter(model)):
        base, _ = write(model, wanted, lora, rows=5, graphs=False, **SAMPLED)
        got, stats = write(model, wanted, lora, rows=5, **SAMPLED)
        assert got == base and stats.replayed == stats.steps > 8, stats.why_not_captured
        written.append({key: completion.ids for key, completion in got.items()})
    assert written[0] != written[1], "the adapter changes nothing"


def test_a_stop_string_may_end_a_sequence_at_any_of_several_steps(model):
    wanted = unique(requests(4))
    free, _ = write(model, wanted, end_ids=(), graphs=False, rows=3)
    ids = max((c.ids for c in free.values()), key=len)
    stop = (text(ids[3:5]), "never")
    base, _ = write(model, wanted, end_ids=(), graphs=False, rows=3, stop=stop)
    got, stats = write(model, wanted, end_ids=(), rows=3, stop=stop)
    assert got == base and stats.replayed == stats.steps
    assert "stop_string" in {c.finish for c in got.values()}


def test_a_pool_that_grows_is_captured_again(model):
    wanted = unique(requests(4, longest=9, most=9))
    late = [Request("late", [5] * 60, 20)]
    base, _ = write(model, wanted, late=late, graphs=False, rows=2, **SAMPLED)
    pool_sizes = []  # of every growth
    graphs_freed = []  # by every call of `clear`
    grow, clear = KVCache.grow, cuda_graphs.DecodeGraphs.clear

    def recorded_grow(self, pages):
        pool_sizes.append(pages)
        grow(self, pages)

    def recorded_clear(self):
        graphs_freed.append(len(self.captured))
        clear(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "grow", recorded_grow)
        patch.setattr(cuda_graphs.DecodeGraphs, "clear", recorded_clear)
        got, stats = write(model, wanted, late=late, rows=2, **SAMPLED)
    assert pool_sizes and got == base and stats.replayed == stats.steps
    # before the first graph, at every growth, at the end
    assert len(graphs_freed) == 2 + len(pool_sizes)
    assert graphs_freed[0] == 0 and min(graphs_freed[1:]) > 0


def test_the_last_steps_end_at_the_last_position(model):
    most = model.config.max_position
    wanted = [Request("long", [5] * (most - 9), 99), Request("short", [6] * 3, 4)]
    base, _ = write(model, wanted, end_ids=(), graphs=False)
    got, stats = write(model, wanted, end_ids=())
    assert got == base and stats.replayed == stats.steps == 8
    assert len(got["long", 0, None].ids) == 9


def test_short_memory_preempts_sequences_and_loses_none(model):
    wanted = [dataclasses.replace(r, expected_tokens=1) for r in unique(requests(8))]
    base, _ = write(model, wanted, rows=8, graphs=False, **SAMPLED)
    page = KVCache.page_bytes(model.config, 8, model.dtype)
    got, stats = write(model, wanted, rows=8, kv_memory=8 * page / 1e9, **SAMPLED)
    assert got == base and stats.preempted > 0 and stats.replayed == stats.steps


def test_draft_tokens_are_verified_in_steps_that_are_not_captured(model):
    wanted = unique(requests(5))
    base, _ = write(model, wanted, rows=3, graphs=False)
    ids = {c.id: c.ids for c in base.values()}
    with_drafts = []
    for request in wanted:
        draft_source = list(ids[request.id])
        draft_source[3:4] = [9]  # one token is wrong
        with_drafts.append(dataclasses.replace(request, draft_source=draft_source))
    got, stats = write(model, with_drafts, rows=3, draft="always")
    assert got == base and stats.accepted_tokens > 0 and 0 < stats.replayed < stats.steps


def test_steps_of_several_temperatures_are_not_captured(model):
    wanted = []
    for i, request in enumerate(unique(requests(4))):
        temperature, limit = (1.2, 34) if i < 3 else (0.7, 4)
        wanted.append(dataclasses.replace(request, temperature=temperature, max_new_tokens=limit))
    base, _ = write(model, wanted, end_ids=(), graphs=False, rows=6, **SAMPLED)
    got, stats = write(model, wanted, end_ids=(), rows=6, **SAMPLED)
    assert got == base and 0 < stats.replayed < stats.steps  # the three hot ones are left


def test_the_summary_says_why_steps_are_not_captured(model):
    model.ops = dataclasses.replace(model.ops, cached_attention=TORCH.cached_attention)
    if ON_GPU:
        model.ops = dataclasses.replace(model.ops, kv_write_=TORCH.kv_write_)
    wanted = unique(requests(3))
    base, off = write(model, wanted, graphs=False, invariant=False)
    got, stats = write(model, wanted, invariant=False)
    assert got == base and stats.replayed == 0 and off.text().count("captured") == 0
    assert "not captured as CUDA graphs: cached_attention would read" in stats.text()
    why_not = cuda_graphs.why_not_captured
    assert why_not(REFERENCE) and why_not(VARIANTS["invariant"]) is None
    assert why_not(TORCH).startswith("cached_attention ") and why_not(TRITON) is None


class HostReads(TorchDispatchMode):
    """Records the operations in which the host reads a tensor or makes one from its own numbers."""

    def __init__(self):
        super().__init__()
        self.seen, self.host_reads = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen += 1
        if name in ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal", "item"):
            self.host_reads.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ops", [MIXED, TRITON, VARIANTS["invariant"]], ids=lambda ops: ops.name)
@pytest.mark.parametrize("decoding", [{}, PENALISED], ids=["greedy", "penalised"])
def test_a_step_never_synchronises_with_the_host(model, ops, decoding, monkeypatch):
    """It would end a capture on a GPU; found without one. The adapter is not merged here."""
    assert_no_host_reads(Llama(model.config, model.weights, ops), decoding, monkeypatch)


@pytest.mark.parametrize("ops", [MIXED, TRITON], ids=lambda ops: ops.name)
def test_a_step_with_norms_of_heads_never_does(tiny_llama_dir, ops, monkeypatch):
    model = made(tiny_llama_dir, **QWEN3)
    assert_no_host_reads(Llama(model.config, model.weights, ops), {}, monkeypatch)


def assert_no_host_reads(plain, decoding, monkeypatch):
    """One step of a bucket of two sequences, with an adapter that is not merged."""
    config = SamplerConfig(page_size=8, rows=2, **decoding)
    lora, pool, stats = adapter(plain), PagePool(plain, 8, 0.0), SamplerStats()
    cuda_graphs.DecodeGraphs(plain, lora, pool, config, stats)
    pool.ensure_pages(4, 2)
    launch, watch = triton_launch.launch, HostReads()

    def unwatched(*args, **options):  # the interpreter reads what the GPU would
        with torch.utils._python_dispatch._disable_current_modes():
            launch(*args, **options)

    for operation in cuda_graphs.STEP_OPERATIONS:
        module = sys.modules[getattr(plain.ops, operation).__module__]
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", unwatched)
    bucket = Bucket(sequences=2, pages=2, temperature=config.temperature)
    step = DecodeStep(plain, lora, pool, config, bucket, steps=2)
    step.load(step.stage(()), None, None)
    step()  # as before a capture
    with watch:
        step()
    assert watch.seen > 10 and not watch.host_reads
    with watch:  # the control: these are found
        torch.tensor([1], device=DEVICE).item()
    assert watch.host_reads == ["lift_fresh", "_local_scalar_dense"]
    assert step.turn.tolist() == [2] and step.results[:, 0].long().max() < 70


def test_a_bucket_is_the_next_of_few_sizes_within_the_limit():
    sequences = [1, 2, 3, 5, 9, 17, 25, 33, 49, 65, 97, 129]
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192]
    assert [cuda_graphs.bucket_size(n, 999) for n in sequences] == sizes
    assert all(cuda_graphs.bucket_size(n, 999) == n for n in sizes)
    assert cuda_graphs.bucket_size(33, 40) == 40


def test_steps_per_synchronisation_depend_on_what_drafting_would_gain(model):
    def steps(rows, controller, **settings):
        config = SamplerConfig(**settings)
        pool = PagePool(model, 64, 0.0)
        made = cuda_graphs.DecodeGraphs(model, None, pool, config, SamplerStats())
        assert made.enabled == config.graphs == pool.num_padding_pages
        return made.steps_per_sync(rows, controller)

    cheap, dear = DraftController(), DraftController()
    for _ in range(100):
        for tokens in (1, 8, 30):  # the same, replayed or not and whatever is drafted
            cheap.record_step(tokens, tokens, 0.01, replayed=True)
            cheap.record_step(tokens, tokens, 0.01)
            # ten steps for one with draft tokens
            dear.record_step(tokens, tokens, 0.001, replayed=True)
            dear.record_step(tokens, 2 * tokens, 0.01)
    assert cheap.pays_off(1) and not dear.pays_off(1) and not cheap.pays_off(200)
    assert steps(1, cheap) == 1
    assert steps(1, dear) == steps(1, cheap, draft="off") == cuda_graphs.STEPS_PER_SYNC
    assert steps(1, dear, draft="always") == 1 and steps(1, dear, graphs=False) == 1
    assert steps(1, cheap, steps=5) == steps(1, dear, steps=5, graphs=False) == 5


@pytest.mark.parametrize("ops", ["triton", "with an adapter"])
def test_a_whole_model_on_triton(model, ops):
    """Also without --batch-invariant, if a bucket is full; on a GPU in two dtypes."""
    lora = adapter(model) if ops == "with an adapter" else None
    wanted = [Request(f"q{i}", [i + 1] * (3 + 2 * i), 6) for i in range(2)]
    for dtype in (model.dtype, torch.float32) if ON_GPU else (model.dtype,):
        weights = PlainWeights((name, w.to(dtype)) for name, w in model.weights.items())
        whole = Llama(model.config, weights, TRITON)
        if lora is not None:
            whole.bind(lora)
        for decoding in ({}, SAMPLED) if ON_GPU else (SAMPLED if lora else {},):
            settings = {"rows": 2, "end_ids": (), "invariant": False, **decoding}
            base, _ = write(whole, wanted, lora, graphs=False, **settings)
            got, stats = write(whole, wanted, lora, **settings)
            assert stats.replayed == stats.steps == 5, stats.why_not_captured
            assert {k: c.ids for k, c in got.items()} == {k: c.ids for k, c in base.items()}


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
def test_memory_is_given_back(model):
    def held():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    wanted = unique(requests(6))
    write(model, wanted, rows=6, **SAMPLED)  # what libraries and tables of angles keep
    before = held()
    for _ in range(3):
        _, stats = write(model, wanted, rows=6, **SAMPLED)
        assert stats.replayed == stats.steps, stats.why_not_captured
    assert held() <= before
    config = SamplerConfig(rows=6, page_size=8, draft="off", invariant=True)
    with Sampler(model, text, (END,), config) as sampler:
        list(sampler.run(wanted))
        assert held() > before and len(sampler.graphs.captured) == sampler.stats.captured > 1
        assert all(step.graph is not None for step in sampler.graphs.captured.values())
    assert held() <= before


def test_a_failed_capture_loses_no_sequence(model, monkeypatch):
    """The last of this file: on a GPU a stream is left that was capturing."""
    wanted = unique(requests(4))
    base, _ = write(model, wanted, rows=3, graphs=False, **SAMPLED)
    if ON_GPU:
        step = DecodeStep.__call__
        monkeypatch.setattr(DecodeStep, "__call__", lambda self: (step(self), self.turn.item()))
    else:

        def failing(self, step):
            try:
                raise RuntimeError("the host was asked\nand more")
            finally:
                raise ValueError("ended")

        monkeypatch.setattr(cuda_graphs.DecodeGraphs, "_capture", failing)
    got, stats = write(model, wanted, rows=3, **SAMPLED)
    assert got == base and stats.replayed == stats.captured == 0
    assert stats.why_not_captured.startswith("capturing failed: ") and "\n" not in stats.text()
    if not ON_GPU:
        said = "capturing failed: RuntimeError: the host was asked; then ValueError: ended"
        assert stats.why_not_captured == said
