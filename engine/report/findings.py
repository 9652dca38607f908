"""The findings of a run in words and tables; a difference is stated only where it is significant.

Within one run the intervals are over held-out questions and general prompts: they do not show the
spread over training seeds. Several runs that differ in nothing but the seed show it
(`tables_over_seeds`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from engine.distill.distill_report import LOW_SHARE
from engine.evaluate.arms import TUNED
from engine.measure.intervals import bootstrap, holm, lost_won, mcnemar, t_interval
from engine.report.load import Run
from engine.report.many_arms import compared_pairs, equal_target_words, retention_words

Table = list[list[str]]  # the first row is the header
SIGNIFICANT = 0.05  # a difference is stated below this p, or where its interval leaves out zero
NO_VALUE = "–"  # in a cell of a table


def result_table(run: Run) -> Table:
    """The seed and all arms: target task, drift from the seed, training and its cost."""
    verify = run.settings["DistillConfig.verify"]
    head = [
        "",
        f"Target ({verify})",
        "95 % interval",
        "Held-out NLL",
        "KL to seed",
        "95 % interval",
        "Same top-1",
        "KL, task",
        "Update norm",
        "Training loss",
        "Steps",
        "Loss tokens",
        "Seconds",
    ]
    table = [head]
    for arm, name in run.arms.items():
        cells = _target_cells(run, arm) + _drift_cells(run, arm) + _further_cells(run, arm)
        table.append([name, *cells, *_training_cells(run, arm)])
    return table


def _target_cells(run: Run, arm: str) -> list[str]:
    """Share right, its interval, held-out NLL."""
    score = run.scores.get(arm)
    if score is None:
        return [NO_VALUE] * 3
    share, interval = score.cells()
    return [share.replace("-", "–"), interval.replace("-", "–"), f"{score.nll:.3f}"]


def _drift_cells(run: Run, arm: str) -> list[str]:
    """KL to the seed, its interval, share of equal top tokens; the seed itself has no drift."""
    drift = run.summary["retention"].get(arm, {"kl": 0.0, "agreement": 1.0})
    low, high = drift_interval(run, arm)
    interval = NO_VALUE if math.isnan(low) else f"{low:.4f} – {high:.4f}"
    return [f"{drift['kl']:.4f}", interval, f"{drift['agreement']:.1%}"]


def _further_cells(run: Run, arm: str) -> list[str]:
    """KL to the seed on the held-out prompts, and the norm of the adapter's update."""
    drift = run.summary.get("retention_task", {}).get(arm)  # older runs measured neither
    norms = run.summary.get("update_norms", {}).get(arm)
    return [
        f"{drift['kl']:.4f}" if drift else NO_VALUE,
        f"{norms['norm']:.3f} ({norms['relative']:.2%})" if norms else NO_VALUE,
    ]


def norms_table(run: Run) -> Table | None:
    """The norm of each adapter's update, whole, by kind of module and by layer.

    None for a run that did not measure it.
    """
    norms = run.summary.get("update_norms", {})
    arms = [arm for arm in run.tuned if arm in norms]
    if not arms:
        return None
    head = ["Modules", "Norm of the weights"]
    for arm in arms:
        head += [f"{run.arms[arm]}: norm", "relative"]
    parts = {"all adapted modules": [norms[arm] for arm in arms]}
    for kind in norms[arms[0]]["kinds"]:
        parts[kind] = [norms[arm]["kinds"][kind] for arm in arms]
    for layer in norms[arms[0]]["layers"]:
        parts[f"layer {layer}"] = [norms[arm]["layers"][layer] for arm in arms]
    table = [head]
    for name, of_arms in parts.items():
        row = [name, f"{of_arms[0]['weight_norm']:.2f}"]
        for figures in of_arms:
            row += [f"{figures['norm']:.4f}", f"{figures['relative']:.3%}"]
        table.append(row)
    return table


