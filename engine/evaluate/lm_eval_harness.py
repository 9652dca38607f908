"""lm-evaluation-harness over this engine: MMLU, TruthfulQA, ARC, HellaSwag, WinoGrande, ...

The harness (extra `eval`: lm-eval) brings tasks, prompts and metrics; here is the model class that
it asks for log-likelihoods and texts. Several continuations of one context (the choices of a
question) are scored behind one copy of it (engine/measure/likelihood.py). No chat template is
applied, as in the paper (paper.md 1.6).

    OUT/lm_eval.jsonl    a line per arm and task: {arm, task, n, metrics, right}
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.evaluate.target_task import Arms, adapter_hashes
from engine.measure.intervals import lost_won, mcnemar, wilson
from engine.measure.likelihood import Scorer, ScoringRequest, scoring_batches
from engine.runtime.files import AppendedLines
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable_answers import resume_lines
from engine.runtime.terminal import progress, table
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import Session
from model.lora import Lora

METRICS = ("acc", "acc_norm", "exact_match", "em", "mc2")  # those of the closing table, if there
MAX_NEW = 256  # new tokens where a task names no limit, as in the harness's own models


@dataclass(frozen=True)
class HarnessConfig:
    """Which tasks of lm-evaluation-harness."""

    lm_eval: str | None = None  # tasks of lm-evaluation-harness, as in mmlu,arc_easy (pip install
    #   -e '.[eval]') [default: none]
    lm_eval_path: str | None = None  # directory with more tasks in the harness's YAML
    #   [default: none]
    lm_eval_shots: int | None = None  # solved examples shown before a question
    #   [default: the task's own number]
    lm_eval_limit: int | None = None  # use only the first N questions of each task [default: all]

    def check(self) -> None:
        """ValueError for numbers that cannot be."""
        check_numbers(self, lm_eval_limit=(1, MOST))


def leave_scripts_out() -> None:
    """Take scripts/ off the path of modules, which begins with it when one of them runs.

    Its evaluate.py is not the package `evaluate` that tasks of the harness import (squadv2).
    """
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != scripts]


def harness_model(session: Session, lora: Lora | None, sampling: SamplerConfig) -> Any:
    """An `lm_eval.api.model.LM` of the session's model with one adapter."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model, tokenizer = session.model, session.chat.tokenizer
    most = model.config.max_position
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    session.chat.check_ids([id for id in (bos, eos) if id is not None])

    class Engine(TemplateLM):
        """Requests of the harness, answered by packed forwards and by the sampler."""

        cut = 0  # contexts that lost their beginning to fit the model

        @property
        def eot_token_id(self) -> int:
            return eos

        @property
        def prefix_token_id(self) -> int:
            return eos if bos is None else bos

        def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
            """Ids as transformers encodes a text: special tokens are recognised, bos put before
            where the checkpoint wants it."""
            ids = tokenizer.encode_template(string) if string else []
            wanted = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
            session.chat.check_ids(ids)
            return [bos, *ids] if wanted and tokenizer.add_bos and ids[:1] != [bos] else ids

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            """(log p, is it greedy's choice) of every continuation; a context is computed once."""
            by_context: dict[tuple[int, ...], list[int]] = {}
            for i, (_, context, continuation) in enumerate(requests):
                room = most + 1 - len(continuation)  # the last token is not put in
                if not continuation or room < 1:
                    raise ValueError(
                        f"a continuation of {len(continuation)} tokens: 1 to {most} are wanted"
                    )
                self.cut += len(context) > room
                by_context.setdefault(tuple(context[-room:]), []).append(i)
            asked = [
                ScoringRequest(str(n), list(context), [requests[i][2] for i in members])
                for n, (context, members) in enumerate(by_context.items())
            ]
            places, found = list(by_context.values()), {}
            with (
                Scorer(model, [one.prompt for one in asked], lora=lora) as scorer,
                progress(total=len(requests), desc="log-likelihoods", unit="text") as bar,
            ):
                for batch in scoring_batches(asked):
                    for one, answers in zip(batch, scorer.token_scores(batch), strict=True):
                        for i, answer in zip(places[int(one.id)], answers, strict=True):
                            total = -math.fsum(nats for nats, _ in answer)
                            found[i] = total, all(top for _, top in answer)
                            bar.update()
            return [found[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """log p of whole texts in windows of the model's length, each token predicted once."""
            windows, owner = [], []
            for i, request in enumerate(requests):
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, most, 1
                ):
                    windows.append((None, *make_disjoint_window(window)))
                    owner.append(i)
            totals: list[list[float]] = [[] for _ in requests]
            for i, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
                totals[i].append(logprob)
            return [math.fsum(parts) for parts in totals]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Texts up to a stop string, the end token or the limit; requests that ask alike run
            together."""
            alike: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                alike.setdefault(repr(request.args[1]), []).append(i)
            found: dict[str, str] = {}
            for members in alike.values():
                asked = normalize_gen_kwargs(requests[members[0]].args[1], MAX_NEW)
                new = min(asked["max_gen_toks"], most - 1)
                stops = handle_stop_sequences(asked.get("until"), eos=None)
                config = dataclasses.replace(
                    sampling,
                    temperature=float(asked.get("temperature", 0.0)),
                    top_p=float(asked.get("top_p", 1.0)),
                    top_k=int(asked.get("top_k", 0)),
                    max_new_tokens=new,
                    stop=tuple(stop for stop in stops if stop),
                )
                todo = []
                for i in members:
                    ids = self.tok_encode(requests[i].args[0])
                    self.cut += len(ids) > most - new
                    todo.append(Request(str(i), ids[-(most - new) :]))
                with Sampler(model, tokenizer.decode, [eos], config, lora) as sampler:
                    bar = progress(sampler.run(todo), total=len(todo), desc="texts", unit="text")
                    found |= {answer.id: answer.text for answer in bar}
            return [found[str(i)] for i in range(len(requests))]

    return Engine()


@memory_for("answering the harness", SAMPLE_LESS)
def harness_job(
    session: Session,
    config: HarnessConfig,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {arm: {n, metrics, right}}} of the seed and the adapters; prints the table.

    metrics are the harness's; right says for each question whether "acc" counts it, where it does.
    What `out` holds already is kept.
    """
    session.alone("evaluation")
    config.check()
    leave_scripts_out()
    try:
        import lm_eval
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--lm-eval needs lm-eval ({error}): pip install -e '.[eval]'") from None
    names = [name.strip() for name in (config.lm_eval or "").split(",") if name.strip()]
    manager = TaskManager(include_path=config.lm_eval_path)
    if not names or (unknown := sorted(set(names) - set(manager.all_tasks))):
        raise ValueError(
            f"--lm-eval {config.lm_eval!r}: the harness knows no {unknown if names else 'empty'} "
            "task; names as `lm-eval ls tasks` shows them are wanted, or --lm-eval-path"
        )
    arms: Arms = {"seed": None, **session.adapters(adapters)}
    settings = session.settings | {"adapters": adapter_hashes(adapters)}
    settings |= {"shots": config.lm_eval_shots, "limit": config.lm_eval_limit}
    settings |= {"lm_eval": lm_eval.__version__, "path": config.lm_eval_path}
    file = out / "lm_eval.jsonl"
    wanted = {"task": str, "arm": str, "n": int, "metrics": dict, "cut": int}
    done = {(line["task"], line["arm"]): line for line in resume_lines(file, settings, wanted)}
    with AppendedLines(file) as lines:
        for name in names:
            for arm, lora in arms.items():
                if (name, arm) in done:
                    continue
                engine = harness_model(session, lora, sampling)
                found = simple_evaluate(
                    engine,
                    tasks=[name],
                    num_fewshot=config.lm_eval_shots,
                    limit=config.lm_eval_limit,
                    task_manager=manager,
                )
                line = {"arm": arm, "task": name, **_line(name, found), "cut": engine.cut}
                lines.write(line)
                done[name, arm] = line
    results = {name: {arm: done[name, arm] for arm in arms} for name in names}
    print(f"{_text(results)}\nby task and arm: {file}")
    return results


def _line(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the harness's answer: its figures, and each question's right or wrong."""
    figures = found["results"].get(name) or found["groups"][name]
    metrics = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    # A question stands there once for each of the task's answer filters.
    parts = found["samples"]
    each = {(part, one["doc_id"]): one for part in sorted(parts) for one in parts[part]}
    judged = [one.get("acc") for one in each.values()]
    right = [bool(v) for v in judged] if set(judged) <= {0, 1} else None
    return {"n": len(each), "metrics": metrics, "right": right}


def _text(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row per task and metric, a column per arm."""
    arms = list(next(iter(results.values())))
    rows, cut = [["task", "metric", *arms]], []
    for task, by_arm in results.items():
        for metric in _shown(by_arm[arms[0]]["metrics"]):
            rows.append([task, metric, *(_cell(by_arm, arm, metric) for arm in arms)])
        cut += [f"{task} {arm} {line['cut']}" for arm, line in by_arm.items() if line["cut"]]
    note = "p of acc against the seed on the same questions (McNemar); of others the harness's s.e."
    text = f"{table(rows)}\n{note}"
    return text + (f"\ncontexts that lost their beginning: {', '.join(cut)}" if cut else "")


def _shown(metrics: Iterable[str]) -> list[str]:
    """METRICS that are there, else whatever is (the harness writes "acc,none")."""
    known = [m for m in metrics if m.split(",")[0] in METRICS]
    return known or [m for m in metrics if "_stderr" not in m and "," in m]


def _cell(by_arm: dict[str, dict[str, Any]], arm: str, metric: str) -> str:
    """The figure with an interval, and the comparison with the seed."""
    line, value = by_arm[arm], by_arm[arm]["metrics"][metric]
    right, seed = line["right"], by_arm["seed"]["right"]
    if metric.split(",")[0] == "acc" and right is not None:
        low, high = wilson(sum(right) / len(right), len(right))
        cell = f"{value:.1%} ({100 * low:.1f}-{100 * high:.1f})"
        if arm != "seed":
            cell += f", p {mcnemar(*lost_won(seed, right)):.3f}"
        return cell
    error = line["metrics"].get(metric.replace(",", "_stderr,", 1))
    return f"{value:.4f}" + (f" +- {error:.4f}" if error is not None else "")
