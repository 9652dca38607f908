"""The main job: distil, train SFT and SDFT under identical settings, measure both, say the result

    OUT/distilled.jsonl          the rewrites (distill.py), .meta.json and .scores.jsonl beside it
    OUT/sft/, OUT/sdft/          run directories: all the same but references or targets
    OUT/evaluation.jsonl         greedy answers of seed, sft and sdft to the held-out rows
    OUT/tasks/TASK.jsonl         their answers to the tasks that were named
    OUT/retention.jsonl          drift from the seed on general prompts
    OUT/tokens.jsonl, OUT/answers.jsonl    what else the report shows (report/collect.py)
    OUT/summary.json, OUT/table.txt, OUT/report.html

Every stage keeps what it finished and is skipped when it is complete: the same command goes on
after a kill. Weights are loaded once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.distilled import Distilled
from engine.data.encode import Example
from engine.data.rows import Row
from engine.distill.config import DistillConfig
from engine.distill.distill import can_be_asked, distill, distill_settings
from engine.distill.distill_report import DistillReport
from engine.distill.seed_likelihoods import LikelihoodSums, score
from engine.evaluate.retention import retention
from engine.evaluate.target_task import (
    Arms,
    Score,
    adapter_hashes,
    evaluate,
    rows_to_judge,
    summary,
)
from engine.evaluate.tasks.run import TaskConfig, tables
from engine.measure.seed_answers import seed_answers
from engine.report.collect import answers, spaced, token_nll
from engine.report.page import write_report
from engine.runtime.files import write_json, write_text
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.run_record import environment
from engine.runtime.terminal import table
from engine.sampling.requests import SamplerConfig
from engine.session import Session, resolved
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.examples import encode_examples
from engine.train.train import train
from engine.train.validate import ValidateConfig, Validator
from engine.verify.verifiers import get_verifier
from model.lora import LoraConfig
from model.trained_chat import TrainedChat, common_system

NO_TASKS, NO_VALIDATION = TaskConfig(), ValidateConfig()


@dataclass(frozen=True)
class SdftConfig:
    """The job around the stages' own settings."""

    out: str  # directory of the run; the same command resumes there
    eval_data: str | None = None  # held-out rows that the seed model and both adapters answer,
    #   checked with --verify [default: none (the target task is not scored)]
    eval_limit: int | None = None  # use only the first N held-out rows [default: all]
    eval_max_new: int = 256  # most new tokens in an answer to a held-out row
    retention_max_new: int = 96  # most new tokens in an answer to a general prompt
    no_score: bool = False  # do not measure how likely the seed model finds references and rewrites
    report_rows: int = 48  # rows of which the report shows the likelihood of every token
    report_answers: int = 16  # general prompts, and held-out rows, of which the report shows all
    #   answers

    def check(self) -> None:
        """ValueError for numbers that cannot be."""
        if self.report_rows < 0 or self.report_answers < 0:
            raise ValueError(
                f"report_rows {self.report_rows}, report_answers {self.report_answers}: expected "
                "at least 0"
            )
        counts = ("eval_limit", "eval_max_new", "retention_max_new")
        check_numbers(self, **dict.fromkeys(counts, (1, MOST)))


