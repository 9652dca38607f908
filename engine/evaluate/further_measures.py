"""The small table below a job's closing table: drift on the task's prompts, size of the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.evaluate.arm_grammar import title_of
from engine.runtime.terminal import table


def further_measures(
    task_drift: Mapping[str, dict[str, Any]], norms: Mapping[str, dict[str, Any]]
) -> str:
    """A line per trained arm, and a note on the columns; "" where nothing was measured.

    task_drift    by arm, as from `task_retention`; {} without held-out rows
    norms         by arm, as from `update_norms`
    """
    arms = list(dict.fromkeys([*task_drift, *norms]))
    if not arms:
        return ""
    lines = [["", "KL to seed, task", "95 % interval", "update norm", "of the weights'"]]
    for arm in arms:
        drift_cells = ["-", "-"]
        if arm in task_drift:
            low, high = task_drift[arm]["kl_interval"]
            drift_cells = [f"{task_drift[arm]['kl']:.4f}", f"{low:.4f} - {high:.4f}"]
        norm_cells = ["-", "-"]
        if arm in norms:
            norm_cells = [f"{norms[arm]['norm']:.3f}", f"{norms[arm]['relative']:.2%}"]
        lines.append([title_of(arm), *drift_cells, *norm_cells])
    return (
        f"{table(lines)}\nKL to seed, task: over the seed's own answers to the held-out prompts. "
        "Update norm: Frobenius norm of all the adapter's updates s B A together, and its share "
        "of that of the adapted weights (the parameter shift)."
    )
