"""Memory for keys and values on a GPU, by a fake allocator: numbers only, no card.

The fake knows what torch's allocator does: what is freed stays reserved until the cache is emptied,
and the driver calls it used.
"""

import gc
import types
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.runtime import process_memory
from engine.runtime.process_memory import free_memory, give_back_freed_memory, total_memory
from engine.sampling import page_pool
from engine.sampling.page_pool import PagePool
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.train.memory_plan import available
from kernels.registry import TORCH
from model.kv_cache import KVCache
from model.llama import Llama
from tests.helpers.configs import llama_2_7b
from tests.helpers.sampling import text

GB = 10**9


class Card(TorchDispatchMode):
    """A GPU of `total` bytes and torch's allocator on it; meta tensors made inside are counted."""

    def __init__(self, total):
        super().__init__()
        self.total = total
        self.largest = total  # bytes that are free in one piece, at most
        self.allocated = 0
        self.reserved = 0
        self.others = 0  # bytes that other programs hold
        self.emptied = 0  # calls of empty_cache
        self.known = set()  # storages that are counted

    def take(self, size):
        if self.allocated + size > self.total - self.others or size > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory (a fake card)")
        self.allocated += size
        self.reserved = max(self.reserved, self.allocated)

    def give(self, size):
        self.allocated -= size

    def empty_cache(self):
        self.reserved = self.allocated
        self.emptied += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta:
            storage = out.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                self.take(storage.nbytes())
                self.known.add(key)
                weakref.finalize(storage, self.forget, key, storage.nbytes())
        return out

    def forget(self, key, size):
        self.known.discard(key)
        self.give(size)


class MetaCache(KVCache):
    """A pool without numbers, whatever device it is asked for."""

    def __init__(self, config, pages, page_size, device, dtype):
        super().__init__(config, pages, page_size, "meta", dtype)


