"""Preflight: will self-distillation change anything for this model on these rows? A sample decides

    plain       the model answers the plain prompt, greedily: score, likelihood of its own answers
    shown       it rewrites the reference, as distillation would (same template, sampling, rules):
                score, acceptance, copying, length
    gap         over the tokens of the rewrites, the model shown the reference (p) beside itself
                under the plain prompt (q): KL(p || q) and -log q + log p, nats per token
    cost        seconds and bytes of the whole job, extrapolated from the sample

The result is GO, or the reasons against it (preflight_reasons.py holds every threshold with its
source). A sample shows large differences; it cannot tell 18 % from 22 %.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.distilled import KEPT, Distilled
from engine.data.encode import Example, prompts_of
from engine.data.rows import Row, Rows
from engine.data.subset import evenly_spaced
from engine.distill.config import DistillConfig
from engine.distill.distill import can_be_asked, distill
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.distill.seed_likelihoods import score
from engine.distill.selection import why_garbled
from engine.evaluate.arms import ARM_TARGETS
from engine.jobs.job_config import JobConfig
from engine.jobs.preflight_reasons import NGRAM, reasons_that_hold, report_text
from engine.jobs.stages import encode_rows
from engine.measure.divergence import compare, hidden_states
from engine.runtime.limits import check_numbers
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import Session
from engine.train.step import step_gradients
from engine.verify.verifiers import get_verifier
from model.lora import Lora, adapter_shapes

HEDGES = re.compile(
    r"\b(?:wait|hmm+|maybe|perhaps|alternatively|actually|probably|let me (?:check|think))\b", re.I
)
FEW_HEDGES = 0.5  # per 100 words; a model below this has no habit that could be lost


@dataclass(frozen=True)
class PreflightConfig:
    """The sample."""

    sample: int = 16  # rows to look at, spread over the file; the first answer of each

    def check(self) -> None:
        """ValueError for a sample that is too small to show anything."""
        if self.sample < 2:
            raise ValueError(f"sample {self.sample}: expected at least 2 rows")
        check_numbers(self)


Config = JobConfig[PreflightConfig]


def preflight(session: Session, config: Config) -> dict[str, Any]:
    """Measure a sample and print the figures, GO or the reasons against it, and a line of JSON.

    Of a cascade only one guided try is measured: more tries accept more, and take longer.
    """
    session.require_one_process("preflight")
    one_try = dataclasses.replace(config.distill, cascade="guided:1")
    config = dataclasses.replace(config, distill=one_try)
    config.check()
    started = time.perf_counter()
    config = config.as_published()
    rows = config.data.load(check=can_be_asked(session.chat, config.distill))
    examples = encode_rows(session, config, rows, "reference")  # ValueError for a row too long
    config.train.highest_rate(len(examples))
    chosen = [_first_turn(row) for row in evenly_spaced(rows, config.job.sample)]
    sample = Rows(chosen, rows.path, rows.sha256)
    figures: dict[str, Any] = {"rows": len(rows), "sample": len(sample)}
    figures["own_template"] = float(session.config.chat_format in (None, "own"))

    # 1. plain prompts, answered greedily
    answers = plain_answers(session, config, sample)
    figures |= figures_of_answers(sample, answers)

    # 2. shown the reference: the rewrites that distillation would make, scored
    rewriting = rewrite(session, config, sample)
    figures |= figures_of_rewrites(session, config, sample, answers, rewriting)

    # 3. how much the shown reference changes the model's predictions
    figures |= gap(session, config.distill, rewriting.targets)

    # 4. the cost of the whole job
    per_row = {"distill": rewriting.distill_seconds, "score": rewriting.score_seconds}
    seconds = {stage: total / len(sample) * len(rows) for stage, total in per_row.items()}
    seconds |= training_seconds(session, config, examples, rewriting.lines)
    figures["seconds"] = seconds
    figures["disk_mb"] = (
        disk_bytes(session, config, rewriting.bytes / len(sample) * len(rows)) / 1e6
    )
    figures["took"] = time.perf_counter() - started

    reasons = reasons_that_hold(figures)
    figures["go"] = not any(reason.stops for reason in reasons)
    figures["reasons"] = [f"{r.figure} {figures[r.figure]:.3f}: {r.why}" for r in reasons]
    print(report_text(figures, reasons, config.distill.verify))
    print(json.dumps(figures))
    return figures


# ---- the plain prompt


def plain_answers(session: Session, config: Config, sample: Sequence[Row]) -> list[Completion]:
    """Greedy answers to the plain prompts, in order; each at most as long as its rewrite may be."""
    chat = session.chat
    requests = []
    for row in sample:
        most = config.distill.limit(len(chat.response_ids(row.reference)))
        requests.append(Request(row.id, chat.prompt_ids(row.messages[:-1]), most))
    greedy = config.sampling.greedy(SamplerConfig.max_new_tokens)
    with ChatGenerator(session.model, chat, greedy).sampler() as sampler:
        by_id = {answer.id: answer for answer in sampler.run(requests)}
    return [by_id[row.id] for row in sample]


def figures_of_answers(sample: Sequence[Row], answers: Sequence[Completion]) -> dict[str, float]:
    """own_nll (nats per token), and the shares of answers that ended and that are garbled."""
    logprobs = [p for answer in answers for p in answer.logprobs]
    conversations = ["\n".join(m["content"] for m in row.messages) for row in sample]
    pairs = zip(answers, conversations, strict=True)
    return {
        "own_nll": -sum(logprobs) / max(1, len(logprobs)),
        "ended": _share(answer.finish == "stop" for answer in answers),
        "garbled": _share(why_garbled(answer.text, text) is not None for answer, text in pairs),
    }


# ---- shown the reference


@dataclass(frozen=True)
class Rewriting:
    """The distilled sample."""

    lines: list[Distilled]
    targets: list[Distilled]  # the lines that are trained on
    differ: float  # share of the targets that are not the reference
    distill_seconds: float
    score_seconds: float
    bytes: int  # of both files


def rewrite(session: Session, config: Config, sample: Rows) -> Rewriting:
    """Distil and score the sample as the job would, in a temporary directory."""
    model, chat = session.model, session.chat
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "distilled.jsonl"
        generator = ChatGenerator(model, chat, config.sampling)
        report = distill(generator, sample, file, config.distill, settings={})
        means = score(model, chat, report.lines, Path(directory) / "scores.jsonl", {})
        size = sum(f.stat().st_size for f in Path(directory).glob("*.jsonl"))
    return Rewriting(
        report.lines, report.targets, report.differ, report.seconds, means.seconds, size
    )


def figures_of_rewrites(
    session: Session,
    config: Config,
    sample: Sequence[Row],
    answers: Sequence[Completion],
    rewriting: Rewriting,
) -> dict[str, Any]:
    """Acceptance, scores beside the plain answers', copying, length and hedging of the rewrites."""
    lines = rewriting.targets
    figures: dict[str, Any] = {
        "status": dict(Counter(line.status for line in lines)),
        "differ": rewriting.differ,
        "accepted": _share(line.status in KEPT for line in lines),
    }
    if config.distill.verify != "none":
        verifier = get_verifier(config.distill.verify)
        plain = zip(sample, answers, strict=True)
        shown = zip(sample, lines, strict=True)
        figures["plain"] = _share(verifier(row, answer.text)[0] for row, answer in plain)
        figures["shown"] = _share(verifier(row, line.response)[0] for row, line in shown)
        figures["lift"] = figures["shown"] - figures["plain"]
    figures["copy"] = _mean([copied(x.response, x.reference) for x in lines if x.response])
    chat = session.chat
    lengths = [x.response_tokens / len(chat.response_ids(x.reference)) for x in lines]
    figures["length"] = statistics.median(lengths)
    hedges_plain = hedges_per_100_words(answer.text for answer in answers)
    hedges_shown = hedges_per_100_words(line.response for line in lines)
    figures |= {"hedges_plain": hedges_plain, "hedges_shown": hedges_shown}
    if hedges_plain >= FEW_HEDGES:
        figures["hedges_kept"] = hedges_shown / hedges_plain
    return figures


