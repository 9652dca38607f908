"""Retention: how far an adapter moved the model on everything it was not trained on

The seed model answers general prompts greedily. Over the tokens of those answers, seed and tuned
model are compared in full distribution, position by position; p the seed's probabilities, q the
tuned model's:

    KL(seed || tuned) = sum_v p(v) (log p(v) - log q(v))     high where an answer was lost
    KL(tuned || seed) = sum_v q(v) (log q(v) - log p(v))     high where a new answer appeared
    agreement         = share of positions at which both have the same likeliest token
    NLL               = -log q(token) of the seed's own answer, beside -log p(token)

Deterministic, local, no judge. Sums per prompt are kept, never logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.encode import template_takes
from engine.evaluate.arms import Arms, adapter_hashes, tuned
from engine.measure.answer_missing import answer_missing
from engine.measure.divergence import compare, hidden_states, mean_drift
from engine.measure.general_prompts import PROMPTS
from engine.measure.intervals import bootstrap
from engine.measure.seed_answers import Prompts, SeedAnswer, seed_answers, seed_file
from engine.measure.similarity import Embedder
from engine.runtime.files import sha256
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines, meta_file
from engine.runtime.terminal import progress, table
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import Session
from model.llama import Llama
from model.lora import Lora

by_arm_and_prompt = itemgetter("arm", "prompt")


@memory_for("comparing answers to general prompts", "give shorter answers (--max-new-tokens)")
def retention(
    model: Llama,
    answers: Sequence[SeedAnswer],
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Drift of every arm but the seed (fields: `mean_drift`); a line per prompt and arm."""
    fields = {"arm": str, "prompt": str}
    adapters = tuned(arms)
    with ResumedLines(
        out,
        settings,
        key=by_arm_and_prompt,
        wanted=fields,
        keep=lambda line: "reverse_kl" in line,  # older runs did not measure it
    ) as file:
        missing = [a for a in answers if any((arm, a.prompt) not in file.done for arm in adapters)]
        for answer in progress(missing, desc="retention", unit="row") if missing else ():
            for arm, lora in adapters.items():
                if (arm, answer.prompt) not in file.done:
                    file.write({"arm": arm} | drift_line(model, answer, lora))
        file.finish([(arm, answer.prompt) for answer in answers for arm in adapters])
        done = file.done
    return {arm: mean_drift([done[arm, answer.prompt] for answer in answers]) for arm in adapters}


def drift_line(model: Llama, answer: SeedAnswer, lora: Lora) -> dict[str, Any]:
    """Seed and tuned model compared over one answer, in nats summed over its tokens."""
    after = hidden_states(model, answer.ids, answer.n_prompt, lora)
    drift = compare(model, answer.hidden(model), after, answer.ids[answer.n_prompt :])
    return {
        "category": answer.category,
        "prompt": answer.prompt,
        "answer": answer.answer,
        "tokens": len(after),
        **dataclasses.asdict(drift),
    }


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
    session.require_one_process("retention")
    embed = Embedder() if similar else None
    prompts = PROMPTS if data is None else prompts_of_file(session, data)
    arms: Arms = {"seed": None, **session.adapters(adapters)}
    generator = ChatGenerator(session.model, session.chat, sampling)
    settings = session.settings | {"sampling": sampling.settings()}
    answers = seed_answers(generator, seed_file(out), settings, prompts)
    settings |= {"adapters": adapter_hashes(adapters), "prompts": sha256(repr(prompts))}
    drift = retention(session.model, answers, arms, out, settings)
    print(retention_table(drift))
    if embed is not None:
        file = out.with_name(out.name + ".similar.jsonl")
        for arm, m in similarity(generator, embed, answers, arms, file, settings).items():
            drift[arm] |= {"similarity": m}
            low, high = m["interval"]
            print(
                f"{arm}: its own answers resemble the seed's by {m['similarity']:.3f} (cosine of "
                f"sentence embeddings, {low:.3f} - {high:.3f}), {m['same']:.0%} are the same"
            )
    print(f"by prompt: {out}")
    return drift


def prompts_of_file(session: Session, data: DataConfig) -> Prompts:
    """The prompts of a data file, each once; ValueError where a row is a conversation."""
    rows = data.load(need_reference=False, check=template_takes(session.chat))
    conversations = [row.id for row in rows if len(row.messages) != 1]
    if conversations:
        raise ValueError(
            f"{data.data}: rows {conversations[:5]} are conversations; expected single prompts"
        )
    return list(dict.fromkeys(("file", row.messages[0]["content"]) for row in rows))


def retention_metas(out: Path) -> list[Path]:
    """The files with the settings of a run of `retention_job`."""
    return [meta_file(out), meta_file(seed_file(out))]


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
    generator: ChatGenerator,
    embed: Embedder,
    answers: Sequence[SeedAnswer],
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Mean cosine between the seed's and each arm's own greedy answer to the same prompts.

    Per arm `similarity`, its 95 % `interval` (bootstrap over prompts) and `same`, the share of
    answers that are the seed's to the letter. `out` keeps a line per arm and prompt.
    """
    fields = {"arm": str, "prompt": str, "answer": str, "similarity": float}
    adapters = tuned(arms)
    by_prompt = {answer.prompt: answer for answer in answers}

    def to_line(arm: str, completion: Completion) -> dict[str, Any]:
        seed = by_prompt[completion.id]
        before, after = embed([seed.answer.strip(), completion.text.strip()])
        return {
            "arm": arm,
            "category": seed.category,
            "prompt": completion.id,
            "answer": completion.text,
            "similarity": (before @ after).item(),
        }

    with ResumedLines(out, settings, key=by_arm_and_prompt, wanted=fields) as file:
        for arm, lora in adapters.items():
            requests = {(arm, a.prompt): Request(a.prompt, a.ids[: a.n_prompt]) for a in answers}
            label = f"answers of {arm}"
            answer_missing(generator, lora, requests, file, partial(to_line, arm), label)
        file.finish([(arm, answer.prompt) for arm in adapters for answer in answers])
        done = file.done
    found = {}
    for arm in adapters:
        lines = [done[arm, answer.prompt] for answer in answers]
        values = [line["similarity"] for line in lines]
        same = [line["answer"] == by_prompt[line["prompt"]].answer for line in lines]
        found[arm] = {
            "similarity": sum(values) / len(values),
            "interval": bootstrap(values, [1.0] * len(values)),
            "same": sum(same) / len(same),
        }
    return found
