"""Replay: the seed model's own answers to general prompts as further training rows

    L = the mean NLL over task rows and replay rows       r = round(n share / (1 - share)) of the
                                                          n + r rows are replay, at least one

A model that is trained on a task alone drifts on everything else. Rows whose answers it wrote
itself hold it there: over samples from its own probabilities their expected loss is
KL(seed || model) plus a constant. (Self-Synthesized Rehearsal, 2403.01244; self-augmented SFT,
2602.20162; approximate replay beside a LoRA, 2512.22337.) Answers are decoded as rewrites are:
by the job's sampling settings, in scripts/train.py by their defaults (DECODING).

    replay_pool        the prompts: ours (replay_prompts.txt) or those of a data file, whose
                       references are not used. None of them may be a prompt over which retention is
                       measured: the figure would no longer say what happens elsewhere
    refuse_held_out    nor may one be the prompt of a held-out row, which must stay unseen
    replay_examples    draws prompts by the training seed, lets the seed model answer them, and
                       keeps every answer in a file as soon as it is finished

    FILE               a line per answer: id, messages, answer, ids (with the end token where the
                       answer ended), finish, prompt_tokens
    FILE.meta.json     the settings on which an answer depends

An answer depends on its prompt, the number of the sample and the sampling seed alone. So trainings
with other shares, prompts or training seeds share one file, and a kill loses at most the answers in
flight.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.config import DataConfig
from engine.data.encode import Example, names, template_takes
from engine.data.rows import Row, listing
from engine.data.sources import open_source
from engine.data.tool_calls import calls_as_text
from engine.measure.answer_missing import answer_missing
from engine.measure.general_prompts import PROMPTS, plain_words
from engine.runtime.files import sha256
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import Session
from kernels.philox import mix

OWN = "own"
OUR_PROMPTS = Path(__file__).with_name("replay_prompts.txt")
DECODING = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}  # as rewrites are decoded by default
LARGEST_SHARE = 0.95  # 19 rows of replay beside each other one
LINE = {"id": str, "ids": list, "finish": str, "prompt_tokens": int}  # fields of a line
_PREFIX = "replay:"  # of the id of a request, before its prompt's key
_ID = re.compile(_PREFIX + r"([0-9a-f]{16})/\d+")  # of an example: the key, the sample


@dataclass(frozen=True)
class ReplayConfig:
    """Which general prompts the seed model answers for replay, and how many of the rows those are.

    Without `replay` there is none.
    """

    replay: str | None = None  # mix the seed model's own answers to general prompts into the
    #   training rows: own (309 prompts of ours) or a data file of prompts, whose references are
    #   not used [default: none]
    replay_share: float = 0.2  # share of the training rows, above 0 and at most 0.95, that are
    #   replay
    replay_max_new: int = 256  # most new tokens in an answer for replay

    def check(self) -> None:
        """ValueError for values out of range."""
        if not 0 < self.replay_share <= LARGEST_SHARE:
            raise ValueError(
                f"replay_share {self.replay_share}: expected a share above 0 and at most "
                f"{LARGEST_SHARE}"
            )
        check_numbers(self, replay_max_new=(1, MOST))

    def rows(self, task_rows: int) -> int:
        """The replay rows beside `task_rows` others."""
        return max(1, round(task_rows * self.replay_share / (1 - self.replay_share)))


class ReplayPrompt(NamedTuple):
    """A general prompt."""

    key: str  # hash of its words
    messages: tuple[dict[str, str], ...]  # ends with the user's
    place: str  # FILE:LINE; "" for a prompt of ours

    @property
    def named(self) -> str:
        """The prompt in a message of an error: where it stands, and the start of its text."""
        text = repr(textwrap.shorten(self.messages[-1]["content"], 80))
        return f"{self.place}: {text}" if self.place else text


def replay_pool(
    session: Session, config: ReplayConfig, *, skip_bad: bool = False
) -> list[ReplayPrompt]:
    """The prompts of `config.replay`, each once.

    ValueError for a file that cannot be read as data (skip_bad: its unusable rows are left out),
    and for prompts over which retention is measured, which are listed.
    """
    if config.replay == OWN:
        lines = OUR_PROMPTS.read_text(encoding="utf-8").splitlines()
        texts = [line for line in lines if line and not line.startswith("#")]
        found = [(({"role": "user", "content": text},), "") for text in texts]
    else:
        data = DataConfig(config.replay, skip_bad=skip_bad)
        stream = data.stream(open_source(config.replay), False, template_takes(session.chat))
        found = []
        for row in stream:
            found.append((row.messages, f"{stream.place.file}:{stream.place.line}"))
        for line in data.account(stream):
            print(line)
        print(f"replay: references in {config.replay} are not used, the seed model answers")
    pool: dict[str, ReplayPrompt] = {}
    for messages, place in found:
        key = prompt_key(messages)
        pool.setdefault(key, ReplayPrompt(key, tuple(messages), place))
    if len(pool) < len(found):
        print(f"replay: {len(found) - len(pool)} prompts of {config.replay} occur again: left out")
    _refuse_measured(config, pool.values())
    return list(pool.values())


def prompt_key(messages: Sequence[dict[str, str]]) -> str:
    """A hash of a prompt's words; letter case and space do not count."""
    words = [[message["role"], plain_words(calls_as_text(message))] for message in messages]
    return sha256(json.dumps(words))[:16]


