"""Settings, requests, completions and statistics of the sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.runtime.limits import check_numbers
from kernels.sampling.sample_rows import SampleRows

# settings that change speed and memory, never a text
SPEED_ONLY = ("rows", "prefill_tokens", "kv_memory", "draft", "steps", "graphs", "overlap")


@dataclass(frozen=True)
class SamplerConfig:
    """How tokens are chosen and how many sequences are decoded together."""

    rows: int = 0  # sequences decoded together: more is faster and takes more memory; does not
    #   change texts in fp32 on a CPU or with --batch-invariant
    #   [default: auto (as many as fit a GPU's memory, at most 256; 32 on a CPU)]
    temperature: float = 0.0  # 0 takes the most likely token (greedy); higher is more random
    top_k: int = 0  # sample from the k most likely tokens only; 0 keeps all
    top_p: float = 1.0  # sample from the most likely tokens of this total probability; 1 keeps all
    min_p: float = 0.0  # drop tokens below this share of the largest probability; 0 keeps all
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred before less likely
    max_new_tokens: int = 512  # most new tokens in an answer
    seed: int = 0  # random seed; a random number depends only on it, the row's id, the number of
    #   the sample and the position in the answer
    stop: tuple[str, ...] = ()  # text that ends an answer and is cut off; may be repeated
    #   [default: none]
    ignore_eos: bool = False  # continue past end tokens up to --max-new-tokens (for benchmarks)
    prefill_tokens: int = 0  # most prompt tokens in one forward pass; longer prompts are split
    #   [default: auto (4096; 512 on a CPU)]
    page_size: int = 64  # tokens per block of the key/value cache; attention splits long contexts
    #   at the ends of blocks
    kv_memory: float = 0.0  # GB for the key/value cache; sequences that do not fit in it wait
    #   [default: auto (as much as --rows needs; on a GPU at most what is free)]
    draft: str = "auto"  # auto, off or always: guess tokens from the reference and check several in
    #   one forward pass (speculative decoding); auto does so where it is faster
    invariant: bool = False  # make texts independent of --rows, order and drafts on a GPU too
    #   (batch-invariant); slower
    steps: int = 0  # decode steps that the GPU runs before the CPU reads their tokens
    #   [default: auto (8 with CUDA graphs; else 1)]
    graphs: bool = True  # on a GPU, replay decode steps as CUDA graphs, so that they wait less for
    #   the CPU
    overlap: bool = True  # with CUDA graphs, launch the next decode steps before the CPU reads the
    #   tokens of the last ones, so that the GPU does not wait for the CPU

    def settings(self) -> dict[str, Any]:
        """The settings that a text depends on, which identify a run; not those of speed."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in SPEED_ONLY}

    def for_device(self, device_type: str) -> SamplerConfig:
        """These settings with the automatic ones (0) resolved for a "cpu" or a "cuda" device.

        On two cores 32 rows are within a few percent of 64, and take a tenth of a gigabyte less.
        On a GPU `rows` stays 0: the number follows from the requests (rows_plan.py).
        """
        on_cpu = device_type == "cpu"
        rows = self.rows
        if rows == 0 and on_cpu:
            rows = 32
        prefill_tokens = self.prefill_tokens
        if prefill_tokens == 0:
            prefill_tokens = 512 if on_cpu else 4096
        return dataclasses.replace(self, rows=rows, prefill_tokens=prefill_tokens)

    def sample_rows(
        self,
        positions: Tensor,  # (B,) int64 of the tokens to be sampled
        samples: Tensor,  # (B,) int64
        row_keys: Tensor,  # (B,) int64
        temperature: float,  # of all B rows
        history: Tensor | None,  # (B, L) int64, needed for a repetition penalty
    ) -> SampleRows:
        """The settings and the names of the random numbers with which B tokens are sampled."""
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
        """Greedy settings for measuring, with this one's rows, batch invariance and CUDA graphs."""
        return SamplerConfig(
            rows=self.rows,
            max_new_tokens=max_new_tokens,
            invariant=self.invariant,
            graphs=self.graphs,
            overlap=self.overlap,
        )

    def check(self) -> None:
        """ValueError for settings that cannot sample."""
        if self.rows < 0:
            raise ValueError(f"rows {self.rows}: expected at least 1, or 0 for the default")
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: expected 0 < top_p <= 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p}: expected 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty {self.repetition_penalty}: expected above 0, 1 for none"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every row at once")
        if self.prefill_tokens < 0:
            raise ValueError(
                f"prefill_tokens {self.prefill_tokens}: expected at least 1, or 0 for the default"
            )
        if self.page_size < 1:
            raise ValueError(f"page_size {self.page_size}: expected at least 1")
        if self.kv_memory < 0:
            raise ValueError(f"kv_memory {self.kv_memory}: expected GB, or 0 for the default")
        if self.draft not in ("auto", "off", "always"):
            raise ValueError(f"draft {self.draft!r}: expected auto, off or always")
        if self.steps < 0:
            raise ValueError(f"steps {self.steps}: expected at least 1, or 0 for the default")
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
                f"temperature {self.temperature}: expected 0 (greedy) or at least 1e-6"
            )


