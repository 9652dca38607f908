"""The memory plan: what a training step will hold at its peak, before it runs

    peak = held already + adapter + saved + work
    held      what the process or the device holds now: weights, interpreter
    adapter   params, gradients, two moments; the compute copy where the model is 16-bit
    saved     per layer and token, from the forward to the backward (policies: model/llama.py)
                none       D + qkv + H d + D + 2F    and S, lse, the norms' rstd
                selective  the same without 2F       full       D
    work      the larger of   the head     a chunk of logits and of its gradient
                              a layer      of the backward, with what is computed again

Llama-2-7B at 8,192 tokens in bf16 saves 763 MB a layer, or 24.4 GB: the plan prints such numbers
for any model by arithmetic alone (`python -m benchmarks.memory`).
"""

# D = model width, F = feed-forward width, H = query heads, d = head size

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.runtime.process_memory import free_memory, held_memory
from kernels.attention.torch_form import PACKED_BLOCK
from kernels.linear_cross_entropy import CHUNK_BYTES
from model.config import LlamaConfig
from model.layout import GROUPS
from model.lora import LoraConfig, adapter_shapes
from model.tape import POLICIES

# what the libraries of a CPU take when they first compute (pages of code, packed operands);
# measured beside the plan by benchmarks/memory.py
LIBRARIES = {"cpu": 250 << 20, "cuda": 0}
SLACK = 1.05  # what an allocator loses to the gaps between tensors of changing sizes


@dataclass(frozen=True)
class Plan:
    """The predicted peak of one policy, in bytes."""

    policy: str
    held: int
    adapter: int
    saved: int
    work: int

    @property
    def total(self) -> int:
        return self.held + self.adapter + round(SLACK * (self.saved + self.work))

    def text(self) -> str:
        """One line for people."""
        parts = (f"{name} {getattr(self, name) / 1e9:.2f}" for name in ("held", "adapter", "saved"))
        return (
            f"recompute {self.policy}: predicted peak {self.total / 1e9:.2f} GB "
            f"({', '.join(parts)}, work {self.work / 1e9:.2f})"
        )


def saved_per_token(config: LlamaConfig, policy: str, dtype: torch.dtype, ranks: int) -> int:
    """Bytes that a layer keeps of a token; `ranks` is the width of all S of a layer."""
    c, wide = config, max(4, dtype.itemsize)
    width = c.hidden_size
    numbers = 1
    if policy != "full":
        width += sum(c.qkv_sizes) + c.qkv_sizes[0] + c.hidden_size + ranks
        numbers += 1 + c.num_heads
    if policy == "none":
        width += 2 * c.intermediate_size
    return width * dtype.itemsize + numbers * wide


def predict(
    config: LlamaConfig,
    lora: LoraConfig,
    policy: str,
    *,
    tokens: int,  # of the largest micro-batch
    longest: int,  # tokens of its longest row
    response: int,  # of its tokens, those with loss
    dtype: torch.dtype,
    device: str = "cpu",
    held: int = 0,  # bytes
) -> Plan:
    """The peak of a step whose largest micro-batch is of that size."""
    c, wide = config, max(4, dtype.itemsize)
    parameters = sum(a * b for a, b in adapter_shapes(lora, c).values())
    copy = dtype.itemsize if dtype.itemsize < 4 else 0
    adapted = lora.module_names()
    ranks = lora.rank * sum(m in adapted for members in GROUPS.values() for m in members)
    saved = c.num_layers * tokens * saved_per_token(c, policy, dtype, ranks)

    # the head: hidden states and their gradient, the chunk of logits (in 16 bits: its copy too)
    chunk = min(CHUNK_BYTES[device], response * c.vocab_size * wide)
    chunk += chunk // 2 * (dtype.itemsize < 4)
    head = tokens * 2 * c.hidden_size * dtype.itemsize + chunk
    head += 2 * response * c.hidden_size * dtype.itemsize

    # a layer: hidden states, their gradient and the residual's, two norms' outputs; then the
    # SwiGLU pass with its temporaries, or do, dqkv and what the qkv product gives back
    qkv = sum(c.qkv_sizes)
    feed = (4 + ("mlp.gate_proj" in adapted or "mlp.up_proj" in adapted)) * c.hidden_size
    feed += (4 + ("mlp.down_proj" in adapted)) * c.intermediate_size
    attend = 6 * c.hidden_size + c.qkv_sizes[0] + qkv
    scores = 3 * c.num_heads * min(longest, PACKED_BLOCK[device]) * longest * wide
    again = {"none": 0, "selective": 2 * c.intermediate_size}.get(policy)
    if again is None:
        again = qkv + c.qkv_sizes[0] + c.hidden_size + 2 * c.intermediate_size
    busy = max(tokens * dtype.itemsize * feed, tokens * dtype.itemsize * attend + scores)
    layer = busy + tokens * dtype.itemsize * again
    layer += response * c.hidden_size * dtype.itemsize
    held += LIBRARIES[device]
    return Plan(policy, held, parameters * (16 + copy), saved, max(head, layer))


def available(device: str | torch.device) -> int:
    """Bytes this process may reach: what it holds, and what it can still take."""
    return held_memory(device) + free_memory(device)


def choose_policy(
    asked: str,
    memory_gb: float,
    config: LlamaConfig,
    lora: LoraConfig,
    device: str | torch.device,
    **sizes: int | torch.dtype,
) -> Plan:
    """The policy asked for; for `auto` the least recomputation that fits into memory_gb.

    memory_gb 0 is what `available` says. ValueError where nothing fits, with what would.
    """
    kind = torch.device(device).type
    plans = [predict(config, lora, policy, device=kind, **sizes) for policy in POLICIES]
    if asked != "auto":
        return plans[POLICIES.index(asked)]
    limit = memory_gb * 1e9 or available(device)
    fitting = [plan for plan in plans if plan.total <= limit]
    if not fitting:
        least = plans[-1]
        if least.held + least.adapter > limit:
            helps = "the model and the adapter alone need more: take a smaller model"
            if least.adapter > limit / 10:
                helps += ", or lower --rank"
        elif sizes["tokens"] > sizes["longest"]:
            helps = "lower --micro-tokens"
        else:  # one row by itself
            helps = f"lower --max-length: one row has {sizes['longest']} tokens"
        raise ValueError(
            f"even with --recompute full a step of {sizes['tokens']} tokens needs "
            f"{least.total / 1e9:.2f} GB, {limit / 1e9:.2f} GB may be used; {helps}"
        )
    return fitting[0]
