"""lm-evaluation-harness over this engine: MMLU, TruthfulQA, ARC, HellaSwag, WinoGrande, ...

The harness (extra `eval`: lm-eval) brings tasks, prompts and metrics; `HarnessModel` is the model
that it asks for log-likelihoods and texts. A context is computed once for all its continuations
(the choices of a question; `Scorer` in engine/measure/likelihood.py). No chat template is applied,
as in the SDFT paper (arXiv 2402.13669).

    OUT/lm_eval.jsonl    a line per arm and task: {arm, task, n, metrics, right}
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from engine.evaluate.arms import Arms, adapter_hashes
from engine.measure.intervals import lost_won, mcnemar, wilson
from engine.measure.likelihood import (
    BATCH_TOKENS,
    Scorer,
    ScoringRequest,
    TokenScore,
    scoring_batches,
)
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.runtime.terminal import progress, table
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import Session
from model.lora import Lora

METRICS = ("acc", "acc_norm", "exact_match", "em", "mc2")  # shown in the table where a task has one
MAX_NEW = 256  # new tokens where a task names no limit, as in the harness's own models

Figures = dict[str, Any]  # of a task under one arm: n, metrics, right, cut
TokenRequest = tuple[Any, list[int], list[int]]  # (unused, ids of a context, ids of a continuation)

# fields that a line of OUT/lm_eval.jsonl must have, with their types
LINE = {"task": str, "arm": str, "n": int, "metrics": dict, "cut": int}


@dataclass(frozen=True)
class HarnessConfig:
    """Which tasks of lm-evaluation-harness."""

    lm_eval: str | None = None  # tasks of lm-evaluation-harness, as in mmlu,arc_easy (pip install
    #   -e '.[eval]') [default: none]
    lm_eval_path: str | None = None  # directory with further tasks, as YAML files of the harness
    #   [default: none]
    lm_eval_shots: int | None = None  # solved examples shown before a question
    #   [default: the task's own number]
    lm_eval_limit: int | None = None  # use only the first N questions of each task [default: all]

    def check(self) -> None:
        """ValueError for numbers out of range."""
        check_numbers(self, lm_eval_limit=(1, MOST))


def leave_scripts_out() -> None:
    """Remove scripts/ from sys.path, which begins with it when one of the scripts runs.

    Its evaluate.py is not the package `evaluate` that tasks of the harness import (squadv2).
    """
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != scripts]


class HarnessModel:
    """One arm of a session, behind the methods that lm_eval's `TemplateLM` asks of a model.

    Log-likelihoods come from packed forwards, texts from the sampler. lm_eval is an optional extra
    and is imported only where it is used: `harness_model` makes the class that is a `TemplateLM`
    too. Its requests are `lm_eval.api.instance.Instance`s; `request.args` holds their arguments.
    """

    def __init__(self, session: Session, lora: Lora | None, sampling: SamplerConfig) -> None:
        super().__init__()  # of `TemplateLM`
        self.session = session
        self.lora = lora
        self.sampling = sampling
        self.longest = session.model.config.max_position  # tokens of a context and its answer
        self.cut = 0  # contexts that lost their beginning to fit the model
        tokenizer = session.chat.tokenizer
        special = [id for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None]
        session.chat.check_ids(special)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.session.chat.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.session.chat.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
        """Ids as transformers encodes a text: special tokens are recognised, bos is put first
        where the checkpoint asks for it. ValueError for an id that the model has no row for."""
        tokenizer = self.session.chat.tokenizer
        ids = tokenizer.encode_template(string) if string else []
        self.session.chat.check_ids(ids)
        wants_bos = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        has_bos = ids[:1] == [tokenizer.bos_id]
        if wants_bos and tokenizer.add_bos and not has_bos:
            return [tokenizer.bos_id, *ids]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p in nats, whether greedy decoding would choose it) of every continuation.

        A context is computed once for all its continuations. ValueError for a continuation that is
        empty or longer than the model.
        """
        members: dict[str, list[int]] = {}  # id of a scoring request -> indices of requests
        to_score = []
        for context, indices in self._by_context(requests).items():
            id = str(len(to_score))
            members[id] = indices
            continuations = [requests[i][2] for i in indices]
            to_score.append(ScoringRequest(id, list(context), continuations))
        contexts = [request.prompt for request in to_score]
        most_tokens = BATCH_TOKENS[self.session.model.device.type]
        found: dict[int, tuple[float, bool]] = {}  # by index of the request
        with (
            Scorer(self.session.model, contexts, lora=self.lora) as scorer,
            progress(total=len(requests), desc="log-likelihoods", unit="text") as bar,
        ):
            for batch in scoring_batches(to_score, most_tokens):
                scores = scorer.token_scores(batch)  # [context][continuation][token]
                for request, answers in zip(batch, scores, strict=True):
                    for i, answer in zip(members[request.id], answers, strict=True):
                        found[i] = _sum_of_scores(answer)
                        bar.update()
        return [found[i] for i in range(len(requests))]

    def _by_context(self, requests: Sequence[TokenRequest]) -> dict[tuple[int, ...], list[int]]:
        """The part of each context that fits the model -> indices of its requests."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            room = self.longest + 1 - len(continuation)  # the last token is not an input
            if not continuation or room < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens: expected 1 to {self.longest}"
                )
            if len(context) > room:
                self.cut += 1
            by_context.setdefault(tuple(context[-room:]), []).append(i)
        return by_context

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """log p in nats of whole texts, in windows of the model's length, each token predicted
        once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[TokenRequest] = []
        owners: list[int] = []  # of each window the index of its text
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.longest, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(i)
        parts: list[list[float]] = [[] for _ in requests]
        scores = self._loglikelihood_tokens(windows)
        for i, (logprob, _) in zip(owners, scores, strict=True):
            parts[i].append(logprob)
        return [math.fsum(of_text) for of_text in parts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, the end token or the limit; requests with the same settings
        are decoded together."""
        by_settings: dict[str, list[int]] = {}  # settings -> indices of their requests
        for i, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(i)
        texts: dict[str, str] = {}
        for indices in by_settings.values():
            settings = requests[indices[0]].args[1]
            contexts = {i: requests[i].args[0] for i in indices}
            texts |= self._texts(contexts, self._decoding(settings))
        return [texts[str(i)] for i in range(len(requests))]

    def _texts(self, contexts: dict[int, str], config: SamplerConfig) -> dict[str, str]:
        """Texts under one config by the index of their request, as a string."""
        session = self.session
        room = self.longest - config.max_new_tokens
        prompts = []
        for i, context in contexts.items():
            ids = self.tok_encode(context)
            if len(ids) > room:
                self.cut += 1
            prompts.append(Request(str(i), ids[-room:]))
        decode, end_ids = session.chat.tokenizer.decode, [self.eot_token_id]
        with Sampler(session.model, decode, end_ids, config, self.lora) as sampler:
            answers = sampler.run(prompts)
            bar = progress(answers, total=len(prompts), desc="texts", unit="text")
            return {answer.id: answer.text for answer in bar}

    def _decoding(self, settings: Any) -> SamplerConfig:
        """The harness's decoding settings of a request as a `SamplerConfig`."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        settings = normalize_gen_kwargs(settings, MAX_NEW)
        stops = handle_stop_sequences(settings.get("until"), eos=None)
        return dataclasses.replace(
            self.sampling,
            temperature=float(settings.get("temperature", 0.0)),
            top_p=float(settings.get("top_p", 1.0)),
            top_k=int(settings.get("top_k", 0)),
            max_new_tokens=min(settings["max_gen_toks"], self.longest - 1),
            stop=tuple(stop for stop in stops if stop),
        )


def _sum_of_scores(tokens: Sequence[TokenScore]) -> tuple[float, bool]:
    """log p of an answer, and whether every token of it is the likeliest."""
    logprob = -math.fsum(token.nats for token in tokens)
    return logprob, all(token.greedy for token in tokens)


def harness_model(session: Session, lora: Lora | None, sampling: SamplerConfig) -> HarnessModel:
    """A `HarnessModel` that is an `lm_eval.api.model.LM`, as `simple_evaluate` expects one."""
    from lm_eval.api.model import TemplateLM

    class EngineModel(HarnessModel, TemplateLM):
        pass

    return EngineModel(session, lora, sampling)


@memory_for("answering the harness", SAMPLE_LESS)
def harness_job(
    session: Session,
    config: HarnessConfig,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
    scales: Sequence[float] = (1.0,),
) -> dict[str, dict[str, Figures]]:
    """{task: {arm: {n, metrics, right, cut}}} of the seed and the adapters; prints the table.

    scales: strengths at which each adapter is scored (`Lora.scaled`).

    `metrics` are the harness's. `right` is a list with right or wrong of every question where the
    metric "acc" counts them, else None. `cut` is the number of contexts that lost their beginning.
    Lines that `out` holds already are kept. ValueError, before any work, where lm-eval is not
    installed or does not know a task.
    """
    session.require_one_process("evaluation")
    config.check()
    leave_scripts_out()
    try:
        import lm_eval
        from lm_eval.evaluator import simple_evaluate
    except ImportError as error:
        raise ValueError(f"--lm-eval needs lm-eval ({error}): pip install -e '.[eval]'") from None
    manager = _task_manager(_listed(config.lm_eval), config.lm_eval_path)
    names = _task_names(config.lm_eval, manager.all_tasks)
    arms: Arms = {"seed": None, **session.adapters(adapters, scales)}
    settings = session.settings | {
        "adapters": adapter_hashes(adapters, scales),
        "shots": config.lm_eval_shots,
        "limit": config.lm_eval_limit,
        "lm_eval": lm_eval.__version__,
        "path": config.lm_eval_path,
    }
    file = out / "lm_eval.jsonl"
    with ResumedLines(file, settings, key=itemgetter("task", "arm"), wanted=LINE) as lines:
        for name in names:
            for arm, lora in arms.items():
                if (name, arm) in lines.done:
                    continue
                model = harness_model(session, lora, sampling)
                results = simple_evaluate(
                    model,
                    tasks=[name],
                    num_fewshot=config.lm_eval_shots,
                    limit=config.lm_eval_limit,
                    task_manager=manager,
                )
                figures = _figures(name, results)
                lines.write({"arm": arm, "task": name, **figures, "cut": model.cut})
        done = lines.done
    by_task: dict[str, dict[str, Figures]] = {}
    for name in names:
        by_task[name] = {arm: done[name, arm] for arm in arms}
    print(f"{_text(by_task)}\nby task and arm: {file}")
    return by_task


def _task_manager(names: Sequence[str], path: str | None) -> Any:
    """The harness's `TaskManager` of the tasks in `path`, and of its own where one is asked for.

    To know its own it reads 14,000 files, which takes ten seconds. A group may name any task, so
    only a list of single tasks spares that.
    """
    from lm_eval.tasks import TaskManager

    if path is not None and names:
        manager = TaskManager(include_path=path, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    return TaskManager(include_path=path)


def _listed(flag: str | None) -> list[str]:
    """The names in --lm-eval, which commas part."""
    names = [name.strip() for name in (flag or "").split(",")]
    return [name for name in names if name]


def _task_names(flag: str | None, known: Iterable[str]) -> list[str]:
    """The task names of --lm-eval; ValueError where there is none, or one is not known."""
    names = _listed(flag)
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        fault = f"unknown tasks {unknown}" if unknown else "no task is named"
        raise ValueError(
            f"--lm-eval {flag!r}: {fault}; expected names as `lm-eval ls tasks` shows them; tasks "
            "of your own need --lm-eval-path"
        )
    return names


def _figures(name: str, results: dict[str, Any]) -> Figures:
    """The harness's metrics of a task, and right or wrong of each question where "acc" counts."""
    figures = results["results"].get(name) or results["groups"][name]
    metrics = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    # by subtask and question, because the harness lists a question once for every answer filter
    samples: dict[tuple[str, int], dict[str, Any]] = {}
    for subtask in sorted(results["samples"]):
        for sample in results["samples"][subtask]:
            samples[subtask, sample["doc_id"]] = sample
    accuracy = [sample.get("acc") for sample in samples.values()]
    right = None
    if set(accuracy) <= {0, 1}:
        right = [bool(value) for value in accuracy]
    return {"n": len(samples), "metrics": metrics, "right": right}


def _text(results: dict[str, dict[str, Figures]]) -> str:
    """A line per task and metric, a column per arm."""
    any_task = list(results)[0]
    arms = list(results[any_task])
    lines = [["task", "metric", *arms]]
    cut = []
    for task, by_arm in results.items():
        for metric in _shown(by_arm[arms[0]]["metrics"]):
            cells = [_cell(by_arm, arm, metric) for arm in arms]
            lines.append([task, metric, *cells])
        for arm, figures in by_arm.items():
            if figures["cut"]:
                cut.append(f"{task} {arm} {figures['cut']}")
    text = (
        f"{table(lines)}\nacc: 95 % interval, and p against the seed on the same questions "
        "(McNemar); other metrics: +- the harness's standard error"
    )
    if cut:
        text += f"\ncontexts that lost their beginning: {', '.join(cut)}"
    return text


def _base_name(metric: str) -> str:
    """The harness names a metric with its answer filter: "acc,none" -> "acc"."""
    return metric.split(",")[0]


def _shown(metrics: Iterable[str]) -> list[str]:
    """The METRICS among these; where there are none, all but the standard errors."""
    known = [metric for metric in metrics if _base_name(metric) in METRICS]
    if known:
        return known
    return [metric for metric in metrics if "," in metric and "_stderr" not in metric]


def _cell(by_arm: dict[str, Figures], arm: str, metric: str) -> str:
    """The figure with its interval or standard error, and the comparison with the seed."""
    figures = by_arm[arm]
    value = figures["metrics"][metric]
    right = figures["right"]
    if _base_name(metric) == "acc" and right is not None:
        low, high = wilson(sum(right) / len(right), len(right))
        cell = f"{value:.1%} ({100 * low:.1f}-{100 * high:.1f})"
        if arm != "seed":
            lost, won = lost_won(by_arm["seed"]["right"], right)
            cell += f", p {mcnemar(lost, won):.3f}"
        return cell
    error = figures["metrics"].get(metric.replace(",", "_stderr,", 1))
    if error is None:
        return f"{value:.4f}"
    return f"{value:.4f} +- {error:.4f}"
