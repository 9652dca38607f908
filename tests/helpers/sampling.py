"""Requests, decoding settings and a text form for tests that sample."""

from __future__ import annotations

import random

from engine.sampling.requests import Request

SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9}
PENALISED = {"temperature": 1.2, "top_k": 60, "min_p": 0.2, "repetition_penalty": 1.3}


def text(ids):
    """Token ids as text, one character each: enough to test stop strings."""
    return "".join(chr(0x100 + i) for i in ids)


def random_ids(rng, count, vocab):
    """A list of `count` random token ids."""
    return [rng.randrange(vocab) for _ in range(count)]


def random_requests(model, count=12, seed=0, longest=90):
    """Prompts of 1 to `longest` random tokens, limits of 1 to 70 new tokens."""
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        prompt = random_ids(rng, rng.randint(1, longest), model.config.vocab_size)
        max_new_tokens = rng.randint(1, 70)
        requests.append(Request(f"row-{i}", prompt, max_new_tokens))
    return requests
