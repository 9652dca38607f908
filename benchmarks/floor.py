"""The arithmetic floor of sampling and scoring: no engine of this design can be faster here.

    generation =  2 (T L + R H) / F                                 prompts
               +  sum over steps of max(2 B (L + H) / F, W / M)
               +  sum over decoded tokens of (context x bytes of keys and values per token) / M
    scoring    =  2 (T L + A (L + H)) / F

F is the measured fp32 product rate (operations/s), M the measured read rate (bytes/s). L are the
weights of the linear layers, H those of lm_head. T are the prompt tokens to compute: the common
prefix of a run's prompts counts once (scoring: a row's prompt counts once for both its answers).
R rows need lm_head once each for their first token. B sequences are decoded in a step, each getting
one token from one forward; the weights (W bytes as they are packed, 4 each in fp32) are read once a
step where that takes longer than the products. A are the answer tokens of a scoring run. A row's n
new tokens, end token included, take n - 1 decoded tokens: the first comes from the prompt.

Left out as small: attention's own arithmetic, norms, sampling. Accepted draft tokens share one
reading of the weights, so that a run with drafts and few rows may go beyond 100 % of this floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from engine.sampling.page_pool import common_prefix, shared_tokens
from kernels.cpu import native
from kernels.cpu.prepack import linear, prepack
from model.config import LlamaConfig

FLOAT = 4  # bytes


def ceilings(seconds: float = 1.0) -> dict[str, float]:
    """The best fp32 product rate (operations/s) and read rate (bytes/s) of this machine now.

    Products are tried in MKL's, oneDNN's prepacked and our form, reads as a sum and a dot product.
    """
    n, size = 2048, 1 << 28  # 1 GiB of floats: more than any cache holds
    a, b = torch.randn(n, n), torch.randn(n, n)
    forms = [b, prepack(b)]
    if native.why_unavailable() is None:
        forms.append(prepack(b, panels=True))
    product, x = min(_fastest(lambda w=w: linear(a, w), seconds) for w in forms), torch.ones(size)
    read = min(_fastest(x.sum, seconds), _fastest(lambda: x.dot(x), seconds))
    return {"flops": 2 * n**3 / product, "bytes": FLOAT * size / read}


def _fastest(fn: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into so many seconds."""
    fn()
    best, until = float("inf"), time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        fn()
        best = min(best, time.perf_counter() - started)
    return best


def weights(c: LlamaConfig) -> tuple[int, int]:
    """Weights of the linear layers, and of lm_head."""
    layer = c.hidden_size * (sum(c.qkv_sizes) + c.qkv_sizes[0] + 3 * c.intermediate_size)
    return c.num_layers * layer, c.vocab_size * c.hidden_size


def computed_prompt_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Prompt tokens to compute if the common prefix is computed once."""
    prefix = common_prefix(prompts)
    total = len(prefix)
    for prompt in prompts:
        total += len(prompt) - shared_tokens(prefix, prompt)
    return total


def running_per_step(new: Sequence[int], rows: int) -> Iterator[int]:
    """Rows of each decode step when at most `rows` run together, the longest begun first."""
    waiting = sorted(n - 1 for n in new if n > 1)
    running: list[int] = []
    while waiting or running:
        while waiting and len(running) < rows:
            running.append(waiting.pop())
        yield len(running)
        running = [n - 1 for n in running if n > 1]


def generation_floor(
    c: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    new: Sequence[int],
    rows: int,
    rates: dict[str, float],
    weight_bytes: int = 0,
) -> float:
    """Seconds for prompts and their so many new tokens, end tokens included.

    weight_bytes: of all matrices that a step reads; 0 for 4 a weight.
    """
    layers, head = weights(c)
    size = weight_bytes or FLOAT * (layers + head)
    flops, read = rates["flops"], rates["bytes"]
    seconds = 2 * (computed_prompt_tokens(prompts) * layers + len(prompts) * head) / flops
    for b in running_per_step(new, rows):
        seconds += max(2 * b * (layers + head) / flops, size / read)
    context = sum(sum(range(len(p) + 1, len(p) + n)) for p, n in zip(prompts, new, strict=True))
    return seconds + context * c.num_layers * 2 * c.qkv_sizes[1] * FLOAT / read


def scoring_floor(c: LlamaConfig, prompt: int, answer: int, rates: dict[str, float]) -> float:
    """Seconds for so many prompt tokens, each row's counted once, and answer tokens."""
    layers, head = weights(c)
    return 2 * ((prompt + answer) * layers + answer * head) / rates["flops"]
