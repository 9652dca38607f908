"""From logits to the next token

    l = logits; l[i] = l[i] / r if l[i] > 0 else l[i] r, once for each i in the history (r is the
    repetition penalty); z = l / temperature; keep the top_k largest; keep the smallest set of
    largest whose probability reaches top_p; drop what is less probable than min_p times the most
    probable; u = philox(seed, row, sample, position) in (0, 1); the token is the first, in order of
    falling probability (ties: lower id first), at which the cumulative probability of what was kept
    exceeds u.        temperature 0: the largest l.

The order is Hugging Face's, whose top-k differs in ties: it keeps all that equal the k-th.
The log-probability returned is that of the chosen token under the plain softmax of the logits.
A row's token depends on its logits, its history, its keys and the settings alone.
-inf is never drawn. A row with NaN or +inf gives some token of the vocabulary.

shapes     logits (B, V)    tokens (B,) int64    logprobs (B,) accumulation dtype
precision  softmax in max(fp32, dtype); l rounded to that; probabilities and their sums in fp64
triton     nothing is sorted. A logit and its id make an integer key, larger where the order above
           is earlier, so that "the k largest", "the set that reaches top_p" and "the token at u"
           each ask for the largest key k for which the count or mass of the keys >= k is enough.
           `_search` finds it: a pass over the row weighs BM keys spread over the interval left.
           A program is alone with its row: stages are what hides the latency of its loads.
           Launches: penalise; largest key and log-sum-exp (greedy ends here); weights; draw.
           The settings are constants of the kernels: a new setting compiles anew.
tiles      one shape class
"""


# B = rows, V = vocabulary, L = length of the longest history

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sampling.sample_rows import SampleRows
from kernels.spec import MODELS, Spec

# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    b, v, *settings = shape
    rows = SampleRows(
        torch.arange(b),
        torch.randint(4, (b,), generator=g),
        torch.randint(-(2**62), 2**62, (b,), generator=g),
        7,
        *settings,
        history=torch.randint(-1, v, (b, v // 3 + 1), generator=g),  # repeats and padding
    )
    logits = (4 * torch.randn(b, v, generator=g, dtype=torch.float64)).round(decimals=1)  # ties
    return {"logits": logits, "rows": rows}


def _run(ops, i: dict) -> dict[str, Tensor]:
    tokens, logprobs = ops.sample(i["logits"], i["rows"])
    return {"tokens": tokens, "logprobs": logprobs}


# greedy, the usual, the whole vocabulary, everything
_SETTINGS = ((), (0.95, 50, 0.7), (1.0, 0, 0.95), (0.95, 50, 0.7, 1.1, 0.05))

SPEC = Spec(
    "sample",
    _make_inputs,
    _run,
    # rows, vocabulary, temperature, top_k, top_p, repetition penalty, min_p
    test_shapes=(
        (5, 300),
        (64, 300, 1.0),
        (64, 300, 0.95, 50, 0.7),
        (64, 300, 0.7, 0, 0.9),
        (8, 40, 1.5, 64),
        (16, 300, 1.0, 1),
        (16, 300, 0.0, 0, 1.0, 1.3),
        (64, 300, 1.2, 0, 1.0, 1.3),
        (64, 300, 1.5, 0, 1.0, 1.0, 0.1),
        (64, 300, 1.1, 40, 0.9, 1.2, 0.05),
        (0, 40, 1.0),
    ),
    bench_shapes=tuple(
        (b, m.V, *settings) for m in MODELS.values() for b in (1, 16, 64) for settings in _SETTINGS
    ),
    floor=1e-5,
    model_shapes=lambda m: ((2, m.V), (2, m.V, 0.95, 50, 0.7)),
    interpreter_shapes=(
        (5, 300),
        (5, 100, 1.0),
        (5, 100, 0.95, 50),
        (5, 100, 0.7, 0, 0.9),
        (5, 100, 0.95, 50, 0.7),
        (3, 40, 1.5, 64),
        (3, 37, 1.0, 1),
        (5, 100, 0.0, 0, 1.0, 1.3),
        (5, 100, 1.2, 0, 1.0, 1.3),
        (5, 100, 1.5, 0, 1.0, 1.0, 0.1),
        (5, 100, 1.1, 40, 0.9, 1.2, 0.05),
        (0, 40, 1.0),
    ),
)
