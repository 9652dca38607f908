"""Validation while training: held-out loss, and drift from the seed over the same frozen weights

    nll         nats per token of held-out references under the adapter
    kl          KL(seed || adapter) per token over the seed's own greedy answers to general prompts
    agreement   share of these tokens where both have the same likeliest token

Sums are kept, never logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.data.config import DataConfig
from engine.data.encode import Example, encode, template_takes
from engine.data.rows import Row, listing
from engine.measure.divergence import compare, hidden_states
from engine.measure.general_prompts import PROMPTS
from engine.measure.likelihood import nll
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import memory_for
from engine.runtime.terminal import progress
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Request, SamplerConfig
from engine.session import Session
from kernels.packed import Packed
from model.chat import Chat
from model.llama import Llama
from model.lora import Lora

BEST = ("last", "nll", "kl")
LESS_MEMORY = "lower --val-prompts or --val-limit, or leave rows that are long out of --val-data"
ANSWER_TOKENS = 48  # of the seed's answer to a general prompt


@dataclass(frozen=True)
class ValidateConfig:
    """What is looked at between training steps."""

    val_every: int = 0  # optimizer steps between validations [default: off]
    val_data: str | None = None  # held-out rows whose loss is measured during training
    #   [default: none]
    val_limit: int = 32  # use only the first N rows of --val-data
    val_prompts: int = 8  # general prompts on which validation measures the drift from the seed
    #   model (KL); 0 is off
    best: str = "last"  # which checkpoint becomes the adapter: last, nll (the lowest loss on
    #   --val-data) or kl (the least drift from the seed model)

    def check(self) -> None:
        """ValueError for settings that cannot be, or that measure nothing."""
        if self.val_every < 0 or self.val_limit < 1 or not 0 <= self.val_prompts <= len(PROMPTS):
            raise ValueError(
                f"val_every {self.val_every}, val_limit {self.val_limit}, val_prompts "
                f"{self.val_prompts}: expected >= 0, >= 1 and 0 to {len(PROMPTS)}"
            )
        check_numbers(self, val_limit=(1, MOST))
        if self.best not in BEST:
            raise ValueError(f"best {self.best!r}: expected one of {', '.join(BEST)}")
        lacks = {"nll": self.val_data is None, "kl": self.val_prompts == 0}
        if self.val_every and lacks["nll"] and lacks["kl"]:
            raise ValueError("--val-every needs --val-data, or --val-prompts above 0")
        if self.best != "last" and (not self.val_every or lacks[self.best]):
            needs = {"nll": "--val-data", "kl": "--val-prompts above 0"}[self.best]
            raise ValueError(f"--best {self.best} needs --val-every and {needs}")


@dataclass(frozen=True)
class SeedAnswer:
    """A general prompt with the seed's own answer."""

    ids: list[int]  # the prompt's, then the answer's
    n_prompt: int


class Validator:
    """Measures an adapter; the held-out examples and the seed's answers are made once."""

    @memory_for("answering general prompts for validation", LESS_MEMORY)
    def __init__(self, config: ValidateConfig, data: DataConfig, session: Session) -> None:
        """data: how the training file is read. The held-out file is read in the same way: columns,
        system message, unusable and long rows."""
        self.config, self.model = config, session.model
        self.held_out: list[Example] = []
        if config.val_data is not None:
            held_out = data.beside(config.val_data, config.val_limit)
            self.held_out = held_out_examples(held_out, session)
        self.answers: list[SeedAnswer] = []
        if config.val_prompts:
            self.answers = answers_of_seed(session, config.val_prompts)

    @property
    def names(self) -> list[str]:
        """Names of the values that a call returns."""
        names = []
        if self.held_out:
            names.append("nll")
        if self.answers:
            names += ["kl", "agreement"]
        return names

    @memory_for("validating", LESS_MEMORY)
    def __call__(self, lora: Lora) -> list[float]:
        """The values of `names` for this adapter."""
        values = []
        if self.held_out:
            values.append(self._held_out_nll(lora))
        if self.answers:
            values += self._drift(lora)
        return values

    def _held_out_nll(self, lora: Lora) -> float:
        """Nats per response token of the held-out examples."""
        total, tokens = 0.0, 0.0
        for example in progress(self.held_out, desc="validate", unit="row", leave=False):
            prompt, answer = example.ids[: example.n_prompt], example.ids[example.n_prompt :]
            losses = nll(self.model, prompt, answer, lora)  # (len(answer),)
            total += losses.double().sum().item()
            tokens += len(losses)
        return total / tokens

    def _drift(self, lora: Lora) -> tuple[float, float]:
        """KL(seed || adapter) per token of the seed's answers, share of equal top tokens."""
        kl, agree, tokens = 0.0, 0.0, 0.0
        for answer in self.answers:
            seed = hidden_states(self.model, answer.ids, answer.n_prompt, None)
            tuned = hidden_states(self.model, answer.ids, answer.n_prompt, lora)
            drift = compare(self.model, seed, tuned, answer.ids[answer.n_prompt :])
            kl += drift.kl
            agree += drift.agree
            tokens += len(seed)
        return kl / tokens, agree / tokens


