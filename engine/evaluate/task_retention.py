"""Retention on the task's own prompts: drift from the seed over its answers to held-out rows

General prompts (engine/evaluate/retention.py) say how far a model moved elsewhere. RL's Razor
(Shenfeld et al. 2025, arXiv 2509.04259) finds that KL(seed || tuned) on the prompts of the new task
predicts how much is forgotten, whatever algorithm trained the model. It is measured here by the
same estimators: over the tokens of the seed's greedy answers, full distributions.

    OUT                a line per arm and held-out row: {arm, id, answer, tokens} and the fields of
                       `Drift`, summed over the tokens
    OUT.seed.jsonl     the seed's answers to rows that no file of judged answers holds (`--verify
                       none`, scripts/retention.py), a line per row: {id, answer, ids, finish}

The main job and a study answered the held-out rows already: the sampled ids of the seed's answers
in evaluation.jsonl are used, and nothing is sampled again.
"""

# N = tokens of an answer, D = hidden size

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from engine.data.rows import Row
from engine.evaluate.arms import Arms, arms_of_group, arms_without_line, tuned
from engine.evaluate.target_task import ANSWER
from engine.measure.answer_missing import answer_missing
from engine.measure.divergence import Drift, means_per_token
from engine.measure.packed_rows import SeedRow, drift_of_rows, groups
from engine.measure.seed_answers import seed_file
from engine.runtime.files import read_jsonl
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.runtime.terminal import progress, table
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request
from model.llama import Llama

_NUMBER = (float, int)
# fields of a line of OUT, and of a line of OUT.seed.jsonl, with their types
TASK_DRIFT = {"arm": str, "id": str, "tokens": int, "agree": int}
TASK_DRIFT |= dict.fromkeys(("kl", "reverse_kl", "nll", "seed_nll"), _NUMBER)
SEED_LINE = {"id": str, "answer": str, "ids": list, "finish": str}
by_arm_and_id = itemgetter("arm", "id")
# the seed's hidden states are kept from arm to arm where all rows together need no more than this
KEPT_BYTES = 1 << 30
# of a table of drift
DRIFT_COLUMNS = ["", "KL to seed", "95 % interval", "KL from seed", "same top-1", "NLL", "seed NLL"]


@dataclass
class RowAnswer(SeedRow):
    """The seed model's greedy answer to a held-out row.

    Its states are kept for the arms of a study, which are measured one after another.
    """

    id: str  # of the row
    answer: str


@memory_for("answering held-out rows", SAMPLE_LESS)
def row_answers(
    generator: ChatGenerator,
    rows: Sequence[Row],
    out: Path,
    settings: dict[str, Any],
    judged: Path | None = None,
) -> list[RowAnswer]:
    """The seed's greedy answers to the rows, of `generator.sampling.max_new_tokens` at most.

    out       the file of the drift; answers that have to be sampled are kept in OUT.seed.jsonl
    judged    evaluation.jsonl: the seed's answers in it are used. An answer that was allowed more
              tokens is cut to the limit, which gives the ids that sampling under it would

    Rows without an answer (their prompt fills the context) are left out, with a note. ValueError
    where OUT.seed.jsonl was begun under other settings.
    """
    lines = _seed_lines(judged)
    missing = [row for row in rows if row.id not in lines]
    if missing:
        lines |= _sampled_lines(generator, missing, seed_file(out), settings)
    limit = generator.sampling.max_new_tokens
    answers = []
    for row in rows:
        line = lines[row.id]
        prompt = generator.chat.prompt_ids(_context(row))
        answer = generator.answer_ids(line["ids"], line["finish"])[:limit]
        if answer:
            ids = [*prompt, *answer]
            answers.append(RowAnswer(row.id, line["answer"], ids=ids, n_prompt=len(prompt)))
    if len(answers) < len(rows):
        print(f"{len(rows) - len(answers)} held-out rows left out: the seed has no room to answer")
    return answers


def _context(row: Row) -> Sequence[dict[str, str]]:
    """The messages of a row before its reference, if it has one."""
    if row.messages[-1]["role"] == "assistant":
        return row.messages[:-1]
    return row.messages


