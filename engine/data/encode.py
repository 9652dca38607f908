"""Encoding: rows, or lines of distilled data, become examples of token ids

    rows = load_rows("train.jsonl")                     # or load_distilled("distilled.jsonl")
    examples, counts = encode(rows, chat, EncodeRules(max_length=1024))

Nothing is cut or left out silently: a turn that does not fit raises an error that names it, or is
cut or left out where a flag says so, and counted. turns.py says which answer is trained on, fit.py
applies the length.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from engine.data.distilled import CONTEXT, Distilled
from engine.data.fit import EncodedTurn, Fit
from engine.data.rows import FirstFaults, Row
from engine.data.turns import References, TrainedTurn, check_target, turns_to_train_on
from engine.runtime.on_demand import OnDemand
from model.messages import calls_of

if TYPE_CHECKING:
    from model.chat import Chat

MAX_LENGTH = 1024  # default tokens of an example


@dataclass(frozen=True)
class Example:
    """Token ids of one assistant turn: the prompt's, then ids[n_prompt:], which carry the loss."""

    id: str
    ids: list[int]
    n_prompt: int


@dataclass(frozen=True)
class EncodeRules:
    """Which answer of a turn is trained on, and what becomes of turns that are too long.

    max_length     tokens of a whole example. Longer ones raise ValueError naming them, or with
                   `truncate` lose the end of their answer. A prompt is not cut: one that leaves no
                   room for an answer raises in any case
    target         the answer. Of distilled lines: "target" (the sampled ids where the rewrite was
                   kept, never a re-encoding; else the reference), "response" (always the sampled
                   ids) or "reference" (then earlier answers in the context are references too: the
                   control never sees a rewrite). Rows only have their reference
    model_limit    tokens of the model's context: at this length no message proposes --max-length
    drop_long      turns that would raise for their length are left out, of distilled data also
                   those that would as another target: all targets train on the same turns. Other
                   turns of a conversation stay
    in_proportion  longer turns lose the ends of prompt and answer instead, as in the published code
                   (`cut_in_proportion`); a turn is left out where nothing of its answer remains
    skip_refused   turns that the chat template refuses are left out instead of raising ValueError
    mix            share of the kept rewrites of "target" that are replaced by their reference,
                   drawn by row id and `seed`; the contexts stay as they are
    drop_rejected  turns whose rewrites were all rejected are left out, instead of being trained on
                   their references (rejection-sampling fine-tuning). Distilled data only. In a
                   conversation such a turn stays in the context of later ones
    answer_only    the thoughts with which an answer begins (thinking.py) carry no loss
    """

    max_length: int
    target: str = "target"
    model_limit: int | None = None
    truncate: bool = False
    drop_long: bool = False
    in_proportion: bool = False
    skip_refused: bool = False
    mix: float = 0.0
    seed: int = 0
    drop_rejected: bool = False
    answer_only: bool = False

    @property
    def leaves_out_long(self) -> bool:
        """Whether turns that are too long are left out instead of raising ValueError."""
        return self.drop_long or self.in_proportion


