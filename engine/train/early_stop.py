"""When a training ends before its last step, and which checkpoint is published

    --patience N        after N validations in a row in which the measure of --best did not improve
    --stop-kl NATS      a budget of drift: at the first validation whose KL(seed || adapter) is
                        above it

Checkpoints are compared at validations only:

    --best              last         nll, kl
    without --stop-kl   the last     the one with the lowest value
    with --stop-kl      the last one within the budget    the one with the lowest value among those
                                                          within the budget

`after_validation` is a function of the settings, the state and the values alone. Its state lies in
state.json of every checkpoint, so a run that is resumed stops at the same step. Up to there the
learning rate is that of the planned run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.train.validate import ValidateConfig

State = dict[str, Any]  # of a run (loop.py); here `best`, `waited` and `stopped` are meant
# "best": the checkpoint to publish, {} before the first; "waited": validations in a row without an
# improvement; "stopped": why the run has ended early, "" where it has not
FRESH: State = {"best": {}, "waited": 0, "stopped": ""}


class Verdict(NamedTuple):
    """What a validation changes."""

    state: State  # the new values
    is_best: bool  # this step is the one to publish so far


def after_validation(
    config: ValidateConfig, state: State, measures: Mapping[str, float], step: int
) -> Verdict:
    """The verdict on the adapter of a step.

    measures: the values by name, "kl" among them under `stop_kl`. ValueError where `stop_kl` ends
    the run and no validation before was within it.
    """
    budget = config.stop_kl
    if budget and not measures["kl"] <= budget:  # "not": NaN too
        if not state["best"]:
            raise ValueError(_none_within(config, measures["kl"], step))
        why = f"its KL to the seed, {measures['kl']:.4f}, is above --stop-kl {budget:g}"
        return Verdict({"stopped": why}, is_best=False)
    if config.best == "last":
        if not budget:
            return Verdict({}, is_best=False)
        best = {"metric": "last", "value": measures["kl"], "step": step}
        return Verdict({"best": best}, is_best=True)
    value = measures[config.best]
    if value < state["best"].get("value", math.inf):
        best = {"metric": config.best, "value": value, "step": step}
        return Verdict({"best": best, "waited": 0}, is_best=True)
    waited = state["waited"] + 1
    changes: State = {"waited": waited}
    if config.patience and waited >= config.patience:
        changes["stopped"] = f"{config.best} has not improved in {waited} validations (--patience)"
    return Verdict(changes, is_best=False)


def _none_within(config: ValidateConfig, kl: float, step: int) -> str:
    """The message of a run whose first validation is above the budget."""
    return (
        f"step {step}: KL to the seed {kl:.4f} is above --stop-kl {config.stop_kl:g} at the first "
        "validation, so no adapter within it was measured; begin anew (another --out) with a "
        f"smaller --val-every than {config.val_every}, a lower --lr, or a larger --stop-kl"
    )
