"""How many cores a process takes, and how its threads wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine.runtime import cores
from tests.conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


def environment_of(code: str, **given: str) -> list[str]:
    """The words that `code` prints in a process whose only OpenMP settings are `given`."""
    env = {}
    for name, value in os.environ.items():
        if name not in cores.WAITING and not name.startswith("OMP_"):
            env[name] = value
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env | given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_sets_the_spinning_before_it_imports_torch(script):
    """libgomp reads its environment once, when torch is imported. The process ends there."""
    code = (
        "import builtins, os, runpy, sys\n"
        "whole = builtins.__import__\n"
        "def watched(name, *rest):\n"
        "    if name.split('.')[0] == 'torch':\n"
        "        print('torch', os.environ.get('GOMP_SPINCOUNT'))\n"
        "        sys.exit()\n"
        "    return whole(name, *rest)\n"
        "builtins.__import__ = watched\n"
        f"runpy.run_path('scripts/{script}', run_name='imported')\n"
    )
    printed = environment_of(code)
    assert printed in ([], ["torch", str(cores.SPINS)])


@pytest.mark.parametrize("name", cores.WAITING)
def test_settings_of_the_user_stay(name):
    code = "import engine, os; print(*(os.environ.get(n) for n in engine.runtime.cores.WAITING))"
    expected = ["7" if variable == name else "None" for variable in cores.WAITING]
    assert environment_of(code, **{name: "7"}) == expected
    assert environment_of(code) == [str(cores.SPINS), "None", "None"]


def write_files(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, 6),
        ("0::/", {"cpu.max": "3200000 100000\n"}, 6),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/../elsewhere", {"cpu.max": "200000 100000\n"}, 6),
        (
            "4:cpu,cpuacct:/j\n3:memory:/j",
            {"cpu/j/cpu.cfs_quota_us": "200000\n", "cpu/j/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        (
            "4:cpu,cpuacct:/j",
            {"cpu/j/cpu.cfs_quota_us": "-1\n", "cpu/j/cpu.cfs_period_us": "100000\n"},
            6,
        ),
        ("0::/", {"cpu.max": "something\n"}, 6),
        ("0::/", {}, 6),
    ],
)
def test_a_container_has_as_many_cores_as_it_may_use(
    tmp_path, monkeypatch, groups, files, expected
):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: range(6))
    write_files(tmp_path / "sys", files)
    write_files(tmp_path / "proc", {"cgroup": groups + "\n"})
    assert cores.cores(tmp_path / "proc", tmp_path / "sys") == expected


def test_all_bound_cores_count_where_there_are_no_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: range(6))
    assert cores.cores(tmp_path, tmp_path) == 6


def test_threads_are_at_most_the_cores_unless_the_user_set_them(monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert [cores.within_limits(n) for n in (1, 2, 8)] == [1, 2, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert cores.within_limits(8) == 8, "the user's own number"