@dataclass
class EncodeCounts:
    """Counts of an encoding; all that are not zero are printed for the user."""

    examples: int = 0
    tokens: int = 0
    response_tokens: int = 0  # those that carry loss, end tokens included
    from_response: int = 0  # examples made of sampled ids; the others are encoded references
    truncated: int = 0  # cut from the answer's end to fit max_length, so without end token
    cut: int = 0  # prompt and answer cut in proportion, as --paper-exact has it
    dropped: int = 0  # left out: too long for max_length (--drop-long)
    refused: int = 0  # left out: the chat template refuses the conversation (--skip-bad)
    context: int = 0  # not trained on, as their messages say (weight 0): context of later turns
    unfinished: int = 0  # sampled up to the token limit: trained without an end token
    end_added: int = 0  # the same, kept under --paper-exact: trained with an end token
    mixed: int = 0  # kept rewrites whose reference was taken, as --mix asks
    rejected: int = 0  # left out: every rewrite of theirs was rejected (--drop-rejected)
    unrendered: int = 0  # the chat template leaves part of the answer out: trained on the whole
    #   answer, but where it calls tools on what the template writes
    thought: int = 0  # tokens of answers without a loss: thoughts, as --thinking answer-only asks
    special: int = 0  # their text spells a special token, encoded as plain text

    def add(self, example: Example, turn: TrainedTurn, encoded: EncodedTurn, fit: Fit) -> None:
        """Count an example and how it was made."""
        tokens = len(example.ids)
        self.examples += 1
        self.tokens += tokens
        self.response_tokens += tokens - example.n_prompt
        is_cut = tokens < len(encoded.prompt) + len(encoded.answer)
        if is_cut and fit.in_proportion:
            self.cut += 1
        elif is_cut:
            self.truncated += 1
        if turn.sampled_ids is not None:
            self.from_response += 1
        if not turn.ends:
            self.unfinished += 1
        if turn.end_added:
            self.end_added += 1
        if turn.mixed:
            self.mixed += 1
        if not encoded.as_rendered:
            self.unrendered += 1
        self.thought += encoded.thought
        if fit.chat.spells_special([*turn.messages, turn.answer]):
            self.special += 1


def encode(
    rows: Sequence[Row] | Sequence[Distilled],
    chat: Chat,
    rules: EncodeRules,
) -> tuple[list[Example], EncodeCounts]:
    """One example per assistant turn: prompt ids, answer ids, the chat's end token.

    A response that hit the sampler's token limit gets no end token: a model must not learn to stop
    there. (Selection keeps such a response under --paper-exact only, which trains it with an end
    token, as published: counted.) Everything that is cut or left out is counted.

    ValueError, naming the turns, where the rules refuse their length, where an answer has no token,
    and where the chat template refuses a conversation (but for `skip_refused`).
    """
    are_plain = any(isinstance(row, Row) for row in rows[:1])  # rows are all of one kind
    check_target(rules.target, rules.mix, are_plain)
    references: dict[str, str] = {}
    if not are_plain:
        references = {line.id: line.reference for line in rows}
    if rules.drop_rejected:
        check_some_are_left(rows)
    encoding = Encoding(chat, rules, references)
    examples: list[Example] = []
    for row in rows:
        examples += encoding.examples(row)
    return examples, encoding.finish()


class Encoding:
    """`encode` for rows that come one after the other: none is kept in memory.

    `examples` of every row, then `finish`. `check_target` and `check_some_are_left` come before.
    """

    def __init__(self, chat: Chat, rules: EncodeRules, references: References) -> None:
        """references: those of all lines of distilled data (turns.py)."""
        self.rules = rules
        self.references = references
        self.counts = EncodeCounts()
        self._faults = _Faults()
        self._fit = Fit(
            chat, rules.max_length, rules.truncate, rules.in_proportion, rules.answer_only
        )

    def examples(self, row: Row | Distilled) -> Iterator[Example]:
        """The examples of a row, or the one of a line of distilled data."""
        rules = self.rules
        is_plain = isinstance(row, Row)
        if is_plain:
            self.counts.context += len(row.context_only)
        elif row.status == CONTEXT:
            self.counts.context += 1
        elif rules.drop_rejected and row.is_rejected:
            self.counts.rejected += 1
            return
        too_long_elsewhere = False
        if rules.leaves_out_long and not is_plain:
            too_long_elsewhere = self._is_too_long_as_some_target(row)
        for turn in self._turns(row, rules.target, rules.mix):
            example = self._example(turn, too_long_elsewhere)
            if example is not None:
                yield example

    def finish(self) -> EncodeCounts:
        """The counts of all rows; ValueError as `encode` raises it."""
        self.counts.refused = self._faults.refused.count
        self._faults.raise_first(self.rules)
        return self.counts

    def _turns(self, row: Row | Distilled, target: str, mix: float) -> Iterator[TrainedTurn]:
        return turns_to_train_on(row, target, mix, self.rules.seed, self.references)

    def _example(self, turn: TrainedTurn, too_long_elsewhere: bool) -> Example | None:
        """The example of a turn, which is counted; None for one that is left out or faulty."""
        fit = self._fit
        try:
            encoded = fit.encode(turn)
        except ValueError as error:  # the chat template refuses this conversation
            self._faults.refused.add(f"{turn.id}: {error}")
            return None
        if not encoded.answer:
            self._faults.empty.add(f"{_named(turn)}: no token to train on")
            return None
        cut = fit.cut(turn, encoded)
        if self.rules.leaves_out_long and (cut is None or too_long_elsewhere):
            self.counts.dropped += 1
            return None
        if cut is None:
            self._faults.add_too_long(turn, encoded, self.rules.max_length)
            return None
        example = Example(turn.id, cut.ids, cut.n_prompt)
        self.counts.add(example, turn, encoded, fit)
        return example

    def _is_too_long_as_some_target(self, line: Distilled) -> bool:
        """Whether the turn of a line is too long as a reference or as a rewrite, mixed or not.

        It is left out for every target, so that all arms train on the same turns.
        """
        every_target = (("reference", 0.0), ("target", 0.0), ("target", 1.0))  # (target, mix)
        for target, mix in every_target:
            for turn in self._turns(line, target, mix):
                try:
                    encoded = self._fit.encode(turn)
                except ValueError:  # refused by the template: `_example` reports it
                    continue
                if encoded.answer and self._fit.cut(turn, encoded) is None:
                    return True
        return False


