"""A sampler that answers at once, to measure what lies around sampling

    with answered_at_once(): distill_file(...)

Every answer is the text of its request's draft source, the reference, without its first token. It
costs nothing and needs no weights. As with the sampler, answers come in another order than that of
the requests: the last of those that run together first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig, SamplerStats
from model.llama import Llama

TOGETHER = 32  # requests that are answered together


class InstantSampler:
    """What distillation uses of `Sampler`. A context manager."""

    def __init__(self, model: Llama, config: SamplerConfig) -> None:
        self.owner = model
        self.config = config.for_device("cpu")
        self.stats = SamplerStats()
        self.scheduler = SimpleNamespace(running=[])
        self.waiting: list[Request] = []

    def __enter__(self) -> InstantSampler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def drain(self) -> None:
        """Answer no further request."""
        self.waiting.clear()

    def run(self) -> Iterator[Completion]:
        """The answers to all requests, also to those that are submitted meanwhile."""
        while self.waiting:
            together = self.waiting[:TOGETHER]
            del self.waiting[:TOGETHER]
            for request in reversed(together):
                ids = list(request.draft_source[1:])
                self.stats.new_tokens += len(ids)
                yield Completion(
                    id=request.id,
                    sample=request.sample,
                    ids=ids,
                    text="",
                    finish="stop",
                    logprobs=[],
                    prompt_tokens=len(request.prompt),
                )


@contextlib.contextmanager
def answered_at_once() -> Iterator[None]:
    """Inside `with`, ChatGenerator opens an InstantSampler."""

    def sampler(generator: ChatGenerator) -> InstantSampler:
        return InstantSampler(generator.model, generator.sampling)

    with mock.patch.object(ChatGenerator, "sampler", sampler):
        yield
