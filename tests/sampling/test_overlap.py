"""The sampler that launches ahead of reading gives the bytes of the plain one, on a CPU.

Steps over static buffers are called, not captured. What is launched is put into a queue and done
late, in order, at times that a seed draws: so everything that the host changes in between (staged
inputs, pages that were freed, sequences that ended) is seen by work that was launched before, as on
a GPU. Attention reads the device's tensors of a `Cached` and not the host's lists.
"""

import dataclasses
import random
from collections import deque

import pytest
import torch

from engine.sampling import cuda_graphs
from engine.sampling.launched import LaunchQueue
from engine.sampling.model_runner import ModelRunner
from engine.sampling.page_pool import PagePool
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.sampling.speculation import DraftController
from kernels.cached import Cached
from kernels.cpu.prepack import Prepacked
from kernels.registry import TORCH
from model.kv_cache import KVCache
from model.llama import Llama
from tests.helpers.sampling import PENALISED, SAMPLED, random_ids, text

END = 7
PAGE = 8  # tokens
# of `random_load`: greedy, sampled, penalised; draft off, auto, always; a small pool or a large one
SEEDS = (0, 2, 5, 10, 13, 14, 19, 21)


def device_attention(qkv, k, v, cached):
    """Torch's attention, its lists made anew from the device's tensors."""
    if cached.decode:
        ends = cached.cu_queries.tolist()
        query_lens = [end - start for start, end in zip(ends, ends[1:], strict=False)]
        tables = cached.block_table.tolist()
        cached = Cached.build(query_lens, cached.contexts.tolist(), tables, PAGE, decode=True)
    return TORCH.cached_attention(qkv, k, v, cached)


ON_DEVICE = dataclasses.replace(TORCH, name="on device", cached_attention=device_attention)


class LateQueue(LaunchQueue):
    """Does what is launched later, but in order, and at the latest when its results are read."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.works = deque()
        self.is_late = True

    def launch(self, work):
        self.works.append(work)
        while self.works and not (self.is_late and self.rng.random() < 0.6):
            self.works.popleft()()

    def has_run(self, launched):
        return launched.results.tensor is not None

    def read(self, launched):
        while launched.seqs and not self.has_run(launched):
            self.works.popleft()()
        return super().read(launched)

    def run_at_once(self, work):
        """Behind all that was launched before."""
        self.is_late = False
        self.launch(lambda: None)
        result = work()
        self.is_late = True
        return result


@pytest.fixture
def model(tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPES", ("cuda", "cpu"))
    monkeypatch.setattr(cuda_graphs, "why_not_captured", lambda ops: None)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 32, "vocab": 40}
    special = {"bos_token_id": 38, "eos_token_id": 39}
    path = tiny_llama_dir(layers=1, tied=False, max_position=64, **sizes, **special)
    model = Llama.from_pretrained(path, ops=ON_DEVICE)
    if not Prepacked.available(model.weights["embed"]):
        pytest.skip("this CPU's torch has no oneDNN")
    return model


def late_pages(queue, monkeypatch):
    """The operations on pages go through the queue too, as they do on a GPU's stream."""
    zero, copy, grow = KVCache._zero, KVCache._copy, KVCache.grow
    discard = PagePool.discard

    def at_once(function):
        def call(self, *args):
            return queue.run_at_once(lambda: function(self, *args))

        return call

    def late(function):
        def call(self, *args):
            args = [list(pages) for pages in args]
            queue.launch(lambda: function(self, *args))

        return call

    monkeypatch.setattr(KVCache, "_zero", late(zero))
    monkeypatch.setattr(KVCache, "_copy", late(copy))
    # tensors are replaced, which work that was launched before has in hand
    monkeypatch.setattr(KVCache, "grow", at_once(grow))
    monkeypatch.setattr(PagePool, "discard", at_once(discard))
    # these read what they launch, or are read at once
    for name in ("decode", "verify", "prefill_prefix"):
        monkeypatch.setattr(ModelRunner, name, at_once(getattr(ModelRunner, name)))


def spoil(cache, pages):
    cache.k[:, pages] = torch.nan
    cache.v[:, pages] = torch.nan


def random_load(seed):
    """Requests, of which some are submitted late; settings; the tokens that end a sequence."""
    rng = random.Random(seed)
    head = random_ids(rng, rng.choice((0, 0, 9)), 38)
    wanted = []
    for i in range(rng.randint(5, 11)):
        prompt = head + random_ids(rng, rng.randint(1, rng.choice((3, 24))), 38)
        most = rng.choice((1, 5, 14, 30))
        expected = rng.choice((None, 1, 6))
        source = random_ids(rng, 6, 38)
        wanted.append(Request(f"row-{i}", prompt, most, 0, None, expected, source))
        if rng.random() < 0.3:  # another sample of the same prompt
            wanted.append(dataclasses.replace(wanted[-1], sample=1))
        if rng.random() < 0.1:
            wanted[-1] = dataclasses.replace(wanted[-1], temperature=0.7)
    wanted.append(Request("too-long", [3] * 64, 4))
    wanted.append(Request("to-the-last-position", [3] * 50, 40))
    rng.shuffle(wanted)
    late = [wanted.pop() for _ in range(rng.choice((0, 3)))]
    settings = {
        "rows": rng.choice((2, 4, 9)),
        "steps": rng.choice((0, 0, 1, 3, 8)),
        "draft": rng.choice(("off", "off", "auto", "always")),
        "prefill_tokens": rng.choice((8, 16, 512)),
        "stop": rng.choice(((), (), (text([9]), text([3, 5])))),
        **rng.choice(({}, SAMPLED, PENALISED)),
    }
    most_pages = rng.choice((0, 0, 16))
    end_ids = rng.choice(((), (END,), range(7, 12)))
    return wanted, late, settings, most_pages, end_ids


