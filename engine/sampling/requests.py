"""What is asked of the sampler, how, and what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.runtime.limits import check_numbers
from kernels.sampling.sample_rows import SampleRows

# what changes no text
SPEED_ONLY = ("rows", "prefill_tokens", "kv_memory", "draft", "steps", "graphs")


@dataclass(frozen=True)
class SamplerConfig:
    """How tokens are chosen and how many rows run together."""

    rows: int = 0  # sequences decoded together: more is faster and takes more memory; does not
    #   change texts in fp32 on a CPU or with --batch-invariant [default: auto (64; 32 on a CPU)]
    temperature: float = 0.0  # 0 takes the most likely token (greedy); higher is more random
    top_k: int = 0  # sample from the k most likely tokens only; 0 keeps all
    top_p: float = 1.0  # sample from the most likely tokens of this total probability; 1 keeps all
    min_p: float = 0.0  # drop tokens below this share of the largest probability; 0 keeps all
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred before less likely
    max_new_tokens: int = 512  # most new tokens in an answer
    seed: int = 0  # random seed; with row id, sample and position it names each random number
    stop: tuple[str, ...] = ()  # text that ends an answer and is cut off; may be repeated
    #   [default: none]
    ignore_eos: bool = False  # continue past end tokens up to --max-new-tokens (for benchmarks)
    prefill_tokens: int = 0  # most prompt tokens in one forward pass; longer prompts are split
    #   [default: auto (1024; 512 on a CPU)]
    page_size: int = 64  # tokens per block of the key/value cache; attention splits a context there
    kv_memory: float = 0.0  # GB for keys and values; sequences that find no room wait
    #   [default: auto (as much as --rows needs; on a GPU at most what is free)]
    draft: str = "auto"  # auto, off or always: guess tokens from the reference and check several in
    #   one forward pass (speculative decoding); auto does so where it is faster
    invariant: bool = False  # make texts independent of --rows, order and drafts on a GPU too
    #   (batch-invariant); slower
    steps: int = 0  # decode steps per synchronisation with the host
    #   [default: auto (8 with CUDA graphs; else 1)]
    graphs: bool = True  # on a GPU, run decode steps as CUDA graphs, and wait less for the host

    def settings(self) -> dict[str, Any]:
        """What names a run of it: not what changes its speed only."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in SPEED_ONLY}

    def on(self, kind: str) -> SamplerConfig:
        """This for a kind of device, "cpu" or "cuda": nothing that is left to it is 0.

        On two cores 32 rows are within a few percent of 64, and take a tenth of a gigabyte less.
        """
        rows, tokens = (32, 512) if kind == "cpu" else (64, 1024)
        settled = {"rows": self.rows or rows, "prefill_tokens": self.prefill_tokens or tokens}
        return dataclasses.replace(self, **settled)

    def keys(
        self,
        positions: Tensor,  # (n,) int64 of the tokens that are drawn
        samples: Tensor,  # (n,) int64
        row_keys: Tensor,  # (n,) int64
        temperature: float,  # of all of these rows
        history: Tensor | None,  # (n, L) int64, where repetition is penalised
    ) -> SampleRows:
        """How these rows are drawn, and the names of their random numbers."""
        return SampleRows(
            positions=positions,
            samples=samples,
            row_keys=row_keys,
            seed=self.seed,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            history=history,
        )

    def greedy(self, max_new_tokens: int) -> SamplerConfig:
        """For measuring: as many rows and the same promise, nothing left to chance."""
        kept = {"invariant": self.invariant, "graphs": self.graphs}
        return SamplerConfig(self.rows, max_new_tokens=max_new_tokens, **kept)

    def check(self) -> None:
        """ValueError for settings that cannot sample."""
        problems = [
            (self.rows < 0, f"rows {self.rows}: at least 1 is wanted, or 0 for the default"),
            (self.temperature < 0, f"temperature {self.temperature}: 0 (greedy) or more is wanted"),
            (self.top_k < 0, f"top_k {self.top_k}: 0 (all) or more is wanted"),
            (not 0 < self.top_p <= 1, f"top_p {self.top_p}: 0 < top_p <= 1 is wanted"),
            (not 0 <= self.min_p <= 1, f"min_p {self.min_p}: 0 to 1 is wanted"),
            (
                not 0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty {self.repetition_penalty}: above 0 is wanted, 1 for none",
            ),
            (
                self.max_new_tokens < 1,
                f"max_new_tokens {self.max_new_tokens}: at least 1 is wanted",
            ),
            ("" in self.stop, "an empty stop string would end every row at once"),
            (
                self.prefill_tokens < 0,
                f"prefill_tokens {self.prefill_tokens}: at least 1 is wanted, or 0 for the default",
            ),
            (self.page_size < 1, f"page_size {self.page_size}: at least 1 is wanted"),
            (
                self.kv_memory < 0,
                f"kv_memory {self.kv_memory}: GB are wanted, 0 for what is needed",
            ),
            (
                self.draft not in ("auto", "off", "always"),
                f"draft {self.draft!r}: auto, off or always is wanted",
            ),
            (self.steps < 0, f"steps {self.steps}: 0 (as pays) or more is wanted"),
        ]
        for wrong, message in problems:
            if wrong:
                raise ValueError(message)
        check_numbers(
            self,
            rows=(0, 10**6),
            temperature=(0, 10**6),
            repetition_penalty=(1e-6, 10**6),
            page_size=(1, 2**16),
            kv_memory=(0, 10**6),
            steps=(0, 10**4),
        )
        if 0 < self.temperature < 1e-6:
            raise ValueError(
                f"temperature {self.temperature}: 0 (greedy) or at least 1e-6 is wanted"
            )


