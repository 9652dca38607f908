"""The sampler: a row's text is its own whatever runs beside it, and equals a loop without cache."""

import random

import pytest
import torch

from engine.sampler import Request, Sampler, SamplerConfig
from kernels.philox import mix
from kernels.registry import TORCH
from kernels.sampling import SampleRows
from model.llama import Llama

SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9}
PENALISED = {"temperature": 1.2, "top_k": 60, "min_p": 0.2, "repetition_penalty": 1.3}
DECODINGS = pytest.mark.parametrize(
    "decoding", [{}, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"]
)


def text(ids):
    """Token ids as text, one character each: enough to test stop strings."""
    return "".join(chr(0x100 + i) for i in ids)


def requests(model, count=12, seed=0, longest=90):
    rng = random.Random(seed)
    vocab = model.config.vocab_size
    return [
        Request(
            f"row-{i}",
            [rng.randrange(vocab) for _ in range(rng.randint(1, longest))],
            rng.randint(1, 70),
        )
        for i in range(count)
    ]


def run(model, wanted, lora=None, end_ids=(7,), **config):
    sampler = Sampler(model, text, end_ids, SamplerConfig(**config), lora)
    done = list(sampler.run(wanted))
    assert not sampler.flying and not sampler.waiting
    assert sorted(sampler.cache.free) == list(range(sampler.cache.pages)), "pages were lost"
    return {(c.id, c.sample): c for c in done}


def without_a_cache(model, request, config, end_ids=(7,)):
    """One row, the whole sequence recomputed for every token by the plain forward."""
    ids, key = list(request.prompt), mix("row", request.id)
    for _ in range(request.max_new):
        rows = SampleRows(
            torch.tensor([len(ids)]),
            torch.tensor([request.sample]),
            torch.tensor([key - 2**64 if key >= 2**63 else key]),
            config.seed,
            config.temperature,
            config.top_k,
            config.top_p,
            config.repetition_penalty,
            config.min_p,
            torch.tensor([ids]),
        )
        token = TORCH.sample(model.logits(torch.tensor(ids))[-1:], rows)[0].item()
        ids.append(token)
        if token in end_ids:
            return ids[len(request.prompt) : -1], "stop"
    return ids[len(request.prompt) :], "length"


@pytest.fixture
def tiny(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir(heads=6, kv_heads=2))


@DECODINGS
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop_without_a_cache(tiny, decoding, seed):
    wanted = requests(tiny, seed=seed, longest=40)
    config = SamplerConfig(seed=seed, page_size=8, **decoding)
    got = run(tiny, wanted, rows=5, seed=seed, page_size=8, **decoding)
    for request in wanted:
        ids, finish = without_a_cache(tiny, request, config)
        done = got[request.id, 0]
        assert (done.ids, done.finish) == (ids, finish), request.id
        assert len(done.logprobs) == len(ids) and done.prompt_tokens == len(request.prompt)


@DECODINGS
def test_rows_order_and_pages_change_nothing(tiny, decoding):
    """Bitwise: tokens and log-probabilities."""
    wanted = requests(tiny, 20)
    base = run(tiny, wanted, rows=1, **decoding)
    shuffled = random.Random(1).sample(wanted, len(wanted))
    for rows, order, prefill in ((3, wanted, 512), (16, shuffled, 512), (7, shuffled, 1)):
        assert run(tiny, order, rows=rows, prefill_tokens=prefill, **decoding) == base


@pytest.mark.parametrize("decoding", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_same_text_for_any_rows_on_the_real_model(smollm2_dir, decoding):
    model = Llama.from_pretrained(smollm2_dir)
    rng = random.Random(3)
    wanted = [
        Request(f"r{i}", [rng.randrange(2000, 40000) for _ in range(rng.randint(5, 150))], 12)
        for i in range(16)
    ]
    base = run(model, wanted, rows=1, end_ids=(2,), **decoding)
    for rows in (3, 16):
        assert run(model, wanted, rows=rows, end_ids=(2,), **decoding) == base


def test_a_penalty_makes_texts_repeat_less(tiny):
    """Greedy text of a random model falls into a loop; a strong penalty forbids every repeat."""
    wanted = [Request("a", [1, 2, 3], 40)]
    plain = run(tiny, wanted, end_ids=())["a", 0].ids
    penalised = run(tiny, wanted, end_ids=(), repetition_penalty=1e6)["a", 0].ids
    assert len(set(plain)) < 40 and len(set(penalised)) == 40 and not set(penalised) & {1, 2, 3}


@pytest.mark.parametrize(
    "wrong", [{"min_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}], ids=str
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplerConfig(**wrong).check()


def test_samples_seeds_and_ids_have_their_own_numbers(tiny):
    prompt = list(range(20, 40))
    wanted = [Request(i, prompt, 30, sample=k) for i in ("a", "b") for k in range(3)]
    done = run(tiny, wanted, temperature=1.0, end_ids=())
    assert len({tuple(c.ids) for c in done.values()}) == 6
    again = run(tiny, wanted[::-1], temperature=1.0, end_ids=(), rows=2)
    assert again == done
    other = run(tiny, wanted, temperature=1.0, end_ids=(), seed=1)
    assert all(other[key].ids != done[key].ids for key in done)


def test_stop_strings_are_cut_off_also_across_tokens(tiny):
    wanted = requests(tiny, 6)
    free = run(tiny, wanted, end_ids=())
    for (row, _), c in free.items():
        if len(c.ids) < 4:
            continue
        request = [r for r in wanted if r.id == row]
        stop = text(c.ids[2:4])
        first = c.text.find(stop)
        (cut,) = run(tiny, request, end_ids=(), stop=(stop, "never")).values()
        assert (cut.finish, cut.text, cut.ids) == ("stop_string", c.text[:first], c.ids[:first])


def test_a_prompt_that_leaves_no_room_is_named_not_dropped(tiny):
    most = tiny.config.max_position
    wanted = [
        Request("long", [5] * most, 4),
        Request("fits", [5] * (most - 2), 9),
        Request("short", [5] * 3, 4),
    ]
    done = run(tiny, wanted, end_ids=(), rows=2)
    assert done["long", 0].finish == "prompt_too_long" and done["long", 0].ids == []
    assert done["fits", 0].finish == "length" and len(done["fits", 0].ids) == 2
    assert len(done["short", 0].ids) == 4


def test_requests_may_come_while_it_runs(tiny):
    """As a conversation's next turn does; longer than anything known at the start."""
    sampler = Sampler(tiny, text, (), SamplerConfig(rows=2, page_size=8))
    seen = []
    for done in sampler.run([Request("a", [1, 2, 3], 4), Request("b", [4] * 9, 9)]):
        seen.append(done.id)
        if done.id == "a":
            sampler.submit(Request("a2", [6] * 100, 50))
    assert sorted(seen) == ["a", "a2", "b"]


def test_a_page_left_dirty_does_not_reach_the_next_row(tiny):
    wanted = requests(tiny, 8)
    base = run(tiny, wanted, rows=2)
    sampler = Sampler(tiny, text, (7,), SamplerConfig(rows=2))
    done = {}
    for c in sampler.run(wanted):
        done[c.id, c.sample] = c
        for page in sampler.cache.free:
            sampler.cache.k[:, page] = torch.nan
            sampler.cache.v[:, page] = torch.nan
    assert done == base


def test_settings_that_cannot_sample_are_refused():
    for bad in ({"rows": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"stop": ("",)}):
        with pytest.raises(ValueError):
            SamplerConfig(**bad).check()
