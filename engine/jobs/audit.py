"""The audit: runs one real piece of work under a tracer and shows every function of ours that ran

    audit_job        open the model, trace, write audit.html and audit.txt, print the counts
    trace_step       one optimizer step: `step_gradients` to `step_update` (engine/train/step.py)
    trace_distill    one row through `distill` (engine/distill/distill.py)
    trace_decode     one decode step of a sampler with four sequences (engine/sampling/sampler.py)

Opening the model and encoding the rows is not traced.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from engine.data.config import DataConfig
from engine.data.rows import Row
from engine.distill.config import DistillConfig
from engine.distill.distill import distill
from engine.jobs.audit_check import ALLOWED, violations
from engine.jobs.audit_model import write_tiny_llama
from engine.jobs.audit_page import Counts, count_table, render_page, render_text, text_table
from engine.jobs.audit_records import Trace
from engine.jobs.audit_trace import Tracer
from engine.runtime.files import write_text
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import ModelConfig, Session
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.examples import encode_examples
from engine.train.optim import Optimizer
from engine.train.step import step_gradients, step_update
from kernels.launch.triton_launch import INTERPRETED
from model.llama import Llama
from model.lora import Lora, LoraConfig

EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"
# prompts and references of the rows that are worked on
ROWS = (
    ("Name the colour of the sky.", "Blue."),
    ("How much is 12 and 34?", "12 + 34 = 46. The answer is 46."),
    ("Write one word that rhymes with cat.", "Hat."),
    ("What does a tokenizer do?", "It cuts a text into pieces and gives every piece a number."),
)
MICRO_TOKENS = 128  # few, so that a step has several micro-batches
NEW_TOKENS = "24"  # most tokens of the rewrite


@dataclass(frozen=True)
class AuditConfig:
    """The work that is audited."""

    what: str = "step"  # the work to trace: step (one optimizer step), distill (one distilled row)
    #   or decode (one decode step)
    tiny: bool = False  # use a tiny random Llama, made in --out, instead of the model in models/

    def check(self) -> None:
        """ValueError for unknown work."""
        if self.what not in ALLOWED:
            raise ValueError(f"what {self.what!r}: expected one of {', '.join(ALLOWED)}")


def restart_interpreted(ops: str, device: str) -> None:
    """Restart this script with TRITON_INTERPRET=1 for --ops triton without a GPU.

    Triton reads that variable when it is imported.
    """
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if ops != "triton" or not on_cpu or INTERPRETED:
        return
    print("triton: no GPU, so this starts again with TRITON_INTERPRET=1 (triton's interpreter)")
    sys.stdout.flush()
    command = [sys.executable, *sys.argv]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    os.execve(sys.executable, command, environment)


def audit_job(config: AuditConfig, model: ModelConfig, out: Path) -> list[str]:
    """Trace the work and write audit.html and audit.txt into `out`; returns the violations.

    model.model may be None: the embedded model where models/ has it (not for interpreted kernels,
    which are slow), else a tiny random Llama that is made in `out`.
    """
    config.check()
    out.mkdir(parents=True, exist_ok=True)
    session = Session.open(with_a_model(config, model, out))
    session.require_one_process("an audit")
    work = WORK[config.what]
    trace = work.trace(session)
    return write_audit(work.title, config.what, session, trace, out)


def with_a_model(config: AuditConfig, model: ModelConfig, out: Path) -> ModelConfig:
    """The settings with a model directory: the named one, the embedded one, or one made in `out`.

    ValueError where a model is named and --tiny is given too.
    """
    if model.model is not None:
        if config.tiny:
            raise ValueError(
                f"--tiny makes a model, and --model {model.model} names one; give only one of them"
            )
        return model
    interpreted = model.ops == "triton" and INTERPRETED
    if EMBEDDED.is_dir() and not config.tiny and not interpreted:
        return dataclasses.replace(model, model=str(EMBEDDED))
    path = write_tiny_llama(out / "tiny-llama")
    chat_format = model.chat_format or "alpaca"  # it has no template of its own
    return dataclasses.replace(model, model=str(path), chat_format=chat_format)


def write_audit(title: str, what: str, session: Session, trace: Trace, out: Path) -> list[str]:
    """Write both files, print counts and violations; returns the violations."""
    facts = session.facts()
    about = (
        f"{facts['path']} ({facts['parameters']:,} parameters, {facts['dtype']} on "
        f"{facts['device']}), operations: {facts['ops']}. Every function of this repository that "
        "ran, once, in the order of the first calls."
    )
    allowed = ALLOWED[what]
    found = violations(trace, render_page(title, about, trace, []), allowed)
    verdict = found
    if not found:
        packages = ", ".join(sorted(allowed))
        verdict = [
            f"no autograd, no unpickling, no package beside {packages} and the standard library, "
            "and no function that ran and is not shown"
        ]
    write_text(out / "audit.html", render_page(title, about, trace, verdict))
    write_text(out / "audit.txt", render_text(title, about, trace, verdict))

    print(text_table(count_table(trace)))
    counts = Counts.of(list(trace.records.values()))
    print(
        f"{title}, operations {facts['ops']}: {counts.functions:,} functions, "
        f"{counts.lines_run:,} of their {counts.lines_of_functions:,} code lines ran, in files of "
        f"{counts.lines_of_files:,}"
    )
    for line in verdict:
        print(f"VIOLATION: {line}" if found else line)
    print(f"written: {out / 'audit.html'}, {out / 'audit.txt'}")
    return found


# ---- the work


def tracer_for(model: Llama) -> Tracer:
    """A tracer of work on this model."""
    return Tracer(uses_c="native" in model.ops.name)


def rows() -> list[Row]:
    """ROWS as rows of data."""
    made = []
    for number, (prompt, answer) in enumerate(ROWS):
        messages = (
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        )
        made.append(Row(f"row-{number}", messages))
    return made


def trace_step(session: Session) -> Trace:
    """One optimizer step over four rows: LoRA on all modules, several micro-batches, clipping."""
    model, config = session.model, TrainConfig()
    encoding = EncodeConfig(target="reference")
    examples = encode_examples(rows(), session, DataConfig(data="rows of the audit"), encoding)
    lora = Lora.init(LoraConfig(modules="all"), model.config, model.device, model.dtype)
    optimizer = Optimizer.fresh(lora, config.weight_decay)
    with tracer_for(session.model) as tracer:
        gradients = step_gradients(model, lora, examples, 1, MICRO_TOKENS, "none")
        step_update(model, lora, optimizer, gradients, config.lr, 1.0)
    return tracer.trace


def trace_distill(session: Session) -> Trace:
    """One row: prompt, sampling, selection, its line in the file."""
    config = DistillConfig(max_new_tokens=NEW_TOKENS)
    one_row = rows()[1:2]
    generator = ChatGenerator(session.model, session.chat, SamplerConfig())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "distilled.jsonl"
        with tracer_for(session.model) as tracer:
            distill(generator, one_row, out, config, settings={"audit": "one row"})
    return tracer.trace


class _DecodedUnderTrace(Sampler):
    """A sampler whose first decode step is traced."""

    trace: Trace | None = None

    def _decode(self) -> None:
        if self.trace is not None:
            super()._decode()
            return
        with tracer_for(self.owner) as tracer:
            super()._decode()
        self.trace = tracer.trace


def trace_decode(session: Session) -> Trace:
    """One decode step of four sequences, after their prefill."""
    requests = []
    for row in rows():
        prompt_ids = session.chat.prompt_ids(row.messages[:1])
        requests.append(Request(row.id, prompt_ids))
    config = SamplerConfig(max_new_tokens=2, ignore_eos=True, draft="off", graphs=False)
    tokenizer = session.chat.tokenizer
    with _DecodedUnderTrace(session.model, tokenizer.decode, (), config) as sampler:
        for _ in sampler.run(requests):
            pass
    assert sampler.trace is not None, "no sequence was decoded"
    return sampler.trace


class Work(NamedTuple):
    """Work that can be audited: the title of its page, and the function that traces it."""

    title: str
    trace: Callable[[Session], Trace]


WORK = {
    "step": Work("One optimizer step", trace_step),
    "distill": Work("One distilled row", trace_distill),
    "decode": Work("One decode step", trace_decode),
}
