"""torch's vector mathematics on a CPU, called once on one thread before threads share a call out

oneMKL 2024.2, which torch's wheels for x86 bring, chooses how it computes a function (sqrt, exp,
cos, ...) when it is first called. Where that first call is shared out over threads, one of them may
take a form that errs by a thousand ulp for its share (pytorch issue 188792). Here the rotary angles
of half of the positions were that wrong in one process of ten, and a resumed distillation no longer
the one that was killed. To import this module is to have made every first call.
"""

import torch

FUNCTIONS = ("cos", "sin", "exp", "log", "sqrt", "rsqrt")  # all that we use

for dtype in (torch.float32, torch.float64):
    for name in FUNCTIONS:
        getattr(torch, name)(torch.ones(16, dtype=dtype))
