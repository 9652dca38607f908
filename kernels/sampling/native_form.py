"""Sampling in C (cpu/native/sample.c)."""


# B = rows, V = vocabulary, L = length of the longest history

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.native import at, library
from kernels.philox import uniform
from kernels.sampling.sample_rows import SampleRows
from kernels.sampling.torch_form import penalised

# ---- native: fp32 on a CPU


def sample_native(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """As `sample`, in C (native/sample.c): no whole sort where top_k leaves few tokens."""
    B, V = logits.shape
    z = penalised(logits, rows)
    tokens, logprobs = torch.empty(B, dtype=torch.int64), torch.empty(B)
    places = (rows.positions, rows.samples, rows.row_keys, rows.seed)
    u = uniform(*places) if rows.temperature else torch.zeros(B, dtype=torch.float64)
    outputs = (tokens.data_ptr(), logprobs.data_ptr())
    settings = (rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    library().sample(at(logits), at(z), at(u, torch.float64), *outputs, B, V, *settings)
    return tokens, logprobs
