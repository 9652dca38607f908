"""Sampling in C (kernels/cpu/native/sample.c), for fp32 on a CPU."""

# B = rows of logits, V = vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.native import at, library
from kernels.philox import uniform
from kernels.sampling.sample_rows import SampleRows
from kernels.sampling.torch_form import penalised


def sample_native(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """As `sample`, in C: no whole sort where top_k leaves few tokens."""
    B, V = logits.shape
    z = penalised(logits, rows)  # (B, V)
    if rows.temperature:
        u = uniform(rows.positions, rows.samples, rows.row_keys, rows.seed)  # (B,) fp64
    else:
        u = torch.zeros(B, dtype=torch.float64)
    tokens = torch.empty(B, dtype=torch.int64)
    logprobs = torch.empty(B)
    library().sample(
        at(logits), at(z), at(u, torch.float64),
        tokens.data_ptr(), logprobs.data_ptr(), B, V,
        rows.temperature, rows.top_k, rows.top_p, rows.min_p,
    )  # fmt: skip
    return tokens, logprobs
