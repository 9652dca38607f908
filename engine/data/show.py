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
        prompt = example.ids[: example.n_prompt]
        response = example.ids[example.n_prompt :]
        pieces = _pieces(response, tokenizer)
        heading = f"{example.id}: {len(example.ids)} tokens, {len(response)} with loss (*)"
        if losses is not None:
            nats = losses[number]
            heading += f", {sum(nats) / len(response):.3f} nats each"
            pieces = [f"{piece}:{value:.2f}" for piece, value in zip(pieces, nats, strict=True)]
        lines.append(heading)
        lines += _wrapped("    ", _pieces(prompt, tokenizer))
        lines += _wrapped("  * ", pieces)
    return "\n".join(lines)


def _pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each token as id and piece; a piece's own spaces become ␣, so lines break between tokens."""
    pieces = []
    for token in ids:
        piece = f"{token}{tokenizer.piece(token)!r}"
        pieces.append(piece.replace(" ", "␣"))
    return pieces


def _wrapped(margin: str, pieces: list[str]) -> list[str]:
    """Lines of at most WIDTH columns that begin with the margin and break between pieces."""
    return textwrap.wrap(
        " ".join(pieces),
        width=WIDTH,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