@dataclass(frozen=True)
class Request:
    """One text to be sampled."""

    id: str  # stable: with seed, sample and position it names the random numbers
    prompt: Sequence[int]  # token ids
    max_new_tokens: int | None = None  # None: the sampler's setting
    sample: int = 0  # which of several samples of this prompt
    seed: int | None = None  # of this request alone, instead of the sampler's
    expected_tokens: int | None = None  # likely new tokens: sets the order and what is reserved
    draft_source: Sequence[int] = ()  # token ids that draft tokens are copied from: the reference
    temperature: float | None = None  # of this request alone, instead of the sampler's


@dataclass(frozen=True)
class Completion:
    """The text that was sampled for a request."""

    id: str
    sample: int
    ids: list[int]  # the sampled tokens, without the end token
    text: str  # decoded; only the part before a stop string
    finish: str  # stop | stop_string | length | prompt_too_long
    logprobs: list[float]  # nats, of each of `ids`, by the model's logits before any setting
    prompt_tokens: int


@dataclass
class SamplerStats:
    """Counts and times of one sampler, for the summary."""

    prompt_tokens: int = 0
    shared_tokens: int = 0  # prompt tokens that were copied from other pages, not computed
    new_tokens: int = 0
    steps: int = 0  # forwards of decode
    sequence_steps: int = 0  # sequences in those forwards, added up
    draft_tokens: int = 0  # proposed
    accepted_tokens: int = 0  # draft tokens that the model sampled too
    preempted: int = 0  # sequences that lost their pages and began again
    cache_bytes: int = 0  # of the pages for keys and values
    fitting_sequences: int = 0  # sequences for which the pages suffice even at their longest
    prefill_seconds: float = 0.0  # where prompts are not waited for, only to launch them
    decode_seconds: float = 0.0  # without capturing; where steps are launched ahead, the host's own
    #   and its waiting, for prompts too
    captured: int = 0  # CUDA graphs, one per bucket of sequences and pages
    capture_seconds: float = 0.0
    replayed: int = 0  # those of `steps` that were replays of a CUDA graph
    launched_ahead: int = 0  # those of `steps` that did not wait for the last tokens to be read
    why_not_captured: str | None = None  # where capturing was asked for and cannot be done

    def text(self) -> str:
        """Tokens per step, acceptance, sharing, memory, preemption and CUDA graphs in one line."""
        tokens_per_step = 1 + self.accepted_tokens / max(1, self.sequence_steps)
        decoding = f"{tokens_per_step:.2f} tokens per sequence and step"
        if self.draft_tokens:
            share = self.accepted_tokens / self.draft_tokens
            decoding += f", {self.draft_tokens} draft tokens, {share:.0%} accepted"
        parts = [decoding]
        parts.append(f"{self.shared_tokens} of {self.prompt_tokens} prompt tokens shared")
        if self.fitting_sequences:
            gigabytes = f"{self.cache_bytes / 1e9:.2f} GB"
            parts.append(f"{gigabytes} for keys and values fit {self.fitting_sequences} sequences")
        if self.preempted:
            parts.append(
                f"memory was short: {self.preempted} sequences were preempted and begun again"
            )
        if self.captured:
            parts.append(
                f"{self.replayed} of {self.steps} decode steps replayed, of {self.captured} "
                f"graphs captured in {self.capture_seconds:.1f} s"
            )
            parts.append(f"{self.launched_ahead} steps did not wait for the host")
        if self.why_not_captured:
            reason = self.why_not_captured
            parts.append(f"decode steps were not captured as CUDA graphs: {reason}")
        return "; ".join(parts)
