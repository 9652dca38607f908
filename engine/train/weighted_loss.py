"""A weighted loss in a step: it stands between the loss's gradient and the backward

    seed_nll     every response token's nll under the seed, computed once (measure/seed_nll.py)
    nll          nll of a micro-batch's response tokens, and the gradient of the weighted loss
    weighed      weights and values of the tokens of the running step

Plain SFT (`--loss sft`) has none of this: `micro_step` then calls `model.nll` itself.
"""

# N = response tokens of a micro-batch, D = model width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.data.pack import MicroBatch
from engine.train.losses import Loss, Tokens, Weighed
from kernels.dtypes import accumulate_dtype
from kernels.packed import upload
from model.llama import Llama


@dataclass
class WeightedLoss:
    """A loss with the likelihoods under the seed that it needs, and the account of one step."""

    loss: Loss
    seed_nll: Mapping[str, Tensor] = field(default_factory=dict)  # example id -> (its response
    #   tokens,) nats, on the CPU; {} where the loss does not need it
    weighed: list[Weighed] = field(default_factory=list)  # of the micro-batches of this step

    def nll(self, model: Llama, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """nll (N,), and the gradient (N, D) of the sum of the weighted loss, as `Llama.nll`.

        hidden (N, D): states that predict the response tokens of the batch. Appends to `weighed`.
        """
        acc = accumulate_dtype(hidden.dtype)
        entropy = None
        if self.loss.needs_entropy:
            entropy = hidden.new_empty(len(hidden), dtype=acc)  # (N,)
        nll, dhidden = model.nll(hidden, batch.targets, entropy=entropy)  # (N,), (N, D)
        seed_nll = None
        if self.loss.needs_seed:
            seed_nll = upload(self._seed_nll_of(batch), nll.dtype, nll.device)  # (N,)
        weighed = self.loss.weigh(Tokens(nll, seed_nll, entropy))
        self.weighed.append(weighed)
        dhidden.mul_(weighed.weights[:, None])
        return nll, dhidden

    def _seed_nll_of(self, batch: MicroBatch) -> list[float]:
        """The nll under the seed of every response token of a batch, in its order."""
        values: list[float] = []
        for example_id in dict.fromkeys(batch.owners):  # each once, in the order of the batch
            values += self.seed_nll[example_id].tolist()
        return values

    def begin_step(self) -> None:
        """Forget the tokens so far: those of the last step, or of one that ran out of memory."""
        self.weighed.clear()

    def of_step(self, empty: Tensor) -> Weighed:
        """Weights and values of all tokens of this rank since `begin_step`.

        empty: (0,) on the device, for a rank that has no micro-batch.
        """
        weights = [empty, *(weighed.weights for weighed in self.weighed)]
        values = [empty, *(weighed.values for weighed in self.weighed)]
        return Weighed(torch.cat(weights), torch.cat(values))