def _refuse_measured(config: ReplayConfig, pool: Sequence[ReplayPrompt]) -> None:
    """ValueError where a prompt is one over which retention and validation are measured."""
    measured = {plain_words(text) for _, text in PROMPTS}
    both = []
    for prompt in pool:
        for message in prompt.messages:
            if message["role"] == "user" and plain_words(message["content"]) in measured:
                at = f"{prompt.place}: " if prompt.place else ""
                both.append(f"{at}{message['content']!r}")
    if both:
        error = (
            f"--replay {config.replay}: {len(both)} of its prompts are among the {len(PROMPTS)} "
            "over which retention is measured, which would then say nothing about other prompts"
        )
        raise ValueError(listing(error, both, "remove them from the file"))


def refuse_held_out(
    config: ReplayConfig, pool: Sequence[ReplayPrompt], held_out: Sequence[Row]
) -> None:
    """ValueError where a prompt is that of a held-out row; lists both.

    System messages do not count: --system gives the rows one, and prompts for replay have none.
    """
    row_of = {_conversation_key(row.messages[:-1]): row.id for row in held_out}
    both = []
    for prompt in pool:
        row_id = row_of.get(_conversation_key(prompt.messages))
        if row_id is not None:
            both.append(f"{prompt.named} is the prompt of held-out row {row_id}")
    if both:
        error = (
            f"--replay {config.replay}: {len(both)} of its prompts are those of held-out rows, "
            "which would then be trained on: expected none"
        )
        way_out = "remove them from one of the two files"
        if config.replay == OWN:
            way_out = "remove these held-out rows, or give --replay a file of other prompts"
        raise ValueError(listing(error, both, way_out))


def _conversation_key(messages: Sequence[dict[str, Any]]) -> str:
    """`prompt_key` of the messages that are not the system's."""
    return prompt_key([message for message in messages if message["role"] != "system"])


# ---- the examples


@memory_for("answering general prompts for replay", SAMPLE_LESS)
def replay_examples(
    session: Session,
    config: ReplayConfig,
    file: Path,
    pool: Sequence[ReplayPrompt],
    *,
    task_rows: int,
    max_length: int,
    seed: int,
    sampling: SamplerConfig,
) -> list[Example]:
    """The replay rows beside `task_rows` others, made or read from `file`; prints their count.

    max_length    tokens of a whole example: an answer ends before it
    seed          of the training: draws the prompts
    sampling      how answers are decoded, but for their length

    Where there are fewer prompts than rows, each gets several samples. ValueError where that is
    impossible (temperature 0), where no prompt leaves room for an answer, and where `file` was
    begun under other settings. Several processes share the work.
    """
    max_length = min(max_length, session.model.config.max_position)
    decoding = dataclasses.replace(sampling, max_new_tokens=config.replay_max_new)
    count = config.rows(task_rows)
    drawn = _drawn_prompts(session, pool, count, max_length, seed)
    _check_enough(config, drawn, count, max_length, decoding.temperature)
    requests = _requests(config, drawn, count, max_length)
    generator = ChatGenerator(session.model, session.chat, decoding)
    messages = {prompt.key: prompt.messages for prompt in pool}

    def to_line(completion: Completion) -> dict[str, Any]:
        return {
            "id": f"{completion.id}/{completion.sample}",
            "messages": messages[completion.id.removeprefix(_PREFIX)],
            "answer": completion.text,
            "ids": generator.answer_ids(completion.ids, completion.finish),
            "finish": completion.finish,
            "prompt_tokens": completion.prompt_tokens,
        }

    settings = session.settings | {"sampling": decoding.settings(), "max_length": max_length}
    with ResumedLines(file, settings, wanted=LINE, world=session.world) as lines:
        own = {name: requests[name] for name in lines.mine(list(requests))}
        answer_missing(generator, None, own, lines, to_line, "seed's answers for replay")
        records = lines.finish(list(requests))
    examples = []
    for record in records:
        prompt_ids = list(requests[record["id"]].prompt)
        examples.append(Example(record["id"], prompt_ids + record["ids"], len(prompt_ids)))
    print(_replay_text(config, task_rows, records, drawn))
    return examples


