"""What the report shows that only the model can tell, taken at the end of a run

    OUT/tokens.jsonl     of some rows the training text, token by token, with the seed's NLL of
                         every token that carries loss: {id, sft, sdft}, `sdft` null where both
                         arms train on the same text
    OUT/answers.jsonl    of some general prompts the tuned models' answers ({arm, prompt, answer,
                         finish}); of some held-out rows KL(seed || tuned) over the seed's answer
                         ({arm, id, kl, agree, tokens})

How many is bounded (SdftConfig.report_rows, report_answers), so that it does not cost another
training. Both files are kept and added to, as everything in a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.encode import Example
from engine.data.rows import Row
from engine.evaluate.target_task import ANSWER, Arms
from engine.measure.divergence import compare, hidden_states
from engine.measure.likelihood import nll
from engine.runtime.files import AppendedLines, read_jsonl
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable_answers import put_in_order, resume_lines
from engine.runtime.terminal import progress
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from model.chat import Chat
from model.llama import Llama
from model.tokenizer_base import Tokenizer

# what a line of the retention must have
MEASURED = {"arm": str, "prompt": str, "kl": (float, int), "tokens": int}


def spaced(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced, the first among them."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


@memory_for("taking likelihoods for the report", "lower --report-rows")
def token_nll(
    model: Llama,
    tokenizer: Tokenizer,
    sft: Sequence[Example],
    sdft: Sequence[Example],
    out: Path,
    settings: dict[str, Any],
) -> None:
    """Write a line to `out` for every pair of examples that has none yet (nats per token)."""
    done = {line["id"] for line in resume_lines(out, settings, {"id": str})}

    def tokens(example: Example) -> dict[str, Any]:
        prompt, answer = example.ids[: example.n_prompt], example.ids[example.n_prompt :]
        values = nll(model, prompt, answer).tolist()
        pieces = [tokenizer.piece(i) for i in example.ids]
        return {"prompt": len(prompt), "pieces": pieces, "nll": [round(v, 3) for v in values]}

    pairs = [pair for pair in zip(sft, sdft, strict=True) if pair[0].id not in done]
    with AppendedLines(out) as file:
        for a, b in progress(pairs, desc="report: tokens", unit="row"):
            line = {"id": a.id, "sft": tokens(a)}
            file.write(line | {"sdft": None if a.ids == b.ids else tokens(b)})


@memory_for("answering for the report", SAMPLE_LESS)
def answers(
    model: Llama,
    chat: Chat,
    arms: Arms,
    run: Path,
    held_out: Sequence[Row],
    n: int,
    sampling: SamplerConfig,
    settings: dict[str, Any],
) -> None:
    """Write RUN/answers.jsonl from RUN/retention.jsonl and RUN/evaluation.jsonl, n of each.

    General prompts: those that moved furthest under any arm. Held-out rows: those first on which
    the verdicts of two arms differ. `sampling` is the retention's, so that seed and tuned models
    answer under the same limit.
    """
    out = run / "answers.jsonl"
    lines = resume_lines(out, settings, {"arm": str})
    done = {(line["arm"], line.get("prompt"), line.get("id")): line for line in lines}
    tuned = {arm: lora for arm, lora in arms.items() if lora is not None}

    moved: dict[str, float] = {}
    for line in read_jsonl(run / "retention.jsonl", MEASURED):
        value = line["kl"] / line["tokens"]
        moved[line["prompt"]] = max(value, moved.get(line["prompt"], 0.0))
    prompts = sorted(moved, key=lambda prompt: -moved[prompt])[:n]
    with AppendedLines(out) as file:
        for arm, lora in tuned.items():
            todo = [prompt for prompt in prompts if (arm, prompt, None) not in done]
            if not todo:
                continue
            asked = [
                Request(prompt, chat.prompt_ids([{"role": "user", "content": prompt}]))
                for prompt in todo
            ]
            with (
                Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling, lora) as sampler,
                progress(total=len(todo), desc=f"report: answers of {arm}", unit="row") as bar,
            ):
                for answer in sampler.run(asked):
                    text = {"answer": answer.text.strip(), "finish": answer.finish}
                    line = {"arm": arm, "prompt": answer.id} | text
                    file.write(line)
                    done[arm, answer.id, None] = line
                    bar.update()

        verdicts: dict[str, set[bool]] = {}
        seeds: dict[str, dict[str, Any]] = {}
        for line in read_jsonl(run / "evaluation.jsonl", ANSWER):
            verdicts.setdefault(line["id"], set()).add(line["ok"])
            if line["arm"] == "seed" and line.get("ids"):
                seeds[line["id"]] = line
        rows = [row for row in held_out if row.id in seeds]
        rows.sort(key=lambda row: len(verdicts[row.id]) == 1)
        for row in progress(rows[:n], desc="report: KL on held-out rows", unit="row"):
            todo = [arm for arm in tuned if (arm, None, row.id) not in done]
            if not todo:
                continue
            seed = seeds[row.id]
            prompt = chat.prompt_ids(row.messages[:-1])
            ids = [*prompt, *seed["ids"], *([chat.end_id] if seed["finish"] == "stop" else [])]
            before = hidden_states(model, ids, len(prompt), None)
            for arm in todo:
                after = hidden_states(model, ids, len(prompt), tuned[arm])
                drift = compare(model, before, after, ids[len(prompt) :])
                line = {"arm": arm, "id": row.id, "kl": drift.kl, "agree": drift.agree}
                line |= {"tokens": len(before)}
                file.write(line)
                done[arm, None, row.id] = line
    order = [(arm, prompt, None) for arm in tuned for prompt in prompts]
    order += [(arm, None, row.id) for row in rows[:n] for arm in tuned]
    put_in_order(out, done, [key for key in order if key in done])
