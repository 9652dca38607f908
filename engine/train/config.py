"""Settings of a training: `TrainConfig` the steps, `EncodeConfig` the examples."""

from __future__ import annotations

from dataclasses import dataclass

from engine.data.distilled import TARGETS
from engine.data.encode import MAX_LENGTH
from engine.runtime.limits import MOST, check_numbers
from engine.train.losses import Loss
from engine.train.optim import SCHEDULES, highest_rate
from kernels.integers import cdiv
from model.tape import POLICIES


@dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained. Defaults are the paper's where it has one."""

    lr: float = 1e-4  # peak learning rate
    epochs: int = 2  # passes over the training rows
    max_steps: int = 0  # optimizer steps, instead of --epochs [default: as many as the epochs take]
    batch_rows: int = 8  # rows per optimizer step (the batch size)
    micro_tokens: int = 0  # tokens in one forward and backward pass (a micro-batch): affects memory
    #   and speed; results by rounding only
    #   [default: auto (as many as fit a GPU's memory, 1024 to 16384; 1024 on a CPU)]
    schedule: str = "cosine"  # cosine, linear or constant: the learning rate after the warm-up
    warmup: float = 0.0  # share of the steps, from 0 to 1, in which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    loss: str = "sft"  # how much each token of an answer counts: sft (all the same) or, to forget
    #   less, stm:2.5 (none where the untrained model is surprised, perplexity above 2.5), dft
    #   (less, the less likely it is), eaft (less, the surer the model is), psft:0.2 (none once it
    #   is 1.2 times as likely as before the training), k3:0.02 (all the same, with 0.02 times a
    #   penalty on leaving the untrained model)
    clip: float = 1.0  # gradients with a larger norm are scaled down to it; 0 is off
    seed: int = 0  # random seed of the adapter's first values, the order of the rows, dropout, and
    #   of sampling where a script samples
    recompute: str = "auto"  # none, selective or full: how many activations the backward pass
    #   computes again instead of keeping them, to save memory
    #   [default: auto (the least that fits in --memory-gb)]
    memory_gb: float = 0.0  # GB that --recompute auto may plan for
    #   [default: auto (what the process holds and what is free)]
    save_every: int = 50  # optimizer steps between checkpoints
    keep: int = 2  # checkpoints to keep, besides the best one

    def steps(self, count: int) -> int:
        """Optimizer steps of a run over `count` examples."""
        if self.max_steps:
            return self.max_steps
        return self.epochs * cdiv(count, self.batch_rows)

    def highest_rate(self, count: int) -> float:
        """The highest learning rate of a run over `count` examples; ValueError where the warm-up
        keeps it at 0."""
        return highest_rate(self.schedule, self.steps(count), self.lr, self.warmup)

    def check(self) -> None:
        """ValueError for values out of range, and for names that are not known."""
        for name in ("epochs", "batch_rows", "save_every", "keep"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        is_negative = self.clip < 0 or self.weight_decay < 0
        if self.lr <= 0 or is_negative or not 0 <= self.warmup < 1:
            raise ValueError(
                f"lr {self.lr}, clip {self.clip}, weight_decay {self.weight_decay}, warmup "
                f"{self.warmup}: expected lr > 0, clip and decay >= 0, 0 <= warmup < 1"
            )
        if self.max_steps < 0 or self.memory_gb < 0:
            raise ValueError(
                f"max_steps {self.max_steps}, memory_gb {self.memory_gb}: expected 0 or more"
            )
        if self.micro_tokens < 0:
            raise ValueError(
                f"micro_tokens {self.micro_tokens}: expected at least 1, or 0 for the default"
            )
        if self.recompute not in ("auto", *POLICIES):
            raise ValueError(
                f"recompute {self.recompute!r}: expected auto or one of {', '.join(POLICIES)}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        Loss.parse(self.loss)
        check_numbers(self, lr=(0, 100), epochs=(1, 10**5), max_steps=(0, 10**7))


@dataclass(frozen=True)
class EncodeConfig:
    """Which answer of a row is trained on, and how long an example may be."""

    target: str = "target"  # which answer of distilled data to learn: target (the accepted rewrite,
    #   else the reference: SDFT), reference (SFT), or response (every rewrite)
    mix: float = 0.0  # share of the accepted rewrites, from 0 to 1, replaced by their references
    drop_rejected: bool = False  # leave out and count the rows whose rewrites were all rejected,
    #   instead of training on their references (rejection-sampling fine-tuning, RFT)
    max_length: int = MAX_LENGTH  # most tokens of prompt and answer together
    truncate: bool = False  # cut off and count the ends of longer answers, instead of stopping with
    #   an error
    cut_in_proportion: bool = False  # cut prompt and answer of longer rows in proportion to their
    #   lengths, and count them, as --paper-exact does

    def check(self) -> None:
        """ValueError for values out of range, and for names that are not known."""
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r}: expected one of {', '.join(TARGETS)}")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix {self.mix}: expected a share from 0 to 1")
        check_numbers(self, max_length=(1, MOST))
