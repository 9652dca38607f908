"""Encoded examples for a terminal: every token, and where the loss is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.tokenizer_base import Tokenizer
from engine.data.encode import Example


def show(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    n: int,
    losses: Sequence[Sequence[float]] | None = None,
) -> str:
    """The first n examples for a terminal: every token as id and piece; `*` marks loss.

    With `losses`, per example those of its response tokens (nats), each stands behind its token.
    """
    lines = []
    for number, example in enumerate(examples[:n]):
        loss = len(example.ids) - example.n_prompt
        mean = "" if losses is None else f", {sum(losses[number]) / loss:.3f} nats each"
        lines.append(f"{example.id}: {len(example.ids)} tokens, {loss} with loss (*){mean}")
        halves = example.ids[: example.n_prompt], example.ids[example.n_prompt :]
        for margin, ids in zip(("    ", "  * "), halves, strict=True):
            # A piece's own spaces become ␣, so that lines break between tokens only.
            tokens = [f"{i}{tokenizer.piece(i)!r}".replace(" ", "␣") for i in ids]
            if losses is not None and margin.strip():
                pairs = zip(tokens, losses[number], strict=True)
                tokens = [f"{token}:{nats:.2f}" for token, nats in pairs]
            lines += textwrap.wrap(
                " ".join(tokens),
                width=96,
                initial_indent=margin,
                subsequent_indent=margin,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)