def copied(text: str, source: str) -> float:
    """Share of the n-grams of words in `text` that stand in `source` too.

    n is NGRAM, or less where one of the texts is shorter. Case and punctuation do not count.
    """
    words, source_words = (re.findall(r"\w+", part.lower()) for part in (text, source))
    n = min(NGRAM, len(words), max(1, len(source_words)))
    if n == 0:
        return 0.0
    known = set(_ngrams(source_words, n))
    return _share(ngram in known for ngram in _ngrams(words, n))


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def hedges_per_100_words(texts: Iterable[str]) -> float:
    """Hedging expressions per 100 words, all texts together."""
    joined = " ".join(texts)
    return 100 * len(HEDGES.findall(joined)) / max(1, len(joined.split()))


# ---- the gap


def gap(session: Session, config: DistillConfig, lines: Sequence[Distilled]) -> dict[str, float]:
    """The model shown the reference beside itself under the plain prompt, over sampled tokens.

    kl, reverse_kl and nll_gap (plain less shown) in nats per token, the end token included where
    it was sampled; nll_plain. A forced beginning does not count.
    """
    model, chat = session.model, session.chat
    template = TEMPLATES[config.template]
    # the forced beginning stands in the target, or only in the prompt that shows the reference
    in_target = config.rules.prefix_in_target
    forced = len(chat.prefix_ids(template.prefix)) if in_target else 0
    prefix = "" if in_target else template.prefix
    kl = reverse_kl = nll_plain = nll_shown = 0.0
    tokens = 0
    for line in lines:
        answer = list(line.response_ids)
        if line.finish == "stop":
            answer.append(chat.end_id)
        messages = prompt(chat, template, line.messages, line.reference)
        shown_prompt = chat.prompt_ids(messages, prefix)
        plain_prompt = chat.prompt_ids(line.messages)
        longest = max(len(shown_prompt), len(plain_prompt)) + len(answer)
        if len(answer) <= forced or longest > model.config.max_position:
            continue
        shown, plain = (
            hidden_states(model, [*ids, *answer], len(ids) + forced, None)  # (answer tokens, D)
            for ids in (shown_prompt, plain_prompt)
        )
        drift = compare(model, shown, plain, answer[forced:])
        kl += drift.kl
        reverse_kl += drift.reverse_kl
        nll_plain += drift.nll
        nll_shown += drift.seed_nll
        tokens += len(shown)
    count = max(1, tokens)
    return {
        "kl": kl / count,
        "reverse_kl": reverse_kl / count,
        "nll_plain": nll_plain / count,
        "nll_gap": nll_plain / count - nll_shown / count,
    }


