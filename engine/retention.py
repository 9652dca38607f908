"""Retention: how far an adapter moved the model on everything it was not trained on

The seed model answers general prompts greedily. Over the tokens of those answers, seed and tuned
model are compared in full distribution, position by position; p the seed's probabilities, q the
tuned model's:

    KL(seed || tuned) = sum_v p(v) (log p(v) - log q(v))     what the seed said and is lost
    KL(tuned || seed) = sum_v q(v) (log q(v) - log p(v))     what is said now and was not
    agreement         = share of positions at which both have the same likeliest token
    NLL               = -log q(token) of the seed's own answer, beside -log p(token)

Deterministic, local, no judge. Sums per prompt are kept, never logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data import template_takes
from engine.evaluate import Arms, adapter_hashes, put_in_order, resume_lines
from engine.intervals import bootstrap
from engine.log import AppendedLines, progress, sha256, table
from engine.process import SAMPLE_LESS, memory_for
from engine.retention_prompts import PROMPTS
from engine.sampler import Request, Sampler, SamplerConfig
from engine.session import DataConfig, Session, meta_of
from engine.similarity import Embedder
from kernels.context import Packed
from model.chat import Chat
from model.llama import Llama

CHUNK = 64  # positions whose distributions are held at once
Prompts = Sequence[tuple[str, str]]  # (category, prompt)


@dataclass
class SeedAnswer:
    """What the seed model says to a general prompt."""

    category: str
    prompt: str
    answer: str
    ids: list[int]  # prompt and answer, the end token included where the answer ended
    start: int  # tokens of the prompt
    states: Tensor | None = None  # the seed's hidden states, once somebody needed them

    def hidden(self, model: Llama) -> Tensor:
        """The seed's hidden states from which the answer is predicted: (answer tokens, D)."""
        if self.states is None:
            self.states = hidden_states(model, self.ids, self.start, None)
        return self.states


@dataclass(frozen=True)
class Drift:
    """Sums over the positions of one answer, in nats; `agree` counts positions."""

    kl: float  # KL(seed || tuned)
    reverse_kl: float  # KL(tuned || seed)
    agree: int  # positions at which both have the same likeliest token
    nll: float  # of the answer's tokens under the tuned model
    seed_nll: float  # and under the seed


@memory_for("answering general prompts", SAMPLE_LESS)
def seed_answers(
    model: Llama,
    chat: Chat,
    out: Path,
    sampling: SamplerConfig,
    settings: dict[str, Any],
    prompts: Prompts = PROMPTS,
) -> list[SeedAnswer]:
    """The seed's greedy answers, kept in `out` (a line per prompt); those there are not made again.

    ValueError where the file was made under other settings.
    """
    settings = settings | {"prompts": sha256(repr(list(prompts)))}
    wanted = {"prompt": str, "answer": str, "ids": list}
    done = {line["prompt"]: line for line in resume_lines(out, settings, wanted)}
    todo = [prompt for _, prompt in prompts if prompt not in done]
    with AppendedLines(out) as file:
        if todo:
            requests = [Request(p, chat.prompt_ids([{"role": "user", "content": p}])) for p in todo]
            with Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling) as sampler:
                bar = progress(
                    sampler.run(requests), desc="seed's answers", total=len(todo), unit="row"
                )
                for said in bar:
                    ids = [*said.ids, *([chat.end_id] if said.finish == "stop" else [])]
                    line = {"prompt": said.id, "answer": said.text, "ids": ids}
                    line |= {"finish": said.finish}
                    file.write(line)
                    done[said.id] = line
    put_in_order(out, done, [prompt for _, prompt in prompts])
    found = []
    for category, prompt in prompts:
        asked, line = chat.prompt_ids([{"role": "user", "content": prompt}]), done[prompt]
        ids = [*asked, *line["ids"]]
        if line["ids"]:
            found.append(SeedAnswer(category, prompt, line["answer"], ids, len(asked)))
    if not found:
        raise ValueError("the seed has no room to answer any of the prompts; give shorter ones")
    if len(found) < len(prompts):
        print(f"{len(prompts) - len(found)} prompts left out: the seed has no room to answer")
    return found


