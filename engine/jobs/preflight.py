"""Preflight: will self-distillation do anything for this model on these rows? Looked at on a sample

    plain       the model answers the plain prompt, greedily: score, likelihood of its own answers
    shown       it rewrites the reference, as distillation would (same template, sampling, rules):
                score, acceptance, copying, length
    gap         over the tokens of the rewrites, the model shown the reference (p) beside itself
                under the plain prompt (q): KL(p || q) and -log q + log p, nats per token
    cost        seconds and bytes of the whole job, from what the sample took

GO, or the reasons against it: `REASONS` holds every threshold with why and from where. A sample
tells the great from the small, not 18 % from 22 %.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.distilled import KEPT, Distilled
from engine.data.encode import Example, prompts_of
from engine.data.rows import Row, Rows
from engine.distill.config import DistillConfig
from engine.distill.distill import can_be_asked, distill
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.distill.seed_likelihoods import score
from engine.distill.selection import garbled
from engine.jobs.sdft import as_published, encode_rows
from engine.measure.divergence import compare, hidden_states
from engine.report.collect import spaced
from engine.runtime.limits import check_numbers
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import Session
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.step import step_gradients
from engine.verify.verifiers import get_verifier
from model.lora import Lora, LoraConfig, adapter_shapes

GRAM = 4  # words of an n-gram; copying is the share of the rewrite's that stand in the reference
HEDGES = re.compile(
    r"\b(?:wait|hmm+|maybe|perhaps|alternatively|actually|probably|let me (?:check|think))\b", re.I
)


@dataclass(frozen=True)
class PreflightConfig:
    """The sample."""

    sample: int = 16  # rows to look at, spread over the file; the first answer of each

    def check(self) -> None:
        """ValueError for a sample that tells nothing."""
        if self.sample < 2:
            raise ValueError(f"sample {self.sample}: expected at least 2 rows")
        check_numbers(self)


@dataclass(frozen=True)
class Reason:
    """A limit on a measured figure."""

    figure: str
    low: float  # below this ...
    high: float  # ... or above this the reason holds
    stops: bool  # NO, or a mere warning
    why: str


NEVER = float("inf")
REASONS = (
    Reason("differ", 0.10, NEVER, True, "so few targets are the model's own words that SFT and "
           "SDFT are the same run (the paper's OpenFunctions: 10.7 %)"),
    Reason("differ", 0.20, NEVER, False, "under a fifth of the targets are the model's own words: "
           "expect little between SFT and SDFT"),
    Reason("kl", 0.02, NEVER, True, "showing the reference hardly changes what the model would "
           "say: it does not follow it (2601.19897 at 3B; its working teacher is at 0.68)"),
    Reason("copy", -NEVER, 0.90, True, "the rewrites are the references word for word: SDFT would "
           "be SFT"),
    Reason("copy", -NEVER, 0.60, False, "the rewrites copy most of the references (2602.11220: a "
           "rewrite should be in the model's own style)"),
    Reason("lift", 0.0, NEVER, True, "shown the answer the model does worse than without: its "
           "rewrites teach nothing (an in-context learner is needed, 2601.19897 3.2)"),
    Reason("own_nll", -NEVER, 1.5, True, "the model's own greedy answers are unlikely to itself: a "
           "broken load, a wrong chat format or a damaged file (sail-sg/sdft I#9: token soup)"),
    Reason("garbled", -NEVER, 0.25, True, "many greedy answers are no text (sail-sg/sdft I#9)"),
    Reason("ended", 0.5, NEVER, False, "most greedy answers do not end within the limit: a base "
           "model (sail-sg/sdft I#3), or --max-new-tokens is too low"),
    Reason("own_template", 0.5, NEVER, False, "the chat format is not the checkpoint's own: is it "
           "a base model? (sail-sg/sdft I#3, I#11)"),
    Reason("length", 0.5, NEVER, False, "rewrites are less than half as long as the references: "
           "what they leave out is not taught"),
    Reason("hedges_kept", 0.5, NEVER, False, "shown the reference the model stops doubting aloud, "
           "which can cost reasoning models much (2603.24472)"),
)  # fmt: skip


def preflight(
    session: Session,
    data: DataConfig,
    config: PreflightConfig,
    distilling: DistillConfig,
    sampling: SamplerConfig,
    encoding: EncodeConfig,
    training: TrainConfig,
    lora: LoraConfig,
) -> dict[str, Any]:
    """Look at a sample, print what was seen and GO or why not; the last line is JSON.

    Of a cascade only one guided try is looked at: more tries accept more, and take longer.
    """
    session.alone("preflight")
    distilling = dataclasses.replace(distilling, cascade="guided:1")
    for settings in (data, config, distilling, sampling, encoding, training, lora):
        settings.check()
    started = time.perf_counter()
    encoding = as_published(encoding, distilling)
    rows = data.load(check=can_be_asked(session.chat, distilling))
    whole = encode_rows(rows, session, data, encoding, "reference")  # too long a row stops here
    training.highest_rate(len(whole))
    sample = Rows([_first(row) for row in spaced(rows, config.sample)], rows.path, rows.sha256)
    found: dict[str, Any] = {"rows": len(rows), "sample": len(sample)}
    found["own_template"] = float(session.config.chat_format in (None, "own"))

    # 1. plain, greedily; each as long as its rewrite may be
    plain = _answers(session, sample, distilling, sampling)
    verifier = get_verifier(distilling.verify)
    judged = distilling.verify != "none"
    logprobs = [p for answer in plain for p in answer.logprobs]
    found["own_nll"] = -sum(logprobs) / max(1, len(logprobs))
    found["ended"] = _share(answer.finish == "stop" for answer in plain)
    asked = ["\n".join(m["content"] for m in row.messages) for row in sample]
    found["garbled"] = _share(
        bool(garbled(a.text, context)) for a, context in zip(plain, asked, strict=True)
    )

    # 2. shown the reference: what distillation and scoring will do
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "distilled.jsonl"
        report = distill(session.model, session.chat, sample, file, distilling, sampling,
                         settings={})  # fmt: skip
        means = score(session.model, session.chat, report.lines, Path(place) / "scores.jsonl", {})
        line_bytes = sum(f.stat().st_size for f in Path(place).glob("*.jsonl")) / len(sample)
    lines = report.targets
    found["status"] = dict(Counter(line.status for line in lines))
    found["differ"] = report.differ
    found["accepted"] = _share(line.status in KEPT for line in lines)
    if judged:
        found["plain"] = _share(verifier(r, a.text)[0] for r, a in zip(sample, plain, strict=True))
        found["shown"] = _share(
            verifier(row, line.response)[0] for row, line in zip(sample, lines, strict=True)
        )
        found["lift"] = found["shown"] - found["plain"]
    found["copy"] = _mean([copied(x.response, x.reference) for x in lines if x.response])
    lengths = [x.response_tokens / len(session.chat.response_ids(x.reference)) for x in lines]
    found["length"] = statistics.median(lengths)
    hedges = [_hedges(a.text for a in plain), _hedges(x.response for x in lines)]
    found["hedges_plain"], found["hedges_shown"] = hedges
    if hedges[0] >= 0.5:  # per 100 words: fewer are no habit
        found["hedges_kept"] = hedges[1] / hedges[0]

    # 3. how much being shown it changes
    found |= gap(session, distilling, lines)

    # 4. what the job would take
    cost = {"distill": report.seconds / len(sample) * len(rows)}
    cost["score"] = means.seconds / len(sample) * len(rows)
    cost |= _training(session, whole, report.lines, data, encoding, training, lora)
    found["seconds"] = cost
    shapes = adapter_shapes(lora, session.model.config).values()
    adapter = 4 * sum(rows * columns for rows, columns in shapes)  # bytes, fp32
    # a checkpoint holds the adapter, AdamW's two moments and the parameters; one more is written
    found["disk_mb"] = (line_bytes * len(rows) + 2 * adapter * (1 + 4 * (training.keep + 1))) / 1e6
    found["took"] = time.perf_counter() - started

    reasons = reasons_that_hold(found)
    found["go"] = not any(reason.stops for reason in reasons)
    found["reasons"] = [f"{r.figure} {found[r.figure]:.3f}: {r.why}" for r in reasons]
    print(text(found, reasons, distilling.verify))
    print(json.dumps(found))
    return found


def gap(
    session: Session, distilling: DistillConfig, lines: Sequence[Distilled]
) -> dict[str, float]:
    """The model shown the reference beside itself, over the tokens that it sampled.

    kl, reverse_kl and nll_gap (plain less shown) in nats per token, the end token included where
    it was sampled; nll_plain. A forced beginning does not count.
    """
    model, chat = session.model, session.chat
    template = TEMPLATES[distilling.template]
    kept = distilling.rules.prefix_in_target  # else it stands in the shown prompt alone
    forced = len(chat.prefix_ids(template.prefix)) if kept else 0
    sums, tokens = [0.0] * 4, 0
    for line in lines:
        answer = [*line.response_ids, *([chat.end_id] if line.finish == "stop" else [])]
        messages = prompt(chat, template, line.messages, line.reference)
        prompts = [chat.prompt_ids(messages, "" if kept else template.prefix)]
        prompts.append(chat.prompt_ids(line.messages))
        longest = max(map(len, prompts)) + len(answer)
        if len(answer) <= forced or longest > model.config.max_position:
            continue
        shown, plain = (
            hidden_states(model, [*ids, *answer], len(ids) + forced, None) for ids in prompts
        )
        d = compare(model, shown, plain, answer[forced:])
        sums = [a + b for a, b in zip(sums, (d.kl, d.reverse_kl, d.nll, d.seed_nll), strict=True)]
        tokens += len(shown)
    kl, reverse, plain_nll, shown_nll = (total / max(1, tokens) for total in sums)
    return {
        "kl": kl,
        "reverse_kl": reverse,
        "nll_plain": plain_nll,
        "nll_gap": plain_nll - shown_nll,
    }


def copied(text: str, source: str) -> float:
    """Share of the n-grams of words in `text` (n = GRAM, fewer in a shorter text) that stand in
    `source`; case and punctuation do not count."""
    words, there = (re.findall(r"\w+", x.lower()) for x in (text, source))
    n = min(GRAM, len(words), max(1, len(there)))
    grams, known = (
        [tuple(w[i : i + n]) for i in range(len(w) - n + 1)] if n else [] for w in (words, there)
    )
    return _share(gram in set(known) for gram in grams) if grams else 0.0


def _first(row: Row) -> Row:
    """A conversation up to the first answer that is trained on."""
    end = len(prompts_of(row)[0]) + 1
    return dataclasses.replace(row, messages=tuple(row.messages[:end]))


def _answers(
    session: Session, sample: Sequence[Row], distilling: DistillConfig, sampling: SamplerConfig
) -> list[Completion]:
    """Greedy answers to the plain prompts, in order."""
    chat = session.chat
    requests = [
        Request(
            row.id,
            chat.prompt_ids(row.messages[:-1]),
            distilling.limit(len(chat.response_ids(row.reference))),
        )
        for row in sample
    ]
    greedy = sampling.greedy(SamplerConfig.max_new_tokens)
    with Sampler(session.model, chat.tokenizer.decode, chat.end_ids, greedy) as sampler:
        done = {answer.id: answer for answer in sampler.run(requests)}
    return [done[row.id] for row in sample]


def _training(
    session: Session,
    whole: Sequence[Example],
    lines: Sequence[Distilled],
    data: DataConfig,
    encoding: EncodeConfig,
    training: TrainConfig,
    config: LoraConfig,
) -> dict[str, float]:
    """Seconds of both trainings: forward and backward of a batch each, by tokens. `whole` are the
    examples of the whole file, with its references."""
    model, seconds = session.model, {}
    tokens = sum(len(e.ids) for e in whole)
    adapter = Lora.init(config, model.config, model.device, model.dtype)
    sampled = {}
    for arm, target in (("sft", "reference"), ("sdft", "target")):
        mine = encode_rows(lines, session, data, encoding, target)
        sampled[arm] = sum(len(e.ids) for e in mine)
        batch = mine[: training.batch_rows]
        if arm == "sft":  # the first step also makes what later ones find
            step_gradients(model, adapter, batch[:1], 1, training.micro_tokens, "none")
        started = time.perf_counter()
        found = step_gradients(model, adapter, batch, 1, training.micro_tokens, "none")
        found.nll.sum().item()  # waits for the device
        rate = sum(len(e.ids) for e in batch) / (time.perf_counter() - started)
        epoch = tokens * sampled[arm] / sampled["sft"]
        passes = training.epochs
        if training.max_steps:
            passes = training.max_steps * training.batch_rows / len(whole)
        seconds[f"train {arm}"] = epoch * passes / rate
    return seconds


def reasons_that_hold(found: dict[str, Any]) -> list[Reason]:
    """Of REASONS; a mere warning is left out where the same figure is a reason to stop."""
    held = [r for r in REASONS if r.figure in found and not r.low <= found[r.figure] <= r.high]
    stopping = {reason.figure for reason in held if reason.stops}
    return [reason for reason in held if reason.stops or reason.figure not in stopping]


def text(found: dict[str, Any], reasons: Sequence[Reason], verify: str) -> str:
    """What was seen, for a person."""
    f = found
    status = ", ".join(f"{k} {n}" for k, n in sorted(f["status"].items(), key=lambda x: -x[1]))
    lines = [
        f"preflight on {f['sample']} of {f['rows']} rows, {f['took']:.0f} s",
        f"  rewrites: {status}; {f['differ']:.0%} of the targets would differ from the reference",
        f"  copied from the reference: {f['copy']:.0%} of {GRAM}-grams; length {f['length']:.2f} "
        "of the reference's (median, tokens)",
        f"  being shown the reference: KL {f['kl']:.3f} (back {f['reverse_kl']:.3f}), NLL gap "
        f"{f['nll_gap']:.3f} nats per token; rewrites cost {f['nll_plain']:.3f} under the plain "
        "prompt",
        f"  own greedy answers: NLL {f['own_nll']:.3f} per token, {f['ended']:.0%} end, "
        f"{f['garbled']:.0%} garbled; hedging words per 100: {f['hedges_plain']:.2f} plain, "
        f"{f['hedges_shown']:.2f} shown",
    ]
    if "lift" in f:
        right = f"{f['plain']:.0%} plain, {f['shown']:.0%} shown the reference"
        lines.insert(1, f"  right ({verify}): {right}")
    cost = ", ".join(f"{k} {_duration(s)}" for k, s in f["seconds"].items())
    lines.append(f"  the whole job: {cost}; {f['disk_mb']:.0f} MB on disk")
    for reason in reasons:
        lines.append(
            f"  {'NO' if reason.stops else 'mind'}: {reason.figure} {f[reason.figure]:.3f}: "
            + reason.why
        )
    stops = [reason.figure for reason in reasons if reason.stops]
    lines.append("GO" if f["go"] else f"NO-GO: {', '.join(stops)}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _hedges(texts: Any) -> float:
    """Hedging expressions per 100 words."""
    every = " ".join(texts)
    return 100 * len(HEDGES.findall(every)) / max(1, len(every.split()))


def _share(flags: Any) -> float:
    values = [bool(flag) for flag in flags]
    return sum(values) / max(1, len(values))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
