"""Retention: how far an adapter moved the model on everything it was not trained on

The seed model answers general prompts greedily. Over the tokens of those answers, seed and tuned
model are compared in full distribution, position by position; p the seed's probabilities, q the
tuned model's:

    KL(seed || tuned) = sum_v p(v) (log p(v) - log q(v))     high where an answer was lost
    KL(tuned || seed) = sum_v q(v) (log q(v) - log p(v))     high where a new answer appeared
    agreement         = share of positions at which both have the same likeliest token
    NLL               = -log q(token) of the seed's own answer, beside -log p(token)

The measure is deterministic and needs no judge model. Sums per prompt are kept, never logits.
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
from engine.data.rows import Rows, listing
from engine.evaluate.arms import Arms, adapter_hashes, arms_of_group, arms_without_line, tuned
from engine.evaluate.task_retention import (
    DRIFT_COLUMNS,
    drift_cells,
    row_answers,
    task_retention,
    task_retention_table,
)
from engine.measure.answer_missing import answer_missing
from engine.measure.divergence import Drift, mean_drift
from engine.measure.general_prompts import PROMPTS
from engine.measure.intervals import bootstrap
from engine.measure.packed_rows import drift_of_rows, groups
from engine.measure.seed_answers import Prompts, SeedAnswer, seed_answers, seed_file
from engine.measure.similarity import Embedder
from engine.measure.update_norms import update_norms
from engine.runtime.files import sha256
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines, meta_file
from engine.runtime.terminal import progress, table
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import Session
from engine.train.replay import prompt_key
from model.config import read_json
from model.llama import Llama

by_arm_and_prompt = itemgetter("arm", "prompt")


@memory_for("comparing answers to general prompts", "give shorter answers (--max-new-tokens)")
def retention(
    model: Llama,
    answers: Sequence[SeedAnswer],
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Drift of every arm but the seed over the seed's answers; the fields are `mean_drift`'s.

    `out` keeps a line per prompt and arm (`drift_line`); lines that it holds already are not
    computed again. ValueError where it was begun under other settings.
    """
    adapters = tuned(arms)
    with ResumedLines(
        out,
        settings,
        key=by_arm_and_prompt,
        wanted={"arm": str, "prompt": str},
        keep=lambda line: "reverse_kl" in line,  # older runs did not measure it
    ) as file:
        missing = {a.prompt for a in answers if arms_without_line(adapters, a.prompt, file.done)}
        make_room = partial(_forget_states, answers)
        waiting = groups(answers, model, [None, *adapters.values()]) if missing else ()
        with progress(total=len(missing), desc="retention", unit="row", disable=not missing) as bar:
            for group in waiting:
                not_done = arms_of_group(adapters, [a.prompt for a in group], file.done)
                if not not_done:
                    continue
                drifts = drift_of_rows("retention", model, group, not_done, make_room=make_room)
                for answer, of_answer in zip(group, drifts, strict=True):
                    for arm in arms_without_line(not_done, answer.prompt, file.done):
                        file.write(drift_line(arm, answer, of_answer[arm]))
                    if answer.prompt in missing:
                        bar.update()
        file.finish([(arm, answer.prompt) for answer in answers for arm in adapters])
        done = file.done
    drift = {}
    for arm in adapters:
        lines = [done[arm, answer.prompt] for answer in answers]
        drift[arm] = mean_drift(lines)
    return drift


def _forget_states(answers: Sequence[SeedAnswer]) -> None:
    """Free the seed's hidden states that the answers keep; they are computed again."""
    for answer in answers:
        answer.states = None


def drift_line(arm: str, answer: SeedAnswer, drift: Drift) -> dict[str, Any]:
    """Seed and arm compared over one answer; nats, summed over its tokens."""
    line = {
        "arm": arm,
        "category": answer.category,
        "prompt": answer.prompt,
        "answer": answer.answer,
        "tokens": len(answer.ids) - answer.n_prompt,
    }
    return line | dataclasses.asdict(drift)