@pytest.fixture
def card(monkeypatch):
    """24 GB, of which the driver's context takes half of one."""
    card = Card(24 * GB)
    cuda = {
        "mem_get_info": lambda device=None: (card.total - card.others - card.reserved, card.total),
        "memory_reserved": lambda device=None: card.reserved,
        "memory_allocated": lambda device=None: card.allocated,
        "empty_cache": card.empty_cache,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(page_pool, "KVCache", MetaCache)
    card.take(GB // 2)
    with card:
        yield card


@pytest.fixture
def llama_7b(tiny_llama_dir):
    """What PagePool reads of Llama-2-7B in bf16 on a GPU: a page of 64 tokens has 33.6 MB."""
    config, device = llama_2_7b(tiny_llama_dir), torch.device("cuda")
    return types.SimpleNamespace(config=config, device=device, dtype=torch.bfloat16, ops=TORCH)


def test_memory_cached_by_torch_counts_as_free(card):
    card.take(13 * GB)
    card.take(7 * GB)
    card.give(7 * GB)
    assert torch.cuda.mem_get_info()[0] == 3.5 * GB, "the driver's word"
    assert free_memory("cuda") == 10.5 * GB
    assert available("cuda") == 24 * GB, "and what this process holds"
    give_back_freed_memory("cuda")
    assert card.emptied == 1 and torch.cuda.mem_get_info()[0] == free_memory("cuda") == 10.5 * GB


def test_memory_of_other_programs_is_not_available(card):
    """The memory plan's number and the sampler's are one."""
    card.take(5 * GB)
    card.others = 8 * GB
    assert available("cuda") == 16 * GB and free_memory("cuda") == 10.5 * GB


def test_processes_on_one_card_plan_for_equal_shares_of_it(card, monkeypatch):
    """The first of two does not take what the second will need."""
    properties = types.SimpleNamespace(total_memory=24 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(process_memory, "_processes_on_gpu", 1)  # again 1 after the test
    assert total_memory("cuda") == 24 * GB and free_memory("cuda") == 23.5 * GB
    process_memory.share_gpu(2)
    assert total_memory("cuda") == 12 * GB
    assert free_memory("cuda") == 11.5 * GB and available("cuda") == 12 * GB
    card.others = 20 * GB  # the other process took more than its share
    assert free_memory("cuda") == 3.5 * GB


def test_every_sampler_of_a_job_gets_as_much_memory_as_the_first(card, llama_7b):
    """Distillation, training with a peak of 20.6 GB, evaluation: Llama-2-7B on a card of 24 GB."""
    card.take(int(13.5 * GB))
    got = []
    for peak in (0.0, 6.6, 6.6):
        card.take(int(peak * GB))  # a training step's tensors, freed
        card.give(int(peak * GB))
        pool = PagePool(llama_7b, 64, 0.0)
        assert pool.ensure_pages(64 * 11, 11)
        got.append(pool.cache.pages)
        del pool
        gc.collect()
    assert got == [268] * 3, "0.9 of 10 GB in pages of 33.6 MB"


def test_a_pool_that_cannot_grow_beside_the_old_one_is_made_anew(card, llama_7b):
    card.take(int(13.5 * GB))
    pool = PagePool(llama_7b, 64, 0.0)
    pool.num_padding_pages = 1
    assert pool.ensure_pages(199, 11) and pool.cache.pages == 200  # 6.7 of 10 GB
    pool.prefix_tokens, pool.prefix_pages = [1] * 64, pool.cache.take(1)
    assert pool.ensure_pages(150, 150) and pool.cache.pages == 200
    before = pool.cache
    assert not pool.ensure_pages(230, 230), "7.8 GB fit, but not beside 6.7"
    assert pool.cache is before and before.pages == 200 and len(before.free) == 198
    del before
    pool.discard()
    gc.collect()
    assert pool.ensure_pages(230, 230) and pool.cache.pages == 231 and len(pool.padding_pages) == 1
    with pytest.raises(ValueError, match=r"needs 10.* GB .*cuda has 9 GB free.*fewer new tokens"):
        pool.ensure_pages(300, 300)
    assert pool.ensure_pages(200, 200), "and the pool is as it was"
    pool.close()
    assert pool.ensure_pages(260, 260), "a pool without pages in use is not copied"


def test_a_pool_that_does_not_fit_in_one_piece_is_made_smaller(card, llama_7b):
    """10 GB are free, but in pieces of at most 2."""
    card.take(int(13.5 * GB))
    card.largest = 2 * GB
    pool = PagePool(llama_7b, 64, 0.0)
    assert pool.ensure_pages(400, 11) and 2 * GB < pool.cache.pages * 33.6e6 < 4 * GB
    have = pool.cache.pages
    pool.prefix_tokens, pool.prefix_pages = [1] * 64, pool.cache.take(1)
    assert not pool.ensure_pages(have + 60, have + 60) and pool.cache.pages == have
    assert pool.cache.k.shape == pool.cache.v.shape == pool.cache.shape
    card.largest = 10**6
    with pytest.raises(ValueError, match="longest sequence needs 0.369 GB.*in one piece"):
        PagePool(llama_7b, 64, 0.0).ensure_pages(20, 11)


def test_a_late_long_request_waits_for_a_larger_pool(tiny_llama_dir, monkeypatch):
    """As in a cascade: a later request needs more than the first ones, near the card's limit."""
    model = Llama.from_pretrained(tiny_llama_dir(layers=1, max_position_embeddings=1024))
    page = KVCache.page_bytes(model.config, 8, torch.float32)
    first = [Request(f"r{i}", [*[3] * 72, *[4 + i] * 8], 12) for i in range(4)]
    late = Request("late", [9] * 600, 12)

    def write(**settings):
        done = {}
        config = SamplerConfig(rows=4, page_size=8, draft="off", **settings)
        with Sampler(model, text, (), config) as sampler:
            for completion in sampler.run(first):
                if not done:
                    sampler.submit(late)
                done[completion.id] = completion
                pools.append(sampler.pool.cache.pages)
        return {name: (c.ids, c.logprobs, c.finish) for name, c in done.items()}

    pools = []
    want = write(kv_memory=100 * page / 1e9)

    made = []  # weak references to every pool
    grown = []  # sizes
    init = KVCache.__init__

    def recorded_init(self, *args):
        init(self, *args)
        made.append(weakref.ref(self))

    def free(device):
        """100 pages less those of the pools that are alive."""
        alive = [reference() for reference in made if reference() is not None]
        return (100 - sum(pool.pages for pool in alive)) * page

    monkeypatch.setattr(KVCache, "__init__", recorded_init)
    monkeypatch.setattr(KVCache, "grow", lambda self, pages: grown.append(pages))
    monkeypatch.setattr(PagePool, "_limited_by_gpu", lambda self: True)
    monkeypatch.setattr(page_pool, "free_memory", free)
    pools.clear()
    assert write() == want and len(want) == 5
    assert pools[:4] == [57] * 4, "four sequences of 12 pages, and their common prefix"
    assert pools[4] == 77 and len(made) == 2 and not grown, "its own pages, in a pool made anew"


def test_keys_and_values_are_freed_before_torchs_cache_is_emptied(tiny_llama_dir, monkeypatch):
    model = Llama.from_pretrained(tiny_llama_dir())
    emptied = []
    with Sampler(model, text, (), SamplerConfig(max_new_tokens=2)) as sampler:
        list(sampler.run([Request("a", [5, 6])]))
        keys = weakref.ref(sampler.pool.cache.k)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(keys() is None))
        sampler.graphs.memory_pool = object()  # as behind a capture
    assert emptied == [True], "the cache is emptied after the last reference is gone"
