"""Tasks answered by every arm, scored, and compared with the seed

    OUT/TASK.jsonl              a line per arm, item and sample, appended as it is finished: {arm,
                                id, sample, scores: {scorer: bool}, reason, answer, finish, tokens,
                                question, reference}
    OUT/TASK.jsonl.meta.json    the settings; other settings are refused, naming them
    OUT/scores.json             the return value of `run_tasks`

Answers are greedy, one per item, unless the config asks for something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from engine.evaluate.arms import Arms, tuned
from engine.evaluate.tasks.alpaca_eval import ALPACA_EVAL
from engine.evaluate.tasks.arithmetic import GSM8K, MULTIARITH
from engine.evaluate.tasks.base import Item, Judge, Task
from engine.evaluate.tasks.functions import OPENFUNCTIONS
from engine.evaluate.tasks.generated_instructions import INSTRUCTIONS_900
from engine.evaluate.tasks.humaneval import HUMANEVAL
from engine.evaluate.tasks.instructions import INSTRUCTIONS
from engine.evaluate.tasks.safety import ADVBENCH, ADVBENCH_SUFFIX
from engine.evaluate.tasks.scores import Lines, Scores, arm_scores, power_note, scores_table
from engine.measure.answer_missing import answer_missing
from engine.runtime.files import sha256, write_json
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import Session
from engine.verify.sandbox import check_sandbox
from model.chat import Chat
from model.lora import Lora

ALL_TASKS = (
    GSM8K,
    MULTIARITH,
    OPENFUNCTIONS,
    HUMANEVAL,
    ADVBENCH,
    ADVBENCH_SUFFIX,
    ALPACA_EVAL,
    INSTRUCTIONS,
    INSTRUCTIONS_900,
)
TASKS: dict[str, Task] = {task.name: task for task in ALL_TASKS}
# The decoding of the paper's evaluation scripts: sampled once; HumanEval greedy, at most 2,048
# tokens in all.
PAPER_SAMPLING = {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 512}
PAPER_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 2048}
# The chat format "plain": the contents of the messages, and nothing around them.
_PLAIN = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# fields that a line of answers must have, with their types
LINE = {"arm": str, "id": str, "sample": int, "scores": dict, "finish": str, "tokens": int}


@dataclass(frozen=True)
class LoadedTask:
    """A task with its items, and the way in which they are answered."""

    task: Task
    items: list[Item]
    digest: str  # sha256 of the data
    samples: int  # answers per item
    paper: bool  # under the paper's prompt, chat format and decoding


@dataclass(frozen=True)
class TaskConfig:
    """The tasks that are answered, and the way in which they are answered."""

    task: tuple[str, ...] = ()  # benchmark to answer and score: gsm8k, multiarith, openfunctions,
    #   humaneval, advbench, advbench_suffix, alpaca_eval, instructions or instructions_900; with
    #   its data as in advbench=FILE; may be repeated [default: none]
    task_data: tuple[str, ...] = ()  # NAME=FILE, the data of one task; may be repeated
    #   [default: the files in --tasks-dir]
    tasks_dir: str | None = None  # directory with the tasks' files under their published names
    #   [default: none]
    task_limit: int | None = None  # use only the first N items of each task [default: all]
    samples: int = 1  # answers per item; several need a --temperature above 0
    paper: bool = False  # prompts, chat formats and decoding of the SDFT paper, instead of the
    #   model's own

    def check(self) -> None:
        """ValueError for numbers out of range and where a task or its data cannot be found."""
        check_numbers(self, task_limit=(1, MOST), samples=(1, 10**6))
        if self.task:
            self.load()

    def load(self) -> dict[str, LoadedTask]:
        """Every task with its items, by name.

        ValueError for an unknown task and for data that cannot be read; `Unprotected` where a task
        runs programs and this machine offers no sandbox for them.
        """
        names = [given.partition("=")[0] for given in self.task]
        unknown = set(names) - set(TASKS)
        if not self.task or unknown:
            raise ValueError(f"tasks {list(self.task)}: expected some of {', '.join(TASKS)}")
        loaded = {}
        files = self.files()
        for name in dict.fromkeys(names):
            task = TASKS[name]
            file = self._file(task, files)
            items, digest = task.load(file, self.paper)
            loaded[name] = LoadedTask(
                task=task,
                items=items[: self.task_limit],
                digest=digest,
                samples=1 if self.paper and task.paper_greedy else self.samples,
                paper=self.paper,
            )
        if HUMANEVAL.name in loaded:
            check_sandbox()  # before the first answer is sampled, not when the first is judged
        return loaded

    def files(self) -> dict[str, Path]:
        """The files of --task NAME=FILE and of --task-data by task.

        ValueError where one is not NAME=FILE.
        """
        files = {}
        for given in (*self.task_data, *(given for given in self.task if "=" in given)):
            name, _, file = given.partition("=")
            if name not in TASKS or not file:
                raise ValueError(
                    f"task data {given!r}: expected NAME=FILE, NAME among {', '.join(TASKS)}"
                )
            files[name] = Path(file)
        return files

    def _file(self, task: Task, files: Mapping[str, Path]) -> Path | None:
        """A task's data: its own file, else the one in --tasks-dir; None where the task brings its
        items. ValueError where neither is given, or the file does not exist."""
        if task.name in files:
            return files[task.name]
        if task.file is None:
            return None
        if self.tasks_dir is None:
            raise ValueError(
                f"task {task.name} needs its data: --task {task.name}=FILE, or --tasks-dir with "
                f"{task.file} in it"
            )
        file = Path(self.tasks_dir) / task.file
        if not file.exists():
            raise ValueError(f"task {task.name}: {file} is not there; give --task {task.name}=FILE")
        return file


def run_tasks(
    session: Session, config: TaskConfig, arms: Arms, out: Path, sampling: SamplerConfig
) -> Scores:
    """Answer and score the tasks under every arm: {task: {arm: the fields of `arm_scores`}}.

    Everything is loaded and checked before the first answer. Answers that are in `out` already are
    kept. With `config.paper` the paper's temperature, top_p, top_k, stop texts and limit of new
    tokens replace those of `sampling`. ValueError for tasks, data or settings that cannot be used.
    """
    session.require_one_process("evaluation")
    check_numbers(config, task_limit=(1, MOST), samples=(1, 10**6))
    loaded = config.load()
    if config.samples > 1 and sampling.temperature == 0 and not config.paper:
        raise ValueError(
            f"samples {config.samples} at temperature {sampling.temperature}: greedy answers are "
            "all the same; give --temperature, or one sample"
        )
    sampling.check()
    results: Scores = {}
    with_seed = "seed" in arms
    for name, one in loaded.items():
        task, items = one.task, one.items
        lines = _answer(session, one, arms, out, sampling)
        results[name] = {}
        for arm in arms:
            figures = arm_scores(task.scorers, items, one.samples, lines, arm, with_seed)
            results[name][arm] = figures
            if task.export is not None:
                first_answers = {item.id: lines[arm, item.id, 0] for item in items}
                file = task.export(items, first_answers, arm, out)
                print(f"{name}: {file}")
    write_json(out / "scores.json", results)
    return results


def tasks_job(
    session: Session,
    config: TaskConfig,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
    scales: Sequence[float] = (1.0,),
) -> Scores:
    """Score the seed and the adapters (directories) on tasks, and print the table.

    scales: strengths at which each adapter is scored (`Lora.scaled`).
    """
    arms: Arms = {"seed": None, **session.adapters(adapters, scales)}
    scores = run_tasks(session, config, arms, out, sampling)
    print(f"{tasks_table(scores)}\nanswers: {out}")
    return scores


def tasks_table(scores: Scores) -> str:
    """The table of all tasks and arms, for printing; "" where there is no task."""
    text = scores_table(scores, {name: TASKS[name].scorers for name in scores})
    if INSTRUCTIONS_900.name in scores:
        text += power_note(INSTRUCTIONS_900.name, scores[INSTRUCTIONS_900.name])
    return text


def paper_chat(session: Session, name: str) -> Chat:
    """A chat format of the paper's evaluation over this model's tokenizer.

    "plain" is the text of the messages alone, after the bos token where the tokenizer adds one.
    """
    tokenizer, now = session.chat.tokenizer, session.chat.now
    if name != "plain":
        return Chat.from_dir(session.config.model, tokenizer, name, now=now)
    bos = "{{ bos_token }}" if tokenizer.add_bos else ""
    return Chat(
        bos + _PLAIN,
        tokenizer,
        name=name,
        eos_ids=session.chat.end_ids,
        now=now,
        rows=session.chat.rows,
    )


@memory_for("answering tasks", SAMPLE_LESS)
def _answer(
    session: Session, loaded: LoadedTask, arms: Arms, out: Path, sampling: SamplerConfig
) -> Lines:
    """Every line of the task by (arm, item, sample); those of an earlier run are kept."""
    task, items = loaded.task, loaded.items
    decoding = _decoding(session, loaded, sampling)
    generator = decoding.generator
    chat = generator.chat
    settings = session.settings | {
        **chat.sources.settings,
        "task": task.name,
        "data": loaded.digest,
        "items": len(items),
        "samples": loaded.samples,
        "sampling": generator.sampling.settings(),
        "paper": loaded.paper,
        "adapters": {name: lora_hash(lora) for name, lora in tuned(arms).items()},
    }
    by_id = {item.id: item for item in items}
    requests = _requests(items, chat, loaded.samples, decoding.most_tokens)
    file = out / f"{task.name}.jsonl"
    key = itemgetter("arm", "id", "sample")
    with ResumedLines(file, settings, key=key, wanted=LINE) as lines:
        for arm, lora in arms.items():
            of_arm = {}
            for (id, sample), request in requests.items():
                of_arm[arm, id, sample] = request
            to_line = partial(_line, decoding.judge, by_id, arm)
            answer_missing(generator, lora, of_arm, lines, to_line, f"{task.name} {arm}")
        lines.finish([(arm, id, sample) for arm in arms for id, sample in requests])
        return lines.done


class Decoding(NamedTuple):
    """The way in which a task is answered and judged."""

    generator: ChatGenerator
    judge: Judge
    most_tokens: int | None  # of prompt and answer together; None: only new tokens are limited


def _decoding(session: Session, loaded: LoadedTask, sampling: SamplerConfig) -> Decoding:
    """The model's own chat format and `sampling`, or those of the paper."""
    task = loaded.task
    if not loaded.paper:
        generator = ChatGenerator(session.model, session.chat, _limited(sampling, task))
        return Decoding(generator, task.judge, most_tokens=None)
    settings = PAPER_GREEDY if task.paper_greedy else PAPER_SAMPLING
    sampling = _limited(dataclasses.replace(sampling, **settings, stop=task.paper_stop), task)
    chat = paper_chat(session, task.paper_format)
    return Decoding(
        ChatGenerator(session.model, chat, sampling),
        judge=task.paper_judge or task.judge,
        most_tokens=sampling.max_new_tokens if task.paper_greedy else None,
    )


