"""The memory plan: the bytes that a training step will hold at its peak, before it runs

    peak = held + adapter + SLACK (saved + work)
    held      held by the process or the device now: weights, interpreter
    adapter   parameters, gradients, two moments; the compute copy where the model is 16-bit
    saved     per layer and token, from the forward to the backward (policies: model/tape.py)
                none       D + qkv + H d + D + 2F    and S, lse, the norms' rstd
                selective  the same without 2F
                full       D
    work      the larger of   the head     a chunk of logits and of its gradient
                              a layer      of the backward, with the recomputed tensors

Llama-2-7B at 8,192 tokens in bf16 saves 763 MB a layer, or 24.4 GB: the plan prints such numbers
for any model by arithmetic alone (`python -m benchmarks.memory`).

The same arithmetic sets the tokens of a micro-batch on a GPU (`micro_batches`): the most
that fit GPU_SHARE of the whole card. Not of what is free now: the size changes sums in their last
bits, so the same job on the same card always gets the same one.
"""

# T = tokens of the micro-batch, N = response tokens of it, D = model width, F = feed-forward width
# H = query heads, d = head size, qkv = width of queries, keys and values together

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.runtime.process_memory import free_memory, held_memory, total_memory
from kernels.attention.torch_form import PACKED_BLOCK
from kernels.linear_cross_entropy import CHUNK_BYTES
from model.config import LlamaConfig
from model.lora import LoraConfig, adapter_shapes
from model.tape import POLICIES

# bytes that a CPU's libraries take when they first compute (pages of code, packed operands),
# measured by benchmarks/memory.py
LIBRARIES = {"cpu": 250 << 20, "cuda": 0}
# automatic tokens of a micro-batch: on a GPU the first of these that fits
CPU_MICRO_TOKENS = 1024
GPU_MICRO_TOKENS = (16384, 8192, 4096, 2048, 1024)
GPU_SHARE = 0.9  # of a GPU's memory to plan for; the driver and gaps take the rest
NORM_TEMPORARIES = 4  # of the size of q and k, in torch's form of kernels/norm_rope.py
SLACK = 1.05  # an allocator's loss to the gaps between tensors of changing sizes


@dataclass(frozen=True)
class StepSize:
    """The largest micro-batch of a step, which decides the step's peak."""

    tokens: int  # T
    longest: int  # tokens of its longest row
    response: int  # N: of its tokens, those with loss
    dtype: torch.dtype  # of the model


@dataclass(frozen=True)
class MemoryPlan:
    """The predicted peak of one recomputation policy, in bytes."""

    policy: str
    held: int
    adapter: int
    saved: int
    work: int

    @property
    def total(self) -> int:
        """The peak in bytes."""
        return self.held + self.adapter + round(SLACK * (self.saved + self.work))

    def text(self) -> str:
        """One line for the terminal."""
        return (
            f"recompute {self.policy}: predicted peak {self.total / 1e9:.2f} GB "
            f"(held {self.held / 1e9:.2f}, adapter {self.adapter / 1e9:.2f}, "
            f"saved {self.saved / 1e9:.2f}, work {self.work / 1e9:.2f})"
        )


def saved_per_token(config: LlamaConfig, policy: str, dtype: torch.dtype, ranks: int) -> int:
    """Bytes that a layer saves per token; `ranks` is the width of all S of a layer."""
    heads_width = config.qkv_sizes[0]  # H d
    qkv_width = sum(config.qkv_sizes)
    width = config.hidden_size  # the residual stream at the layer's entry, in dtype
    statistics = 1  # numbers in the accumulation type: rstd, lse
    if policy != "full":
        width += qkv_width + heads_width + config.hidden_size + ranks
        statistics += 1 + config.num_heads
    if policy == "none":
        width += 2 * config.intermediate_size
    return width * dtype.itemsize + statistics * max(4, dtype.itemsize)


def predict(
    config: LlamaConfig,
    lora: LoraConfig,
    policy: str,
    size: StepSize,
    device: str = "cpu",
    held: int = 0,
) -> MemoryPlan:
    """The peak of a step of this size under a policy.

    device: its type. held: bytes that the process or the device holds before the step.
    """
    itemsize = size.dtype.itemsize
    shapes = adapter_shapes(lora, config).values()
    parameters = sum(rows * columns for rows, columns in shapes)
    compute_copy = itemsize if itemsize < 4 else 0
    adapted = lora.module_names()
    ranks = lora.rank * len(adapted)
    per_token = saved_per_token(config, policy, size.dtype, ranks)
    head = _head_work(config, size, device)
    layer = _layer_work(config, adapted, policy, size, device)
    return MemoryPlan(
        policy=policy,
        held=held + LIBRARIES[device],
        adapter=parameters * (16 + compute_copy),  # four fp32 buffers, the copy
        saved=config.num_layers * size.tokens * per_token,
        work=max(head, layer),
    )


def _head_work(config: LlamaConfig, size: StepSize, device: str) -> int:
    """Bytes of the loss: hidden states and their gradient, a chunk of logits."""
    itemsize = size.dtype.itemsize
    all_logits = size.response * config.vocab_size * max(4, itemsize)
    chunk = min(CHUNK_BYTES[device], all_logits)
    if itemsize < 4:
        chunk += chunk // 2  # its 16-bit copy
    hidden = 2 * size.tokens * config.hidden_size * itemsize  # 2 (T, D)
    selected = 2 * size.response * config.hidden_size * itemsize  # 2 (N, D)
    return hidden + chunk + selected


