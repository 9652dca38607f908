"""From logits to the next token

    1. l = logits; once for each id i in the history, l[i] = l[i] / r if l[i] > 0 else l[i] r, with
       the repetition penalty r
    2. z = l / temperature
    3. top_k: keep the k largest
    4. top_p: keep the smallest set of largest whose probability reaches top_p
    5. min_p: drop those less probable than min_p times the most probable
    6. u = philox(seed, row, sample, position) in (0, 1). The token is the first, in order of
       falling probability (ties: lower id first), at which the cumulative probability of those kept
       exceeds u (inverse CDF).
    temperature 0: the id of the largest l.

The order of the steps is Hugging Face's, whose top-k differs in ties: it keeps all that equal the
k-th. The log-probability returned is that of the chosen token under the plain softmax of the
logits. -inf is never drawn. A row with NaN or +inf gives some token of the vocabulary.

shapes     logits (B, V)    tokens (B,) int64    logprobs (B,) accumulation dtype
precision  softmax in max(fp32, dtype); l rounded to that; probabilities and their sums in fp64
traffic    B V logits are read at least twice (softmax, draw)
contract   a row's token depends on its logits, its history, its keys and the settings alone

sample_rows.py     SampleRows: the keys of every row's random number, and the settings
reference.py       the definition, row by row and token by token
torch_form.py      sorts, or takes the top k
native_form.py     C, for fp32 on a CPU
triton_forward.py  the first few hundred tokens of a row; a search over integer keys for the rest
"""

# B = rows of logits, V = vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sampling.sample_rows import SampleRows
from kernels.spec import MODELS, Spec

# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: B, V and the settings of SampleRows from temperature on."""
    B, V, *settings = shape
    positions = torch.arange(B)
    samples = torch.randint(4, (B,), generator=g)
    row_keys = torch.randint(-(2**62), 2**62, (B,), generator=g)
    seed = 7
    history = torch.randint(-1, V, (B, V // 3 + 1), generator=g)  # repeats and padding
    rows = SampleRows(positions, samples, row_keys, seed, *settings, history=history)
    logits = 4 * torch.randn(B, V, generator=g, dtype=torch.float64)
    return {"logits": logits.round(decimals=1), "rows": rows}  # rounded: with ties


def _run(ops, inputs: dict) -> dict[str, Tensor]:
    tokens, logprobs = ops.sample(inputs["logits"], inputs["rows"])
    return {"tokens": tokens, "logprobs": logprobs}


# from temperature on
_BENCH_SETTINGS = (
    (),  # greedy
    (0.95, 50, 0.7),  # the usual
    (1.0, 0, 0.95),  # the whole vocabulary
    (0.95, 50, 0.7, 1.1, 0.05),  # every option
)
_BENCH_ROWS = (1, 16, 64)

SPEC = Spec(
    "sample",
    _make_inputs,
    _run,
    fields=("sample",),
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
        (64, 300, 1.5, 260, 0.9, 1.0, 0.01),  # top_k above triton_forward.FIRST
        (0, 40, 1.0),
    ),
    bench_shapes=tuple(
        (B, m.V, *settings)
        for m in MODELS.values()
        for B in _BENCH_ROWS
        for settings in _BENCH_SETTINGS
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
        (2, 265, 1.5, 258, 0.9, 1.0, 0.01),
        (0, 40, 1.0),
    ),
)
