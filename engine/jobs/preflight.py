"""Preflight: measures on a sample whether self-distillation changes anything for model and data

    plain       the model answers the plain prompt, greedily: score, likelihood of its own answers
    shown       the model rewrites the reference, as distillation would (same template, sampling,
                rules): score, acceptance, copying, length
    gap         two predictions of the tokens of the rewrites: the model is shown the reference (p),
                or has the plain prompt only (q): KL(p || q) and log p - log q, nats per token
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

import torch

from engine.data.distilled import KEPT, Distilled
from engine.data.encode import Example, prompts_of, sizes
from engine.data.row_store import StoredRows
from engine.data.rows import Row, Rows
from engine.data.subset import evenly_spaced
from engine.distill.config import DistillConfig
from engine.distill.distill import can_be_asked, distill
from engine.distill.rewrite_prompts import prompt
from engine.distill.seed_likelihoods import score
from engine.distill.selection import why_garbled
from engine.evaluate.arms import ARM_TARGETS
from engine.jobs.job_config import JobConfig
from engine.jobs.preflight_reasons import NGRAM, reasons_that_hold, report_text
from engine.jobs.stages import encode_rows
from engine.measure.divergence import compare, hidden_states
from engine.runtime.limits import check_numbers
from engine.runtime.short_memory import attempt
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import Session
from engine.train.step import Gradients, step_gradients
from engine.train.train import FrozenModel, with_micro_tokens
from engine.verify.tool_calls import verdict
from engine.verify.verifiers import get_verifier
from model.llama import Llama
from model.lora import Lora, adapter_shapes
from model.tape import POLICIES

HEDGES = re.compile(
    r"\b(?:wait|hmm+|maybe|perhaps|alternatively|actually|probably|let me (?:check|think))\b", re.I
)
FEW_HEDGES = 0.5  # per 100 words; a model that hedges less has no hedging to lose
WORD = re.compile(r"\w+")


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

    Only one guided try of a cascade is measured: more tries accept more, and take longer. Returns
    the figures of the line of JSON.
    """
    session.require_one_process("preflight")
    one_try = dataclasses.replace(config.distill, cascade="guided:1")
    config = dataclasses.replace(config, distill=one_try)
    config.check()
    started = time.perf_counter()
    config = config.as_published()
    rows = config.data.stored(check=can_be_asked(session.chat, config.distill))
    examples = encode_rows(session, config, rows, "reference")  # ValueError for a row too long
    config.train.highest_rate(len(examples))  # ValueError where the rate stays 0
    sample = sample_of(rows, config.job.sample)
    own_template = session.config.chat_format in (None, "own")
    figures: dict[str, Any] = {
        "rows": len(rows),
        "sample": len(sample),
        "own_template": float(own_template),
    }

    # 1. plain prompts, answered greedily
    answers = plain_answers(session, config, sample)
    figures |= figures_of_answers(sample, answers)

    # 2. shown the reference: the rewrites that distillation would make, scored
    rewriting = rewrite(session, config, sample)
    figures |= figures_of_rewrites(session, config, sample, answers, rewriting)

    # 3. how much the shown reference changes the model's predictions
    figures |= gap(session, config.distill, rewriting.targets)

    # 4. the cost of the whole job
    figures["seconds"] = {
        "distill": rewriting.distill_seconds / len(sample) * len(rows),
        "score": rewriting.score_seconds / len(sample) * len(rows),
        **training_seconds(session, config, examples, rewriting.lines),
    }
    distilled_bytes = rewriting.bytes / len(sample) * len(rows)
    figures["disk_mb"] = disk_bytes(session, config, distilled_bytes) / 1e6
    figures["took"] = time.perf_counter() - started

    # 5. the verdict
    reasons = reasons_that_hold(figures)
    figures["go"] = not any(reason.stops for reason in reasons)
    figures["reasons"] = [reason.text(figures) for reason in reasons]
    print(report_text(figures, reasons, config.distill.verify))
    print(json.dumps(figures))
    return figures


def sample_of(rows: StoredRows, count: int) -> Rows:
    """`count` rows spread over the file; of a conversation the part up to its first answer."""
    sample = []
    for row in evenly_spaced(rows, count):
        first_prompt = prompts_of(row)[0]
        messages = row.messages[: len(first_prompt) + 1]  # with the answer that is trained on
        sample.append(dataclasses.replace(row, messages=tuple(messages)))
    return Rows(sample, rows.path, rows.sha256)


# ---- the plain prompt