# ---- held-out examples


def held_out_examples(data: DataConfig, session: Session) -> list[Example]:
    """The references of the held-out rows; ValueError for turns that do not fit the model."""
    rows = data.load(check=template_takes(session.chat))
    longest = session.model.config.max_position
    examples, _ = encode(rows, session.chat, target="reference", max_length=longest, drop_long=True)
    fitting = {example.id for example in examples}
    too_long = [turn for row in rows for turn in _trained_turns(row) if turn not in fitting]
    if too_long and not data.drop_long:
        fault = f"{data.data}: {len(too_long)} turns are longer than the model's {longest} tokens"
        way_out = "remove them, or leave them out with --drop-long"
        raise ValueError(listing(fault, too_long, way_out))
    if too_long:
        print(f"validation: {len(too_long)} turns are too long for the model and left out")
    if not examples:
        raise ValueError(f"{data.data}: no turn is left to validate on; give other rows")
    return examples


def _trained_turns(row: Row) -> list[str]:
    """Ids of the row's assistant turns, but for those that are context only."""
    return [f"{row.id}/{k}" for k in range(len(row.turns)) if k not in row.context_only]


# ---- the seed's answers


def answers_of_seed(session: Session, count: int) -> list[SeedAnswer]:
    """Greedy answers to `count` general prompts, spread over the categories."""
    model, chat = session.model, session.chat
    texts = [PROMPTS[len(PROMPTS) * i // count][1] for i in range(count)]
    prompts = {text: chat.prompt_ids([{"role": "user", "content": text}]) for text in texts}
    if model.is_sharded:
        return greedy_without_cache(model, list(prompts.values()), chat)
    config = SamplerConfig(rows=8, max_new_tokens=ANSWER_TOKENS)
    with ChatGenerator(model, chat, config).sampler() as sampler:
        requests = [Request(text, ids) for text, ids in prompts.items()]
        completions = {completion.id: completion for completion in sampler.run(requests)}
    answers = []
    for text, prompt in prompts.items():
        end = [chat.end_id] if completions[text].finish == "stop" else []
        answers.append(SeedAnswer([*prompt, *completions[text].ids, *end], len(prompt)))
    return answers


def greedy_without_cache(model: Llama, prompts: list[list[int]], chat: Chat) -> list[SeedAnswer]:
    """Greedy answers under sharded weights: for each token one packed forward of all sequences.

    A sequence that has ended stays in the batch unchanged, so every rank makes the same number of
    forwards.
    """
    sequences, ends = [list(prompt) for prompt in prompts], frozenset(chat.end_ids)
    for _ in progress(range(ANSWER_TOKENS), desc="seed's answers", unit="token", leave=False):
        lengths = [len(sequence) for sequence in sequences]
        flat = [token for sequence in sequences for token in sequence]
        tokens = torch.tensor(flat, device=model.device)  # (T,)
        hidden = model.forward(tokens, Packed.from_lengths(lengths, model.device))  # (T, D)
        last = torch.tensor(lengths, device=model.device).cumsum(0) - 1  # (sequences,)
        likeliest = model.head(hidden[last]).argmax(-1).tolist()
        for sequence, prompt, token in zip(sequences, prompts, likeliest, strict=True):
            ended = len(sequence) > len(prompt) and sequence[-1] in ends
            if not ended:
                sequence.append(token)
    answers = []
    for sequence, prompt in zip(sequences, prompts, strict=True):
        if sequence[-1] in ends:
            sequence[-1] = chat.end_id  # which of the end tokens it was makes no difference
        answers.append(SeedAnswer(sequence, len(prompt)))
    return answers
