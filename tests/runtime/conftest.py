"""Fixtures of tests/runtime: a script run in this process, signal handlers as in a terminal."""

import runpy
import signal
import sys
from pathlib import Path

import pytest

from engine.runtime import stopping

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch, capsys):
    """`script("sdft", *args)` runs scripts/sdft.py in this process: exit code, printed text."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture
def signals():
    """Python's handler for Ctrl-C, also where a shell started pytest with `&`; restored after."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    mine = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is mine and stopping._signals.by is None
    signal.signal(signal.SIGINT, before)