# ---- the cost


def training_seconds(
    session: Session, config: Config, examples: Sequence[Example], lines: Sequence[Distilled]
) -> dict[str, float]:
    """Seconds of both trainings, from one forward and backward of a batch of each.

    examples    of the whole file, with its references
    """
    model, training, seconds = session.model, config.train, {}
    adapter = Lora.init(config.lora, model.config, model.device, model.dtype)
    sampled_tokens: dict[str, int] = {}
    for arm, target in ARM_TARGETS.items():
        of_arm = encode_rows(session, config, lines, target)
        sampled_tokens[arm] = _tokens(of_arm)
        batch = of_arm[: training.batch_rows]
        if arm == "sft":  # the first step compiles and fills caches: not timed
            step_gradients(model, adapter, batch[:1], 1, training.micro_tokens, "none")
        started = time.perf_counter()
        gradients = step_gradients(model, adapter, batch, 1, training.micro_tokens, "none")
        gradients.nll.sum().item()  # waits for the device
        tokens_per_second = _tokens(batch) / (time.perf_counter() - started)
        epoch_tokens = _tokens(examples) * sampled_tokens[arm] / sampled_tokens["sft"]
        epochs = training.epochs
        if training.max_steps:
            epochs = training.max_steps * training.batch_rows / len(examples)
        seconds[f"train {arm}"] = epoch_tokens * epochs / tokens_per_second
    return seconds


def disk_bytes(session: Session, config: Config, distilled: float) -> float:
    """Bytes on disk: `distilled` of the distilled files, and both run directories."""
    shapes = adapter_shapes(config.lora, session.model.config).values()
    adapter = 4 * sum(rows * columns for rows, columns in shapes)  # fp32
    # a checkpoint holds the adapter, AdamW's two moments and the parameters; one more than `keep`
    # is there while it is written
    run_directory = adapter * (1 + 4 * (config.train.keep + 1))
    return distilled + 2 * run_directory


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in examples)


# ---- helpers


def _first_turn(row: Row) -> Row:
    """A conversation up to the first answer that is trained on."""
    end = len(prompts_of(row)[0]) + 1
    return dataclasses.replace(row, messages=tuple(row.messages[:end]))


def _share(flags: Iterable[Any]) -> float:
    values = [bool(flag) for flag in flags]
    return _mean(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
