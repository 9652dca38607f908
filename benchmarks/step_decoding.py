"""Decoding as engine/sampling does it, timed: called by benchmarks/step.py and by
benchmarks/card/measure.py."""

# B = sequences decoded together

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from engine.distill.config import PAPER_SAMPLING
from engine.sampling.decode_step import DecodeStep
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from model.llama import Llama
from model.lora import Lora, LoraConfig

# name -> settings of the sampler
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_p": 0.9},
    "paper": PAPER_SAMPLING,
}


@dataclass(frozen=True)
class DecodeCase:
    """The decoding that is timed."""

    rows: int  # sequences decoded together; 0: as many as the sampler takes by itself
    prompt: int  # tokens of a prompt
    new: int  # new tokens of a sequence
    requests: int = 0  # sequences in all; 0: as many as `rows`. With more than those, sequences
    #   that end are replaced, and prompts and answers differ in length (`lengths`)
    setting: str = "greedy"  # a key of SETTINGS
    invariant: bool = False  # with batch-invariant products
    graphs: bool = True  # with CUDA graphs, where there are any
    adapter: str = ""  # modules with an adapter of rank 8, as LoraConfig has them; "": none

    def lengths(self) -> list[tuple[int, int]]:
        """Prompt and new tokens of every request.

        All alike without refill; else from a half to three halves of `prompt` and `new`, evenly
        spread and in an order that is no order, so that sequences end one by one as real ones do.
        """
        count = self.requests or self.rows
        if count <= self.rows:
            return [(self.prompt, self.new)] * count
        generator = torch.Generator().manual_seed(3)
        shares = torch.linspace(0.5, 1.5, count)
        prompts = shares[torch.randperm(count, generator=generator)] * self.prompt
        answers = shares[torch.randperm(count, generator=generator)] * self.new
        lengths = []
        for prompt, new in zip(prompts.tolist(), answers.tolist(), strict=True):
            lengths.append((max(1, round(prompt)), max(2, round(new))))
        return lengths


def random_adapter(model: Llama, modules: str) -> Lora | None:
    """An adapter of rank 8 whose B is not zero, so that it changes texts; None for no modules."""
    if not modules:
        return None
    config = LoraConfig(8, 16.0, modules=modules)
    lora = Lora.init(config, model.config, model.device, model.dtype)
    generator = torch.Generator(model.device).manual_seed(4)
    for name, matrix in lora.views(lora.params).items():
        if ".lora_B." in name:
            matrix.normal_(0.0, 0.05, generator=generator)
    model.bind(lora)  # copies the parameters into the model's dtype
    return lora


class CardClock:
    """The card's time in replayed decode steps, and in forwards that the host launches (prefill).

    Between the first and the last kernel of each, so a forward that waits for the host's launches
    counts in whole.
    """

    def __init__(self) -> None:
        self.events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    def around(self, name: str, fn: Callable[[], Any]) -> Any:
        """Call `fn` between two CUDA events."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        result = fn()
        end.record()
        self.events.setdefault(name, []).append((start, end))
        return result

    def seconds(self, name: str) -> float:
        """The sum over all calls; waits for the device."""
        torch.cuda.synchronize()
        pairs = self.events.get(name, [])
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3


@contextmanager
def card_clock(device: torch.device) -> Iterator[CardClock | None]:
    """Inside, the card's time in decoding is measured; None on a CPU."""
    if device.type != "cuda":
        yield None
        return
    clock = CardClock()
    plain_replay, plain_forward = DecodeStep.replay, Llama.forward

    def replay(step: DecodeStep) -> None:
        clock.around("replay", lambda: plain_replay(step))

    def forward(model: Llama, *args: Any, **options: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            return plain_forward(model, *args, **options)
        return clock.around("forward", lambda: plain_forward(model, *args, **options))

    with (
        mock.patch.object(DecodeStep, "replay", replay),
        mock.patch.object(Llama, "forward", forward),
    ):
        yield clock


def decode(model: Llama, case: DecodeCase) -> dict[str, Any]:
    """Speeds and answers of one kind of decoding, with the sampler's counts as `stats`.

    `tokens_s` is decoding alone; `useful_tokens_s` all new tokens over all seconds but those of
    capturing, prefill and the host's work included. On a GPU these seconds are divided: `replay_s`
    and `forward_s` are the card's (`CardClock`), `rest_s` is what remains, in which it waits.
    """
    generator = torch.Generator().manual_seed(2)
    vocab = model.config.vocab_size
    requests, short_requests = [], []
    for i, (length, new) in enumerate(case.lengths()):
        prompt = torch.randint(vocab, (length,), generator=generator).tolist()
        requests.append(Request(f"r{i}", prompt, new, expected_tokens=new))
        if i < max(case.rows, 2):
            short_requests.append(Request(f"r{i}", prompt, 3))
    config = SamplerConfig(
        rows=case.rows,
        max_new_tokens=max(request.max_new_tokens for request in requests),
        draft="off",
        invariant=case.invariant,
        graphs=case.graphs,
        **SETTINGS[case.setting],
    )
    lora = random_adapter(model, case.adapter)
    run_requests(model, config, lora, short_requests)  # compiles
    with card_clock(model.device) as clock:
        answers, seconds, stats = run_requests(model, config, lora, requests)
    seconds -= stats.capture_seconds
    decoded = stats.new_tokens - len(requests)  # prefill gave each sequence its first token
    result = {
        "tokens_s": decoded / stats.decode_seconds,
        "ms_per_step": 1e3 * stats.decode_seconds / stats.steps,
        "prefill_tokens_s": stats.prompt_tokens / stats.prefill_seconds,
        "useful_tokens_s": stats.new_tokens / seconds,
        "new_tokens": stats.new_tokens,
        "seconds": seconds,
        "decode_s": stats.decode_seconds,
        "prefill_s": stats.prefill_seconds,
        "mean_rows": stats.sequence_steps / stats.steps,
        "preempted": stats.preempted,
        "answers": [answers[request.id] for request in requests],
        "stats": stats,
    }
    if clock is not None:
        replays, forwards = clock.seconds("replay"), clock.seconds("forward")
        rest = seconds - replays - forwards
        result |= {"replay_s": replays, "forward_s": forwards, "rest_s": rest}
    return result


def run_requests(
    model: Llama, config: SamplerConfig, lora: Lora | None, requests: list[Request]
) -> tuple[dict[str, list[int]], float, Any]:
    """Answers by id, the seconds of sampling them, and the sampler's counts."""
    with Sampler(model, lambda ids: "", (), config, lora) as sampler:
        started = time.perf_counter()
        answers = {done.id: done.ids for done in sampler.run(requests)}
        return answers, time.perf_counter() - started, sampler.stats


def equal_rows(answers: list[list[int]], others: list[list[int]]) -> int:
    """Number of sequences with the same tokens in both."""
    return sum(map(operator.eq, answers, others))