def write(model, load, queue=None, **changed):
    """(id, sample) -> completion; the sampler; how many sequences were completed after `drain`.

    Pages that nothing holds are filled with NaN whenever a completion is handed out.
    """
    wanted, late, settings, most_pages, end_ids = load
    page = KVCache.page_bytes(model.config, PAGE, model.dtype)
    settings = {"kv_memory": most_pages * page / 1e9, **settings, **changed}
    config = SamplerConfig(page_size=PAGE, **settings)
    late = list(late)
    done = {}
    with Sampler(model, text, end_ids, config) as sampler:
        if queue is not None:
            sampler.queue = queue
        for completion in sampler.run(wanted):
            assert (completion.id, completion.sample) not in done
            done[completion.id, completion.sample] = completion
            while late:
                sampler.submit(late.pop())
            cache, free = sampler.pool.cache, list(sampler.pool.cache.free)
            sampler.queue.launch(lambda cache=cache, free=free: spoil(cache, free))
        assert not sampler.unread and not sampler.scheduler.running
        cache = sampler.pool.cache
        assert sorted(cache.free) == list(range(cache.pages)), "pages were lost"
    return done, sampler


@pytest.mark.parametrize("seed", SEEDS)
def test_the_overlapped_sampler_gives_the_bytes_of_the_plain_one(model, seed, monkeypatch):
    """Over random loads; what is launched is done at random times."""
    load = random_load(seed)
    plain, plainly = write(model, load, graphs=False, rows=3, steps=1, draft="off", kv_memory=0)
    rng = random.Random(seed)
    monkeypatch.setattr(DraftController, "is_paused", lambda *_: rng.random() < 0.7)
    queue = LateQueue(seed)
    late_pages(queue, monkeypatch)
    got, sampler = write(model, load, queue)
    assert got == plain
    stats = sampler.stats
    if sampler.config.draft == "off":
        assert stats.launched_ahead > 0
    assert stats.launched_ahead <= stats.replayed <= stats.steps
    if not stats.preempted:
        assert stats.new_tokens == plainly.stats.new_tokens, "tokens behind an end do not count"


def test_without_overlap_nothing_is_launched_ahead(model):
    load = random_load(0)
    plain, _ = write(model, load, graphs=False)
    got, sampler = write(model, load, overlap=False)
    assert got == plain and sampler.stats.replayed > 0 == sampler.stats.launched_ahead


def test_a_drained_sampler_that_runs_ahead_loses_no_sequence(model, monkeypatch):
    """What was running is completed with its own bytes, the rest still waits."""
    load = random_load(4)
    wanted = load[0] + load[1]
    plain, _ = write(model, load, graphs=False)
    queue = LateQueue(1)
    late_pages(queue, monkeypatch)
    config = SamplerConfig(page_size=PAGE, **{**load[2], "rows": 3, "draft": "off"})
    with Sampler(model, text, load[4], config) as sampler:
        sampler.queue = queue
        done = []
        for completion in sampler.run(wanted):
            done.append(completion)
            if len(done) == 3:
                sampler.drain()
        waiting = sampler.scheduler.waiting
        assert 3 <= len(done) < len(wanted) and len(done) + len(waiting) == len(wanted)
        assert all(plain[c.id, c.sample] == c for c in done)
        assert not {(r.id, r.sample) for r in waiting} & {(c.id, c.sample) for c in done}


class FailingQueue(LateQueue):
    """The n-th piece of work raises, and so does one later."""

    def __init__(self, seed):
        super().__init__(seed)
        self.left = self.rng.randint(1, 12)
        self.failed = 0

    def launch(self, work):
        self.left -= 1
        if self.left == 0:
            self.failed += 1
            self.left = 25 if self.failed < 3 else -1
            raise RuntimeError("memory was short")
        super().launch(work)


@pytest.mark.parametrize("seed", range(2))
def test_a_restart_with_work_in_flight_loses_no_sequence(model, seed, monkeypatch):
    wanted, late, settings, _, end_ids = random_load(seed + 20)
    settings["draft"] = "off"
    plain, _ = write(model, (wanted, late, settings, 0, end_ids), graphs=False)
    queue = FailingQueue(seed)
    late_pages(queue, monkeypatch)
    config = SamplerConfig(page_size=PAGE, **settings)
    done = []
    with Sampler(model, text, end_ids, config) as sampler:
        sampler.queue = queue
        for request in wanted + late:
            sampler.submit(request)
        while sampler.scheduler.has_work:
            try:
                sampler._step()
            except RuntimeError as error:
                assert "memory was short" in str(error)
                sampler._restart()
                assert not sampler.unread and sampler.pool.cache is None
            done += sampler.scheduler.hand_out()
    assert queue.failed > 1 and len(done) == len(wanted + late)
    assert {(c.id, c.sample): c for c in done} == plain
