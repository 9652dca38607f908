"""Validation while training: held-out loss, and drift from the seed over the same frozen weights

    nll     nats per token of held-out references under the adapter
    kl      KL(seed || tuned) per token over the seed's own greedy answers to general prompts
Sums are kept, never logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.data.config import DataConfig
from engine.data.encode import Example, encode, template_takes
from engine.data.rows import listing
from engine.measure.divergence import compare, hidden_states
from engine.measure.general_prompts import PROMPTS
from engine.measure.likelihood import nll
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import memory_for
from engine.runtime.terminal import progress
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from kernels.packed import Packed
from model.chat import Chat
from model.llama import Llama
from model.lora import Lora

BEST = ("last", "nll", "kl")
LESS = "lower --val-prompts or --val-limit, or leave rows that are long out of --val-data"
ANSWER = 48  # tokens of the seed's answer to a general prompt


@dataclass(frozen=True)
class ValidateConfig:
    """What is looked at between training steps."""

    val_every: int = 0  # optimizer steps between validations; 0: none
    val_data: str | None = None  # held-out rows whose loss is taken
    val_limit: int = 32  # use only the first so many of them
    val_prompts: int = 8  # general prompts for the drift from the seed; 0: none
    best: str = "last"  # last | nll | kl: the checkpoint that becomes the adapter at the end

    def check(self) -> None:
        """ValueError for what cannot be looked at."""
        if self.val_every < 0 or self.val_limit < 1 or not 0 <= self.val_prompts <= len(PROMPTS):
            raise ValueError(
                f"val_every {self.val_every}, val_limit {self.val_limit}, val_prompts "
                f"{self.val_prompts}: >= 0, >= 1 and 0 to {len(PROMPTS)} are wanted"
            )
        check_numbers(self, val_limit=(1, MOST))
        if self.best not in BEST:
            raise ValueError(f"best {self.best!r}: one of {', '.join(BEST)}")
        lacks = {"nll": self.val_data is None, "kl": self.val_prompts == 0}
        if self.val_every and lacks["nll"] and lacks["kl"]:
            raise ValueError("--val-every needs --val-data, or --val-prompts above 0")
        if self.best != "last" and (not self.val_every or lacks[self.best]):
            needs = {"nll": "--val-data", "kl": "--val-prompts above 0"}[self.best]
            raise ValueError(f"--best {self.best} needs --val-every and {needs}")


def greedy(model: Llama, prompts: list[list[int]], chat: Chat) -> list[tuple[list[int], int]]:
    """The seed's answers without a cache, a packed forward of all rows a token: sharded weights.

    A row that ended goes along unchanged: every process makes the same number of forwards.
    """
    rows, ends = [list(p) for p in prompts], frozenset(chat.end_ids)
    for _ in progress(range(ANSWER), desc="seed's answers", unit="token", leave=False):
        lengths = [len(row) for row in rows]
        tokens = torch.tensor([t for row in rows for t in row], device=model.device)
        hidden = model.forward(tokens, Packed.from_lengths(lengths, model.device))
        last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
        for row, prompt, token in zip(
            rows, prompts, model.head(hidden[last]).argmax(-1).tolist(), strict=True
        ):
            if len(row) == len(prompt) or row[-1] not in ends:
                row.append(token)
    for row in rows:  # which end it was does not matter to what is compared
        row[-1] = chat.end_id if row[-1] in ends else row[-1]
    return [(row, len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]


class Validator:
    """Measures an adapter; the held-out rows and the seed's answers are made once.

    `data` says how the training file is read, and the held-out file is read alike; None: plainly.
    """

    @memory_for("answering general prompts for validation", LESS)
    def __init__(
        self, config: ValidateConfig, model: Llama, chat: Chat, data: DataConfig | None = None
    ) -> None:
        self.config, self.model = config, model
        self.held_out: list[Example] = []
        if config.val_data is not None:
            self.held_out = self._held_out(config, chat, data or DataConfig(config.val_data))
        count = config.val_prompts  # spread over the categories
        prompts = [PROMPTS[len(PROMPTS) * i // count][1] for i in range(count)]
        asked = {p: chat.prompt_ids([{"role": "user", "content": p}]) for p in prompts}
        self.answers: list[tuple[list[int], int]] = []  # ids, tokens of the prompt
        if asked and model.is_sharded:
            self.answers = greedy(model, list(asked.values()), chat)
        elif asked:
            sampling = SamplerConfig(rows=8, max_new_tokens=ANSWER)
            with Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling) as sampler:
                done = {c.id: c for c in sampler.run([Request(p, i) for p, i in asked.items()])}
            for prompt, ids in asked.items():
                ends = [chat.end_id] if done[prompt].finish == "stop" else []
                self.answers.append(([*ids, *done[prompt].ids, *ends], len(ids)))

    def _held_out(self, config: ValidateConfig, chat: Chat, data: DataConfig) -> list[Example]:
        """The held-out rows' references; ValueError for rows that do not fit the model."""
        rows = data.beside(str(config.val_data), config.val_limit).load(check=template_takes(chat))
        most = self.model.config.max_position
        examples, _ = encode(rows, chat, target="reference", max_length=most, drop_long=True)
        fit = {example.id for example in examples}
        turns = [(row, k) for row in rows for k in range(len(row.turns))]
        asked = [f"{row.id}/{k}" for row, k in turns if k not in row.context_only]
        long = [turn for turn in asked if turn not in fit]
        if long and not data.drop_long:
            what = f"{config.val_data}: {len(long)} turns are longer than the model's {most} tokens"
            raise ValueError(listing(what, long, "remove them, or leave them out with --drop-long"))
        if long:
            print(f"validation: {len(long)} turns are too long for the model and left out")
        if not examples:
            raise ValueError(f"{config.val_data}: no turn is left to validate on; give other rows")
        return examples

    @property
    def names(self) -> list[str]:
        """What a call returns; agreement is the share of positions with the seed's top token."""
        return ["nll"] * bool(self.held_out) + ["kl", "agreement"] * bool(self.answers)

    @memory_for("validating", LESS)
    def __call__(self, lora: Lora) -> list[float]:
        """The values of `names`."""
        found = []
        if self.held_out:
            total = tokens = 0.0
            for e in progress(self.held_out, desc="validate", unit="row", leave=False):
                losses = nll(self.model, e.ids[: e.n_prompt], e.ids[e.n_prompt :], lora)
                total += losses.double().sum().item()
                tokens += len(losses)
            found.append(total / tokens)
        if self.answers:
            kl = same = tokens = 0.0
            for ids, start in self.answers:
                seed, tuned = (hidden_states(self.model, ids, start, a) for a in (None, lora))
                drift = compare(self.model, seed, tuned, ids[start:])
                kl, same, tokens = kl + drift.kl, same + drift.agree, tokens + len(seed)
            found += [kl / tokens, same / tokens]
        return found
