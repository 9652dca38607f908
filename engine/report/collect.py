"""Files of a run directory that only the report shows, written while the model is still loaded

    OUT/tokens.jsonl     of some rows the training text, token by token, with the seed's NLL of
                         every token that carries loss: {id, sft, sdft}, `sdft` null where both
                         arms train on the same text
    OUT/answers.jsonl    of some general prompts the tuned models' answers ({arm, prompt, answer,
                         finish}); of some held-out rows KL(seed || tuned) over the seed's answer
                         ({arm, id, kl, agree, tokens})

Their number is bounded (SdftConfig.report_rows, report_answers), so that it takes no longer than a
training. Both files are resumed like the other files of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.data.encode import Example
from engine.data.rows import Row
from engine.evaluate.arms import Arms, tuned
from engine.evaluate.target_task import ANSWER
from engine.measure.answer_missing import answer_missing
from engine.measure.divergence import compare, hidden_states
from engine.measure.likelihood import nll
from engine.runtime.files import read_jsonl
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.runtime.terminal import progress
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request
from model.llama import Llama
from model.lora import Lora
from model.tokenizer_base import Tokenizer

# fields of a line of retention.jsonl that are read here
DRIFT = {"arm": str, "prompt": str, "kl": (float, int), "tokens": int}
Key = tuple[str, str | None, str | None]  # arm, general prompt or None, held-out row or None


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

    def tokens(example: Example) -> dict[str, Any]:
        prompt, answer = example.ids[: example.n_prompt], example.ids[example.n_prompt :]
        values = nll(model, prompt, answer).tolist()
        pieces = [tokenizer.piece(i) for i in example.ids]
        return {"prompt": len(prompt), "pieces": pieces, "nll": [round(v, 3) for v in values]}

    with ResumedLines(out, settings) as file:
        pairs = [pair for pair in zip(sft, sdft, strict=True) if pair[0].id not in file.done]
        for a, b in progress(pairs, desc="report: tokens", unit="row"):
            same = a.ids == b.ids
            file.write({"id": a.id, "sft": tokens(a), "sdft": None if same else tokens(b)})


@memory_for("answering for the report", SAMPLE_LESS)
def tuned_answers(
    generator: ChatGenerator,
    arms: Arms,
    run: Path,
    held_out: Sequence[Row],
    n: int,
    settings: dict[str, Any],
) -> None:
    """Write RUN/answers.jsonl from RUN/retention.jsonl and RUN/evaluation.jsonl, n of each.

    General prompts: those that moved furthest under any arm. Held-out rows: those first on which
    the verdicts of two arms differ. The generator's sampling is the retention's, so that seed and
    tuned models answer under the same limit.
    """
    adapters = tuned(arms)
    prompts = prompts_that_moved_most(run / "retention.jsonl", n)
    evaluation = read_jsonl(run / "evaluation.jsonl", ANSWER)
    seed_lines = {x["id"]: x for x in evaluation if x["arm"] == "seed" and x.get("ids")}
    rows = [row for row in held_out if row.id in seed_lines]
    disputed = rows_with_different_verdicts(evaluation)
    rows.sort(key=lambda row: row.id not in disputed)
    rows = rows[:n]

    out = run / "answers.jsonl"
    with ResumedLines(out, settings, key=_key, wanted={"arm": str}) as file:
        for arm, lora in adapters.items():
            requests = {
                (arm, prompt, None): Request(prompt, generator.prompt_ids(prompt))
                for prompt in prompts
            }
            label = f"report: answers of {arm}"
            answer_missing(generator, lora, requests, file, partial(_answer_line, arm), label)
        for row in progress(rows, desc="report: KL on held-out rows", unit="row"):
            done = file.done
            missing = {arm: a for arm, a in adapters.items() if (arm, None, row.id) not in done}
            for line in _held_out_drift(generator, row, seed_lines[row.id], missing):
                file.write(line)
        order: list[Key] = [(arm, prompt, None) for arm in adapters for prompt in prompts]
        order += [(arm, None, row.id) for row in rows for arm in adapters]
        file.finish([key for key in order if key in file.done])


def _key(line: dict[str, Any]) -> Key:
    return line["arm"], line.get("prompt"), line.get("id")


def prompts_that_moved_most(retention_file: Path, n: int) -> list[str]:
    """The n general prompts with the largest KL per token under any arm, the largest first."""
    moved: dict[str, float] = {}
    for line in read_jsonl(retention_file, DRIFT):
        kl = line["kl"] / line["tokens"]
        moved[line["prompt"]] = max(kl, moved.get(line["prompt"], 0.0))
    return sorted(moved, key=lambda prompt: -moved[prompt])[:n]


def rows_with_different_verdicts(evaluation: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of the held-out rows on which two arms were judged differently."""
    verdicts: dict[str, set[bool]] = {}
    for line in evaluation:
        verdicts.setdefault(line["id"], set()).add(line["ok"])
    return {name for name, seen in verdicts.items() if len(seen) > 1}


def _answer_line(arm: str, completion: Completion) -> dict[str, Any]:
    return {
        "arm": arm,
        "prompt": completion.id,
        "answer": completion.text.strip(),
        "finish": completion.finish,
    }


def _held_out_drift(
    generator: ChatGenerator, row: Row, seed_line: dict[str, Any], adapters: dict[str, Lora]
) -> Iterable[dict[str, Any]]:
    """A line per adapter: drift over the seed's answer to the row."""
    if not adapters:
        return
    model = generator.model
    prompt = generator.chat.prompt_ids(row.messages[:-1])
    ids = [*prompt, *generator.answer_ids(seed_line["ids"], seed_line["finish"])]
    before = hidden_states(model, ids, len(prompt), None)
    for arm, lora in adapters.items():
        after = hidden_states(model, ids, len(prompt), lora)
        drift = compare(model, before, after, ids[len(prompt) :])
        yield {
            "arm": arm,
            "id": row.id,
            "kl": drift.kl,
            "agree": drift.agree,
            "tokens": len(before),
        }
