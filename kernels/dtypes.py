"""The precision of sums, in our own code and in cuBLAS."""

from __future__ import annotations

import torch

from kernels.cpu import onemkl_first_calls  # noqa: F401 imported for its effect


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and softmax: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_products_in_fp32() -> None:
    """Have cuBLAS add the partial sums of a 16-bit product in fp32, as every operation promises.

    torch's default lets cuBLAS add them in 16 bits where it splits a long sum (split-K).
    """
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False