def _layer_work(
    config: LlamaConfig, adapted: Collection[str], policy: str, size: StepSize, device: str
) -> int:
    """Bytes of a layer's backward: the larger of its two halves, with the recomputed tensors.

    Both halves hold the hidden states, their gradient and the residual's, and two norms' outputs.
    """
    D = config.hidden_size
    F = config.intermediate_size
    heads_width = config.qkv_sizes[0]  # H d
    qkv_width = sum(config.qkv_sizes)
    itemsize = size.dtype.itemsize
    one_column = size.tokens * itemsize  # bytes of one number a token

    # the feed-forward half: SwiGLU with its temporaries, inputs of adapted products once more
    model_widths = 5 if "mlp.gate_proj" in adapted or "mlp.up_proj" in adapted else 4
    feed_widths = 5 if "mlp.down_proj" in adapted else 4
    feed_forward = one_column * (model_widths * D + feed_widths * F)

    # the attention half: do, dqkv, the gradient of the qkv product; a block of scores
    block = min(size.longest, PACKED_BLOCK[device])
    scores = 3 * config.num_heads * block * size.longest * max(4, itemsize)
    attention = one_column * (6 * D + heads_width + qkv_width) + scores
    if config.qk_norm:
        # q and k are rotated again from the plain ones; torch's form of their norm has temporaries,
        # when the scores are gone
        attention += one_column * qkv_width
        if device == "cpu":
            normed = size.tokens * (qkv_width - config.qkv_sizes[2]) * max(4, itemsize)
            attention += max(0, NORM_TEMPORARIES * normed - scores)

    recomputed_width = {
        "none": 0,
        "selective": 2 * F,
        "full": qkv_width + heads_width + D + 2 * F,
    }[policy]
    recomputed = one_column * recomputed_width
    selected = size.response * D * itemsize  # (N, D), the loss's gradient
    return max(feed_forward, attention) + recomputed + selected


def available(device: str | torch.device) -> int:
    """Bytes this process may reach: those it holds, and those it can still take."""
    return held_memory(device) + free_memory(device)


@dataclass(frozen=True)
class Job:
    """What the size of micro-batches follows from, beside the device."""

    model: LlamaConfig
    lora: LoraConfig
    dtype: torch.dtype  # of the model
    longest: int  # tokens of the longest row
    batch_rows: int  # rows of an optimizer step
    recompute: str  # the requested policy, or auto


class MicroBatches(NamedTuple):
    """The tokens of a micro-batch that were chosen, and the peak predicted for them."""

    tokens: int
    plan: MemoryPlan


def micro_batches(job: Job, limit: float, held: int) -> MicroBatches:
    """The largest micro-batches whose predicted peak is at most `limit` bytes of a GPU.

    The least recomputation comes first: 1,024 tokens that keep everything rather than 16,384 of
    which a part is computed twice. Where nothing fits, the smallest under the strongest policy.

    held: bytes of the weights, and of what else is held during a step.
    """
    policies = POLICIES if job.recompute == "auto" else (job.recompute,)
    tokens_of_step = job.batch_rows * job.longest  # at most
    for policy in policies:
        for micro_tokens in GPU_MICRO_TOKENS:
            tokens = min(max(micro_tokens, job.longest), tokens_of_step)
            # all of them with loss, at most
            size = StepSize(tokens, job.longest, response=tokens, dtype=job.dtype)
            plan = predict(job.model, job.lora, policy, size, "cuda", held)
            if plan.total <= limit:
                return MicroBatches(micro_tokens, plan)
    return MicroBatches(micro_tokens, plan)


def automatic_micro_tokens(
    job: Job, device: str | torch.device, memory_gb: float, held: int
) -> tuple[int, str]:
    """The tokens of a micro-batch on a device of this machine, and why, in words.

    memory_gb: what the user allows a GPU to be filled with; 0 stands for GPU_SHARE of all it has.
    """
    if torch.device(device).type == "cpu":
        return CPU_MICRO_TOKENS, "automatic on a CPU"
    limit = memory_gb * 1e9 or GPU_SHARE * total_memory(device)
    chosen = micro_batches(job, limit, held)
    peak = f"{chosen.plan.total / 1e9:.2f} of {limit / 1e9:.2f} GB"
    return chosen.tokens, f"automatic: at most {peak} with recompute {chosen.plan.policy}"


def choose_policy(
    requested: str,
    memory_gb: float,
    config: LlamaConfig,
    lora: LoraConfig,
    size: StepSize,
    device: str | torch.device,
    held: int = 0,
) -> MemoryPlan:
    """The plan of the requested policy; for `auto` the least recomputation that fits memory_gb.

    memory_gb: 0 stands for `available`. held: bytes held before the step. ValueError where no
    policy fits, with the setting that would help.
    """
    device_type = torch.device(device).type
    if requested != "auto":
        return predict(config, lora, requested, size, device_type, held)
    limit = memory_gb * 1e9 if memory_gb else available(device)
    plans = [predict(config, lora, policy, size, device_type, held) for policy in POLICIES]
    for plan in plans:
        if plan.total <= limit:
            return plan
    smallest = plans[-1]
    raise ValueError(
        f"even with --recompute full a step of {size.tokens} tokens needs "
        f"{smallest.total / 1e9:.2f} GB, {limit / 1e9:.2f} GB may be used; "
        f"{_advice(smallest, limit, size)}"
    )


def _advice(smallest: MemoryPlan, limit: float, size: StepSize) -> str:
    """The setting to lower where no policy fits within `limit` bytes."""
    if smallest.held + smallest.adapter > limit:
        advice = "the model and the adapter alone need more: take a smaller model"
        if smallest.adapter > limit / 10:
            advice += ", or lower --rank"
        return advice
    if size.tokens > size.longest:
        return "lower --micro-tokens"
    return f"lower --max-length: one row has {size.longest} tokens"
