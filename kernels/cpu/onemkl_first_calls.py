"""The first call of each of torch's vector functions on a CPU, made on one thread

oneMKL 2024.2, which torch's wheels for x86 bring, chooses how it computes a function (sqrt, exp,
cos, ...) at its first call. If that call is shared among threads, one of them may compute its share
in a form that errs by a thousand ulp (pytorch issue 188792). Without this module half of the rotary
angles were that wrong in one process of ten, and a distillation that was killed and resumed
differed from one that was not.

Importing this module makes every first call, for all functions that we use.
"""

import torch

FUNCTIONS = ("cos", "sin", "exp", "log", "sqrt", "rsqrt")  # all that we use

for dtype in (torch.float32, torch.float64):
    for name in FUNCTIONS:
        getattr(torch, name)(torch.ones(16, dtype=dtype))  # few numbers: computed on one thread
