"""The notice about a chat template whose prompts do not end as its finished answers begin."""

from __future__ import annotations

from model.control_tokens import QUESTION


def notice_of_prompt(name: str, header: str, prompt: str, common: str, whole: str) -> str | None:
    """A line for the user where a finished answer does not begin as the prompt ends, else None.

    prompt: a rendered question, with the generation prompt `header` behind it. whole: the same
    question with an answer. common: what both begin with. name: of the template.
    """
    if len(common) == len(prompt):
        return None
    if len(prompt) - len(common) <= len(header):
        prompt_end = header
        answered = whole.rpartition(QUESTION)[2]
        effect = (
            "the references are trained on as it writes them, the model's own answers as they "
            "were sampled"
        )
    else:
        prompt_end = prompt
        answered = whole
        effect = "answers are trained on behind the prompt, which it would not write so"
    return (
        f"the {name} chat template ends a prompt with {prompt_end!r} and writes a "
        f"finished answer as {answered!r}: {effect}"
    )
