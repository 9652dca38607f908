"""The findings of a run in words and tables; a difference is stated only where it is significant.

Within one run the intervals are over held-out questions and general prompts: they do not show the
spread over training seeds. Runs that differ in nothing but the seed do (`tables_over_seeds`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from engine.distill.distill_report import LOW_SHARE
from engine.evaluate.arms import ARM_NAMES, TUNED
from engine.evaluate.target_task import Score
from engine.measure.intervals import bootstrap, mcnemar, t_interval
from engine.report.load import Run

Table = list[list[str]]  # the first row is the header
SIGNIFICANT = 0.05  # a difference is stated below this p, or where its interval leaves out zero


def result_table(run: Run) -> Table:
    """Seed, SFT and SDFT: the target task, what was forgotten, what training took."""
    verify = run.settings["DistillConfig.verify"]
    head = ["", f"Target ({verify})", "95 % interval", "Held-out NLL", "KL to seed"]
    head += ["95 % interval", "Same top-1", "Training loss", "Steps", "Loss tokens", "Seconds"]
    table = [head]
    for arm, name in ARM_NAMES.items():
        cells = ["–", "–", "–"]
        if score := run.summary["evaluation"].get(arm):
            held_out = Score(*(score[k] for k in ("n", "right", "truncated", "nll")))
            cells = [c.replace("-", "–") for c in held_out.cells()] + [f"{score['nll']:.3f}"]
        kept = run.summary["retention"].get(arm, {"kl": 0.0, "agreement": 1.0})
        low, high = drift_interval(run, arm)
        cells += [f"{kept['kl']:.4f}", "–" if math.isnan(low) else f"{low:.4f} – {high:.4f}"]
        cells.append(f"{kept['agreement']:.1%}")
        if t := run.summary["training"].get(arm):
            cells.append(f"{t['first_loss']:.3f} → {t['last_loss']:.3f}")
            cells += [f"{t['steps']:,}", f"{t['response_tokens']:,}", f"{t['seconds']:,.0f}"]
        else:
            cells += ["–"] * 4
        table.append([name, *cells])
    return table


def results_table(runs: Sequence[Run]) -> Table:
    """The tables of several runs as one, each row named by its run too."""
    tables = [result_table(run) for run in runs]
    if len(runs) == 1:
        return tables[0]
    rows = [
        [f"{row[0]} · {run.name}", *row[1:]]
        for run, table in zip(runs, tables, strict=True)
        for row in table[1:]
    ]
    return [["", "Target", *tables[0][0][2:]], *rows]


def drift_interval(run: Run, arm: str) -> tuple[float, float]:
    """95 % interval of an arm's KL per token over the general prompts."""
    items = run.drift(arm)
    return bootstrap([a["kl"][arm] * a["tokens"] for a in items], [a["tokens"] for a in items])


def findings(run: Run) -> list[tuple[str, str]]:
    """(subject, finding) pairs, with which the page begins."""
    seed = run.settings["TrainConfig.seed"]
    return [
        ("Target", _target(run)),
        ("Retention", _retention(run)),
        ("Data", _data(run)),
        ("Seeds", f"One ({seed}). How much another would change cannot be known from one run."),
    ]


def warnings(run: Run) -> list[str]:
    """Reasons to trust the comparison less."""
    found = []
    if run.summary["distilled"]["differ"] < LOW_SHARE:
        found.append(
            f"Under {LOW_SHARE:.0%} of the targets are the model's own words: SFT and SDFT are "
            "nearly the same run."
        )
    scores = run.summary["evaluation"]
    if any(score["truncated"] > score["n"] / 10 for score in scores.values()):
        cut = ", ".join(f"{ARM_NAMES[arm]} {score['truncated']}" for arm, score in scores.items())
        found.append(
            f"Of {scores['seed']['n']} held-out answers hit the token limit, and may have been "
            f"judged before their end: {cut}. Raise --eval-max-new."
        )
    return found


def _target(run: Run) -> str:
    scores = run.summary["evaluation"]
    if not scores:
        return "The target task was not scored: no held-out rows were given (--eval-data)."
    n = scores["seed"]["n"]
    if not n:
        nll = ", ".join(f"{ARM_NAMES[arm]} {s['nll']:.3f}" for arm, s in scores.items())
        return f"Nothing verifies the target task. NLL per token of the held-out references: {nll}."
    shares = ", ".join(f"{ARM_NAMES[arm]} {s['right']}" for arm, s in scores.items())
    verdicts = {arm: run.right(arm) for arm in scores}
    better, same = [], []
    for first, second in (("seed", "sft"), ("seed", "sdft"), ("sft", "sdft")):
        a, b = verdicts[first], verdicts[second]
        lost = sum(a[i] and not b[i] for i in a)
        won = sum(b[i] and not a[i] for i in a)
        p = mcnemar(lost, won)
        names = [ARM_NAMES[first], ARM_NAMES[second]]
        if p < SIGNIFICANT:
            up, down = names[::-1] if won > lost else names
            better.append(
                f"{up} is better than {down} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})."
            )
        else:
            same.append(f"{' and '.join(names)} (p = {p:.2f})")
    text = f"Right of {n} held-out questions: {shares}. " + " ".join(better)
    if same:
        text += " No difference is seen between " + ", ".join(same) + "."
    return text + " (McNemar's exact test on the same questions.)"


