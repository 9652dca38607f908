"""Tables of the rivals: which way of fine-tuning forgets least, set by set."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.records import Record, of_kind
from benchmarks.tables.table import Definition, Table, bold, fixed
from engine.evaluate.arm_grammar import title_of

GOALS = {"right": "right answers", "nll": "held-out NLL"}


def newest_sets(records: list[Record]) -> dict[str, Record]:
    """Name of a data set -> its newest record, in the order in which the sets were first run."""
    return {record["set"]: record for record in of_kind(records, "rivals")}


def _rate(point: dict[str, Any]) -> str:
    """The peak learning rate in the name of a setting, "lr0.0003-r8-rows120"."""
    setting = point["setting"]
    return f"{float(setting.removeprefix('lr').split('-r')[0]):.0e}".replace("e-0", "e-")


def points(records: list[Record]) -> Table:
    """Every point of every study; bold: no other point is better at both target and KL."""
    header = ["set", "rate", "arm", "right answers", "95 %", "held-out NLL", "KL to seed"]
    header += ["95 %", "KL on the task", "update norm"]
    used = newest_sets(records)
    rows = []
    for name, record in used.items():
        label = f"{name}, {record['rows']} rows"
        for point in record["points"]:
            is_seed = point["arm"] == "seed"
            right = " + ".join(str(count) for count in point["right"])
            low, high = point["interval"]
            kl_low, kl_high = point["kl_interval"]
            kl = fixed(point["kl"], 4)
            rows.append(
                [
                    label if is_seed else "",
                    "-" if is_seed else _rate(point),
                    title_of(point["arm"]),
                    f"{right} of {point['items']}",
                    f"{low:.1f} - {high:.1f} %",
                    fixed(point["nll"], 3),
                    bold(kl) if point["front"] else kl,
                    "-" if is_seed else f"{kl_low:.4f} - {kl_high:.4f}",
                    fixed(point["task_kl"], 4),
                    fixed(point["norm"], 3),
                ]
            )
    return Table(header, rows, list(used.values()))


def equal_target(records: list[Record]) -> Table:
    """The comparisons at equal target: a line for every way of training."""
    header = ["set, at equal", "arm", "points", "best", "KL to seed there", "95 % interval"]
    header += ["generated tokens", "scored", "trained"]
    used = newest_sets(records)
    rows = []
    for name, record in used.items():
        for measure, goal in record["equal_target"].items():
            label = f"{name}: {GOALS[measure]}"
            for line in goal["table"][1:]:
                rows.append([label, *line])
                label = ""
    return Table(header, rows, list(used.values()))


def words(records: list[Record]) -> Table:
    """What the comparisons say."""
    used = newest_sets(records)
    rows = []
    for name, record in used.items():
        for goal in record["equal_target"].values():
            rows.append([f"{name}, {goal['title']}", " ".join(goal["words"])])
    return Table(["data", "what came out"], rows, list(used.values()))


DEFINITIONS = {
    "rivals-points": Definition("every arm, scale and rate on real data", points),
    "rivals-equal-target": Definition("the arms at equal target", equal_target),
    "rivals-words": Definition("what they say, in words", words),
}