def plain_answers(session: Session, config: Config, sample: Sequence[Row]) -> list[Completion]:
    """Greedy answers to the plain prompts, in order; each at most as long as its rewrite may be."""
    chat = session.chat
    requests = []
    for row in sample:
        reference_tokens = len(chat.response_ids(row.reference))
        max_new = config.distill.limit(reference_tokens)
        prompt_ids = chat.prompt_ids(row.messages[:-1])
        requests.append(Request(row.id, prompt_ids, max_new))
    greedy = config.sampling.greedy(SamplerConfig.max_new_tokens)
    with ChatGenerator(session.model, chat, greedy).sampler() as sampler:
        by_id = {answer.id: answer for answer in sampler.run(requests)}
    return [by_id[row.id] for row in sample]


def figures_of_answers(sample: Sequence[Row], answers: Sequence[Completion]) -> dict[str, float]:
    """own_nll (nats per token), and the shares of answers that ended and that are garbled."""
    logprobs: list[float] = []
    ended, unreadable = [], []
    for row, answer in zip(sample, answers, strict=True):
        conversation = "\n".join(message["content"] for message in row.messages)
        logprobs += answer.logprobs
        ended.append(answer.finish == "stop")
        unreadable.append(why_garbled(answer.text, conversation) is not None)
    return {
        "own_nll": -sum(logprobs) / max(1, len(logprobs)),
        "ended": _mean(ended),
        "garbled": _mean(unreadable),
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
    bytes: int  # size of distilled.jsonl and of its scores


def rewrite(session: Session, config: Config, sample: Rows) -> Rewriting:
    """Distil and score the sample as the job would, in a temporary directory."""
    model, chat = session.model, session.chat
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "distilled.jsonl"
        generator = ChatGenerator(model, chat, config.sampling)
        report = distill(generator, sample, file, config.distill, settings={})
        means = score(model, chat, report.lines, Path(directory) / "scores.jsonl", {})
        size = sum(written.stat().st_size for written in Path(directory).glob("*.jsonl"))
    return Rewriting(
        lines=report.lines,
        targets=report.targets,
        differ=report.differ,
        distill_seconds=report.seconds,
        score_seconds=means.seconds,
        bytes=size,
    )


def figures_of_rewrites(
    session: Session,
    config: Config,
    sample: Sequence[Row],
    answers: Sequence[Completion],
    rewriting: Rewriting,
) -> dict[str, Any]:
    """Acceptance and scores of the rewrites beside the plain answers; copying, length, hedging.

    plain, shown and lift (shown - plain) only with a verifier; hedges_kept only where the plain
    answers hedge.
    """
    lines = rewriting.targets
    figures: dict[str, Any] = {
        "status": dict(Counter(line.status for line in lines)),
        "differ": rewriting.differ,
        "accepted": _mean([line.status in KEPT for line in lines]),
    }
    if config.distill.verify != "none":
        plain = share_right(config, sample, [answer.text for answer in answers])
        shown = share_right(config, sample, [line.response for line in lines])
        figures |= {"plain": plain, "shown": shown, "lift": shown - plain}

    copied_shares = [copied(line.response, line.reference) for line in lines if line.response]
    figures["copy"] = _mean(copied_shares)
    lengths = []
    for line in lines:
        reference_tokens = len(session.chat.response_ids(line.reference))
        lengths.append(line.response_tokens / reference_tokens)
    figures["length"] = statistics.median(lengths)

    hedges_plain = hedges_per_100_words(answer.text for answer in answers)
    hedges_shown = hedges_per_100_words(line.response for line in lines)
    figures |= {"hedges_plain": hedges_plain, "hedges_shown": hedges_shown}
    if hedges_plain >= FEW_HEDGES:
        figures["hedges_kept"] = hedges_shown / hedges_plain
    return figures


def share_right(config: Config, sample: Sequence[Row], texts: Sequence[str]) -> float:
    """Share of the texts, one a row, that pass --verify."""
    verifier = get_verifier(config.distill.verify)
    verdicts = []
    for row, text in zip(sample, texts, strict=True):
        ok, _ = verdict(verifier, row, text)
        verdicts.append(bool(ok))
    return _mean(verdicts)


def copied(text: str, source: str) -> float:
    """Share of the n-grams of words in `text` that occur in `source` too.

    n is NGRAM, or less where one of the texts is shorter. Case and punctuation do not count.
    """
    words = WORD.findall(text.lower())
    source_words = WORD.findall(source.lower())
    n = min(NGRAM, len(words), max(1, len(source_words)))
    if n == 0:
        return 0.0
    in_source = set(_ngrams(source_words, n))
    return _mean([ngram in in_source for ngram in _ngrams(words, n)])


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    starts = range(len(words) - n + 1)
    return [tuple(words[start : start + n]) for start in starts]


def hedges_per_100_words(texts: Iterable[str]) -> float:
    """Hedging expressions per 100 words, all texts together."""
    joined = " ".join(texts)
    hedges = len(HEDGES.findall(joined))
    words = len(joined.split())
    return 100 * hedges / max(1, words)


# ---- the gap


def gap(session: Session, config: DistillConfig, lines: Sequence[Distilled]) -> dict[str, float]:
    """How much the predictions of the sampled tokens depend on the shown reference.

    p: the model is shown the reference; q: the same model has the plain prompt only.

        kl, reverse_kl    KL(p || q), KL(q || p)
        nll_plain         -log q
        nll_gap           log p - log q

    All in nats per token, the end token included where it was sampled. A forced beginning does not
    count.
    """
    model, chat = session.model, session.chat
    template = config.shown_template
    # the forced beginning is part of the target, or only of the prompt that shows the reference
    if config.rules.prefix_in_target:
        prefix = ""
        forced = len(chat.prefix_ids(template.prefix))  # leading tokens that do not count
    else:
        prefix = template.prefix
        forced = 0

    kl = 0.0
    reverse_kl = 0.0
    nll_plain = 0.0
    nll_shown = 0.0
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
        start_shown = len(shown_prompt) + forced
        start_plain = len(plain_prompt) + forced
        shown = hidden_states(model, [*shown_prompt, *answer], start_shown, None)  # (counted, D)
        plain = hidden_states(model, [*plain_prompt, *answer], start_plain, None)  # (counted, D)
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
    """Seconds of both trainings, from one timed forward and backward pass of a batch of each.

    examples    of the whole file, with its references
    lines       the distilled sample

    The targets of the whole file are taken to be longer or shorter than its references as those of
    the sample are.
    """
    model = session.model
    training = with_micro_tokens(config.train, FrozenModel.of(session), examples, config.lora)
    adapter = Lora.init(config.lora, model.config, model.device, model.dtype)
    epochs = training.epochs
    if training.max_steps:
        epochs = training.max_steps * training.batch_rows / len(examples)
    sample_tokens: dict[str, int] = {}  # by arm
    seconds: dict[str, float] = {}
    for arm, target in ARM_TARGETS.items():
        sample = encode_rows(session, config, lines, target)
        sample_tokens[arm] = _tokens(sample)
        batch = sample[: training.batch_rows]
        if arm == "sft":  # the first step compiles and fills caches: not timed
            _gradients(model, adapter, batch[:1], training.micro_tokens)
        started = time.perf_counter()
        gradients = _gradients(model, adapter, batch, training.micro_tokens)
        gradients.nll.sum().item()  # waits for the device
        tokens_per_second = _tokens(batch) / (time.perf_counter() - started)
        epoch_tokens = _tokens(examples) * sample_tokens[arm] / sample_tokens["sft"]
        seconds[f"train {arm}"] = epoch_tokens * epochs / tokens_per_second
    return seconds


def _gradients(
    model: Llama, adapter: Lora, batch: Sequence[Example], micro_tokens: int
) -> Gradients:
    """Those of a step, with the least recomputation that memory allows."""
    for policy in POLICIES:
        gradients, failure = attempt(
            model.device, step_gradients, model, adapter, batch, 1, micro_tokens, policy
        )
        if failure is None:
            return gradients
    raise torch.OutOfMemoryError(failure)


def disk_bytes(session: Session, config: Config, distilled_bytes: float) -> float:
    """Bytes on disk: the distilled files, and the two run directories."""
    shapes = adapter_shapes(config.lora, session.model.config).values()
    adapter = 4 * sum(rows * columns for rows, columns in shapes)  # fp32
    # the adapter, AdamW's two moments and the parameters
    checkpoint = 4 * adapter
    # a new checkpoint is written before the oldest one of `keep` is deleted
    run_directory = adapter + checkpoint * (config.train.keep + 1)
    return distilled_bytes + 2 * run_directory


def _tokens(examples: Sequence[Example]) -> int:
    return sum(size.tokens for size in sizes(examples))


def _mean(values: Sequence[float]) -> float:
    """The mean of numbers or verdicts, 0 for none."""
    return sum(values) / max(1, len(values))
