"""Files of a run directory that only the report shows, written while the model is still loaded

    OUT/tokens.jsonl     {id, sft, sdft}: for some rows the training text of both arms, token by
                         token, with the seed's NLL of every token that carries loss; `sdft` is null
                         where both arms train on the same text
    OUT/answers.jsonl    {arm, prompt, answer, finish}: for some general prompts the answers of the
                         tuned models
                         {arm, id, kl, agree, tokens}: for some held-out rows KL(seed || tuned) over
                         the seed's answer

SdftConfig.report_rows and report_answers bound the number of lines, so that writing them takes less
time than training. Both files are resumed like the other files of a run.
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
from engine.measure.divergence import Drift, compare, hidden_states
from engine.measure.likelihood import nll
from engine.runtime.files import read_jsonl
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.runtime.short_memory import tried_twice
from engine.runtime.terminal import progress
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request
from model.llama import Llama
from model.lora import Lora
from model.tokenizer_base import Tokenizer

# fields of a line of retention.jsonl that are read here, with their types
DRIFT = {"arm": str, "prompt": str, "kl": (float, int), "tokens": int}
# key of a line of answers.jsonl: the arm, and either a general prompt or the id of a held-out row
Key = tuple[str, str | None, str | None]


@memory_for("taking likelihoods for the report", "lower --report-rows")
def token_nll(
    model: Llama,
    tokenizer: Tokenizer,
    sft: Sequence[Example],
    sdft: Sequence[Example],
    out: Path,
    settings: dict[str, Any],
) -> None:
    """Write a line to `out` for every row that has none yet.

    sft, sdft    the training texts of the two arms, row by row
    out          tokens.jsonl; NLL in nats, rounded to 3 places
    """
    with ResumedLines(out, settings) as file:
        pairs = list(zip(sft, sdft, strict=True))
        missing = [(a, b) for a, b in pairs if a.id not in file.done]
        for a, b in progress(missing, desc="report: tokens", unit="row"):
            same = a.ids == b.ids
            line = {"id": a.id, "sft": _tokens(model, tokenizer, a), "sdft": None}
            if not same:
                line["sdft"] = _tokens(model, tokenizer, b)
            file.write(line)


def _tokens(model: Llama, tokenizer: Tokenizer, example: Example) -> dict[str, Any]:
    """Number of prompt tokens, the text of every token, and the NLL of every answer token."""
    prompt = example.ids[: example.n_prompt]
    answer = example.ids[example.n_prompt :]
    nats = tried_twice("tokens", model.device, _nll_list, model, prompt, answer)
    return {
        "prompt": len(prompt),
        "pieces": [tokenizer.piece(id) for id in example.ids],
        "nll": [round(value, 3) for value in nats],
    }


def _nll_list(model: Llama, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    return nll(model, prompt, answer).tolist()


@memory_for("answering for the report", SAMPLE_LESS)
def tuned_answers(
    generator: ChatGenerator,
    arms: Arms,
    run: Path,
    held_out: Sequence[Row],
    n: int,
    settings: dict[str, Any],
) -> None:
    """Write RUN/answers.jsonl for n general prompts and n held-out rows.

    The general prompts are those of RUN/retention.jsonl that drifted most under any arm. Held-out
    rows are taken in their order, but first those of RUN/evaluation.jsonl on which the verdicts of
    two arms differ. The generator's sampling is the retention's, so that seed and tuned models
    answer under the same limit.
    """
    adapters = tuned(arms)
    prompts = prompts_that_moved_most(run / "retention.jsonl", n)
    evaluation = read_jsonl(run / "evaluation.jsonl", ANSWER)
    seed_lines = {}
    for line in evaluation:
        if line["arm"] == "seed" and line.get("ids"):
            seed_lines[line["id"]] = line
    answered = [row for row in held_out if row.id in seed_lines]
    disputed = rows_with_different_verdicts(evaluation)
    rows = [row for row in answered if row.id in disputed]
    rows += [row for row in answered if row.id not in disputed]
    rows = rows[:n]

    out = run / "answers.jsonl"
    with ResumedLines(out, settings, key=_key, wanted={"arm": str}) as file:
        for arm, lora in adapters.items():
            requests = {}
            for prompt in prompts:
                requests[arm, prompt, None] = Request(prompt, generator.prompt_ids(prompt))
            label = f"report: answers of {arm}"
            answer_missing(generator, lora, requests, file, partial(_answer_line, arm), label)
        for row in progress(rows, desc="report: KL on held-out rows", unit="row"):
            missing = {}
            for arm, lora in adapters.items():
                if (arm, None, row.id) not in file.done:
                    missing[arm] = lora
            for line in _held_out_drift(generator, row, seed_lines[row.id], missing):
                file.write(line)
        order: list[Key] = [(arm, prompt, None) for arm in adapters for prompt in prompts]
        order += [(arm, None, row.id) for row in rows for arm in adapters]
        file.finish([key for key in order if key in file.done])


def _key(line: dict[str, Any]) -> Key:
    return line["arm"], line.get("prompt"), line.get("id")


def prompts_that_moved_most(retention_file: Path, n: int) -> list[str]:
    """The n general prompts with the largest KL per token under any arm, the largest first."""
    largest: dict[str, float] = {}  # prompt -> KL in nats per token
    for line in read_jsonl(retention_file, DRIFT):
        prompt = line["prompt"]
        kl = line["kl"] / line["tokens"]
        largest[prompt] = max(kl, largest.get(prompt, 0.0))
    by_drift = sorted(largest, key=lambda prompt: -largest[prompt])
    return by_drift[:n]


def rows_with_different_verdicts(evaluation: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of the held-out rows on which two arms were judged differently."""
    verdicts: dict[str, set[bool]] = {}
    for line in evaluation:
        verdicts.setdefault(line["id"], set()).add(line["ok"])
    return {id for id, of_row in verdicts.items() if len(of_row) > 1}


def _answer_line(arm: str, completion: Completion) -> dict[str, Any]:
    """An answer to a general prompt, as a line of the file."""
    return {
        "arm": arm,
        "prompt": completion.id,
        "answer": completion.text.strip(),
        "finish": completion.finish,
    }


def _held_out_drift(
    generator: ChatGenerator, row: Row, seed_line: dict[str, Any], adapters: dict[str, Lora]
) -> Iterable[dict[str, Any]]:
    """A line per adapter: the drift over the N tokens of the seed's answer to the row."""
    if not adapters:
        return
    model = generator.model
    prompt = generator.chat.prompt_ids(row.messages[:-1])
    answer = generator.answer_ids(seed_line["ids"], seed_line["finish"])  # N
    ids = [*prompt, *answer]
    drifts = tried_twice("KL", model.device, _drifts, model, ids, len(prompt), adapters)
    for arm, drift in drifts.items():
        yield {
            "arm": arm,
            "id": row.id,
            "kl": drift.kl,
            "agree": drift.agree,
            "tokens": len(answer),
        }


def _drifts(
    model: Llama, ids: Sequence[int], start: int, adapters: dict[str, Lora]
) -> dict[str, Drift]:
    """By arm, the drift over the N tokens ids[start:]."""
    before = hidden_states(model, ids, start, None)  # (N, D)
    drifts = {}
    for arm, lora in adapters.items():
        after = hidden_states(model, ids, start, lora)  # (N, D)
        drifts[arm] = compare(model, before, after, ids[start:])
    return drifts
