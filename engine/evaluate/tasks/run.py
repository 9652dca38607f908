"""Answer the tasks with every arm, score, compare with the seed

    OUT/TASK.jsonl    a line per arm, item and sample, kept as it is finished:
                      {arm, id, sample, scores: {scorer: bool}, reason, answer, finish, tokens,
                      question, reference}
    OUT/TASK.jsonl.meta.json    settings; other settings are refused, naming them
    OUT/scores.json   what `run_tasks` returns

Greedy and one answer per item unless asked otherwise. With one, a share has Wilson's interval and
two arms are compared by McNemar's exact test; with several, items are drawn again (bootstrap).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.evaluate.target_task import Arms
from engine.evaluate.tasks.alpaca_eval import ALPACA_EVAL
from engine.evaluate.tasks.arithmetic import GSM8K, MULTIARITH
from engine.evaluate.tasks.base import Item, Task
from engine.evaluate.tasks.functions import OPENFUNCTIONS
from engine.evaluate.tasks.humaneval import HUMANEVAL
from engine.evaluate.tasks.instructions import INSTRUCTIONS
from engine.evaluate.tasks.safety import ADVBENCH, ADVBENCH_SUFFIX
from engine.measure.intervals import bootstrap, lost_won, mcnemar, wilson
from engine.runtime.files import AppendedLines, sha256, write_json
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable_answers import put_in_order, resume_lines
from engine.runtime.terminal import progress, table
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import Session
from engine.verify.sandbox import check_sandbox
from model.chat import Chat
from model.lora import Lora

_ALL = (
    *(GSM8K, MULTIARITH, OPENFUNCTIONS, HUMANEVAL),
    *(ADVBENCH, ADVBENCH_SUFFIX, ALPACA_EVAL, INSTRUCTIONS),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
# The paper's decoding (paper.md 1.4): sampled once; HumanEval greedy within 2,048 tokens in all.
PAPER_SAMPLING = {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 512}
PAPER_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 2048}
_PLAIN = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

LINE = {"arm": str, "id": str, "sample": int, "scores": dict, "finish": str, "tokens": int}
Scores = dict[str, dict[str, dict[str, Any]]]  # task -> arm -> what `_arm_scores` says


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks are answered, and how."""

    task: tuple[str, ...] = ()  # benchmark to answer and score: gsm8k, multiarith, openfunctions,
    #   humaneval, advbench, advbench_suffix, alpaca_eval or instructions; may be repeated
    #   [default: none]
    task_data: tuple[str, ...] = ()  # NAME=FILE, the data of one task; may be repeated
    #   [default: the files in --tasks-dir]
    tasks_dir: str | None = None  # directory with the tasks' files under their published names
    #   [default: none]
    task_limit: int | None = None  # use only the first N items of each task [default: all]
    samples: int = 1  # answers per item; several need a --temperature above 0
    paper: bool = False  # the paper's prompts, chat formats and decoding instead of the model's own

    def check(self) -> None:
        """ValueError where a task or its data are not to be had."""
        check_numbers(self, task_limit=(1, MOST), samples=(1, 10**6))
        if self.task:
            load_tasks(self.task, self.files(), self.tasks_dir, self.paper, self.task_limit)

    def run(self, session: Session, arms: Arms, out: Path, sampling: SamplerConfig) -> Scores:
        """`run_tasks` as configured; nothing where no task is named."""
        if not self.task:
            return {}
        return run_tasks(
            session,
            arms,
            self.task,
            out,
            sampling,
            files=self.files(),
            tasks_dir=self.tasks_dir,
            paper=self.paper,
            samples=self.samples,
            limit=self.task_limit,
        )

    def files(self) -> dict[str, Path]:
        """--task-data by task; ValueError where one is not NAME=FILE."""
        found = {}
        for given in self.task_data:
            name, _, file = given.partition("=")
            if name not in TASKS or not file:
                raise ValueError(
                    f"--task-data {given!r}: wanted NAME=FILE, NAME among {', '.join(TASKS)}"
                )
            found[name] = Path(file)
        return found