@dataclass(frozen=True)
class Request:
    """One text to write."""

    id: str  # stable: the row's random numbers are named by it
    prompt: Sequence[int]  # token ids
    max_new: int | None = None  # new tokens at most; None: the sampler's default
    sample: int = 0  # which of several samples of this row
    seed: int | None = None  # of this row alone, instead of the sampler's
    expected: int | None = None  # new tokens it will likely have: the longest begin first
    draft: Sequence[int] = ()  # token ids it may copy from: its reference
    temperature: float | None = None  # of this row alone, instead of the sampler's


@dataclass(frozen=True)
class Completion:
    """What was written for a request."""

    id: str
    sample: int
    ids: list[int]  # the sampled tokens, without the end token
    text: str  # decoded; with a stop string, what stands before it
    finish: str  # stop | stop_string | length | prompt_too_long
    logprobs: list[float]  # of each of `ids` under the model's plain distribution
    prompt_tokens: int


@dataclass
class SamplerStats:
    """What a run did, for the summary."""

    prompt_tokens: int = 0  # of prompts
    shared_tokens: int = 0  # of these, copied and not computed
    new_tokens: int = 0
    steps: int = 0  # forwards that decoded
    row_steps: int = 0  # rows in them
    drafted: int = 0  # tokens guessed
    held: int = 0  # guesses that were right
    put_back: int = 0  # rows that began again for want of memory
    cache_bytes: int = 0  # of the pages for keys and values
    fitting: int = 0  # rows for which these suffice even at their longest
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0  # without capturing
    captured: int = 0  # steps captured as CUDA graphs, one per number of rows and pages
    capture_seconds: float = 0.0
    replayed: int = 0  # of `steps`
    not_captured: str = ""  # why, where that was asked for and cannot be

    def text(self) -> str:
        """Tokens per step and acceptance, what was shared, what was put back."""
        text = f"{1 + self.held / max(1, self.row_steps):.2f} tokens per row and step"
        if self.drafted:
            share = self.held / self.drafted
            text += f", {self.drafted} guessed from references, {share:.0%} right"
        text += f"; {self.shared_tokens} of {self.prompt_tokens} prompt tokens shared"
        if self.fitting:
            text += f"; {self.cache_bytes / 1e9:.2f} GB for keys and values fit {self.fitting} rows"
        if self.put_back:
            text += f"; memory was short: {self.put_back} rows were put back and begun again"
        if self.captured:
            text += f"; {self.replayed} of {self.steps} decode steps replayed, of {self.captured} "
            text += f"graphs captured in {self.capture_seconds:.1f} s"
        if self.not_captured:
            text += f"; decode steps were not captured as CUDA graphs: {self.not_captured}"
        return text