def _training_cells(run: Run, arm: str) -> list[str]:
    """First and last loss, steps, loss tokens, seconds."""
    training = run.training(arm)
    if not training:
        return [NO_VALUE] * 4
    return [
        f"{training['first_loss']:.3f} → {training['last_loss']:.3f}",
        f"{training['steps']:,}",
        f"{training['response_tokens']:,}",
        f"{training['seconds']:,.0f}",
    ]


def results_table(runs: Sequence[Run]) -> Table:
    """The tables of several runs as one, in which each row names its run too."""
    tables = [result_table(run) for run in runs]
    if len(runs) == 1:
        return tables[0]
    head = tables[0][0]
    joined = [["", "Target", *head[2:]]]  # runs may have different verifiers
    for run, table in zip(runs, tables, strict=True):
        for arm_name, *cells in table[1:]:
            joined.append([f"{arm_name} · {run.name}", *cells])
    return joined


def drift_interval(run: Run, arm: str) -> tuple[float, float]:
    """95 % interval of an arm's KL per token over the general prompts."""
    items = run.drift(arm)
    sums = [item["kl"][arm] * item["tokens"] for item in items]
    tokens = [item["tokens"] for item in items]
    return bootstrap(sums, tokens)


def findings(run: Run) -> list[tuple[str, str]]:
    """The (subject, finding) pairs with which the page begins."""
    seed = run.settings["TrainConfig.seed"]
    return [
        ("Target", _target(run)),
        ("Retention", _retention(run) if run.has_default_arms else retention_words(run)),
        *equal_target_words(run),
        ("Data", _data(run)),
        ("Seeds", f"One ({seed}). How much another would change cannot be known from one run."),
    ]


def warnings(run: Run) -> list[str]:
    """Reasons to trust the comparison less."""
    reasons = []
    if run.summary["distilled"]["differ"] < LOW_SHARE:
        reasons.append(
            f"Under {LOW_SHARE:.0%} of the targets are the model's own words: SFT and SDFT are "
            "nearly the same run."
        )
    scores = run.scores
    if any(score.truncated > score.n / 10 for score in scores.values()):
        cut = _by_arm(run, {arm: str(score.truncated) for arm, score in scores.items()})
        reasons.append(
            f"Of {scores['seed'].n} held-out answers, these numbers hit the token limit and may "
            f"have been judged before their end: {cut}. Raise --eval-max-new."
        )
    return reasons


def _by_arm(run: Run, figures: dict[str, str]) -> str:
    """Figures as text: seed 3, SFT 5, SDFT 4."""
    return ", ".join(f"{run.arms[arm]} {figure}" for arm, figure in figures.items())


def _target(run: Run) -> str:
    """Right answers of each arm, and the pairs of arms that differ significantly or do not."""
    scores = run.scores
    if not scores:
        return "The target task was not scored: no held-out rows were given (--eval-data)."
    n = scores["seed"].n
    if not n:
        nll = _by_arm(run, {arm: f"{score.nll:.3f}" for arm, score in scores.items()})
        return f"The target task has no verifier. NLL per token of the held-out references: {nll}."
    right = _by_arm(run, {arm: str(score.right) for arm, score in scores.items()})
    better, same = _compared_arms(run)
    text = f"Right of {n} held-out questions: {right}. " + " ".join(better)
    if same:
        text += f" No difference is seen between {', '.join(same)}."
    test = "McNemar's exact test on the same questions"
    if not run.has_default_arms:
        test += f", Holm's correction for {len(compared_pairs(run))} pairs"
    return text + f" ({test}.)"