def retention_job(
    session: Session,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
    data: DataConfig | None = None,
    similar: bool = False,
    scales: Sequence[float] = (1.0,),
    held_out: DataConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure adapters on our general prompts, or on those of `data`, and print the table.

    scales: strengths at which each adapter is measured (`Lora.scaled`).
    With `similar` the adapters answer too, and the similarity of their answers to the seed's is
    measured (OUT.similar.jsonl). With `held_out` the drift on the prompts of the task that was
    trained is measured beside (`task_file`, `task_retention`). The norms of the adapters' updates
    are printed, and returned as `update_norms`. ValueError, before any work, where the package that
    similarity needs is not installed, `data` holds conversations, or a file cannot be read.
    """
    session.require_one_process("retention")
    embed = Embedder() if similar else None
    rows = None
    if held_out is not None:
        rows = held_out.load(need_reference=False, check=template_takes(session.chat))
    prompts = PROMPTS if data is None else prompts_of_file(session, data)
    arms: Arms = {"seed": None, **session.adapters(adapters, scales)}
    generator = ChatGenerator(session.model, session.chat, sampling)
    settings = session.settings | {"sampling": sampling.settings()}
    answers = seed_answers(generator, seed_file(out), settings, prompts)
    refuse_replayed(adapters, prompts)
    hashes = adapter_hashes(adapters, scales)
    settings |= {"adapters": hashes, "prompts": sha256(repr(prompts))}
    drift = retention(session.model, answers, arms, out, settings)
    print(retention_table(drift))
    if rows is not None:
        of_task = _on_the_task(session, generator, rows, arms, task_file(out), hashes)
        for arm, figures in of_task.items():
            drift[arm] |= {"task": figures}
    for arm, norms in _norms(session.model, arms).items():
        drift[arm] |= {"update_norms": norms}
    if embed is not None:
        file = out.with_name(out.name + ".similar.jsonl")
        measured = similarity(generator, embed, answers, arms, file, settings)
        for arm, figures in measured.items():
            drift[arm] |= {"similarity": figures}
            low, high = figures["interval"]
            print(
                f"{arm}: similarity of its own answers to the seed's {figures['similarity']:.3f} "
                f"(cosine of sentence embeddings, 95 % interval {low:.3f} - {high:.3f}); "
                f"{figures['same']:.0%} of them are the same text"
            )
    print(f"by prompt: {out}")
    return drift


def _on_the_task(
    session: Session,
    generator: ChatGenerator,
    rows: Rows,
    arms: Arms,
    out: Path,
    hashes: dict[str, str],  # of the adapters
) -> dict[str, dict[str, Any]]:
    """Drift of the adapters over the seed's answers to the rows; prints the table."""
    settings = session.settings | {
        "sampling": generator.sampling.settings(),
        "data": rows.sha256,
        "rows": len(rows),
    }
    answers = row_answers(generator, rows, out, settings)
    drift = task_retention(session.model, answers, arms, out, settings | {"adapters": hashes})
    print(task_retention_table(drift))
    return drift


def _norms(model: Llama, arms: Arms) -> dict[str, dict[str, Any]]:
    """The norms of the adapters' updates; prints a line for each."""
    found = {}
    for arm, lora in tuned(arms).items():
        norms = update_norms(model, lora)
        print(
            f"{arm}: norm of its updates {norms['norm']:.3f}, {norms['relative']:.2%} of that of "
            "the adapted weights (Frobenius)"
        )
        found[arm] = norms
    return found


def refuse_replayed(adapters: Sequence[str], prompts: Prompts) -> None:
    """ValueError where an adapter was trained on the seed's answers to one of these prompts.

    (engine/train/replay.py.) Prints that the prompts are others where an adapter saw replay.
    """
    texts = {}
    for _, text in prompts:
        texts[prompt_key([{"role": "user", "content": text}])] = text
    for adapter in adapters:
        settings = read_json(Path(adapter) / "meta.json", {}).get("settings")
        replayed = []
        if isinstance(settings, dict) and "replay" in settings:
            replayed = settings["replay"]["prompts"]
        both = [repr(texts[key]) for key in replayed if key in texts]
        if both:
            error = (
                f"adapter {adapter} was trained on the seed's answers (replay) to {len(both)} of "
                f"these {len(prompts)} prompts, over which it looks better than elsewhere"
            )
            raise ValueError(listing(error, both, "measure it on others (--data)"))
        if replayed:
            print(
                f"adapter {adapter}: trained with replay of {len(replayed)} general prompts; drift "
                "is measured on others"
            )


def prompts_of_file(session: Session, data: DataConfig) -> Prompts:
    """The prompts of a data file, each once; ValueError where a row is a conversation."""
    rows = data.load(need_reference=False, check=template_takes(session.chat))
    conversations = [row.id for row in rows if len(row.messages) != 1]
    if conversations:
        raise ValueError(
            f"{data.data}: rows {conversations[:5]} are conversations; expected single prompts"
        )
    prompts = [("file", row.messages[0]["content"]) for row in rows]  # (category, prompt)
    return list(dict.fromkeys(prompts))


def task_file(out: Path) -> Path:
    """The file of the drift on the task's prompts, beside `out`, that on general prompts."""
    return out.with_name(out.name + ".task.jsonl")


def retention_metas(out: Path) -> list[Path]:
    """The files with the settings of a run of `retention_job`."""
    files = [out, seed_file(out), task_file(out), seed_file(task_file(out))]
    return [meta_file(file) for file in files]


def retention_table(drift: dict[str, dict[str, Any]]) -> str:
    """The means of all arms as a table, with a note on the columns."""
    any_arm = list(drift)[0]
    categories = list(drift[any_arm]["categories"])
    lines = [DRIFT_COLUMNS + [f"KL {category}" for category in categories]]
    for arm, means in drift.items():
        cells = drift_cells(arm, means)
        for category in categories:
            kl = means["categories"][category]["kl"]
            cells.append(f"{kl:.4f}")
        lines.append(cells)
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
    answers that equal the seed's letter for letter. `out` keeps a line per arm and prompt; lines
    that it holds already are not computed again.
    """
    fields = {"arm": str, "prompt": str, "answer": str, "similarity": float}
    adapters = tuned(arms)
    by_prompt = {answer.prompt: answer for answer in answers}

    def to_line(arm: str, completion: Completion) -> dict[str, Any]:
        seed = by_prompt[completion.id]
        before, after = embed([seed.answer.strip(), completion.text.strip()])  # unit vectors
        return {
            "arm": arm,
            "category": seed.category,
            "prompt": completion.id,
            "answer": completion.text,
            "similarity": (before @ after).item(),
        }

    with ResumedLines(out, settings, key=by_arm_and_prompt, wanted=fields) as file:
        for arm, lora in adapters.items():
            requests = {}
            for answer in answers:
                prompt_ids = answer.ids[: answer.n_prompt]
                requests[arm, answer.prompt] = Request(answer.prompt, prompt_ids)
            label = f"answers of {arm}"
            answer_missing(generator, lora, requests, file, partial(to_line, arm), label)
        file.finish([(arm, answer.prompt) for arm in adapters for answer in answers])
        done = file.done
    figures = {}
    for arm in adapters:
        cosines = []
        same = 0
        for answer in answers:
            line = done[arm, answer.prompt]
            cosines.append(line["similarity"])
            if line["answer"] == answer.answer:
                same += 1
        figures[arm] = {
            "similarity": sum(cosines) / len(cosines),
            "interval": bootstrap(cosines, [1.0] * len(cosines)),
            "same": same / len(cosines),
        }
    return figures
