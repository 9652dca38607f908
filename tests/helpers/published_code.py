"""The arithmetic of the published code, as far as tests compare with it."""

from __future__ import annotations


def published_lengths(turns: list[tuple[int, int]], limit: int = 1024) -> tuple[int, int]:
    """(tokens, tokens with loss) that LLaMA-Factory of 2023 trains on.

    turns: tokens before each answer, and of the answer (its cutoff_len 1024, reserved_label_len 1).
    """
    labels: list[bool] = []
    for source, target in turns:
        longest = max(int(limit * (target / (source + target))), 1)
        labels += [False] * min(source, limit - longest) + [True] * min(target, longest)
    return len(labels[:limit]), sum(labels[:limit])
