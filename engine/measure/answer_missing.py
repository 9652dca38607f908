"""Sample the answers that a file of results lacks, and append each as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from engine.runtime.resumable import ResumedLines
from engine.runtime.terminal import progress
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request
from model.lora import Lora


def answer_missing(
    generator: ChatGenerator,
    lora: Lora | None,
    requests: Mapping[Hashable, Request],
    file: ResumedLines,
    to_line: Callable[[Completion], dict[str, Any]],
    label: str,
) -> None:
    """Answer those of `requests` whose line `file` lacks; no sampler is opened where none does.

    lora        the adapter to sample with; None: the seed model
    requests    by the key of their line in `file`
    to_line     makes the line of a finished answer
    label       text before the progress bar
    """
    missing = [request for key, request in requests.items() if key not in file.done]
    if not missing:
        return
    with (
        generator.sampler(lora) as sampler,
        progress(total=len(missing), desc=label, unit="answer") as bar,
    ):
        for completion in sampler.run(missing):
            file.write(to_line(completion))
            bar.update()