def run_tasks(
    session: Session,
    arms: Arms,
    names: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
    *,
    files: Mapping[str, Path] | None = None,
    tasks_dir: str | Path | None = None,
    paper: bool = False,
    samples: int = 1,
    limit: int | None = None,
) -> Scores:
    """{task: {arm: {n, samples, cut, tokens, scores: {scorer: ...}}}}; see `_arm_scores`.

    files, tasks_dir    where data lie: by task, or under the tasks' own file names
    paper               the paper's prompts, formats and decoding; `sampling` then gives `rows` only
    limit               first so many items of each task

    Everything is loaded and checked before the first answer. Answers that are in `out` already are
    kept. ValueError for what a user can put right; Unprotected where programs cannot be contained.
    """
    session.alone("evaluation")
    loaded = load_tasks(names, files or {}, tasks_dir, paper, limit)
    if samples < 1 or (samples > 1 and sampling.temperature == 0 and not paper):
        raise ValueError(
            f"samples {samples} at temperature {sampling.temperature}: greedy answers are all the "
            "same; give --temperature, or one sample"
        )
    sampling.check()
    results: Scores = {}
    for name, (items, digest) in loaded.items():
        task = TASKS[name]
        each = 1 if paper and task.paper_greedy else samples
        lines = _answer(session, arms, task, items, digest, out, sampling, paper, each)
        results[name] = {
            arm: _arm_scores(task, items, arm, "seed" in arms, lines, each) for arm in arms
        }
        for arm in arms if task.export else ():
            first = {item.id: lines[arm, item.id, 0] for item in items}
            print(f"{name}: {task.export(items, first, arm, out)}")
    write_json(out / "scores.json", results)
    return results


def load_tasks(
    names: Sequence[str],
    files: Mapping[str, Path],
    tasks_dir: str | Path | None,
    paper: bool,
    limit: int | None,
) -> dict[str, tuple[list[Item], str]]:
    """Items and data hash of every task; ValueError for what cannot be answered or judged here."""
    if not names or set(names) - set(TASKS):
        raise ValueError(f"tasks {list(names)}: wanted some of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1")
    loaded = {}
    for name in dict.fromkeys(names):
        items, digest = TASKS[name].load(_file(TASKS[name], files, tasks_dir), paper)
        loaded[name] = items[:limit], digest
    if HUMANEVAL.name in loaded:
        check_sandbox()  # says now what cannot be contained, not behind an hour of sampling
    return loaded


def _file(task: Task, files: Mapping[str, Path], tasks_dir: str | Path | None) -> Path | None:
    """A task's data: its own file, that of the directory, or None where it brings its items."""
    if task.name in files:
        return Path(files[task.name])
    if task.file is None:
        return None
    if tasks_dir is None:
        raise ValueError(
            f"task {task.name} needs its data: --task-data {task.name}=FILE, or --tasks-dir with "
            f"{task.file} in it"
        )
    file = Path(tasks_dir) / task.file
    if not file.exists():
        raise ValueError(
            f"task {task.name}: {file} is not there; give --task-data {task.name}=FILE"
        )
    return file


def paper_chat(session: Session, name: str) -> Chat:
    """The chat format of the paper's evaluation over this model's tokenizer; "plain" is none."""
    tokenizer, now = session.chat.tokenizer, session.chat.now
    if name != "plain":
        return Chat.from_dir(session.config.model, tokenizer, name, now=now)
    template = ("{{ bos_token }}" if tokenizer.add_bos else "") + _PLAIN
    return Chat(
        template,
        tokenizer,
        name=name,
        eos_ids=session.chat.end_ids,
        now=now,
        rows=session.chat.rows,
    )