def check_some_are_left(rows: Iterable[Row] | Iterable[Distilled]) -> None:
    """ValueError where --drop-rejected leaves no turn to train on: every rewrite was rejected.

    ValueError too for plain rows, of which nothing was rewritten.
    """
    rejected: Counter[str] = Counter()  # status -> lines
    others = 0
    for line in rows:
        if isinstance(line, Row):
            refuse_plain_rows()
        if line.is_rejected:
            rejected[line.status] += 1
        elif line.status != CONTEXT:
            others += 1
    if others:
        return
    listed = ", ".join(f"{status} {count}" for status, count in rejected.most_common())
    raise ValueError(
        f"--drop-rejected: all {rejected.total()} rewrites were rejected ({listed}), so nothing "
        "is left to train on; leave out --drop-rejected (the references are then trained on), "
        "or distil again with more tries (--cascade unguided:4,guided:4)"
    )


def refuse_plain_rows() -> NoReturn:
    """ValueError for --drop-rejected with rows that are no distilled data."""
    raise ValueError(
        "--drop-rejected: these rows have no rewrites that could be rejected; expected "
        "distilled data (scripts/distill.py makes it)"
    )


def _named(turn: TrainedTurn) -> str:
    """The turn's id, which may be a hash, with the beginning of the user's message."""
    beginning = turn.messages[-1]["content"][:40]
    return f"{turn.id} ({beginning!r})"


@dataclass
class _Faults:
    """Turns that cannot be trained on, by reason; each as one line of an error."""

    refused: FirstFaults = field(default_factory=FirstFaults)  # by the chat template
    empty: FirstFaults = field(default_factory=FirstFaults)
    no_room: FirstFaults = field(default_factory=FirstFaults)  # the prompt alone fills max_length
    too_long: FirstFaults = field(default_factory=FirstFaults)

    def add_too_long(self, turn: TrainedTurn, encoded: EncodedTurn, max_length: int) -> None:
        """Note a turn that does not fit."""
        n_prompt = len(encoded.prompt)
        n_answer = len(encoded.answer)
        if n_prompt >= max_length:
            self.no_room.add(f"{_named(turn)}: {n_prompt} prompt tokens leave no room")
        else:
            self.too_long.add(f"{_named(turn)}: {n_prompt} + {n_answer} tokens")

    def raise_first(self, rules: EncodeRules) -> None:
        """ValueError with the turns of the first reason there is, and what to do about them."""
        max_length = rules.max_length
        if self.refused.count and not rules.skip_refused:
            fault = f"{self.refused.count} turns are refused by the chat template"
            way_out = "change them, or leave them out with --skip-bad"
            raise ValueError(self.refused.listing(fault, way_out))
        if self.empty.count:
            fault = f"{self.empty.count} turns have no answer to train on"
            raise ValueError(self.empty.listing(fault, "remove them"))
        if self.no_room.count:
            fault = f"{self.no_room.count} turns cannot be trained on with max_length={max_length}"
            way_out = _way_out("leave them out with --drop-long", rules)
            raise ValueError(self.no_room.listing(fault, way_out))
        if self.too_long.count:
            fault = f"{self.too_long.count} turns are longer than max_length={max_length}"
            otherwise = "--truncate answers, or leave them out with --drop-long"
            way_out = _way_out(otherwise, rules)
            raise ValueError(self.too_long.listing(fault, way_out))


