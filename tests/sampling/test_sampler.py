"""The sampler: a text depends on nothing that runs beside it, and equals a loop without a cache."""

import dataclasses
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.sampling.page_pool import common_prefix
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.sampling.speculation import DraftController, Drafter
from kernels.cached_attention import torch_form as cached_attention_torch
from kernels.cpu.rowwise import rowwise
from kernels.philox import mix, signed64
from kernels.registry import TORCH
from kernels.sampling.sample_rows import SampleRows
from model.kv_cache import KVCache
from model.llama import Llama
from tests.helpers.sampling import PENALISED, SAMPLED, random_ids, random_requests, text

DECODINGS = pytest.mark.parametrize(
    "decoding", [{}, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"]
)


def run(model, wanted, lora=None, end_ids=(7,), stats=None, **config):
    sampler = Sampler(model, text, end_ids, SamplerConfig(**config), lora)
    done = list(sampler.run(wanted))
    assert not sampler.scheduler.running and not sampler.scheduler.waiting
    cache = sampler.pool.cache
    assert sorted(cache.free) == list(range(cache.pages)), "pages were lost"
    assert len(done) == len(wanted)
    if stats is not None:
        stats.append(sampler.stats)
    return {(c.id, c.sample): c for c in done}


def with_references(model, wanted, **config):
    """The requests, each with a reference that its own text partly follows: a quarter changed."""
    rng = random.Random(5)
    vocab = model.config.vocab_size
    done = run(model, wanted, rows=1, **config)
    changed = {}
    for (id, _), completion in done.items():
        changed[id] = []
        for token in completion.ids:
            if rng.random() >= 0.9:
                continue  # a token is left out
            if rng.random() < 0.1:
                token = rng.randrange(vocab)
            changed[id].append(token)
    requests = []
    for request in wanted:
        reference = changed[request.id]
        requests.append(
            dataclasses.replace(request, draft_source=reference, expected_tokens=len(reference))
        )
    return requests


def without_a_cache(model, request, config, end_ids=(7,)):
    """One sequence, recomputed as a whole for every token by the plain forward."""
    ids, key = list(request.prompt), mix("row", request.id)
    for _ in range(request.max_new_tokens):
        rows = SampleRows(
            torch.tensor([len(ids)]),
            torch.tensor([request.sample]),
            torch.tensor([signed64(key)]),
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
    wanted = random_requests(tiny, seed=seed, longest=40)
    config = SamplerConfig(seed=seed, page_size=8, **decoding)
    got = run(tiny, wanted, rows=5, seed=seed, page_size=8, **decoding)
    for request in wanted:
        ids, finish = without_a_cache(tiny, request, config)
        done = got[request.id, 0]
        assert (done.ids, done.finish) == (ids, finish), request.id
        assert len(done.logprobs) == len(ids) and done.prompt_tokens == len(request.prompt)


@DECODINGS
def test_batch_order_and_prefill_size_change_no_text(tiny, decoding):
    """Bitwise: tokens and log-probabilities."""
    wanted = random_requests(tiny, 20)
    base = run(tiny, wanted, rows=1, **decoding)
    shuffled = random.Random(1).sample(wanted, len(wanted))
    for rows, order, prefill in ((3, wanted, 512), (16, shuffled, 512), (7, shuffled, 1)):
        assert run(tiny, order, rows=rows, prefill_tokens=prefill, **decoding) == base


@pytest.mark.parametrize("decoding", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_batch_size_changes_no_text_of_the_real_model(smollm2_dir, decoding):
    model = Llama.from_pretrained(smollm2_dir)
    rng = random.Random(3)
    wanted = []
    for i in range(16):
        prompt = [rng.randrange(2000, 40000) for _ in range(rng.randint(5, 150))]
        wanted.append(Request(f"r{i}", prompt, 12))
    base = run(model, wanted, rows=1, end_ids=(2,), **decoding)
    for rows in (3, 16):
        assert run(model, wanted, rows=rows, end_ids=(2,), **decoding) == base


def test_a_repetition_penalty_makes_texts_repeat_less(tiny):
    """Greedy text of a random model falls into a loop; a strong penalty forbids every repeat."""
    wanted = [Request("a", [1, 2, 3], 40)]
    plain = run(tiny, wanted, end_ids=())["a", 0].ids
    penalised = run(tiny, wanted, end_ids=(), repetition_penalty=1e6)["a", 0].ids
    assert len(set(plain)) < 40 and len(set(penalised)) == 40 and not set(penalised) & {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "value"), [("min_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0.0)]
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SamplerConfig(**{name: value}).check()


def test_samples_seeds_and_ids_have_their_own_random_numbers(tiny):
    prompt = list(range(20, 40))
    wanted = [Request(i, prompt, 30, sample=k) for i in ("a", "b") for k in range(3)]
    done = run(tiny, wanted, temperature=1.0, end_ids=())
    assert len({tuple(c.ids) for c in done.values()}) == 6
    again = run(tiny, wanted[::-1], temperature=1.0, end_ids=(), rows=2)
    assert again == done
    other = run(tiny, wanted, temperature=1.0, end_ids=(), seed=1)
    assert all(other[key].ids != done[key].ids for key in done)


def test_stop_strings_are_cut_off_also_across_tokens(tiny):
    wanted = random_requests(tiny, 6)
    free = run(tiny, wanted, end_ids=())
    for (id, _), c in free.items():
        if len(c.ids) < 4:
            continue
        request = [r for r in wanted if r.id == id]
        stop = text(c.ids[2:4])
        first = c.text.find(stop)
        (cut,) = run(tiny, request, end_ids=(), stop=(stop, "never")).values()
        assert (cut.finish, cut.text, cut.ids) == ("stop_string", c.text[:first], c.ids[:first])


def test_a_prompt_that_leaves_no_room_is_reported_not_dropped(tiny):
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


def test_requests_may_be_submitted_while_it_runs(tiny):
    """As a conversation's next turn does; longer than anything known at the start."""
    sampler = Sampler(tiny, text, (), SamplerConfig(rows=2, page_size=8))
    seen = []
    for done in sampler.run([Request("a", [1, 2, 3], 4), Request("b", [4] * 9, 9)]):
        seen.append(done.id)
        if done.id == "a":
            sampler.submit(Request("a2", [6] * 100, 50))
    assert sorted(seen) == ["a", "a2", "b"]


def test_what_a_freed_page_holds_does_not_reach_the_next_sequence(tiny):
    wanted = random_requests(tiny, 8)
    base = run(tiny, wanted, rows=2)
    sampler = Sampler(tiny, text, (7,), SamplerConfig(rows=2))
    done = {}
    for c in sampler.run(wanted):
        done[c.id, c.sample] = c
        for page in sampler.pool.cache.free:
            sampler.pool.cache.k[:, page] = torch.nan
            sampler.pool.cache.v[:, page] = torch.nan
    assert done == base


def test_settings_that_cannot_sample_are_refused():
    for bad in ({"rows": -1}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"stop": ("",)}):
        with pytest.raises(ValueError):
            SamplerConfig(**bad).check()


def test_automatic_settings_are_resolved_for_the_device(tiny):
    given = SamplerConfig(rows=5, prefill_tokens=7)
    assert given.for_device("cpu") == given.for_device("cuda") == given
    assert SamplerConfig().for_device("cpu") == SamplerConfig(rows=32, prefill_tokens=512)
    assert SamplerConfig().for_device("cuda") == SamplerConfig(rows=0, prefill_tokens=4096)
    with Sampler(tiny, text, (), SamplerConfig(draft="off")) as sampler:
        done = list(sampler.run([Request(f"r{i}", [5, 6 + i], 3) for i in range(40)]))
    stats = sampler.stats  # the first token of an answer is its prompt's
    assert len(done) == 40 and (stats.steps, stats.sequence_steps) == (4, 80), (
        "32 sequences, then 8"
    )


def test_the_summary_says_how_many_sequences_fit(tiny):
    """2 + 30 tokens are two pages of 16; a running sequence may always have them both."""
    page = KVCache.page_bytes(tiny.config, 16, torch.float32)
    for pages, fitting in ((0, 6), (12, 6), (7, 3), (2, 1)):
        config = SamplerConfig(rows=6, page_size=16, kv_memory=pages * page / 1e9, draft="off")
        with Sampler(tiny, text, (), config) as sampler:
            done = list(sampler.run([Request(f"r{i}", [5, 6 + i], 30) for i in range(9)]))
        assert len(done) == 9 and sampler.stats.fitting_sequences == fitting
        pages_taken = pages or 12
        assert sampler.stats.cache_bytes == pages_taken * page
        assert f"GB for keys and values fit {fitting} sequences" in sampler.stats.text()


@DECODINGS
def test_speculation_changes_no_text(tiny, decoding):
    """Bitwise: tokens and log-probabilities, for any draft setting and batch size."""
    wanted = with_references(tiny, random_requests(tiny, 16), **decoding)
    base = run(tiny, wanted, rows=1, draft="off", **decoding)
    for draft in ("always", "auto"):
        for rows in (1, 5, 16):
            stats = []
            assert run(tiny, wanted, rows=rows, draft=draft, stats=stats, **decoding) == base
            if draft == "always":
                assert stats[0].accepted_tokens > 0.2 * stats[0].new_tokens


def test_speculation_where_attention_depends_on_the_number_of_queries(tiny, monkeypatch):
    """On a CPU whose products differ with it, drafts go through attention one by one."""
    wanted = with_references(tiny, random_requests(tiny, 6))
    base = run(tiny, wanted, rows=1, draft="off")
    monkeypatch.setattr(cached_attention_torch, "decode_width", lambda *_: None)
    stats = []
    assert run(tiny, wanted, rows=4, draft="always", stats=stats) == base
    assert stats[0].accepted_tokens > 0


def test_wrong_draft_tokens_are_never_accepted(tiny):
    """References that have nothing to do with the text."""
    wanted = random_requests(tiny, 8)
    noise = [dataclasses.replace(r, draft_source=list(range(9, 300, 3))) for r in wanted]
    assert run(tiny, noise, draft="always") == run(tiny, wanted, draft="off")


@pytest.mark.parametrize("decoding", [{}, PENALISED], ids=["greedy", "penalised"])
def test_several_steps_per_synchronisation_change_no_text(tiny, decoding):
    wanted = random_requests(tiny, 10)
    base = run(tiny, wanted, rows=4, draft="off", **decoding)
    for steps in (2, 5, 64):
        assert run(tiny, wanted, rows=4, draft="off", steps=steps, **decoding) == base
    most = tiny.config.max_position  # the last steps must end at the last position
    long = [Request("long", [5] * (most - 7), 99)]
    done = run(tiny, long, end_ids=(), steps=4, draft="off")
    assert len(done["long", 0].ids) == 7 and done == run(tiny, long, end_ids=(), draft="off")


def test_a_common_prefix_is_computed_once_and_changes_no_text(tiny):
    head = [random.Random(9).randrange(300) for _ in range(90)]  # a page and a part of one
    plain = random_requests(tiny, 9, longest=30)
    wanted = [dataclasses.replace(r, prompt=head + r.prompt) for r in plain]
    odd = Request("odd", plain[0].prompt, 9)  # one that has another beginning
    stats = []
    got = run(tiny, [*wanted, odd], rows=4, stats=stats)
    assert stats[0].shared_tokens >= 9 * 90
    for request in (*wanted, odd):
        alone = []
        assert got[request.id, 0] == run(tiny, [request], stats=alone)[request.id, 0]
        assert alone[0].shared_tokens == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_duplicate_prompts_are_computed_once(tiny, rows):
    prompts = {"a": list(range(20, 100)), "b": list(range(9, 79))}
    wanted = [Request(i, p, 20, sample=k) for i, p in prompts.items() for k in range(3)]
    stats = []
    got = run(tiny, wanted, temperature=1.0, end_ids=(), rows=rows, stats=stats)
    assert stats[0].shared_tokens >= 2 * (79 + 69)
    for request in wanted:
        alone = run(tiny, [request], temperature=1.0, end_ids=())
        assert got[request.id, request.sample] == alone[request.id, request.sample]


def test_chunked_prefill_changes_no_text(tiny):
    rng = random.Random(2)
    lengths = (300, 5, 130, 64, 65, 200)
    wanted = [Request(str(n), random_ids(rng, n, 300), 12) for n in lengths]
    base = run(tiny, wanted, rows=1, prefill_tokens=10_000)
    for chunk in (1, 64, 128, 192):
        assert run(tiny, wanted, prefill_tokens=chunk) == base


@DECODINGS
def test_short_memory_preempts_sequences_and_loses_none(tiny, decoding):
    wanted = [dataclasses.replace(r, expected_tokens=1) for r in random_requests(tiny, 14)]
    base = run(tiny, wanted, rows=14, **decoding)
    page = KVCache.page_bytes(tiny.config, 16, torch.float32)
    stats = []
    tight = {"page_size": 16, "kv_memory": 14 * page / 1e9}
    got = run(tiny, wanted, rows=14, stats=stats, **tight, **decoding)
    loose = run(tiny, wanted, rows=14, page_size=16, **decoding)
    assert got == loose and stats[0].preempted > 0
    other_page_size = {key: completion.ids for key, completion in base.items()}
    assert {key: completion.ids for key, completion in got.items()} == other_page_size


def test_memory_for_less_than_one_sequence_is_refused(tiny):
    with pytest.raises(ValueError, match="kv_memory .*the longest sequence needs"):
        run(tiny, random_requests(tiny, 4), kv_memory=1e-5)


def test_the_longest_expected_request_begins_first(tiny):
    wanted = [Request(str(n), [n + 1] * 4, 5, expected_tokens=n) for n in (2, 5, 1, 4, 3)]
    sampler = Sampler(tiny, text, (), SamplerConfig(rows=1))
    assert [done.id for done in sampler.run(wanted)] == ["5", "4", "3", "2", "1"]


def test_end_tokens_can_be_ignored_and_a_request_can_have_its_own_seed(tiny):
    wanted = random_requests(tiny, 5)
    free = run(tiny, wanted, end_ids=range(300), ignore_eos=True)
    assert all(len(free[r.id, 0].ids) == r.max_new_tokens for r in wanted)
    own = [dataclasses.replace(r, seed=4) for r in wanted]
    plain = run(tiny, wanted, temperature=1.0, end_ids=())
    seeded = run(tiny, own, temperature=1.0, end_ids=())
    assert all(plain[k].ids != seeded[k].ids for k in plain)
    assert seeded == run(tiny, own, temperature=1.0, end_ids=(), rows=2)


class FailsOnce(TorchDispatchMode):
    """Raises at torch's n-th operation from now on."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the operation failed")
        return function(*args, **(kwargs or {}))


def test_a_sampler_that_restarts_after_any_exception_loses_no_sequence(tiny):
    """Bitwise the same completions, each once: the prompts here have a common prefix, duplicates
    and one that is too long."""
    head = list(range(70))
    wanted = [
        dataclasses.replace(r, prompt=head + r.prompt, max_new_tokens=min(r.max_new_tokens, 5))
        for r in random_requests(tiny, 4, longest=9)
    ]
    wanted += [dataclasses.replace(wanted[0], sample=1), dataclasses.replace(wanted[1], sample=1)]
    wanted.append(Request("long", [5] * tiny.config.max_position, 4))
    base = run(tiny, wanted, rows=3, page_size=16, **SAMPLED)
    rng = random.Random(0)
    restarts = 0
    for first in (1, 40, 500, 1500):
        sampler = Sampler(tiny, text, (7,), SamplerConfig(rows=3, page_size=16, **SAMPLED))
        sampler._prepare(release=False)
        for request in wanted:
            sampler.submit(request)
        done = []
        failing = FailsOnce(first)
        while sampler.scheduler.has_work:
            try:
                with failing:
                    sampler._step()
            except RuntimeError as error:
                assert "the operation failed" in str(error)
                sampler._restart()
                restarts += 1
                failing = FailsOnce(rng.randrange(1, 1500)) if restarts % 3 else FailsOnce(0)
            done += sampler.scheduler.hand_out()
        assert len(done) == len(wanted) and {(c.id, c.sample): c for c in done} == base
    assert restarts > 5


def test_the_model_lends_its_matrices_and_gets_them_back(tiny, tiny_llama_dir):
    for model in (tiny, Llama.from_pretrained(tiny_llama_dir(tied=False))):
        before = {name: w.clone() for name, w in model.weights.items()}
        with Sampler(model, text, (7,), SamplerConfig()) as sampler:
            assert not isinstance(model.weights["0.qkv"], torch.Tensor), "memory doubles"
            lent = list(sampler.run(random_requests(model, 3)))
        assert all(torch.equal(w, model.weights[name]) for name, w in before.items())
        assert (model.weights["head"] is model.weights["embed"]) == model.config.tie_embeddings
        assert {(c.id, c.sample): c for c in lent} == run(model, random_requests(model, 3))


def test_a_drained_sampler_finishes_the_running_sequences_only(tiny):
    sampler = Sampler(tiny, text, (), SamplerConfig(rows=3))
    done = []
    for completion in sampler.run(random_requests(tiny, 9)):
        done.append(completion.id)
        sampler.drain()
    assert len(done) == 3 and len(sampler.scheduler.waiting) == 6


def test_the_common_prefix_is_the_one_that_saves_most():
    head, other = list(range(50)), list(range(100, 180))
    rows = [[*head, 1, i] for i in range(5)] + [[*other, i] for i in range(4)]
    assert common_prefix(rows) == [*head, 1]
    assert common_prefix(rows[:1]) == [] and common_prefix([[1, 2], [1, 2]]) == []
    same = [list(range(200))] * 3
    assert common_prefix(same) == list(range(199)), "the last token is computed for each"


def test_elementwise_functions_are_batch_invariant():
    """torch's own exp does not: which lane of a vector a number is in depends on its neighbours."""
    for columns in (1, 33, 100, 192, 1000, 40_000):
        x = torch.randn(500 if columns < 2000 else 5, columns)
        whole = rowwise(torch.exp, x)
        torch.testing.assert_close(whole, x.exp())
        half = torch.cat((x, x), dim=1)[:, :columns]  # rows with something between them
        for rows in (1, 2, 3, 7, 100, 333, 499):
            assert torch.equal(rowwise(torch.exp, x[:rows]), whole[:rows])
            gate = rowwise(torch.ops.aten.silu, half[:rows])
            assert torch.equal(gate, rowwise(torch.ops.aten.silu, half)[:rows])


def test_a_drafter_follows_its_reference():
    drafter = Drafter([1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 9])
    assert drafter.propose(3) == [1, 2, 3]
    for token in (1, 2):
        drafter.extend(token)
    assert (drafter.propose(2), drafter.match) == ([3, 4], 2)
    drafter.extend(50)  # leaves the reference ...
    assert drafter.propose(5) == []
    for token in (3, 4):  # ... comes back at the nearest later place, not at the last
        drafter.extend(token)
    assert drafter.propose(2) == [5, 6]
    drafter.extend(5)
    for token in (60, 3, 4):
        drafter.extend(token)
    assert drafter.propose(5) == [9], "the pointer never goes back"
    for token in (70, 71, 72, 70, 71):
        drafter.extend(token)
    assert drafter.propose(1) == [72], "then the sequence's own text"


def test_the_controller_takes_draft_tokens_where_they_pay_off():
    few, many = DraftController(), DraftController()
    for _ in range(100):  # few sequences: a step costs the same for up to 40 tokens
        for tokens in (1, 8, 30):
            few.record_step(tokens, tokens, 0.02)
            many.record_step(tokens, tokens, 0.001 * tokens)  # every token costs its share
    assert few.choose([8], [12])[0] >= 7
    assert sum(many.choose([8] * 30, [12] * 30)) == 0
    for _ in range(300):
        few.record_acceptance(8, 12, 0)
    assert few.accepted[8][0] / few.proposed[8][0] < 0.05
