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

from engine.data.encode import Example
from engine.data.pack import MicroBatch, pack
from engine.runtime.distributed import World, shares
from engine.train.optim import Optimizer
from model.llama import Llama
from model.lora import Lora
from model.tape import Tape

ALONE = World()


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
    idle = max(map(len, packs)) - len(places) if model.is_sharded else 0
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
