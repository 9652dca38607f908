"""One optimizer step, from examples to new weights; every gradient is written down (model/llama.py)

    1. pack      this process's examples -> micro-batches of at most micro_tokens tokens, in which
                 what all prompts begin with stands once
    2. each      hidden = forward(tokens, tape)
                 nll, d = linear_cross_entropy(hidden where a response token comes next)
                 backward(d)                  adds the gradient of the summed nll into lora.grads
    3. update    grads summed over processes, divided by the response tokens of the whole step,
                 clipped by their norm; AdamW

The loss is the mean over the response tokens of the whole step, whatever the micro-batches and the
processes are.
Nothing here waits for the device: loss and norm stay on it until somebody looks.
"""

# T = tokens of a micro-batch, N = response tokens of it

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data import Example, pack
from engine.distributed import World, shares
from engine.optim import Optimizer
from kernels.context import Packed, upload
from kernels.philox import MASK32, mix
from model.config import LlamaConfig
from model.llama import Llama, Tape
from model.lora import Lora

ALONE = World()
SHARED = 8  # tokens from which on a common prefix is computed once


# dense bf16 rates that vendors state, operations/s; by a part of the card's name
STATED = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "MI300X": 1307e12}


def stated_rate(device: str) -> float | None:
    """The rate of a card by its name, None where none is stated here."""
    return next((rate for name, rate in STATED.items() if name in device), None)


def step_operations(config: LlamaConfig, lengths: Sequence[int]) -> float:
    """What a step must do: 4 P per token, and 7 L^2 H d per row of L tokens and layer.

    A LoRA step has no weight gradients: forward and gradient of the activations are two products
    each way, P the weights without the embedding. Attention: 2 products forward and 5 backward over
    half a square.
    """
    c = config
    layer = c.hidden_size * (sum(c.qkv_sizes) + c.qkv_sizes[0] + 3 * c.intermediate_size)
    weights = c.num_layers * layer + c.vocab_size * c.hidden_size
    squares = sum(n * n for n in lengths)
    return 4 * weights * sum(lengths) + 7 * squares * c.qkv_sizes[0] * c.num_layers


@dataclass
class MicroBatch:
    """Packed examples and where their loss is."""

    tokens: Tensor  # (T,)
    packed: Packed
    select: Tensor  # (N,) positions whose next token is a response token
    targets: Tensor  # (N,) that token
    owners: list[str]  # (N,) example id of each, to name a row that went wrong

    @classmethod
    def build(
        cls, examples: Sequence[Example], step: int, device: torch.device, share: bool = False
    ) -> MicroBatch:
        """Lay the examples end to end; their last tokens are targets only.

        With `share` the tokens that all prompts begin with (a system message, a template) stand
        there once, in the first example.
        """
        prefix = common_prefix(examples) if share else 0
        tokens, select, targets, owners = [], [], [], []
        for i, example in enumerate(examples):
            known = prefix * (i > 0)
            start = len(tokens) - known
            tokens += example.ids[known:-1]
            for at in range(example.n_prompt, len(example.ids)):
                select.append(start + at - 1)
                targets.append(example.ids[at])
                owners.append(example.id)
        lengths = [len(e.ids) - 1 - prefix * (i > 0) for i, e in enumerate(examples)]
        keys = [mix("row", e.id) & MASK32 for e in examples]
        packed = Packed.from_lengths(lengths, device, keys, step, prefix)
        ids, places, wanted = (upload(v, torch.int64, device) for v in (tokens, select, targets))
        return cls(ids, packed, places, wanted, owners)

    @classmethod
    def idle(cls, step: int, device: torch.device) -> MicroBatch:
        """A token without loss: a process takes part in what the others gather, and weighs zero."""
        tokens, nothing = (torch.zeros(n, dtype=torch.int64, device=device) for n in (1, 0))
        return cls(tokens, Packed.from_lengths([1], device, [0], step), nothing, nothing, [])


def common_prefix(examples: Sequence[Example]) -> int:
    """Tokens that all prompts begin with, 0 where they are too few to matter.

    Every prompt keeps a token of its own: the last one predicts the first of the response.
    """
    first, last = (f(e.ids[: e.n_prompt - 1] for e in examples) for f in (min, max))
    pairs = zip(first, last, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))
    return common if common >= SHARED and len(examples) > 1 else 0


def micro_step(model: Llama, lora: Lora, batch: MicroBatch, policy: str) -> Tensor:
    """Forward, loss, backward of one micro-batch: nll (N,); adds sum-of-nll gradients to lora."""
    tape = Tape(policy)
    hidden = model.forward(batch.tokens, batch.packed, lora=lora, tape=tape)
    nll, dselected = model.nll(hidden[batch.select], batch.targets)
    dhidden = torch.zeros_like(hidden).index_copy_(0, batch.select, dselected)
    model.backward(dhidden, tape)
    return nll


@dataclass
class Gradients:
    """What forward and backward of a step leave behind, beside `lora.grads`."""

    nll: Tensor  # (N of all micro-batches of this process,) nats
    owners: list[str]  # example id of each
    response: int  # response tokens of the step, all processes together


@dataclass
class StepResult:
    """What a step leaves behind, on the device."""

    loss: Tensor  # () fp64, nats per response token, all processes together
    norm: Tensor  # () fp64, of the gradient before clipping
    gradients: Gradients


def step_gradients(
    model: Llama,
    lora: Lora,
    examples: Sequence[Example],
    step: int,
    micro_tokens: int,
    policy: str,
    world: World = ALONE,
) -> Gradients:
    """Phases 1 and 2: this process's share of the examples, forward and backward."""
    # 1. share by tokens, pack
    response = sum(len(e.ids) - e.n_prompt for e in examples)
    dealt = [[examples[i] for i in s] for s in shares([len(e.ids) for e in examples], world.size)]
    packs = [pack(each, micro_tokens) for each in dealt]
    mine, places = dealt[world.rank], packs[world.rank]
    idle = max(map(len, packs)) - len(places) if model.sharded else 0
    # a dropout mask belongs to its row
    share = model.device.type in model.ops.shares_prefix and not lora.config.dropout

    # 2. forward and backward of every micro-batch
    lora.grads.zero_()
    nlls, owners = [lora.grads.new_empty(0)], []
    for place in places:
        batch = MicroBatch.build([mine[i] for i in place], step, model.device, share)
        nlls.append(micro_step(model, lora, batch, policy))
        owners += batch.owners
    for _ in range(idle):  # all processes gather the same layers equally often
        micro_step(model, lora, MicroBatch.idle(step, model.device), policy)
    return Gradients(torch.cat(nlls), owners, response)


def step_update(
    model: Llama,
    lora: Lora,
    optimizer: Optimizer,
    gradients: Gradients,
    lr: float,
    clip: float,
    world: World = ALONE,
) -> StepResult:
    """Phase 3: one all-reduce, one norm and one AdamW over the flat buffer."""
    world.sum_(lora.grads)
    loss = world.sum_(gradients.nll.sum(dtype=torch.float64))
    scale = 1 / gradients.response
    norm = optimizer.update(model.ops, lora, lr, scale, clip)
    return StepResult(loss * scale, norm, gradients)