def _way_out(otherwise: str, rules: EncodeRules) -> str:
    """Advice for long turns: a larger --max-length only where the model's context has room."""
    if rules.model_limit is None or rules.max_length < rules.model_limit:
        return f"raise --max-length, or {otherwise}"
    return f"the model itself was made for {rules.model_limit} tokens: {otherwise}"


# ---- checks of rows and examples


def prompts_of(row: Row) -> list[tuple[dict[str, Any], ...]]:
    """The conversations that a model is asked to continue: the messages before every answer that
    is trained on, or all messages of a row without an answer."""
    if row.messages[-1]["role"] != "assistant":
        return [row.messages]
    prompts = []
    for turn, index in enumerate(row.turns):
        if turn not in row.context_only:
            prompts.append(row.messages[:index])
    return prompts


def template_takes(chat: Chat) -> Callable[[Row], None]:
    """A check for `load_rows`: ValueError for a row that the chat template refuses."""

    def check(row: Row) -> None:
        for messages in prompts_of(row):
            chat.render(messages, add_generation_prompt=True)
        for index in row.turns:
            if calls_of(row.messages[index]):
                chat.target(row.messages[:index], row.messages[index])

    return check


def check_examples(examples: Sequence[Example]) -> None:
    """ValueError where there is no example, or naming those that cannot be trained on."""
    if not examples:
        raise ValueError("there is nothing to train on: no example (all turns were left out)")
    empty = []
    for number, size in enumerate(sizes(examples)):
        has_both = 0 < size.n_prompt < size.tokens
        if not has_both:
            empty.append(examples[number].id)
    if empty:
        raise ValueError(f"{len(empty)} rows have no prompt or no response token: {empty[:10]}")


class ExampleSize(NamedTuple):
    """The tokens of an example."""

    tokens: int
    n_prompt: int  # of these, those without a loss


class ExamplesOnDisk(OnDemand[Example]):
    """Examples that are not in memory; what is known of them without reading their tokens."""

    @abstractmethod
    def sizes(self) -> Iterator[ExampleSize]:
        """The size of every example, in their order."""

    @abstractmethod
    def names(self) -> Iterator[str]:
        """The id of every example, in their order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """As `fingerprint` of a list of the same examples."""


def sizes(examples: Sequence[Example]) -> Iterator[ExampleSize]:
    """The size of every example, in their order."""
    if isinstance(examples, ExamplesOnDisk):
        yield from examples.sizes()
        return
    for example in examples:
        yield ExampleSize(len(example.ids), example.n_prompt)


def names(examples: Sequence[Example]) -> Iterator[str]:
    """The id of every example, in their order."""
    if isinstance(examples, ExamplesOnDisk):
        yield from examples.names()
        return
    for example in examples:
        yield example.id


class Fingerprint:
    """A hash of examples, which are added one after the other: ids, tokens, where loss begins."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, example: Example) -> None:
        """Add the next example."""
        text = json.dumps([example.id, example.ids, example.n_prompt])
        self._digest.update(text.encode())

    def hexdigest(self) -> str:
        """The hash of the examples so far, as hex digits."""
        return self._digest.hexdigest()


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of the examples: ids, tokens, and where the loss begins."""
    if isinstance(examples, ExamplesOnDisk):
        return examples.fingerprint()
    digest = Fingerprint()
    for example in examples:
        digest.add(example)
    return digest.hexdigest()
