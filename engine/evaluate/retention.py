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
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.encode import template_takes
from engine.evaluate.target_task import Arms, adapter_hashes
from engine.measure.divergence import compare, hidden_states, mean_drift
from engine.measure.general_prompts import PROMPTS
from engine.measure.intervals import bootstrap
from engine.measure.seed_answers import Prompts, SeedAnswer, seed_answers, seed_file
from engine.measure.similarity import Embedder
from engine.runtime.files import AppendedLines, sha256
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable_answers import meta_of, put_in_order, resume_lines
from engine.runtime.terminal import progress, table
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import Session
from model.chat import Chat
from model.llama import Llama


@memory_for("comparing answers to general prompts", "give shorter answers (--max-new-tokens)")
def retention(
    model: Llama,
    answers: Sequence[SeedAnswer],
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Drift of every arm but the seed (fields: `mean_drift`); a line per prompt and arm."""
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
    return {arm: mean_drift([done[arm, said.prompt] for said in answers]) for arm in tuned}


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