def _seed_lines(judged: Path | None) -> dict[str, dict[str, Any]]:
    """The seed's lines of a file of judged answers, by row id, in which the sampled ids stand."""
    if judged is None:
        return {}
    lines = {}
    for line in read_jsonl(judged, ANSWER):
        if line["arm"] == "seed" and "ids" in line:  # older files hold no ids
            lines[line["id"]] = line
    return lines


def _sampled_lines(
    generator: ChatGenerator, rows: Sequence[Row], out: Path, settings: dict[str, Any]
) -> Mapping[str, dict[str, Any]]:
    """The seed's answers to the rows, sampled where `out` lacks them; by row id."""

    def to_line(completion: Completion) -> dict[str, Any]:
        return {
            "id": completion.id,
            "answer": completion.text.strip(),
            "ids": list(completion.ids),
            "finish": completion.finish,
        }

    requests = {}
    for row in rows:
        requests[row.id] = Request(row.id, generator.chat.prompt_ids(_context(row)))
    with ResumedLines(out, settings, wanted=SEED_LINE) as file:
        answer_missing(generator, None, requests, file, to_line, "seed's answers to held-out rows")
        file.finish(requests)
        return file.done


@memory_for("comparing answers to held-out rows", "give shorter answers (--retention-max-new)")
def task_retention(
    model: Llama,
    answers: Sequence[RowAnswer],
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Drift of every arm but the seed over the seed's answers; the fields are `means_per_token`'s.

    Lines that `out` holds already are not computed again. {} where there are no answers. ValueError
    where `out` was begun under other settings.
    """
    if not answers:
        return {}
    adapters = tuned(arms)
    with ResumedLines(out, settings, key=by_arm_and_id, wanted=TASK_DRIFT) as file:
        missing = {a.id for a in answers if arms_without_line(adapters, a.id, file.done)}
        waiting = groups(answers, model, [None, *adapters.values()]) if missing else ()
        keep = bool(missing) and _states_bytes(model, answers) <= KEPT_BYTES
        name = "retention: task"
        with progress(total=len(missing), desc=name, unit="row", disable=not missing) as bar:
            for group in waiting:
                not_done = arms_of_group(adapters, [a.id for a in group], file.done)
                if not not_done:
                    continue
                drifts = drift_of_rows(name, model, group, not_done, keep)
                for answer, of_answer in zip(group, drifts, strict=True):
                    for arm in arms_without_line(not_done, answer.id, file.done):
                        file.write(_line(arm, answer, of_answer[arm]))
                    if answer.id in missing:
                        bar.update()
        file.finish([(arm, answer.id) for answer in answers for arm in adapters])
        done = file.done
    drift = {}
    for arm in adapters:
        drift[arm] = means_per_token([done[arm, answer.id] for answer in answers])
    return drift


def _states_bytes(model: Llama, answers: Sequence[RowAnswer]) -> int:
    """Bytes of the seed's hidden states (N, D) of all answers."""
    tokens = sum(len(answer.ids) - answer.n_prompt for answer in answers)
    return tokens * model.config.hidden_size * model.dtype.itemsize


def _line(arm: str, answer: RowAnswer, drift: Drift) -> dict[str, Any]:
    """Seed and arm compared over one answer; nats, summed over its tokens."""
    tokens = len(answer.ids) - answer.n_prompt
    line = {"arm": arm, "id": answer.id, "answer": answer.answer, "tokens": tokens}
    return line | dataclasses.asdict(drift)


def drift_cells(arm: str, means: dict[str, Any]) -> list[str]:
    """An arm's line of a table of drift, under DRIFT_COLUMNS."""
    low, high = means["kl_interval"]
    return [
        arm,
        f"{means['kl']:.4f}",
        f"{low:.4f} - {high:.4f}",
        f"{means['reverse_kl']:.4f}",
        f"{means['agreement']:.1%}",
        f"{means['nll']:.3f}",
        f"{means['seed_nll']:.3f}",
    ]


def task_retention_table(drift: dict[str, dict[str, Any]]) -> str:
    """The means of all arms as a table, with a note on the columns."""
    lines = [DRIFT_COLUMNS]
    rows = 0
    for arm, means in drift.items():
        rows = means["prompts"]
        lines.append(drift_cells(arm, means))
    return (
        f"{table(lines)}\non the seed's own answers to {rows} held-out prompts of the task, nats "
        "per token; intervals: bootstrap over prompts"
    )
