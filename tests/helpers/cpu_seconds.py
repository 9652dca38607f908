"""A plugin of pytest: the CPU seconds of each file, of this process and all that it started.

    python -m pytest -n 0 -p tests.helpers.cpu_seconds tests/train

On a busy machine CPU seconds stay what they are; those of `--durations` do not.
"""

from __future__ import annotations

import resource
from collections import Counter

import pytest

from tests.helpers import programs

SHOWN = 40  # files, the longest ones
seconds: Counter[str] = Counter()  # file -> CPU seconds; changed by the hook below alone


def spent() -> float:
    """CPU seconds of this process, of its children that have ended, and of forked programs."""
    total = programs.cpu_seconds()
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = spent()
    result = yield
    seconds[item.nodeid.partition("::")[0]] += spent() - before
    return result


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("CPU seconds")
    for file, value in seconds.most_common(SHOWN):
        terminalreporter.write_line(f"{value:8.1f}  {file}")
    terminalreporter.write_line(f"{seconds.total():8.1f}  all")