@memory_for("answering tasks", SAMPLE_LESS)
def _answer(
    session: Session,
    arms: Arms,
    task: Task,
    items: Sequence[Item],
    digest: str,
    out: Path,
    sampling: SamplerConfig,
    paper: bool,
    samples: int,
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Every line of the task by (arm, item, sample); those of an earlier run are taken over."""
    chat, judge, room = session.chat, task.judge, None
    if paper:
        chat, judge = paper_chat(session, task.paper_format), task.paper_judge or task.judge
        decoding = PAPER_GREEDY if task.paper_greedy else PAPER_SAMPLING
        sampling = dataclasses.replace(sampling, **decoding, stop=task.paper_stop)
        room = sampling.max_new_tokens if task.paper_greedy else None
    settings = session.settings | {"chat": chat.name, "template": chat.source_hash}
    settings |= {"task": task.name, "data": digest, "items": len(items), "samples": samples}
    settings |= {"sampling": sampling.settings(), "paper": paper}
    settings |= {"adapters": {name: lora_hash(lora) for name, lora in arms.items() if lora}}
    file = out / f"{task.name}.jsonl"
    done = {(x["arm"], x["id"], x["sample"]): x for x in resume_lines(file, settings, LINE)}
    by_id = {item.id: item for item in items}
    prompts = {item.id: chat.prompt_ids(item.messages) for item in items}
    with AppendedLines(file) as lines:
        for arm, lora in arms.items():
            todo = [
                Request(i.id, prompts[i.id], room and max(1, room - len(prompts[i.id])), k)
                for i in items
                for k in range(samples)
                if (arm, i.id, k) not in done
            ]
            if not todo:
                continue
            with (
                Sampler(session.model, chat.tokenizer.decode, chat.end_ids, sampling, lora) as own,
                progress(total=len(todo), desc=f"{task.name} {arm}", unit="answer") as bar,
            ):
                for answer in own.run(todo):
                    item = by_id[answer.id]
                    scores, reason = judge(item, answer.text)
                    line = {"arm": arm, "id": item.id, "sample": answer.sample, "scores": scores}
                    line |= {"reason": reason, "answer": answer.text, "finish": answer.finish}
                    line |= {"tokens": len(answer.ids), "question": item.messages[-1]["content"]}
                    line |= {"reference": item.reference}
                    lines.write(line)
                    done[arm, item.id, answer.sample] = line
                    bar.update()
    order = [(arm, i.id, k) for arm in arms for i in items for k in range(samples)]
    put_in_order(file, done, order)
    return done


def lora_hash(lora: Lora) -> str:
    """Tells adapters apart, by their numbers and what they are laid on."""
    return sha256(repr(lora.config).encode() + lora.params.detach().cpu().numpy().tobytes())


def _arm_scores(
    task: Task,
    items: Sequence[Item],
    arm: str,
    compare: bool,
    lines: Mapping[tuple[str, str, int], dict[str, Any]],
    samples: int,
) -> dict[str, Any]:
    """An arm's shares with their intervals, and its difference from the seed on the same items.

    cut is the number of answers that hit the token limit or had no room. Per scorer: right (of n x
    samples), share, interval (95 %), and for another arm than the seed either only_seed, only_arm
    and p (one sample) or difference, its interval over items (several).
    """
    mine = [[lines[arm, item.id, k] for k in range(samples)] for item in items]
    ended = [line["finish"] for answers in mine for line in answers]
    result = {
        "n": len(items),
        "samples": samples,
        "cut": sum(finish in ("length", "prompt_too_long") for finish in ended),
        "tokens": sum(line["tokens"] for answers in mine for line in answers),
        "scores": {},
    }
    for scorer in task.scorers:
        right = [sum(line["scores"][scorer] for line in answers) for answers in mine]
        of = [samples] * len(items)
        score: dict[str, Any] = {"right": sum(right), "share": sum(right) / sum(of)}
        if samples == 1:
            score["interval"] = wilson(score["share"], len(items))
        else:
            score["interval"] = bootstrap(right, of)
        if compare and arm != "seed":
            seed = [
                sum(lines["seed", item.id, k]["scores"][scorer] for k in range(samples))
                for item in items
            ]
            if samples == 1:
                lost, won = lost_won(seed, right)
                score |= {"only_seed": lost, "only_arm": won, "p": mcnemar(lost, won)}
            else:
                score["difference"] = bootstrap(
                    [a - b for a, b in zip(right, seed, strict=True)], of
                )
        result["scores"][scorer] = score
    return result


def tables(scores: Scores) -> str:
    """The table, a row per task and scorer, a column per arm; "" where there is no task."""
    if not scores:
        return ""
    arms = list(next(iter(scores.values())))
    rows, cut, without = [["task", "scorer", *arms]], [], []
    for task, by_arm in scores.items():
        for scorer in TASKS[task].scorers:
            rows.append([task, scorer, *(_cell(by_arm[arm], scorer) for arm in arms)])
        cut += [f"{task} {arm} {s['cut']}" for arm, s in by_arm.items() if s["cut"]]
        without += [] if TASKS[task].scorers else [task]
    found = [table(rows)] if len(rows) > 1 else []
    found += ["cut short by the token limit: " + ", ".join(cut)] if cut else []
    found += [f"answered, not scored here: {', '.join(without)}"] if without else []
    found += ["95 % intervals; p and d compare with the seed on the same items"] if rows[1:] else []
    return "\n\n" + "\n".join(found)


def _cell(arm: dict[str, Any], scorer: str) -> str:
    """right/all = share (interval), and the comparison with the seed."""
    score = arm["scores"][scorer]
    low, high = score["interval"]
    cell = f"{score['right']}/{arm['n'] * arm['samples']} = {score['share']:.1%}"
    cell += f" ({100 * low:.1f}-{100 * high:.1f})"
    if "p" in score:
        cell += f", p {score['p']:.3f}"
    if "difference" in score:
        low, high = score["difference"]
        cell += f", d {100 * low:+.1f} to {100 * high:+.1f}"
    return cell


def tasks_job(
    session: Session,
    config: TaskConfig,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
) -> Scores:
    """Score the seed and the adapters on tasks, print the table."""
    arms: Arms = {"seed": None, **session.adapters(adapters)}
    scores = config.run(session, arms, out, sampling)
    print(f"{tables(scores)}\nanswers: {out}")
    return scores
