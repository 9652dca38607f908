"""Settings of a distillation."""

from __future__ import annotations

from dataclasses import dataclass

from engine.distill.cascade import Stage, parse_cascade
from engine.distill.rewrite_prompts import TEMPLATES
from engine.distill.selection import OURS, PAPER, Rules
from engine.verify.paper_rules import PUBLISHED
from engine.verify.verifiers import get_verifier

PAPER_SAMPLING = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}  # LLaMA-Factory's defaults


@dataclass(frozen=True)
class DistillConfig:
    """How the seed model is asked for rewrites, and which of them are accepted."""

    template: str = "using"  # prompt that shows the model the reference answer and asks for a
    #   rewrite: using, refer or gsm8k
    verify: str = "none"  # how an answer is checked against its reference: number (the same last
    #   number), call (the same function calls), code (passes the row's tests), json (is valid
    #   JSON), exact, contains, regex:PATTERN, module:function (your own), or none (not checked)
    cascade: str = "guided:1"  # kinds of tries at a rewrite, with the number of each, as in
    #   unguided:2,guided:1; kinds: unguided (plain prompt), guided (the reference is shown), cooler
    #   (guided, half the temperature); a kind follows if all tries before it failed; if all fail,
    #   the reference itself is used
    choose: str = "likelihood"  # which of several accepted tries is used: likelihood (the one that
    #   the seed model gives the highest probability) or first
    max_new_tokens: str = "auto"  # most new tokens in a rewrite
    #   [default: auto (64 + 3 x the tokens of the reference; at least 128)]
    paper_exact: bool = False  # reproduce also the defects of the SDFT paper's published code that
    #   change results (listed in engine/presets.py)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return parse_cascade(self.cascade)

    @property
    def rules(self) -> Rules:
        return PAPER if self.paper_exact else OURS

    @property
    def verifier(self) -> str:
        """The verifier's name; under paper_exact the published verifier of the same purpose."""
        if self.paper_exact:
            return PUBLISHED.get(self.verify, self.verify)
        return self.verify

    def check(self) -> None:
        """ValueError for unknown names, values out of range and settings that contradict."""
        if self.template not in TEMPLATES:
            raise ValueError(f"template {self.template!r}: expected one of {', '.join(TEMPLATES)}")
        get_verifier(self.verify)
        if self.choose not in ("likelihood", "first"):
            raise ValueError(f"choose {self.choose!r}: expected likelihood or first")
        stages = self.stages  # ValueError where the cascade cannot be read
        if self.paper_exact and stages != parse_cascade("guided:1"):
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