@memory_for("comparing answers to general prompts", "give shorter answers (--max-new-tokens)")
def retention(
    model: Llama,
    answers: Sequence[SeedAnswer],
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Drift of every arm but the seed (`means` says what is in it); a line per prompt and arm."""
    every = resume_lines(out, settings, {"arm": str, "prompt": str})
    lines = [r for r in every if "reverse_kl" in r]  # older runs lack it
    done = {(r["arm"], r["prompt"]): r for r in lines}
    tuned = {arm: lora for arm, lora in arms.items() if lora is not None}
    todo = [a for a in answers if any((arm, a.prompt) not in done for arm in tuned)]
    with AppendedLines(out) as file:
        for said in progress(todo, desc="retention", unit="row") if todo else ():
            for arm, lora in tuned.items():
                if (arm, said.prompt) in done:
                    continue
                after = hidden_states(model, said.ids, said.start, lora)
                drift = compare(model, said.hidden(model), after, said.ids[said.start :])
                line = {"arm": arm, "category": said.category, "prompt": said.prompt}
                line |= {"answer": said.answer, "tokens": len(after)} | dataclasses.asdict(drift)
                file.write(line)
                done[arm, said.prompt] = line
    put_in_order(out, done, [(arm, said.prompt) for said in answers for arm in tuned])
    return {arm: means([done[arm, said.prompt] for said in answers]) for arm in tuned}


def retention_job(
    session: Session,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
    data: DataConfig | None = None,
    similar: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure adapters on our prompts or a file's, print the table.

    With `similar` also how alike the adapters' own answers are to the seed's (OUT.similar.jsonl).
    """
    session.alone("retention")
    embed = Embedder() if similar else None
    prompts: Prompts = PROMPTS
    if data is not None:
        rows = data.load(need_reference=False, check=template_takes(session.chat))
        several = [row.id for row in rows if len(row.messages) != 1]
        if several:
            raise ValueError(
                f"{data.data}: rows {several[:5]} are conversations; prompts are wanted"
            )
        prompts = list(dict.fromkeys(("file", row.messages[0]["content"]) for row in rows))
    arms: Arms = {"seed": None, **session.adapters(adapters)}
    settings = session.settings | {"sampling": sampling.settings()}
    said = seed_answers(
        session.model,
        session.chat,
        seed_file(out),
        sampling,
        settings,
        prompts,
    )
    settings |= {"adapters": adapter_hashes(adapters), "prompts": sha256(repr(prompts))}
    drift = retention(session.model, said, arms, out, settings)
    print(retention_table(drift))
    if embed is not None:
        file = out.with_name(out.name + ".similar.jsonl")
        for arm, m in similarity(
            session.model, session.chat, embed, said, arms, file, sampling, settings
        ).items():
            drift[arm] |= {"similarity": m}
            low, high = m["interval"]
            print(
                f"{arm}: its own answers resemble the seed's by {m['similarity']:.3f} (cosine of "
                f"sentence embeddings, {low:.3f} - {high:.3f}), {m['same']:.0%} are the same"
            )
    print(f"by prompt: {out}")
    return drift


def seed_file(out: Path) -> Path:
    """Where the seed's answers lie, beside the file of what was measured over them."""
    return out.with_name(out.name + ".seed.jsonl")


def retention_metas(out: Path) -> list[Path]:
    """Where the settings of a run of `retention_job` lie."""
    return [meta_of(out), meta_of(seed_file(out))]


def retention_table(drift: dict[str, dict[str, Any]]) -> str:
    """All means of all arms as text, and what they are."""
    categories = list(next(iter(drift.values()))["categories"])
    lines = [["", "KL to seed", "95 % interval", "KL from seed", "same top-1", "NLL", "seed NLL"]]
    lines[0] += [f"KL {name}" for name in categories]
    for arm, m in drift.items():
        low, high = m["kl_interval"]
        cells = [f"{m['kl']:.4f}", f"{low:.4f} - {high:.4f}", f"{m['reverse_kl']:.4f}"]
        cells += [f"{m['agreement']:.1%}", f"{m['nll']:.3f}", f"{m['seed_nll']:.3f}"]
        lines.append([arm, *cells, *(f"{m['categories'][c]['kl']:.4f}" for c in categories)])
    return (
        f"{table(lines)}\nnats per token over the seed's own answers: KL(seed || tuned), "
        "KL(tuned || seed), NLL of the answers under the tuned model and the seed; intervals: "
        "bootstrap over prompts"
    )


@memory_for("answering general prompts", SAMPLE_LESS)
def similarity(
    model: Llama,
    chat: Chat,
    embed: Embedder,
    answers: Sequence[SeedAnswer],
    arms: Arms,
    out: Path,
    sampling: SamplerConfig,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Mean cosine between the seed's and each arm's own greedy answer to the same prompts.

    Per arm `similarity`, its 95 % `interval` (bootstrap over prompts) and `same`, the share of
    answers that are the seed's to the letter. `out` keeps a line per arm and prompt.
    """
    wanted = {"arm": str, "prompt": str, "answer": str, "similarity": float}
    done = {(line["arm"], line["prompt"]): line for line in resume_lines(out, settings, wanted)}
    by_prompt = {said.prompt: said for said in answers}
    tuned = {arm: lora for arm, lora in arms.items() if lora is not None}
    with AppendedLines(out) as file:
        for arm, lora in tuned.items():
            todo = [said for said in answers if (arm, said.prompt) not in done]
            if not todo:
                continue
            requests = [Request(said.prompt, said.ids[: said.start]) for said in todo]
            with (
                Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling, lora) as sampler,
                progress(total=len(todo), desc=f"answers of {arm}", unit="row") as bar,
            ):
                for now in sampler.run(requests):
                    before = by_prompt[now.id]
                    a, b = embed([before.answer.strip(), now.text.strip()])
                    line = {"arm": arm, "category": before.category, "prompt": now.id}
                    line |= {"answer": now.text, "similarity": (a @ b).item()}
                    file.write(line)
                    done[arm, now.id] = line
                    bar.update()
    put_in_order(out, done, [(arm, said.prompt) for arm in tuned for said in answers])
    found = {}
    for arm in tuned:
        lines = [done[arm, said.prompt] for said in answers]
        values = [line["similarity"] for line in lines]
        same = [line["answer"] == by_prompt[line["prompt"]].answer for line in lines]
        found[arm] = {
            "similarity": sum(values) / len(values),
            "interval": bootstrap(values, [1.0] * len(values)),
            "same": sum(same) / len(same),
        }
    return found


def hidden_states(model: Llama, ids: Sequence[int], start: int, lora: Any) -> Tensor:
    """Hidden states from which the answer's tokens are predicted: (answer tokens, D)."""
    tokens = torch.tensor(ids, device=model.device)
    packed = Packed.from_lengths([len(ids)], model.device)
    return model.forward(tokens, packed, lora=lora)[start - 1 : -1]


def compare(model: Llama, seed: Tensor, tuned: Tensor, ids: Sequence[int]) -> Drift:
    """Two models, or two contexts of one, over the same N tokens: hidden states (N, D), ids (N,).

    The distributions are taken in fp32 at least, the sums over positions in fp64.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=seed.device)
    wanted = torch.tensor(ids, device=seed.device)[:, None]
    for i in range(0, len(seed), CHUNK):
        logits = [model.head(h[i : i + CHUNK]) for h in (seed, tuned)]
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        p, q = (torch.log_softmax(x.to(dtype), dim=-1) for x in logits)
        apart, there = p - q, wanted[i : i + CHUNK]
        found = (
            (p.exp() * apart).sum(-1),
            -(q.exp() * apart).sum(-1),
            p.argmax(-1) == q.argmax(-1),
            -q.gather(1, there),
            -p.gather(1, there),
        )
        sums += torch.stack([value.double().sum() for value in found])
    kl, reverse, agree, nll, seed_nll = sums.tolist()
    return Drift(kl, reverse, int(agree), nll, seed_nll)


def means(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per token over prompts: kl with its 95 % interval (bootstrap over prompts), reverse_kl,
    agreement, nll, seed_nll; the same by category under `categories`."""
    found = _means(lines)
    found["categories"] = {
        name: _means([line for line in lines if line["category"] == name])
        for name in dict.fromkeys(line["category"] for line in lines)
    }
    return found


def _means(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = [line["tokens"] for line in lines]
    names = {"kl": "kl", "reverse_kl": "reverse_kl", "agree": "agreement"}
    names |= {"nll": "nll", "seed_nll": "seed_nll"}
    found: dict[str, Any] = {
        name: sum(line[key] for line in lines) / sum(tokens) for key, name in names.items()
    }
    found["kl_interval"] = bootstrap([line["kl"] for line in lines], tokens)
    return found | {"tokens": sum(tokens), "prompts": len(lines)}