def _compared_arms(run: Run) -> tuple[list[str], list[str]]:
    """A sentence for each pair of arms of which one is better; the other pairs with their p.

    p values are corrected for their number where there are other arms than SFT and SDFT.
    """
    counts = {}  # pair -> questions lost and won by its second arm
    for first, second in compared_pairs(run):
        by_first, by_second = run.right(first), run.right(second)
        before = list(by_first.values())
        after = [by_second[id] for id in by_first]
        counts[first, second] = lost_won(before, after)
    p_values = [mcnemar(lost, won) for lost, won in counts.values()]
    if not run.has_default_arms:
        p_values = holm(p_values)
    better = []
    same = []
    for ((first, second), (lost, won)), p in zip(counts.items(), p_values, strict=True):
        if p >= SIGNIFICANT:
            same.append(f"{run.arms[first]} and {run.arms[second]} (p = {p:.2f})")
            continue
        winner, loser = (second, first) if won > lost else (first, second)
        p_text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        better.append(f"{run.arms[winner]} is better than {run.arms[loser]} ({p_text}).")
    return better, same


def _retention(run: Run) -> str:
    """KL of both arms to the seed, and the interval of their difference over general prompts."""
    kl = {arm: run.summary["retention"][arm]["kl"] for arm in TUNED}
    items = [item for item in run.drift("sft") if item["kl"].get("sdft") is not None]
    differences = []  # SFT - SDFT of each prompt, in nats, summed over the tokens
    tokens = []
    for item in items:
        difference = item["kl"]["sft"] - item["kl"]["sdft"]
        differences.append(difference * item["tokens"])
        tokens.append(item["tokens"])
    text = (
        f"KL to the seed on {len(items)} general prompts, nats per token: SFT {kl['sft']:.4f}, "
        f"SDFT {kl['sdft']:.4f}. "
    )
    return text + _less_words(differences, tokens, "forgot less") + _task_retention(run)


def _less_words(differences: Sequence[float], tokens: Sequence[int], verb: str) -> str:
    """A sentence on SFT - SDFT, given by prompt in nats summed over its tokens."""
    low, high = bootstrap(differences, tokens)
    interval = f"(SFT − SDFT: {low:+.4f} to {high:+.4f}, 95 % over prompts)".replace("-", "−")
    if low > 0:
        return f"SDFT {verb} {interval}."
    if high < 0:
        return f"SFT {verb} {interval}."
    return f"No difference is seen {interval}."


def _task_retention(run: Run) -> str:
    """KL of both arms to the seed on the task's held-out prompts; "" for a run without it."""
    if not set(TUNED) <= set(run.task_drift):
        return ""
    sft, sdft = run.task_drift["sft"], run.task_drift["sdft"]
    rows = [row for row in sft if row in sdft]
    tokens = [sft[row]["tokens"] for row in rows]
    kl_sft = sum(sft[row]["kl"] for row in rows) / sum(tokens)
    kl_sdft = sum(sdft[row]["kl"] for row in rows) / sum(tokens)
    differences = [sft[row]["kl"] - sdft[row]["kl"] for row in rows]
    text = (
        f" On the seed's answers to {len(rows)} held-out prompts of the task, where RL's Razor "
        f"(2509.04259) expects what predicts forgetting: SFT {kl_sft:.4f}, SDFT {kl_sdft:.4f}. "
    )
    return text + _less_words(differences, tokens, "moved less")


def _data(run: Run) -> str:
    """The share of targets that are the model's own words, statuses, and likelihoods."""
    counts = Counter(row["status"] for row in run.rows)
    parts = ", ".join(f"{status} {n}" for status, n in counts.most_common())
    differ = run.summary["distilled"]["differ"]
    text = f"Of {len(run.rows):,} targets {differ:.0%} are the model's own words ({parts})."
    sums = run.summary["likelihood"]
    if sums:
        reference = sums["reference"] / max(1, sums["reference_tokens"])
        rewrite = sums["response"] / max(1, sums["response_tokens"])
        text += (
            f" Under the seed a reference has an NLL of {reference:.3f} nats per token, a rewrite "
            f"{rewrite:.3f}."
        )
    return text


# ---- several runs


