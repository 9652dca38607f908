"""One optimizer step, from examples to new weights; every gradient is written down (model/llama.py)

    step_gradients   1. share the examples out over the ranks by tokens, pack this rank's share
                     2. micro_step for each micro-batch
    micro_step          hidden = forward(tokens, tape)
                        nll, dselected = nll of the positions whose next token is a response token
                        backward(dhidden)       adds the gradient of the summed nll to lora.grads
    step_update      3. sum the gradients over the ranks, divide by the response tokens of the
                        whole step, clip by their norm, AdamW

The loss is the mean over the response tokens of the whole step, however they are divided into
micro-batches and ranks. Nothing here synchronises with the device: loss and norm stay on it until
`Metrics.flush` reads them.
"""

# T = tokens of a micro-batch, N = response tokens of a micro-batch, D = model width

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

SINGLE_PROCESS = World()


@dataclass
class Gradients:
    """Result of the forward and backward of a step, beside `lora.grads`."""

    nll: Tensor  # (N of all micro-batches of this rank,) nats
    owners: list[str]  # example id of each
    n_response: int  # response tokens of the step, all ranks together


@dataclass
class StepResult:
    """Result of a step; the tensors are on the device."""

    loss: Tensor  # () fp64, nats per response token, all ranks together
    norm: Tensor  # () fp64, of the gradient before clipping
    gradients: Gradients


def step_gradients(
    model: Llama,
    lora: Lora,
    examples: Sequence[Example],
    step: int,
    micro_tokens: int,
    policy: str,
    world: World = SINGLE_PROCESS,
) -> Gradients:
    """Phases 1 and 2: forward and backward of this rank's share of the examples.

    step: number of this optimizer step, which dropout masks depend on. micro_tokens: tokens of a
    micro-batch. policy: recomputation in the backward (model/tape.py).
    """
    # 1. share by tokens, pack
    n_response = sum(len(e.ids) - e.n_prompt for e in examples)
    rank_examples = [
        [examples[i] for i in indices]
        for indices in shares([len(e.ids) for e in examples], world.size)
    ]
    rank_batches = [pack([len(e.ids) for e in each], micro_tokens) for each in rank_examples]
    own_examples = rank_examples[world.rank]
    own_batches = rank_batches[world.rank]
    # a dropout mask belongs to one row, so a prefix can be shared only without dropout
    share_prefix = model.device.type in model.ops.shares_prefix and not lora.config.dropout

    # 2. forward and backward of every micro-batch
    lora.grads.zero_()
    nlls = [lora.grads.new_empty(0)]
    owners: list[str] = []
    for indices in own_batches:
        chosen = [own_examples[i] for i in indices]
        batch = MicroBatch.build(chosen, step, model.device, share_prefix)
        nlls.append(micro_step(model, lora, batch, policy))
        owners += batch.owners
    if model.is_sharded:  # every rank must gather the layers equally often
        most_batches = max(len(batches) for batches in rank_batches)
        for _ in range(most_batches - len(own_batches)):
            micro_step(model, lora, MicroBatch.idle(step, model.device), policy)
    return Gradients(torch.cat(nlls), owners, n_response)


def micro_step(model: Llama, lora: Lora, batch: MicroBatch, policy: str) -> Tensor:
    """Forward, loss and backward of one micro-batch.

    Returns nll (N,) in nats; adds the gradient of its sum to `lora.grads`.
    """
    tape = Tape(policy)
    hidden = model.forward(batch.tokens, batch.packed, lora=lora, tape=tape)  # (T, D)
    nll, dselected = model.nll(hidden[batch.select], batch.targets)  # (N,), (N, D)
    dhidden = torch.zeros_like(hidden).index_copy_(0, batch.select, dselected)  # (T, D)
    model.backward(dhidden, tape)
    return nll


def step_update(
    model: Llama,
    lora: Lora,
    optimizer: Optimizer,
    gradients: Gradients,
    lr: float,
    clip: float,
    world: World = SINGLE_PROCESS,
) -> StepResult:
    """Phase 3: one all-reduce, one norm and one AdamW over the flat buffer.

    lr: learning rate of this step. clip: largest gradient norm, 0 to not clip.
    """
    world.all_reduce_sum_(lora.grads)
    loss_sum = world.all_reduce_sum_(gradients.nll.sum(dtype=torch.float64))
    scale = 1 / gradients.n_response
    norm = optimizer.update(model.ops, lora, lr, scale, clip)
    return StepResult(loss_sum * scale, norm, gradients)
