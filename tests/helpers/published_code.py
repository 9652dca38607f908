"""The arithmetic of the published code, as far as tests compare with it."""

from __future__ import annotations


def published_lengths(turns: list[tuple[int, int]], limit: int = 1024) -> tuple[int, int]:
    """(tokens, tokens with loss) of a conversation that LLaMA-Factory of 2023 trains on.

    turns    (tokens before the answer, tokens of the answer) of every turn
    limit    its cutoff_len; its reserved_label_len is 1

    The prompt and the answer of a turn lose their ends in proportion to their lengths.
    """
    has_loss: list[bool] = []  # by token
    for prompt, answer in turns:
        answer_limit = max(int(limit * (answer / (prompt + answer))), 1)
        prompt_limit = limit - answer_limit
        has_loss += [False] * min(prompt, prompt_limit)
        has_loss += [True] * min(answer, answer_limit)
    tokens = len(has_loss[:limit])
    tokens_with_loss = sum(has_loss[:limit])
    return tokens, tokens_with_loss
