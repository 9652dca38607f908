"""lm-evaluation-harness over this engine: MMLU, TruthfulQA, ARC, HellaSwag, WinoGrande, ...

The harness (extra `eval`: lm-eval) brings tasks, prompts and metrics; here is the model class that
it asks for log-likelihoods and texts. A context is computed once for all its continuations (the
choices of a question; likelihood.Scorer). No chat template is applied, as in the paper (paper.md
1.6).

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
from engine.measure.likelihood import Scorer, ScoringRequest, scoring_batches
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
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


def harness_model(session: Session, lora: Lora | None, sampling: SamplerConfig) -> Any:
    """An `lm_eval.api.model.LM` of the session's model with one adapter."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model, tokenizer = session.model, session.chat.tokenizer
    longest = model.config.max_position
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    session.chat.check_ids([id for id in (bos, eos) if id is not None])

    class EngineModel(TemplateLM):
        """Requests of the harness, answered by packed forwards and by the sampler."""

        cut = 0  # contexts that lost their beginning to fit the model

        @property
        def eot_token_id(self) -> int:
            return eos

        @property
        def prefix_token_id(self) -> int:
            return eos if bos is None else bos

        def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
            """Ids as transformers encodes a text: special tokens are recognised, bos is put first
            where the checkpoint asks for it."""
            ids = tokenizer.encode_template(string) if string else []
            session.chat.check_ids(ids)
            asked = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
            if asked and tokenizer.add_bos and ids[:1] != [bos]:
                return [bos, *ids]
            return ids

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            """(log p, is it greedy's choice) of every continuation; a context is computed once."""
            by_context: dict[tuple[int, ...], list[int]] = {}  # -> indices of requests
            for i, (_, context, continuation) in enumerate(requests):
                room = longest + 1 - len(continuation)  # the last token is not an input
                if not continuation or room < 1:
                    raise ValueError(
                        f"a continuation of {len(continuation)} tokens: expected 1 to {longest}"
                    )
                self.cut += len(context) > room
                by_context.setdefault(tuple(context[-room:]), []).append(i)
            members = list(by_context.values())
            asked = [
                ScoringRequest(str(n), list(context), [requests[i][2] for i in members[n]])
                for n, context in enumerate(by_context)
            ]
            found: dict[int, tuple[float, bool]] = {}
            with (
                Scorer(model, [one.prompt for one in asked], lora=lora) as scorer,
                progress(total=len(requests), desc="log-likelihoods", unit="text") as bar,
            ):
                for batch in scoring_batches(asked):
                    for one, answers in zip(batch, scorer.token_scores(batch), strict=True):
                        for i, answer in zip(members[int(one.id)], answers, strict=True):
                            logprob = -math.fsum(nats for nats, _ in answer)
                            found[i] = logprob, all(is_top for _, is_top in answer)
                            bar.update()
            return [found[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """log p of whole texts in windows of the model's length, each token predicted once."""
            windows, owners = [], []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in get_rolling_token_windows(ids, self.prefix_token_id, longest, 1):
                    windows.append((None, *make_disjoint_window(window)))
                    owners.append(i)
            parts: list[list[float]] = [[] for _ in requests]
            for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                parts[i].append(logprob)
            return [math.fsum(of_text) for of_text in parts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Texts up to a stop string, the end token or the limit; requests with the same
            settings run together."""
            by_settings: dict[str, list[int]] = {}  # -> indices of requests
            for i, request in enumerate(requests):
                by_settings.setdefault(repr(request.args[1]), []).append(i)
            texts: dict[str, str] = {}
            for members in by_settings.values():
                config = self._decoding(requests[members[0]].args[1])
                room = longest - config.max_new_tokens
                asked = []
                for i in members:
                    ids = self.tok_encode(requests[i].args[0])
                    self.cut += len(ids) > room
                    asked.append(Request(str(i), ids[-room:]))
                with Sampler(model, tokenizer.decode, [eos], config, lora) as sampler:
                    bar = progress(sampler.run(asked), total=len(asked), desc="texts", unit="text")
                    texts |= {answer.id: answer.text for answer in bar}
            return [texts[str(i)] for i in range(len(requests))]

        def _decoding(self, settings: Any) -> SamplerConfig:
            """The harness's settings of a request as ours."""
            settings = normalize_gen_kwargs(settings, MAX_NEW)
            stops = handle_stop_sequences(settings.get("until"), eos=None)
            return dataclasses.replace(
                sampling,
                temperature=float(settings.get("temperature", 0.0)),
                top_p=float(settings.get("top_p", 1.0)),
                top_k=int(settings.get("top_k", 0)),
                max_new_tokens=min(settings["max_gen_toks"], longest - 1),
                stop=tuple(stop for stop in stops if stop),
            )

    return EngineModel()


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
    session.require_one_process("evaluation")
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
    unknown = sorted(set(names) - set(manager.all_tasks))
    if not names or unknown:
        raise ValueError(
            f"--lm-eval {config.lm_eval!r}: the harness knows no {unknown or 'empty'} task; "
            "expected names as `lm-eval ls tasks` shows them, or --lm-eval-path"
        )
    arms: Arms = {"seed": None, **session.adapters(adapters)}
    settings = session.settings | {"adapters": adapter_hashes(adapters)}
    settings |= {"shots": config.lm_eval_shots, "limit": config.lm_eval_limit}
    settings |= {"lm_eval": lm_eval.__version__, "path": config.lm_eval_path}
    file = out / "lm_eval.jsonl"
    fields = {"task": str, "arm": str, "n": int, "metrics": dict, "cut": int}
    with ResumedLines(file, settings, key=itemgetter("task", "arm"), wanted=fields) as lines:
        for name in names:
            for arm, lora in arms.items():
                if (name, arm) in lines.done:
                    continue
                engine = harness_model(session, lora, sampling)
                found = simple_evaluate(
                    engine,
                    tasks=[name],
                    num_fewshot=config.lm_eval_shots,
                    limit=config.lm_eval_limit,
                    task_manager=manager,
                )
                figures = _figures(name, found)
                lines.write({"arm": arm, "task": name, **figures, "cut": engine.cut})
        done = lines.done
    results = {name: {arm: done[name, arm] for arm in arms} for name in names}
    print(f"{_text(results)}\nby task and arm: {file}")
    return results


def _figures(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The harness's metrics of a task, and right or wrong of each question where "acc" counts."""
    figures = found["results"].get(name) or found["groups"][name]
    metrics = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    samples = {}  # by subtask and question: the harness lists one once for every answer filter
    for subtask in sorted(found["samples"]):
        for sample in found["samples"][subtask]:
            samples[subtask, sample["doc_id"]] = sample
    accuracy = [sample.get("acc") for sample in samples.values()]
    right = None
    if set(accuracy) <= {0, 1}:
        right = [bool(value) for value in accuracy]
    return {"n": len(samples), "metrics": metrics, "right": right}


def _text(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line per task and metric, a column per arm."""
    arms = list(next(iter(results.values())))
    lines, cut = [["task", "metric", *arms]], []
    for task, by_arm in results.items():
        for metric in _shown(by_arm[arms[0]]["metrics"]):
            lines.append([task, metric, *(_cell(by_arm, arm, metric) for arm in arms)])
        cut += [f"{task} {arm} {line['cut']}" for arm, line in by_arm.items() if line["cut"]]
    note = "p of acc against the seed on the same questions (McNemar); of others the harness's s.e."
    text = f"{table(lines)}\n{note}"
    if cut:
        text += f"\ncontexts that lost their beginning: {', '.join(cut)}"
    return text


def _shown(metrics: Iterable[str]) -> list[str]:
    """The METRICS among these, else all of them (the harness writes "acc,none")."""
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
