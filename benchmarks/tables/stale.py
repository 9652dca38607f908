"""Find the tables that are older than the code they measure. Asks git, changes nothing."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables.records import ROOT, Record

COMPUTING = ["kernels", "model"]
PIPELINE = [
    *COMPUTING,
    "engine/presets.py",
    "engine/data",
    "engine/sampling",
    "engine/verify",
    "engine/measure",
    "engine/distill",
    "engine/train",
    "engine/evaluate",
]

# Kind of record -> the files and folders that its figures depend on.
MEASURED_PATHS = {
    "kernels": ["kernels"],
    "step": [*COMPUTING, "engine/train", "engine/sampling"],
    "measure": [*COMPUTING, "engine/train", "engine/sampling"],
    "product": PIPELINE,
    "train": [*COMPUTING, "engine/train", "engine/data/pack.py"],
    "memory": [*COMPUTING, "engine/train/memory_plan.py", "engine/train/step.py"],
    "rows": ["engine/data", "engine/train/file_examples.py", "engine/train/order.py"],
    "sharded": [*COMPUTING, "engine/train", "engine/runtime/distributed.py"],
    "soak": [*COMPUTING, "engine/train"],
    "sampler": [*COMPUTING, "engine/sampling", "engine/measure/likelihood.py"],
    "distill_processes": [*COMPUTING, "engine/sampling", "engine/distill"],
    "busy": [*COMPUTING, "engine/sampling", "engine/train", "engine/runtime/cores.py"],
    "real_data": [*PIPELINE, "engine/jobs/study.py"],
    "real_data_settings": [*PIPELINE, "engine/jobs/study.py"],
    "rivals": [*PIPELINE, "engine/jobs/study.py", "engine/measure/equal_target.py"],
    "instructions": [*COMPUTING, "engine/sampling", "engine/evaluate/tasks"],
    "quickstart_desk": [*PIPELINE, "engine/jobs/sdft.py", "engine/jobs/demo_desk.py"],
    "quickstart": [*PIPELINE, "engine/jobs/sdft.py", "engine/jobs/demo.py"],
}


@dataclass(frozen=True)
class Age:
    """The commits after one commit that touch the paths of one kind of record."""

    commit: str
    changes: list[str]  # "abc1234 2026-11-27 subject", newest first
    problem: str | None = None  # why git cannot tell


def git(root: Path, *arguments: str) -> str | None:
    """What git prints, without the last line end; None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def why_no_history(root: Path) -> str | None:
    """Why git cannot compare commits here; None when it can."""
    shallow = git(root, "rev-parse", "--is-shallow-repository")
    if shallow is None:
        return "this is no git clone, so the age of the tables is not known"
    if shallow == "true":
        return (
            "this clone has no full history, so the age of the tables is not known; "
            "`git fetch --unshallow` brings it"
        )
    return None


def age(root: Path, commit: str | None, paths: list[str]) -> Age:
    """Commits after `commit` that touch one of the paths."""
    if commit is None:
        return Age("?", [], "commit not recorded")
    if git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        return Age(commit, [], f"commit {commit} is not in this clone")
    log = ["log", "--format=%h %as %s", f"{commit}..HEAD", "--", *paths]
    changes = git(root, *log) or ""
    return Age(commit, changes.splitlines())


def report(tables: dict[str, list[Record]], root: Path = ROOT) -> str:
    """A line per table and commit, then the paths compared. `tables`: name -> its records."""
    reason = why_no_history(root)
    if reason:
        return reason
    ages: dict[tuple[str | None, str], Age] = {}
    lines = []
    for name, records in tables.items():
        measured = dict.fromkeys((record.commit, record.kind) for record in records)
        for commit, kind in measured:
            if (commit, kind) not in ages:
                ages[commit, kind] = age(root, commit, MEASURED_PATHS[kind])
            found = ages[commit, kind]
            lines.append(f"{name:22} {kind:18} {found.commit:8} {_verdict(found)}")
    lines += ["", "compared with the commits that touch, for each kind of record:"]
    for kind in dict.fromkeys(kind for _, kind in ages):
        lines.append(f"  {kind:18} {', '.join(MEASURED_PATHS[kind])}")
    return "\n".join(lines)


def _verdict(found: Age) -> str:
    if found.problem:
        return f"unknown: {found.problem}"
    if not found.changes:
        return "up to date"
    count = len(found.changes)
    commits = "1 commit" if count == 1 else f"{count} commits"
    return f"stale: {commits} since, newest {found.changes[0]}"
