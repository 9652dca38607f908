"""A model with its chat format and its decoding settings: everything that answers a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.sampling.requests import SamplerConfig
from engine.sampling.sampler import Sampler
from model.chat import Chat
from model.llama import Llama
from model.lora import Lora


@dataclass(frozen=True)
class ChatGenerator:
    """Opens samplers of one model, for the seed and for adapters."""

    model: Llama
    chat: Chat
    sampling: SamplerConfig

    def sampler(self, lora: Lora | None = None) -> Sampler:
        """A sampler of the model, with the adapter if one is given; to be used in `with`."""
        chat = self.chat
        return Sampler(self.model, chat.tokenizer.decode, chat.end_ids, self.sampling, lora)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of one user message in the chat format."""
        return self.chat.prompt_ids([{"role": "user", "content": text}])

    def answer_ids(self, ids: Sequence[int], finish: str) -> list[int]:
        """The ids of an answer, with the end token where it was sampled (finish "stop")."""
        answer = list(ids)
        if finish == "stop":
            answer.append(self.chat.end_id)
        return answer
