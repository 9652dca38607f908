"""A plugin of pytest: the C kernels are those of the library that TESTED_LIBRARY names.

TESTED_LIBRARY=FILE python -m pytest -p tests.helpers.tested_library tests/kernels/...
"""

import contextlib
import os
from pathlib import Path

from kernels.cpu import native

VARIABLE = "TESTED_LIBRARY"


def pytest_configure(config):
    library = native.bind(Path(os.environ[VARIABLE]))
    loader = native.Loader(loaded=native.Loaded(library))
    stack = contextlib.ExitStack()
    stack.enter_context(native.loading_by(loader))
    config.add_cleanup(stack.close)
