"""To import this before `kernels` is to have triton's kernels on a machine without a GPU, too."""

import contextlib

with contextlib.suppress(ImportError):  # there are wheels for Linux; who needs it says so
    import triton  # noqa: F401
