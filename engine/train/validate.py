"""Validation while training: held-out loss, and drift from the seed over the same frozen weights

    nll         nats per token of held-out references under the adapter
    kl          KL(seed || adapter), nats per token of the seed's own greedy answers to general
                prompts
    agreement   share of these tokens where both have the same likeliest token

Only sums over tokens are kept, never logits.
"""

# T = tokens of all sequences together, D = model width

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.data.config import DataConfig
from engine.data.encode import EncodeRules, Example, encode, template_takes
from engine.data.rows import Row, listing
from engine.data.subset import evenly_spaced
from engine.measure.divergence import compare, hidden_states
from engine.measure.general_prompts import PROMPTS
from engine.measure.likelihood import nll
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import memory_for
from engine.runtime.short_memory import tried_twice
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
    """When and on what an adapter is measured between training steps."""

    val_every: int = 0  # optimizer steps between validations [default: off]
    val_data: str | None = None  # held-out rows whose loss is measured during training
    #   [default: none]
    val_limit: int = 32  # use only the first N rows of --val-data
    val_prompts: int = 8  # general prompts on which validation measures the drift from the seed
    #   model (KL); 0 is off
    best: str = "last"  # which checkpoint becomes the adapter: last, nll (the lowest loss on
    #   --val-data) or kl (the least drift from the seed model)
    patience: int = 0  # stop after so many validations in a row without a better value of --best;
    #   0 is off
    stop_kl: float = 0.0  # stop at the first validation whose drift from the seed model (KL) is
    #   above this many nats per token, and keep the best or last adapter within it; 0 is off

    def check(self) -> None:
        """ValueError for values out of range, and for settings that measure nothing."""
        if self.val_every < 0 or self.val_limit < 1 or not 0 <= self.val_prompts <= len(PROMPTS):
            raise ValueError(
                f"val_every {self.val_every}, val_limit {self.val_limit}, val_prompts "
                f"{self.val_prompts}: expected >= 0, >= 1 and 0 to {len(PROMPTS)}"
            )
        check_numbers(self, val_limit=(1, MOST), patience=(0, 10**6), stop_kl=(0, 1000))
        if self.best not in BEST:
            raise ValueError(f"best {self.best!r}: expected one of {', '.join(BEST)}")
        measures_nll = self.val_data is not None
        measures_kl = self.val_prompts > 0
        if self.val_every and not measures_nll and not measures_kl:
            raise ValueError("--val-every needs --val-data, or --val-prompts above 0")
        if self.best == "nll" and not (self.val_every and measures_nll):
            raise ValueError("--best nll needs --val-every and --val-data")
        if self.best == "kl" and not (self.val_every and measures_kl):
            raise ValueError("--best kl needs --val-every and --val-prompts above 0")
        if self.patience and self.best == "last":
            raise ValueError(
                f"patience {self.patience} with --best last: expected a measure that can improve; "
                "give --best nll (or kl), --val-every and what it measures on"
            )
        if self.stop_kl and not (self.val_every and measures_kl):
            raise ValueError(
                f"stop_kl {self.stop_kl:g}: the drift is measured at validations only; give "
                "--val-every, and --val-prompts above 0"
            )


@dataclass(frozen=True)
class SeedAnswer:
    """A general prompt with the seed's own answer."""

    ids: list[int]  # the prompt's, then the answer's
    n_prompt: int


class Validator:
    """Measures an adapter; the held-out examples and the seed's answers are made once."""

    @memory_for("answering general prompts for validation", LESS_MEMORY)
    def __init__(self, config: ValidateConfig, data: DataConfig, session: Session) -> None:
        """Encode the held-out rows, and let the seed answer the general prompts.

        data: how the training file is read. The held-out file is read in the same way: columns,
        system message, unusable and long rows. ValueError where it has no row to validate on.
        """
        self.config = config
        self.model = session.model
        self.held_out: list[Example] = []
        if config.val_data is not None:
            held_out_file = data.beside(config.val_data, config.val_limit)
            self.held_out = held_out_examples(held_out_file, session)
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
        """The values of `names` for this adapter.

        Where memory is short, cached memory is given back and all is measured once more. Not under
        sharded weights, where no process can try again alone.
        """
        if self.model.is_sharded:
            return self._measure(lora)
        return tried_twice("validation", self.model.device, self._measure, lora)

    def _measure(self, lora: Lora) -> list[float]:
        values = []
        if self.held_out:
            values.append(self._held_out_nll(lora))
        if self.answers:
            kl, agreement = self._drift(lora)
            values += [kl, agreement]
        return values

    def _held_out_nll(self, lora: Lora) -> float:
        """Nats per response token of the held-out examples."""
        nats = 0.0
        tokens = 0
        for example in progress(self.held_out, desc="validate", unit="row", leave=False):
            prompt = example.ids[: example.n_prompt]
            answer = example.ids[example.n_prompt :]
            losses = nll(self.model, prompt, answer, lora)  # (tokens of the answer,)
            nats += losses.double().sum().item()
            tokens += len(losses)
        return nats / tokens

    def _drift(self, lora: Lora) -> tuple[float, float]:
        """(KL(seed || adapter) in nats per token of the seed's answers, share of these tokens where
        both have the same likeliest token)."""
        kl = 0.0
        agreeing = 0
        tokens = 0
        for answer in self.answers:
            answer_ids = answer.ids[answer.n_prompt :]
            seed = hidden_states(self.model, answer.ids, answer.n_prompt, lora=None)
            tuned = hidden_states(self.model, answer.ids, answer.n_prompt, lora)
            drift = compare(self.model, seed, tuned, answer_ids)  # sums over the answer
            kl += drift.kl
            agreeing += drift.agree
            tokens += len(answer_ids)
        return kl / tokens, agreeing / tokens