class DrawnPrompts(NamedTuple):
    """Prompts that leave room for an answer, in the order in which the seed draws them."""

    prompts: list[tuple[str, list[int]]]  # (key, token ids)
    too_long: int  # prompts that were passed over


def _drawn_prompts(
    session: Session, pool: Sequence[ReplayPrompt], count: int, max_length: int, seed: int
) -> DrawnPrompts:
    """At most `count` prompts of the pool."""

    def place(prompt: ReplayPrompt) -> int:
        return mix("replay", seed, prompt.key)

    prompts: list[tuple[str, list[int]]] = []
    too_long = 0
    for prompt in sorted(pool, key=place):
        if len(prompts) == count:
            break
        ids = session.chat.prompt_ids(prompt.messages)
        if len(ids) + 2 <= max_length:  # a token of the answer, and the end token
            prompts.append((prompt.key, ids))
        else:
            too_long += 1
    return DrawnPrompts(prompts, too_long)


def _check_enough(
    config: ReplayConfig, drawn: DrawnPrompts, count: int, max_length: int, temperature: float
) -> None:
    """ValueError where the prompts cannot give `count` different answers."""
    available = len(drawn.prompts)
    if not available:
        raise ValueError(
            f"--replay {config.replay}: no prompt leaves room for an answer within {max_length} "
            "tokens; give shorter prompts, or a higher --max-length"
        )
    if available < count and temperature == 0:
        raise ValueError(
            f"--replay {config.replay}: {available} prompts, but a share of "
            f"{config.replay_share:g} needs {count} rows, and at --temperature 0 a prompt has one "
            "answer; give more prompts, a smaller share or a higher temperature"
        )


def _requests(
    config: ReplayConfig, drawn: DrawnPrompts, count: int, max_length: int
) -> dict[str, Request]:
    """The requests of `count` answers, by the ids of their lines: every prompt once, then again."""
    requests = {}
    for number in range(count):
        sample, place = divmod(number, len(drawn.prompts))
        key, prompt_ids = drawn.prompts[place]
        room = max_length - len(prompt_ids) - 1  # for the end token
        limit = min(config.replay_max_new, room)
        request = Request(_PREFIX + key, prompt_ids, limit, sample)
        requests[f"{request.id}/{sample}"] = request
    return requests


def _replay_text(
    config: ReplayConfig, task_rows: int, records: Sequence[dict[str, Any]], drawn: DrawnPrompts
) -> str:
    """How many of the rows are replay, and what was cut or left out, for printing."""
    count = len(records)
    rows = count + task_rows
    prompts = min(count, len(drawn.prompts))
    text = (
        f"replay: {count} of {rows} training rows ({count / rows:.1%}) are the seed model's own "
        f"answers to {prompts} general prompts ({config.replay}); retention is measured on other "
        "prompts"
    )
    cut = sum(record["finish"] == "length" for record in records)
    if cut:
        text += f"; {cut} answers reached the token limit and are trained on without an end token"
    if drawn.too_long:
        text += f"; {drawn.too_long} prompts are too long and left out"
    return text


def replayed_prompts(examples: Sequence[Example]) -> list[str]:
    """The keys of the prompts of the replay rows among the examples, sorted, each once."""
    keys = set()
    for name in names(examples):
        found = _ID.fullmatch(name)
        if found is not None:
            keys.add(found[1])
    return sorted(keys)


def is_replay(name: str) -> bool:
    """Whether the example with this id is a replay row."""
    return _ID.fullmatch(name) is not None
