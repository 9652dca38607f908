"""Presets: named sets of defaults for the flags; a typed flag wins

    python scripts/sdft.py --preset yang2024-gsm8k --model Llama-2-7b-chat --data train.json ...

`yang2024-*` are the settings of the SDFT paper (arXiv 2402.13669) and its published code for their
seven training sets: template, chat form, selection, LoRA, rate, schedule, epochs, batch, cut-off
and decoding. `default` is for other models, with their own chat template, and was chosen by
measurement: LoRA on all linears at 3e-4, with the paper's dropout; else the flags' own defaults.

How it was chosen (SmolLM2-135M-Instruct, SDFT, 120 rows, 2 epochs, one training seed; the table is
in benchmarks/results/real_data.md):

    adapters on          OpenFunctions, of 112                Alpaca
                         exact calls  NLL    KL to the seed   NLL    KL to the seed
    all linears, 3e-4    18           0.556  0.025            1.805  0.048
    q and v, 1e-3        20           0.554  0.080            1.796  0.087

All linears at 3e-4 learn as much and forget a third to a half as much. q and v at 3e-4 learn too
little in so few steps (2 of 112); all linears at 1e-3 forget most (KL 0.128 on Alpaca). Rank 32
instead of 8 makes no visible difference.

Differences between the published code and this engine under its settings. `--paper-exact` restores
the published behaviour of those marked (x), which change what is trained on (`selection.PAPER`,
`paper_rules.PUBLISHED`):

                       published                              here
    (x) numbers        two texts without an integer are       `number`: the same exact number
                       equal; "1,2" is 12, "5-3" is -3
    (x) calls          compared letter by letter, as a        `call`: the same call, parsed
                       substring
    (x) programs       "```python" and a beginning are        `code`: the program passes the row's
                       accepted; yang2024-magicoder's         tests
                       `paper_code` checks no more
    (x) truncated      rewrites that hit 512 tokens are       the reference is used instead
                       trained with an end token
    (x) prefix         "Great! Let's think step by step."     the target begins with it
                       is shown to the model but dropped
                       from the target
    (x) conversations  only the last answer is rewritten,     every answer is rewritten, with the
                       the others are trained on as given     earlier rewrites as context
    (x) long prompts   a request for a rewrite loses its      whole, or counted as prompt_too_long
                       end (the reference, the response
                       marker) at 1,024 tokens
    (x) long examples  prompt and answer lose their ends in   the answer's end is cut (--truncate,
                       proportion at 1,024 tokens, so every   counted); a turn whose prompt leaves
                       row is trained on                      it no room is left out (--drop-long,
                                                              counted). train.py alone takes
                                                              --cut-in-proportion for it
    (x) guards         a ban list                             also garbled, echo, repeats_prompt,
                                                              refusal, not_refused

    row alignment      a row with an empty prompt shifts      rows have ids; an empty prompt is
                       all later rewrites by one              refused by name
    trained ids        a rewrite is encoded again from text   the sampled ids
    space of a prefix  its last space belongs to the prefix   sampled, with the word that follows
    alpaca turns       an earlier answer is not closed        closed by the end token, in sampling
                                                              and training
    micro-batches      2 x 4 accumulated, each a mean over    the mean over the tokens of all 8 rows
                       its own tokens                         of a step
    dropout            one mask per module                    one for q, k, v together, by counter
    precision, seed    fp16 sampling, torch's generator,      the model's dtype; random numbers by
                       seed 42                                seed, row and position: the texts
                                                              cannot be the same
    empty rewrites     are trained on                         the reference is used instead, always

The evaluations (sampled decoding, prompts with an answer format) are no part of a preset.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from engine.distill.rewrite_prompts import GSM8K_SYSTEM
from engine.runtime.flag_parser import FlagParser

_PAPER: dict[str, Any] = {
    "chat_format": "alpaca",
    "template": "using",
    "verify": "none",
    "cascade": "guided:1",
    "max_new_tokens": "512",
    "temperature": 0.95,
    "top_p": 0.7,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.1,
    "modules": "qv",
    "lr": 1e-4,
    "schedule": "cosine",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "epochs": 2,
    "batch_rows": 8,
    "max_length": 1024,
    "truncate": True,
    "drop_long": True,
    "seed": 42,
}
_FIVE_EPOCHS = {"epochs": 5}
PRESETS: dict[str, Mapping[str, Any]] = {
    "default": {"modules": "all", "lr": 3e-4, "dropout": 0.1},
    "yang2024-alpaca": _PAPER,
    "yang2024-dolly": _PAPER,
    "yang2024-lima": _PAPER,
    "yang2024-openhermes": _PAPER,
    "yang2024-gsm8k": _PAPER
    | _FIVE_EPOCHS
    | {"chat_format": "llama2", "template": "gsm8k", "verify": "number", "system": GSM8K_SYSTEM},
    "yang2024-openfunctions": _PAPER | _FIVE_EPOCHS | {"template": "refer", "verify": "call"},
    "yang2024-magicoder": _PAPER | {"template": "refer", "verify": "paper_code"},
}


def get_preset(name: str) -> Mapping[str, Any]:
    """Defaults by flag name; ValueError offers the nearest names."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no preset {name!r}; {meant}expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def parse(parser: FlagParser, given: Sequence[str] | None = None) -> Any:
    """The arguments, with the values of `--preset` as defaults; prints the preset's settings.

    `--help` shows the defaults of the preset that is named beside it.
    """
    names = ", ".join(PRESETS)
    parser.add_argument(
        "--preset",
        default="default",
        help=f"set of defaults for the flags below: {names} (yang2024-* are the SDFT paper's)",
    )
    name = _typed_preset(given)
    known = {action.dest for action in parser.arguments}
    preset = {flag: value for flag, value in get_preset(name).items() if flag in known}
    for flag, value in preset.items():
        # as text, so that a flag that takes a list (a study's rates) reads it as one
        default = value if isinstance(value, bool) else str(value)
        parser.set_defaults(**{flag: default})
    if name != "default":
        parser.epilog = f"The defaults shown are those of --preset {name}."
    args = parser.parse_args(given)

    settings = []
    for flag, value in preset.items():
        used = getattr(args, flag)
        mark = "" if str(used) == str(value) else " (typed)"
        settings.append(f"{flag}={used!r}{mark}")
    if settings:
        print(f"preset {name}: {', '.join(settings)}")
    return args


def _typed_preset(given: Sequence[str] | None) -> str:
    """The value of --preset; a missing or repeated value is left to the script's parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--preset", nargs="?", default="default")
    known, _ = parser.parse_known_args(given)
    return known.preset or "default"