def run(
    session: Session,
    data: DataConfig,
    job: SdftConfig,
    distilling: DistillConfig,
    sampling: SamplerConfig,
    encoding: EncodeConfig,
    training: TrainConfig,
    lora: LoraConfig,
    tasks: TaskConfig = NO_TASKS,
    validating: ValidateConfig = NO_VALIDATION,
) -> dict[str, Any]:
    """Do all of it; returns what summary.json holds."""
    session.alone("the whole job")
    started, out = time.perf_counter(), Path(job.out)
    configs = (data, job, distilling, sampling, encoding, training, lora, tasks, validating)
    for config in configs:
        config.check()
    get_verifier(distilling.verify)
    model, chat = session.model, session.chat
    encoding = as_published(encoding, distilling)
    # what is wrong with any file stops here, not behind hours of work
    rows = data.load(check=can_be_asked(chat, distilling))
    held_out = held_out_rows(session, data, rows, job.eval_data, job.eval_limit)
    trained = encode_rows(rows, session, data, encoding, "reference")
    training.highest_rate(len(trained))
    validator = Validator(validating, data, session) if validating.val_every else None
    seconds: dict[str, float] = {}

    # 1. distillation
    settings = distill_settings(session, rows, distilling, sampling)
    file = out / "distilled.jsonl"
    begun = time.perf_counter()
    report = distill(model, chat, rows, file, distilling, sampling, settings=settings, resume=True)
    seconds["distill"] = time.perf_counter() - begun
    print(report.text())

    # 2. seed likelihoods
    means = None
    if not job.no_score:
        begun = time.perf_counter()
        scores_file = file.with_name(file.name + ".scores.jsonl")
        means = score(model, chat, report.lines, scores_file, settings)
        seconds["score"] = time.perf_counter() - begun
        print(means.text())

    # 3. the two trainings: the same examples in the same order, only the targets differ
    arms: Arms = {"seed": None}
    trainings = {}
    shown: dict[str, list[Example]] = {}
    for arm, target in (("sft", "reference"), ("sdft", "target")):
        begun = time.perf_counter()
        examples = encode_rows(report.lines, session, data, encoding, target, training.seed)
        shown[arm] = spaced(examples, job.report_rows)
        arms[arm], trainings[arm] = train(
            model,
            examples,
            lora,
            training,
            out / arm,
            base=session.config.model,
            model_hash=session.fingerprint,
            resume=(out / arm).exists(),
            world=session.world,
            validator=validator,
            date=session.settings.get("date"),
            chat=TrainedChat.of(chat, common_system([line.messages for line in report.lines])),
        )
        seconds[f"train {arm}"] = time.perf_counter() - begun

    # 4. the target task
    base = session.settings | {"adapters": adapter_hashes([str(out / arm) for arm in trainings])}
    scores: dict[str, Score] = {}
    if held_out:
        begun = time.perf_counter()
        greedy = sampling.greedy(job.eval_max_new)
        asked = base | {"data": held_out.sha256, "rows": len(held_out)}
        asked |= {"verify": distilling.verify, "max_new": job.eval_max_new}
        scores = evaluate(
            model, chat, held_out, distilling.verify, arms, out / "evaluation.jsonl", greedy, asked
        )
        seconds["evaluate"] = time.perf_counter() - begun

    begun = time.perf_counter()
    known = tasks.run(session, arms, out / "tasks", sampling.greedy(SamplerConfig.max_new_tokens))
    seconds |= {"tasks": time.perf_counter() - begun} if known else {}

    # 5. everything else
    begun = time.perf_counter()
    greedy = sampling.greedy(job.retention_max_new)
    asked = session.settings | {"max_new": job.retention_max_new}
    said = seed_answers(model, chat, out / "seed_answers.jsonl", greedy, asked)
    asked = base | {"max_new": job.retention_max_new}
    drift = retention(model, said, arms, out / "retention.jsonl", asked)
    seconds["retention"] = time.perf_counter() - begun

    # 6. what else the report shows
    begun = time.perf_counter()
    token_nll(model, chat.tokenizer, shown["sft"], shown["sdft"], out / "tokens.jsonl", base)
    answers(model, chat, arms, out, held_out or [], job.report_answers, greedy, asked)
    seconds["report"] = time.perf_counter() - begun
    seconds["all"] = time.perf_counter() - started

    result = {
        "settings": resolved(session.config, *configs),
        "environment": environment(),
        "model": session.facts(),
        "distilled": {"counts": dict(report.counts), "differ": report.differ},
        "likelihood": None if means is None else dataclasses.asdict(means),
        "training": trainings,
        "evaluation": summary(scores),
        "tasks": known,
        "retention": drift,
        "seconds": seconds,
    }
    write_json(out / "summary.json", result)
    text = _text(out, distilling, report, means, trainings, scores, drift, seconds)
    text += tables(known)
    write_text(out / "table.txt", text + "\n")
    print("\n" + text)
    print(write_report([out], out / "report.html"))
    return result