def _retention(run: Run) -> str:
    kl = {arm: run.summary["retention"][arm]["kl"] for arm in TUNED}
    items = [a for a in run.drift("sft") if a["kl"].get("sdft") is not None]
    apart = [(a["kl"]["sft"] - a["kl"]["sdft"]) * a["tokens"] for a in items]
    low, high = bootstrap(apart, [a["tokens"] for a in items])
    text = (
        f"KL to the seed on {len(items)} general prompts, nats per token: SFT {kl['sft']:.4f}, "
        f"SDFT {kl['sdft']:.4f}. "
    )
    interval = f"(SFT − SDFT: {low:+.4f} to {high:+.4f}, 95 % over prompts)".replace("-", "−")
    if low > 0:
        return text + f"SDFT forgot less {interval}."
    if high < 0:
        return text + f"SFT forgot less {interval}."
    return text + f"No difference seen {interval}."


def _data(run: Run) -> str:
    counts = Counter(row["status"] for row in run.rows)
    parts = ", ".join(f"{name} {n}" for name, n in counts.most_common())
    differ = run.summary["distilled"]["differ"]
    text = f"Of {len(run.rows):,} targets {differ:.0%} are the model's own words ({parts})."
    if means := run.summary["likelihood"]:
        a, b = (means[t] / max(1, means[f"{t}_tokens"]) for t in ("reference", "response"))
        text += f" A reference costs the seed {a:.3f} nats per token, a rewrite {b:.3f}."
    return text


# ---- several runs


def differing_settings(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = [[name, *(str(run.settings.get(name, "–")) for run in runs)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] != "SdftConfig.out"]
    return [["Setting", *(run.name for run in runs)], *rows]


def why_incomparable(runs: Sequence[Run]) -> list[str]:
    """Reasons why figures of these runs cannot be compared."""
    prints = {run.summary.get("model", {}).get("fingerprint") for run in runs}
    found = ["The runs start from different models."] if len(prints) > 1 else []
    names = ("SdftConfig.eval_data", "SdftConfig.eval_limit", "DistillConfig.verify")
    different = [name for name in names if len({str(run.settings[name]) for run in runs}) > 1]
    if different:
        found.append(f"The runs are scored on different questions: {', '.join(different)}.")
    return found


def tables_over_seeds(runs: Sequence[Run]) -> list[tuple[list[Run], Table]]:
    """Runs that differ in nothing but the seed, with mean and 95 % interval over the seeds."""
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        ignored = {"TrainConfig.seed", "SamplerConfig.seed", "LoraConfig.seed", "SdftConfig.out"}
        same = {k: v for k, v in run.settings.items() if k not in ignored}
        key = json.dumps(same, sort_keys=True)
        groups.setdefault(key, {})[run.settings["TrainConfig.seed"]] = run
    several = [list(group.values()) for group in groups.values() if len(group) > 1]
    return [(group, _over_seeds(group)) for group in several]


def _over_seeds(runs: list[Run]) -> Table:
    def cell(values: list[Any], form: str) -> str:
        if any(v is None or math.isnan(v) for v in values):
            return "–"
        mean, low, high = t_interval(values)
        return f"{mean:{form}} ({low:{form}} – {high:{form}})"

    def value(run: Run, part: str, arm: str, name: str) -> Any:
        return run.summary[part].get(arm, {}).get(name)

    table = [["", "Target", "Held-out NLL", "KL to seed", "Same top-1"]]
    columns = [("evaluation", "share", ".1%"), ("evaluation", "nll", ".3f")]
    columns += [("retention", "kl", ".4f"), ("retention", "agreement", ".1%")]
    for arm, name in ARM_NAMES.items():
        values = [[value(run, part, arm, key) for run in runs] for part, key, _ in columns]
        cells = [cell(v, form) for v, (_, _, form) in zip(values, columns, strict=True)]
        table.append([name, *cells])
    row = ["SDFT − SFT"]
    for part, key, form in columns:
        pairs = [(value(r, part, "sdft", key), value(r, part, "sft", key)) for r in runs]
        apart = [None if None in pair else pair[0] - pair[1] for pair in pairs]
        row.append(cell(apart, "+" + form))
    return [*table, row]