def differing_settings(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ, but for the output directory."""
    settings = [run.settings for run in runs]
    names = list(dict.fromkeys(name for of_run in settings for name in of_run))
    table = [["Setting", *(run.name for run in runs)]]
    for name in names:
        values = [str(of_run.get(name, NO_VALUE)) for of_run in settings]
        if len(set(values)) > 1 and name != "SdftConfig.out":
            table.append([name, *values])
    return table


def why_incomparable(runs: Sequence[Run]) -> list[str]:
    """Reasons why figures of these runs cannot be compared; [] where they can."""
    reasons = []
    fingerprints = {run.summary.get("model", {}).get("fingerprint") for run in runs}
    if len(fingerprints) > 1:
        reasons.append("The runs start from different models.")
    different = []
    for name in ("SdftConfig.eval_data", "SdftConfig.eval_limit", "DistillConfig.verify"):
        values = {str(run.settings[name]) for run in runs}
        if len(values) > 1:
            different.append(name)
    if different:
        reasons.append(f"The runs are scored on different questions: {', '.join(different)}.")
    return reasons


def tables_over_seeds(runs: Sequence[Run]) -> list[tuple[list[Run], Table]]:
    """Runs that differ in nothing but the seed, with mean and 95 % interval over the seeds."""
    ignored = {"TrainConfig.seed", "SamplerConfig.seed", "LoraConfig.seed", "SdftConfig.out"}
    groups: dict[str, dict[int, Run]] = {}  # other settings, as JSON -> seed -> run
    for run in runs:
        others = {name: value for name, value in run.settings.items() if name not in ignored}
        key = json.dumps(others, sort_keys=True)
        seed = run.settings["TrainConfig.seed"]
        groups.setdefault(key, {})[seed] = run
    tables = []
    for by_seed in groups.values():
        if len(by_seed) > 1:
            group = list(by_seed.values())
            tables.append((group, _over_seeds(group)))
    return tables


class SeedColumn(NamedTuple):
    """A column of the table over seeds: a figure of summary.json."""

    title: str
    part: str  # of summary.json
    field: str
    form: str  # format of its numbers

    def values(self, runs: Sequence[Run], arm: str) -> list[float | None]:
        """The figure of an arm in each run; None where a run lacks it."""
        figures = [run.summary[self.part].get(arm, {}) for run in runs]
        return [of_run.get(self.field) for of_run in figures]


SEED_COLUMNS = (
    SeedColumn("Target", "evaluation", "share", ".1%"),
    SeedColumn("Held-out NLL", "evaluation", "nll", ".3f"),
    SeedColumn("KL to seed", "retention", "kl", ".4f"),
    SeedColumn("Same top-1", "retention", "agreement", ".1%"),
)


def _over_seeds(runs: list[Run]) -> Table:
    """Mean and interval of the arms' figures, and of the differences SDFT - SFT."""
    table = [["", *(column.title for column in SEED_COLUMNS)]]
    for arm, name in runs[0].arms.items():
        cells = [_mean_cell(column.values(runs, arm), column.form) for column in SEED_COLUMNS]
        table.append([name, *cells])
    if not set(TUNED) <= set(runs[0].arms):
        return table
    differences = ["SDFT − SFT"]
    for column in SEED_COLUMNS:
        sft, sdft = column.values(runs, "sft"), column.values(runs, "sdft")
        by_run = []
        for of_sft, of_sdft in zip(sft, sdft, strict=True):
            has_both = of_sft is not None and of_sdft is not None
            by_run.append(of_sdft - of_sft if has_both else None)
        differences.append(_mean_cell(by_run, "+" + column.form))
    return [*table, differences]


def _mean_cell(values: Sequence[float | None], form: str) -> str:
    """Mean (interval) of one value per seed; a dash where one is missing or no number."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if len(known) < len(values):
        return NO_VALUE
    mean, low, high = t_interval(known)
    return f"{mean:{form}} ({low:{form}} – {high:{form}})"