# ---- held-out examples


def held_out_examples(data: DataConfig, session: Session) -> list[Example]:
    """The references of the held-out rows, encoded.

    Turns that are longer than the model's context are left out with a message under `drop_long`;
    else ValueError. ValueError also where no turn is left.
    """
    rows = data.load(check=template_takes(session.chat))
    context = session.model.config.max_position  # tokens
    rules = EncodeRules(
        max_length=context,
        target="reference",
        drop_long=True,
        answer_only=data.thinking == "answer-only",
    )
    examples, _ = encode(rows, session.chat, rules)
    encoded = {example.id for example in examples}
    too_long = []
    for row in rows:
        too_long += [turn_id for turn_id in _trained_turn_ids(row) if turn_id not in encoded]
    if too_long and not data.drop_long:
        fault = f"{data.data}: {len(too_long)} turns are longer than the model's {context} tokens"
        way_out = "remove them, or leave them out with --drop-long"
        raise ValueError(listing(fault, too_long, way_out))
    if too_long:
        print(f"validation: {len(too_long)} turns are too long for the model and left out")
    if not examples:
        raise ValueError(f"{data.data}: no turn is left to validate on; give other rows")
    return examples


def _trained_turn_ids(row: Row) -> list[str]:
    """Ids of the row's assistant turns, but for those that are context only."""
    turns = range(len(row.turns))
    return [f"{row.id}/{turn}" for turn in turns if turn not in row.context_only]


# ---- the seed's answers


def answers_of_seed(session: Session, count: int) -> list[SeedAnswer]:
    """Greedy answers of the model without an adapter to `count` general prompts.

    The prompts are spread evenly over the categories. An answer has at most ANSWER_TOKENS tokens,
    and the end token where the model ended it.
    """
    model = session.model
    chat = session.chat
    prompts: dict[str, list[int]] = {}  # text -> token ids
    for _, text in evenly_spaced(PROMPTS, count):
        prompts[text] = chat.prompt_ids([{"role": "user", "content": text}])
    if model.is_sharded:
        return greedy_without_cache(model, list(prompts.values()), chat)
    requests = [Request(text, ids) for text, ids in prompts.items()]
    config = SamplerConfig(rows=8, max_new_tokens=ANSWER_TOKENS)
    with ChatGenerator(model, chat, config).sampler() as sampler:
        completions = {completion.id: completion for completion in sampler.run(requests)}
    answers = []
    for text, prompt in prompts.items():
        completion = completions[text]
        ids = prompt + completion.ids
        if completion.finish == "stop":
            ids.append(chat.end_id)
        answers.append(SeedAnswer(ids, len(prompt)))
    return answers


def greedy_without_cache(model: Llama, prompts: list[list[int]], chat: Chat) -> list[SeedAnswer]:
    """Greedy answers under sharded weights: for each token one packed forward of all sequences.

    A sequence that has ended stays in the batch unchanged, so every rank makes the same number of
    forwards.
    """
    end_ids = frozenset(chat.end_ids)
    sequences = [list(prompt) for prompt in prompts]
    for _ in progress(range(ANSWER_TOKENS), desc="seed's answers", unit="token", leave=False):
        next_tokens = _likeliest_next_tokens(model, sequences)
        for sequence, prompt, token in zip(sequences, prompts, next_tokens, strict=True):
            has_answer = len(sequence) > len(prompt)
            has_ended = has_answer and sequence[-1] in end_ids
            if not has_ended:
                sequence.append(token)
    answers = []
    for sequence, prompt in zip(sequences, prompts, strict=True):
        if sequence[-1] in end_ids:
            sequence[-1] = chat.end_id  # which of the end tokens it was makes no difference
        answers.append(SeedAnswer(sequence, len(prompt)))
    return answers


def _likeliest_next_tokens(model: Llama, sequences: list[list[int]]) -> list[int]:
    """The likeliest next token of each sequence, by one packed forward."""
    lengths = []
    flat: list[int] = []
    for sequence in sequences:
        lengths.append(len(sequence))
        flat += sequence
    tokens = torch.tensor(flat, device=model.device)  # (T,)
    packed = Packed.from_lengths(lengths, model.device)
    hidden = model.forward(tokens, packed)  # (T, D)
    ends = torch.tensor(lengths, device=model.device).cumsum(0)  # (sequences,)
    logits = model.head(hidden[ends - 1])  # (sequences, vocabulary)
    return logits.argmax(-1).tolist()
