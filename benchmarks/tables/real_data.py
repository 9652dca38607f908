"""Tables of fine-tuning results: real data sets, settings, the quickstart."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.records import Record, newest, of_kind
from benchmarks.tables.table import Definition, Table, bold, fixed

ARMS = {"seed": "seed", "sft": "SFT", "sdft": "SDFT"}
MODULES = {"qv": "q, v", "all": "all linears"}


def newest_sets(records: list[Record]) -> dict[str, Record]:
    """Name of a data set -> its newest record, in the order in which the sets were first run."""
    return {record["set"]: record for record in of_kind(records, "real_data")}


def interval(bounds: list[float] | None, digits: int) -> str:
    return f" ({bounds[0]:.{digits}f} - {bounds[1]:.{digits}f})" if bounds else ""


def target(right: dict[str, Any] | None) -> str:
    """21/112 = 18.8 % (12.6 - 27.0); "-" where nothing can be verified."""
    if right is None:
        return "-"
    share = f"{right['right']}/{right['items']} = {right['percent']:.1f} %"
    return share + interval(right["interval"], 1)


def what_came_out(records: list[Record]) -> Table:
    header = ["data", "right answers: SFT", "SDFT", "held-out NLL: SFT", "SDFT"]
    header += ["KL to the seed: SFT", "SDFT", "SDFT - SFT, KL"]
    used = newest_sets(records)
    rows = []
    for name, record in used.items():
        sft, sdft = record["arms"]["sft"], record["arms"]["sdft"]
        kl = record["differences"]["kl_to_seed"]
        low, high = kl["interval"]
        rows.append(
            [
                f"{name}, {record['rows']} rows",
                _share(sft["target"]),
                _share(sdft["target"]),
                fixed(sft["nll"], 3),
                fixed(sdft["nll"], 3),
                fixed(sft["kl_to_seed"], 4),
                bold(fixed(sdft["kl_to_seed"], 4)),
                f"{kl['difference']:.4f} ({low:.4f} to {high:.4f})",
            ]
        )
    return Table(header, rows, list(used.values()))


def _share(right: dict[str, Any] | None) -> str:
    return "-" if right is None else f"{right['right']}/{right['items']}"


def real_data(records: list[Record]) -> Table:
    header = ["set", "arm", "target", "held-out NLL", "KL to seed", "KL from seed"]
    header += ["same top-1", "tokens with loss"]
    used = newest_sets(records)
    rows = []
    for name, record in used.items():
        differ = record["targets_that_differ_percent"]
        label = f"{name}, {record['rows']} rows, {differ:.1f} % of targets differ"
        for arm, arm_label in ARMS.items():
            result = record["arms"][arm]
            kl = fixed(result["kl_to_seed"], 4) + interval(result["kl_to_seed_interval"], 4)
            rows.append(
                [
                    label if arm == "seed" else "",
                    arm_label,
                    target(result["target"]),
                    fixed(result["nll"], 3),
                    kl,
                    fixed(result["kl_from_seed"], 4),
                    f"{result['same_top1_percent']:.1f} %",
                    "-" if result["tokens_with_loss"] is None else str(result["tokens_with_loss"]),
                ]
            )
    return Table(header, rows, list(used.values()))


def differences(records: list[Record]) -> Table:
    used = newest_sets(records)
    rows = [
        [
            name,
            _difference(record["differences"]["target"], 1, " points"),
            _difference(record["differences"]["nll"], 4),
            _difference(record["differences"]["kl_to_seed"], 4),
        ]
        for name, record in used.items()
    ]
    header = ["SDFT - SFT", "target", "held-out NLL", "KL to seed"]
    return Table(header, rows, list(used.values()))


def _difference(found: dict[str, Any] | None, digits: int, unit: str = "") -> str:
    """The verdict; in brackets the difference, its interval and, if there is one, the p value."""
    if found is None:
        return "-"
    low, high = found["interval"]
    difference = f"{found['difference']:+.{digits}f}{unit}"
    interval = f"{low:+.{digits}f} to {high:+.{digits}f}"
    p = f"; p {found['p']:.3f}" if "p" in found else ""
    return f"{found['verdict']} ({difference}, {interval}{p})"


def settings(records: list[Record]) -> Table:
    """Target, held-out NLL, KL to the seed of SDFT, and in brackets SFT's KL."""
    record = newest(of_kind(records, "real_data_settings"), "rates, modules and ranks")
    header = ["LoRA", "OpenFunctions", "Alpaca"]
    rows = []
    for setting in record["settings"]:
        rate = f"{setting['lr']:.0e}".replace("e-0", "e-")
        label = f"r {setting['rank']} on {MODULES[setting['modules']]} at {rate}"
        if setting["preset_default"]:
            label = bold(label)
        rows.append([label, *(_setting(setting["sdft"].get(name)) for name in header[1:])])
    return Table(header, rows, [record])


