"""Settings of a distillation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.distill.cascade import MAX_TRIES, Stage, parse_cascade
from engine.distill.rewrite_prompts import Template, get_template
from engine.distill.selection import OURS, PAPER, Rules
from engine.verify.paper_rules import PUBLISHED
from engine.verify.verifiers import get_verifier

PAPER_SAMPLING = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}  # LLaMA-Factory's defaults


@dataclass(frozen=True)
class DistillConfig:
    """How the seed model is asked for rewrites, and which of them are accepted."""

    template: str = "using"  # prompt that shows the model the reference answer and asks for a
    #   rewrite: using, refer, gsm8k, or a text file with {instruction} and {reference}
    verify: str = "none"  # how an answer is checked against its reference: number (the same last
    #   number), call (the same function calls), code (passes the row's tests), json (is valid
    #   JSON), exact, contains, regex:PATTERN, module:function (your own), or none (not checked)
    cascade: str = "guided:1"  # kinds of tries at a rewrite, with the number of each, as in
    #   unguided:2,guided:1; kinds: unguided (plain prompt), guided (the reference is shown), cooler
    #   (guided, half the temperature); a kind follows if all tries before it failed; if all fail,
    #   the reference itself is used; unguided alone is self-output: the reference is never shown
    choose: str = "likelihood"  # which of several accepted tries is used: likelihood (the one that
    #   the seed model gives the highest probability) or first
    max_new_tokens: str = "auto"  # most new tokens in a rewrite
    #   [default: auto (64 + 3 x the tokens of the reference; at least 128)]
    paper_exact: bool = False  # reproduce also the defects of the SDFT paper's published code that
    #   change results (listed in engine/presets.py)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return parse_cascade(self.cascade)

    @cached_property
    def shown_template(self) -> Template:
        """The template, read once; ValueError where it has a fault (`get_template`)."""
        return get_template(self.template)

    def unguided(self) -> DistillConfig:
        """The same settings for unguided self-output: as many tries, none shown the reference.

        A try that fails verification is replaced by the reference, as a rewrite is (Selective
        Self-Rehearsal, 2409.04787; the self-output of 2501.14315).
        """
        tries = sum(stage.tries for stage in self.stages)
        return dataclasses.replace(self, cascade=f"unguided:{min(tries, MAX_TRIES)}")

    def settings(self) -> dict[str, Any]:
        """The fields, as files keep them: a template file by its content, not by its place."""
        values = dataclasses.asdict(self)
        if self.shown_template.digest:
            values["template"] = f"file sha256 {self.shown_template.digest}"
        return values

    @property
    def rules(self) -> Rules:
        if self.paper_exact:
            return PAPER
        marks = self.shown_template.marks
        return dataclasses.replace(OURS, marks=marks) if marks else OURS

    @property
    def verifier(self) -> str:
        """The verifier's name; under paper_exact the published verifier of the same purpose."""
        if self.paper_exact:
            return PUBLISHED.get(self.verify, self.verify)
        return self.verify

    def check(self) -> None:
        """ValueError for unknown names, values out of range and settings that contradict."""
        _ = self.shown_template  # ValueError where it is no template's name and no file of one
        get_verifier(self.verify)
        if self.choose not in ("likelihood", "first"):
            raise ValueError(f"choose {self.choose!r}: expected likelihood or first")
        stages = self.stages  # ValueError where the cascade cannot be read
        asks_once = stages in (parse_cascade("guided"), parse_cascade("unguided"))
        if self.paper_exact and not asks_once:
            raise ValueError(
                f"paper_exact with cascade {self.cascade!r}: the published code asks once, shown "
                "the reference; leave out one of the two"
            )
        is_number = self.max_new_tokens.isdecimal() and int(self.max_new_tokens) > 0
        if self.max_new_tokens != "auto" and not is_number:
            raise ValueError(f"max_new_tokens {self.max_new_tokens!r}: expected a number or auto")

    def limit(self, reference_tokens: int) -> int:
        """The most new tokens of a rewrite, for a reference of `reference_tokens` tokens."""
        if self.max_new_tokens != "auto":
            return int(self.max_new_tokens)
        return max(128, 64 + 3 * reference_tokens)
