"""One optimizer step, from examples to new weights; every gradient is written down (model/llama.py)

    step_gradients   1. share the examples out over the ranks by tokens, pack this rank's share
                     2. micro_step for each micro-batch
    micro_step          hidden = forward(tokens, tape)
                        nll, dselected = nll of the positions whose next token is a response token
                        (a weighted loss scales dselected token by token: weighted_loss.py)
                        backward(dhidden)       adds the gradient of the summed nll to lora.grads
    step_update      3. sum the gradients over the ranks, divide by the response tokens of the
                        whole step, clip by their norm, AdamW

The loss is the mean over the response tokens of the whole step, however they are divided into
micro-batches and ranks, and whatever a loss makes them weigh. Nothing here synchronises with the
device: loss and norm stay on it until `Metrics.flush` reads them.
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
from engine.runtime.short_memory import tried_twice
from engine.train.losses import Weighed
from engine.train.optim import Optimizer
from engine.train.weighted_loss import WeightedLoss
from model.llama import Llama
from model.lora import Lora
from model.tape import Tape

SINGLE_PROCESS = World()


@dataclass
class Gradients:
    """Result of the forward and backward of a step, beside the gradient in `lora.grads`."""

    nll: Tensor  # (sum of N over this rank's micro-batches,), nats of each response token
    owners: list[str]  # example id of each response token
    n_response: int  # response tokens of the step, all ranks together
    weighed: Weighed | None = None  # as `nll`; None under plain SFT


@dataclass
class StepResult:
    """Result of a step; the tensors are on the device."""

    loss: Tensor  # () fp64, nats per response token, all ranks together
    norm: Tensor  # () fp64, Euclidean norm of the mean loss's gradient, before clipping
    gradients: Gradients
    # (3,) fp64, means over the response tokens of all ranks: the weighted loss, the weights, the
    # share of tokens whose weight is not 0; None under plain SFT
    weighted: Tensor | None = None


def step_gradients(
    model: Llama,
    lora: Lora,
    examples: Sequence[Example],
    step: int,
    micro_tokens: int,
    policy: str,
    world: World = SINGLE_PROCESS,
    weighted: WeightedLoss | None = None,
) -> Gradients:
    """Phases 1 and 2: forward and backward of this rank's share of the examples.

    step: number of this optimizer step, which dropout masks depend on. micro_tokens: most tokens
    of a micro-batch. policy: recomputation in the backward (model/tape.py). weighted: the loss;
    None is plain SFT.
    """
    n_response = sum(len(example.ids) - example.n_prompt for example in examples)

    # 1. share the examples out over the ranks by tokens, pack every rank's share
    lengths = [len(example.ids) for example in examples]
    share_of_rank = shares(lengths, world.size)  # rank -> indices into `examples`
    batches_of_rank: list[list[list[int]]] = []  # rank -> micro-batches: indices into its share
    for share in share_of_rank:
        batches_of_rank.append(pack([lengths[i] for i in share], micro_tokens))
    own_examples = [examples[i] for i in share_of_rank[world.rank]]
    own_batches = batches_of_rank[world.rank]
    # a dropout mask belongs to one row, so a prefix can be shared only without dropout
    share_prefix = model.device.type in model.ops.shares_prefix and not lora.config.dropout

    # 2. forward and backward of every micro-batch
    lora.grads.zero_()
    if weighted is not None:
        weighted.begin_step()
    empty = lora.grads.new_empty(0)  # what a rank without a micro-batch has
    nlls = [empty]
    owners: list[str] = []
    for indices in own_batches:
        batch_examples = [own_examples[i] for i in indices]
        batch = MicroBatch.build(batch_examples, step, model.device, share_prefix)
        nlls.append(micro_step(model, lora, batch, policy, weighted))
        owners += batch.owners
    if model.is_sharded:  # every rank must gather the layers equally often
        most_batches = max(len(batches) for batches in batches_of_rank)
        for _ in range(most_batches - len(own_batches)):
            micro_step(model, lora, MicroBatch.idle(step, model.device), policy, weighted)
    weighed = None if weighted is None else weighted.of_step(empty)
    return Gradients(torch.cat(nlls), owners, n_response, weighed)


def micro_step(
    model: Llama,
    lora: Lora,
    batch: MicroBatch,
    policy: str,
    weighted: WeightedLoss | None = None,
) -> Tensor:
    """Forward, loss and backward of one micro-batch.

    Returns nll (N,), nats of each response token; adds the gradient of its sum to `lora.grads`, or
    that of the sum of the weighted loss.
    """
    tape = Tape(policy)
    hidden = model.forward(batch.tokens, batch.packed, lora=lora, tape=tape)  # (T, D)
    if weighted is None:
        nll, dselected = model.nll(hidden[batch.select], batch.targets)  # (N,), (N, D)
    else:
        nll, dselected = weighted.nll(model, hidden[batch.select], batch)  # (N,), (N, D)
    dhidden = torch.zeros_like(hidden)  # (T, D)
    dhidden.index_copy_(0, batch.select, dselected)  # the other positions have no loss
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

    lr: learning rate of this step. clip: largest gradient norm; 0 leaves the gradient as it is.
    """
    world.all_reduce_sum_(lora.grads)
    loss_sum = world.all_reduce_sum_(gradients.nll.sum(dtype=torch.float64))
    scale = 1 / gradients.n_response  # from the summed loss to the mean over response tokens
    means = None
    if gradients.weighed is not None:
        means = world.all_reduce_sum_(_sums(gradients.weighed)) / gradients.n_response  # (3,)
    # where memory is short for it, nothing has changed yet
    norm = tried_twice("update", model.device, optimizer.update, model.ops, lora, lr, scale, clip)
    return StepResult(loss_sum * scale, norm, gradients, means)


def _sums(weighed: Weighed) -> Tensor:
    """(3,) fp64: sums of this rank's values and weights, count of its weights that are not 0."""
    kept = weighed.weights != 0
    parts = (weighed.values, weighed.weights, kept)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])
