"""The memory plan against arithmetic done by hand and against what tensors really hold."""

import dataclasses
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.encode import Example
from engine.train import memory_plan
from engine.train.memory_plan import (
    Job,
    StepSize,
    automatic_micro_tokens,
    choose_policy,
    micro_batches,
    predict,
    saved_per_token,
)
from engine.train.step import step_gradients
from model.llama import Llama
from model.lora import LoraConfig
from model.tape import POLICIES
from tests.helpers.adapters import new_lora
from tests.helpers.configs import hand_counted, llama_2_7b


def test_llama_2_7b_saves_763_mb_a_layer(tiny_llama_dir):
    """By hand, statistics and S left out; 361 MB less where gate/up is recomputed."""
    config = llama_2_7b(tiny_llama_dir)

    def saved_mb(policy, statistics):
        per_token = saved_per_token(config, policy, torch.bfloat16, ranks=0)
        return 8192 * (per_token - statistics) / 1e6

    assert POLICIES == ("none", "selective", "full")
    statistics = 4 * (2 + 32)  # bytes of rstd of both norms, and lse of 32 heads
    none = saved_mb("none", statistics)
    selective = saved_mb("selective", statistics)
    assert none == pytest.approx(763, abs=0.5)
    assert none - selective == pytest.approx(361, abs=0.5)
    assert saved_mb("full", statistics=4) == pytest.approx(67.1, abs=0.1)


class Live(TorchDispatchMode):
    """Bytes of the storages made inside: `now`, and the `peak`. Those of `before` do not count."""

    def __init__(self, before):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    ("family", "modules"), [("llama", "qv"), ("llama", "all"), ("qwen3", "all")]
)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(tiny_llama_dir, family, modules):
    sizes = {"layers": 6, "heads": 8, "kv_heads": 4, "head_dim": 32}
    path = tiny_llama_dir(model_type=family, **sizes, intermediate=768, vocab=3000)
    model = Llama.from_pretrained(path)
    lora = new_lora(model, modules=modules)
    rows = []
    for i in range(4):
        ids = [(7 * i + k) % 3000 for k in range(256)]
        rows.append(Example(str(i), ids, 128))
    size = StepSize(tokens=1024, longest=256, response=512, dtype=torch.float32)
    peaks = []
    for policy in POLICIES:
        with Live([*model.weights.values(), lora.params, lora.grads, lora.compute]) as live:
            step_gradients(model, lora, rows, 1, 1024, policy)
        plan = predict(model.config, lora.config, policy, size)
        assert plan.saved + plan.work == pytest.approx(live.peak, rel=0.1), (policy, plan)
        peaks.append(live.peak)
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < 0.6 * peaks[0]


def test_auto_takes_the_least_recomputation_that_fits(tiny_llama_dir):
    """Llama-2-7B in bf16 on 24 GB trains with --memory-gb 24 at 2,048 tokens."""
    config = llama_2_7b(tiny_llama_dir)
    weights = int(13.5e9)  # bytes

    def choose(gb, tokens, requested="auto"):
        size = StepSize(tokens, longest=2048, response=tokens // 2, dtype=torch.bfloat16)
        return choose_policy(requested, gb, config, LoraConfig(), size, "cuda", held=weights)

    policies = [choose(gb, 8192).policy for gb in (80, 33, 24)]
    assert policies == ["none", "selective", "full"]
    plan = choose(24, 2048)
    assert plan.total < 24e9 and "predicted peak" in plan.text()
    assert choose(1, 2048, "none").policy == "none", "a requested policy is taken"
    with pytest.raises(ValueError, match=r"even with --recompute full.*lower --micro-tokens"):
        choose(14, 8192)
    with pytest.raises(ValueError, match="lower --max-length: one row has 2048 tokens") as error:
        choose(14, 2048)
    assert "--micro-tokens" not in str(error.value), "one row cannot be cut into more steps"
    with pytest.raises(ValueError, match="alone need more: take a smaller model$"):
        choose(10, 8192)


MICRO_BATCHES = """
        1B       7B       13B
24 GB   16384    2048     -
48 GB   16384    8192     2048
80 GB   16384    16384    8192
"""


def test_automatic_micro_batches_of_24_48_and_80_gb_cards():
    """Rows of up to 2,048 tokens, 8 in a step, r 8 on q and v, bf16. "-": the model does not fit.

    By hand: the largest T with weights + adapter + 1.05 T (saved + work) within 0.9 of the card.
    """
    header, *lines = MICRO_BATCHES.strip().splitlines()
    for line in lines:
        gigabytes, _, *sizes = line.split()
        limit = 0.9e9 * int(gigabytes)
        for name, size in zip(header.split(), sizes, strict=True):
            made = hand_counted(name)
            held = 2 * made.weights

            def by_hand(tokens, made=made, held=held):
                step = 1.05 * tokens * (made.saved + made.work)
                return held + 18 * made.adapter + step  # 4 buffers of fp32, the bf16 copy

            job = Job(made.config, LoraConfig(), torch.bfloat16, 2048, 8, "auto")
            chosen = micro_batches(job, limit, held)
            if size == "-":
                assert chosen.plan.total > limit and by_hand(1024) > limit, (line, name)
                continue
            assert chosen.tokens == int(size) and chosen.plan.policy == "none", (line, name)
            assert chosen.plan.total == pytest.approx(by_hand(chosen.tokens), rel=0.03)
            assert by_hand(chosen.tokens) < limit, (line, name)
            if chosen.tokens < 16384:
                assert by_hand(2 * chosen.tokens) > limit, (line, name)


def test_automatic_micro_batches_follow_the_rows_and_the_policy():
    made = hand_counted("7B")
    job = Job(made.config, LoraConfig(), torch.bfloat16, 2048, 8, "auto")

    def chosen(gigabytes, **changes):
        changed = dataclasses.replace(job, **changes)
        return micro_batches(changed, gigabytes * 1e9, held=2 * made.weights)

    assert chosen(43).tokens == 8192
    assert chosen(43, longest=256).tokens == 16384, "a step has 2,048 tokens: all at once"
    assert chosen(43, recompute="full").tokens == 16384
    less = chosen(18.5)
    assert (less.tokens, less.plan.policy) == (2048, "selective"), "2,048 do not fit all kept"
    assert chosen(15, longest=8192).tokens == 1024, "nothing fits: the smallest"


def test_automatic_micro_batches_come_from_the_whole_card_or_memory_gb(monkeypatch):
    """What is free on the card is never asked for."""
    monkeypatch.setattr(memory_plan, "total_memory", lambda device: 80 * 10**9)
    monkeypatch.setattr(memory_plan, "free_memory", None)
    monkeypatch.setattr(memory_plan, "held_memory", None)
    made = hand_counted("7B")
    job = Job(made.config, LoraConfig(), torch.bfloat16, 2048, 8, "auto")
    held = 2 * made.weights
    assert automatic_micro_tokens(job, "cpu", 0, held) == (1024, "automatic on a CPU")
    tokens, why = automatic_micro_tokens(job, "cuda:0", 0, held)
    words = r"automatic: at most 6\d\.\d\d of 72.00 GB with recompute none"
    assert tokens == 16384 and re.fullmatch(words, why)
    assert automatic_micro_tokens(job, "cuda:0", 43.2, held)[0] == 8192