def _setting(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    parts = [] if found["right"] is None else [f"{found['right']}/{found['items']}"]
    parts += [fixed(found["nll"], 3), fixed(found["kl_to_seed"], 4)]
    sft = found["sft_kl_to_seed"]
    return ", ".join(parts) + ("" if sft is None else f" ({sft:.4f})")


def quickstart(records: list[Record]) -> Table:
    """The word problems."""
    record = newest(of_kind(records, "quickstart"), "the quickstart's word problems")
    header = ["", "target (number)", "95 % interval", "held-out NLL", "KL to seed", "KL from seed"]
    header += ["same top-1", "train loss", "train s"]
    rows = []
    for arm, label in ARMS.items():
        found = record["arms"][arm]
        cells = [
            fixed(found["nll"], 3),
            fixed(found["kl_to_seed"], 4),
            fixed(found["kl_from_seed"], 4),
            f"{found['same_top1_percent']:.1f}%",
            *_training_cells(found),
        ]
        rows.append([label, *_target_cells(found), *cells])
    return Table(header, rows, [record])


def quickstart_desk(records: list[Record]) -> Table:
    """The questions at the desk, the quickstart's default."""
    record = newest(of_kind(records, "quickstart_desk"), "the quickstart")
    header = ["", "right answers", "95 % interval", "KL to seed", "95 % interval", "same top-1"]
    header += ["KL to seed, task", "update norm", "train loss", "train s"]
    rows = []
    for arm, label in ARMS.items():
        found = record["arms"][arm]
        interval = "-"
        if "kl_to_seed_interval" in found:
            low, high = found["kl_to_seed_interval"]
            interval = f"{low:.3f} - {high:.3f}"
        cells = [
            fixed(found["kl_to_seed"], 3),
            interval,
            f"{found['same_top1_percent']:.1f}%",
            fixed(found["task_kl"], 3),
            fixed(found["update_norm"], 2),
            *_training_cells(found),
        ]
        rows.append([label, *_target_cells(found), *cells])
    return Table(header, rows, [record])


def _target_cells(found: dict[str, Any]) -> list[str]:
    """Right answers and their interval."""
    low, high = found["interval"]
    share = 100 * found["right"] / found["items"]
    return [f"{found['right']}/{found['items']} = {share:.1f}%", f"{low:.1f}% - {high:.1f}%"]


def _training_cells(found: dict[str, Any]) -> list[str]:
    """First and last loss of the training, and its seconds."""
    loss = found["train_loss"]
    return [
        "-" if loss is None else f"{loss[0]:.3f} -> {loss[1]:.3f}",
        fixed(found["train_seconds"]),
    ]


DEFINITIONS = {
    "what-came-out": Definition("four data sets, SFT beside SDFT, one line each", what_came_out),
    "real-data": Definition("four data sets, all arms and measures", real_data),
    "real-data-differences": Definition("SDFT - SFT on them, with tests", differences),
    "real-data-settings": Definition("rates, modules and ranks on two of them", settings),
    "quickstart-desk": Definition("the three arms of the quickstart", quickstart_desk),
    "quickstart": Definition("the three arms of its word problems", quickstart),
}
