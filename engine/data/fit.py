"""The tokens of a turn, and which of them are trained on where there are too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.data.thinking import end_of_thoughts
from engine.data.turns import TrainedTurn
from model.messages import calls_of

if TYPE_CHECKING:
    from model.chat import Chat


class EncodedTurn(NamedTuple):
    """All tokens of a turn."""

    prompt: list[int]
    answer: list[int]  # with the end token, where the turn ends with it
    as_rendered: bool  # whether the chat template writes the whole answer
    thought: int = 0  # tokens with which the answer begins and which carry no loss


class CutTurn(NamedTuple):
    """The tokens of a turn within the length rules."""

    ids: list[int]
    n_prompt: int  # of `ids`, those of the prompt, and of a thought without a loss; the others
    #   carry the loss


class TurnTokens(NamedTuple):
    """The tokens of one turn of a conversation."""

    source: list[int]  # before the answer
    target: list[int]  # the answer with its end token


class Fit:
    """Encodes turns, and applies the length rules of a training.

    max_length: tokens of an example. truncate: a longer answer loses its end. in_proportion: prompt
    and answer lose their ends in proportion (`cut_in_proportion`). With neither, a longer turn does
    not fit. answer_only: the thoughts with which an answer begins carry no loss.
    """

    def __init__(
        self,
        chat: Chat,
        max_length: int,
        truncate: bool,
        in_proportion: bool,
        answer_only: bool = False,
    ) -> None:
        self.chat = chat
        self.max_length = max_length
        self.truncate = truncate
        self.in_proportion = in_proportion
        self.answer_only = answer_only

    def encode(self, turn: TrainedTurn) -> EncodedTurn:
        """All tokens of a turn; an empty answer gets no end token.

        A text is encoded as the chat template renders it; sampled ids stay as they are, after the
        prompt they were sampled from. ValueError where the template refuses the conversation, or an
        id has no embedding.
        """
        if turn.sampled_ids is None:
            target = self.chat.target(turn.messages, turn.calling or turn.text)
            prompt = target.prompt
            answer = target.answer
            as_rendered = target.as_rendered
        else:
            self.chat.check_ids(turn.sampled_ids)
            prompt = self.chat.prompt_ids(turn.messages)
            answer = turn.sampled_ids
            as_rendered = True
        thought = thought_tokens(self.chat, answer) if self.answer_only else 0
        if answer and turn.ends:
            end_id = self.chat.end_id_of(turn.calling) if turn.calling else self.chat.end_id
            answer = [*answer, end_id]
        return EncodedTurn(prompt, answer, as_rendered, thought)

    def cut(self, turn: TrainedTurn, encoded: EncodedTurn) -> CutTurn | None:
        """The turn within the length rules; None where it does not fit."""
        prompt = encoded.prompt
        answer = encoded.answer
        if self.in_proportion:
            turns = self._earlier_turns(turn.messages, prompt)
            done = sum(len(earlier.source) + len(earlier.target) for earlier in turns)
            turns.append(TurnTokens(prompt[done:], answer))
            cut = cut_in_proportion(turns, self.max_length)
            return _after_thought(cut, encoded.thought)
        room = self.max_length - len(prompt)
        if room < 1 or (len(answer) > room and not self.truncate):
            return None
        cut = CutTurn(prompt + answer[:room], len(prompt))
        return _after_thought(cut, encoded.thought)

    def _earlier_turns(
        self, messages: Sequence[dict[str, Any]], prompt: list[int]
    ) -> list[TurnTokens]:
        """The earlier turns in a prompt, as parts of its ids.

        The parts are found by their lengths; where a token merges with the next turn's text, a
        boundary can be off by one.
        """
        turns: list[TurnTokens] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(self.chat.prompt_ids(messages[:index]))
                n_answer = len(answer_ids(self.chat, messages[:index], message)) + 1  # and the end
                end = start + n_answer
                turns.append(TurnTokens(prompt[done:start], prompt[start:end]))
                done = end
        return turns


def answer_ids(chat: Chat, context: Sequence[dict[str, Any]], answer: dict[str, Any]) -> list[int]:
    """Ids of an earlier answer to `context`, no end token."""
    if calls_of(answer):
        return chat.target(context, answer).answer
    return chat.response_ids(answer["content"])


def thought_tokens(chat: Chat, answer: Sequence[int]) -> int:
    """How many tokens an answer begins with that hold nothing but its thoughts.

    A token that holds the end of a thought and the beginning of what follows it counts as the
    latter.
    """
    text = chat.tokenizer.decode(answer)
    end = end_of_thoughts(text)
    if end == 0:
        return 0
    most = len(answer)  # the largest count that may still be one of thoughts
    least = 0  # the largest count that is known to be one
    while least < most:
        middle = (least + most + 1) // 2
        if len(chat.tokenizer.decode(answer[:middle])) <= end:
            least = middle
        else:
            most = middle - 1
    return least


def _after_thought(cut: CutTurn | None, thought: int) -> CutTurn | None:
    """The turn with a loss behind its thought alone; None where nothing is left of the answer."""
    if cut is None or cut.n_prompt + thought >= len(cut.ids):
        return None
    return CutTurn(cut.ids, cut.n_prompt + thought)


def cut_in_proportion(turns: Sequence[TurnTokens], limit: int) -> CutTurn | None:
    """A conversation within `limit` tokens as the published code cuts it (LLaMA-Factory of 2023).

    Of `limit` tokens prompt and answer of a turn get the shares that they have in the turn, the
    answer at least one token; the whole conversation then loses its end. Returns the ids, with the
    number that precede the last answer; None where nothing of that answer is left.
    """
    ids: list[int] = []
    before_last = 0
    for source, target in turns:
        # the order of these operations is theirs: at exactly `limit` tokens rounding can cut one
        target_share = len(target) / (len(source) + len(target))
        target_limit = max(int(limit * target_share), 1)
        ids += source[: limit - target_limit]
        before_last = len(ids)
        ids += target[:target_limit]
    ids = ids[:limit]
    if before_last >= len(ids):
        return None
    return CutTurn(ids, before_last)
