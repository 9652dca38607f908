"""Encoded examples for a terminal: every token, and which of them carry loss."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.data.encode import Example

if TYPE_CHECKING:
    from model.tokenizer_base import Tokenizer

WIDTH = 96  # columns


def show(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    n: int,
    losses: Sequence[Sequence[float]] | None = None,
) -> str:
    """The first n examples as text: every token as id and piece; lines with `*` carry loss.

    losses: for each example the nats of its response tokens, written after each token.
    """
    lines = []
    for number, example in enumerate(examples[:n]):
        prompt, response = example.ids[: example.n_prompt], example.ids[example.n_prompt :]
        nats = None if losses is None else losses[number]
        mean = "" if nats is None else f", {sum(nats) / len(response):.3f} nats each"
        lines.append(
            f"{example.id}: {len(example.ids)} tokens, {len(response)} with loss (*){mean}"
        )
        lines += _wrapped("    ", _pieces(prompt, tokenizer))
        pieces = _pieces(response, tokenizer)
        if nats is not None:
            pieces = [f"{piece}:{value:.2f}" for piece, value in zip(pieces, nats, strict=True)]
        lines += _wrapped("  * ", pieces)
    return "\n".join(lines)


def _pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each token as id and piece; a piece's own spaces become ␣, so lines break between tokens."""
    return [f"{token}{tokenizer.piece(token)!r}".replace(" ", "␣") for token in ids]


def _wrapped(margin: str, pieces: list[str]) -> list[str]:
    return textwrap.wrap(
        " ".join(pieces),
        width=WIDTH,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
