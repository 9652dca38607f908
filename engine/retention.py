"""Retention: how far an adapter moved the model on everything it was not trained on

The seed model answers general prompts greedily. Over the tokens of those answers, seed and tuned
model are compared in full distribution, position by position:

    KL(seed || tuned) = sum_v p(v) (log p(v) - log q(v)),  p the seed's probabilities, q the tuned's
    agreement         = share of positions at which both have the same likeliest token

Deterministic, local, no judge. Sums per prompt are kept, never logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data import load_rows
from engine.evaluate import Arms, adapter_hashes, resume_lines
from engine.log import AppendedLines, progress, sha256, table
from engine.retention_prompts import PROMPTS
from engine.sampler import Request, Sampler, SamplerConfig
from engine.session import Session
from kernels.context import Packed
from model.chat import Chat
from model.llama import Llama

CHUNK = 64  # positions whose distributions are held at once


def retention(
    model: Llama,
    chat: Chat,
    arms: Arms,
    out: Path,
    sampling: SamplerConfig,
    settings: dict[str, Any],
    prompts: Sequence[tuple[str, str]] = PROMPTS,
) -> dict[str, dict[str, float]]:
    """KL per token and agreement of every arm but the seed; a line per prompt and arm in `out`."""
    done = {(r["arm"], r["prompt"]): r for r in resume_lines(out, settings)}
    tuned = {arm: lora for arm, lora in arms.items() if lora is not None}
    todo = [(c, p) for c, p in prompts if any((arm, p) not in done for arm in tuned)]
    asked = {p: chat.prompt_ids([{"role": "user", "content": p}]) for _, p in todo}
    answers = {}
    if todo:
        with Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling) as sampler:
            requests = [Request(prompt, ids) for prompt, ids in asked.items()]
            bar = progress(
                sampler.run(requests), desc="seed's answers", total=len(todo), unit="row"
            )
            answers = {answer.id: answer for answer in bar}
    with AppendedLines(out) as file:
        for category, prompt in progress(todo, desc="retention", unit="row"):
            answer = answers[prompt]
            ends = [chat.end_id] if answer.finish == "stop" else []
            ids = [*asked[prompt], *answer.ids, *ends]
            seed = hidden_states(model, ids, len(asked[prompt]), None)
            for arm, lora in tuned.items():
                if (arm, prompt) in done:
                    continue
                kl, same = compare(model, seed, hidden_states(model, ids, len(asked[prompt]), lora))
                line = {"arm": arm, "category": category, "prompt": prompt, "answer": answer.text}
                line |= {"tokens": len(seed), "kl": kl, "agree": same}
                file.write(line)
                done[arm, prompt] = line
    return {arm: _means([done[arm, p] for _, p in prompts]) for arm in tuned}


def retention_job(
    session: Session,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
    data: str | None = None,
) -> dict[str, dict[str, float]]:
    """Measure adapters on our prompts or a file's, print the table."""
    session.alone("retention")
    prompts: Sequence[tuple[str, str]] = PROMPTS
    if data is not None:
        rows = load_rows(data, need_reference=False)
        several = [row.id for row in rows if len(row.messages) != 1]
        if several:
            raise ValueError(f"{data}: rows {several[:5]} are conversations; prompts are wanted")
        prompts = list(dict.fromkeys(("file", row.messages[0]["content"]) for row in rows))
    arms: Arms = {"seed": None, **session.adapters(adapters)}
    settings = session.settings | {
        "sampling": sampling.settings(),
        "adapters": adapter_hashes(adapters),
        "prompts": sha256(repr(prompts)),
    }
    drift = retention(session.model, session.chat, arms, out, sampling, settings, prompts)
    categories = [name for name in next(iter(drift.values())) if name.startswith("kl ")]
    lines = [["", "KL to seed", "same top-1", *categories]]
    for arm, means in drift.items():
        cells = [f"{means['kl']:.4f}", f"{means['agreement']:.1%}"]
        lines.append([arm, *cells, *(f"{means[c]:.4f}" for c in categories)])
    print(f"{table(lines)}\nnats per token over the seed's own answers; by prompt: {out}")
    return drift


def hidden_states(model: Llama, ids: Sequence[int], start: int, lora: Any) -> Tensor:
    """Hidden states from which the answer's tokens are predicted: (answer tokens, D)."""
    tokens = torch.tensor(ids, device=model.device)
    packed = Packed.from_lengths([len(ids)], model.device)
    return model.forward(tokens, packed, lora=lora)[start - 1 : -1]


def compare(model: Llama, seed: Tensor, tuned: Tensor) -> tuple[float, int]:
    """Summed KL(seed || tuned) in nats and the number of agreeing positions; hidden (N, D) each."""
    kl, same = 0.0, 0
    for i in range(0, len(seed), CHUNK):
        p, q = (
            torch.log_softmax(model.head(h[i : i + CHUNK]).float(), dim=-1) for h in (seed, tuned)
        )
        kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
    return kl, same


def _means(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Per token over all prompts, and per category."""
    tokens = sum(line["tokens"] for line in lines)
    means = {
        "kl": sum(line["kl"] for line in lines) / tokens,
        "agreement": sum(line["agree"] for line in lines) / tokens,
        "tokens": tokens,
    }
    for category in dict.fromkeys(line["category"] for line in lines):
        mine = [line for line in lines if line["category"] == category]
        means[f"kl {category}"] = sum(x["kl"] for x in mine) / sum(x["tokens"] for x in mine)
    return means