def _limited(sampling: SamplerConfig, task: Task) -> SamplerConfig:
    """The settings with at most as many new tokens as the task wants."""
    if task.max_new_tokens is None:
        return sampling
    limit = min(sampling.max_new_tokens, task.max_new_tokens)
    return dataclasses.replace(sampling, max_new_tokens=limit)


def _requests(
    items: Sequence[Item], chat: Chat, samples: int, most_tokens: int | None
) -> dict[tuple[str, int], Request]:
    """The requests of one arm by (item, sample)."""
    requests = {}
    for item in items:
        prompt = chat.prompt_ids(item.messages)
        max_new = None
        if most_tokens is not None:
            max_new = max(1, most_tokens - len(prompt))
        for sample in range(samples):
            requests[item.id, sample] = Request(item.id, prompt, max_new, sample)
    return requests


def _line(
    judge: Judge, items: Mapping[str, Item], arm: str, completion: Completion
) -> dict[str, Any]:
    """A judged answer, as a line of the file."""
    item = items[completion.id]
    scores, reason = judge(item, completion.text)
    return {
        "arm": arm,
        "id": item.id,
        "sample": completion.sample,
        "scores": scores,
        "reason": reason,
        "answer": completion.text,
        "finish": completion.finish,
        "tokens": len(completion.ids),
        "question": item.messages[-1]["content"],
        "reference": item.reference,
    }


def lora_hash(lora: Lora) -> str:
    """A hash of an adapter's config, parameters, and strength where that is not 1."""
    config = repr(lora.config).encode()
    if lora.strength != 1:
        config += f" at {lora.strength!r}".encode()
    params = lora.params.detach().cpu().numpy().tobytes()
    return sha256(config + params)
