"""`--show`: what is trained on, token by token, without training."""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.config import DataConfig
from engine.data.encode import EncodeRules, Example, check_examples
from engine.data.show import show
from engine.measure.likelihood import nll
from engine.session import Session
from engine.train.file_examples import FileExamples


def show_examples(session: Session, data: DataConfig, rules: EncodeRules, count: int) -> None:
    """Print the first examples of the file; all of it is read, and what was cut is printed.

    ValueError for rows that cannot be used, and where no example is left.
    """
    of_file = FileExamples(session, data, rules)
    first: list[Example] = []
    for example in of_file:
        if len(first) < count:
            first.append(example)
    print(*of_file.text, sep="\n")
    check_examples(first)
    _print_examples(session, first)


def _print_examples(session: Session, examples: Sequence[Example]) -> None:
    """Print every token of the examples, those with loss with their nats under the seed."""
    losses = []
    for example in examples:
        prompt = example.ids[: example.n_prompt]
        answer = example.ids[example.n_prompt :]
        losses.append(nll(session.model, prompt, answer).tolist())
    print(show(examples, session.chat.tokenizer, len(examples), losses))