def held_out_rows(
    session: Session,
    data: DataConfig,
    rows: Sequence[Row],
    file: str | None,
    limit: int | None,
) -> Any:
    """The held-out rows of a file; ValueError where one of them is trained on, or does not fit the
    model (`rows_to_judge`)."""
    if file is None:
        return None
    held_out = rows_to_judge(session, data.beside(file, limit))
    asked = {str(row.messages[:-1]) for row in rows}
    both = [row.id for row in held_out if str(row.messages[:-1]) in asked]
    if both:
        raise ValueError(
            f"{len(both)} held-out rows are also trained on, first {both[:5]}: a score over them "
            "says nothing; give other --eval-data"
        )
    return held_out


def as_published(encoding: EncodeConfig, distilling: DistillConfig) -> EncodeConfig:
    """Under paper_exact long examples are cut as the published code cuts them."""
    cut = encoding.cut_in_proportion or distilling.paper_exact
    return dataclasses.replace(encoding, cut_in_proportion=cut)


def encode_rows(
    rows: Sequence[Row] | Sequence[Distilled],
    session: Session,
    data: DataConfig,
    encoding: EncodeConfig,
    target: str,
    seed: int = 0,
) -> list[Example]:
    """Examples whose answers are the `target`, with what was encoded, cut and left out said.

    ValueError where turns are too long, or nothing is left.
    """
    mix = encoding.mix if target == "target" else 0.0
    encoding = dataclasses.replace(encoding, target=target, mix=mix)
    return encode_examples(rows, session, data, encoding, seed=seed)


def _text(
    out: Path,
    distilling: DistillConfig,
    report: DistillReport,
    means: LikelihoodSums | None,
    trainings: dict[str, Any],
    scores: dict[str, Score],
    drift: dict[str, dict[str, float]],
    seconds: dict[str, float],
) -> str:
    """The closing table and where everything lies."""
    header = ["", f"target ({distilling.verify})", "95 % interval", "held-out NLL"]
    lines = [[*header, "KL to seed", "KL from seed", "same top-1", "train loss", "train s"]]
    for arm in ("seed", "sft", "sdft"):
        if arm in scores:
            cells = [*scores[arm].cells(), f"{scores[arm].nll:.3f}"]
        else:
            cells = ["-", "-", "-"]
        kept = drift.get(arm, {"kl": 0.0, "reverse_kl": 0.0, "agreement": 1.0})
        cells += [f"{kept[name]:.4f}" for name in ("kl", "reverse_kl")]
        cells.append(f"{kept['agreement']:.1%}")
        if t := trainings.get(arm):
            cells += [f"{t['first_loss']:.3f} -> {t['last_loss']:.3f}", f"{t['seconds']:.0f}"]
        else:
            cells += ["-", "-"]
        lines.append([{"seed": "seed", "sft": "SFT", "sdft": "SDFT"}[arm], *cells])
    text = [table(lines), "", report.text()]
    if means is not None:
        text.append(means.text())
    spent = ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
    text.append(f"seconds since the last start: {spent}")
    text += [
        "KL to and from seed, KL(seed || tuned) and KL(tuned || seed): nats per token over the "
        "seed's own answers to general prompts; lower is less forgotten.",
        f"distilled data {out}/distilled.jsonl, adapters {out}/sft and {out}/sdft (PEFT layout), "
        f"answers {out}/evaluation.jsonl, drift {out}/retention.jsonl, all figures "
        f"{out}/summary.json",
    ]
    return "\n".join(text)
